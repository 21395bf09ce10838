"""What checks share: a number, a tensor or a list against the expected one, and the mistakes that lead to another."""

from helpers.checks import NOT_YET, Verdict, missing, right, wrong


def compare(given, expected, mistakes: dict[str, object], remark: str, tolerance: float = 1e-4) -> Verdict:
    """`given` against the expected value: right, one of the `mistakes` (hint: the value that it leads to), or wrong without a hint.

    Values are numbers, tensors or lists of numbers; equal means within `tolerance` of the largest expected size.
    """
    import torch

    if missing(given):
        return NOT_YET
    want, have = (torch.as_tensor(value).detach().double() for value in (expected, given))

    def near(value) -> bool:
        value = torch.as_tensor(value).detach().double()
        return value.shape == have.shape and torch.allclose(have, value, rtol=0, atol=tolerance * max(1e-9, want.abs().max().item()))

    if near(want):
        return right(remark)
    for hint, value in mistakes.items():
        if near(value):
            return wrong(hint)
    if have.shape != want.shape:
        return wrong(f"the result has the shape {tuple(have.shape)}, and {tuple(want.shape)} is asked for.")
    return wrong("the numbers differ. Take the smallest example you can work out on paper, and compare step by step.")
