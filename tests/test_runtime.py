"""Places, devices, progress."""

import re
import subprocess
import sys

import pytest

from helpers import runtime
from helpers.runtime import ROOT


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


@pytest.mark.parametrize(("ratio", "dtype"), [(3.0, "bfloat16"), (0.7, "float32")])
def test_a_cpu_slow_at_bfloat16_computes_in_float32(monkeypatch, ratio, dtype):
    monkeypatch.delenv("COURSE_PROFILE", raising=False)  # `make laptop-check` sets it
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
