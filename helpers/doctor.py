"""`python -m helpers.doctor`: is this machine ready for the course? One plain verdict at the end.

`python -m helpers.doctor mine.jsonl` looks at a file of your own instead, questions or preference pairs; --domain names what it
is about where that isn't the flights, --test the file that a model trained on it will be scored on.
"""

import argparse
import platform
import shutil
import sys
import time
from pathlib import Path

from helpers.command import status
from helpers.files import CourseError
from helpers.runtime import cache_dir, memory_gb, runs_dir, setup


def check_python() -> str:
    if sys.version_info < (3, 11):  # noqa: UP036
        raise CourseError(f"Python {platform.python_version()} is too old: install 3.11, 3.12 or 3.13.")
    return platform.python_version()


def check_disk(need_gb: float = 2.0) -> str:
    free = min(shutil.disk_usage(place).free for place in (cache_dir(), runs_dir())) / 1e9
    if free < need_gb:
        raise CourseError(f"{free:.1f} GB free, {need_gb:.0f} GB needed: free some disk, or set COURSE_CACHE (model, database) and COURSE_RUNS (runs) to a larger one.")
    return f"{free:.0f} GB free"


def check_memory(need_gb: float = 7.0) -> str:
    total = memory_gb()
    if total < need_gb:
        raise CourseError(f"{total:.1f} GB of memory, about {need_gb:.0f} GB needed: use Colab's free T4 instead.")
    return f"{total:.0f} GB"


def check_device() -> str:
    where = setup()
    return f"{where.kind} ({where.name}), {where.dtype_name}: {where.why}"


def check_model() -> str:
    from helpers.models import COURSE_MODEL, LICENSE, model_path

    start = time.perf_counter()
    model_path()
    return f"{COURSE_MODEL} ({LICENSE}), verified in {time.perf_counter() - start:.0f} s"


def check_database() -> str:
    import contextlib

    from helpers import flights, sql

    flights.perturbed_paths()
    with contextlib.closing(sql.connect(flights.database_path())) as connection:
        (count,) = sql.execute(connection, "SELECT COUNT(*) FROM flights").rows[0]
    if count != 336_776:
        raise CourseError(f"the database has {count:,} flights, not 336,776: delete the cache folder's flights-*.db and run again.")
    return f"{count:,} flights"


def check_training(seconds: float = 10.0) -> str:
    """Real steps of the course's recipe for about ten seconds, how long the main run would take, and the minutes of each notebook."""
    import tempfile

    from transformers import TrainerCallback

    from helpers import recipes, times, training
    from helpers.models import load_model, load_tokenizer

    class Clock(TrainerCallback):
        marks: list[float] = []

        def on_step_end(self, args, state, control, **kwargs):
            self.marks.append(time.perf_counter())
            control.should_training_stop = self.marks[-1] - self.marks[0] > seconds

    recipe = recipes.SFTRecipe()
    with tempfile.TemporaryDirectory() as folder:
        trainer = training.make_trainer(recipe, load_model(recipe.bits), load_tokenizer(), folder=Path(folder), save_strategy="no")
        trainer.add_callback(clock := Clock())
        training.fit(trainer, resume=False)
    step = (clock.marks[-1] - clock.marks[0]) / max(len(clock.marks) - 1, 1) or times.seconds(times.sft(recipe)) / recipe.steps  # one step: no time between two
    told = f"{step:.2f} s a step of {recipe.batch_size} examples; the main run would take about {step * recipe.steps / 60:.0f} minutes"
    return f"{told}\n{times.table(step=step)}"


CHECKS = {
    "Python": check_python, "disk": check_disk, "memory": check_memory, "device": check_device,
    "model": check_model, "database": check_database, "training": check_training,
}  # fmt: skip


def main(arguments=None, checks=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m helpers.doctor", description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", help="a JSON Lines file of your own: question and sql, or prompt, chosen and rejected")
    parser.add_argument("--domain", help="the TOML file that says which database it is about (data/own_example/domain.toml is one; without it: the flights)")
    parser.add_argument("--test", help="the JSON Lines file that a model trained on it will be scored on")
    chosen = parser.parse_args(arguments)
    if not chosen.file and (chosen.domain or chosen.test):
        parser.error("name the file to be looked at")
    look = (own_file, chosen) if chosen.file else (verdict, CHECKS if checks is None else checks)
    return status(*look, left="Run it again: nothing was changed.")


def own_file(chosen) -> int:
    """Says what is in a file of one's own; a CourseError where it can't be loaded."""
    from helpers import checkup, domain, flights

    setup()
    about = domain.read(chosen.domain) if chosen.domain else flights.FLIGHTS
    for what, found in checkup.examine(chosen.file, about, chosen.test).items():
        print(f"{what:9} {found}", flush=True)
    print("\nIt can be trained on.")
    return 0


def verdict(checks) -> int:
    """Makes each check, says what it found; 0 where all are well."""
    failed = []
    for name, check in checks.items():
        print(f"{name:9} ", end="", flush=True)
        try:
            print(check(), flush=True)
        except Exception as error:  # whatever is broken, the learner gets a sentence and the other checks
            failed.append(name)
            kind = "" if isinstance(error, CourseError) else f"{type(error).__name__}: "
            print(f"PROBLEM: {kind}{error}", flush=True)
    print(f"\nNot ready: mend {', '.join(failed)} first." if failed else "\nReady: this machine can run the course.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a pipe on Windows can't say every letter
    sys.exit(main())
