"""The proof without Colab: what may move, and that each of its checks can fail. (The replica itself is `make colab-check`.)"""

import re
import subprocess
import sys

import pytest

from course import colab, hosted
from helpers.files import CourseError
from helpers.runtime import ROOT


def test_pins_are_dated_and_read(tmp_path):
    head = colab.PINS.read_text(encoding="utf-8").splitlines()[:2]
    assert re.search(rf"on 20\d\d-\d\d-\d\d \(Python {re.escape(colab.PYTHON)}\)", head[0]) and "To renew" in head[1]
    freeze = tmp_path / "freeze.txt"
    freeze.write_text("# torch==1\nA_b.c==1.2+cu128\nx @ https://example.org/x.whl\n-e git+https://example.org\n", encoding="utf-8")
    assert colab.pins(freeze) == {"a-b-c": "1.2"}
    assert {"torch", "numpy", "pandas", "transformers", *hosted.MAY_MOVE} <= colab.pins().keys()


def test_moves():
    moved, added = colab.moves({"a": "1", "b": "1", "c": "1"}, {"a": "1", "b": "2", "d": "1"})
    assert moved == {"b": ("1", "2"), "c": ("1", "removed")} and added == {"d": "1"}


def test_only_five_may_move(capsys):
    colab.check_moves({name: ("1", "2") for name in hosted.MAY_MOVE})
    assert "  pyarrow 1 -> 2\n" in capsys.readouterr().out
    with pytest.raises(CourseError, match="would move numpy on Colab: adapt the ranges in pyproject.toml"):
        colab.check_moves({"numpy": ("2.1.3", "2.2"), "pyarrow": ("18", "21")})


def answer_of(monkeypatch, **found):
    """In place of the index's answer: those versions, beside Colab's own."""
    monkeypatch.setattr(colab, "answer", lambda *r, constraints: [{"name": n.replace("_", "-"), "version": v} for n, v in found.items()])


def test_the_resolvers_answer_is_compared(monkeypatch, capsys):
    answer_of(monkeypatch, datasets="5.0.1", trl="1.16.0", numpy="2.1.3", nvidia_cublas="12")
    colab.resolve()
    shown = capsys.readouterr().out
    assert "datasets 4.0.0 -> 5.0.1" in shown and "torchao 0.10.0 -> removed" in shown and "added: trl 1.16.0\n" in shown
    answer_of(monkeypatch, fsspec="2026.1.0")
    with pytest.raises(CourseError, match="would move fsspec on Colab"):
        colab.resolve()


def test_what_the_dependencies_reach(monkeypatch):
    """By the index's own metadata, markers and extras as on Colab; literal."""
    index = {"a": ["b[x]>=1", "windows-only; sys_platform == 'win32'"], "b": ["c; extra == 'x'", "d; extra == 'y'"], "c": [], "d": []}
    monkeypatch.setattr(colab.hosted, "requirements", lambda: ["a>=1", "absent>=1"])
    monkeypatch.setattr(colab, "answer", lambda *names: [{"name": n.split("==")[0], "requires_dist": index[n.split("==")[0]]} for n in names[1:]])
    there = {"a": "1", "b": "1", "c": "1", "d": "1", "windows-only": "1"}
    assert colab.reached(there) == {"a": "1", "b": "1", "c": "1"}


def test_the_repository_for_the_replica_holds_the_files_as_they_are(tmp_path):
    stray = ROOT / "tests" / "not_yet_committed.txt"
    stray.touch()
    try:
        colab.commit(tmp_path / "course.git", "v9.9.9")
    finally:
        stray.unlink()
    subprocess.run(["git", "clone", "-q", "-b", "v9.9.9", str(tmp_path / "course.git"), str(tmp_path / "out")], check=True, capture_output=True)
    files = {p.name for p in (tmp_path / "out" / "tests").iterdir()}
    assert "not_yet_committed.txt" in files and "conftest.py" in files and not (tmp_path / "out" / "runs").exists()
    status = subprocess.run(["git", "status", "--porcelain", "--", "tests/not_yet_committed.txt"], cwd=ROOT, capture_output=True, text=True)
    assert status.stdout == ""  # this folder's own index was left alone


@pytest.mark.slow
def test_the_cure_is_questioned_where_nothing_is_wrong(monkeypatch):
    monkeypatch.setattr(colab, "python", lambda folder: sys.executable)
    with pytest.raises(CourseError, match="hosted.py need not remove it any more"):
        colab.check_cure_is_needed(ROOT)


def test_a_failing_notebook_fails_the_check(tmp_path, monkeypatch):
    seen = {}

    def nbval(names, place, kernel, **environment):
        seen.update(environment, names=names, kernel=kernel, there=sorted(p.name for p in place.iterdir()))
        return 1

    monkeypatch.setattr(colab.runner, "nbval", nbval)
    with pytest.raises(CourseError, match="A notebook failed there"):
        colab.notebooks(tmp_path, COLAB_RELEASE_TAG="x")
    assert seen["there"] == [f"{name}.ipynb" for name in seen["names"]], "opened alone, with nothing of the course beside it"
    assert seen["COLAB_RELEASE_TAG"] == "x" and seen["GIT_CONFIG_VALUE_0"] in colab.runner.project()["urls"]["Repository"]
    assert (tmp_path / "jupyter" / "kernels" / seen["kernel"] / "kernel.json").exists()
