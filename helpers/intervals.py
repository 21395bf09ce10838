"""How often a system is right, with an interval, and whether one is better than another."""

from dataclasses import dataclass

from helpers.files import CourseError


@dataclass(frozen=True)
class Score:
    """A share with its 95 % interval: n questions, `correct` right, accuracy, low and high between 0 and 1."""

    n: int
    correct: int
    accuracy: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.accuracy:.0%} ({self.low:.0%} to {self.high:.0%}, n = {self.n})"


def _strata(records) -> list[list[list[int]]]:
    """Positions of the questions by phrasing, and these by intent; a row without a phrasing is its own.

    Where an intent has a single phrasing its stratum has no spread to resample, so all phrasings then form one stratum.
    """
    phrasings: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        phrasings.setdefault(str(record.get("phrasing") or record.get("id") or i), []).append(i)
    intents: dict[str, list[list[int]]] = {}
    for cluster in phrasings.values():
        intents.setdefault(str(records[cluster[0]].get("intent")), []).append(cluster)
    thin = any(len(clusters) == 1 for clusters in intents.values())
    return [list(phrasings.values())] if thin else list(intents.values())


def _interval(values, strata, draws: int, seed: int) -> tuple[float, float]:
    """A 95 % interval of the mean of `values`: the quantiles over `draws` that resample phrasings within each intent."""
    import numpy as np

    rng = np.random.default_rng(seed)
    values = np.asarray(values, dtype=float)
    total, count = np.zeros(draws), np.zeros(draws)
    for clusters in strata:
        sums = np.array([values[c].sum() for c in clusters])
        sizes = np.array([len(c) for c in clusters])
        picks = rng.integers(0, len(clusters), (draws, len(clusters)))
        total += sums[picks].sum(axis=1)
        count += sizes[picks].sum(axis=1)
    low, high = np.quantile(total / count, [0.025, 0.975])
    return float(low), float(high)


def score(records, draws: int = 2000, seed: int = 0) -> Score:
    """Accuracy with a 95 % bootstrap interval that resamples phrasings within intents, not single questions.

    Where all answers are right, or all wrong, nothing varies: the open end is then the exact binomial bound (Clopper and
    Pearson 1934) for as many trials as there are phrasings. `pooled` seeds count by their shares.
    """
    right = [float(r["correct"]) for r in records]
    if not right:
        raise CourseError("There is nothing to score: no questions.")
    strata = _strata(records)
    low, high = _interval(right, strata, draws, seed)
    bound = 0.025 ** (1 / sum(map(len, strata)))
    low, high = (bound if min(right) == 1 else low), (high if any(right) else 1 - bound)
    return Score(len(right), round(sum(right)), sum(right) / len(right), low, high)


def _asked(records) -> list[str]:
    """What was asked: ids, or the questions of a file of one's own that has none."""
    return [r.get("id") or r["question"] for r in records]


def paired_difference(records_a, records_b, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Accuracy of a minus accuracy of b on the same questions: (difference, low, high), a paired cluster bootstrap."""
    if _asked(records_a) != _asked(records_b):
        raise CourseError("A paired comparison needs the same questions in the same order in both records.")
    gain = [float(a["correct"]) - float(b["correct"]) for a, b in zip(records_a, records_b, strict=True)]
    return sum(gain) / len(gain), *_interval(gain, _strata(records_a), draws, seed)


def pooled(runs: list[list[dict]]) -> list[dict]:
    """Several seeds' records of the same questions as one: `correct` becomes the share of seeds that had it right."""
    if any(_asked(run) != _asked(runs[0]) for run in runs):
        raise CourseError("Pooling seeds needs the same questions in the same order in each run.")
    return [dict(rows[0], correct=sum(bool(r["correct"]) for r in rows) / len(rows)) for rows in zip(*runs, strict=True)]
