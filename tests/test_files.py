"""Files under kills, two writers, full and read-only disks: whole or not there, and one sentence."""

import contextlib
import errno
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import pytest

from helpers import files, runtime, scoreboard
from helpers.files import CourseError, alone, building, write_whole
from helpers.runtime import ROOT

# ---------------------------------------------------------------- one builder


def test_building_makes_it_once(tmp_path):
    made = []
    for _ in range(2):
        with building(tmp_path / "thing") as scratch:
            if scratch is not None:
                scratch.write_text("whole", encoding="utf-8")
                made.append(1)
    assert made == [1] and (tmp_path / "thing").read_text(encoding="utf-8") == "whole"


def test_an_error_leaves_nothing_of_that_name(tmp_path):
    with pytest.raises(ValueError), building(tmp_path / "thing") as scratch:
        scratch.write_text("half", encoding="utf-8")
        raise ValueError
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == []


def test_a_full_disk_is_one_sentence(tmp_path):
    with pytest.raises(CourseError, match="No space to make thing: .* MB free"), building(tmp_path / "thing", need_bytes=10**18):
        pass
    with pytest.raises(CourseError, match="thing was not written, the disk is full: free some space"), building(tmp_path / "thing"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_killed_build_is_made_again(tmp_path):
    code = f"""
import sys, time; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from helpers.files import building
with building(Path({str(tmp_path)!r}) / "thing") as scratch:
    scratch.write_text("torn")
    print("writing", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    process.kill()
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "thing").exists() and list(tmp_path.glob("thing.part-*"))
    with building(tmp_path / "thing") as scratch:
        scratch.write_text("whole", encoding="utf-8")
    assert (tmp_path / "thing").read_text(encoding="utf-8") == "whole" and not list(tmp_path.glob("thing.part-*"))


def _build(folder, queue):
    with building(folder / "thing") as scratch:
        if scratch is not None:
            queue.put(os.getpid())
            time.sleep(0.3)
            scratch.write_text("whole", encoding="utf-8")


def test_two_processes_build_it_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_build, args=(tmp_path, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    queue.get(timeout=5)
    assert queue.empty() and (tmp_path / "thing").read_text(encoding="utf-8") == "whole"


# ---------------------------------------------------------------- several writers

ADDING = """
import sys; sys.path.insert(0, sys.argv[1])
from helpers import scoreboard
for seed in range(int(sys.argv[3])):
    scoreboard.add({"stage": sys.argv[2], "split": "test", "seed": seed, "source": "live", "n": 1})
"""


def adders(folder, processes: int, rows: int) -> list:
    """So many processes that add so many rows each to one scoreboard; their exit statuses."""
    environment = os.environ | {"COURSE_RUNS": str(folder)}
    running = [subprocess.Popen([sys.executable, "-c", ADDING, str(ROOT), f"s{i}", str(rows)], env=environment) for i in range(processes)]
    return [process.wait() for process in running]


@pytest.mark.slow
def test_five_processes_add_thirty_rows_each_and_none_is_lost(tmp_path):
    for attempt in range(20):
        assert adders(tmp_path / str(attempt), 5, 30) == [0] * 5
        rows = json.loads((tmp_path / str(attempt) / "scoreboard.json").read_text(encoding="utf-8"))
        assert len(rows) == 150 == len({(r["stage"], r["seed"]) for r in rows})
        assert not list((tmp_path / str(attempt)).glob("*.part-*"))


def test_two_processes_that_add_rows_lose_none(tmp_path):
    assert adders(tmp_path, 2, 10) == [0, 0] and len(json.loads((tmp_path / "scoreboard.json").read_text(encoding="utf-8"))) == 20


def test_without_the_lock_rows_are_lost(tmp_path, monkeypatch):
    """The same rows by two writers whose reads come before both writes."""
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path))
    for locked, kept in ((True, 2), (False, 1)):
        if not locked:
            monkeypatch.setattr(scoreboard, "alone", lambda path: contextlib.nullcontext())
        scoreboard.scoreboard_path().unlink(missing_ok=True)
        whole, nested = scoreboard.write_whole, []

        def other_first(path, text, whole=whole, nested=nested, locked=locked):
            if not nested:  # another process's turn, in the middle of this one's, if it isn't kept out
                nested.append(1)
                if not locked:
                    scoreboard.add({"stage": "other", "split": "test", "seed": 0, "source": "live"})
            whole(path, text)

        monkeypatch.setattr(scoreboard, "write_whole", other_first)
        scoreboard.add({"stage": "mine", "split": "test", "seed": 0, "source": "live"})
        monkeypatch.setattr(scoreboard, "write_whole", whole)
        if locked:
            scoreboard.add({"stage": "other", "split": "test", "seed": 0, "source": "live"})
        assert len(json.loads(scoreboard.scoreboard_path().read_text(encoding="utf-8"))) == kept


def test_a_reader_never_sees_half_a_file(tmp_path):
    """While another process rewrites a long file without a pause."""
    path = tmp_path / "long.json"
    write_whole(path, json.dumps([0] * 50_000))
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\nfrom helpers.files import write_whole\n"
        f"for i in range(10**6): write_whole(Path({str(path)!r}), str([i] * 50_000))"
    )
    writer, seen = subprocess.Popen([sys.executable, "-c", code]), set()
    try:
        end = time.monotonic() + 60
        while len(seen) < 5 and time.monotonic() < end:
            numbers = json.loads(path.read_text(encoding="utf-8"))
            assert len(numbers) == 50_000 and len(set(numbers)) == 1
            seen.add(numbers[0])
    finally:
        writer.kill()
        writer.wait()
    assert len(seen) >= 5


KILLED = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from helpers.files import alone, write_whole
path, i = Path(sys.argv[2]), 0
while True:
    with alone(path):
        write_whole(path, str([i] * 20_000))
    i += 1
    print(i, flush=True)
"""


@pytest.mark.slow
def test_a_kill_in_the_middle_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "long.json"
    for attempt in range(50):
        writer = subprocess.Popen([sys.executable, "-c", KILLED, str(ROOT), str(path)], stdout=subprocess.PIPE)
        writer.stdout.readline()
        time.sleep(0.001 * (attempt % 7))
        writer.kill()
        writer.communicate()
        numbers = json.loads(path.read_text(encoding="utf-8"))
        assert len(numbers) == 20_000 and len(set(numbers)) == 1
    with alone(path):  # and the lock of the killed isn't held any more
        assert not list(tmp_path.glob("*.part-*"))


# ---------------------------------------------------------------- disks that take nothing


@pytest.fixture
def read_only(monkeypatch):
    """Everything that makes, opens for writing or renames a file says that the disk is read-only (root may write anywhere: permissions prove nothing)."""

    def refuse(number=errno.EROFS):
        def no(*_, **__):
            raise OSError(number, os.strerror(number))

        def opened(file, mode="r", *rest, real=open, **more):
            return no() if set(mode) & set("wax+") else real(file, mode, *rest, **more)

        monkeypatch.setattr(pathlib.Path, "mkdir", no)
        monkeypatch.setattr(pathlib.Path, "write_text", no)
        monkeypatch.setattr(os, "replace", no)
        monkeypatch.setattr(os, "mkdir", no)
        monkeypatch.setattr(tempfile, "mkdtemp", no)
        import filelock

        monkeypatch.setattr(filelock.FileLock, "acquire", no)

    return refuse


def test_a_read_only_cache_that_holds_everything_will_do(tmp_path, monkeypatch, read_only):
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path))
    with building(tmp_path / "thing") as scratch:
        scratch.write_text("whole", encoding="utf-8")
    (tmp_path / "thing.lock").unlink(missing_ok=True)
    read_only()
    assert runtime.cache_dir() == tmp_path
    with building(runtime.cache_dir() / "thing") as scratch:
        assert scratch is None


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.EROFS, "its disk is read-only: set COURSE_CACHE"),
        (errno.EACCES, "you may not write there: set COURSE_CACHE"),
        (errno.ENOSPC, "the disk is full: free some space"),
    ],
)
def test_what_cannot_be_written_is_one_sentence(tmp_path, read_only, number, says):
    read_only(number)
    for write in (
        lambda: write_whole(tmp_path / "thing", "x"),
        lambda: building(tmp_path / "thing").__enter__(),
        lambda: alone(tmp_path / "thing").__enter__(),
        lambda: files.make_folder(tmp_path / "thing"),
    ):
        with pytest.raises(CourseError, match=f"thing was not written, {says}") as told:
            write()
        assert str(tmp_path) not in str(told.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variable", ["COURSE_CACHE", "COURSE_RUNS"])
def test_a_variable_that_names_a_file_is_one_sentence(tmp_path, monkeypatch, variable):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for place in (tmp_path / "file", tmp_path / "file" / "inside"):
        monkeypatch.setenv(variable, str(place))
        with pytest.raises(CourseError, match="was not written, a file stands where its folder should be: remove it, or set COURSE_CACHE"):
            (runtime.cache_dir if variable == "COURSE_CACHE" else runtime.runs_dir)()
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_a_disk_that_fills_up_keeps_what_was_there(small_disk):
    small_disk = small_disk(2)
    write_whole(small_disk / "kept.json", "old")
    with pytest.raises(CourseError, match="kept.json was not written, the disk is full"):
        write_whole(small_disk / "kept.json", "x" * 3_000_000)
    with pytest.raises(CourseError, match="thing was not written, the disk is full"), building(small_disk / "thing") as scratch:
        scratch.write_bytes(b"x" * 3_000_000)
    assert (small_disk / "kept.json").read_text(encoding="utf-8") == "old" and {p.name for p in small_disk.iterdir()} <= {"kept.json", "thing.lock"}
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CourseError, match="kept.json was not written, its disk is read-only"):
        write_whole(small_disk / "kept.json", "new")
    with building(small_disk / "kept.json") as scratch:
        assert scratch is None


def test_other_errors_are_not_hidden(tmp_path):
    with pytest.raises(OSError, match="Interrupted"), files.told("thing"):
        raise OSError(errno.EINTR, os.strerror(errno.EINTR))


# ---------------------------------------------------------------- the error


def test_an_error_steers_no_terminal():
    assert str(CourseError("a\x1b[2J\tb\nc\x07\u202e\ud800é")) == "a\\x1b[2J\tb\nc\\x07\\u202e\\ud800é"


# ---------------------------------------------------------------- in place of what is there


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_replaced_stands_until_the_new_one_is_whole(tmp_path, kind):
    def make(path, text):
        if kind == "folder":
            path.mkdir()
        (path / "x" if kind == "folder" else path).write_text(text, encoding="utf-8")

    def there():
        return {p.relative_to(tmp_path).as_posix(): p.read_text(encoding="utf-8") for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock"}

    target, name = tmp_path / "a", "a/x" if kind == "folder" else "a"
    for text in ("one", "two"):
        with files.replacing(target) as scratch:
            make(scratch, text)
        assert there() == {name: text}
    make(tmp_path / "a.new", "of a run that was killed at its very end")
    for error in (KeyboardInterrupt, CourseError):
        with pytest.raises(error), files.replacing(target) as scratch:
            make(scratch, "three")
            raise error
        assert there() == {name: "two"}
