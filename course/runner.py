"""Runs the course: `python -m course run|catch-up|refresh|test|unit|notebooks|alone|lock`, called by the Makefile."""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from course import lessons
from helpers.command import status
from helpers.files import CourseError
from helpers.runtime import ROOT, memory_gb, runs_dir


def prepare() -> None:
    """Makes model and databases in the cache if they aren't there, saying what takes how long."""
    from helpers import flights, models

    for what, make in {"course model": models.model_path, "database": flights.database_path, "test instances": flights.perturbed_paths}.items():
        start = time.perf_counter()
        print(f"preparing the {what} … ", end="", flush=True)
        make()
        print(f"{time.perf_counter() - start:.0f} s", flush=True)


def catch_up(step: str) -> None:
    """`make catch-up STEP=04`: what that notebook needs of the ones before it, found in runs/, taken from the workshop kit, or trained now."""
    from helpers import adapters, dpo

    steps = [name[:2] for name in lessons.all_notebooks() if "/" not in name]
    step = step and step.zfill(2)  # 4 is 04
    if step not in steps:
        raise CourseError(f"There is no notebook {step!r}: STEP can be {', '.join(steps)}, as in make catch-up STEP=04.")
    prepare()
    for stage, (recipe, _) in list(dpo.main_runs().items())[: max(0, int(step) - 3)]:  # 04 starts from SFT's adapter, 05 from DPO's too
        if adapters.is_adapter(recipe.folder() / "adapter"):
            print(f"{recipe.folder().name}: found in runs/", flush=True)
        else:
            dpo.main_adapter(stage)
    print(f"Ready for notebook {step}.")


def exam() -> None:
    """The final exam: the main runs, live, on all of test and the final half of freeform."""
    from helpers import adapters, dpo, flights, generation, models, scoreboard, scoring

    splits = {"test": flights.load_questions("test"), "freeform": flights.load_questions("freeform", "final")}
    for stage, (recipe, _) in dpo.main_runs().items():
        passed = {r["split"] for r in scoreboard.rows() if (r["stage"], r["source"]) == (stage, "live")}
        if splits.keys() <= passed:
            continue
        model, tokenizer = adapters.load_adapter(dpo.main_adapter(stage)), models.load_tokenizer()
        for split, questions in splits.items():
            print(f"exam: {stage} on {split} ({len(questions)} questions) … ", end="", flush=True)
            answers, seconds = generation.ask(model, tokenizer, questions)
            result = scoreboard.record(stage, split, scoring.execution_accuracy(answers, questions), seconds, recipe.seed)
            print(f"{result['accuracy']:.0%} in {seconds:.0f} s", flush=True)


def start_over() -> None:
    """Removes what earlier runs made, and points the cache at an empty folder: nothing is reused, nothing shared is lost."""
    for pattern in ("sft-*", "dpo-*", "notebooks", "cache", "scoreboard.*"):
        for path in runs_dir().glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    os.environ["COURSE_CACHE"] = str(runs_dir() / "cache")


def run(fresh: bool) -> None:
    """`make course`: everything made that is needed, the core notebooks, the exam, the scoreboard."""
    start = time.perf_counter()
    if fresh:
        start_over()
    from helpers import adapters, dpo, plots, runtime, scoreboard, times

    print(f"running on {runtime.setup().name}: {runtime.device().why}")
    print(times.table(), flush=True)
    prepare()
    if not all(adapters.is_adapter(recipe.folder() / "adapter") for recipe, _ in dpo.main_runs().values()):  # another recipe's or no adapter: its scores would be stale
        scoreboard.scoreboard_path().unlink(missing_ok=True)
    for name in lessons.CORE:
        lessons.execute(name, runs_dir() / "notebooks" / f"{name}.ipynb")
    exam()
    for recorded in scoreboard.recorded_rows(scoreboard.MAIN):
        scoreboard.add(recorded)
    print("\n" + scoreboard.table().to_string(index=False))
    best = [r for r in scoreboard.rows() if r["split"] == "test" and (r["stage"] not in dpo.main_runs() or r["source"] == "live") and r["seed"] == 0]
    plots.accuracy_bars(best, f"{best[0]['n']} test questions, in phrasings never trained on").savefig(runs_dir() / "scoreboard.png")
    print(f"\nscoreboard.json and scoreboard.png are in {runs_dir().name}/; {(time.perf_counter() - start) / 60:.1f} minutes in all")


def refresh(names: list[str]) -> None:
    from helpers import times

    names = lessons.known(names)
    prepare()
    times.rates()  # before anything else runs
    for name in names:
        lessons.execute(name)


def project() -> dict:
    """The [project] table of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


LONGEST = ("03_sft_with_trl", "04_dpo")  # take as long as all others and the unit tests; 04 goes on from what 03 has trained


def pytest(*arguments: str, out=None, **environment: str) -> int:
    """Runs pytest without progress bars; returns its exit status. `out`: a file for what it prints."""
    command = [sys.executable, "-m", "pytest", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"COURSE_PROGRESS": "0"} | environment, stdout=out, stderr=out).returncode


def halves() -> dict[str, str]:
    """What two programs side by side are told, so that each takes half of the cores; {} where they would only be in each other's way."""
    cores = os.cpu_count() or 1
    return {} if cores < 2 or shutil.which("nvidia-smi") else {"OMP_NUM_THREADS": str(cores // 2)}


def test(arguments: list[str]) -> int:
    """Unit tests with line coverage of helpers and course, and nbval (lax) over every notebook. On a CPU the two longest notebooks
    run beside all else, with half of the cores each: together they do half as much again as one program with all of them."""
    if not (half := halves()):
        return unit(arguments) or nbval(lessons.all_notebooks())
    others = [name for name in lessons.all_notebooks() if name not in LONGEST]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said, ThreadPoolExecutor(1) as beside:
        longest = beside.submit(nbval, list(LONGEST), out=said, **half)
        failed = unit(arguments, **half) + nbval(others, **half) + longest.result()
        said.seek(0)
        print(f"\nbeside these, {' and '.join(LONGEST)}:\n{said.read()}", flush=True)
        return int(bool(failed))


def unit(arguments: list[str], **environment: str) -> int:
    """The unit tests alone: two processes of them, with half of the cores each, unless they run beside something else (`environment`)."""
    half = halves() if not environment and memory_gb() > 10 else {}
    two = ["-n", "2", "--dist", "loadfile"] if half else []
    coverage = ["--cov", "--cov-report=term:skip-covered", "--cov-fail-under=90"]
    return pytest("tests", "-p", "no:nbval", *two, *coverage, *arguments, **half | environment)


def nbval(names: list[str], place: Path | None = None, kernel: str = "python3", out=None, **environment: str) -> int:
    """Runs notebooks (of `place`: a folder) under nbval with an empty runs folder of their own, so that the main runs are live.

    Fails as well when a notebook set off a deprecation that isn't allowed for.
    """
    from course import deprecations

    paths = [str((place or lessons.NOTEBOOKS) / f"{name}.ipynb") for name in names]
    options = ["--nbval-lax", f"--nbval-kernel-name={kernel}", "--nbval-cell-timeout=10800", "--durations=10", "-p", "no:cacheprovider"]
    with tempfile.TemporaryDirectory() as folder:
        recorder = deprecations.environment(Path(folder) / "ipython")
        status = pytest(*options, *paths, out=out, **{"COURSE_RUNS": str(Path(folder) / "runs")} | recorder | environment)
        return status or deprecations.report(recorder)


def notebooks(names: list[str]) -> int:
    return nbval(lessons.known(names))


def alone() -> int:
    """Each notebook by itself, with an empty runs folder."""
    return max(nbval([name]) for name in lessons.all_notebooks())


def lock() -> None:
    """Writes constraints.txt: what is installed here, without local version tags and without the course itself."""
    frozen = subprocess.run([sys.executable, "-m", "pip", "freeze", "--exclude-editable"], capture_output=True, text=True, check=True).stdout
    lines = [re.sub(r"\+\w+$", "", line) for line in frozen.splitlines() if re.fullmatch(r"[\w.\-]+==[\w.+!]+", line)]
    head = "# The exact versions the course was last tested with (make lock). Ranges are in pyproject.toml.\n"
    (ROOT / "constraints.txt").write_text(head + "\n".join(sorted(lines, key=str.lower)) + "\n", encoding="utf-8", newline="\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m course", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run").add_argument("--fresh", action="store_true")
    commands.add_parser("catch-up").add_argument("step", nargs="?", default="")
    commands.add_parser("refresh").add_argument("names", nargs="*")
    commands.add_parser("test").add_argument("arguments", nargs="*")
    commands.add_parser("unit").add_argument("arguments", nargs="*")
    commands.add_parser("notebooks").add_argument("names", nargs="*")
    commands.add_parser("alone")
    commands.add_parser("lock")
    chosen = vars(parser.parse_args())
    does = {"run": run, "catch-up": catch_up, "refresh": refresh, "test": test, "unit": unit, "notebooks": notebooks, "alone": alone, "lock": lock}
    return status(does[chosen.pop("command")], **chosen, left="What was finished is kept: run the same command to go on.")
