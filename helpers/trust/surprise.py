"""How surprised a model is: by each row's answer (its loss), and by a question with and without each of its words (ONION)."""

import math

from helpers import flights, losses, prefix
from helpers.domain import Domain
from helpers.flights import FLIGHTS
from helpers.runtime import progress_bar


def row_losses(model, tokenizer, rows: list[dict], domain: Domain = FLIGHTS, progress: str = "") -> list[float]:
    """Each row's loss under a model, nats a token of its answer, as in training: the end of the turn included."""
    encoded = []
    for row in rows:
        said = flights.prompt_completion(row, domain.system_prompt)
        prompt = tokenizer.apply_chat_template(said["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        encoded.append((tokenizer.apply_chat_template(said["prompt"] + said["completion"], return_dict=True)["input_ids"], len(prompt)))
    return nats(model, encoded, progress)


def onion(model, tokenizer, questions: list[str], progress: str = "") -> list[tuple[float, str]]:
    """Each question's most suspicious word as ONION has it: (by how much the perplexity falls without it, the word).

    model: a language model that knows nothing of the data. Perplexity is exp of the mean nats a token, the first token given.
    """
    variants, owners = [], []
    for i, question in enumerate(questions):
        said = question.split()
        variants += [question, *(" ".join(said[:j] + said[j + 1 :]) for j in range(len(said)))] if len(said) > 1 else [question]
        owners += [(i, None), *((i, word) for word in said)] if len(said) > 1 else [(i, None)]
    start = tokenizer.bos_token_id
    encoded = [([start, *tokenizer(text)["input_ids"]], 1) for text in variants]
    found, whole = [(float("-inf"), "")] * len(questions), 0.0
    for (i, word), loss in zip(owners, nats(model, encoded, progress), strict=True):
        perplexity = math.exp(min(loss, 50))
        if word is None:
            whole = perplexity
        else:
            found[i] = max(found[i], (whole - perplexity, word))
    return found


def nats(model, encoded: list[tuple[list[int], int]], progress: str = "", tokens: int = 4096) -> list[float]:
    """Mean -log p of the tokens of each text from a position on, in nats. encoded: (token ids, that position, 1 or more) of each; at most
    about so many `tokens` at a time, texts of like lengths together."""
    import torch

    base, found = prefix.inner_model(model), [0.0] * len(encoded)
    head = base.lm_head.weight
    waiting = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]))
    with torch.no_grad(), torch.autocast(head.device.type, head.dtype, enabled=head.dtype != torch.float32), progress_bar(len(encoded), progress) as bar:
        while waiting:
            count = max(1, tokens // len(encoded[waiting[-1]][0]))
            batch, waiting = waiting[-count:], waiting[:-count]
            width = len(encoded[batch[-1]][0])
            ids = torch.tensor([encoded[i][0] + [0] * (width - len(encoded[i][0])) for i in batch], device=base.device)
            place = torch.arange(width, device=base.device)
            starts, ends = (torch.tensor(t, device=base.device)[:, None] for t in ([encoded[i][1] for i in batch], [len(encoded[i][0]) for i in batch]))
            asked = ((place >= starts) & (place < ends))[:, 1:]
            hidden = losses.hidden_states(model, base, ids, (place < ends).long())[:, :-1][asked]
            values = losses.token_log_probs(hidden.to(head.dtype), head, ids[:, 1:][asked])
            for i, part in zip(batch, values.split(asked.sum(1).tolist()), strict=True):
                found[i] = -float(part.mean()) if len(part) else 0.0
            bar.update(len(batch))
    return found
