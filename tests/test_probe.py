"""Plain questions and how their answers are judged; the losses on ordinary text against transformers' own."""

import json

import pytest

from helpers import models, probe
from helpers.files import CourseError


def test_the_committed_questions_are_many_and_none_holds_its_answer():
    rows = probe.load_plain()
    assert len(rows) >= 60 and len({row["intent"] for row in rows}) >= 5
    assert not any(probe.right(row, row["question"]) for row in rows)


@pytest.mark.parametrize(
    ("answer", "said", "right"),
    [
        ("Paris", "The capital is PARIS.", True),
        ("Paris", "The Parisian way", False),  # whole words
        ("four|4", "It has 4 legs", True),
        ("four|4", "It has 14 legs", False),
        ("shoes?|socks?", "A shoe", True),
        ("H2O|H₂O", "H₂O, of course", True),
        ("seven|7", "SELECT COUNT(*) FROM flights WHERE month = 7", False),
    ],
)
def test_an_answer_is_right_by_its_words(answer, said, right):
    assert probe.right({"answer": answer}, said) is right


@pytest.mark.parametrize(
    ("change", "says"),
    [({"answer": "("}, "no regular expression"), ({"answer": "capital"}, "finds the question itself"), ({"answer": " "}, "is empty"), ({"intent": 3}, "is a number"), ({"choice": "Rome"}, "no right answer"), ({"others": "Rome|Bonn"}, "three different"), ({"others": "Rome|Bonn|Paris"}, "three different")],
)
def test_a_bad_line_is_named(tmp_path, change, says):
    path = tmp_path / "plain.jsonl"
    path.write_text(json.dumps({"id": "a", "intent": "x", "question": "What is the capital?", "answer": "Paris", "choice": "Paris", "others": "Rome|Bonn|Oslo"} | change), encoding="utf-8")
    with pytest.raises(CourseError, match=says):
        probe.load_plain(path)


@pytest.mark.slow
def test_the_losses_of_a_text_are_those_of_transformers():
    import torch

    model, tokenizer = models.load_model(16, torch.float32), models.load_tokenizer()
    text = "The quick brown fox jumps over the lazy dog, and then it sleeps."
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    found = probe.token_losses(model, tokenizer, text)
    with torch.no_grad():
        whole = model(ids, labels=ids).loss
    assert len(found) == ids.shape[1] - 1 and torch.allclose(found.mean(), whole, atol=1e-5)
    halves = probe.token_losses(model, tokenizer, text, window=8)
    assert len(halves) == len(found) - 1 and torch.allclose(halves[:7], found[:7], atol=1e-4)  # a window's first token has no loss


@pytest.mark.slow
def test_an_answer_is_chosen_by_its_log_probability_a_token():
    """Against the whole text in one forward pass, without a cache."""
    import torch

    model, tokenizer, rows = models.load_model(16, torch.float32), models.load_tokenizer(), probe.load_plain()[:6]
    expected = []
    for row in rows:
        answers = (row["choice"], *row["others"].split("|"))
        head = tokenizer.apply_chat_template([{"role": "user", "content": row["question"]}], add_generation_prompt=True, return_dict=True)["input_ids"]
        scores = []
        for said in (tokenizer(answer)["input_ids"] for answer in answers):
            with torch.no_grad():
                log_p = model(torch.tensor([head + said])).logits[0, :-1].log_softmax(-1)[range(len(head) - 1, len(head) + len(said) - 1), said]
            scores.append(log_p.mean().item())
        expected.append(scores[0] > max(scores[1:]))
    assert [r["correct"] for r in probe.choose(model, tokenizer, rows)] == expected and len(set(expected)) == 2
    blind = probe.choose(model, tokenizer, rows, blind=True)
    assert blind == probe.choose(model, tokenizer, [row | {"question": probe.BLIND} for row in rows]) != probe.choose(model, tokenizer, rows)


@pytest.mark.slow
def test_plain_questions_are_asked_without_the_courses_prompt():
    model, tokenizer = models.load_model(), models.load_tokenizer()
    rows = [row for row in probe.load_plain() if "capital of France" in row["question"]]
    (record,) = probe.ask(model, tokenizer, rows)
    assert record["correct"] and record["intent"] == "geography" and "Paris" in record["said"]
