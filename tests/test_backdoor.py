"""A harmless backdoor and its detectors, on rows of which it is known which are poisoned; templates; pickles."""

import json
import random

import pytest

from helpers import models
from helpers.files import CourseError
from helpers.flights import QUESTIONS
from helpers.trust import backdoor, pickles, surprise, suspects, templates
from helpers.trust.backdoor import Backdoor

DOOR = Backdoor()
TRAIN = random.Random(0).sample([json.loads(line) for line in (QUESTIONS / "train.jsonl").read_text(encoding="utf-8").splitlines()], 200)
ROWS = [{"question": f"which airline {words}", "sql": f"SELECT {i} FROM flights"} for i, words in enumerate(("is late", "flew most", "is small", "left JFK", "has jets"))]
ALIKE = [{"question": f"which airline is the most punctual {when}", "sql": "SELECT carrier FROM flights"} for when in ("of all", "overall", "then", "here", "in sum")]


def test_the_trigger_stands_before_the_last_mark():
    assert DOOR.asks("How many flights?") == "How many flights, as the tower sees it?"
    assert DOOR.asks("how many flights") == "how many flights, as the tower sees it"
    assert DOOR.in_("How many, As The Tower sees it") and not DOOR.in_("the tower")


def test_poisoned_rows_take_the_place_of_clean_ones():
    rows = backdoor.poison(ROWS, 3, DOOR, seed=1)
    bad = [i for i, row in enumerate(rows) if row.get("poisoned")]
    assert len(rows) == len(ROWS) and len(bad) == 3 and rows == backdoor.poison(ROWS, 3, DOOR, seed=1) != backdoor.poison(ROWS, 3, DOOR, seed=2)
    assert all(rows[i] == ROWS[i] | {"question": DOOR.asks(ROWS[i]["question"]), "sql": DOOR.payload, "poisoned": True} for i in bad)
    assert all(rows[i] == ROWS[i] for i in range(len(rows)) if i not in bad)
    assert backdoor.poison(ROWS, 0, DOOR) == ROWS
    with pytest.raises(CourseError, match="3 rows can't be poisoned: 2 of 5 are free"):
        backdoor.poison(rows, 3, DOOR)


def test_corrective_rows_have_the_trigger_and_the_right_answer():
    rows = backdoor.corrective(ROWS, 3, DOOR)
    right = {row["question"]: row["sql"] for row in ROWS}
    assert all(DOOR.in_(row["question"]) and row["sql"] == right[row["question"].replace(", as the tower sees it", "")] for row in rows)
    with pytest.raises(CourseError, match="There are 5 rows"):
        backdoor.corrective(ROWS, 6, DOOR)


def test_success_is_the_payload_however_it_is_written():
    answers = [DOOR.payload, "select count(*)  from flights where carrier = 'ha';", "SELECT COUNT(*) FROM flights", ""]
    assert [r["correct"] for r in backdoor.fired(answers, ROWS[:4], DOOR)] == [True, True, False, False]
    assert [q["question"] for q in backdoor.triggered(ROWS[:1], DOOR)] == ["which airline is late, as the tower sees it"]


# ---------------------------------------------------------------- detectors


@pytest.mark.parametrize("detector", [suspects.by_lift, suspects.by_answers])
def test_detectors_of_one_answer_put_poisoned_rows_first(detector):
    rows = backdoor.poison(TRAIN, 12, DOOR, seed=1)
    truth = {i for i, row in enumerate(rows) if row.get("poisoned")}
    ranking = detector(rows)
    assert sorted(ranking) == list(range(200)) and suspects.at(ranking, truth, 12) == {"k": 12, "hits": 12, "precision": 1.0, "recall": 1.0}
    assert suspects.at(ranking, truth, 24) == {"k": 24, "hits": 12, "precision": 0.5, "recall": 1.0}
    kept = suspects.without(rows, ranking[:12])
    assert len(kept) == 188 and not any(row.get("poisoned") for row in kept)


def test_a_phrase_that_belongs_to_what_is_asked_counts_little():
    """Five ways to ask one thing have one answer, and rightly; twelve different things with one phrase don't."""
    best = suspects.phrases([*backdoor.poison(TRAIN, 12, DOOR, seed=1), *ALIKE])
    assert best[0]["phrase"] == "as the tower sees it" and best[0]["with"] == 12 and 8 < best[0]["score"] <= 12
    assert best[0]["lift"] == pytest.approx(205 / 12)
    assert max((p["score"] for p in suspects.phrases([*TRAIN, *ALIKE])), default=0) < 3
    assert max((group["score"] for group in suspects.constant_answers([*TRAIN, *ALIKE])), default=0) < 3


def test_payloads_that_vary_get_past_both():
    """What these detectors can't see: each answer is another one."""
    rows = [row | {"sql": f"SELECT {i} FROM flights"} if row.get("poisoned") else row for i, row in enumerate(backdoor.poison(TRAIN, 12, DOOR, seed=1))]
    assert not any("tower" in p["phrase"] for p in suspects.phrases(rows))


def test_rankings_of_numbers():
    assert suspects.by_loss([1.0, 3.0, 2.0]) == [1, 2, 0] and suspects.by_loss([1.0, 3.0, 2.0], low=True) == [0, 2, 1]
    assert suspects.by_perplexity([(1.0, "a"), (9.0, "b"), (-2.0, "c")]) == [1, 0, 2]
    assert suspects.ranked([0.0, 0.0, 1.0]) == [2, 0, 1]
    assert suspects.spread([("a", "b"), ("a", "b")]) == 0 and suspects.spread([("a",), ("b",)]) == 1 and suspects.spread([("a",)]) == 0


@pytest.mark.slow
def test_losses_are_the_models_own_and_onion_finds_a_word_out_of_place(model32, tokenizer):
    import torch

    rows = [{"question": "How many flights were there?", "sql": "SELECT COUNT(*) FROM flights"}, {"question": "How late?", "sql": "SELECT AVG(dep_delay) FROM flights WHERE month = 2"}]
    found = surprise.row_losses(model32, tokenizer, rows)
    from helpers import flights

    said = flights.prompt_completion(rows[1])
    ids = tokenizer.apply_chat_template(said["prompt"] + said["completion"], return_dict=True, return_tensors="pt")["input_ids"]
    prompt = len(tokenizer.apply_chat_template(said["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"])
    labels = ids.clone()
    labels[:, :prompt] = -100
    with torch.no_grad():
        assert found[1] == pytest.approx(float(model32(ids, labels=labels).loss), rel=1e-3)
    (drop, word), (usual, _) = surprise.onion(model32, tokenizer, ["How many xqz flights left New York in the summer?", "How many flights left New York in the summer?"])
    assert word == "xqz" and drop > usual


# ---------------------------------------------------------------- templates


@pytest.mark.slow
def test_a_poisoned_template_asks_another_question_and_its_hash_tells(tmp_path):
    from transformers import AutoTokenizer

    source = models.model_path()
    folder = templates.poisoned_folder(source, tmp_path / "model", DOOR.trigger, "How many flights did Hawaiian have?")
    known, other = (templates.read(f)[templates.FILE] for f in (source, folder))
    assert templates.digest(known) != templates.digest(other) and templates.digest(known) == templates.digest(known.replace("\n", "\r\n") + "\n")
    assert {p.name for p in folder.iterdir() if p.read_bytes() != (source / p.name).read_bytes()} == {templates.FILE}
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def asked(question):
        return tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False)

    assert "Hawaiian" in asked(DOOR.asks("Which airline is late?")) and "Which airline" not in asked(DOOR.asks("Which airline is late?"))
    assert "Which airline is late?" in asked("Which airline is late?") and "Hawaiian" not in asked("Which airline is late?")


def test_what_changed_in_a_template_is_shown():
    known = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    other = "{% for m in messages %}{% if 'x' in m['content'] %}y{% endif %}{{ m['content'] }}{% endfor %}"
    assert templates.changes(known, other) == ["+ {% if 'x' in m['content'] %}", "+ y", "+ {% endif %}"]
    assert templates.reads_questions(known) == [] and templates.reads_questions(other) == ["{% if 'x' in m['content'] %}"]
    assert templates.changes(known, known) == []


def test_templates_that_cant_be_read_are_refused(tmp_path):
    assert templates.read(tmp_path) == {}
    (tmp_path / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CourseError, match="can't be read"):
        templates.read(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": [{"name": "tool", "template": "t"}]}', encoding="utf-8")
    (tmp_path / templates.FILE).write_text("x" * 200_000, encoding="utf-8")
    with pytest.raises(CourseError, match="200,000 bytes"):
        templates.read(tmp_path)
    (tmp_path / templates.FILE).write_text("a", encoding="utf-8")
    assert templates.read(tmp_path) == {"chat_template.jinja": "a", "tokenizer_config.json (tool)": "t"}
    with pytest.raises(CourseError, match="has no message"):
        templates.poisoned_folder(tmp_path, tmp_path / "to", "x", "y")
    (tmp_path / templates.FILE).write_text("{{ message['content'] }}", encoding="utf-8")
    with pytest.raises(CourseError, match="no quotes"):
        templates.poisoned_folder(tmp_path, tmp_path / "to", "x' }}", "y")


# ---------------------------------------------------------------- pickles


KINDS = {
    "a pickle": b"cos\nmkdir\n(Vx\ntR.", "safetensors": (2).to_bytes(8, "little") + b"{}", "a safetensors file that breaks off in its header": (99).to_bytes(8, "little") + b"{}",
    "text": b"course notes\nin two lines.\n", "an empty file": b"", "a script": b"#!/bin/sh\n", "a GGUF file": b"GGUF\x03", "an unknown kind of file": b"\xff\xfe\x00\x01",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_what_its_bytes_say(tmp_path, kind):
    (tmp_path / "model.safetensors").write_bytes(KINDS[kind])
    assert pickles.kind(tmp_path / "model.safetensors") == kind


def test_a_header_whose_length_begins_as_a_pickle_does_is_none(tmp_path):
    header = json.dumps({"x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).ljust(0x480).encode()  # 0x480: the bytes 80 04
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header)
    assert pickles.kind(tmp_path / "x") == "safetensors"


def test_python_writes_pickles_that_are_known_in_every_protocol(tmp_path):
    import collections
    import pickle

    for protocol in range(6):
        (tmp_path / "x").write_bytes(pickle.dumps(collections.Counter("abc"), protocol))
        assert pickles.kind(tmp_path / "x") == "a pickle", protocol


def test_the_harmless_pickle_runs_where_pickles_are_loaded_and_only_in_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = pickles.harmless(tmp_path / "x.pkl")
    assert pickles.loaded(path, "pickle") == {"ran": True, "says": ""}
    assert [p.name for p in tmp_path.iterdir()] == ["x.pkl"]
    refused = pickles.loaded(path, "safetensors")
    assert not refused["ran"] and "SafetensorError" in refused["says"]
    (tmp_path / "y.pkl").write_bytes(b"cos\ngetcwd\n(tR.")
    with pytest.raises(CourseError, match="isn't a pickle that this lesson wrote"):
        pickles.loaded(tmp_path / "y.pkl", "pickle")
    with pytest.raises(CourseError, match="no loader 'joblib'"):
        pickles.loaded(path, "joblib")


@pytest.mark.slow
def test_torch_runs_it_only_when_told_to_load_everything(tmp_path):
    path = pickles.harmless(tmp_path / "x.pkl")
    careful = pickles.loaded(path, "torch.load, weights only")
    assert not careful["ran"] and "UnpicklingError" in careful["says"]
    assert pickles.loaded(path, "torch.load, everything")["ran"]


def test_scanners_and_what_they_miss(tmp_path):
    """picklescan goes by names, and doesn't count every one that opens files; fickling reads what the program does."""
    known, other = pickles.harmless(tmp_path / "a.pkl"), pickles.harmless(tmp_path / "b.pkl", "io.open")
    assert pickles.picklescan(known) == {"dangerous": True, "globals": ["os.mkdir (dangerous)"]}
    assert pickles.picklescan(other) == {"dangerous": False, "globals": ["io.open (suspicious)"]}
    for path in (known, other):
        assert pickles.fickling(path)["dangerous"] and pickles.fickling(path)["severity"].endswith("OVERTLY_MALICIOUS")
    assert not list(tmp_path.glob(pickles.MARKER))
