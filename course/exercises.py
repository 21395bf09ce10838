"""The notebooks' exercises: what each check tries, and the mistakes that it knows. Cards and stubs are in notebooks/, solutions in notebooks/solutions/.

First what checks share, then a room for each notebook, 00 to 04, with its three checks in the order of the cards.
"""

import math

from helpers.checks import NOT_YET, Verdict, check, missing, right, wrong

# ---------------------------------------------------------------- what checks share


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


# ---------------------------------------------------------------- 00 · start here

DELAYS = "SELECT airline, AVG(dep_delay) FROM flights WHERE origin = 'JFK' AND month = 7 GROUP BY airline ORDER BY AVG(dep_delay) DESC"
LONGEST = "SELECT MAX(dep_delay) FROM flights WHERE carrier = 'HA'"


def rows_of(answer: str) -> list:
    """What an answer's SQL returns on the real database; SqlError where it doesn't run."""
    from helpers import flights, scoring, sql

    return sql.run_untrusted(scoring.extract_sql(answer) or answer, flights.database_path()).rows


@check
def query(answer: str) -> Verdict:
    """00.1: the SQL of "Average departure delay of each airline out of JFK in July, worst first"."""
    from helpers import scoring, sql

    try:
        rows, wanted = rows_of(answer), rows_of(DELAYS)
    except sql.SqlError as error:
        return wrong(f"your query doesn't run: {error}")

    def same(reference, ordered=True):
        return scoring.judge().judge(answer, reference, ordered=ordered)["correct"]

    delays = [round(value, 1) for row in rows for value in row if isinstance(value, float)]
    if same(DELAYS) or (same(DELAYS, ordered=False) and delays == sorted(delays, reverse=True)):  # rounding makes ties
        return right("It gives the reference's result on the real database and on both perturbed copies.")
    if same(DELAYS, ordered=False):
        return wrong("the airlines and their delays are right, their order isn't: the question asks for the worst first.")
    for hint, replaced, by in (
        ("it counts the flights of every month.", " AND month = 7", ""),
        ("it counts the flights of all three airports.", "origin = 'JFK' AND ", ""),
        ("the question asks for delays at departure.", "dep_delay", "arr_delay"),
    ):
        if same(DELAYS.replace(replaced, by), ordered=False):
            return wrong(hint)
    if len(rows) == 1:
        return wrong("one number for all airlines together: the question says *each*.")
    if rows and not any(isinstance(value, str) for value in rows[0]):
        return wrong("say which airline each average belongs to.")
    if rows and not any(isinstance(value, int | float) for value in rows[0]):
        return wrong("a column is missing: give each airline's average too, not only the order.")
    if len(rows) < len(wanted):
        return wrong(f"the question asks for every airline, and {len(rows)} came.")
    return wrong("its result differs from the reference's. Check which flights count, then what is averaged, then for whom.")


@check
def temperature(answer) -> Verdict:
    """00.2: a function (logits (V,), temperature) -> probabilities (V,)."""
    import torch

    logits, t = torch.tensor([2.0, 1.0, -1.0, 0.5]), 0.5
    mistakes = {
        "a temperature below 1 must make the likeliest token likelier: yours makes it less likely.": (logits * t).softmax(0),
        "the temperature isn't used.": logits.softmax(0),
        "divide the logits, not the probabilities: these no longer add up to 1.": logits.softmax(0) / t,
        "these are logarithms of probabilities.": (logits / t).log_softmax(0),
        "these are scaled logits, not yet probabilities: none may be negative, and they add up to 1.": logits / t,
    }
    return compare(answer(logits, t), (logits / t).softmax(0), mistakes, "Towards 0 it becomes greedy decoding; a high one levels all tokens.")


@check
def lucky(answer: str) -> Verdict:
    """00.3: a query that is wrong for "What is the largest departure delay of Hawaiian Airlines?", and right by luck on the real database."""
    import sqlglot

    from helpers import scoring, sql

    try:
        rows_of(answer)
    except sql.SqlError as error:
        return wrong(f"your query doesn't run: {error}")
    parsed = sqlglot.parse_one(scoring.extract_sql(answer) or answer, read="sqlite")
    if not any(part.find(sqlglot.exp.Column, sqlglot.exp.Star) for part in parsed.selects):
        return wrong("a number typed in isn't a query: ask the table.")
    found = scoring.judge().judge(answer, LONGEST, single=True)
    if found["correct"]:
        return wrong("this one agrees on all three databases, so it may well be right. You want one that ignores a part of the question.")
    if not found["single"]:
        return wrong("on the real database it already gives another result than the reference: no luck to uncover.")
    return right("One database would have passed it; the perturbed copies don't.")


# ---------------------------------------------------------------- 01 · quantized loading


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


# ---------------------------------------------------------------- 02 · LoRA injection


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


# ---------------------------------------------------------------- 03 · SFT with TRL


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


# ---------------------------------------------------------------- 04 · DPO


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
