"""Exercises of notebook 03: what their checks try, and the mistakes that they know."""

import math

from course.exercises.comparing import compare
from helpers.checks import NOT_YET, Verdict, check, missing, right, wrong


@check
def labels(answer) -> Verdict:
    """03.1: a function (prompt ids, completion ids) -> labels for the whole sequence, -100 where no loss is taken."""
    prompt, completion = [1, 4093, 198, 28], [10, 11, 12, 2]
    mistakes = {
        "the prompt is supervised as well.": prompt + completion,
        "0 is a token like any other: what is left out of the loss has the label -100.": [0] * 4 + completion,
        "the last token is masked: it ends the turn, and the model must learn to stop.": [-100] * 4 + completion[:-1] + [-100],
        "the labels must be as long as the sequence: prompt and completion.": completion,
        "don't shift them: the model's loss does that (position t predicts t + 1).": [-100] * 3 + completion + [-100],
        "it is the other way round: the completion is to be learnt.": prompt + [-100] * 4,
        "nothing is left to learn from.": [-100] * 8,
    }
    return compare(answer(list(prompt), list(completion)), [-100] * 4 + completion, mistakes, "One label a token, and the loss looks at the answer only.", 0)


@check
def completion_loss(answer) -> Verdict:
    """03.2: a function (logits (T, V), labels (T,)) -> the mean loss in nats a supervised token, checked against transformers' own."""
    import torch
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(3))
    wanted = torch.tensor([-100, -100, -100, 4, 7, 2])
    cross = torch.nn.functional.cross_entropy
    summed = cross(logits[:-1], wanted[1:], reduction="sum")
    mistakes = {
        "position t predicts token t + 1: shift the logits against the labels.": cross(logits, wanted),
        "shifted the wrong way: the logits of position t go with the label of t + 1.": cross(logits[1:], wanted[:-1]),
        "that is the sum: divide by the number of supervised tokens.": summed,
        "the masked positions count in the mean's denominator: divide by the supervised ones alone.": summed / 5,
        "a loss is minus the log of the probability: the sign.": -summed / 3,
        "that is in bits: use the natural logarithm.": summed / 3 / math.log(2),
        "the softmax runs over the vocabulary, the last axis.": -logits[:-1].log_softmax(0)[[2, 3, 4], wanted[3:]].mean(),
        "the softmax runs over the vocabulary: yours runs over positions.": -logits.log_softmax(0)[[2, 3, 4], wanted[3:]].mean(),
    }
    exact = ForCausalLMLoss(logits[None], wanted[None], vocab_size=9)
    return compare(answer(logits, wanted), exact, mistakes, "transformers' own loss is the same.", 1e-5)


@check
def interval(answer) -> Verdict:
    """03.3: a function (gain (n,), phrasing (n,) of ints) -> (low, high): a 95 % bootstrap interval of the mean that resamples phrasings."""
    import numpy as np

    rng = np.random.default_rng(0)
    sizes = np.tile([2, 10], 30)  # questions a phrasing; those of one stand or fall together, and the large ones more often
    phrasing = np.repeat(np.arange(60), sizes)
    gain = (rng.random(60) < np.where(sizes > 5, 0.6, 0.1)).astype(float)[phrasing]
    given = answer(gain.copy(), phrasing.copy())
    if missing(given):
        return NOT_YET
    low, high = (float(end) for end in given)
    if not low < high:
        return wrong("low comes first.")
    sums = np.bincount(phrasing, weights=gain)
    means = np.array([sums[drawn].sum() / sizes[drawn].sum() for drawn in rng.integers(0, 60, (4000, 60))])
    by_phrasing, by_question, width = means.std(), gain.std() / math.sqrt(len(gain)), (high - low) / 2 / 1.96
    if abs((low + high) / 2 - (sums / sizes).mean()) < abs((low + high) / 2 - gain.mean()):
        return wrong("each phrasing counts once: one with more questions must weigh more. Divide all gains drawn by all questions drawn.")
    if abs(width / by_question - 1) < 0.2:
        return wrong("it is as narrow as if all questions were independent: draw phrasings, and take all questions of each one drawn.")
    if 0.7 < width / by_phrasing < 0.915:
        return wrong("it is a little narrow: does a phrasing drawn twice count twice? Or is it the 90 % interval, from 5 % to 95 %?")
    if abs(width / by_phrasing - 1) <= 0.11:
        return right("Two questions from one phrasing are not two independent facts, and the interval says so.")
    if abs(width / gain.std() - 1) < 0.2:
        return wrong("that is the spread of single questions: take the mean of each draw, then the quantiles of these means.")
    return wrong(f"its width is {width / by_phrasing:.1f} times what resampling phrasings gives.")
