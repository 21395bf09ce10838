"""Answering, side by side in one run: python benchmarks/evaluation.py [questions] [what ...]  (ten minutes and more without fast bfloat16)

The same questions, prompts and greedy decoding, for the four prompted baselines (by the base model) and for the trained adapter
where runs/ has it. Arms, turn about:
  course       `generation.ask`: one copy of the prefix, as many rows as memory allows, a stop where a fenced query has ended
  no stop      the same without the stop
  batches      transformers' `generate` in batches of 32, sorted by length, with a prefix cache that is repeated for each row
  one by one   what a tutorial writes: the chat template, `generate` with its defaults, decode (only when named)
  library      transformers' `generate_batch`: continuous batching over paged attention (only when named)
"""

import copy
import statistics
import sys
import time

LIMIT = 96  # new tokens at most
ROUNDS = 1


def batches(model, tokenizer, chats, rows: int = 32) -> list[str]:
    """transformers' generate as well as a caller can use it: like lengths together, the shared prefix read once and its cache copied."""
    import torch

    from helpers import prefix

    prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=True)["input_ids"] for c in chats]
    shared, pad, answers = prefix.shared_length(prompts), tokenizer.pad_token_id, [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    # the last position of each prompt is a strided slice, for which torch's CPU matmul would copy the head's weights once a prompt
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    with torch.inference_mode():
        read = model(input_ids=torch.tensor([prompts[0][:shared]], device=model.device), use_cache=True, logits_to_keep=1) if shared >= 64 else {}
        kept = {name: read[name] for name in {"past_key_values", "cache"} & set(read)}
        shared = shared if kept else 0
        for start in range(0, len(order), rows):
            batch = order[start : start + rows]
            asked = [prompts[i] for i in batch]
            width = max(map(len, asked))
            ids = torch.tensor([p[:shared] + [pad] * (width - len(p)) + p[shared:] for p in asked], device=model.device)
            mask = torch.tensor([[1] * shared + [0] * (width - len(p)) + [1] * (len(p) - shared) for p in asked], device=model.device)
            cache = {name: copy.deepcopy(value) for name, value in kept.items()}
            for value in cache.values():
                value.batch_repeat_interleave(len(batch))
            out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=LIMIT, pad_token_id=pad, do_sample=False, **cache)
            for i, text in zip(batch, tokenizer.batch_decode(out[:, width:], skip_special_tokens=True), strict=True):
                answers[i] = text.strip()
    hook.remove()
    return answers


def one_by_one(model, tokenizer, chats) -> list[str]:
    import torch

    answers = []
    for chat in chats:
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True).to(model.device)
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=LIMIT, do_sample=False)
        answers.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return answers


def library(model, tokenizer, chats) -> list[str]:
    from transformers import GenerationConfig

    prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=True)["input_ids"] for c in chats]
    ends = {"eos_token_id": model.generation_config.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    out = model.generate_batch(inputs=prompts, generation_config=GenerationConfig(max_new_tokens=LIMIT, do_sample=False, **ends))
    found = sorted(out.values(), key=lambda one: int(one.request_id.rsplit("_", 1)[-1]))
    return [tokenizer.decode(one.generated_tokens, skip_special_tokens=True).strip() for one in found]


def subjects(count: int, names):
    """Name, model and chats of each thing to measure: prompted baselines, and the main runs whose adapters runs/ has."""
    from helpers import adapters, baselines, dpo, flights, models

    questions, train = list(flights.subset(flights.load_questions("validation"), count)), list(flights.load_questions("train"))
    for stage in [s for s in baselines.STAGES if s != "nearest-question" and s in names]:
        asked, shots = questions, baselines.shots_for(stage, train)
        if stage == "zero-shot":
            asked = [dict(q, question=baselines.ZERO_SHOT + q["question"]) for q in questions]
        yield stage, models.load_model(), [flights.chat(q["question"], flights.SCHEMA_PROMPT, shots(q["question"]) if shots else ()) for q in asked]
    for stage, run in dpo.main_runs().items():
        folder = run[0].folder() / "adapter"
        if stage in names and adapters.have_adapter(folder):
            yield stage, adapters.load_adapter(folder), [flights.chat(q["question"]) for q in questions]


def main(count: int, names) -> None:
    from helpers import generation, models, runtime
    from helpers.extract import complete, extract_sql

    runtime.setup()
    tokenizer = models.load_tokenizer()
    arms = {
        "course": lambda model, chats: generation.generate(model, tokenizer, chats, LIMIT, stop=complete),
        "no stop": lambda model, chats: generation.generate(model, tokenizer, chats, LIMIT),
        "batches": lambda model, chats: batches(model, tokenizer, chats),
        "one by one": lambda model, chats: one_by_one(model, tokenizer, chats),
        "library": lambda model, chats: library(model, tokenizer, chats),
    }
    arms = {name: arm for name, arm in arms.items() if name in ("course", "no stop", "batches") or name in names}
    print(f"{runtime.device().name}, {runtime.device().dtype_name}; {count} questions, medians of {ROUNDS}; times against `batches`")
    whole = dict.fromkeys(arms, 0.0)
    for what, model, chats in subjects(count, names or ("zero-shot", "3-shot", "8-shot", "retrieved-8-shot", "sft")):
        seconds, answers = {name: [] for name in arms}, {}
        for _ in range(ROUNDS):
            for name, arm in arms.items():
                start = time.perf_counter()
                answers[name] = arm(model, chats)
                seconds[name].append(time.perf_counter() - start)
        taken = {name: statistics.median(values) for name, values in seconds.items()}
        whole = {name: whole[name] + taken[name] for name in arms}
        print(f"{what}: " + "; ".join(f"{name} {s:.1f} s ({taken['batches'] / s:.1f}x)" for name, s in taken.items()))
        for name in arms:
            if name not in ("course", "batches"):
                same = sum(a == b for a, b in zip(answers[name], answers["batches"], strict=True))
                print(f"   {name}: {same} of {count} answers as in batches")
        same = sum(extract_sql(a) == extract_sql(b) for a, b in zip(answers["course"], answers["batches"], strict=True))
        print(f"   course: {same} of {count} queries as in batches", flush=True)
    print("all: " + "; ".join(f"{name} {s:.1f} s ({whole['batches'] / s:.1f}x)" for name, s in whole.items()))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100, sys.argv[2:])
