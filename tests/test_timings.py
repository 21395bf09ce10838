"""Times are told as measured or as an estimate, for both kinds of processor, everywhere the same; the two-hour plan keeps a quarter free."""

import json

import pytest

from course import timings
from course.timings import Block
from helpers.files import CourseError
from helpers.times import Work


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setattr(timings, "running", lambda dtype: {"bfloat16": {"00_a": 3, "03_b": 7}, "float32": {"00_a": 9, "03_b": 27}}[dtype])
    monkeypatch.setattr(timings, "exercises", lambda: {"00.1": 5, "00.2": 10})


def test_every_file_tells_the_measured_times():
    for path, text in timings.renewed().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run make timings"


def test_every_exercise_has_its_minutes():
    assert sorted(timings.exercises()) == [f"0{n}.{i}" for n in range(5) for i in (1, 2, 3)]
    assert timings.exercises()["00.1"] == 5


RATES = {"training": 1e11, "answering": 5e10, "single": 1e10}
NOTE = {"cores": 2, "machine": "x86_64, AVX2", "kind": "cpu", "dtype": "float32", "rates": RATES}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Notebooks a and b and the kept runs, with what a test notes in them."""

    def note(a: dict, b: dict, kept: dict) -> None:
        for name, measured in (("a", a), ("b", b)):
            (tmp_path / f"{name}.ipynb").write_text(json.dumps({"metadata": {"measured": measured}}), encoding="utf-8")
        (tmp_path / "times.json").write_text(json.dumps(kept), encoding="utf-8")

    monkeypatch.setattr(timings, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(timings.times, "KEPT", tmp_path / "times.json")
    monkeypatch.setattr(timings, "all_notebooks", lambda: ["a", "b", "solutions/a"])
    monkeypatch.setattr(timings.times, "lessons", lambda: {"a": Work(rest=20), "b": Work(rest=275)})
    return note


def test_notes_of_refresh_are_kept_by_kind_with_their_best_rates(folder):
    loaded = {name: rate / 2 for name, rate in RATES.items()}
    other = {"machine": "Zen 5", "cores": 2, "rates": {"training": 8e11}, "seconds": {"a": 40}}
    folder(NOTE | {"seconds": 200}, NOTE | {"seconds": 700, "rates": loaded}, {"bfloat16": other, "float32": other})
    row = {"machine": "x86_64, AVX2", "cores": 2, "rates": RATES, "seconds": {"a": 200, "b": 700}}
    assert timings.noted() == {"bfloat16": other, "float32": row}


def test_notes_without_a_kind_and_those_of_a_gpu_change_nothing(folder):
    other = {"machine": "Zen 5", "cores": 2, "rates": {"training": 8e11}, "seconds": {}}
    folder({"seconds": 200, "cores": 2}, NOTE | {"seconds": 9, "kind": "cuda", "dtype": "bfloat16"}, {"bfloat16": other})
    assert timings.noted() == {"bfloat16": other}


def test_minutes_are_rounded_never_zero_and_named_as_what_they_are(folder):
    folder({}, {}, {"float32": {"rates": {"training": 1e11}, "seconds": {"b": 400}}})
    assert timings.told("float32") == {"a": (1, "estimate"), "b": (7, "measured")}
    assert timings.running("float32") == {"a": 1, "b": 7}


def test_a_notebook_tells_both_kinds():
    said = "**Time.** 1 minute of computing on two CPU cores with fast bfloat16 (estimate), 6 without, as on most laptops (measured)."
    assert timings.sentence((1, "estimate"), (6, "measured")) == said
    assert timings.sentence((2, "measured"), (6, "measured")).startswith("**Time.** 2 minutes of")


def test_a_plan_adds_up(known):
    rows = timings.plan((Block("first", 8, run="00_a", solve=("00.1", "00.2")), Block("second", 60)), 120).splitlines()
    assert rows[2:4] == ["| 0:00 | 0:26 | first | 8 | 3 | 00.1, 00.2: 15 |", "| 0:26 | 1:26 | second | 60 |  |  |"]
    told = " ".join(rows[5:])
    assert told.startswith("Minutes; 86 in all of 120; 34 to spare.") and told.endswith("Machines without it wait 6 minutes more.")


def test_a_plan_without_a_quarter_to_spare_is_refused(known):
    assert timings.plan((Block("talk", 90),), 120)
    with pytest.raises(CourseError, match="91 of 120 minutes, and a quarter is to be spare"):
        timings.plan((Block("talk", 91),), 120)


def test_a_notebook_that_does_not_get_done_behind_the_talk_is_refused(known):
    told = timings.plan((Block("start", 3, behind="03_b"), Block("talk", 4, behind="03_b")))
    assert "and 03 is over 20 minutes late: let them take its adapter" in " ".join(told.split())
    with pytest.raises(CourseError, match="03_b takes 7 minutes, longer"):
        timings.plan((Block("start", 3, behind="03_b"), Block("talk", 3, behind="03_b")))


def test_renewing_writes_only_what_changed(tmp_path, monkeypatch, capsys, known):
    same, other = tmp_path / "same.md", tmp_path / "other.md"
    same.write_text("3 minutes", encoding="utf-8")
    other.write_text("9 minutes", encoding="utf-8")
    monkeypatch.setattr(timings, "ROOT", tmp_path)
    monkeypatch.setattr(timings, "renewed", lambda: {same: "3 minutes", other: "3 minutes"})
    timings.main()
    assert other.read_text(encoding="utf-8") == "3 minutes"
    assert capsys.readouterr().out == "times renewed in other.md\n00: 3 or 9 min; 03: 7 or 27 min\n"
