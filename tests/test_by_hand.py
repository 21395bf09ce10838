"""The by-hand pieces of notebooks 01 and 02: they equal the library's, and each assert fails when its piece is broken."""

import os

import nbformat
import pytest

from helpers.runtime import ROOT

pytestmark = pytest.mark.slow
QUANTIZED, LORA = "01_quantized_loading", "02_lora_injection"
BROKEN = [
    (QUANTIZED, "torch.round(w * (127 / scale))", "torch.round(w * (126 / scale))"),  # absmax int8
    (QUANTIZED, "hurt[0, 0] = 10", "hurt[0, 0] = 1"),  # no outlier, no damage
    (QUANTIZED, "threshold=6.0):\n    outlier", "threshold=600.0):\n    outlier"),  # outliers left in 8 bits
    (QUANTIZED, "(1 / 30 + 1 / 32)", "(1 / 30 + 1 / 34)"),  # NF4's offset
    (QUANTIZED, "torch.zeros(1), positive", "torch.zeros(1) + 0.01, positive"),  # its zero
    (QUANTIZED, "levels, block=64", "levels, block=32"),  # blocks
    (QUANTIZED, "(first << 4) | second", "(second << 4) | first"),  # packing
    (QUANTIZED, "0.0625, 2, 3", "0.0725, 2, 3"),  # FP4's smallest level
    (QUANTIZED, "32 / (64 * 256)", "32 / 256"),  # double quantization's arithmetic
    (QUANTIZED, "(absmax - absmax.mean())", "absmax"),  # its offset
    (QUANTIZED, "[state.absmax, state.state2.absmax, state.offset]", "[state.absmax]"),  # its count
    (QUANTIZED, "/ 15).half()", "/ 7).half()"),  # Q4_1's grid
    (LORA, "torch.zeros(linear.out_features, r)", "torch.ones(linear.out_features, r)"),  # B = 0
    (LORA, "linear.requires_grad_(False), alpha / r", "linear.requires_grad_(False), alpha"),  # the scale
    (LORA, 'and name != "lm_head"', ""),  # a layer too many
    (LORA, "    model.requires_grad_(False)", "    model.requires_grad_(True)"),  # the rest not frozen
    (LORA, 'peft.lora_A["default"].weight.copy_(ours.A)', "pass"),  # another A
    (LORA, "weight += ours.scale * ours.B", "weight += ours.B"),  # merging without the scale
]


def run(name: str, old: str = "", new: str = "") -> None:
    """Executes a notebook's set-up and by-hand cells in one namespace, `old` replaced by `new`."""
    cells = [c for c in nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells if c.cell_type == "code"]
    sources = [c.source for i, c in enumerate(cells) if i == 0 or "by-hand" in c.metadata.get("tags", [])]
    assert any(old in source for source in sources), f"{name} no longer has {old!r}"
    namespace = {}
    for source in sources:
        exec(source.replace(old, new) if old else source, namespace)


@pytest.fixture(autouse=True)
def in_the_notebooks_folder(monkeypatch, capsys):
    monkeypatch.chdir(ROOT / "notebooks")
    monkeypatch.setitem(os.environ, "COURSE_PROGRESS", "0")


@pytest.mark.parametrize("name", [QUANTIZED, LORA])
def test_by_hand_equals_the_library(name):
    run(name)


@pytest.mark.parametrize(("name", "old", "new"), BROKEN, ids=[new.strip() or "no condition" for _, _, new in BROKEN])
def test_a_broken_piece_is_caught(name, old, new):
    with pytest.raises(AssertionError):
        run(name, old, new)
