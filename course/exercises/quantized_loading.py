"""Exercises of notebook 01: what their checks try, and the mistakes that they know."""

from course.exercises.comparing import compare
from helpers.checks import NOT_YET, Verdict, check, missing, right, wrong


@check
def megabytes(answer) -> Verdict:
    """01.1: a function (parameters, bits, block) -> MB (of 10**6 bytes), one float32 absmax a block of weights included."""
    n, bits, block = 7_000_000_000, 4, 64
    scales = 4 * n / block
    mistakes = {
        "the scales are missing: each block keeps its absmax in float32.": n * bits / 8 / 1e6,
        "these are bits: a byte has eight.": (n * bits + 8 * scales) / 1e6,
        "these are mebibytes (2**20 bytes): the course counts in MB, 10**6.": (n * bits / 8 + scales) / 2**20,
        "a float32 scale has four bytes.": (n * bits / 8 + n / block) / 1e6,
        "a float32 scale has four bytes, not two.": (n * bits / 8 + 2 * n / block) / 1e6,
        "a float32 scale has 32 bits, not 32 bytes.": (n * bits / 8 + 32 * n / block) / 1e6,
        "the weights are counted in bits: a byte has eight.": (n * bits + scales) / 1e6,
        "these are bytes.": n * bits / 8 + scales,
    }
    remark = "Half a bit a weight for the scales: 4.5 bits, which double quantization brings down to 4.127."
    return compare(answer(n, bits, block), (n * bits / 8 + scales) / 1e6, mistakes, remark)


@check
def blockwise(answer) -> Verdict:
    """01.2: a function (w (out, in), bits, block) -> w quantized by absmax with one scale a block and turned back, same shape."""
    import torch

    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))

    def there_and_back(block, top, rounding=torch.round, size=torch.abs, back=True):
        blocks = w.reshape(-1, block)
        scale = size(blocks).amax(1, keepdim=True) / top
        return (rounding(blocks / scale) * (scale if back else 1)).reshape(w.shape)

    mistakes = {
        "that is one scale for the whole tensor: one outlier would spoil every block.": there_and_back(w.numel(), 7),
        "that is one scale a row.": there_and_back(64, 7),
        "nothing is rounded.": w,
        "4 bits hold the integers from -8 to 7: with absmax in both directions the largest is 7, not 8.": there_and_back(32, 8),
        "4 bits have 16 codes, for both signs together: the largest integer isn't 15.": there_and_back(32, 15),
        "the fraction is cut off: round to the nearest integer.": there_and_back(32, 7, torch.trunc),
        "rounding down isn't rounding to the nearest.": there_and_back(32, 7, torch.floor),
        "the largest value isn't the largest size: take the absmax.": there_and_back(32, 7, size=lambda blocks: blocks),
        "these are the codes: multiply them by their block's scale again.": there_and_back(32, 7, back=False),
        "these are still the blocks: give the result w's own shape.": there_and_back(32, 7).reshape(-1, 32),
    }
    return compare(answer(w.clone(), 4, 32), there_and_back(32, 7), mistakes, "This is absmax quantization as the first 4-bit formats had it: a uniform grid.")


def block_scaled(layer: int, block: int = 64):
    """Weights of the course model's down_proj in `layer`, each over the absmax of its block: (884736,) between -1 and 1."""
    from safetensors import safe_open

    from helpers import models

    with safe_open(models.model_path() / "model.safetensors", "pt") as file:
        blocks = file.get_tensor(f"model.layers.{layer}.mlp.down_proj.weight").float().reshape(-1, block)
    return (blocks / blocks.abs().amax(1, keepdim=True)).flatten()


def level_error(x, levels) -> float:
    """Relative error of x (n,) when each value becomes the nearest of `levels` (k,)."""
    import torch

    levels = levels.sort().values
    return ((levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)] - x).norm() / x.norm()).item()


@check
def levels(answer) -> Verdict:
    """01.3: a function (x (n,) between -1 and 1) -> 16 levels with a smaller error than NF4's, judged on a layer that it didn't see."""
    import bitsandbytes.functional as bnb
    import torch

    nf4, given = bnb.get_4bit_type("nf4", device="cpu"), answer(block_scaled(15))
    if missing(given):
        return NOT_YET
    given = torch.as_tensor(given).float()
    if given.shape != (16,):
        return wrong(f"4 bits number 16 levels: the shape is {tuple(given.shape)}, and (16,) is asked for.")
    other = block_scaled(16)
    ours, theirs = level_error(other, given), level_error(other, nf4)
    if abs(ours / theirs - 1) < 1e-4:
        return wrong("this has NF4's own error. Move each level to where the weights that it serves would have it.")
    quantiles = level_error(other, torch.quantile(other[:100_000], torch.linspace(0, 1, 16)))
    if ours > 0.95 * quantiles:
        return wrong(f"on another layer the error is {ours:.2%}, NF4's {theirs:.2%}. Levels used equally often aren't the ones with the least squared error.")
    if ours >= theirs:
        return wrong(f"on another layer the error is {ours:.2%}, NF4's {theirs:.2%}. If you move levels round by round, do more rounds, from a better start.")
    return right(f"On a layer that your levels have not seen the error is {ours:.1%}, NF4's {theirs:.1%}. But yours need a table for each model, and may lack a zero.")
