"""Are the quick answers the plain loop's, token by token? python benchmarks/equality.py [questions] [what ...]  (float32; an hour for all)

For every question of the validation set, all prompted baselines and both adapters where runs/ has them. Instead of decoding
again without any of `generation`'s means, which takes hours, each prompt with its answer is read once by the model as it is
(NF4 and adapter unmerged, transformers' own attention, no cache): where the likeliest next token is the answer's at every
place, a greedy loop would have written this answer. A place that differs is shown with the gap between the two logits.
"""

import contextlib
import sys
import time


def differences(model, tokenizer, chats, answers: list[list[int]], limit: int) -> list[str]:
    """What a plain loop would have done otherwise. answers: token ids, without the end of the turn."""
    import torch

    from helpers.runtime import progress_bar

    end, found = model.generation_config.eos_token_id, []
    with torch.inference_mode(), progress_bar(len(chats), "reading again") as bar:
        for number, (chat, answer) in enumerate(zip(chats, answers, strict=True)):
            prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
            expected = answer if len(answer) == limit else [*answer, end]
            ids = torch.tensor([[*prompt, *answer]], device=model.device)
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, : len(expected)]
            for place in (logits.argmax(-1) != torch.tensor(expected, device=model.device)).nonzero()[:1, 0].tolist():
                gap = (logits[place].max() - logits[place, expected[place]]).item()
                found.append(f"question {number}, token {place} of {len(expected)}: {gap:.1e} apart")
            bar.update(1)
    return found


@contextlib.contextmanager
def kept(tokenizer):
    """The token ids of all answers as they are made, by their texts."""
    from helpers import generation

    ids, text = {}, generation._text

    def noted(tokenizer, answer):
        said = text(tokenizer, answer)
        ids[said.strip()] = list(answer)
        return said

    generation._text = noted
    try:
        yield ids
    finally:
        generation._text = text


def main(count: int, names) -> int:
    from benchmarks.evaluation import LIMIT, subjects
    from helpers import dpo, generation, models, runtime

    runtime.setup()
    tokenizer, wrong = models.load_tokenizer(), 0
    for what, model, chats in subjects(count, names or ("zero-shot", "3-shot", "8-shot", "retrieved-8-shot", *dpo.main_runs())):
        start = time.perf_counter()
        with kept(tokenizer) as ids:
            texts = generation.generate(model, tokenizer, chats, LIMIT, progress=what)
        model.eval()
        found = differences(model, tokenizer, chats, [ids[text] for text in texts], LIMIT)
        wrong += len(found)
        print(f"{what}: {len(chats) - len(found)} of {len(chats)} answers as a plain loop's ({time.perf_counter() - start:.0f} s)", *found, sep="\n   ", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000, sys.argv[2:]))
