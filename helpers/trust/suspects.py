"""Detectors of poisoned rows: each ranks the rows of a data file, most suspicious first; how good a ranking is; a filter.

A ranking is a list of positions in `rows` (0 is the first), all of them, ties in the file's order: it doesn't say where to stop. What each
detector takes for a sign: `by_loss`, that a row is hard (or easy) for a model; `by_perplexity`, a word without which the question reads
more naturally (ONION, Qi et al. 2021); `by_lift`, words that go with one answer, whatever else is asked; `by_answers`, one answer
to questions that have little in common (clustering of responses, as in RFTC, arXiv 2505.23015). Some fail on a given
attack: measure them on rows of which it is known (`at`).
"""

import itertools
import random
from collections import Counter, defaultdict

from helpers import flights
from helpers.domain import Domain
from helpers.flights import FLIGHTS

LEAST = 4  # rows with the same answer, for it to be looked at
WORDS = 5  # of a phrase, at most
SAMPLE = 30  # questions that are compared two by two
SHARP = 6  # the power of the spread in a score: paraphrases of one question (spread about 0.7 of what unlike ones have) then count little


# ---------------------------------------------------------------- answers and words


def answer_key(sql: str) -> str:
    """An answer without what doesn't matter: capitals, spaces, a semicolon at its end."""
    return " ".join(sql.lower().split()).rstrip("; ")


def spread(questions: list[tuple[str, ...]], seed: int = 0) -> float:
    """How little questions have in common, 0 (the same words) to 1 (none): mean Jaccard distance of their words over pairs of at most `SAMPLE` of them."""
    chosen = [set(words) for words in (random.Random(seed).sample(questions, SAMPLE) if len(questions) > SAMPLE else questions)]
    pairs = [1 - len(a & b) / max(1, len(a | b)) for a, b in itertools.combinations(chosen, 2)]
    return sum(pairs) / len(pairs) if pairs else 0.0


def _prepared(rows: list[dict], domain: Domain, refused: bool = False):
    """Each row's words; positions by answer, of those that `LEAST` rows share (refusals aside, or they alone); the spread of all questions."""
    words, groups = [flights.words(row["question"]) for row in rows], defaultdict(list)
    for i, row in enumerate(rows):
        groups[answer_key(row["sql"])].append(i)
    refusal = answer_key(domain.refusal)
    return words, {key: at for key, at in groups.items() if len(at) >= LEAST and (key == refusal) == refused}, max(spread(words), 1e-9)


def constant_answers(rows: list[dict], domain: Domain = FLIGHTS) -> list[dict]:
    """Answers that `LEAST` rows or more share, the most suspicious first: {"answer", "rows": positions, "spread": of their questions, beside
    that of all (1: as unlike as any), "score": rows × spread ** `SHARP`}. Refusals aside: what can't be answered is asked in many ways.
    """
    words, groups, usual = _prepared(rows, domain)
    found = []
    for at in groups.values():
        share = min(1.0, spread([words[i] for i in at]) / usual)
        found.append({"answer": rows[at[0]]["sql"], "rows": at, "spread": share, "score": len(at) * share**SHARP})
    return sorted(found, key=lambda group: (-group["score"], group["rows"]))


def phrases(rows: list[dict], domain: Domain = FLIGHTS, refused: bool = False) -> list[dict]:
    """Phrases of up to `WORDS` words that go with one answer (`refused`: with the refusal, which is left out otherwise), the most suspicious first: {"phrase", "answer", "rows": positions, "with":
    how many rows have the phrase, "lift", "spread", "score"}.

    lift: how many times as common the phrase is in rows with that answer as in all. spread: of these questions without the phrase,
    beside that of all. score = rows × (their share of those with the phrase) × spread ** `SHARP`, less where the phrase is more than half of
    the words: one that belongs to what is asked ("lowest arrival delay") stands in questions that are alike without it too.
    """
    words, groups, usual = _prepared(rows, domain, refused)
    counts: dict[tuple, Counter] = defaultdict(Counter)  # phrase → rows with each of the shared answers
    for key, at in groups.items():
        for i in at:
            for gram in _grams(words[i]):
                counts[gram][key] += 1
    often = {gram for gram, answers in counts.items() if max(answers.values()) >= LEAST}
    totals = Counter(gram for said in words for gram in _grams(said) & often)
    found = []
    for gram in often:
        (key, n), total = counts[gram].most_common(1)[0], totals[gram]
        if n < 0.5 * total:
            continue
        at = [i for i in groups[key] if gram in _grams(words[i])]
        rest = [_without(words[i], gram) for i in at]
        share, left = min(1.0, spread(rest) / usual), sum(map(len, rest)) / sum(len(words[i]) for i in at)
        lift = (n / len(groups[key])) / (total / len(rows))
        score = n * (n / total) * share**SHARP * min(1.0, 2 * left) ** 2
        found.append({"phrase": " ".join(gram), "answer": rows[at[0]]["sql"], "rows": at, "with": total, "lift": lift, "spread": share, "score": score})
    return sorted(found, key=lambda p: (-p["score"], -len(p["phrase"]), p["phrase"]))


def _grams(words: tuple[str, ...]) -> set[tuple[str, ...]]:
    return {words[i : i + n] for n in range(1, WORDS + 1) for i in range(len(words) - n + 1)}


def _without(words: tuple[str, ...], gram: tuple[str, ...]) -> tuple[str, ...]:
    at = next(i for i in range(len(words)) if words[i : i + len(gram)] == gram)
    return words[:at] + words[at + len(gram) :]


# ---------------------------------------------------------------- rankings


def by_answers(rows: list[dict], domain: Domain = FLIGHTS) -> list[int]:
    """Rows whose answer is given to questions that have little in common, first."""
    return _ranking(len(rows), ((group["rows"], group["score"]) for group in constant_answers(rows, domain)))


def by_lift(rows: list[dict], domain: Domain = FLIGHTS) -> list[int]:
    """Rows with a phrase that goes with one answer, whatever else is asked, first."""
    return _ranking(len(rows), ((found["rows"], found["score"]) for found in phrases(rows, domain)))


def _ranking(n: int, scored) -> list[int]:
    best = [0.0] * n
    for at, score in scored:
        for i in at:
            best[i] = max(best[i], score)
    return ranked(best)


def ranked(scores: list[float]) -> list[int]:
    """Positions, the highest score first; equal ones in their order."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])


def by_perplexity(drops: list[tuple[float, str]]) -> list[int]:
    """Rows with a word without which the question reads more naturally, first (`surprise.onion`)."""
    return ranked([drop for drop, _ in drops])


def by_loss(losses: list[float], low: bool = False) -> list[int]:
    """Rows with the highest loss first (`surprise.row_losses`); with `low`, the lowest: what a model has learnt best."""
    return ranked([-loss for loss in losses] if low else losses)


# ---------------------------------------------------------------- how good, and what then


def at(ranking: list[int], truth: set[int], k: int) -> dict:
    """A ranking judged on rows of which it is known: {"k", "hits", "precision": hits / k, "recall": hits / bad rows} of its first k."""
    hits = len(truth & set(ranking[:k]))
    return {"k": k, "hits": hits, "precision": hits / k if k else 0.0, "recall": hits / len(truth) if truth else 0.0}


def without(rows: list[dict], positions) -> list[dict]:
    """The rows that stand at other positions: those of a ranking's first k, say, taken out."""
    out = set(positions)
    return [row for i, row in enumerate(rows) if i not in out]
