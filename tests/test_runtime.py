"""Places, locks, torn builds, devices."""

import errno
import multiprocessing
import os
import re
import subprocess
import sys
import time

import pytest

from helpers import runtime
from helpers.runtime import ROOT, CourseError, building


def test_places_follow_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "c"))
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "r"))
    assert runtime.cache_dir() == tmp_path / "c" and runtime.runs_dir() == tmp_path / "r"
    monkeypatch.delenv("COURSE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert runtime.cache_dir() == tmp_path / "x" / "first-llm-experiment"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "w"))
    assert runtime.cache_dir() == tmp_path / "w" / "first-llm-experiment"


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
    with pytest.raises(CourseError, match="The disk filled up while making thing"), building(tmp_path / "thing"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_killed_build_is_made_again(tmp_path):
    code = f"""
import sys, time; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from helpers.runtime import building
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


@pytest.mark.parametrize(("ratio", "dtype"), [(3.0, "bfloat16"), (0.7, "float32")])
def test_a_cpu_slow_at_bfloat16_computes_in_float32(monkeypatch, ratio, dtype):
    monkeypatch.setattr(runtime, "bfloat16_speedup", lambda: ratio)
    chosen = runtime.device.__wrapped__()
    assert (chosen.kind, chosen.dtype_name) == ("cpu", dtype) and f"{ratio:.1f} times" in chosen.why


def test_an_emulated_bfloat16_is_told_by_one_small_matmul(monkeypatch):
    def times(slow):  # seconds of a matmul, by the number of its multiplications; `slow`: bfloat16's against float32's
        def repeat(matmul, number, repeat):
            rows, width = matmul.__closure__[0].cell_contents.shape
            dtype = str(matmul.__closure__[0].cell_contents.dtype)
            asked.append((rows, width, dtype))
            return [rows * width**2 * (slow if dtype == "torch.bfloat16" else 1)] * repeat

        return repeat

    small, large = [(64, 512, "torch.float32"), (64, 512, "torch.bfloat16")], [(512, 1024, "torch.float32"), (512, 1024, "torch.bfloat16")]
    for slow, expected, sizes in ((100, 0.01, small), (2, 0.5, small + large), (0.25, 4.0, small + large)):
        asked = []
        monkeypatch.setattr(runtime.timeit, "repeat", times(slow))
        assert (runtime.bfloat16_speedup(), asked) == (expected, sizes)


def test_seeds_repeat():
    import torch

    runtime.seed_everything(3)
    first = torch.rand(2).tolist()
    runtime.seed_everything(3)
    assert torch.rand(2).tolist() == first


def test_memory_is_measured():
    assert 0.01 < runtime.peak_memory_gb() < runtime.memory_gb()


def test_import_is_light():
    code = "import sys, helpers.runtime, helpers.flights, helpers.sql, helpers.recipes, helpers.models; print([m for m in ('torch', 'transformers', 'pandas', 'datasets', 'psutil') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "[]\n"


# ---------------------------------------------------------------- progress bars


def test_a_bar_tells_a_file_where_one_is_named(tmp_path, monkeypatch, capfd):
    file = tmp_path / "runs" / "03.progress"
    monkeypatch.setenv("COURSE_PROGRESS_FILE", str(file))
    monkeypatch.setenv("COURSE_PROGRESS", "0")
    with runtime.progress_bar(440, "training") as bar:
        assert file.read_text(encoding="utf-8") == "training 0/440, ? left"
        bar.fp.pause = bar.mininterval = 0
        bar.update(120)
        bar.set_postfix(loss="0.310")
        assert re.fullmatch(r"training 120/440, \d\d:\d\d left, loss=0.310", file.read_text(encoding="utf-8"))
    assert file.read_text(encoding="utf-8") == ""  # over: nothing is left behind
    assert capfd.readouterr() == ("", "")


def test_the_file_is_renewed_twice_a_second_at_most(tmp_path, monkeypatch):
    now, told = [100.0], runtime._Told(tmp_path / "x")
    monkeypatch.setattr(runtime.time, "monotonic", lambda: now[0])
    for at, text in ((100.0, "\rone  "), (100.4, "two"), (100.5, "three"), (100.9, "four"), (100.95, "\r")):
        now[0] = at
        told.write(text)
        said = {"two": "one", "four": "three"}.get(text, text.strip())
        assert (tmp_path / "x").read_text(encoding="utf-8") == said


def test_a_bar_without_a_name_tells_nobody(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_PROGRESS_FILE", str(tmp_path / "x"))
    with runtime.progress_bar(3, "") as bar:
        bar.update(3)
    assert not (tmp_path / "x").exists()
