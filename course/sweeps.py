"""`make sweeps`: runs that cost hours on two cores, recorded per question in data/results/, hashed to their recipes.

`run [NAME]` does what is missing or stale; `check` re-runs a recorded point drawn at random and compares.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import sys
import tempfile
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

from helpers import adapters, baselines, dpo, flights, generation, house, intervals, models, preferences, scoreboard, scoring, training
from helpers.dpo import DPORecipe
from helpers.recipes import SFTRecipe
from helpers.runtime import CourseError, device, setup, write_whole

SHORT = 100  # steps of a sweep's runs, all equal; the main recipe has more
SEEDS = (0, 1, 2)
EXAMPLES = (100, 400, None)
PHRASINGS = (1, 4, None)
LAYER = "model.layers.15.mlp.down_proj"  # whose ΔW is looked at
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
SHOWN = 6  # answers of each arm that are kept whole, to be looked at
LOGGED = ("step", "loss", "rewards/margins", "rewards/accuracies", "probe/chosen", "probe/rejected")
TESTED = ("baselines", "sft", "lora", "methods", "preference")  # these are scored on the test questions as well; nothing is chosen there
# Of accuracy, between two runs of one recipe: 16-bit rounding alone (another processor, other threads) sends training
# another way, and the standard error of a paired difference on 100 questions is about 5 points; twice that.
TOLERANCE = 0.10


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


def key(sweep: str, point: dict) -> str:
    """A hash of all that decides the result: recipe or baseline, its prompt, and the questions' bytes."""
    parts = [point["stage"], point["recipe"].key() if "recipe" in point else [flights.SCHEMA_PROMPT, baselines.ZERO_SHOT, models.COURSE_MODEL]]
    names = ("validation", "test", "freeform", "train") if sweep in TESTED else ("validation",)
    names += ("unanswerable", "near_miss") if sweep == "preference" else ()
    parts += [hashlib.sha256((flights.QUESTIONS / f"{n}.jsonl").read_bytes()).hexdigest() for n in names]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:10]


def spectrum(model, recipe: SFTRecipe) -> list[float] | None:
    """Singular values, largest first, of the ΔW that training gave one layer; None where the method adds no ΔW."""
    import torch

    if recipe.method not in ("lora", "full"):
        return None
    if recipe.method == "lora":
        change = model.get_submodule(f"base_model.model.{LAYER}").get_delta_weight("default")
    else:
        change = model.get_submodule(LAYER).weight.float() - models.load_model(16, torch.float32).get_submodule(LAYER).weight
    return [float(f"{value:.4g}") for value in torch.linalg.svdvals(change.detach().float().cpu()).tolist()]


def train_preference(recipe: DPORecipe, tokenizer):
    """Trains one arm of notebook 04: the model, and what is recorded of its training (log-probabilities in nats, means over the probe)."""
    if recipe.method == "none":
        return adapters.load_adapter(training.sft_adapter(recipe.start), recipe.start.bits), {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = dpo.make_trainer(recipe, dpo.start_model(recipe), tokenizer, folder=Path(folder), save_strategy="no")
        history = training.fit(trainer, resume=False)["history"]
    rounded = [{k: round(float(h[k]), 4) for k in LOGGED if k in h} for h in history]
    return trainer.model.eval(), {"history": rounded, "tokens": int(trainer.state.num_input_tokens_seen)}


def run_point(sweep: str, point: dict) -> dict:
    """Runs one point and returns its record."""
    import torch

    tokenizer = models.load_tokenizer()
    start, recipe, extra = time.perf_counter(), point.get("recipe"), {}
    if isinstance(recipe, DPORecipe):
        model, extra = train_preference(recipe, tokenizer)
    elif recipe:
        with tempfile.TemporaryDirectory() as folder:
            trainer = training.make_trainer(recipe, training.base_model(recipe), tokenizer, folder=Path(folder), save_strategy="no")
            extra = {"losses": [[h["step"], round(float(h["loss"]), 4)] for h in training.fit(trainer, resume=False)["history"]]}
        model = trainer.model.eval()
        extra |= {"spectrum": spectrum(model, recipe)} if sweep == "methods" else {}
        if recipe.method == "full":  # trained in float32, it answers in this machine's dtype, as the others do
            model.to(device().dtype)
    else:
        model = None if point["stage"] == "nearest-question" else models.load_model()
    trained, parts = time.perf_counter() - start, {}
    for split, questions in splits(sweep).items():
        answers, seconds = generation.ask(model, tokenizer, questions) if recipe else baselines.answer(point["stage"], questions, model, tokenizer)
        records, kept = scoring.execution_accuracy(answers, questions), ("id", "intent", "phrasing", "correct", "kind", "kept")
        if isinstance(recipe, DPORecipe):
            records = preferences.with_style(records)
            extra.setdefault("samples", [[q["question"], a[:300]] for q, a in zip(questions, answers, strict=True)][:SHOWN])
        parts[split] = {"seconds": round(seconds, 1), "records": [{k: r[k] for k in kept if r.get(k) not in (None, {})} for r in records]}
        print(f"  {split}: {intervals.score(records)}", flush=True)
    versions = {name: version(name) for name in ("torch", "transformers", "trl", "peft", "bitsandbytes")}
    return {
        "stage": point["stage"], "seed": point["seed"], "key": key(sweep, point), "recipe": asdict(recipe) if recipe else None,
        "train_seconds": round(trained, 1) if recipe else None, "versions": versions,
        "machine": f"{torch.get_num_threads()} of {os.cpu_count()} cores, {platform.machine()}, {device().kind}, {device().dtype_name}", "splits": parts,
    } | extra  # fmt: skip


def stale() -> list[str]:
    """Recorded runs that are missing or whose hash is no longer that of their recipe and questions."""
    found = []
    for sweep, points in plan().items():
        have = {(r["stage"], r["seed"], r["key"]) for r in scoreboard.recorded(sweep)}
        found += [f"{sweep}: {p['stage']} seed {p['seed']} {key(sweep, p)}" for p in points if (p["stage"], p["seed"], key(sweep, p)) not in have]
    return found


def run(only: str | None = None) -> None:
    """Runs what is missing or stale, writing after each run, so that an interrupt loses one run at most."""
    for sweep in plan():
        if only and sweep != only:
            continue
        points = plan()  # anew: `methods` follows from what `search` found
        current = {key(sweep, p): p for p in points[sweep]}
        # a run that another sweep has as well is done once
        found = {r["key"]: r for other in (*points, sweep) for r in scoreboard.recorded(other)}
        done = {name: found[name] | {"stage": point["stage"]} for name, point in current.items() if name in found}
        missing = {name: point for name, point in current.items() if name not in done}
        for name, point in missing.items():
            print(f"{sweep}: {point['stage']} seed {point['seed']} {point.get('recipe') or ''}", flush=True)
            done[name] = run_point(sweep, point)
            runs = ",\n".join(json.dumps(done[name]) for name in current if name in done)
            write_whole(scoreboard.RESULTS / f"{sweep}.json", "{\n" + f'"sweep": "{sweep}",\n"runs": [\n{runs}\n]\n' + "}\n")


def check() -> int:
    """Re-runs a recorded point drawn at random and compares accuracy on validation: 0 within TOLERANCE, else 1."""
    sweep, point = random.choice([(sweep, p) for sweep, points in plan().items() for p in points])
    recorded = next((r for r in scoreboard.recorded(sweep) if r["key"] == key(sweep, point)), None)
    if recorded is None:
        raise CourseError(f"{sweep} has no current record: run make sweeps first.")
    print(f"re-running {sweep}: {point}", flush=True)
    again = run_point(sweep, point)
    a, b = (intervals.score(r["splits"]["validation"]["records"]).accuracy for r in (recorded, again))
    ok = abs(a - b) <= TOLERANCE
    print(f"recorded {a:.1%}, again {b:.1%}: {'within' if ok else 'OUTSIDE'} {TOLERANCE:.0%}", flush=True)
    return 0 if ok else 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m course.sweeps", description=__doc__)
    parser.add_argument("command", choices=["run", "check", "stale"])
    parser.add_argument("sweep", nargs="?")
    chosen = parser.parse_args()
    setup()
    if chosen.command == "run":
        run(chosen.sweep)
    elif chosen.command == "stale":
        print("\n".join(stale()) or "every recorded run is current")
    return check() if chosen.command == "check" else 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a pipe on Windows can't say every letter
    sys.exit(main())
