"""doctor and ask as a person runs them, scoreboard, sweeps' bookkeeping, baselines."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import nbformat
import pytest

from course import lessons, measure, recording, sweeps
from helpers import ask, baselines, confidence, doctor, flights, generation, scoreboard
from helpers.files import CourseError
from helpers.recipes import SFTRecipe
from helpers.runtime import ROOT

# ---------------------------------------------------------------- doctor


def test_doctor_gives_one_verdict(capsys):
    def bad():
        raise CourseError("mend me")

    def worse():
        raise RuntimeError("broken")

    assert doctor.main([], {"good": lambda: "fine"}) == 0
    assert capsys.readouterr().out.endswith("Ready: this machine can run the course.\n")
    assert doctor.main([], {"good": lambda: "fine", "bad": bad, "worse": worse}) == 1
    out = capsys.readouterr().out
    assert "PROBLEM: mend me" in out and "PROBLEM: RuntimeError: broken" in out and out.endswith("Not ready: mend bad, worse first.\n")


def test_doctor_refuses_too_small_a_machine(monkeypatch):
    with pytest.raises(CourseError, match="GB free"):
        doctor.check_disk(need_gb=1e9)
    with pytest.raises(CourseError, match="Colab"):
        doctor.check_memory(need_gb=1e9)
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    with pytest.raises(CourseError, match="too old"):
        doctor.check_python()


def test_doctor_checks_this_machine():
    for name in ("Python", "disk", "memory", "device", "database"):
        assert doctor.CHECKS[name]()


@pytest.mark.slow
def test_doctor_trains_for_real():
    assert "SmolLM2" in doctor.check_model()
    told = doctor.check_training(seconds=1)
    assert "s a step of" in told.splitlines()[0] and "Minutes on this machine" in told and "04_dpo" in told and "make course" in told


# ---------------------------------------------------------------- ask


def test_each_stage_has_its_model_and_prompt(monkeypatch, capsys):
    monkeypatch.setattr(ask.adapters, "have_adapter", lambda folder: bool(print("from the kit")) or "dpo" in str(folder))
    monkeypatch.setattr(ask.models, "load_tokenizer", lambda: None)
    monkeypatch.setattr(ask.models, "load_model", lambda: "base")
    monkeypatch.setattr(ask.adapters, "load_adapter", lambda folder: folder)
    monkeypatch.setattr(ask.dpo.training, "sft_adapter", lambda recipe: "sft adapter")
    monkeypatch.setattr(ask.dpo, "adapter", lambda recipe: "dpo adapter")
    monkeypatch.setattr(ask.dense, "written_out", contextlib.nullcontext)
    for stage, model, system in (
        ("base", "base", flights.SCHEMA_PROMPT),
        ("sft", "sft adapter", flights.SYSTEM_PROMPT),
        ("dpo", "dpo adapter", flights.SYSTEM_PROMPT),
    ):
        asker = ask.Asker(stage)
        assert (asker.model, asker.system) == (model, system)
        asker.close()
    out, err = capsys.readouterr()
    assert out == "" and err.count("from the kit") == 2 and err.count("neither in runs/ nor in a kit") == 1 and f"{SFTRecipe().folder().name}: neither" in err


class FakeAsker(ask.Asker):
    """The real worker and rules, with canned answers in place of the model's."""

    def __init__(self, answers):
        from helpers import worker

        self.system, self.tokenizer, self.model, self.answers = "", None, None, answers
        self.worker, self.whole, self.calibration = worker.Worker(flights.database_path()), contextlib.ExitStack(), None


@pytest.fixture
def asker(monkeypatch):
    answers = {
        "count": "SELECT COUNT(*) AS flights FROM flights WHERE origin = 'JFK'",
        "drop": "SELECT 1; DROP TABLE flights",
        "attach": "with a as (select 1) ATTACH 'x' AS y",
        "wrong": "SELECT nothing FROM flights",
        "prose": "I don't know.",
        "nobody": "SELECT COUNT(*) FROM flights WHERE airline LIKE 'Jet Green%'",
        "refuse": flights.REFUSAL,
        "null": "SELECT NULL, 'x'",
        "blob": "SELECT x'00ff' AS blob, 9e999 AS inf, -9e999 AS minus, 1.5 AS real",
        "escape": "SELECT char(27)||'[2J' AS a, 'b'||char(10)||'c' AS b, 1 AS `\x1b[31m` UNION ALL SELECT 'long', 'd', 2",
        "unknown": "SELECT `\x1b[5m\x07` FROM flights",
    }
    monkeypatch.setattr(generation, "generate", lambda m, t, chats, logps, **k: logps.append(-0.5) or [answers[chats[0][-1]["content"]]])
    one = FakeAsker(answers)
    yield one
    one.close()


def test_ask_answers(asker):
    assert asker.answer("count") == {
        "question": "count", "sql": "SELECT COUNT(*) AS flights FROM flights WHERE origin = 'JFK'",
        "columns": ["flights"], "rows": [[111279]], "error": None, "notes": [], "confidence": None,
    }  # fmt: skip
    assert asker.answer("nobody")["notes"] == ["no airline is called 'Jet Green'; nearest: JetBlue Airways"]
    assert ask.show(asker.answer("nobody")).endswith("0\nNote: no airline is called 'Jet Green'; nearest: JetBlue Airways.")
    assert ask.show(asker.answer("count")).endswith("flights\n111279")
    assert ask.show(asker.answer("null")).splitlines()[-1].strip() == "x"


def test_ask_says_how_sure_it_is_where_that_was_measured(asker):
    sentence = "Confidence: 82% (on the validation questions so many of the answers that it was so sure of were right)."
    assert "Confidence" not in ask.show(asker.answer("count"))
    asker.calibration = confidence.Calibration(slope=1.0, intercept=2.0, n=9)  # of the fixture's −0.5: 1 / (1 + exp(−1.5))
    assert asker.answer("count")["confidence"] == 0.82
    assert ask.show(asker.answer("count")).endswith(f"flights\n111279\n{sentence}")
    assert ask.show(asker.answer("refuse")) == f"{flights.REFUSAL}\n{sentence}"  # a refusal is an answer
    assert "Confidence" not in ask.show(asker.answer("wrong")) and "Confidence" not in ask.show(asker.answer(""))


def test_ask_turns_every_failure_into_a_sentence(asker):
    assert asker.answer("drop")["rows"] == [[1]]  # the rule stops at the first semicolon
    assert asker.answer("attach")["error"] and asker.answer("attach")["rows"] == []
    assert "nothing" in asker.answer("wrong")["error"]
    assert "no query" in asker.answer("prose")["error"]
    assert asker.answer("refuse")["error"] == flights.REFUSAL
    assert "empty" in asker.answer("  ")["error"]
    assert "limit is 500" in asker.answer("x" * 501)["error"]


def test_ask_jsonl_writes_one_object_a_line(asker, monkeypatch, capsys):
    monkeypatch.setattr(ask, "Asker", lambda stage: asker)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"count\r\nprose\n\n")))
    assert ask.main(["--jsonl"]) == 0
    out = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [o["question"] for o in out] == ["count", "prose", ""]
    assert [set(o) for o in out] == [{"question", "sql", "columns", "rows", "error", "notes", "confidence"}] * 3
    assert out[0]["rows"] == [[111279]] and out[0]["error"] is None and out[2]["error"]


def test_what_json_does_not_know_is_text(asker, monkeypatch, capsys):
    monkeypatch.setattr(ask, "Asker", lambda stage: asker)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"blob\n")))
    assert ask.main(["--jsonl"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["rows"] == [["X'00FF'", "inf", "-inf", 1.5]]


def test_an_answer_steers_no_terminal_and_the_table_stays_whole(asker, capsys, monkeypatch):
    lines = ask.show(asker.answer("escape")).splitlines()
    assert lines[1:] == ["a        b       \\x1b[31m", "\\x1b[2J  b\\x0ac  1", "long     d       2"]
    assert "\x1b" not in lines[0]  # the query itself
    shown = ask.show(asker.answer("unknown"))
    assert not {"\x1b", "\x07"} & set(shown) and r"\x1b[5m\x07" in shown
    reply = asker.answer("count") | {"error": "\x1b[2J"}
    assert ask.show(reply).endswith(r"\x1b[2J")


def test_a_line_of_any_length_is_one_answer_in_little_memory(asker, monkeypatch, capsys):
    class Long:  # 40 MB that nobody holds
        def __init__(self, length):
            self.left = length

        def readline(self, limit):
            count, self.left = min(limit, self.left), self.left - min(limit, self.left)
            return b"x" * count

    monkeypatch.setattr(ask, "Asker", lambda stage: asker)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=Long(40_000_000)))
    assert ask.main(["--jsonl"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "40,000,000 characters; the limit is 500" in json.loads(line)["error"] and len(line) < 1000


BROKEN = """
import sys
from helpers import ask, command
class Asker:
    def __init__(self, stage): pass
    def answer(self, question, length=None):
        if question == "stop": raise KeyboardInterrupt
        return {"question": question, "sql": "", "columns": [], "rows": [["x" * 1000]], "error": None}
    def close(self): pass
ask.Asker = Asker
sys.exit(ask.main(["--jsonl"]))
"""


@pytest.mark.skipif(not shutil.which("head"), reason="no head here")
def test_whoever_reads_the_answers_may_stop():
    asked = subprocess.Popen([sys.executable, "-c", BROKEN], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    head = subprocess.Popen(["head", "-1"], stdin=asked.stdout, stdout=subprocess.PIPE)
    asked.stdout.close()
    with contextlib.suppress(BrokenPipeError):
        asked.stdin.write(b"a\n" * 1000)
        asked.stdin.close()
    assert json.loads(head.communicate()[0])["question"] == "a"
    assert asked.wait(timeout=60) == 141 and asked.stderr.read() == b""
    asked.stderr.close()


def test_ctrl_c_ends_in_a_sentence():
    done = subprocess.run([sys.executable, "-c", BROKEN], cwd=ROOT, input=b"a\nstop\n", capture_output=True)
    assert done.returncode == 130 and done.stderr == b"\nStopped.\n" and len(done.stdout.splitlines()) == 1


def test_ask_one_question(asker, monkeypatch, capsys):
    monkeypatch.setattr(ask, "Asker", lambda stage: asker)
    assert ask.main(["count"]) == 0 and "111279" in capsys.readouterr().out
    assert ask.main(["prose"]) == 1
    with pytest.raises(SystemExit):
        ask.main([])


def test_ask_without_a_model_is_one_sentence(monkeypatch, capsys):
    def fails(stage):
        raise CourseError("Could not download it.")

    monkeypatch.setattr(ask, "Asker", fails)
    assert ask.main(["count"]) == 1 and capsys.readouterr().err == "\nCould not download it.\n"


@pytest.mark.slow
def test_ask_the_base_model():
    one = ask.Asker("base")
    reply = one.answer("How many flights left JFK in July?")
    one.close()
    assert set(reply) == {"question", "sql", "columns", "rows", "error", "notes", "confidence"} and (reply["sql"] or reply["error"])


@pytest.mark.slow
def test_a_shared_cache_and_a_home_that_are_read_only_will_do(tmp_path):
    """The cache as a classroom's server offers it; nothing of one's own but the runs."""
    from helpers import models, runtime

    models.model_path(), flights.database_path()
    cache, home = tmp_path / "cache", tmp_path / "home"
    for place in (cache, home):
        place.mkdir()
    mounts = [["mount", "--bind", str(runtime.cache_dir()), str(cache)], ["mount", "-o", "remount,bind,ro", str(cache)]]
    mounts += [["mount", "-t", "tmpfs", "-o", "size=1m,ro", "tmpfs", str(home)]]
    if not shutil.which("mount") or any(subprocess.run(mount, capture_output=True).returncode for mount in mounts):
        subprocess.run(["umount", str(cache)], capture_output=True)
        pytest.skip("nothing can be mounted here")
    try:
        environment = os.environ | {"COURSE_CACHE": str(cache), "HOME": str(home), "COURSE_RUNS": str(tmp_path / "runs"), "XDG_CACHE_HOME": str(home)}
        command = [sys.executable, "-m", "helpers.ask", "--stage", "base", "--jsonl"]
        done = subprocess.run(command, cwd=ROOT, env=environment, input="How many flights left JFK in July?\n", capture_output=True, text=True)
        assert done.returncode == 0 and json.loads(done.stdout)["question"], done.stderr[-2000:]
        empty = environment | {"COURSE_CACHE": str(home / "mine")}
        done = subprocess.run(command, cwd=ROOT, env=empty, input="x", capture_output=True, text=True)
        assert done.returncode == 1 and "was not written, its disk is read-only: set COURSE_CACHE" in done.stderr and "Traceback" not in done.stderr
    finally:
        for place in (cache, home):
            subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
def test_nothing_needs_a_network():
    """The model answers in a process without any network (Linux; elsewhere, or where that is forbidden, skipped)."""
    alone = ["unshare", "--map-root-user", "--net"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("no network namespaces here")
    reach = "import socket; socket.create_connection(('1.1.1.1', 53), timeout=2)"
    assert subprocess.run([*alone, sys.executable, "-c", reach], capture_output=True).returncode  # there really is none
    command = [*alone, sys.executable, "-m", "helpers.ask", "--stage", "base", "--jsonl"]
    done = subprocess.run(command, cwd=ROOT, input="How many flights left JFK in July?\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["question"] == "How many flights left JFK in July?"


# ---------------------------------------------------------------- scoreboard, sweeps


RECORDS = [
    {"id": str(i), "intent": "count", "phrasing": f"count/{i}", "correct": i % 2 == 0, "kind": "right" if i % 2 == 0 else "no query"}
    for i in range(10)
]


def test_scoreboard_replaces_and_orders():
    scoreboard.record("sft", "validation", RECORDS, 2.0)
    scoreboard.record("zero-shot", "validation", RECORDS[:4], 1.0)
    scoreboard.record("sft", "validation", RECORDS[:1], 3.0)
    rows = json.loads(scoreboard.scoreboard_path().read_text(encoding="utf-8"))
    assert len(rows) == 2 and scoreboard.rows()[0]["stage"] == "zero-shot"
    assert scoreboard.rows()[1] == {
        "stage": "sft", "split": "validation", "n": 1, "correct": 1, "accuracy": 1.0, "low": 0.025, "high": 1.0, "seconds": 3.0, "seed": 0, "source": "live",
    }  # fmt: skip
    assert list(scoreboard.table()["accuracy"]) == ["50%", "100%"] and len(scoreboard.table([])) == 0


def test_recorded_seeds_are_told_apart_and_pooled(monkeypatch, tmp_path):
    monkeypatch.setattr(scoreboard, "RESULTS", tmp_path)
    other = [dict(r, correct=r["id"] == "0") for r in RECORDS]
    runs = [{"stage": stage, "splits": {"test": {"records": records}}} for stage, records in (("lora", RECORDS), ("ia3", RECORDS), ("lora", other))]
    (tmp_path / "small.json").write_text(json.dumps({"runs": runs}), encoding="utf-8")
    found = scoreboard.recorded("small", stage="lora")
    assert found == [runs[0], runs[2]] and scoreboard.recorded("small") == runs and scoreboard.recorded("small", stage="none") == []
    assert scoreboard.seeds(found, "test") == "50%, 10%"
    assert [r["correct"] for r in scoreboard.pooled(found, "test")] == [1.0, 0.0, 0.5, 0.0, 0.5, 0.0, 0.5, 0.0, 0.5, 0.0]


def test_records_are_current():
    assert sweeps.stale() == [], "recorded runs are stale: make sweeps"


def test_a_changed_recipe_is_stale(monkeypatch):
    monkeypatch.setattr(sweeps, "SHORT", sweeps.SHORT + 1)
    assert any(line.startswith("examples: ") for line in sweeps.stale())


def test_records_hold_every_question():
    for name in sweeps.plan():
        asked = {split: list(questions["id"]) for split, questions in sweeps.splits(name).items()}
        for run in scoreboard.recorded(name):
            for split, ids in asked.items():
                if sweeps.shown(name, run["stage"], split):
                    assert [r["id"] for r in run["splits"][split]["records"]] == ids
            assert run["versions"]["torch"] and run["machine"] and "/" not in run["machine"]


@pytest.fixture
def here(monkeypatch):
    """Points are run in this process, one after another, and no hours are told."""
    monkeypatch.setattr(measure, "results", lambda todo: ((name, measure.run_point(*place)) for name, place in todo.items()))
    monkeypatch.setattr(recording, "tell", lambda only: None)


def test_sweeps_run_writes_after_each_point_and_goes_on(monkeypatch, tmp_path, here):
    monkeypatch.setattr(scoreboard, "RESULTS", tmp_path)
    points = [{"stage": "zero-shot", "seed": s, "recipe": sweeps.SFTRecipe(seed=s)} for s in (0, 1)]
    monkeypatch.setattr(sweeps, "plan", lambda: {"small": points})
    made = []

    def run_point(sweep, point):
        made.append(point["seed"])
        if len(made) == 2:
            raise KeyboardInterrupt
        return {
            "stage": "zero-shot",
            "seed": point["seed"],
            "key": sweeps.key(sweep, point),
            "splits": {"validation": {"seconds": 1, "records": RECORDS}},
        }

    monkeypatch.setattr(measure, "run_point", run_point)
    with pytest.raises(KeyboardInterrupt):
        recording.run()
    assert [r["seed"] for r in scoreboard.recorded("small")] == [0] and len(sweeps.stale()) == 1
    recording.run()
    assert [r["seed"] for r in scoreboard.recorded("small")] == [0, 1] and made == [0, 1, 1] and sweeps.stale() == []
    assert recording.check() == 0
    wrong = [dict(r, correct=False) for r in RECORDS]
    monkeypatch.setattr(measure, "run_point", lambda *_: {"splits": {"validation": {"records": wrong}}})
    assert recording.check() == 1


def test_one_call_searches_and_then_runs_each_method_at_the_rate_it_found(monkeypatch, tmp_path, here):
    monkeypatch.setattr(scoreboard, "RESULTS", tmp_path)
    monkeypatch.setattr(sweeps, "splits", lambda sweep: {})
    best, lower_loss = {"QLoRA": 1e-3, "LoRA": 1e-2, "IA3": 3e-2, "full fine-tuning": 1e-3}, 0.3  # prompt tuning: a tie in accuracy

    def run_point(sweep, point):
        recipe = point.get("recipe") or sweeps.SFTRecipe()
        right = recipe.learning_rate == best.get(point["stage"])
        losses = [[step, 1.0 - (recipe.learning_rate == lower_loss)] for step in range(10, 101, 10)]
        records = [dict(r, correct=right) for r in RECORDS]
        return {
            "stage": point["stage"],
            "seed": point["seed"],
            "key": sweeps.key(sweep, point),
            "recipe": dataclasses.asdict(recipe),
            "losses": losses,
            "splits": {"validation": {"seconds": 1, "records": records}},
        }

    monkeypatch.setattr(measure, "run_point", run_point)
    assert sweeps.chosen_rate("QLoRA") is None
    recording.run()
    chosen = {r["stage"]: r["recipe"]["learning_rate"] for r in scoreboard.recorded("methods")}
    assert chosen == best | {"prompt tuning": lower_loss} and len(scoreboard.recorded("methods")) == 15
    assert sweeps.stale() == []


@pytest.mark.slow
def test_a_point_is_really_run(monkeypatch):
    """Two steps of training and two questions, through the same code as make sweeps; and a baseline."""
    questions = flights.load_questions("validation").select([0, 1])
    monkeypatch.setattr(sweeps, "splits", lambda sweep: {"validation": questions})
    recipe = sweeps.SFTRecipe(steps=2, batch_size=2, warmup_steps=1)
    run = measure.run_point("examples", {"stage": "sft", "seed": 0, "recipe": recipe})
    assert run["recipe"]["steps"] == 2 and run["train_seconds"] > 0 and run["key"] == sweeps.key("examples", {"stage": "sft", "recipe": recipe})
    assert "resumed" not in run and not list(measure.folder().glob("*"))
    assert [r["id"] for r in run["splits"]["validation"]["records"]] == ["validation-0001", "validation-0002"]
    run = measure.run_point("baselines", {"stage": "nearest-question", "seed": 0})
    assert run["recipe"] is None and len(run["splits"]["validation"]["records"]) == 2


def test_nearest_question_and_shots():
    train = [
        {"question": q, "sql": s, "intent": i, "style": "bare"}
        for q, s, i in [("flights to Boston", "A", "count"), ("average delay", "B", "x"), ("longest trip", "C", "y")]
    ]
    neighbours = baselines.Neighbours(train)
    assert neighbours.nearest("how many flights to boston?")[0]["sql"] == "A"
    assert [r["sql"] for r in neighbours.nearest("the average delays", 2)][-1] == "B"  # the nearest stands last
    answers, _ = baselines.answer("nearest-question", [{"question": "longest trips"}], train=train)
    assert answers == ["C"]
    assert baselines.shots_for("zero-shot", train) is None
    full = list(flights.load_questions("train"))
    for stage, count in {"3-shot": 3, "8-shot": 8, "retrieved-8-shot": 8}.items():
        assert len(baselines.shots_for(stage, full)("how many flights to Boston")) == count


# ---------------------------------------------------------------- what runs inside a notebook


def test_the_live_line_has_what_the_bar_inside_says():
    assert lessons.progress_line("03  cell 12/40", 75.9) == "03  cell 12/40  1:15"
    inside = "training 120/440, 04:10 left, loss=0.310"
    assert lessons.progress_line("03  cell 12/40", 75.9, inside) == f"03  cell 12/40  1:15  {inside}"
    assert lessons.progress_line("03  cell 40/40", 600, ending="  done") == "03  cell 40/40  10:00  done"


def test_bars_inside_a_notebook_reach_the_terminal_and_no_output(tmp_path, monkeypatch, capsys):
    """A real kernel with a bar of four: while it runs the file is read, and the stored notebook has only what was printed."""
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(lessons, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(lessons, "measured", lambda seconds: {"seconds": 1})
    monkeypatch.setattr(lessons, "EVERY", 0.2)
    source = f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\nfrom helpers.runtime import progress_bar\n"
    source += "with progress_bar(4, 'sampling') as bar:\n    time.sleep(1)\nprint('over')"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nbformat.write(notebook, tmp_path / "tiny.ipynb")
    lessons.execute("tiny")
    seen = capsys.readouterr().out
    assert re.search(r"tiny  cell 1/1  0:\d\d  sampling 0/4, \? left\n", seen) and re.search(r"tiny  cell 1/1  0:\d\d  done\n$", seen)
    (cell,) = nbformat.read(tmp_path / "tiny.ipynb", as_version=4).cells
    assert [o["text"] for o in cell.outputs] == ["over\n"]
    assert not list((tmp_path / "runs").rglob("*.progress*"))
