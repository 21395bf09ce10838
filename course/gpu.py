"""Proof on a GPU: `python -m course.gpu [--no-notebooks | --record]`, called by the Makefile. Any NVIDIA GPU passes for a T4: float16, 14.5 GiB.

First the notebooks under nbval. Then, without a download, training steps of the menu's shapes with random weights: what the
weights and a step take against the planner's estimate (helpers.budget), and the time a step takes. The card is itself for
notebook 01's table of a 7B (rows that can't fit are left out), a T4 for QLoRA of 1.7B and 7B.
Prints the tables and keeps them in gpu-check.json in the runs folder; exit status 1 if anything is off. `--record` measures
notebook 01's table alone and writes data/results/gpu.json, which the notebook shows.
"""

import argparse
import contextlib
import datetime
import gc
import json
import os
import platform
import statistics
import sys
import timeit
from dataclasses import dataclass, replace
from importlib.metadata import version

import torch

from course import lessons, runner
from helpers import budget, flights, menu, models, recipes, runtime
from helpers.command import status
from helpers.files import CourseError, write_whole
from helpers.runtime import DATA, runs_dir

SHAPES = ("SmolLM2-1.7B-Instruct", "Mistral-7B-Instruct-v0.3")
LENGTH = 256  # tokens a row
PLANS = ((8, False), (8, True), (4, True), (2, True), (1, True))  # rows and checkpointing, the first that fits is taken
FREE = 0.1  # of the memory, for what the planner leaves out
GATES = {"weights": 0.01, "peak": 0.15}  # how far off an estimate may be
REPEATS = 3  # timed steps
WARM_UPS = 10  # at most, until the scaler lets a step through


@dataclass(frozen=True)
class Case:
    """A training step. method: qlora, lora or full. optimizer, all AdamW: torch's own, or bitsandbytes' with states in 8bit or 32bit."""

    method: str = "qlora"
    rows: int = 8
    checkpointing: bool = True
    optimizer: str = "torch"
    rank: int = 8
    length: int = 512


TABLE_MODEL = "Mistral-7B-Instruct-v0.3"
TABLE = {  # notebook 01's, by its names
    "full, 16-bit, float32 AdamW": Case("full", 1, optimizer="32bit"),
    "full, 16-bit, float32 AdamW, 8 of 512": Case("full", optimizer="32bit"),
    "full, 16-bit, 8-bit AdamW": Case("full", 1, optimizer="8bit"),
    "full, 16-bit, 8-bit AdamW, 8 of 512": Case("full", optimizer="8bit"),
    "LoRA r = 8, one text of 512": Case("lora", 1),
    "LoRA r = 8, 8 of 512": Case("lora"),
    "LoRA r = 8, 8 of 512, no checkpointing": Case("lora", checkpointing=False),
    "QLoRA r = 8, one text of 512": Case("qlora", 1),
    "QLoRA r = 8, 8 of 512": Case("qlora"),
    "QLoRA r = 8, 8 of 512, no checkpointing": Case("qlora", checkpointing=False),
}
WHAT = "training steps of Mistral-7B's shape, random weights; r = 8 on all linear layers, NF4 without double quantization for QLoRA; bytes"


def need_gpu() -> None:
    """CourseError where there is no NVIDIA GPU; takes none of its memory."""
    if not torch.cuda.is_available():
        raise CourseError("make gpu-check needs an NVIDIA GPU: run it on a machine that has one, such as a free T4 on Colab or Kaggle.")


def card() -> runtime.Device:
    """This machine's GPU as a T4, for this process: precision, memory, and the attention kernels that a T4 has."""
    os.environ["COURSE_PROFILE"] = "t4"
    runtime.device.cache_clear()  # it may have been itself before
    torch.backends.cuda.enable_flash_sdp(False)  # these two need a newer card
    torch.backends.cuda.enable_cudnn_sdp(False)
    return runtime.setup()


def random_model(config, device: str, dtype, bits: int = 4):
    """A causal model of the config's shape as `models.load_model(bits, dtype)` would leave it (4 or 16), but with random weights.

    It is made empty (on "meta") and filled matrix by matrix, each quantized at once: beside what stays there is never
    more than one matrix in 16 bits, where a whole 7B model of them would fill the card.
    """
    from bitsandbytes.nn import Params4bit
    from transformers import AutoModelForCausalLM
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    if bits == 4:
        model = replace_with_bnb_linear(model, ["lm_head"], models.quantization_config(4, dtype))
        model.is_loaded_in_4bit = True  # PEFT goes by it
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # its frequencies are buffers, which "meta" lost
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            new = torch.empty(old.shape, dtype=dtype, device=device)
            new = new.normal_(0, config.initializer_range) if old.ndim == 2 else new.fill_(name == "weight")  # norms 1, biases 0
            if isinstance(old, Params4bit):
                new = Params4bit(new, quant_type="nf4", compress_statistics=False).to(device)
            setattr(module, name, new if isinstance(old, Params4bit) else torch.nn.Parameter(new, requires_grad=False))
    model.tie_weights()  # a tied head takes the embeddings' weight
    return model


def estimate(config, case: Case, device: str, dtype) -> dict[str, int]:
    """The planner's named bytes of the step that `training_step` makes."""
    states = {"torch": 8, "32bit": 8, "8bit": 2}[case.optimizer]
    update = "fused" if case.optimizer != "torch" else "foreach" if device == "cuda" else "loop"  # torch's defaults
    options = {"dtype_bytes": dtype.itemsize, "compute_bytes": dtype.itemsize, "cast_inputs": casts(case), "state_bytes": states, "update": update}
    return budget.training(config, case.method, case.rank, case.rows, case.length, case.checkpointing, attention="sdpa", **options)


def casts(case: Case) -> bool:
    """Whether PEFT casts a layer's input to float32 under CUDA's autocast: beside 16-bit weights it does, beside 4-bit ones it doesn't."""
    return case.method == "lora"


def plan(config, device: str, dtype, memory: float) -> Case:
    """The course's QLoRA step with the first of PLANS that fits `memory` bytes. CourseError if none does."""
    for rows, checkpointing in PLANS:
        case = Case("qlora", rows, checkpointing, rank=recipes.SFTRecipe().rank, length=LENGTH)
        if budget.total(parts := estimate(config, case, device, dtype)) <= (1 - FREE) * memory:
            return case
    budget.check_fits("The smallest step", parts, (1 - FREE) * memory)


def training_step(model, tokens, case: Case, device: str, dtype):
    """One step of the case under autocast, float16 gradients scaled; returns it and the optimizer. tokens: (rows, length)."""
    from peft.helpers import disable_input_dtype_casting

    trained = [p for p in model.parameters() if p.requires_grad]
    if case.optimizer == "torch":
        optimizer = torch.optim.AdamW(trained)
    else:
        import bitsandbytes

        optimizer = {"8bit": bitsandbytes.optim.AdamW8bit, "32bit": bitsandbytes.optim.AdamW32bit}[case.optimizer](trained, lr=1e-5)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)

    def step():
        # what `casts` says of CUDA's autocast isn't so of a CPU's
        with contextlib.nullcontext() if case.method == "full" or casts(case) else disable_input_dtype_casting(model):
            with torch.autocast(device, dtype, enabled=case.method != "full"):
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step, optimizer


def finite(model, tokens) -> bool:
    """Whether all logits of a row of tokens are finite numbers in the model's own precision.

    Random weights can't show what trained activations do: the trained course model is looked at as well. Stays in training
    mode (there is no dropout): answering on a CPU, bitsandbytes would repack the weights.
    """
    with torch.no_grad():
        return bool(model.train()(input_ids=tokens[:1], use_cache=False).logits.isfinite().all())


def measure(name: str, model, tokens, case: Case, estimated: dict[str, int], device: str, dtype) -> dict:
    """A row of the result: bytes of the weights and of a step's peak, each [measured, estimated]; bytes that the allocator held
    (0 on a CPU); median seconds of a step; whether logits and gradients are finite; whether all gates are passed. tokens: (rows,
    length), on the device.
    """
    from peft import get_peft_model

    weights, numbers = budget.measured_weight_bytes(model), finite(model, tokens)
    if case.method == "full":
        model.requires_grad_(True).train()
    else:
        model = get_peft_model(model, recipes.lora_config(replace(recipes.SFTRecipe(), rank=case.rank))).train()
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    step, optimizer = training_step(model, tokens, case, device, dtype)
    for _ in range(WARM_UPS):
        if not optimizer.state:  # the scaler skipped the update: its gradients weren't finite
            step()
    numbers = numbers and bool(optimizer.state)
    peak = budget.live_bytes(model, optimizer) + budget.peak_live_bytes(step)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    seconds = statistics.median(timeit.repeat(lambda: (step(), wait()), number=1, repeat=REPEATS))
    found = {"weights": [weights, estimated["weights"]], "peak": [peak, budget.total(estimated)]}
    row = {"model": name, "tokens": list(tokens.shape), "checkpointing": case.checkpointing} | found
    row |= {"reserved": torch.cuda.max_memory_reserved() if device == "cuda" else 0, "seconds": seconds, "finite": numbers}
    return row | {"passed": passes(row)}


def error(row: dict, what: str) -> float:
    """How far the estimate is off, as a share of what was measured."""
    measured, estimated = row[what]
    return estimated / measured - 1


def passes(row: dict) -> bool:
    """Whether its numbers are finite and both estimates near enough."""
    return row["finite"] and all(abs(error(row, what)) <= gate for what, gate in GATES.items())


def check(name: str, device: str, dtype, memory: float, trained: bool = False) -> dict:
    """A row for a model of the menu, its random shape or, `trained`, the model itself. memory: bytes that may be used."""
    config = menu.choose(name).config()
    case = plan(config, device, dtype, memory)
    if not trained:
        return check_case(name, config, case, device, dtype)
    with free_memory(name):
        model, words = models.load_model(4, dtype, name=name), models.load_tokenizer(name)(flights.SCHEMA_PROMPT).input_ids
        tokens = torch.tensor((words * case.rows * case.length)[: case.rows * case.length]).view(case.rows, case.length).to(device)
        return measure(name, model, tokens, case, estimate(config, case, device, dtype), device, dtype)


def check_case(name: str, config, case: Case, device: str, dtype) -> dict:
    """A row for a step of the config's shape with random weights."""
    with free_memory(name):
        model = random_model(config, device, dtype, 4 if case.method == "qlora" else 16)
        tokens = torch.randint(0, config.vocab_size, (case.rows, case.length), device=device)
        return measure(name, model, tokens, case, estimate(config, case, device, dtype), device, dtype)


@contextlib.contextmanager
def free_memory(name: str):
    """Without what the model before this one left; memory that runs out is a CourseError."""
    gc.collect()
    torch.cuda.empty_cache()
    try:
        yield
    except torch.OutOfMemoryError:
        raise CourseError(f"{name} ran out of memory where the planner says it fits: end what else uses the GPU and run again.") from None


def check_table(device: str, dtype, memory: float) -> list[dict]:
    """Rows for notebook 01's table, without those that can't fit `memory` bytes or that this precision can't train."""
    config, rows = menu.MENU[TABLE_MODEL].config(), []
    for name, case in TABLE.items():
        need = budget.total(estimate(config, case, device, dtype))
        if case.method == "full" and dtype == torch.float16:
            print(f"left out: {name}: weights in float16 can't be trained", flush=True)
        elif need > (1 - FREE) * memory:
            print(f"left out: {name}: it needs about {need / 1e9:.1f} GB", flush=True)
        else:
            rows.append(check_case(name, config, case, device, dtype))
    return rows


def record(device: runtime.Device, rows: list[dict]) -> None:
    """Writes the measured rows of notebook 01's table to data/results/gpu.json, one a line, in place of the record before."""
    names = ("torch", "transformers", "peft", "trl", "bitsandbytes")
    head = {"what": WHAT, "card": device.name, "profile": os.environ.get("COURSE_PROFILE") or "none", "dtype": device.dtype_name}
    head |= {"date": datetime.date.today().isoformat(), "versions": {"python": platform.python_version()} | {name: version(name) for name in names}}
    kept = [
        {"case": row["model"], "peak": row["peak"][0], "reserved": row["reserved"], "seconds": round(row["seconds"], 4)}
        | {"tokens_per_second": round(row["tokens"][0] * row["tokens"][1] / row["seconds"])}
        for row in rows
    ]
    lines = [f"{json.dumps(name)}: {json.dumps(value)},\n" for name, value in head.items()]
    text = "{\n" + "".join(lines) + '"rows": [\n' + ",\n".join(map(json.dumps, kept)) + "\n]\n}\n"
    write_whole(DATA / "results" / "gpu.json", text)


def table(rows: list[dict]) -> str:
    """The result as text, GB measured / estimated."""
    import pandas as pd

    def line(row):
        gb = {f"{what}, GB": " / ".join(f"{n / 1e9:.3f}" for n in row[what]) for what in GATES}
        step = "{} x {}".format(*row["tokens"]) + ", checkpointing" * row["checkpointing"]
        off = {"off": f"{error(row, 'peak'):+.1%}", "reserved, GB": f"{row['reserved'] / 1e9:.3f}", "s a step": f"{row['seconds']:.2f}"}
        off |= {"tokens/s": f"{row['tokens'][0] * row['tokens'][1] / row['seconds']:,.0f}"}
        return {"model": row["model"], "step": step} | gb | off | {what: "yes" if row[what] else "NO" for what in ("finite", "passed")}

    return pd.DataFrame(map(line, rows)).to_string(index=False)


def report(card: str, notebooks: int | None, rows: list[dict]) -> int:
    """Prints the table, writes gpu-check.json; the exit status. notebooks: nbval's exit status, None: not run."""
    import bitsandbytes

    said = {None: "not run", 0: "passed"}.get(notebooks, "FAILED")
    passed = not notebooks and all(row["passed"] for row in rows)
    result = {"card": card, "torch": torch.__version__, "bitsandbytes": bitsandbytes.__version__, "notebooks": said, "rows": rows, "passed": passed}
    write_whole(runs_dir() / "gpu-check.json", json.dumps(result, indent=1) + "\n")
    print(f"\n{card}: notebooks {said}; bytes measured / estimated\n{table(rows)}\n{'passed' if passed else 'NOT passed'}; kept in gpu-check.json")
    return int(not passed)


def as_itself() -> list[dict]:
    """The rows of notebook 01's table on this card as it is (COURSE_PROFILE=t4: as a T4); says which card it is."""
    device = runtime.setup()
    print(f"{device.name}, {device.dtype_name}: notebook 01's table", flush=True)
    return check_table(device.kind, device.dtype, 1e9 * device.memory_gb)


def run(no_notebooks: bool, record_table: bool = False) -> int:
    """The notebooks as on a T4, notebook 01's table, then the shapes as on a T4; the exit status."""
    need_gpu()
    if record_table:
        record(runtime.setup(), rows := as_itself())
        return report(runtime.device().name, None, rows)
    notebooks = None if no_notebooks else runner.nbval(lessons.all_notebooks(), COURSE_PROFILE="t4")
    rows = as_itself()  # before `card`: from then on there is a T4's memory
    device = card()
    names = SHAPES if no_notebooks else (*SHAPES, menu.COURSE_MODEL)  # this one's weights are there by now
    place = (device.kind, device.dtype, 1e9 * device.memory_gb)
    return report(device.name, notebooks, rows + [check(name, *place, trained=name not in SHAPES) for name in names])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m course.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--no-notebooks", action="store_true", help="memory and time of the shapes only")
    parser.add_argument("--record", action="store_true", dest="record_table", help="notebook 01's table only, kept in data/results/gpu.json")
    return status(run, **vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a pipe on Windows can't say every letter
    sys.exit(main())
