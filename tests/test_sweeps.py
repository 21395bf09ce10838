"""`make sweeps`: points side by side in processes of their own, what an interrupt and a failure leave, and the hours that are told before."""

import json
import subprocess
import sys
import time

import pytest

from course import measure, recording, sweeps
from helpers import scoreboard, times
from helpers.files import CourseError
from helpers.recipes import SFTRecipe

POINTS = [{"stage": "zero-shot", "seed": seed, "recipe": SFTRecipe(seed=seed)} for seed in range(4)]
KEYS = [sweeps.key("small", point) for point in POINTS]
RECORDS = [{"id": "1", "intent": "a", "phrasing": "p", "correct": True, "kind": "right"}]
# A stand-in for `python -m course.sweeps point`: its folder, its hash, what it does, whom it waits for, its record.
POINT = """
import pathlib, sys, time
folder, name, does, other, record = pathlib.Path(sys.argv[1]), *sys.argv[2:]
(folder / f"{name}.began").touch()
end = time.monotonic() + 60
while other and not (folder / f"{other}.began").exists():
    assert time.monotonic() < end, "the other never began"
    time.sleep(0.01)
if does == "fail":
    sys.exit("the disk is full")
if does == "hang":
    time.sleep(600)
(folder / f"{name}.json").write_text(record)
"""


def made(name: str) -> dict:
    """The record of one of the points."""
    return {"stage": "zero-shot", "seed": KEYS.index(name), "key": name, "splits": {"validation": {"seconds": 1, "records": RECORDS}}}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Four points, two at a time; `does` says what becomes of one, `waits` for which it waits. Returns what was launched, and what runs."""
    does, waits, launched, processes = {}, {}, [], []

    def launch(what, sweep, name, threads):
        launched.append((what, sweep, name, threads))
        measure.folder().mkdir(parents=True, exist_ok=True)
        arguments = [str(measure.folder()), name, does.get(name, "work"), waits.get(name, ""), json.dumps(made(name))]
        with open(measure.folder() / f"{name}.log", "w", encoding="utf-8") as log:
            processes.append(subprocess.Popen([sys.executable, "-c", POINT, *arguments], stdout=log, stderr=log))
        return processes[-1]

    monkeypatch.setattr(scoreboard, "RESULTS", tmp_path)
    monkeypatch.setattr(sweeps, "plan", lambda: {"small": POINTS})
    monkeypatch.setattr(measure, "side_by_side", lambda points: (2, 1))
    monkeypatch.setattr(recording, "tell", lambda only: None)
    monkeypatch.setattr(measure, "launch", launch)
    monkeypatch.setattr(measure, "POLL", 0.02)
    yield {"does": does, "waits": waits, "launched": launched, "processes": processes}
    for process in processes:
        process.kill()
        process.wait()


def recorded() -> list[str]:
    return [run["key"] for run in scoreboard.recorded("small")]


def left() -> set[str]:
    return {path.suffix for path in measure.folder().iterdir()} - {".began"}


def test_points_run_side_by_side(machine):
    """The first two each wait until the other has begun."""
    machine["waits"].update({KEYS[0]: KEYS[1], KEYS[1]: KEYS[0]})
    recording.run()
    assert recorded() == KEYS and sweeps.stale() == [] and left() == set()
    assert sorted(machine["launched"]) == sorted(("point", "small", name, 1) for name in KEYS)
    recording.run()
    assert len(machine["launched"]) == 4  # nothing is done twice


def test_a_failing_point_is_named_and_loses_nothing_else(machine, capsys):
    machine["does"][KEYS[1]] = "fail"
    with pytest.raises(CourseError) as failed:
        recording.run()
    first, second = str(failed.value).split("\n")
    assert first == "1 failed; the other points are recorded, but for what follows from these:"
    assert second.startswith("small: zero-shot seed 1 SFTRecipe(")
    assert second.endswith(f": the disk is full (sweeps/{KEYS[1]}.log in the runs folder)")
    assert recorded() == [KEYS[0], KEYS[2], KEYS[3]] and left() == {".log"} and len(machine["launched"]) == 4
    assert "FAILED small: zero-shot seed 1" in capsys.readouterr().out
    machine["does"].clear()
    recording.run()
    assert recorded() == KEYS and len(machine["launched"]) == 5 and left() == set()


def test_an_interrupted_run_goes_on_where_it_was(machine, monkeypatch):
    machine["does"].update({KEYS[2]: "hang", KEYS[3]: "hang"})
    sleep = time.sleep

    def interrupt(seconds):
        sleep(seconds)
        if recorded() == KEYS[:2] and len(machine["launched"]) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(measure.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        recording.run()
    assert recorded() == KEYS[:2] and all(process.poll() is not None for process in machine["processes"])  # nobody works on
    monkeypatch.setattr(measure.time, "sleep", sleep)
    machine["does"].clear()
    del machine["launched"][:]
    recording.run()
    assert recorded() == KEYS and {name for _, _, name, _ in machine["launched"]} == set(KEYS[2:])


def test_what_a_killed_run_left_is_taken(machine):
    measure.folder().mkdir(parents=True)
    record = made(KEYS[3]) | {"machine": "an earlier one"}
    (measure.folder() / f"{KEYS[3]}.json").write_text(json.dumps(record), encoding="utf-8")
    recording.run()
    assert recorded() == KEYS and KEYS[3] not in {name for _, _, name, _ in machine["launched"]}
    assert scoreboard.recorded("small")[3] == record and left() == set()


def test_a_point_of_two_sweeps_is_run_once_and_recorded_in_both(machine, monkeypatch):
    monkeypatch.setattr(sweeps, "plan", lambda: {"small": POINTS, "other": POINTS[1:2]})
    recording.run()
    assert len(machine["launched"]) == 4 and recorded() == KEYS
    assert [run["key"] for run in scoreboard.recorded("other")] == KEYS[1:2]
    (scoreboard.RESULTS / "other.json").unlink()
    recording.run()  # copied
    assert len(machine["launched"]) == 4 and [run["key"] for run in scoreboard.recorded("other")] == KEYS[1:2]


def test_the_command_ends_in_a_sentence(machine, monkeypatch, capsys):
    monkeypatch.setattr(recording, "setup", lambda: None)
    machine["does"].update(dict.fromkeys(KEYS, "fail"))
    assert recording.main(["run"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("\n4 failed; ") and said.count("the disk is full") == 4 and "Traceback" not in said
    assert recording.main(["run", "big"]) == 1 and capsys.readouterr().err == "\nThere is no sweep 'big': small.\n"


@pytest.mark.slow
def test_a_process_of_its_own_really_runs_a_point():
    """The nearest question: no model. The same answers as recorded, and a second process finds it done."""
    point = next(p for p in sweeps.plan()["baselines"] if p["stage"] == "nearest-question")
    name = sweeps.key("baselines", point)
    process = measure.launch("point", "baselines", name, 1)
    assert process.wait(timeout=600) == 0, (measure.folder() / f"{name}.log").read_text(encoding="utf-8")
    record, before = measure.taken(name), scoreboard.recorded("baselines", "nearest-question")[0]
    assert record["key"] == name and record["machine"].startswith("1 of ")
    for split, part in record["splits"].items():
        pairs = list(zip(part["records"], before["splits"][split]["records"], strict=True))
        in_time = [(new, old) for new, old in pairs if new["kind"] != "does not run (time)"]  # a query may take two seconds: less, on a busy machine
        assert all(new == old for new, old in in_time) and len(in_time) > 0.8 * len(pairs)
    measure.one("point", "baselines", name)  # no model is loaded, nothing is asked
    assert measure.taken(name) == record


# ---------------------------------------------------------------- how many at a time, how long


@pytest.mark.parametrize(
    ("kind", "cores", "free", "points", "expected"),
    [
        ("cpu", 2, 25e9, 80, (2, 1)),
        ("cpu", 2, 25e9, 1, (1, 2)),
        ("cpu", 2, 6e9, 80, (1, 2)),
        ("cpu", 8, 25e9, 80, (6, 1)),
        ("cpu", 8, 9e9, 80, (2, 4)),
        ("cpu", 2, 1e9, 80, (1, 2)),
        ("cuda", 8, 25e9, 80, (1, 8)),
    ],
)
def test_points_at_a_time_and_threads_each(monkeypatch, kind, cores, free, points, expected):
    from types import SimpleNamespace

    import psutil

    monkeypatch.setattr(measure, "device", lambda: SimpleNamespace(kind=kind))
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda process: list(range(2 * cores)), raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: cores)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    assert measure.side_by_side(points) == expected


def test_hours_are_told_before_and_follow_the_work(monkeypatch, capsys):
    at = times.Rates("cpu", "float32", 1e11, 1e11, 1e10)
    monkeypatch.setattr(measure, "side_by_side", lambda points: (2, 1))
    monkeypatch.setattr(times.rates, "__wrapped__", lambda: at)
    short, long = ({"stage": "sft", "seed": 0, "recipe": SFTRecipe(steps=steps)} for steps in (100, 440))
    step = times.seconds(times.sft(SFTRecipe(steps=1)), at)
    assert measure.estimate("ranks", long, at) - measure.estimate("ranks", short, at) == pytest.approx(340 * step)
    monkeypatch.setattr(sweeps, "plan", lambda: {"ranks": [short, long], "small": [short]})
    recording.tell(everything=True)
    out = capsys.readouterr().out.split("\n")
    each = [measure.estimate("ranks", point, at) / 2 / 3600 for point in (short, long)]
    assert [line.split() for line in out[:1]] == [["ranks", "2", "points", f"{sum(each):.1f}", "hours"]]
    assert out[1] == f"2 points, 2 at a time with 1 thread each: about {sum(each):.1f} hours on this machine (estimate)" and len(out) == 3
    recording.tell("none")
    assert capsys.readouterr().out == "every recorded run is current\n"


def test_points_that_wait_for_a_search_are_counted(monkeypatch, tmp_path):
    planned = sweeps.plan()
    assert recording.to_come() == [] and len(planned["methods"]) == 15 and len(planned["preference"]) == 16
    monkeypatch.setattr(scoreboard, "RESULTS", tmp_path)
    waiting = [sweep for sweep, _ in recording.to_come()]
    assert (waiting.count("methods"), waiting.count("preference")) == (15, 15) and sweeps.plan()["methods"] == []
    assert {sweep for sweep, _ in recording.to_come("methods")} == {"methods"}


@pytest.mark.parametrize(
    ("sweep", "stage", "split", "expected"),
    [
        ("sft", "sft", "validation", False), ("sft", "sft", "test", True), ("lora", "lora", "validation", False),
        ("methods", "LoRA", "validation", True), ("methods", "IA3", "validation", False), ("methods", "IA3", "test", True),
        ("preference", "sft", "validation", True), ("preference", "dpo", "validation", False), ("preference", "dpo", "near_miss", True),
        ("baselines", "3-shot", "validation", True), ("ranks", "sft", "validation", True), ("preference_search", "dpo", "validation", True),
    ],
)  # fmt: skip
def test_what_no_notebook_shows_is_not_asked(sweep, stage, split, expected):
    assert sweeps.shown(sweep, stage, split) is expected
