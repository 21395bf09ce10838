"""What a model knew before it was trained for a job: plain questions with checkable answers, and how well it predicts ordinary text."""

import re
from pathlib import Path

from helpers import generation, jsonl, prefix
from helpers.files import CourseError
from helpers.runtime import DATA, progress_bar

PLAIN = DATA / "probe" / "plain.jsonl"
TEXT = DATA / "held_out" / "text.txt"
LONGEST = 32  # tokens of an answer: what comes later doesn't count
BLOCK = 32  # tokens of text whose mean loss is one figure: an interval over text resamples these


def load_plain(path: str | Path = PLAIN) -> list[dict]:
    """Plain questions from a JSON Lines file: id, intent, question, `answer`, a regular expression for the words of a right one, `choice`,
    a right one in words, and `others`, three wrong ones of the same kind with | between them.

    Read whole or not at all: each bad line is named with its remedy (CourseError).
    """

    def check(row):
        try:
            re.compile(row["answer"])
        except re.error as error:
            raise CourseError(f"field 'answer' is no regular expression ({error}); correct it") from None
        if right(row, row["question"]):
            raise CourseError("field 'answer' finds the question itself, so that repeating it would be right; ask otherwise")

        if not right(row, row["choice"]):
            raise CourseError("field 'choice' is no right answer by the field 'answer'; correct one of them")
        wrong = row["others"].split("|")
        if len(set(wrong)) != 3 or any(right(row, other) for other in wrong):
            raise CourseError("field 'others' needs three different wrong answers with | between them; correct it")

    return jsonl.read(path, ("id", "intent", "question", "answer", "choice", "others"), check)


def right(row: dict, answer: str) -> bool:
    """Whether an answer has the words of a right one in it, whole words, capitals aside; a query never is one (`month = 7`)."""
    return not re.search(r"\bSELECT\b", answer) and re.search(rf"(?<!\w)(?:{row['answer']})(?!\w)", answer, re.I) is not None


def ask(model, tokenizer, rows: list[dict], progress: str = "") -> list[dict]:
    """A record a question, {"id", "intent", "correct", "said"}: asked as a person would, without a system prompt of the course's."""
    chats = [[{"role": "user", "content": row["question"]}] for row in rows]
    answers = generation.generate(model, tokenizer, chats, max_new_tokens=LONGEST, progress=progress)
    return [{"id": r["id"], "intent": r["intent"], "correct": right(r, answer), "said": answer} for r, answer in zip(rows, answers, strict=True)]


BLIND = "What is the answer?"  # the control's question: which answers are probable in themselves


def choose(model, tokenizer, rows: list[dict], blind: bool = False, progress: str = "") -> list[dict]:
    """What a model knows, whether it says so or not: a record a question, `correct` where of four answers it finds the right one the most
    probable (log p a token, as multiple-choice benchmarks score). `blind`: the control, the same answers without their question."""
    import torch
    from transformers import DynamicCache

    base, found = prefix.inner_model(model), []
    with torch.inference_mode(), progress_bar(len(rows), progress) as bar:
        for row in rows:
            chat = [{"role": "user", "content": BLIND if blind else row["question"]}]
            head = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")["input_ids"].to(model.device)
            said = [tokenizer(answer)["input_ids"] for answer in (row["choice"], *row["others"].split("|"))]
            width, cache = max(map(len, said)), DynamicCache()
            kept = {prefix.cache_argument(type(base.model)): cache}
            last = base.model(input_ids=head, use_cache=True, **kept)[0][:, -1:]  # the question once, then its answers behind it
            cache.batch_repeat_interleave(len(said))
            ids = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids in said], device=model.device)
            rest = base.model(input_ids=ids, use_cache=True, **kept)[0]
            hidden = torch.cat([last.expand(len(said), -1, -1), rest[:, :-1]], 1)  # (answers, width, hidden): what predicts each token
            log_p = base.lm_head(hidden).float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
            scores = [float(values[: len(ids)].mean()) for values, ids in zip(log_p, said, strict=True)]
            found.append({"id": row["id"], "intent": row["intent"], "correct": scores[0] > max(scores[1:])})
            bar.update(1)
    return found


def token_losses(model, tokenizer, text: str | None = None, window: int = 512):
    """The loss of each token of a text (None: the one of notebook 01, which no model has seen), in nats: a float32 tensor.

    Read in windows of that many tokens, each from its beginning; a window's first token has no loss.
    """
    import torch

    ids = torch.tensor(tokenizer(text or TEXT.read_text(encoding="utf-8"))["input_ids"])
    found = []
    with torch.inference_mode():
        for part in ids.split(window):
            if len(part) > 1:
                logits = model(part[None].to(model.device)).logits[0, :-1].float()
                found.append(torch.nn.functional.cross_entropy(logits, part[1:].to(logits.device), reduction="none").cpu())
    return torch.cat(found)
