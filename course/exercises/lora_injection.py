"""Exercises of notebook 02: what their checks try, and the mistakes that they know."""

import math

from course.exercises.comparing import compare
from helpers.checks import NOT_YET, Verdict, check, missing, right, wrong


@check
def lora_parameters(answer) -> Verdict:
    """02.1: a function (shapes [(out, in), ...], r) -> trainable parameters of LoRA on these linear layers."""
    shapes, r = [(576, 576), (192, 576), (1536, 576), (576, 1536)], 8
    mistakes = {
        "that is what the layers themselves have.": sum(o * i for o, i in shapes),
        "that is ΔW written out, times r: A and B are two thin matrices.": sum(r * o * i for o, i in shapes),
        "only A is counted.": sum(r * i for _, i in shapes),
        "only B is counted.": sum(r * o for o, _ in shapes),
        "r is missing.": sum(o + i for o, i in shapes),
        "only the first layer is counted: does your return stand inside the loop?": r * sum(shapes[0]),
        "the frozen weights are counted too.": sum(o * i + r * (o + i) for o, i in shapes),
    }
    remark = "It grows with r and with the layer's width, not with its area."
    return compare(answer(list(shapes), r), sum(r * (o + i) for o, i in shapes), mistakes, remark, 1e-9)


@check
def lora_forward(answer) -> Verdict:
    """02.2: a function (x (n, in), W (out, in), A (r, in), B (out, r), alpha) -> (n, out), checked against PEFT's own layer."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base, r, alpha = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False)), 3, 8  # alpha / r is no whole number
    layer = get_peft_model(base, LoraConfig(r=r, lora_alpha=alpha, target_modules=["0"])).base_model.model[0]
    A, B, W = layer.lora_A["default"].weight.detach(), torch.randn(5, r), layer.base_layer.weight.detach()
    layer.lora_B["default"].weight.data.copy_(B)
    x = torch.randn(3, 6)
    detour = x @ A.T @ B.T
    mistakes = {
        "the scale is missing: the update is multiplied by alpha / r.": x @ W.T + detour,
        "the scale is alpha / r, not alpha.": x @ W.T + alpha * detour,
        "`//` rounds down: the scale is alpha / r.": x @ W.T + alpha // r * detour,
        "that is the update alone: the frozen layer's own output comes first.": alpha / r * detour,
        "that is the frozen layer alone.": x @ W.T,
        "the scale belongs to the update only.": alpha / r * (x @ W.T + detour),
        "r is the number of A's rows: you divided by the width of the input.": x @ W.T + alpha / 6 * detour,
        "r is the number of A's rows: you divided by the width of the output.": x @ W.T + alpha / 5 * detour,
        "the scale is alpha / √r in rank-stabilized LoRA; here it is alpha / r.": x @ W.T + alpha / math.sqrt(r) * detour,
    }
    return compare(answer(x, W, A, B, alpha), layer(x), mistakes, "PEFT's own layer gives the same numbers.", 1e-5)


@check
def mean_adapter(answer) -> Verdict:
    """02.3: a function (A1, B1, A2, B2) -> (A, B) whose update B @ A is the mean of the two updates."""
    import torch

    torch.manual_seed(1)
    for r1, r2 in ((2, 2), (2, 3)):  # of one rank first: then the mean of the matrices can be taken, and told
        A1, A2, B1, B2 = torch.randn(r1, 12), torch.randn(r2, 12), torch.randn(10, r1), torch.randn(10, r2)
        given = answer(A1, B1, A2, B2)
        if missing(given):
            return NOT_YET
        if not isinstance(given, tuple | list) or len(given) != 2:
            return wrong("give the two matrices A and B, not their product.")
        A, B = given
        if A.ndim != 2 or B.ndim != 2 or B.shape[1] != A.shape[0]:
            return wrong(f"B @ A must be possible: A has the shape {tuple(A.shape)}, B {tuple(B.shape)}.")
        first, second = B1 @ A1, B2 @ A2
        mistakes = {
            "that is the sum of the two updates, not the mean.": first + second,
            "halving A and B both quarters their product.": (first + second) / 4,
            "that is the first update alone.": first,
            "the second update counts in full.": first / 2 + second,
            "the first update counts in full.": first + second / 2,
        }
        if r1 == r2:
            of_matrices = "the mean of the A's times the mean of the B's multiplies one adapter's A with the other's B."
            mistakes[of_matrices] = (B1 + B2) @ (A1 + A2) / 4
        verdict, rank = compare(B @ A, (first + second) / 2, mistakes, "", 1e-5), torch.linalg.matrix_rank(B @ A).item()
        if not verdict:
            return verdict
        if A.shape[0] > rank:
            return wrong(f"the product is right, but A needs no more than {rank} rows, and has {A.shape[0]}: that is ΔW written out.")
    return right(f"Its rank is {rank}: as many rows as both adapters have, and no product of one's A with the other's B.")
