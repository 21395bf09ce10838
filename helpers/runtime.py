"""Where things are, what the machine can do, and what every run begins with."""

import functools
import logging
import os
import platform
import random
import sys
import time
import timeit
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from helpers.files import CourseError, make_folder, write_whole

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"


def cache_dir() -> Path:
    """The user's cache for what is made once (model, database): `COURSE_CACHE` if set, else the system's own place."""
    system = {"win32": os.environ.get("LOCALAPPDATA", "~/AppData/Local"), "darwin": "~/Library/Caches"}
    place = system.get(sys.platform) or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return _folder("COURSE_CACHE", f"{place}/first-llm-experiment")


def runs_dir() -> Path:
    """Where runs are kept: `COURSE_RUNS` (a mounted Drive, say) if set, else `runs/` in the course's folder."""
    return _folder("COURSE_RUNS", ROOT / "runs")


def _folder(variable: str, default: str | Path) -> Path:
    """The folder that an environment variable names, or the default; made if it isn't there. A relative one is the same for a terminal
    and for a notebook, whose own folder is another: it begins at the course's."""
    return make_folder(ROOT / Path(os.environ.get(variable) or default).expanduser())


@dataclass(frozen=True)
class Device:
    """What the course runs on and all that follows from it (made by `decide`).

    kind: cpu or cuda. dtype: the compute precision. why: the reason for it.
    """

    kind: str
    name: str
    dtype: object  # torch.dtype
    why: str
    memory_gb: float
    capability: tuple[int, int] | None = None  # CUDA's compute capability: (7, 5) is a T4
    attention: str = "sdpa"  # in training
    optimizer: str = "adamw_torch_fused"  # TRL's `optim`: AdamW in one kernel; an adapter's two states are too small to need 8 bits
    course_loss: bool = False  # train with the course's trainers (`cpu_trainer_class`), not with TRL's own

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def flags(self) -> dict[str, bool]:
        """TRL's precision and placement flags; each has to be said, as TRL takes bf16=True where neither bf16 nor fp16 is given."""
        precision = {"bf16": self.dtype_name == "bfloat16", "fp16": self.dtype_name == "float16"}
        return precision | {"use_cpu": self.kind == "cpu", "dataloader_pin_memory": self.kind == "cuda"}


def decide(kind: str, name: str, memory_gb: float, capability: tuple[int, int] | None = None, speedup: float | None = None) -> Device:
    """The course's one policy on precision, attention, optimizer and trainer, from facts alone.

    kind: cuda (needs `capability`) or cpu (needs `speedup`, from `bfloat16_speedup()`). A GPU older than Ampere, as a T4 (7.5)
    or a V100 (7.0), has no bfloat16 units: float16 there. torch isn't asked: it emulates them, slowly, and says that
    bfloat16 is supported. A Mac counts as a CPU: bitsandbytes' 4 bits on its GPU run in plain PyTorch, and nobody measured it.
    """
    import torch

    if kind == "cuda" and capability >= (8, 0):
        return Device(kind, name, torch.bfloat16, "this GPU has bfloat16 units", memory_gb, capability)
    if kind == "cuda":  # its gradients are scaled: a fused AdamW would hide the steps that the scaler skips, and the learning rate fall in them
        why = "this GPU has no bfloat16 units, so float16"
        return Device(kind, name, torch.float16, why, memory_gb, capability, optimizer="adamw_torch")
    why = f"a bfloat16 matmul runs at {speedup:.1f} times float32's speed on this processor"
    if speedup < 0.5:  # 0.01 where torch only emulates it
        slower = f"{1 / speedup:.1f}" if speedup > 0.1 else "more than ten"
        why = f"a bfloat16 matmul is {slower} times slower than a float32 one on this processor"
    dtype = torch.bfloat16 if speedup > 1.2 else torch.float32
    # torch's fused attention is slower than plain matmuls on a CPU: short, masked rows
    return Device(kind, name, dtype, why, memory_gb, attention="eager", course_loss=True)


def bfloat16_speedup(rows: int = 512, width: int = 1024, repeats: int = 5) -> float:
    """How many times faster a bfloat16 matmul is than a float32 one on this processor (best of `repeats`, under half a second).

    Where torch only emulates it, a matmul of this size takes seconds: a far smaller one, tried first, then tells enough.
    """
    import torch

    def ratio(rows, width, repeats):
        def best(dtype):
            a, b = torch.ones(rows, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
            return min(timeit.repeat(lambda: a @ b, number=1, repeat=repeats + 1)[1:])  # the first one warms up

        return best(torch.float32) / best(torch.bfloat16)

    small = ratio(rows // 8, width // 2, 3)
    return small if small < 0.1 else ratio(rows, width, repeats)


T4_BYTES = int(14.5 * 2**30)  # of a T4's 16 GB, what a process can have


@functools.cache
def device() -> Device:
    """This machine's facts, gathered once per process, and what `decide` makes of them.

    COURSE_PROFILE=t4 makes any CUDA GPU pass for a T4: its capability, and 14.5 GiB for this process (set before the
    first call). COURSE_PROFILE=laptop makes any machine pass for one without fast bfloat16 and without a GPU (set before
    helpers is imported, which then has torch use AVX2 alone). Raises CourseError for what can't be had.
    """
    import torch

    on_cuda, profile = torch.cuda.is_available(), os.environ.get("COURSE_PROFILE")
    processor = platform.processor() or platform.machine()
    if profile == "laptop":
        laptop = decide("cpu", f"{processor} as a laptop", memory_gb(), speedup=1.0)
        return replace(laptop, why="COURSE_PROFILE=laptop asks for it, as on a processor without fast bfloat16")
    if profile and not (on_cuda and profile == "t4"):
        raise CourseError(f"COURSE_PROFILE={profile} can't be had here: there is t4, on a machine with a CUDA GPU, and laptop; unset it otherwise.")
    if on_cuda:
        gpu = torch.cuda.get_device_properties(0)
        if not profile:
            return decide("cuda", gpu.name, gpu.total_memory / 1e9, (gpu.major, gpu.minor))
        memory = min(gpu.total_memory, T4_BYTES)
        torch.cuda.set_per_process_memory_fraction(memory / gpu.total_memory, 0)
        return decide("cuda", f"{gpu.name} as a T4", memory / 1e9, (7, 5))
    return decide("cpu", processor, memory_gb(), speedup=bfloat16_speedup())


def memory_gb() -> float:
    """Physical memory in GB."""
    import psutil

    return psutil.virtual_memory().total / 1e9


def make_room() -> None:
    """Frees what nothing names any more: models hold themselves in circles, which Python leaves for later, and the C library keeps what it got back."""
    import ctypes
    import gc

    gc.collect()
    with suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory_gb() -> float:
    """The most memory this process has held so far, in GB (GPU memory on a GPU)."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform == "win32":
        import psutil

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


class _Told:
    """What a progress bar writes to in place of a terminal: the file has its last line, whole, and is renewed twice a second at most."""

    def __init__(self, path: Path, pause: float = 0.5):
        self.path, self.pause, self.last = path, pause, float("-inf")

    def write(self, text: str) -> None:
        text = text.strip()
        if text and time.monotonic() - self.last < self.pause:
            return
        self.last = time.monotonic()
        with suppress(OSError):  # Windows: somebody is reading it; the next line comes soon
            write_whole(self.path, text)

    def flush(self) -> None:
        pass


def progress_bar(total: int, label: str):
    """A progress bar that leaves nothing behind in a stored notebook (it is shown on a terminal or a live notebook).

    Where COURSE_PROGRESS_FILE names a file, its one line goes there instead: whoever executes the notebook shows it.
    """
    from tqdm import tqdm as plain
    from tqdm.auto import tqdm

    if label and (path := os.environ.get("COURSE_PROGRESS_FILE")):
        form = "{desc} {n_fmt}/{total_fmt}, {remaining} left{postfix}"
        return plain(total=total, desc=label, file=_Told(Path(path)), bar_format=form, mininterval=0.5, leave=False)
    return tqdm(total=total, desc=label, disable=not label or os.environ.get("COURSE_PROGRESS") == "0", leave=False)


def setup(seed: int = 0) -> Device:
    """First call of every notebook: quiet libraries, a fixed seed, the device. Takes about 3 s (imports torch)."""
    for name, value in {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "KINETO_LOG_LEVEL": "99",  # the profiler's own start and stop lines
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # and its remarks on memory that was there before
    }.items():
        os.environ.setdefault(name, value)
    for name in ("bitsandbytes", "transformers", "trl", "peft", "datasets", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    seed_everything(seed)
    return device()
