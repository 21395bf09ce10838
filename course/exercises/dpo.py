"""Exercises of notebook 04: what their checks try, and the mistakes that they know."""

import math

from course.exercises.comparing import compare
from helpers.checks import NOT_YET, Verdict, check, missing, right, wrong


@check
def margin(answer) -> Verdict:
    """04.1: a function (DPO's loss of one pair, in nats) -> the pair's margin, reward of the chosen minus that of the rejected."""
    losses = (math.log(2), 0.1, 3.0)
    expected = [-math.log(math.exp(v) - 1) for v in losses]
    mistakes = {
        "the sign: a small loss means a large positive margin.": [-v for v in expected],
        "that is the probability that the chosen answer wins, σ(margin): one step more.": [math.exp(-v) for v in losses],
        "a logarithm of the loss itself: first undo the loss's own -log.": [-math.log(v) for v in losses],
        "a margin has a sign: it is negative where the rejected answer is ahead.": [abs(v) for v in expected],
        "this forgets the 1 in σ(z) = 1 / (1 + exp(-z)).": [-v for v in losses],
    }
    return compare(None if missing(answer(0.1)) else [answer(v) for v in losses], expected, mistakes, "At ln 2 it is 0: where every DPO run starts.")


@check
def simpo_loss(answer) -> Verdict:
    """04.2: a function (chosen (B,), rejected (B,): summed log p; their tokens (B,), (B,); beta; gamma) -> SimPO's mean loss (Meng et al. 2024, equation 6)."""
    import torch

    w, u = torch.tensor([-9.0, -20.0, -3.0]), torch.tensor([-12.0, -15.0, -8.0])
    nw, nu, beta, gamma = torch.tensor([6.0, 20.0, 4.0]), torch.tensor([8.0, 5.0, 4.0]), 2.0, 0.5

    def loss(z):
        return -torch.nn.functional.logsigmoid(z).mean()

    gain = beta * (w / nw - u / nu)
    mistakes = {
        "the log-probabilities aren't divided by the answers' lengths.": loss(beta * (w - u) - gamma),
        "γ is a margin that must be exceeded: it is subtracted.": loss(gain + gamma),
        "γ is missing.": loss(gain),
        "β is missing.": loss(gain / beta - gamma),
        "β multiplies the rewards only, not γ.": loss(gain - beta * gamma),
        "chosen and rejected are swapped.": loss(-gain - gamma),
        "one loss for each pair: take their mean.": -torch.nn.functional.logsigmoid(gain - gamma),
        "a loss is minus the log: the sign.": -loss(gain - gamma),
        "that is the sum over the pairs: take the mean.": 3 * loss(gain - gamma),
        "take the mean of the logarithms, not the logarithm of the mean.": -(gain - gamma).sigmoid().mean().log(),
        "the logarithm is missing: -log σ(z), not -σ(z).": -(gain - gamma).sigmoid().mean(),
    }
    return compare(answer(w, u, nw, nu, beta, gamma), loss(gain - gamma), mistakes, "No reference model anywhere, and a long answer has no advantage from its length.", 1e-5)


@check
def brevity_pair(answer) -> Verdict:
    """04.3: a function (answers [{"answer": str, "correct": bool}, ...]) -> (chosen, rejected) that differ in length alone, or None."""

    def samples(*pairs):
        return [{"answer": text, "correct": correct} for text, correct in pairs]

    some = samples(("SELECT 1 AS one", True), ("SELECT 1", True), ("SELECT", False), ("SELECT 1 AS the_number_one_in_full, 'a long wrong answer'", False), ("SELECT 1 AS n", True))
    given = answer(some)
    if missing(given):
        return NOT_YET
    chosen, rejected = given
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        return wrong("give the two answers' texts, not the dicts that they stand in.")
    correct = {s["answer"]: s["correct"] for s in some}
    if not correct.get(chosen) or not correct.get(rejected):
        return wrong("a wrong answer is in the pair: it would teach correctness and length at once, and you couldn't tell which was learnt.")
    if chosen == rejected:
        return wrong("both are the same text. (The length of a dict is the number of its keys: compare the lengths of the texts.)")
    if len(chosen) > len(rejected):
        return wrong("the chosen answer is the longer one.")
    if (chosen, rejected) != ("SELECT 1", "SELECT 1 AS one"):
        return wrong("take the shortest and the longest of the right answers: the clearest pair.")
    for what, few in {
        "only one answer is right": samples(("SELECT 1", True), ("SELECT 22", False)),
        "all right answers are equally long": samples(("SELECT 1", True), ("SELECT 2", True)),
        "no answer is right": samples(("SELECT 3", False)),
    }.items():
        if answer(few) is not None:
            return wrong(f"where {what} there is no pair to make: give None.")
    return right("Both sides are right, so length is all that the pair teaches.")
