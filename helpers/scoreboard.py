"""The one table of the course: who got how many questions right. Rows live in runs/scoreboard.json and data/results/."""

import json
from pathlib import Path

from helpers import baselines, intervals
from helpers.files import CourseError, alone, write_whole
from helpers.intervals import Score, score
from helpers.runtime import DATA, runs_dir

STAGES = (*baselines.STAGES, "sft", "control", "dpo")
RESULTS = DATA / "results"
SPLITS = ("validation", "test", "freeform")
MAIN = {"baselines": baselines.STAGES, "sft": ("sft",), "preference": ("control", "dpo")}  # sweep: its stages on the scoreboard


def scoreboard_path() -> Path:
    return runs_dir() / "scoreboard.json"


def row(stage: str, split: str, result: Score, seconds: float, seed: int = 0, source: str = "live") -> dict:
    """One row: accuracy, low and high between 0 and 1 (95 % interval); seconds of generation; live or recorded."""
    return {
        "stage": stage, "split": split, "n": result.n, "correct": result.correct, "accuracy": round(result.accuracy, 4),
        "low": round(result.low, 4), "high": round(result.high, 4), "seconds": round(seconds, 1), "seed": seed, "source": source,
    }  # fmt: skip


def rows() -> list[dict]:
    """The rows so far, in the order of the course."""
    path, order = scoreboard_path(), {stage: i for i, stage in enumerate(STAGES)}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return sorted(found, key=lambda r: (r["split"], order.get(r["stage"], 99), r["source"], r["seed"]))
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError, RecursionError):
        raise CourseError(f"{path.name} is not what the course wrote: remove it from the runs folder, and run the notebooks again.") from None


def add(new: dict) -> dict:
    """Adds a row in place of an older one for the same stage, split, seed and source; written in one piece, however many add at once."""
    same = ("stage", "split", "seed", "source")
    with alone(scoreboard_path()):
        kept = [r for r in rows() if any(r.get(k) != new[k] for k in same)]
        write_whole(scoreboard_path(), json.dumps([*kept, new], indent=1) + "\n")
    return new


def record(stage: str, split: str, records: list[dict], seconds: float, seed: int = 0) -> dict:
    """Scores per-question records and adds the row."""
    return add(row(stage, split, score(records), seconds, seed))


def recorded(name: str, stage: str | None = None) -> list[dict]:
    """The recorded runs of a sweep (data/results/<name>.json), all or one stage's, each with its per-question results."""
    path = RESULTS / f"{name}.json"
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    return [run for run in runs if stage in (None, run["stage"])]


def pooled(runs: list[dict], split: str) -> list[dict]:
    """The records of several recorded seeds on one split as one (`intervals.pooled`)."""
    return intervals.pooled([run["splits"][split]["records"] for run in runs])


def seeds(runs: list[dict], split: str) -> str:
    """Each recorded seed's accuracy on a split, as "27%, 28%, 25%"."""
    return ", ".join(f"{score(run['splits'][split]['records']).accuracy:.0%}" for run in runs)


def recorded_rows(sweeps=("baselines", "sft")) -> list[dict]:
    """Rows for the recorded main runs of `sweeps` (keys of `MAIN`), each seed, on each split of questions."""
    return [
        row(run["stage"], split, score(part["records"]), part["seconds"], run["seed"], "recorded")
        for name in sweeps
        for run in recorded(name)
        for split, part in run["splits"].items()
        if run["stage"] in MAIN[name] and split in SPLITS
    ]


def sweep_points(name: str, x: str, everything: int) -> list[dict]:
    """A recorded sweep as points for a plot: x (`everything` where the recipe sets no limit), accuracy, seed, steps."""
    return [
        {
            x: run["recipe"][x] or everything,
            "accuracy": score(run["splits"]["validation"]["records"]).accuracy,
            "seed": run["seed"],
            "steps": run["recipe"]["steps"],
        }
        for run in recorded(name)
    ]


def table(which: list[dict] | None = None):
    """The scoreboard as a DataFrame, ready to be shown."""
    import pandas as pd

    frame = pd.DataFrame(rows() if which is None else which)
    if not len(frame):
        return frame
    frame["95 % interval"] = [f"{low:.0%} to {high:.0%}" for low, high in zip(frame["low"], frame["high"], strict=True)]
    frame["accuracy"] = [f"{a:.0%}" for a in frame["accuracy"]]
    return frame[["split", "stage", "accuracy", "95 % interval", "correct", "n", "seconds", "seed", "source"]]
