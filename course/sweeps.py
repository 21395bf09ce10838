"""What is recorded: the runs that cost hours on two cores, each with its recipe, its questions and the hash of all that decides it.

`make sweeps` (course.recording) runs them, `course.measure` one of them; data/results/ has a file a sweep. Every run is shown in a
notebook. What no notebook shows isn't asked: the validation questions of main runs, and of methods other than LoRA and QLoRA (`shown`).
"""

import hashlib
import json
from dataclasses import asdict, replace

from helpers import baselines, flights, house, intervals, models, preferences, scoreboard
from helpers.dpo import DPORecipe
from helpers.recipes import SFTRecipe

SHORT = 100  # steps of a sweep's runs, all equal; the main recipe has more
SEEDS = (0, 1, 2)
EXAMPLES = (100, 400, None)
PHRASINGS = (1, 4, None)
RANKS = (1, 4, 16, 64)  # alpha stays: the scale is alpha / r, as in Hu et al. 2021
# One grid of learning rates a method, each about three times the one before; the best on validation (seed 0) is the
# method's own. Three points each, and one more where the best lay at the edge.
METHODS = {
    "QLoRA": (SFTRecipe(steps=SHORT), (1e-3, 3e-3, 1e-2)),
    "LoRA": (SFTRecipe(steps=SHORT, bits=16), (1e-3, 3e-3, 1e-2)),
    "IA3": (SFTRecipe(steps=SHORT, bits=16, method="ia3"), (1e-2, 3e-2, 1e-1, 3e-1)),
    "prompt tuning": (SFTRecipe(steps=SHORT, bits=16, method="prompt"), (3e-2, 1e-1, 3e-1, 1.0)),
    "full fine-tuning": (SFTRecipe(steps=SHORT, bits=16, method="full"), (3e-5, 1e-4, 3e-4, 1e-3)),
}
# Notebook 04. TRL's defaults are the first point of DPO's grid; the others move learning rate, β and an SFT term. The control
# has a grid of its own. Of each one's points that keep accuracy on validation (seed 0: at most `LOST` below the start), the
# one with the best `house_score` is then run with three seeds, and so is the last of the off-policy points.
START = DPORecipe(method="none", steps=0)  # no further training
LOST = 0.02
PREFERENCE = {
    "dpo": tuple(
        DPORecipe(learning_rate=rate, beta=beta, sft_weight=weight)
        for rate, beta, weight in [
            *[(1e-6, 0.1, 0.0), (2e-5, 0.1, 0.0), (5e-5, 0.1, 0.0), (1e-4, 0.1, 0.0), (2e-4, 0.1, 0.0)],
            *[(5e-5, 0.3, 0.0), (1e-4, 0.3, 0.0), (1e-4, 0.1, 1.0), (2e-4, 0.1, 1.0)],
            *[(2e-4, 0.3, 0.0), (1e-4, 1.0, 0.0)],  # added when the best lay at β 0.3, the grid's edge
            *[(5e-4, 0.1, 0.0), (1e-3, 0.1, 0.0)],  # added to stand beside the off-policy points
        ]
    ),
    "control": tuple(DPORecipe(method="sft", beta=0.1, learning_rate=rate) for rate in (5e-5, 2e-4, 1e-3)),
    "dpo, off-policy": tuple(DPORecipe(learning_rate=rate, beta=0.1, pairs="off_policy") for rate in (2e-4, 5e-4, 1e-3)),
}
TESTED = ("baselines", "sft", "lora", "methods", "preference")  # these are scored on the test questions as well; nothing is chosen there


def plan() -> dict[str, list[dict]]:
    """Every recorded run: sweep name, then what decides each run (its hash) and how to make it again."""

    def points(stage, *recipes):
        """Each recipe with each seed."""
        return [{"stage": stage, "seed": s, "recipe": replace(recipe, seed=s)} for s in SEEDS for recipe in recipes]

    short = SFTRecipe(steps=SHORT)
    return {
        "baselines": [{"stage": s, "seed": 0} for s in baselines.STAGES],
        "sft": points("sft", SFTRecipe()),
        "examples": points("sft", *(replace(short, examples=n) for n in EXAMPLES)),
        "lora": points("lora", SFTRecipe(bits=16)),
        "ranks": points("sft", *(replace(short, rank=r) for r in RANKS)),
        "search": [{"stage": m, "seed": 0, "recipe": replace(r, learning_rate=rate)} for m, (r, rates) in METHODS.items() for rate in rates],
        "methods": [p for m, (r, _) in METHODS.items() if (rate := chosen_rate(m)) for p in points(m, replace(r, learning_rate=rate))],
        "phrasings": points("sft", *(replace(short, phrasings=n) for n in PHRASINGS)),
        "preference_search": [{"stage": arm, "seed": 0, "recipe": r} for arm, grid in [("sft", [START]), *PREFERENCE.items()] for r in grid],
        "preference": [p for arm, recipe in preference_arms().items() for p in points(arm, recipe)[: 1 if arm == "sft" else None]],
    }


def chosen_rate(method: str) -> float | None:
    """The learning rate of `METHODS` that did best on validation at seed 0 (of equals, that with the lower loss at the end)."""
    recipe, rates = METHODS[method]
    wanted = [asdict(replace(recipe, learning_rate=rate)) for rate in rates]
    runs = [r for r in scoreboard.recorded("search") if r["recipe"] in wanted]
    if len(runs) < len(rates):
        return None  # the search comes first
    best = max(runs, key=lambda r: (sum(q["correct"] for q in r["splits"]["validation"]["records"]), -final_loss(r)))
    return best["recipe"]["learning_rate"]


def house_score(records: list[dict]) -> float:
    """What preference tuning is tuned for: the mean over questions of the share of paired house rules kept, 0 for a wrong answer."""
    return sum(preferences.style_scores(records, house.PAIRED)) / len(records)


def chosen_preference(arm: str) -> DPORecipe | None:
    """Of `PREFERENCE[arm]`, the recipe with the best `house_score` on validation among those that keep accuracy; None before the search."""
    runs = {run["key"]: run["splits"]["validation"]["records"] for run in scoreboard.recorded("preference_search")}
    found = {recipe: runs.get(key("preference_search", {"stage": arm, "recipe": recipe})) for recipe in PREFERENCE[arm]}
    start = runs.get(key("preference_search", {"stage": "sft", "recipe": START}))
    if start is None or None in found.values():
        return None
    least = intervals.score(start).accuracy - LOST - 1e-9
    keeping = [recipe for recipe, records in found.items() if intervals.score(records).accuracy >= least]
    return max(keeping or found, key=lambda recipe: house_score(found[recipe]))


def preference_arms() -> dict[str, DPORecipe]:
    """The arms that notebook 04 compares, all from one SFT adapter and with equal steps; only `sft` before the search was run."""
    arms, best, control = {"sft": START}, chosen_preference("dpo"), chosen_preference("control")
    if best and control:
        arms |= {"dpo, TRL's defaults": PREFERENCE["dpo"][0], "dpo": best, "control": control}
        arms |= {"dpo, right against wrong": replace(best, pairs="correctness"), "dpo, off-policy": PREFERENCE["dpo, off-policy"][-1]}
    return arms


def final_loss(run: dict) -> float:
    """Mean of a recorded run's last five logged losses (fifty steps), in nats per SQL token."""
    return sum(loss for _, loss in run["losses"][-5:]) / 5


def splits(sweep: str):
    """The questions that a sweep's runs are scored on. The test splits are for main runs and baselines only."""
    found = {"validation": flights.subset(flights.load_questions("validation"))}
    if sweep in TESTED:
        found["test"] = flights.load_questions("test")
    if sweep in TESTED and sweep != "methods":
        found["freeform"] = flights.load_questions("freeform", "final")
    if sweep == "preference":
        found |= {name: flights.load_questions(name) for name in ("unanswerable", "near_miss")}
    return found


def shown(sweep: str, stage: str, split: str) -> bool:
    """Whether a notebook shows this stage's answers to this split of questions (or chooses by them)."""
    if split != "validation" or sweep not in ("sft", "lora", "methods", "preference"):
        return True
    return stage in {"methods": ("LoRA", "QLoRA"), "preference": ("sft",)}.get(sweep, ())


def key(sweep: str, point: dict) -> str:
    """A hash of all that decides the result: recipe or baseline, its prompt, and the questions' bytes."""
    parts = [point["stage"], point["recipe"].key() if "recipe" in point else [flights.SCHEMA_PROMPT, baselines.ZERO_SHOT, models.COURSE_MODEL]]
    names = ("validation", "test", "freeform", "train") if sweep in TESTED else ("validation",)
    names += ("unanswerable", "near_miss") if sweep == "preference" else ()
    parts += [hashlib.sha256((flights.QUESTIONS / f"{n}.jsonl").read_bytes()).hexdigest() for n in names]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:10]


def stale() -> list[str]:
    """Recorded runs that are missing or whose hash is no longer that of their recipe and questions."""
    found = []
    for sweep, points in plan().items():
        have = {(r["stage"], r["seed"], r["key"]) for r in scoreboard.recorded(sweep)}
        found += [f"{sweep}: {p['stage']} seed {p['seed']} {key(sweep, p)}" for p in points if (p["stage"], p["seed"], key(sweep, p)) not in have]
    return found
