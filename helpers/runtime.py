"""Where things are, what the machine can do, and how to write files that are never half there."""

import functools
import logging
import os
import platform
import random
import shutil
import sys
import tempfile
import timeit
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"


class CourseError(Exception):
    """Something the learner can mend: the message is one plain sentence that says what to do next."""


def cache_dir() -> Path:
    """The user's cache for what is made once (model, database): `COURSE_CACHE` if set, else the system's own place."""
    system = {"win32": os.environ.get("LOCALAPPDATA", "~/AppData/Local"), "darwin": "~/Library/Caches"}
    place = system.get(sys.platform) or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return _folder("COURSE_CACHE", f"{place}/first-llm-experiment")


def runs_dir() -> Path:
    """Where runs are kept: `COURSE_RUNS` (a mounted Drive, say) if set, else `runs/` in the course's folder."""
    return _folder("COURSE_RUNS", ROOT / "runs")


def _folder(variable: str, default: str | Path) -> Path:
    """The folder that an environment variable names, or the default; made if it isn't there."""
    folder = Path(os.environ.get(variable) or default).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_whole(path: Path, text: str) -> None:
    """Writes a text file, and its folder if need be, by one rename: a kill leaves the old text or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


@contextmanager
def building(target: Path, need_bytes: int = 0):
    """Builds a file or folder under a lock, so that a kill leaves either the whole thing or nothing of that name.

    Yields a scratch path to write to, or None when `target` is there already (perhaps made by another process while
    this one waited). The scratch path becomes `target` by one rename at the end; leftovers of a killed build are
    removed by the next one. Raises CourseError when the disk has less than `need_bytes` free.
    """
    from filelock import FileLock

    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if target.exists():
            yield None
            return
        for left in target.parent.glob(f"{target.name}.part-*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        free = shutil.disk_usage(target.parent).free
        if free < need_bytes:
            raise CourseError(
                f"No space to make {target.name}: {free / 1e6:,.0f} MB free, {need_bytes / 1e6:,.0f} MB needed. "
                "Free some disk, or set COURSE_CACHE to a folder on a larger one."
            )
        try:
            with tempfile.TemporaryDirectory(prefix=f"{target.name}.part-", dir=target.parent, ignore_cleanup_errors=True) as folder:
                yield Path(folder) / target.name
                os.replace(Path(folder) / target.name, target)
        except OSError as error:
            if error.errno == 28:  # ENOSPC
                raise CourseError(f"The disk filled up while making {target.name}: free some space and run again.") from None
            raise


@dataclass(frozen=True)
class Device:
    """What the course runs on: `kind` is cpu, cuda or mps; `dtype` is the compute precision, `why` the reason for it."""

    kind: str
    name: str
    dtype: object  # torch.dtype
    why: str
    memory_gb: float

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def bfloat16_speedup(rows: int = 512, width: int = 1024, repeats: int = 5) -> float:
    """How many times faster a bfloat16 matmul is than a float32 one on this processor (best of `repeats`, about 50 ms)."""
    import torch

    def best(dtype):
        a, b = torch.ones(rows, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
        return min(timeit.repeat(lambda: a @ b, number=1, repeat=repeats + 1)[1:])  # the first one warms up

    return best(torch.float32) / best(torch.bfloat16)


@functools.cache
def device() -> Device:
    """Picks device and dtype once per process. A GPU older than Ampere (a T4) has no bfloat16 units: float16 there."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        new = torch.cuda.is_bf16_supported(including_emulation=False)
        why = "this GPU has bfloat16 units" if new else "this GPU has no bfloat16 units, so float16"
        dtype = torch.bfloat16 if new else torch.float16
        return Device("cuda", properties.name, dtype, why, properties.total_memory / 1e9)
    name = platform.processor() or platform.machine()
    if torch.backends.mps.is_available():
        return Device("mps", name, torch.float32, "an Apple GPU; float32 until bfloat16 is measured there", memory_gb())
    ratio = bfloat16_speedup()
    why = f"a bfloat16 matmul runs at {ratio:.1f} times float32's speed on this processor"
    return Device("cpu", name, torch.bfloat16 if ratio > 1.2 else torch.float32, why, memory_gb())


def memory_gb() -> float:
    """Physical memory in GB."""
    return psutil.virtual_memory().total / 1e9


def peak_memory_gb() -> float:
    """The most memory this process has held so far, in GB (GPU memory on a GPU)."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def setup(seed: int = 0) -> Device:
    """First call of every notebook: quiet libraries, a fixed seed, the device. Takes about 3 s (imports torch)."""
    for name, value in {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "KINETO_LOG_LEVEL": "99",  # the profiler's own start and stop lines
    }.items():
        os.environ.setdefault(name, value)
    for name in ("bitsandbytes", "transformers", "trl", "peft", "datasets", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    seed_everything(seed)
    return device()
