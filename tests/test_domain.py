"""A second domain: another database, prompt and refusal, through loader, judge, trainers and checkup; and its committed example."""

import contextlib
import json
import runpy
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from helpers import checkup, doctor, domain, dpo, flights, models, preferences, recipes, runtime, scoring, sql, training
from helpers.domain import Domain
from helpers.files import CourseError
from helpers.flights import FLIGHTS
from helpers.runtime import DATA

OWN = DATA / "own_example"
LIBRARY = domain.read(OWN / "domain.toml")
REFUSAL = LIBRARY.refusal


def database(folder: Path, name: str = "own.db", *statements: str) -> Path:
    made = folder / name
    with contextlib.closing(sqlite3.connect(made)) as connection:
        for statement in statements or ("CREATE TABLE cats (name TEXT, age INTEGER)", "INSERT INTO cats VALUES ('Mo', 3), ('Ada', 5), ('Mo', 9)"):
            connection.execute(statement)
        connection.commit()
    return made


def lines(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---------------------------------------------------------------- the database


def test_the_flights_are_a_domain_like_any_other():
    assert FLIGHTS.path() == flights.database_path() and FLIGHTS.instances() == flights.perturbed_paths()
    assert FLIGHTS.refuses("Sorry. THE FLIGHTS DATA CAN’T ANSWER THAT") and not FLIGHTS.refuses("The loans data can't answer that.")
    assert FLIGHTS.names()["delta air lines inc."] == "DL"


def test_what_is_no_database_is_one_sentence(tmp_path):
    (tmp_path / "text.db").write_text("SQLite", encoding="utf-8")
    for path in (tmp_path / "nowhere.db", tmp_path / "text.db", tmp_path):
        with pytest.raises(CourseError, match=f"^{path.name} is no SQLite database, or isn't there: check the path.$"):
            Domain(path, "", "no").path()
    made = database(tmp_path)
    assert Domain(made, "", "no").path() == made
    made.with_name("own.db-wal").write_bytes(b"")
    assert Domain(made, "", "no").path() == made
    made.with_name("own.db-wal").write_bytes(b"changes")
    with pytest.raises(CourseError, match="own.db-wal holds changes that aren't in own.db yet: close the program"):
        Domain(made, "", "no").path()


def test_a_worker_reads_the_tables_that_the_domain_names_and_no_other(tmp_path):
    made = database(tmp_path, "two.db", "CREATE TABLE cats (name TEXT)", "CREATE TABLE owners (secret TEXT)", "CREATE VIEW all_cats AS SELECT * FROM cats")
    with Domain(made, "", "no").worker() as worker:
        for table in ("cats", "owners", "all_cats"):
            assert worker.run(f"SELECT COUNT(*) FROM {table}").rows == [(0,)]
        for query in ("SELECT * FROM sqlite_master", "DELETE FROM cats", "ATTACH 'x' AS y", "PRAGMA user_version"):
            with pytest.raises(sql.SqlError, match="Only SELECT from the database's tables is allowed here"):
                worker.run(query)
        with pytest.raises(sql.SqlError, match="check the columns of the database's tables, put text"):
            worker.run("SELECT age FROM cats")
    with Domain(made, "", "no", tables=("CATS",)).worker() as worker:
        assert worker.run("SELECT COUNT(*) FROM cats").rows == [(0,)]
        with pytest.raises(sql.SqlError, match="Only SELECT from CATS is allowed here"):
            worker.run("SELECT * FROM owners")
    with Domain(made, "", "no", tables=("dogs",)).worker() as worker, pytest.raises(sql.SqlError, match="The SQLite database is missing or damaged .no table dogs.: check its path"):
        worker.run("SELECT 1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"database = 'x.db'\nrefusal = 'no'", "lacks schema_prompt: compare it with data/own_example/domain.toml"),
        (b"", "lacks database and schema_prompt and refusal"),
        (b"database: x", "is not TOML"),
        (b"\xff\xfe", "is not UTF-8 text: save it as UTF-8"),
        (b'database = "C:\\Users\\me\\own.db"', "a backslash in double quotes means something else in TOML; write the path with / or in single quotes"),
        (b"database = 'x.db'\nschema_prompt = 's'\nrefusal = 'n'", "own.toml: x.db is no SQLite database, or isn't there: check the path."),
        (b"database = 1\nschema_prompt = 's'\nrefusal = 'n'", "database must be a text, and not empty"),
        (b"database = 'd'\nschema_prompt = ' '\nrefusal = 'n'", "schema_prompt must be a text, and not empty"),
        (b"database = 'd'\nschema_prompt = 's'\nrefusal = 'n'\ntables = 'loans'", "tables must be a list of texts, and not empty"),
        (b"database = 'd'\nschema_prompt = 's'\nrefusal = 'n'\ntables = []", "tables must be a list of texts, and not empty"),
        (b"database = 'd'\nschema_prompt = 's'\nrefusal = 'n'\nmodel = 'm'", "'model' is nothing that a domain has; there are database, schema_prompt"),
        (b"a = " + b"[" * 5000, "is not TOML"),
        (b"#" * 200_000, "has 200,000 bytes: it is no description of a domain"),
    ],
)
def test_a_bad_description_is_one_sentence(tmp_path, text, said):
    (tmp_path / "own.toml").write_bytes(text)
    with pytest.raises(CourseError) as told:
        domain.read(tmp_path / "own.toml")
    assert said in str(told.value) and "own.toml" in str(told.value) and "\n" not in str(told.value)


def test_a_description_is_read(tmp_path):
    with pytest.raises(CourseError, match="Can't read nowhere.toml: No such file or directory"):
        domain.read(tmp_path / "nowhere.toml")
    text = b"\xef\xbb\xbfdatabase = 'd.db'\nschema_prompt = '''\nTable t.\n'''\nrefusal = 'No.'\nsystem_prompt = 'Go'\ntables = ['t']\n"
    (tmp_path / "own.toml").write_bytes(text)
    database(tmp_path, "d.db", "CREATE TABLE t (a)", "CREATE VIEW v AS SELECT a FROM t")
    assert domain.read(tmp_path / "own.toml") == Domain(tmp_path / "d.db", "Table t.", "No.", "Go", ("t",))
    (tmp_path / "own.toml").write_bytes(text.replace(b"['t']", b"['T', 'v']"))
    with pytest.raises(CourseError, match=r"^own.toml: no table v in d.db; its tables: t. A view can't be read: make it a table.$"):
        domain.read(tmp_path / "own.toml")
    assert LIBRARY.system_prompt == "Answer with SQL." and LIBRARY.refusal in LIBRARY.schema_prompt


# ---------------------------------------------------------------- its halves


def test_halves_share_no_row_and_lose_none(tmp_path, monkeypatch):
    monkeypatch.setattr(domain, "cache_dir", lambda: tmp_path)
    rows = ", ".join(f"({i}, 'x{i}')" for i in range(1000))
    made = database(
        tmp_path,
        "many.db",
        "CREATE TABLE things (id INTEGER PRIMARY KEY, name TEXT)",
        f"INSERT INTO things VALUES {rows}",
        "CREATE TABLE kept (id INTEGER PRIMARY KEY, n INTEGER) WITHOUT ROWID",
        "INSERT INTO kept VALUES (1, 2), (2, 3)",
        "CREATE TRIGGER never BEFORE DELETE ON things BEGIN SELECT RAISE(ABORT, 'not here'); END",
        "CREATE VIEW both AS SELECT * FROM things",
        'CREATE TABLE "odd ""name" (a)',
        'INSERT INTO "odd ""name" VALUES (1)',
    )
    before, halves = made.read_bytes(), domain.halves(made)
    found = []
    for half in halves:
        with contextlib.closing(sqlite3.connect(half)) as connection:
            found.append({row[0] for row in connection.execute("SELECT id FROM things")})
            assert connection.execute("SELECT COUNT(*) FROM kept").fetchone() == (2,)
    assert found[0] | found[1] == set(range(1000)) and not found[0] & found[1] and 400 < len(found[0]) < 600
    assert made.read_bytes() == before and domain.halves(made) == halves and len(set(halves)) == 2
    database(tmp_path, "virtual.db", "CREATE VIRTUAL TABLE words USING fts5(text)")
    assert domain.halves(tmp_path / "virtual.db") == []
    monkeypatch.setattr(domain, "LARGEST", 10)
    assert domain.halves(made) == []


def test_a_damaged_database_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(domain, "cache_dir", lambda: tmp_path)
    (tmp_path / "torn.db").write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)
    with pytest.raises(CourseError, match=r"^torn.db can't be read \(.*\): is it whole\?$"):
        Domain(tmp_path / "torn.db", "", "no").instances()


# ---------------------------------------------------------------- loading and judging


def test_questions_are_run_on_their_own_database(tmp_path):
    cats = Domain(database(tmp_path), "", "The cats data can't answer that.")
    asked = {"question": "how old is Ada", "sql": "SELECT age FROM cats WHERE name = 'Ada'"}
    path = lines(tmp_path / "mine.jsonl", asked, {"question": "who feeds them", "sql": cats.refusal})
    assert len(flights.load_questions(path, domain=cats)) == 2
    lines(path, asked)
    with pytest.raises(CourseError, match="line 1: field 'sql' doesn't run: .*no such table: cats"):
        flights.load_questions(path)
    lines(path, {"question": "who feeds them", "sql": "the cats data can’t answer that"}, {"question": "x", "sql": flights.REFUSAL})
    with pytest.raises(CourseError) as told:
        flights.load_questions(path, domain=cats)
    assert "line 1: field 'sql' is the refusal in other letters; write it so: The cats data can't answer that." in str(told.value)
    assert "line 2: field 'sql': of an answer like this the scorer reads nothing" in str(told.value)


def test_answers_are_judged_on_the_domain_and_its_halves(tmp_path, monkeypatch):
    monkeypatch.setattr(domain, "cache_dir", lambda: tmp_path)
    rows = ", ".join(f"('cat {i}', {i % 17})" for i in range(200))
    cats = Domain(database(tmp_path, "c.db", "CREATE TABLE cats (name TEXT, age INTEGER)", f"INSERT INTO cats VALUES {rows}, ('Ada', 40)"), "", "No data.", names=lambda: {"the old one": "Ada"})

    def kind(answer, reference, **more):
        return scoring.judge(cats).judge(answer, reference, **more)["kind"]

    assert kind("```sql\nselect count(1) from cats;\n```", "SELECT COUNT(*) FROM cats") == "right"
    assert kind("SELECT 201", "SELECT COUNT(*) FROM cats").startswith("wrong")  # right on the whole, by luck
    assert scoring.judge(cats).judge("SELECT 201", "SELECT COUNT(*) FROM cats", single=True)["single"]
    assert kind("SELECT 'The old one' FROM cats WHERE age = 40", "SELECT name FROM cats WHERE age = 40") == "right"
    assert kind("no data", "No data.") == "right" and kind("No data.", "SELECT 1") == "refused"
    assert kind(flights.REFUSAL, "No data.") == "answered the unanswerable"
    assert kind("SELECT COUNT(*) FROM flights", "SELECT COUNT(*) FROM cats") == "does not run (unknown name)"
    assert scoring.judge(cats) is scoring.judge(replace(cats)) and scoring.judge(cats) is not scoring.judge()
    records = scoring.execution_accuracy(["SELECT 1", "SELECT COUNT(*) FROM cats"], [{"question": "n", "sql": "SELECT COUNT(*) FROM cats"}] * 2, domain=cats)
    assert [r["correct"] for r in records] == [False, True]
    assert preferences.with_style(records, cats)[1]["kept"] == {"alias": False}


def test_a_database_that_has_changed_gets_another_judge(tmp_path, monkeypatch):
    monkeypatch.setattr(domain, "cache_dir", lambda: tmp_path)
    cats = Domain(database(tmp_path), "", "No data.")
    first = scoring.judge(cats)
    assert first.run(-1, "SELECT COUNT(*) FROM cats").rows == [(3,)]
    (tmp_path / "own.db").unlink()
    database(tmp_path, "own.db", "CREATE TABLE cats (name TEXT)")
    assert scoring.judge(cats) is not first and scoring.judge(cats).run(-1, "SELECT COUNT(*) FROM cats").rows == [(0,)]


# ---------------------------------------------------------------- training


@pytest.mark.slow
@pytest.mark.usefixtures("short_model")
def test_both_trainers_ask_with_the_domains_system_prompt(tmp_path):
    own, tokenizer = replace(LIBRARY, system_prompt="Query the tool library."), models.load_tokenizer()
    rows = [{"question": f"loans in month {m}", "sql": f"SELECT COUNT(*) FROM loans WHERE month = {m}"} for m in range(1, 9)]
    recipe = recipes.SFTRecipe(steps=1, batch_size=2, warmup_steps=0)
    trainer = training.make_trainer(recipe, models.load_model(4), tokenizer, rows, tmp_path / "sft", own, save_strategy="no")
    pairs = [{"prompt": r["question"], "chosen": r["sql"].replace("(*)", "(*) AS loans"), "rejected": r["sql"]} for r in rows]
    built = dpo.make_trainer(dpo.DPORecipe(steps=1, batch_size=2), trainer.model, tokenizer, pairs, tmp_path / "dpo", own, 2, save_strategy="no")
    for dataset, column in ((trainer.train_dataset, "input_ids"), (built.train_dataset, "prompt_ids")):
        for row in dataset:
            assert "<|im_start|>system\nQuery the tool library.<|im_end|>" in tokenizer.decode(row[column])
    assert len(built.train_dataset) == 6
    history = training.fit(built)["history"]
    assert [log["step"] for log in history if "probe/chosen" in log] == [0, 1]
    with pytest.raises(CourseError, match=r"8 pairs are too few: 8 of them are kept aside to be watched. Make more, or watch fewer \(probe=…\)"):
        dpo.make_trainer(dpo.DPORecipe(), None, tokenizer, pairs, tmp_path / "x", own, 8)
    long = replace(own, system_prompt="Query the tool library. " * 80)
    with pytest.raises(CourseError, match="^row 1 has .* and 3 more; max_length is 256"):
        training.make_trainer(recipe, models.load_model(4), tokenizer, rows, tmp_path / "y", long)


# ---------------------------------------------------------------- the committed example


def test_the_example_is_what_its_script_makes():
    namespace = runpy.run_path(str(OWN / "make_example.py"))
    with contextlib.closing(sqlite3.connect(OWN / "tool_library.db")) as connection:
        assert connection.execute("SELECT * FROM loans ORDER BY loan_id").fetchall() == list(namespace["rows"]())


def test_the_example_has_its_questions_by_hand_and_none_twice():
    train, test = (flights.load_questions(OWN / f"{name}.jsonl", domain=LIBRARY) for name in ("train", "test"))
    assert len(train) == 64 and len(test) == 36
    assert not {r["question"].lower() for r in train} & {r["question"].lower() for r in test}
    for row in [*train, *test]:
        assert scoring.judge(LIBRARY).judge(row["sql"], row["sql"], bool(row["ordered"]))["correct"]
    answered = [r for r in test if r["sql"] != REFUSAL]
    right = sum(scoring.judge(LIBRARY).judge(a["sql"], b["sql"], bool(b["ordered"]))["correct"] for a in answered for b in answered if a is not b)
    assert right == 0  # every question of the test has an answer of its own


def test_the_examples_pairs_are_right_on_both_sides_and_styled_on_one():
    rows = {r["question"]: r for r in flights.load_questions(OWN / "train.jsonl", domain=LIBRARY)}
    for pair in dpo.load_pairs(OWN / "pairs.jsonl"):
        chosen, rejected = preferences.judged(rows[pair["prompt"]], [pair["chosen"], pair["rejected"]], LIBRARY)
        assert chosen["correct"] and rejected["correct"] and chosen["style"] > rejected["style"], pair


# ---------------------------------------------------------------- doctor FILE


@pytest.mark.slow
def test_doctor_tells_what_a_file_is_like(capsys):
    assert doctor.main([str(OWN / "train.jsonl"), "--domain", str(OWN / "domain.toml"), "--test", str(OWN / "test.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "64 questions: 58 with one of 57 queries, 6 refusals\n" in out or "64 questions: 58 with one of 58 queries, 6 refusals\n" in out
    assert "206 to 237 tokens a row, the description's 179 included; max_length is 256: all fit" in out and "no two questions have the same words" in out
    assert "0 of 36 questions of test.jsonl stand in it, and " in out and "every query of train.jsonl returns something; every query of test.jsonl returns something" in out
    assert "64 steps of 4 read each row 4.0 times" in out and "(recipes.few_rows, with the description in the prompt" in out and out.endswith("It can be trained on.\n")
    assert doctor.main([str(OWN / "pairs.jsonl"), "--domain", str(OWN / "domain.toml"), "--test", str(OWN / "train.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "answers   all run\n" in out and "45 of 64 questions of train.jsonl stand in it (rows 1, 2, 3 …): take them out" in out
    assert "45 pairs on 45 prompts" in out and "the chosen answer is the longer one in 100%; DPO may learn length" in out


@pytest.mark.slow
def test_doctor_names_what_would_go_wrong(tmp_path, capsys):
    good = {"question": "How many flights left JFK?", "sql": "SELECT COUNT(*) FROM flights WHERE origin = 'JFK'"}
    path = lines(tmp_path / "mine.jsonl", good, good | {"question": "how many flights left jfk", "sql": "SELECT COUNT(*) FROM flights"}, good | {"question": "word " * 300})
    found = checkup.examine(path)
    assert "1 do not: row 3 (" in found["lengths"] and "0 refusals; a model that never sees one answers everything" in found["rows"]
    assert "(rows 1 and 2, for one); rows 1 and 2 ask the same and have different answers" in found["alike"]
    assert found["overlap"].count(" questions of ") == 5 and "of 382 questions of test stand in it" in found["overlap"]
    with pytest.raises(CourseError, match="mine.jsonl is its own test file"):
        checkup.examine(path, test=path)
    assert "440 steps of 8 read each row 1173.3 times" in found["training"] and "take fewer steps" in found["training"]
    lines(path, good | {"sql": "SELECT COUNT(*) FROM flights WHERE origin = 'BOS'"}, good | {"question": "count them"})
    found = checkup.examine(path, test=lines(tmp_path / "test.jsonl", good))
    assert found["results"] == "mine.jsonl: row 1 give nothing, NULL or a lone 0, as a query with a wrong value does: ask for something that is there; every query of test.jsonl returns something"
    assert "1 of 1 questions of test.jsonl stand in it (row 1): take them out, and 100% of its word triples (only 1 questions" in found["overlap"]
    pair = {"prompt": "p", "chosen": "SELECT COUNT(*) FROM nowhere", "rejected": "none"}
    assert checkup.examine(lines(path, pair, pair | {"prompt": "q", "chosen": "SELECT 1"}))["answers"] == "1 chosen answers don't run (row 1); 2 rejected answers don't run (rows 1, 2)"
    lines(path, {"prompt": "p", "rejcted": "SELECT 1", "chosen": "SELECT 2"})
    with pytest.raises(CourseError, match="line 1: field 'rejected' is missing"):
        checkup.examine(path)
    path.write_text("{broken\n", encoding="utf-8")
    assert doctor.main([str(path)]) == 1
    told = capsys.readouterr()
    assert "mine.jsonl was not loaded" in told.out + told.err


def test_without_a_test_file_the_doctor_says_what_one_is_for():
    assert checkup._overlap(["a"], checkup._held(Path("mine.jsonl"), LIBRARY, None)).startswith("no test file was named (--test FILE)")


def test_the_runtime_knows_the_examples_place():
    assert OWN == runtime.ROOT / "data" / "own_example"
