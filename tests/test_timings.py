"""Times are told as measured, everywhere the same; the two-hour plan keeps a quarter free."""

import json

import pytest

from course import timings
from course.timings import Block
from helpers.runtime import CourseError


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setattr(timings, "measured", lambda: {"00_a": 3, "03_b": 7})
    monkeypatch.setattr(timings, "exercises", lambda: {"00.1": 5, "00.2": 10})


def test_every_file_tells_the_measured_times():
    for path, text in timings.renewed().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run make timings"


def test_every_exercise_has_its_minutes():
    assert sorted(timings.exercises()) == [f"0{n}.{i}" for n in range(5) for i in (1, 2, 3)]
    assert timings.exercises()["00.1"] == 5


def test_minutes_are_rounded_and_never_zero(tmp_path, monkeypatch):
    monkeypatch.setattr(timings, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(timings, "all_notebooks", lambda: ["a", "b", "solutions/a"])
    for name, seconds in (("a", 20), ("b", 275)):
        (tmp_path / f"{name}.ipynb").write_text(json.dumps({"metadata": {"measured": {"seconds": seconds, "cores": 2}}}), encoding="utf-8")
    assert timings.measured() == {"a": 1, "b": 5}
    (tmp_path / "b.ipynb").write_text('{"metadata": {}}', encoding="utf-8")
    with pytest.raises(CourseError, match="make refresh NOTEBOOK=b"):
        timings.measured()


def test_a_plan_adds_up(known):
    rows = timings.plan((Block("first", 8, run="00_a", solve=("00.1", "00.2")), Block("second", 60)), 120).splitlines()
    assert rows[2:4] == ["| 0:00 | 0:26 | first | 8 | 3 | 00.1, 00.2: 15 |", "| 0:26 | 1:26 | second | 60 |  |  |"]
    assert rows[-1].startswith("Minutes; 86 in all of 120; 34 to spare.")


def test_a_plan_without_a_quarter_to_spare_is_refused(known):
    assert timings.plan((Block("talk", 90),), 120)
    with pytest.raises(CourseError, match="91 of 120 minutes, and a quarter is to be spare"):
        timings.plan((Block("talk", 91),), 120)


def test_a_notebook_that_does_not_get_done_behind_the_talk_is_refused(known):
    assert timings.plan((Block("start", 3, behind="03_b"), Block("talk", 4, behind="03_b")))
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
    assert capsys.readouterr().out == "times renewed in other.md\n00: 3 min; 03: 7 min\n"
