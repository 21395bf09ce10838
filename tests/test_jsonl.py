"""Files of questions and preferences that anyone may have written: what is refused, with which remedy; what is read, and how."""

import json
import os
import string
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import convert, dpo, flights, jsonl, recipes, scoring
from helpers.files import CourseError
from helpers.runtime import ROOT
from helpers.worker import Worker

GOOD = b'{"question": "how many?", "sql": "SELECT COUNT(*) FROM flights"}\n'
ROW = {"question": "how many?", "sql": "SELECT COUNT(*) FROM flights"}


def write(tmp_path, content: bytes):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    return path


def second(**fields) -> bytes:
    """A good line, then one with these fields."""
    return GOOD + json.dumps({"question": "x", "sql": "SELECT 1"} | fields).encode() + b"\n"


# ---------------------------------------------------------------- refused

REFUSED = {  # kind of input: the file, and what is said
    "brackets": (GOOD + b"[" * 100_000, "line 2: nested too deeply; a row is one flat object"),
    "half a character in a value": (second(question="a\ud800"), r"line 2: field 'question' holds half a character (\ud800, a lone surrogate)"),
    "a null": (second(question=None), "line 2: field 'question' is null; write its text in double quotes, or remove the line"),
    "a number": (second(sql=7), "line 2: field 'sql' is a number, not text; put it in double quotes"),
    "a truth": (second(sql=True), "line 2: field 'sql' is true or false, not text"),
    "a list": (second(sql=["SELECT 1"]), "line 2: field 'sql' is a list, not text; write one text"),
    "an object": (second(sql={"a": 1}), "line 2: field 'sql' is an object, not text"),
    "messages": (second(sql=[{"role": "assistant", "content": "SELECT 1"}]), "line 2: field 'sql' is a list of messages; write the last one's content"),
    "a name twice": (GOOD + b'{"question": "a", "question": "b", "sql": "SELECT 1"}\n', "line 2: field 'question' stands twice in one object; keep one"),
    "a name twice inside": (GOOD + b'{"question": "a", "sql": "SELECT 1", "x": {"y": 1, "y": 2}}\n', "line 2: field 'y' stands twice"),
    "a long number for a name": (second(id=1234567890123456789012345), "line 2: field 'id' is a number, not text"),
    "a wrong kind in a field of ours": (second(ordered="yes"), "line 2: field 'ordered' is a text; write true or false, without quotes"),
    "UTF-16": (GOOD.decode().encode("utf-16"), "mine.jsonl was not loaded: it is UTF-16 text; save it as UTF-8"),
    "UTF-16 without its mark": (GOOD.decode().encode("utf-16-le"), "it is UTF-16 text"),
    "UTF-16, the other way": (GOOD.decode().encode("utf-16-be"), "it is UTF-16 text"),
    "a spreadsheet": (b"PK\x03\x04" + bytes(range(256)), "it is no text file; it needs one JSON object a line"),
    "a JSON array": (b'[\n{"question": "a", "sql": "SELECT 1"}\n]\n', "it is a JSON array, not JSON Lines; python -m helpers.convert mine.jsonl"),
    "a JSON array on one line": (b'[{"question": "a", "sql": "SELECT 1"}]', "it is a JSON array, not JSON Lines"),
    "an empty array": (b"[]", "it is a JSON array"),
    "an object over many lines": (b'{\n  "question": "a",\n  "sql": "SELECT 1"\n}\n', "it is one JSON object over several lines, not one a line"),
    "a table": (b"question,sql\nhow many?,SELECT 1\n", "it is a table (CSV), not JSON Lines; python -m helpers.convert mine.jsonl"),
    "a table with semicolons": (b"\xef\xbb\xbfQuestion;SQL\r\nhow many?;SELECT 1\r\n", "it is a table (CSV)"),
    "Alpaca": (b'{"instruction": "a", "input": "", "output": "SELECT 1"}\n', "line 1: these are Alpaca's fields, not question and sql; python -m helpers.conv"),
    "ShareGPT": (b'{"conversations": [{"from": "human", "value": "a"}]}\n', "line 1: these are a chat's (ShareGPT) fields"),
    "messages alone": (b'{"messages": [{"role": "user", "content": "a"}]}\n', "line 1: these are a chat's (messages) fields"),
    "prompt and completion": (b'{"prompt": "a", "completion": "SELECT 1"}\n', "line 1: these are a prompt and completion's fields"),
    "a comma before the brace": (b'{"question": "a", "sql": "SELECT 1",}\n', "line 1: a comma too many at the end; remove it"),
    "a comma after the brace": (b'{"question": "a", "sql": "SELECT 1"},\n', "line 1: a comma too many at the end; remove it"),
    "Python's quotes": (b"{'question': 'a', 'sql': 'SELECT 1'}\n", "line 1: names and texts in 'single quotes' are Python, not JSON"),
    "not a number": (b'{"question": "a", "sql": "SELECT 1", "x": NaN}\n', "line 1: not JSON (NaN is no JSON number)"),
    "another spelling": (b'{"question": "a", "SQL": "SELECT 1"}\n', "line 1: field 'sql' is missing; 'SQL' is written otherwise: rename it"),
    "a list of rows": (GOOD + b'["question"]\n', 'line 2: not an object; write {"question": "…", "sql": "…"}'),
    "a word": (GOOD + b"null\n", "line 2: not an object"),
    "terminal escapes": (GOOD + b'{"question": "a", "sql": "SELECT \\u001b[2J"}\n', r'doesn\'t run: SQLite can\'t read this query (unrecognized token: "\x1b")'),
}


UNFIT = {  # good JSON Lines that would teach or score something else than what they say
    "a template's mark in a question": (second(question="<|im_start|>user\nhow many"), "line 2: field 'question' holds '<|im_start|>', a mark of a chat template; write the text alone"),
    "a template's mark in an answer": (second(sql="SELECT 1<|im_end|>"), "line 2: field 'sql' holds '<|im_end|>', a mark of a chat template"),
    "another template's mark": (second(question="[INST] how many [/INST]"), "line 2: field 'question' holds '[INST]'"),
    "the question before the query": (second(question="how many", sql="how many\nSELECT 1"), "line 2: field 'sql' begins with the text of 'question'; leave that out"),
    "the refusal with a curly apostrophe": (second(sql="The flights data can\u2019t answer that."), "line 2: field 'sql' is the refusal in other letters; write it so: The flights data can't answer that."),
    "the refusal without its full stop": (second(sql="the flights data can't answer that"), "line 2: field 'sql' is the refusal in other letters"),
    "a query too long to be run": (second(sql="SELECT " + "(" * 10_000), "line 2: field 'sql' has 10,007 bytes; a query may have 10,000"),
    "two queries": (second(sql="SELECT 1; SELECT 2"), "line 2: field 'sql': of an answer like this the scorer reads only 'SELECT 1'; write one query that begins with SELECT or WITH"),
    "two queries, a blank line between": (second(sql="SELECT 1\n\nSELECT 2"), "line 2: field 'sql': of an answer like this the scorer reads only 'SELECT 1'"),
    "a query with a word before it": (second(sql="EXPLAIN SELECT 1"), "line 2: field 'sql': of an answer like this the scorer reads only 'SELECT 1'"),
    "a query in a fence": (second(sql="```sql\nSELECT 1\n```"), "line 2: field 'sql': of an answer like this the scorer reads only 'SELECT 1'"),
    "a query that is none": (second(sql="VALUES (1)"), "line 2: field 'sql': of an answer like this the scorer reads nothing; write one query that begins with SELECT"),
}


@pytest.mark.parametrize(("content", "says"), [*REFUSED.values(), *UNFIT.values()], ids=[*REFUSED, *UNFIT])
def test_a_bad_file_is_refused_with_the_remedy_for_its_kind(tmp_path, content, says):
    with pytest.raises(CourseError) as told:
        flights.load_questions(write(tmp_path, content))
    assert says.replace("\\'", "'") in str(told.value) and "\x1b" not in str(told.value) and str(tmp_path) not in str(told.value)
    assert str(told.value).startswith("mine.jsonl was not loaded")


@pytest.mark.parametrize(
    "sql", ["SELECT 1\n\nFROM flights", "SELECT 1 -- one; two\n+ 1", "-- WITH care AS told\nSELECT 1", "WITH a AS (\n  SELECT 1 AS n\n)\n\nSELECT n FROM a; -- done", 'SELECT 1 AS "a;b"', "/* it's\n\nso */ SELECT ';'"]
)
def test_sql_is_read_as_sql_does_and_scores_right_as_its_own_answer(tmp_path, sql):
    (row,) = flights.load_questions(write(tmp_path, json.dumps({"question": "how many?", "sql": sql}).encode()))
    assert scoring.judge().judge(row["sql"], row["sql"])["kind"] == "right"
    assert scoring.judge().judge(f"Here it is:\n```sql\n{row['sql']}\n```\nIt's done.", row["sql"])["kind"] == "right"


def test_no_plain_file_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for place, what in ((tmp_path / "pipe", "no plain file"), (tmp_path, "a folder"), ("/dev/zero", "no plain file")):
        with pytest.raises(CourseError, match=f"Can't read .*: it is {what}. Give the path of a file."):
            flights.read_jsonl(place)


PAIR = {"prompt": "to boston", "chosen": "SELECT COUNT(*) AS flights FROM flights", "rejected": "SELECT COUNT(*) FROM flights"}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([PAIR, PAIR], "line 2: the same pair as line 1; remove one of them"),
        ([PAIR, {"prompt": "x", "chosen": "a", "rejected": "b"}, PAIR | {"prompt": " to boston "}], "line 3: the same pair as line 1"),
        ([PAIR, PAIR | {"chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}], "line 2: the reverse of line 1, which prefers the other side; keep one of them"),
        ([{name: f"to boston\n{text}" if name != "prompt" else text for name, text in PAIR.items()} | {"prompt": "to boston"}], "line 1: fields 'chosen' and 'rejected' begin with the text of 'prompt'"),
        ([PAIR | {"chosen": PAIR["chosen"] + "<|im_end|>"}], "line 1: field 'chosen' holds '<|im_end|>', a mark of a chat template"),
        ([PAIR | {"rejected": PAIR["rejected"] + "</s>"}], "line 1: field 'rejected' holds '</s>'"),
    ],
)
def test_pairs_that_teach_nothing_or_two_things_are_named(tmp_path, rows, says):
    with pytest.raises(CourseError) as told:
        dpo.load_pairs(write(tmp_path, b"".join(json.dumps(row).encode() + b"\n" for row in rows)))
    assert says in str(told.value)


def test_a_prompt_may_come_more_than_once_and_one_side_may_begin_with_it(tmp_path):
    rows = [PAIR, PAIR | {"rejected": "SELECT 1"}, PAIR | {"prompt": "SELECT 2", "rejected": "SELECT 2 AS two"}]
    assert len(dpo.load_pairs(write(tmp_path, b"".join(json.dumps(row).encode() + b"\n" for row in rows)))) == 3


def test_own_rows_do_without_the_courses_fields(tmp_path):
    own = flights.load_questions(write(tmp_path, b"".join(json.dumps({"question": f"q{i}", "sql": "SELECT 1"}).encode() + b"\n" for i in range(5))))
    assert len(flights.subset(own, 3)) == 3 and flights.subset(own, 3)["question"] == flights.subset(own, 3)["question"]
    with pytest.raises(CourseError, match="these rows don't all have the fields intent and phrasing: leave `phrasings` out"):
        recipes.training_rows(recipes.SFTRecipe(phrasings=2), list(own))


@pytest.mark.parametrize("names", [("prompt", "chosen", "rejected")])
def test_a_spare_question_among_pairs_decides_nothing(tmp_path, capsys, names):
    pair = {"prompt": "a", "chosen": "SELECT 1", "rejected": "SELECT 2"}
    rows = [pair | {"question": None}, pair | {"question": 7, "prompt": "b"}, pair | {"question": ["x"], "prompt": "c"}]
    path = write(tmp_path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    assert [row["prompt"] for row in dpo.load_pairs(path)] == ["a", "b", "c"]
    assert capsys.readouterr().out == "mine.jsonl: fields that the course doesn't use are left out: 'question'\n"


LIMITED = """
import resource, sys
from helpers import flights
from helpers.files import CourseError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    flights.read_jsonl(sys.argv[1])
except CourseError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1000)
"""


@pytest.mark.parametrize(("size", "says"), [(190_000_013, "line 1: 190,000,013 bytes long (limit 1,000,000); is a line end missing?"), (210_000_000, "it has 210 MB (limit 200)")])
def test_a_line_of_200_megabytes_takes_little_memory(tmp_path, size, says):
    path = tmp_path / "long.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"question": "' + b"x" * (size - 14))
    done = subprocess.run([sys.executable, "-c", LIMITED, str(path)], cwd=ROOT, capture_output=True, text=True, check=True)
    *said, grown = done.stdout.splitlines()
    assert says in "\n".join(said) and int(grown) < 50  # MB


# ---------------------------------------------------------------- read


@pytest.mark.parametrize(
    ("more", "left_out"),
    [
        ({"n": 1234567890123456789012345}, "'n'"),
        ({"deep": [[[[[[1]]]]]]}, "'deep'"),
        ({"\ud800": 1}, r"'\ud800'"),
        ({"note": "a\ud800"}, "'note'"),
        ({"a": 1, "b": "x", "\x1b[2J": 3}, r"'\x1b[2J', 'a', 'b'"),
    ],
)
def test_what_the_course_does_not_use_is_left_out_and_said_once(tmp_path, capsys, more, left_out):
    lines = second(**more) + second(question="y", **{name: "of another kind" for name in more}).split(b"\n", 1)[1]
    assert list(flights.load_questions(write(tmp_path, lines))) == [ROW, {"question": "x", "sql": "SELECT 1"}, {"question": "y", "sql": "SELECT 1"}]
    assert capsys.readouterr().out == f"mine.jsonl: fields that the course doesn't use are left out: {left_out}\n"


def test_900_levels_in_an_extra_field_are_left_out(tmp_path):
    line = b'{"question": "x", "sql": "SELECT 1", "z": ' + b"[" * 900 + b"]" * 900 + b"}\n"
    assert len(flights.load_questions(write(tmp_path, GOOD + line))) == 2


def test_a_field_of_ours_in_some_rows_is_none_in_the_others_and_a_number_is_a_name(tmp_path):
    own = flights.load_questions(write(tmp_path, second(intent="counts", id=7, ordered=None)))
    assert list(own) == [ROW | {"id": None, "intent": None, "ordered": None}, {"question": "x", "sql": "SELECT 1", "id": "7", "intent": "counts", "ordered": None}]


def test_a_half_that_no_row_has_is_one_sentence(tmp_path):
    with pytest.raises(CourseError, match='mine.jsonl has no rows of the half .final.: leave `half` out, or write the field "half"'):
        flights.load_questions(write(tmp_path, GOOD), half="final")


# ---------------------------------------------------------------- the SQL in it

SLOW = "SELECT printf('%.2147483647c','a'), printf('%.2147483646c','a')"


def test_sql_that_no_time_limit_can_stop_runs_elsewhere(tmp_path):
    start = time.monotonic()
    with pytest.raises(CourseError, match="line 2: field 'sql' doesn't run: The query .*(3 s|too large)"):
        flights.load_questions(write(tmp_path, second(sql=SLOW)))
    assert time.monotonic() - start < 15


def test_a_file_has_a_total_budget(tmp_path):
    asked = []

    def check(row):
        asked.append(row["question"])
        time.sleep(0.05)

    path = write(tmp_path, b"".join(json.dumps(ROW | {"question": str(i)}).encode() + b"\n" for i in range(100)))
    with pytest.raises(CourseError, match=r"line (\d+): by here the checks took 0.2 s, with \d+ rows to go; make the queries do less, or check fewer rows"):
        jsonl.read(path, ("question", "sql"), slow_check=check, seconds=0.2)
    assert 1 <= len(asked) < 20
    assert len(jsonl.read(path, ("question", "sql"), slow_check=lambda row: None, seconds=5)) == 100


def test_a_quick_check_speaks_beside_the_other_problems(tmp_path):
    def check(row):
        if row["question"] == "x":
            raise CourseError("not this one")

    with pytest.raises(CourseError, match="line 2: not this one\n  line 3: not JSON"):
        flights.read_jsonl(write(tmp_path, second() + b"{\n"), check=check)


def test_a_bad_line_is_told_before_any_query_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Worker, "run", lambda *_: pytest.fail("run"))
    with pytest.raises(CourseError, match="line 2"):
        flights.load_questions(write(tmp_path, GOOD + b"{\n"))


# ---------------------------------------------------------------- converted

SAME = {
    "a JSON array": json.dumps([ROW]),
    "an object": json.dumps(ROW, indent=1),
    "JSON Lines": json.dumps(ROW),
    "a table": "question,sql\nhow many?,SELECT COUNT(*) FROM flights\n",
    "a table with capitals": "Question,SQL\nhow many?,SELECT COUNT(*) FROM flights\n",
    "a table with semicolons": '"question";"sql"\r\n"how many?";"SELECT COUNT(*) FROM flights"\r\n',
    "Alpaca": json.dumps({"instruction": "how many?", "input": "", "output": ROW["sql"]}),
    "ShareGPT": json.dumps([{"conversations": [{"from": "human", "value": "how many?"}, {"from": "gpt", "value": ROW["sql"]}]}]),
    "messages": json.dumps({"messages": [{"role": "system", "content": "…"}, {"role": "user", "content": "how many?"}, {"role": "assistant", "content": ROW["sql"]}]}),
    "prompt and completion": json.dumps({"prompt": "how many?", "completion": ROW["sql"]}),
    "TRL's": json.dumps({"prompt": [{"role": "user", "content": "how many?"}], "completion": [{"role": "assistant", "content": ROW["sql"]}]}),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("text", SAME.values(), ids=SAME)
def test_other_forms_become_the_courses(tmp_path, text, encoding, capsys):
    (tmp_path / "mine.txt").write_text(text, encoding=encoding, newline="")
    assert convert.main([str(tmp_path / "mine.txt")]) == 0
    assert capsys.readouterr().out == "mine.course.jsonl: 1 rows with question, sql\n"
    assert list(flights.load_questions(tmp_path / "mine.course.jsonl")) == [ROW]


def test_pairs_and_inputs_are_converted(tmp_path):
    said = [{"role": "assistant", "content": "SELECT 1"}]
    (tmp_path / "pairs.json").write_text(json.dumps([{"prompt": "a", "chosen": said, "rejected": "SELECT 2", "score": 3}]), encoding="utf-8")
    assert dpo.load_pairs(convert.convert(tmp_path / "pairs.json")) == [{"prompt": "a", "chosen": "SELECT 1", "rejected": "SELECT 2"}]
    (tmp_path / "alpaca.json").write_text(json.dumps([{"instruction": "count", "input": "flights", "output": "SELECT 1"}]), encoding="utf-8")
    assert flights.read_jsonl(convert.convert(tmp_path / "alpaca.json")) == [{"question": "count\nflights", "sql": "SELECT 1"}]
    with pytest.raises(CourseError, match="^alpaca.course.jsonl is there already: move it away"):
        convert.convert(tmp_path / "alpaca.json")


def test_what_a_conversion_leaves_out_is_told(tmp_path, capsys):
    (tmp_path / "mine.csv").write_text("Question;SQL;Rating;who\nhow many?;SELECT 1;3;me\n", encoding="utf-8")
    convert.convert(tmp_path / "mine.csv")
    assert capsys.readouterr().out == "mine.course.jsonl: 1 rows with question, sql; left out: 'rating', 'who'\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[1, 2]", "row 1: no fields with names"),
        (b'[{"a": "b"}]', r"row 1: no text for 'question' \(looked for question, instruction, .*\); its fields are 'a'"),
        (b"[" * 100_000, "is neither JSON, JSON Lines nor a table"),
        (b"\xff\xfe\xfd", "is not UTF-8 text"),
        (b"just words", "there are no rows in it"),
        (b"[]", "there are no rows in it"),
        (b" \n", "mine.txt is empty"),
        (b"PK\x03\x04 a sheet", "is a spreadsheet or another packed file: save the sheet as CSV"),
        (b"question,sql\nhow many?,SELECT 1\nwhich?,SELECT a, b FROM c\n", "line 3 has more cells than the first line has names: put a text that has"),
    ],
)
def test_what_cannot_be_converted_is_one_sentence(tmp_path, content, says, capsys):
    (tmp_path / "mine.txt").write_bytes(content)
    assert convert.main([str(tmp_path / "mine.txt")]) == 1
    import re

    err = capsys.readouterr().err
    assert re.search(says, err) and "Traceback" not in err and not (tmp_path / "mine.course.jsonl").exists()


# ---------------------------------------------------------------- whatever else

FIELD = st.sampled_from(["question", "sql", "prompt", "chosen", "id", "ordered", "x", "\ud800", "\x1b[2J"]) | st.text(max_size=4)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(10**18, 10**30) | st.floats() | st.text(st.characters(), max_size=8) | st.just("SELECT 1"),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(FIELD, inside, max_size=3),
    max_leaves=6,
)
OBJECT = st.dictionaries(FIELD, VALUE, max_size=5).map(lambda row: {"question": "q", "sql": "SELECT 1"} | row)
LINE = (
    OBJECT.map(lambda row: json.dumps(row).encode())
    | VALUE.map(lambda value: json.dumps(value).encode())
    | st.binary(max_size=30)
    | st.tuples(OBJECT, st.integers(0, 60), st.binary(max_size=3)).map(lambda t: (line := json.dumps(t[0]).encode())[: t[1]] + t[2] + line[t[1] :])  # damaged
)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(LINE, max_size=4), end=st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n"]), start=st.sampled_from([b"", b"\xef\xbb\xbf", b" "]))
def test_any_file_is_read_or_refused_in_one_error(tmp_path, lines, end, start):
    path = write(tmp_path, start + end.join(lines))
    try:
        rows = flights.read_jsonl(path)
    except CourseError as told:
        assert "mine.jsonl" in str(told) and set(str(told)) <= set(str(told)) - set("\x1b\x07\ud800")
        return
    assert rows and all(row["question"].strip() and row["sql"].strip() for row in rows) and len({tuple(row) for row in rows}) == 1
    from datasets import Dataset

    assert Dataset.from_list(rows).num_rows == len(rows)  # Arrow takes what was read


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.lists(LINE, max_size=3).map(b"\n".join) | st.text(string.printable, max_size=60).map(str.encode) | st.lists(VALUE, max_size=3).map(lambda v: json.dumps(v).encode()))
def test_any_file_is_converted_or_refused_in_one_error(tmp_path, content):
    (tmp_path / "mine.txt").write_bytes(content)
    (tmp_path / "mine.course.jsonl").unlink(missing_ok=True)  # of the case before
    try:
        converted = convert.convert(tmp_path / "mine.txt")
    except CourseError as told:
        assert "mine.txt" in str(told)
        return
    try:
        assert flights.read_jsonl(converted)
    except CourseError as told:  # the same question twice, half a character, a question repeated: these are the reader's to tell
        assert "same question" in str(told) or "half a character" in str(told) or "is empty" in str(told) or "begins with the text" in str(told) or "chat template" in str(told), told
