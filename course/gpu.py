"""Proof on a GPU: `python -m course.gpu [--no-notebooks]`, called by the Makefile. Any NVIDIA GPU passes for a T4: float16, 14.5 GiB.

First the notebooks under nbval. Then, without a download, QLoRA steps of the menu's 1.7B and 7B shapes with random weights:
what the weights and a step take against the planner's estimate (helpers.budget), and the time a step takes on this card.
Prints one table and keeps it in gpu-check.json in the runs folder; exit status 1 if anything is off.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import timeit

import torch

from course import runner
from helpers import budget, flights, menu, models, recipes, runtime
from helpers.runtime import CourseError, runs_dir, write_whole

SHAPES = ("SmolLM2-1.7B-Instruct", "Mistral-7B-Instruct-v0.3")
LENGTH = 256  # tokens a row
PLANS = ((8, False), (8, True), (4, True), (2, True), (1, True))  # rows and checkpointing, the first that fits is taken
FREE = 0.1  # of the memory, for what the planner leaves out
GATES = {"weights": 0.01, "peak": 0.15}  # how far off an estimate may be
REPEATS = 3  # timed steps
WARM_UPS = 10  # at most, until the scaler lets a step through


def need_gpu() -> None:
    """CourseError where there is no NVIDIA GPU; takes none of its memory."""
    if not torch.cuda.is_available():
        raise CourseError("make gpu-check needs an NVIDIA GPU: run it on a machine that has one, such as a free T4 on Colab or Kaggle.")


def card() -> runtime.Device:
    """This machine's GPU as a T4, for this process: precision, memory, and the attention kernels that a T4 has."""
    os.environ["COURSE_PROFILE"] = "t4"
    torch.backends.cuda.enable_flash_sdp(False)  # these two need a newer card
    torch.backends.cuda.enable_cudnn_sdp(False)
    return runtime.setup()


def random_model(config, device: str, dtype):
    """A causal model of the config's shape as `models.load_model(4, dtype)` would leave it, but with random weights.

    It is made empty (on "meta") and filled matrix by matrix, each quantized at once: beside what stays there is never
    more than one matrix in 16 bits, where a whole 7B model of them would fill the card.
    """
    from bitsandbytes.nn import Params4bit
    from transformers import AutoModelForCausalLM
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
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


def estimate(config, rows: int, checkpointing: bool, device: str, dtype) -> dict[str, int]:
    """The planner's named bytes of the step that `training_step` makes, rows of LENGTH tokens."""
    rank, update = recipes.SFTRecipe().rank, "foreach" if device == "cuda" else "loop"  # torch's defaults
    precision = {"dtype_bytes": dtype.itemsize, "compute_bytes": dtype.itemsize, "cast_inputs": False}
    return budget.training(config, "qlora", rank, rows, LENGTH, checkpointing, attention="sdpa", update=update, **precision)


def plan(config, device: str, dtype, memory: float) -> tuple[int, bool, dict[str, int]]:
    """Rows, whether to checkpoint, the estimate's named bytes: the first of PLANS that fits `memory` bytes. CourseError if none does."""
    for rows, checkpointing in PLANS:
        parts = estimate(config, rows, checkpointing, device, dtype)
        if budget.total(parts) <= (1 - FREE) * memory:
            return rows, checkpointing, parts
    budget.check_fits("The smallest step", parts, (1 - FREE) * memory)


def training_step(model, tokens, device: str, dtype):
    """One LoRA step under autocast, its gradients scaled, by torch's own AdamW; returns it and the optimizer. tokens: (rows, length)."""
    from peft.helpers import disable_input_dtype_casting

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    scaler = torch.amp.GradScaler(device)

    def step():
        with disable_input_dtype_casting(model):  # PEFT doesn't cast under CUDA's autocast; under a CPU's it would
            with torch.autocast(device, dtype):
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


def measure(name: str, model, tokens, checkpointing: bool, estimated: dict[str, int], device: str, dtype) -> dict:
    """A row of the result: bytes of the weights and of a step's peak, each [measured, estimated]; median seconds of a step; whether
    logits and gradients are finite; whether all gates are passed. tokens: (rows, length), on the device.
    """
    from peft import get_peft_model

    weights, numbers = budget.measured_weight_bytes(model), finite(model, tokens)
    model = get_peft_model(model, recipes.lora_config(recipes.SFTRecipe())).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    step, optimizer = training_step(model, tokens, device, dtype)
    for _ in range(WARM_UPS):
        if not optimizer.state:  # the scaler skipped the update: its gradients weren't finite
            step()
    numbers = numbers and bool(optimizer.state)
    peak = budget.live_bytes(model, optimizer) + budget.peak_live_bytes(step)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    seconds = statistics.median(timeit.repeat(lambda: (step(), wait()), number=1, repeat=REPEATS))
    found = {"weights": [weights, estimated["weights"]], "peak": [peak, budget.total(estimated)]}
    row = {"model": name, "tokens": list(tokens.shape), "checkpointing": checkpointing} | found | {"seconds": seconds, "finite": numbers}
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
    gc.collect()  # the model before this one
    torch.cuda.empty_cache()
    config = menu.choose(name).config()
    rows, checkpointing, estimated = plan(config, device, dtype, memory)
    try:
        if trained:
            model, words = models.load_model(4, dtype, name=name), models.load_tokenizer(name)(flights.SCHEMA_PROMPT).input_ids
            tokens = torch.tensor((words * rows * LENGTH)[: rows * LENGTH]).view(rows, LENGTH).to(device)
        else:
            model, tokens = random_model(config, device, dtype), torch.randint(0, config.vocab_size, (rows, LENGTH), device=device)
        return measure(name, model, tokens, checkpointing, estimated, device, dtype)
    except torch.OutOfMemoryError:
        raise CourseError(f"{name} ran out of memory where the planner says it fits: end what else uses the GPU and run again.") from None


def table(rows: list[dict]) -> str:
    """The result as text, GB measured / estimated."""
    import pandas as pd

    def line(row):
        gb = {f"{what}, GB": " / ".join(f"{n / 1e9:.3f}" for n in row[what]) for what in GATES}
        step = "{} x {}".format(*row["tokens"]) + ", checkpointing" * row["checkpointing"]
        off = {"off": f"{error(row, 'peak'):+.1%}", "s a step": f"{row['seconds']:.2f}"}
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


def run(no_notebooks: bool) -> int:
    """The notebooks as on a T4, then the shapes; the exit status."""
    need_gpu()
    notebooks = None if no_notebooks else runner.nbval(runner.all_notebooks(), COURSE_PROFILE="t4")
    device = card()
    names = SHAPES if no_notebooks else (*SHAPES, menu.COURSE_MODEL)  # this one's weights are there by now
    place = (device.kind, device.dtype, 1e9 * device.memory_gb)
    return report(device.name, notebooks, [check(name, *place, trained=name not in SHAPES) for name in names])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m course.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--no-notebooks", action="store_true", help="memory and time of the shapes only")
    return runner.status(run, **vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a pipe on Windows can't say every letter
    sys.exit(main())
