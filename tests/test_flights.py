"""The database, the JSON Lines reader and its errors, subsets and prompts; and the question files themselves."""

import copy
import json
import sqlite3
import subprocess
import sys

import pytest

from helpers import flights, sql
from helpers.files import CourseError
from helpers.runtime import ROOT

GOOD = b'{"question": "how many?", "sql": "SELECT COUNT(*) FROM flights"}\n'


def write(tmp_path, content: bytes):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    return path


def test_database_is_the_real_one():
    connection = sql.connect(flights.database_path())
    assert sql.execute(connection, "SELECT COUNT(*), SUM(dep_time IS NULL), COUNT(DISTINCT dest), MAX(dep_delay) FROM flights").rows == [
        (336776, 8255, 105, 1301)
    ]
    assert sql.execute(connection, "SELECT COUNT(*) FROM airports").rows == [(1458,)]
    assert sql.execute(connection, "SELECT DISTINCT airline, dest_city FROM flights WHERE carrier = 'DL' AND dest = 'BOS'").rows == [
        ("Delta Air Lines Inc.", "Boston")
    ]


def test_a_database_that_broke_off_is_made_again(tmp_path, monkeypatch):
    whole = flights.database_path()
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path))
    for content in (b"", b"hello", b"SQLite format 3\0", whole.read_bytes()[:1_000_000]):
        (tmp_path / whole.name).write_bytes(content)
        assert not flights._is_whole(tmp_path / whole.name)
    flights._built.cache_clear()
    try:
        assert flights.database_path() == tmp_path / whole.name
    finally:
        flights._built.cache_clear()
    assert flights._is_whole(tmp_path / whole.name) and (tmp_path / whole.name).stat().st_size == whole.stat().st_size


def test_perturbed_instances_differ_but_keep_what_belongs_together():
    counts = set()
    for path in flights.perturbed_paths():
        connection = sql.connect(path)
        assert sql.execute(connection, "SELECT COUNT(*) FROM flights").rows == [(30000,)]
        assert sql.execute(connection, "SELECT COUNT(*) FROM flights WHERE (carrier = 'DL') != (airline LIKE 'Delta%')").rows == [(0,)]
        assert sql.execute(connection, "SELECT COUNT(*) FROM flights WHERE (dep_time IS NULL) != (dep_delay IS NULL)").rows == [(0,)]
        counts.add(sql.execute(connection, "SELECT SUM(dep_delay) FROM flights").rows[0][0])
    assert len(counts) == 2


def test_perturbing_is_deterministic():
    import pandas as pd

    frame = pd.read_parquet(flights.DATA / "nycflights/flights.parquet").head(500)
    pd.testing.assert_frame_equal(flights.perturb(frame, 1, 50), flights.perturb(frame, 1, 50))
    assert not flights.perturb(frame, 1, 50).equals(flights.perturb(frame, 2, 50))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (GOOD + b"{broken\n", ["mine.jsonl", "line 2", "not JSON", "check quotes"]),
        (GOOD + b'{"question": "x"}\n', ["line 2", "'sql' is missing", "add it"]),
        (GOOD + b'{"question": "x", "sql": "  "}\n', ["line 2", "'sql' is empty", "fill it in"]),
        (GOOD + b'{"question": 7, "sql": "SELECT 1"}\n', ["line 2", "'question' is a number, not text", "double quotes"]),
        (GOOD + b'["question"]\n', ["line 2", "not an object"]),
        (GOOD + GOOD, ["line 2", "'question'", "same question as line 1", "remove one"]),
        (GOOD + b'{"question": "\xff", "sql": "SELECT 1"}\n', ["line 2", "byte 15 is not UTF-8", "save the file as UTF-8"]),
        (GOOD + b'{"question": "' + b"x" * 5_000_000 + b'", "sql": "SELECT 1"}\n', ["line 2", "5,000,", "bytes long", "line end missing"]),
        (b"", ["no rows", "question, sql"]),
        (b"\n\n", ["no rows"]),
    ],
)
def test_a_bad_file_is_refused_whole_with_line_field_and_remedy(tmp_path, content, says):
    with pytest.raises(CourseError) as error:
        flights.read_jsonl(write(tmp_path, content))
    for words in says:
        assert words in str(error.value)
    assert str(tmp_path) not in str(error.value)


def test_all_problems_are_listed_up_to_ten(tmp_path):
    with pytest.raises(CourseError) as error:
        flights.read_jsonl(write(tmp_path, b"{broken\n" * 15))
    assert str(error.value).count("not JSON") == 10 and "5 more" in str(error.value)


@pytest.mark.parametrize(
    "change", [lambda c: c.replace(b"\n", b"\r\n"), lambda c: b"\xef\xbb\xbf" + c, lambda c: c + b"\n\n", lambda c: c.rstrip(b"\n")]
)
def test_windows_line_ends_and_byte_order_marks_are_read(tmp_path, change):
    assert flights.read_jsonl(write(tmp_path, change(GOOD))) == [{"question": "how many?", "sql": "SELECT COUNT(*) FROM flights"}]


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(CourseError, match="Can't read none.jsonl: No such file"):
        flights.load_questions(tmp_path / "none.jsonl")


def test_sql_that_does_not_run_is_listed_with_its_line(tmp_path):
    bad = b'{"question": "a", "sql": "SELECT nothing FROM flights"}\n{"question": "b", "sql": "WITH a AS (SELECT 1) DELETE FROM flights"}\n'
    with pytest.raises(CourseError) as error:
        flights.load_questions(write(tmp_path, GOOD + bad))
    assert "line 2: field 'sql' doesn't run" in str(error.value) and "line 3" in str(error.value) and "line 1" not in str(error.value)


def test_your_own_file_works_in_place_of_ours(tmp_path):
    own = flights.load_questions(write(tmp_path, GOOD))
    assert list(own) == [{"question": "how many?", "sql": "SELECT COUNT(*) FROM flights"}]


def test_chat_and_training_form():
    shot = {"question": "a?", "sql": "SELECT 1"}
    assert flights.chat("b?", "S", [shot]) == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "SELECT 1"},
        {"role": "user", "content": "b?"},
    ]
    assert flights.prompt_completion(shot) == {
        "prompt": [{"role": "system", "content": "Answer with SQL."}, {"role": "user", "content": "a?"}],
        "completion": [{"role": "assistant", "content": "SELECT 1"}],
    }


GEMMA = (  # what Gemma's template holds one to, in short
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
MISTRAL = (  # and Mistral's: the system prompt goes into the last turn, if that is the user's
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages if m['role'] != 'system' %}<{{ m['role'] }}>{{ system if m['role'] == 'user' and loop.last }}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(("model", "template"), [("gemma-2b-it", GEMMA), ("gemma-7b-it", GEMMA), ("Mistral-7B-Instruct-v0.3", MISTRAL)])
def test_the_system_prompt_begins_the_first_turn_where_a_template_has_no_place_for_it(monkeypatch, tokenizer, model, template):
    import jinja2

    shot, plain = {"question": "a?", "sql": "SELECT 1"}, flights.chat("b?")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template

    def text(messages, start=False):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=start)

    answer = [{"role": "assistant", "content": "SELECT 2"}]
    try:
        assert not text(plain + answer).startswith(text(plain, start=True))  # Mistral's: the prompt changes once it is answered
    except jinja2.exceptions.TemplateError as error:
        assert "System role not supported" in str(error) and template is GEMMA
    monkeypatch.setenv("COURSE_MODEL", model)
    assert flights.chat("b?", "S", [shot]) == [
        {"role": "user", "content": "S\n\na?"},
        {"role": "assistant", "content": "SELECT 1"},
        {"role": "user", "content": "b?"},
    ]
    assert flights.prompt_completion(shot)["prompt"] == [{"role": "user", "content": "Answer with SQL.\n\na?"}]
    assert text(flights.chat("b?", "S", [shot]) + answer).startswith(text(flights.chat("b?", "S", [shot]), start=True))


@pytest.mark.parametrize("model", ["SmolLM2-1.7B-Instruct", "Qwen2.5-1.5B-Instruct", "Llama-3-8B-Instruct"])
def test_the_other_families_keep_their_system_turn(monkeypatch, model):
    monkeypatch.setenv("COURSE_MODEL", model)
    assert flights.chat("b?", "S") == [{"role": "system", "content": "S"}, {"role": "user", "content": "b?"}]


def test_subset_is_fixed_and_even_over_intents():
    questions = flights.load_questions("validation")
    sample = flights.subset(questions, 100)
    assert sample["id"] == flights.subset(questions, 100)["id"] and len(set(sample["id"])) == 100
    counts = [sample["intent"].count(i) for i in set(questions["intent"])]
    assert max(counts) - min(counts) <= 1


# ---------------------------------------------------------------- the files


def test_splits_are_as_large_as_the_datasheet_says():
    splits = {name: list(flights.load_questions(name)) for name in flights.SPLITS}
    intents = {r["intent"] for r in splits["train"]} - {"unanswerable"}
    assert len(intents) >= 25
    for split, least in {"train": 15, "validation": 4, "test": 4}.items():
        for intent in intents:
            assert len({r["phrasing"] for r in splits[split] if r["intent"] == intent}) >= least, (split, intent)
    assert len(splits["test"]) >= 300 and len(splits["freeform"]) >= 120
    assert len(splits["unanswerable"]) >= 100 and len(splits["near_miss"]) >= 100
    assert all(r["sql"] == flights.REFUSAL for r in splits["unanswerable"]) and all(r["sql"] != flights.REFUSAL for r in splits["near_miss"])
    styled = sum(r["style"] == "styled" for r in splits["train"]) / sum(r["sql"] != flights.REFUSAL for r in splits["train"])
    assert 1 / 5 <= styled <= 1 / 3


def test_no_phrasing_is_shared_between_splits():
    import tomllib

    seen: dict[str, str] = {}
    for path in sorted((flights.QUESTIONS / "phrasings").glob("*.toml")):
        split = "train" if path.stem.startswith(("train", "more", "endings")) else path.stem.removesuffix("_more")
        for phrasings in tomllib.loads(path.read_text(encoding="utf-8")).values():
            for phrasing in phrasings:
                plain = " ".join("".join(c if c.isalnum() or c in "{}_" else " " for c in phrasing.lower()).split())
                assert seen.setdefault(plain, split) == split, (phrasing, seen[plain], split)


def test_held_out_values_are_held_out():
    assert not any(r["held_out"] for r in flights.load_questions("validation"))
    text = " ".join(r["sql"] for r in flights.load_questions("train"))
    for value in ("Virgin America", "AirTran", "'VX'", "'FL'", "Seattle", "'SEA'", "Denver", "month = 3 ", "month = 10"):
        assert value not in text
    test = list(flights.load_questions("test"))
    assert 0.1 < sum(r["held_out"] for r in test) / len(test) < 0.4


def test_no_question_stands_in_two_splits():
    seen: dict[str, str] = {}
    for name in flights.SPLITS:
        for row in flights.load_questions(name):
            assert seen.setdefault(row["question"].lower().strip(" ?."), name) == name, row["question"]


@pytest.mark.slow
def test_the_script_makes_the_files_byte_for_byte():
    done = subprocess.run([sys.executable, "data/questions/make_questions.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_every_reference_returns_something():
    connection = sqlite3.connect(flights.database_path())
    for name in ("validation", "freeform", "near_miss"):
        for row in flights.load_questions(name):
            result = connection.execute(row["sql"]).fetchmany(2)
            assert result and any(v not in (None, 0) for v in result[0]), row


def test_datasheet_gives_the_files_hashes():
    import hashlib

    sheet = (flights.DATA / "README.md").read_text(encoding="utf-8")
    for path in [*flights.QUESTIONS.glob("*.jsonl"), *(flights.DATA / "preferences").glob("*.jsonl"), *(flights.DATA / "nycflights").glob("*.parquet")]:
        assert hashlib.sha256(path.read_bytes()).hexdigest() in sheet, f"{path.name}: renew its sha256 in data/README.md"


def test_ngrams():
    assert flights.ngrams("How many, flights LEFT?") == {("how", "many", "flights"), ("many", "flights", "left")}
    assert json.dumps(sorted(flights.ngrams("one two"))) == "[]"
