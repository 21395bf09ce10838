"""`make laptop-check`: the core notebooks, and the unit tests that depend on the device, in float32 with AVX2, on any x86.

Most learners' laptops, and GitHub's runners by the draw, have no fast bfloat16 (COURSE_PROFILE=laptop: `helpers`,
`runtime.device`). What it can't simulate: bitsandbytes' other kernels look at the processor itself. For 4 bits that is
undone (`models.load_model`); LLM.int8()'s ask torch, which says AVX2. Times are not those of a laptop.
"""

import re
import sys

from course import lessons, runner
from helpers.command import status
from helpers.runtime import ROOT

ASKS = r"load_model\(|model32|short_model|runtime\.device|doctor\.check"  # what a test says that depends on the device
OWN = ("test_gpu.py", "test_hosted.py")  # these bring a device of their own


def files() -> list[str]:
    """The test files that depend on the device, by their paths in the repository."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").glob("test_*.py"))}
    return [path.relative_to(ROOT).as_posix() for path, text in texts.items() if path.name not in OWN and re.search(ASKS, text)]


def run() -> int:
    """The exit status: both parts are run, whatever comes of the first."""
    tests = runner.pytest(*files(), COURSE_PROFILE="laptop")
    return runner.nbval(list(lessons.CORE), COURSE_PROFILE="laptop") or tests


if __name__ == "__main__":
    sys.exit(status(run))
