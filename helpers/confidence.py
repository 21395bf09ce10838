"""How far an answer can be trusted: from the log-probability that the model gave it, calibrated on questions whose answers were judged.

A language model's own numbers are too sure or not sure enough; Platt's logistic curve (Platt 1999, "Probabilistic Outputs for Support
Vector Machines") turns them into shares that are right. What it is fitted on must not have been trained on: here validation.
"""

import itertools
from dataclasses import dataclass

from helpers import scoreboard

FITTED = {"sft": ("sft", "sft"), "dpo": ("preference", "dpo")}  # of each main run: the recorded sweep and stage with judged answers


@dataclass(frozen=True)
class Calibration:
    """P(right | log-probability) = 1 / (1 + exp(−(slope · logp + intercept))); n: the judged answers that it was fitted on."""

    slope: float
    intercept: float
    n: int

    def __call__(self, logp: float) -> float:
        """The share of answers with this log-probability (nats, of the whole answer) that are right, 0 to 1."""
        import math

        return 1 / (1 + math.exp(-max(-50.0, self.slope * logp + self.intercept)))


def fit(logps, correct) -> Calibration | None:
    """Platt's curve by maximum likelihood; None where all answers are right, or all wrong."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    correct = np.asarray(correct, dtype=bool)
    if correct.all() or not correct.any():
        return None
    curve = LogisticRegression(C=1e6).fit(np.asarray(logps, dtype=float)[:, None], correct)  # C: next to no penalty
    return Calibration(float(curve.coef_[0, 0]), float(curve.intercept_[0]), len(correct))


def recorded(stage: str) -> Calibration | None:
    """The curve of a main run (sft, dpo), fitted on the recorded answers of all its seeds to the validation questions; None without such records."""
    sweep, arm = FITTED.get(stage, (None, None))
    runs = scoreboard.recorded(sweep, arm) if sweep else []
    judged = [r for run in runs for r in run["splits"].get("validation", {"records": []})["records"] if "logp" in r]
    return fit([r["logp"] for r in judged], [r["correct"] for r in judged]) if judged else None


def auroc(scores, correct) -> float:
    """Of all pairs of a right and a wrong answer, the share in which the right one has the higher score (a tie is half): 0.5 says nothing, 1 all."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(list(correct), list(scores)))


def surest(scores, correct, share: float = 0.75) -> float:
    """The share right of the surest answers: those with the highest scores, `share` of all, at least one."""
    ranked = sorted(zip(scores, correct, strict=True), key=lambda pair: -pair[0])
    kept = ranked[: max(1, round(share * len(ranked)))]
    return sum(right for _, right in kept) / len(kept)


def reliability(probabilities, correct, bins: int = 10) -> list[dict]:
    """Answers in order of confidence, in `bins` parts of equal size: {"said", "right", "n"}, the mean confidence and the share right of each."""
    ranked = sorted(zip(probabilities, correct, strict=True), key=lambda pair: pair[0])
    edges = [round(i * len(ranked) / bins) for i in range(bins + 1)]
    parts = [ranked[a:b] for a, b in itertools.pairwise(edges) if b > a]
    return [{"said": sum(p for p, _ in part) / len(part), "right": sum(r for _, r in part) / len(part), "n": len(part)} for part in parts]
