"""`make sweeps`: runs that cost hours on two cores, recorded per question in data/results/, hashed to their recipes.

`run [NAME]` does what is missing or stale, after it has told the hours; `hours [NAME]` tells those of everything; `check`
re-runs a recorded point drawn at random and compares; `stale` names what isn't current.

Each point is a process of its own, on a CPU as many at a time as there are cores, a thread each: two with one thread do 1.5
times the work of one with two. A finished point waits in runs/sweeps/ until its sweep's file has it, a LoRA run's checkpoint
too: what is stopped goes on there. A point that fails is named at the end, with its log, and stops no other.

Every point is shown in a notebook. What no notebook shows isn't asked: the validation questions of main runs, and of methods
other than LoRA and QLoRA (`shown`).
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

from helpers import adapters, baselines, dpo, flights, generation, house, intervals, models, preferences, scoreboard, scoring, times, training
from helpers.dpo import DPORecipe
from helpers.recipes import SFTRecipe
from helpers.runtime import ROOT, CourseError, building, device, runs_dir, setup, write_whole

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
POINT_GB = 4  # memory that a point may take: full fine-tuning in float32 takes 3
LOADING = 20  # seconds of each point: imports, model, judging
POLL = 0.2  # seconds between looks at what runs


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

    tokenizer, place = models.load_tokenizer(), folder() / key(sweep, point)
    start, recipe, extra = time.perf_counter(), point.get("recipe"), {}
    if isinstance(recipe, DPORecipe):
        model, extra = train_preference(recipe, tokenizer)
    elif recipe:
        goes_on = recipe.method == "lora"  # a small checkpoint, and one that is tested to go on exactly
        extra = {"resumed": int(at.name.split("-")[1])} if goes_on and (at := training.last_checkpoint(place)) else {}
        settings = {} if goes_on else {"save_strategy": "no"}
        trainer = training.make_trainer(recipe, training.base_model(recipe), tokenizer, folder=place, **settings)
        extra |= {"losses": [[h["step"], round(float(h["loss"]), 4)] for h in training.fit(trainer, resume=goes_on)["history"]]}
        model = trainer.model.eval()
        extra |= {"spectrum": spectrum(model, recipe)} if sweep == "methods" else {}
        if recipe.method == "full":  # trained in float32, it answers in this machine's dtype, as the others do
            model.to(device().dtype)
    else:
        model = None if point["stage"] == "nearest-question" else models.load_model()
    trained, parts = time.perf_counter() - start, {}
    for split, questions in splits(sweep).items():
        if not shown(sweep, point["stage"], split):
            continue
        answers, seconds = generation.ask(model, tokenizer, questions) if recipe else baselines.answer(point["stage"], questions, model, tokenizer)
        records, kept = scoring.execution_accuracy(answers, questions), ("id", "intent", "phrasing", "correct", "kind", "kept")
        if isinstance(recipe, DPORecipe):
            records = preferences.with_style(records)
            extra.setdefault("samples", [[q["question"], a[:300]] for q, a in zip(questions, answers, strict=True)][:SHOWN])
        parts[split] = {"seconds": round(seconds, 1), "records": [{k: r[k] for k in kept if r.get(k) not in (None, {})} for r in records]}
        print(f"  {split}: {intervals.score(records)}", flush=True)
    versions = {name: version(name) for name in ("torch", "transformers", "trl", "peft", "bitsandbytes")}
    shutil.rmtree(place, ignore_errors=True)
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


# ---------------------------------------------------------------- points side by side


def folder() -> Path:
    """Where points wait until their sweep's file has them: <key>.json, its log, and while it trains a folder of that name."""
    return runs_dir() / "sweeps"


def run(only: str | None = None) -> None:
    """Runs what is missing or stale, writing after each point, so that an interrupt loses what is running at most."""
    failed = {}
    tell(only)
    while todo := {name: place for name, place in missing(only).items() if name not in failed}:  # anew: `methods` follows from what `search` found
        with contextlib.closing(results(todo)) as found:
            for name, record in found:
                sweep, point = todo[name]
                said = f"{sweep}: {point['stage']} seed {point['seed']} {point.get('recipe') or ''}".rstrip()
                if isinstance(record, str):
                    failed[name] = f"{said}: {record}"
                    print(f"FAILED {failed[name]}", flush=True)
                    continue
                keep(record)
                for ending in ("json", "json.lock", "log"):
                    (folder() / f"{name}.{ending}").unlink(missing_ok=True)
                print(f"done {said}", flush=True)
    if failed:
        raise CourseError("\n".join([f"{len(failed)} failed; the other points are recorded, but for what follows from these:", *failed.values()]))


def missing(only: str | None = None) -> dict[str, tuple[str, dict]]:
    """Points without a current record, each once: its hash, then its sweep and itself. What another sweep has is copied before."""
    found, points, have = {}, plan(), {sweep: by_key(sweep) for sweep in plan()}
    anywhere = {name: run for runs in have.values() for name, run in runs.items()}
    for sweep in points:
        current = {key(sweep, p): p for p in points[sweep]} if only in (None, sweep) else {}
        if any(name in anywhere and name not in have[sweep] for name in current):
            write(sweep, current, anywhere | have[sweep])
        for name, point in current.items():
            if name not in anywhere:
                found.setdefault(name, (sweep, point))
    return found


def by_key(sweep: str) -> dict[str, dict]:
    """A sweep's recorded runs by their hashes."""
    return {run["key"]: run for run in scoreboard.recorded(sweep)}


def keep(record: dict) -> None:
    """Writes the record into the file of each sweep that has its point."""
    for sweep, points in plan().items():
        current = {key(sweep, p): p for p in points}
        if record["key"] in current:
            write(sweep, current, by_key(sweep) | {record["key"]: record})


def write(sweep: str, points: dict[str, dict], found: dict[str, dict]) -> None:
    """A sweep's file: of its points, those that were found, one a line."""
    runs = ",\n".join(json.dumps(found[name] | {"stage": point["stage"]}) for name, point in points.items() if name in found)
    write_whole(scoreboard.RESULTS / f"{sweep}.json", "{\n" + f'"sweep": "{sweep}",\n"runs": [\n{runs}\n]\n' + "}\n")


def side_by_side(points: int) -> tuple[int, int]:
    """How many points at a time, and the threads of each: on a GPU one, else one for each core that has the memory for it."""
    import psutil

    cores = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count()  # a Mac has no affinity
    cores = min(cores, psutil.cpu_count(logical=False) or cores)
    if device().kind == "cuda":
        return 1, cores
    at_once = max(1, min(points, cores, int(psutil.virtual_memory().available / 1e9 / POINT_GB)))
    return at_once, max(1, cores // at_once)


def launch(what: str, sweep: str, name: str, threads: int) -> subprocess.Popen:
    """Starts `python -m course.sweeps point` (or `start`) with so many threads; what it says goes to its log."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "COURSE_PROGRESS": "0"}
    folder().mkdir(parents=True, exist_ok=True)
    with open(folder() / f"{name}.log", "w", encoding="utf-8") as log:
        command = [sys.executable, "-m", "course.sweeps", what, sweep, name]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def results(todo: dict[str, tuple[str, dict]]):
    """Runs the points, the longest first, and yields each one's hash as it ends: with its record, or a sentence where it failed."""
    waiting, going = sorted(todo, key=lambda name: -estimate(*todo[name], at=UNIT)), {}
    for name in [name for name in waiting if (folder() / f"{name}.json").exists()]:  # finished, but nobody took it
        waiting.remove(name)
        yield name, taken(name)
    make_starts({name: todo[name] for name in waiting})
    at_once, threads = side_by_side(len(waiting))
    try:
        while waiting or going:
            while waiting and len(going) < at_once:
                name = waiting.pop(0)
                going[name] = launch("point", todo[name][0], name, threads)
            time.sleep(POLL)
            for name in [name for name, process in going.items() if process.poll() is not None]:
                del going[name]
                yield name, taken(name)
    finally:  # an interrupt, or whoever asks for no more
        for process in going.values():
            process.terminate()
        for process in going.values():
            process.wait()


def taken(name: str) -> dict | str:
    """The record that a point's process left, or what it said last."""
    part = folder() / f"{name}.json"
    if part.exists():
        return json.loads(part.read_text(encoding="utf-8"))
    lines = (folder() / f"{name}.log").read_text(encoding="utf-8", errors="replace").split("\n")
    return f"{next((line.strip() for line in reversed(lines) if line.strip()), 'it said nothing')} ({folder().name}/{name}.log in the runs folder)"


def make_starts(todo: dict[str, tuple[str, dict]]) -> None:
    """Trains the SFT adapters that preference points start from, if they aren't there: else each process would."""
    for name, (sweep, point) in todo.items():
        recipe = point.get("recipe")
        if isinstance(recipe, DPORecipe) and not adapters.have_adapter(recipe.start.folder() / "adapter"):
            print(f"{recipe.start.folder().name}: training it first, from its last checkpoint if there is one", flush=True)
            process = launch("start", sweep, name, side_by_side(1)[1])
            try:
                if process.wait():
                    raise CourseError(f"The adapter that preference points start from could not be trained: {taken(name)}")
            finally:
                process.terminate()


def one(what: str, sweep: str, name: str) -> None:
    """A process of its own: runs the point of that hash and leaves its record (`point`), or trains the adapter that it starts from (`start`)."""
    point = next(p for p in plan()[sweep] if key(sweep, p) == name)
    if what == "start":
        training.sft_adapter(point["recipe"].start)
        return
    with building(folder() / f"{name}.json") as part:  # None: an earlier process has finished it
        if part is not None:
            write_whole(part, json.dumps(run_point(sweep, point)))


# ---------------------------------------------------------------- hours


UNIT = times.Rates("cpu", "float32", 1e11, 1e11, 1e11)  # to tell long from short


def estimate(sweep: str, point: dict, at: times.Rates) -> float:
    """Seconds of a point where matrices are multiplied at these rates."""
    recipe, asked = point.get("recipe"), sum(len(q) for split, q in splits(sweep).items() if shown(sweep, point["stage"], split))
    if recipe is None:  # a quarter of what the four prompted baselines take of a hundred questions
        return LOADING if point["stage"] == "nearest-question" else times.seconds(times.BASELINES * (asked / 400), at) + LOADING
    return times.seconds((times.dpo if isinstance(recipe, DPORecipe) else times.sft)(recipe) + times.answers(asked), at) + LOADING


def to_come(only: str | None = None) -> list[tuple[str, dict]]:
    """Stand-ins for the points that aren't planned before a search is done: as many, with the first settings of its grid."""
    rest = {"methods": [(method, recipe) for method, (recipe, _) in METHODS.items() if chosen_rate(method) is None]}
    rest["preference"] = [("dpo", PREFERENCE["dpo"][0])] * 5 if len(preference_arms()) == 1 else []
    wanted = [(sweep, arm) for sweep, arms in rest.items() if only in (None, sweep) for arm in arms]
    return [(sweep, {"stage": stage, "seed": seed, "recipe": recipe}) for sweep, (stage, recipe) in wanted for seed in SEEDS]


def hours(points: list[tuple[str, dict]]) -> tuple[dict[str, float], int, int]:
    """Estimated hours of each sweep's points here, how many run at a time, and the threads of each."""
    import torch

    at_once, threads = side_by_side(len(points))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    at = times.rates.__wrapped__()
    torch.set_num_threads(before)
    found = dict.fromkeys(sweep for sweep, _ in points)
    return {sweep: sum(estimate(s, p, at) for s, p in points if s == sweep) / at_once / 3600 for sweep in found}, at_once, threads


def tell(only: str | None = None, everything: bool = False) -> None:
    """Says how long the missing points will take here, or `everything` anew, sweep by sweep."""
    if everything:
        every = [(sweep, point) for sweep, found in plan().items() if only in (None, sweep) for point in found]
        points = list({key(*place): place for place in reversed(every)}.values())[::-1]  # of equals the first
    else:
        points = list(missing(only).values())
    points += to_come(only)
    if not points:
        print("every recorded run is current", flush=True)
        return
    each, at_once, threads = hours(points)
    for sweep, value in each.items():
        print(f"  {sweep:20}{sum(s == sweep for s, _ in points):4} points{value:7.1f} hours")
    how = f"{at_once} at a time with {threads} {'threads' if threads > 1 else 'thread'} each"
    print(f"{len(points)} points, {how}: about {sum(each.values()):.1f} hours on this machine (estimate)", flush=True)


def check() -> int:
    """Re-runs a recorded point drawn at random and compares accuracy on validation: 0 within TOLERANCE, else 1."""
    sweep, point = random.choice([(sweep, p) for sweep, points in plan().items() for p in points])
    recorded = next((r for r in scoreboard.recorded(sweep) if r["key"] == key(sweep, point)), None)
    if recorded is None:
        raise CourseError(f"{sweep} has no current record: run make sweeps first.")
    print(f"re-running {sweep}: {point}", flush=True)
    again = run_point(sweep, point)
    split = next(iter(again["splits"]))  # validation, or the first that is asked
    a, b = (intervals.score(r["splits"][split]["records"]).accuracy for r in (recorded, again))
    ok = abs(a - b) <= TOLERANCE
    print(f"recorded {a:.1%}, again {b:.1%}: {'within' if ok else 'OUTSIDE'} {TOLERANCE:.0%}", flush=True)
    return 0 if ok else 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m course.sweeps", description=__doc__)
    parser.add_argument("command", choices=["run", "hours", "check", "stale", "point", "start"])
    parser.add_argument("sweep", nargs="?")
    parser.add_argument("key", nargs="?", help="a point's hash")
    chosen = parser.parse_args(arguments)
    setup()
    try:
        if chosen.sweep and chosen.sweep not in plan():
            raise CourseError(f"There is no sweep {chosen.sweep!r}: {', '.join(plan())}.")
        if chosen.command == "check":
            return check()
        if chosen.command == "stale":
            print("\n".join(stale()) or "every recorded run is current")
        elif chosen.command == "hours":
            tell(chosen.sweep, everything=True)
        elif chosen.command == "run":
            run(chosen.sweep)
        else:
            one(chosen.command, chosen.sweep, chosen.key)
        return 0
    except CourseError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. What was finished is kept: run the same command to go on.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a pipe on Windows can't say every letter
    sys.exit(main())
