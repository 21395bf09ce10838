"""`make sweeps`: runs that cost hours on two cores, recorded per question in data/results/, hashed to their recipes.

`run [NAME]` does what is missing or stale; `check` re-runs a recorded point drawn at random and compares.
"""

import argparse
import dataclasses
import json
import os
import platform
import random
import sys
import time
from importlib.metadata import version

from helpers import baselines, flights, models, recipes, scoreboard, scoring
from helpers.recipes import SFTRecipe
from helpers.runtime import CourseError, device, setup

SHORT = 100  # steps of a sweep's runs, all equal; the main recipe has more
SEEDS = (0, 1, 2)
EXAMPLES = (100, 400, None)
PHRASINGS = (1, 4, None)
# Of accuracy, between two runs of one recipe: 16-bit rounding alone (another processor, other threads) sends training
# another way, and the standard error of a paired difference on 100 questions is about 5 points; twice that.
TOLERANCE = 0.10


def plan() -> dict[str, list[dict]]:
    """Every recorded run: sweep name, then what decides each run (its hash) and how to make it again."""
    short = SFTRecipe(steps=SHORT)
    return {
        "baselines": [{"stage": s, "seed": 0} for s in baselines.STAGES],
        "sft": [{"stage": "sft", "seed": s, "recipe": SFTRecipe(seed=s)} for s in SEEDS],
        "examples": [{"stage": "sft", "seed": s, "recipe": dataclasses.replace(short, seed=s, examples=n)} for s in SEEDS for n in EXAMPLES],
        "phrasings": [{"stage": "sft", "seed": s, "recipe": dataclasses.replace(short, seed=s, phrasings=n)} for s in SEEDS for n in PHRASINGS],
    }


def splits(sweep: str):
    """The questions that a sweep's runs are scored on. The test splits are for main runs and baselines only."""
    found = {"validation": flights.subset(flights.load_questions("validation"))}
    if sweep in ("baselines", "sft"):
        found |= {"test": flights.load_questions("test"), "freeform": flights.load_questions("freeform", "final")}
    return found


def key(sweep: str, point: dict) -> str:
    """A hash of all that decides the result: recipe or baseline, its prompt, and the questions' bytes."""
    import hashlib

    parts = [point["stage"], point["recipe"].key() if "recipe" in point else [flights.SCHEMA_PROMPT, baselines.ZERO_SHOT, models.COURSE_MODEL]]
    names = ("validation", "test", "freeform", "train") if sweep in ("baselines", "sft") else ("validation",)
    parts += [hashlib.sha256((flights.QUESTIONS / f"{n}.jsonl").read_bytes()).hexdigest() for n in names]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:10]


def run_point(sweep: str, point: dict) -> dict:
    """Runs one point and returns its record."""
    import torch

    tokenizer = models.load_tokenizer()
    start, recipe, losses = time.perf_counter(), point.get("recipe"), None
    if recipe:
        import tempfile
        from pathlib import Path

        with tempfile.TemporaryDirectory() as folder:
            trainer = recipes.make_trainer(recipe, models.load_model(recipe.bits), tokenizer, folder=Path(folder), save_strategy="no")
            losses = [[h["step"], round(float(h["loss"]), 4)] for h in recipes.fit(trainer, resume=False)["history"]]
        model = trainer.model.eval()
    else:
        model = None if point["stage"] == "nearest-question" else models.load_model()
    trained, parts = time.perf_counter() - start, {}
    for split, questions in splits(sweep).items():
        answers, seconds = scoring.ask(model, tokenizer, questions) if recipe else baselines.answer(point["stage"], questions, model, tokenizer)
        records = scoring.execution_accuracy(answers, questions)
        kept = ("id", "intent", "phrasing", "correct", "kind")
        parts[split] = {"seconds": round(seconds, 1), "records": [{k: r[k] for k in kept if r[k] is not None} for r in records]}
        print(f"  {split}: {scoring.score(records)}", flush=True)
    versions = {name: version(name) for name in ("torch", "transformers", "trl", "peft", "bitsandbytes")}
    return {
        "stage": point["stage"], "seed": point["seed"], "key": key(sweep, point), "recipe": dataclasses.asdict(recipe) if recipe else None,
        "train_seconds": round(trained, 1) if recipe else None, "losses": losses, "versions": versions,
        "machine": f"{torch.get_num_threads()} of {os.cpu_count()} cores, {platform.machine()}, {device().kind}, {device().dtype_name}", "splits": parts,
    }  # fmt: skip


def stale() -> list[str]:
    """Recorded runs that are missing or whose hash is no longer that of their recipe and questions."""
    found = []
    for sweep, points in plan().items():
        have = {(r["stage"], r["seed"], r["key"]) for r in scoreboard.recorded(sweep)}
        found += [f"{sweep}: {p['stage']} seed {p['seed']} {key(sweep, p)}" for p in points if (p["stage"], p["seed"], key(sweep, p)) not in have]
    return found


def run(only: str | None = None) -> None:
    """Runs what is missing or stale, writing after each run, so that an interrupt loses one run at most."""
    scoreboard.RESULTS.mkdir(parents=True, exist_ok=True)
    for sweep, points in plan().items():
        if only and sweep != only:
            continue
        current = {key(sweep, p): p for p in points}
        runs = [r for r in scoreboard.recorded(sweep) if r["key"] in current]
        # a run that another sweep has as well is done once
        runs += [r for other in plan() if other != sweep for r in scoreboard.recorded(other) if r["key"] in current and r["key"] not in {x["key"] for x in runs}]
        for name, point in current.items():
            if name in {r["key"] for r in runs}:
                continue
            print(f"{sweep}: {point['stage']} seed {point['seed']} {point.get('recipe') or ''}", flush=True)
            runs.append(run_point(sweep, point))
            order = list(current)
            runs.sort(key=lambda r: order.index(r["key"]))
            path = scoreboard.RESULTS / f"{sweep}.json"
            part = path.with_suffix(".part")
            part.write_text("{\n" + f'"sweep": "{sweep}",\n"runs": [\n' + ",\n".join(json.dumps(r) for r in runs) + "\n]\n}\n")
            os.replace(part, path)


def check(count: int = 1) -> int:
    """Re-runs `count` recorded points drawn at random and compares accuracy on validation within TOLERANCE."""
    points = [(sweep, p) for sweep, ps in plan().items() for p in ps]
    bad = 0
    for sweep, point in random.sample(points, count):
        recorded = next((r for r in scoreboard.recorded(sweep) if r["key"] == key(sweep, point)), None)
        if recorded is None:
            raise CourseError(f"{sweep} has no current record: run make sweeps first.")
        print(f"re-running {sweep}: {point}", flush=True)
        again = run_point(sweep, point)
        a, b = (scoring.score(r["splits"]["validation"]["records"]).accuracy for r in (recorded, again))
        ok = abs(a - b) <= TOLERANCE
        bad += not ok
        print(f"recorded {a:.1%}, again {b:.1%}: {'within' if ok else 'OUTSIDE'} {TOLERANCE:.0%}", flush=True)
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m helpers.sweeps", description=__doc__)
    parser.add_argument("command", choices=["run", "check", "stale"])
    parser.add_argument("sweep", nargs="?")
    chosen = parser.parse_args()
    setup()
    if chosen.command == "check":
        return check()
    if chosen.command == "stale":
        print("\n".join(stale()) or "every recorded run is current")
        return 0
    run(chosen.sweep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
