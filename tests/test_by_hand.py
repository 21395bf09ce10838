"""The by-hand pieces of notebooks 01, 02 and 04: they equal the library's, and each assert fails when its piece is broken.

A notebook's cells are executed once, in a process of its own with one thread. Before a cell that is to be broken this process is
copied, and the copy goes on with the broken cell: what stands before it isn't run again. Where a process can't be copied safely
(Windows, macOS, a GPU in use) every broken notebook is run from its start.
"""

import functools
import multiprocessing
import os
import sys
import tempfile
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nbformat
import pytest
from conftest import shorten

from helpers.runtime import ROOT

pytestmark = pytest.mark.slow
SETUP = 3  # cells before the first lesson: the set-up, Drive, imports
QUANTIZED, LORA, DPO = "01_quantized_loading", "02_lora_injection", "04_dpo"
SECOND = "quantized = get_peft_model(models.load_model(4), config)"
SHORTENED = {LORA: 16, DPO: 8}  # layers: in 01 the last ones are looked at, in 02 layer 15
# notebook, what is replaced, by what, and words of the assert that must catch it
BROKEN = [
    (QUANTIZED, "p.numel() * p.element_size()", "p.numel() * 4", "measured - predicted"),  # bytes a parameter
    (QUANTIZED, "torch.round(w * (127 / scale))", "torch.round(w * (126 / scale))", "codes, theirs"),  # absmax int8
    (QUANTIZED, "hurt[0, 0] = 10", "hurt[0, 0] = 1", "> 5 * errors"),  # no outlier, no damage
    (QUANTIZED, "threshold=6.0):\n    outlier", "threshold=6000.0):\n    outlier", "0.5 * token_error"),  # outliers left in 8 bits
    (QUANTIZED, "x[:, outlier] @ (b", "0.9 * x[:, outlier] @ (b", "token_error"),  # what is kept out of 8 bits
    (QUANTIZED, "(1 / 30 + 1 / 32)", "(1 / 30 + 1 / 34)", "nf4 - library"),  # NF4's offset
    (QUANTIZED, "torch.zeros(1), positive", "torch.zeros(1) + 0.01, positive", "nf4 - library"),  # its zero
    (QUANTIZED, "blocks.abs().amax(1", "(0.99 * blocks).abs().amax(1", "absmax.flatten(), state.absmax"),  # absmax
    (QUANTIZED, "(first << 4) | second", "(second << 4) | first", "same.all()"),  # packing
    (QUANTIZED, "(levels[codes.long()] * absmax)", "(levels[codes.long()] * absmax.mean())", "allclose(back"),  # dequantizing
    (QUANTIZED, "0.0625, 2, 3", "0.0725, 2, 3", "allclose(fp4"),  # FP4's smallest level
    (QUANTIZED, "32 / (64 * 256)", "32 / 256", "bits - expected"),  # double quantization's arithmetic
    (QUANTIZED, "(absmax - absmax.mean())", "absmax", "state.state2.absmax"),  # its offset
    (QUANTIZED, "torch.bucketize(rest / scale", "torch.bucketize(0.9 * rest / scale", "apart.max()"),  # its codes
    (QUANTIZED, "[state.absmax, state.state2.absmax, state.offset]", "[state.absmax]", "bits - expected"),  # its count
    (QUANTIZED, "W.reshape(-1, 32).sort", "torch.randn(99, 32).sort", "different.max()"),  # weights that were never Q4_1
    (QUANTIZED, "/ 15).half()", "/ 7).half()", "error(q4_1(W), W)"),  # Q4_1's grid
    (LORA, "torch.zeros(linear.out_features, r)", "torch.ones(linear.out_features, r)", "equal(before, after)"),  # B = 0
    (LORA, "    model.requires_grad_(False)", "    model.requires_grad_(True)", "by_formula == by_sum"),  # the rest not frozen
    (LORA, 'and name != "lm_head"', "", "by_formula == by_sum"),  # a layer too many
    (LORA, "linear.requires_grad_(False), alpha / r", "linear.requires_grad_(False), alpha", "close(*outputs"),  # the scale
    (LORA, 'peft.lora_A["default"].weight.copy_(ours.A)', "pass", "close(*outputs"),  # another A
    (LORA, "(x @ self.A.T)", "(x @ (2 * self.A - self.A.detach()).T)", "close(mine.grad"),  # right outputs, twice the gradient
    (LORA, SECOND, SECOND + "\nquantized.base_model.model.model.norm.weight.requires_grad_(True)", "p.grad is None"),  # a base that learns
    (LORA, SECOND, SECOND + "\n[nn.init.ones_(p) for n, p in quantized.named_parameters() if 'lora_B' in n]", 'size["lora_A"] == 0'),
    (LORA, SECOND, SECOND + "\n[setattr(p, 'data', p.data.bfloat16()) for p in quantized.parameters() if p.requires_grad]", "p.dtype == torch.float32"),
    (LORA, "weight += ours.scale * ours.B", "weight += ours.B", "ours.linear(x), detour"),  # merging without the scale
    (LORA, "weight -= ours.scale * ours.B", "weight -= ours.B", "ours.linear.weight, W"),  # unmerging without it
    (DPO, "answer[:, 1:]).sum(-1)", "answer[:, 1:]).mean(-1)", "assert abs(o"),  # means for sums: small margins, and then another loss than TRL's
    (DPO, ".logits[:, :-1]", ".logits[:, 1:]", "abs(ours - theirs)"),  # not shifted
    (DPO, "(log_p * answer[:, 1:])", "(log_p * answer[:, :-1])", "abs(ours - theirs)"),  # the mask of another token
    (DPO, "reward = beta * (log_p", "reward = (log_p", "at_start.grad"),  # β forgotten
    (DPO, "logsigmoid(chosen - rejected)", "logsigmoid(rejected - chosen)", "at_start.grad"),  # the wrong way round
    (DPO, "copy.deepcopy(policy).requires_grad_(False)", "models.load_model(16, torch.float32)", "abs(loss"),  # another model as the reference
    (DPO, "parameter += 0.03 * torch.randn_like(parameter)", "pass", "> 1e-3"),  # a comparison at step 0 only
    (DPO, "policy.disable_adapter()", "torch.enable_grad()", "off_loss"),  # "off" that isn't
]


def sources(name: str) -> list[str]:
    """A notebook's set-up and by-hand cells."""
    cells = [c for c in nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells if c.cell_type == "code"]
    return [c.source for i, c in enumerate(cells) if i < SETUP or "by-hand" in c.metadata.get("tags", [])]


def run(cells: list[str], namespace: dict) -> str:
    """Executes cells in a namespace: the line whose assert failed, what else was raised, or "" if all went well."""
    for source in cells:
        try:
            exec(compile(source, "<cell>", "exec"), namespace)
        except AssertionError as error:
            (line,) = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == "<cell>"][:1]
            return source.splitlines()[line - 1]
        except Exception:
            return "No assert failed, but:\n" + traceback.format_exc()
    return ""


def in_a_copy(function, *arguments):
    """What a function returns in a copy of this process, which it can't change."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    copy = context.Process(target=lambda: there.send(function(*arguments)))
    copy.start()
    there.close()  # this side's: a copy that dies is an EOFError, and no wait without end
    try:
        return here.recv()
    finally:
        copy.join()


def random_adapter(folder: Path) -> Path:
    """A random adapter in place of notebook 03's, which takes minutes to train."""
    import torch
    from peft import get_peft_model

    from helpers import adapters, models, recipes, runtime

    runtime.setup(seed=0)
    model = get_peft_model(models.load_model(16), recipes.lora_config(recipes.SFTRecipe()))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return adapters.export_adapter(model, folder)


def outcomes(name: str) -> dict[tuple[str, str], str]:
    """What `run` says of a notebook as it is, ("", ""), and of each way to break it, (old, new)."""
    import peft
    import torch
    import trl
    from transformers.integrations import bitsandbytes

    from helpers import models, training

    assert peft.LoraConfig and trl.DPOTrainer and bitsandbytes  # imported now, so that no copy has to
    os.chdir(ROOT / "notebooks")
    cells, namespace, found = sources(name), {}, {}
    breaks = {(old, new): next((i for i, source in enumerate(cells) if old in source), None) for where, old, new, _ in BROKEN if where == name}
    copies = sys.platform.startswith("linux") and not torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if name in SHORTENED:
            model = shorten(models.model_path(), SHORTENED[name], Path(folder) / "model")
            patch.setattr(models, "model_path", lambda name=None: model)
        if name == DPO:
            adapter = random_adapter(Path(folder) / "adapter")
            patch.setattr(training, "sft_adapter", lambda recipe=None: adapter)
        for at, source in enumerate(cells):
            for old, new in (b for b, first in breaks.items() if first == at):
                broken = [cell.replace(old, new) for cell in cells]
                found[old, new] = in_a_copy(run, broken[at:], namespace) if copies else run(broken, {})
            if said := run([source], namespace):
                return found | {("", ""): said}
    return found | {("", ""): ""}


@pytest.fixture(scope="module")
def outcome():
    """`outcomes` of a notebook, found once, in a process that imports torch with one thread: one that has several can't be copied."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("COURSE_PROGRESS", "0")
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield functools.cache(lambda name: pool.submit(outcomes, name).result())


@pytest.mark.parametrize("name", [QUANTIZED, LORA, DPO])
def test_by_hand_equals_the_library(name, outcome):
    assert outcome(name)["", ""] == ""


@pytest.mark.parametrize(("name", "old", "new", "caught"), BROKEN, ids=[f"{new.strip()[-40:] or 'no condition'}" for _, _, new, _ in BROKEN])
def test_a_broken_piece_is_caught_by_its_assert(name, old, new, caught, outcome):
    assert any(old in source for source in sources(name)), f"{name} no longer has {old!r}"
    assert caught in outcome(name)[old, new]
