"""Exercises of notebook 08: what their checks try, and the mistakes that they know."""

from course.exercises.comparing import compare
from helpers.checks import Verdict, check, wrong
from helpers.scaling import spread

BATCHES = [(64, 4, 16), (64, 4, 5), (12, 1, 5), (48, 8, 2)]  # examples a step, GPUs, what one GPU takes at a time


@check
def shared_batch(answer) -> Verdict:
    """08.1: a function (batch, gpus, fits) -> (examples a GPU takes at a time, times before each step), the first as large as fits and divides."""
    given = [answer(*case) for case in BATCHES]
    if all(value is None or value is ... for value in given):
        return compare(None, 0, {}, "")
    if any(len(value) != 2 for value in given):
        return wrong("two numbers are asked for: how many at a time, and how many times.")
    for (batch, gpus, fits), (at_once, times) in zip(BATCHES, given, strict=True):
        if at_once * times != batch and at_once * times * gpus != batch:
            return wrong(f"{gpus} GPUs with {fits} at a time: {at_once} × {times} × {gpus} GPUs are {at_once * times * gpus} examples a step, not {batch}.")
    every = [[*spread.split(*case)] for case in BATCHES]
    mistakes = {
        "the GPUs share the examples: each has its part of the batch only.": [[*spread.split(batch, 1, fits)] for batch, _, fits in BATCHES],
        "a GPU would be given more at a time than fits.": [[batch // gpus, 1] for batch, gpus, _ in BATCHES],
        "one at a time always works, and wastes the card: take as many as fit.": [[1, batch // gpus] for batch, gpus, _ in BATCHES],
        "how many at a time comes first, how many times second.": [pair[::-1] for pair in every],
    }
    return compare([[*value] for value in given], every, mistakes, "The same examples a step on any machine: so the recipe stays as it is.")


@check
def shard_gb(answer) -> Verdict:
    """08.2: a function (parameters, gpus, stage) -> GB (10**9 bytes) on each GPU of weights, gradients and AdamW in mixed precision under ZeRO stage 0 to 3."""
    n, gpus = 7_000_000_000, 8

    def every(weights=2, gradients=2, states=12, cut=(3, 2, 1), unit=1e9):  # bytes a parameter, and the stage from which each is cut
        sizes = list(zip((weights, gradients, states), cut, strict=True))
        return [n * sum(size / (gpus if stage >= least else 1) for size, least in sizes) / unit for stage in range(4)]

    mistakes = {
        "the optimizer keeps a float32 copy of the weights beside its two averages: 12 bytes, not 8.": every(2, 2, 8),
        "the gradients are missing: two bytes a parameter.": every(2, 0, 12),
        "weights and gradients have 16 bits: two bytes each.": every(4, 4, 12),
        "stage 1 cuts the optimizer's part alone; gradients come with stage 2, weights with 3.": every(cut=(1, 1, 1)),
        "stage 2 cuts the gradients and stage 3 the weights; here it is the other way round.": every(cut=(2, 3, 1)),
        "nothing is cut: divide what the stage shares out by the number of GPUs.": every(cut=(9, 9, 9)),
        "these are gibibytes (2**30 bytes): the course counts in GB, 10**9.": every(unit=2**30),
        "these are bytes.": every(unit=1),
    }
    given = [answer(n, gpus, stage) for stage in range(4)]
    given = None if any(value is None or value is ... for value in given) else given
    return compare(given, every(), mistakes, "112 GB a card without cutting, 14 with all of it on eight. Activations come on top, and no stage shares them out.")


@check
def rent(answer) -> Verdict:
    """08.3: a function (parameters, tokens, tflops, utilisation, dollars, cards, scaling) -> dollars of a LoRA run with checkpointing."""
    runs = [(7e9, 1e8, 312, 0.35, 1.79, 1, 1.0), (7e9, 1e8, 312, 0.35, 1.79, 8, 0.8), (70e9, 1e7, 989, 0.4, 3.99, 4, 0.9)]

    def every(flop=6, count=lambda cards: cards, speed=lambda cards, scaling: cards * scaling, hour=3600, unit=1e12, share=lambda u: u):
        return [flop * n * t / (speed(c, s) * share(u) * peak * unit) / hour * count(c) * price for n, t, peak, u, price, c, s in runs]

    mistakes = {
        "that is without checkpointing: the second forward pass costs 2 FLOP more a weight and token.": every(flop=4),
        "that is full fine-tuning: a frozen weight gets no gradient of its own.": every(flop=8),
        "all cards are paid for, not one.": every(count=lambda cards: 1),
        "several cards are less than so many times as fast: scaling.": every(speed=lambda cards, scaling: cards),
        "more cards do the work together: the hours are fewer.": every(speed=lambda cards, scaling: 1),
        "a card is paid by the hour; these are seconds.": every(hour=1),
        "no card reaches its peak: utilisation.": every(share=lambda u: 1),
        "TFLOP/s are 10**12 a second.": every(unit=1),
    }
    given = [answer(*run) for run in runs]
    given = None if any(value is None or value is ... for value in given) else given
    return compare(given, every(), mistakes, "With scaling 1 the number of cards drops out: more of them buy time, not money; what they lose to each other you pay.")
