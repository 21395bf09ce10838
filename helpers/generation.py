"""Asking a model many questions: batched generation over a shared prefix."""

import copy
import itertools
import time

from helpers.flights import SYSTEM_PROMPT, chat
from helpers.runtime import progress_bar


def generate(model, tokenizer, conversations, max_new_tokens: int = 96, batch_size: int = 32, progress: str = "", temperature: float = 0) -> list[str]:
    """Answers to a list of chats (each a list of messages), in the order asked: greedy, or sampled at a `temperature`.

    Batched, padded on the left, sorted by length so that little is padding; stops at the end of the turn. What all
    prompts begin with (a schema, few-shot examples) is run through the model once and its key/value cache reused.
    In float32 the answers don't depend on the batch size (tested); in 16 bits a near-tie can fall either way.
    `progress` names the progress bar (none if empty).
    """
    import torch

    prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=True)["input_ids"] for c in conversations]
    shared = _shared_prefix(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    with torch.inference_mode(), _contiguous_head(model), progress_bar(len(prompts), progress) as bar:
        read = model(input_ids=torch.tensor([prompts[0][:shared]], device=model.device), use_cache=True, logits_to_keep=1) if shared else {}
        prefix = {name: read[name] for name in {"past_key_values", "cache"} & set(read)}  # its name before and from transformers 5.24 on
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            asked = [prompts[i] for i in batch]
            for i, answer in zip(batch, _generate_batch(model, tokenizer, asked, prefix, shared, max_new_tokens, **sampling), strict=True):
                answers[i] = answer
            bar.update(len(batch))
    return answers


def _contiguous_head(model):
    """Hands the LM head a contiguous tensor, within a `with`. The last position of each prompt is a strided slice, for which
    torch's CPU matmul copies the head's weights once a prompt: 1.8 GB for 32, and more than half of the time."""
    return model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))


def _shared_prefix(prompts: list[list[int]]) -> int:
    """How many leading tokens all prompts share (never a whole prompt); 0 where caching them isn't worth it."""
    shortest, longest = min(prompts), max(prompts)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(shortest, longest, strict=False))
    shared = min(sum(1 for _ in same), min(map(len, prompts)) - 1)
    return shared if shared >= 64 and len(prompts) > 1 else 0


def _generate_batch(model, tokenizer, prompts, prefix, shared, max_new_tokens, **sampling) -> list[str]:
    """`prefix` holds the key/value cache of the first `shared` tokens under its name in transformers; {} and 0 where none is kept."""
    import torch

    width, pad = max(map(len, prompts)), tokenizer.pad_token_id
    # cached tokens stand first, then the padding, then the rest
    ids = torch.tensor([p[:shared] + [pad] * (width - len(p)) + p[shared:] for p in prompts], device=model.device)
    mask = torch.tensor([[1] * shared + [0] * (width - len(p)) + [1] * (len(p) - shared) for p in prompts], device=model.device)
    for name, kept in prefix.items():
        sampling[name] = copy.deepcopy(kept)
        sampling[name].batch_repeat_interleave(len(prompts))
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad, **sampling)
    return [t.strip() for t in tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)]


def ask(model, tokenizer, questions, system: str = SYSTEM_PROMPT, shots=None, progress: str = "", **kwargs) -> tuple[list[str], float]:
    """Answers to a split's questions and the seconds it took. `shots` maps a question to its few-shot rows."""
    start = time.perf_counter()
    chats = [chat(q["question"], system, shots(q["question"]) if shots else ()) for q in questions]
    return generate(model, tokenizer, chats, progress=progress, **kwargs), time.perf_counter() - start
