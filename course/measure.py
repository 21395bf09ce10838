"""One recorded run, measured: trained, asked, judged; in a process of its own, several side by side.

On a CPU as many at a time as there are cores, a thread each: two with one thread do 1.5 times the work of one with two. A finished
point waits in runs/sweeps/ until its sweep's file has it, a LoRA run's checkpoint too: what is stopped goes on there.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from course import sweeps
from helpers import adapters, baselines, dpo, generation, intervals, models, preferences, scoring, times, training
from helpers.command import status
from helpers.dpo import DPORecipe
from helpers.files import CourseError, building, write_whole
from helpers.recipes import SFTRecipe
from helpers.runtime import ROOT, device, runs_dir, setup

LAYER = "model.layers.15.mlp.down_proj"  # whose ΔW is looked at
LOGGED = ("step", "loss", "rewards/margins", "rewards/accuracies", "probe/chosen", "probe/rejected")
SHOWN = 6  # answers of each arm that are kept whole, to be looked at
POINT_GB = 4  # memory that a point may take: full fine-tuning in float32 takes 3
LOADING = 20  # seconds of each point: imports, model, judging
POLL = 0.2  # seconds between looks at what runs
UNIT = times.Rates("cpu", "float32", 1e11, 1e11, 1e11)  # to tell long from short


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

    tokenizer, place = models.load_tokenizer(), folder() / sweeps.key(sweep, point)
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
    for split, questions in sweeps.splits(sweep).items():
        if not sweeps.shown(sweep, point["stage"], split):
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
        "stage": point["stage"], "seed": point["seed"], "key": sweeps.key(sweep, point), "recipe": asdict(recipe) if recipe else None,
        "train_seconds": round(trained, 1) if recipe else None, "versions": versions,
        "machine": f"{torch.get_num_threads()} of {os.cpu_count()} cores, {platform.machine()}, {device().kind}, {device().dtype_name}", "splits": parts,
    } | extra  # fmt: skip


def estimate(sweep: str, point: dict, at: times.Rates) -> float:
    """Seconds of a point where matrices are multiplied at these rates."""
    recipe, asked = point.get("recipe"), sum(len(q) for split, q in sweeps.splits(sweep).items() if sweeps.shown(sweep, point["stage"], split))
    if recipe is None:  # a quarter of what the four prompted baselines take of a hundred questions
        return LOADING if point["stage"] == "nearest-question" else times.seconds(times.BASELINES * (asked / 400), at) + LOADING
    return times.seconds((times.dpo if isinstance(recipe, DPORecipe) else times.sft)(recipe) + times.answers(asked), at) + LOADING


# ---------------------------------------------------------------- points side by side


def folder() -> Path:
    """Where points wait until their sweep's file has them: <key>.json, its log, and while it trains a folder of that name."""
    return runs_dir() / "sweeps"


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
    """Starts `python -m course.measure point` (or `start`) with so many threads; what it says goes to its log."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "COURSE_PROGRESS": "0"}
    folder().mkdir(parents=True, exist_ok=True)
    with open(folder() / f"{name}.log", "w", encoding="utf-8") as log:
        command = [sys.executable, "-m", "course.measure", what, sweep, name]
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
    setup()
    point = next((p for p in sweeps.plan().get(sweep, ()) if sweeps.key(sweep, p) == name), None)
    if point is None or what not in ("point", "start"):
        raise CourseError(f"There is nothing to measure as {what} {sweep} {name}: make sweeps calls this; run that.")
    if what == "start":
        training.sft_adapter(point["recipe"].start)
        return
    with building(folder() / f"{name}.json") as part:  # None: an earlier process has finished it
        if part is not None:
            write_whole(part, json.dumps(run_point(sweep, point)))


def main(what: str = "", sweep: str = "", name: str = "") -> int:
    return status(one, what, sweep, name)  # a CourseError's sentence is the last line of the log


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a pipe on Windows can't say every letter
    sys.exit(main(*sys.argv[1:]))
