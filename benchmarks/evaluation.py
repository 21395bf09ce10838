"""Batched evaluation against one-by-one `generate`, in one run: python benchmarks/evaluation.py [questions]

Same model (the trained adapter where runs/ has it, else the base model), same questions, same greedy decoding and limit;
one by one is what a tutorial writes: the chat template, `model.generate` with its defaults, decode.
"""

import statistics
import sys
import time

from helpers import adapters, flights, generation, models, recipes, runtime

LIMIT = 80  # new tokens at most


def one_by_one(model, tokenizer, chats) -> list[str]:
    import torch

    answers = []
    for chat in chats:
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True).to(model.device)
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=LIMIT, do_sample=False)
        answers.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def main(count: int) -> None:
    runtime.setup()
    tokenizer, recipe = models.load_tokenizer(), recipes.SFTRecipe()
    trained = (recipe.folder() / "adapter" / "adapter_config.json").exists()
    model = adapters.load_adapter(recipe.folder() / "adapter") if trained else models.load_model()
    system = flights.SYSTEM_PROMPT if trained else flights.SCHEMA_PROMPT
    chats = [flights.chat(q["question"], system) for q in flights.subset(flights.load_questions("validation"), count)]
    seconds: dict[str, list[float]] = {"batched": [], "one by one": []}
    for _ in range(3):
        for name, ask in {
            "batched": lambda: generation.generate(model, tokenizer, chats, max_new_tokens=LIMIT),
            "one by one": lambda: one_by_one(model, tokenizer, chats),
        }.items():
            start = time.perf_counter()
            answers = ask()
            seconds[name].append(time.perf_counter() - start)
            if name == "batched":
                batched = answers
    same = sum(a.strip() == b.strip() for a, b in zip(batched, answers, strict=True))
    fast, slow = (statistics.median(seconds[name]) for name in ("batched", "one by one"))
    print(f"{'trained adapter on NF4' if trained else 'base model'}, {runtime.device().dtype_name}, {count} questions, medians of 3")
    print(
        f"batched {fast:.1f} s, one by one {slow:.1f} s: {slow / fast:.1f} times (target 4); {same} of {count} answers the same (16-bit rounding decides the rest)"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 48)
