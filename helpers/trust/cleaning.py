"""Bad training rows, found again: what doesn't run, what disagrees with its like, what was copied or leaked. Each finder says which rows, by position.

None sees everything: a wrong answer that runs passes `execution`, a rare question has no like to disagree with. So their precision and
recall are counted on rows of which it is known (`counted`). Ranking by loss stands with the other rankings (`suspects.by_loss`).
"""

import re
from collections import Counter, defaultdict

from helpers import flights
from helpers import sql as safe
from helpers.domain import Domain
from helpers.flights import FLIGHTS
from helpers.trust.suspects import answer_key

PATIENCE = 20.0  # seconds that a query may take here: a busy machine makes no answer wrong
NEIGHBOURS = 8  # questions that are most alike in words


def execution(rows: list[dict], domain: Domain = FLIGHTS, most: int | None = None) -> dict[str, list[int]]:
    """Positions of rows whose answer doesn't run ("fails"), and of those that return nothing, NULL or 0 alone ("empty"); refusals pass.

    Queries run read-only under limits, in a process that can be killed. `most`: at most so many rows, spread over the file. An empty
    result isn't always a mistake: a question about a value that isn't there has none.
    """
    found: dict[str, list[int]] = {"fails": [], "empty": []}
    chosen = range(len(rows)) if most is None or most >= len(rows) else sorted({i * len(rows) // most for i in range(most)})
    kept: dict[str, str | None] = {}
    with domain.worker() as worker:
        for i in chosen:
            query = rows[i]["sql"]
            if query == domain.refusal:
                continue
            if query not in kept:
                kept[query] = _outcome(worker, query)
            if kept[query]:
                found[kept[query]].append(i)
    return found


def _outcome(worker, query: str) -> str | None:
    try:
        lines = worker.run(query, PATIENCE).rows
    except safe.SqlError as error:
        return None if error.reason in ("time", "killed") else "fails"
    return None if any(value not in (None, 0) for line in lines for value in line) else "empty"


# ---------------------------------------------------------------- agreement


def agreement(rows: list[dict], neighbours: int = NEIGHBOURS) -> list[float]:
    """How much each row's answer disagrees with those of the questions most like its own, 0 to 1 and more: paraphrases should have answers alike.

    Two parts are added. Form: the words of the answer beside those of the nearest questions' answers (TF-IDF of the questions), less what
    these differ among themselves. Values: a text or number in the answer that nothing in the question goes with, in this row or others.
    """
    return [form + value for form, value in zip(_form(rows, neighbours), _values(rows), strict=True)]


def _form(rows: list[dict], neighbours: int) -> list[float]:
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = [re.sub(r"\d+", "0", row["question"].lower()) for row in rows]
    matrix = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+").fit_transform(texts)
    parts, found = [_parts(row["sql"]) for row in rows], []
    for start in range(0, len(rows), 500):
        similar = (matrix[start : start + 500] @ matrix.T).toarray()
        for i, line in enumerate(similar, start):
            line[i] = -1
            near = [int(j) for j in np.argpartition(-line, min(neighbours, len(line) - 1))[:neighbours] if j != i]
            own = sum(_shared(parts[i], parts[j]) for j in near) / max(1, len(near))
            pairs = [_shared(parts[a], parts[b]) for n, a in enumerate(near) for b in near[:n]]
            found.append(max(0.0, (sum(pairs) / len(pairs) if pairs else 0.0) - own))
    return found


def _parts(sql: str) -> frozenset[str]:
    """What an answer is made of, values and aliases aside: functions with their columns, columns, GROUP BY, DESC, …"""
    plain = re.sub(r"'[^']*'|\b\d+(\.\d+)?\b| AS \w+", "", sql)
    return frozenset(re.findall(r"\w+\(\w*\*?\)|\b(?!ROUND\b|SELECT\b|FROM\b|WHERE\b|AND\b|flights\b)\w+|[<>=!]+", plain))


def _shared(a: frozenset, b: frozenset) -> float:
    return len(a & b) / len(a | b) if a | b else 1.0


def _literals(sql: str) -> set[str]:
    """The values that an answer compares with: texts, and numbers that aren't LIMIT's or ROUND's."""
    sql = re.sub(r"LIMIT \d+|, \d+\)", "", sql)
    return set(re.findall(r"'([^']*)'", sql)) | set(re.findall(r"(?<=[=<>] )\d+\b|(?<=AND )\d+\b", sql))


def _values(rows: list[dict]) -> list[float]:
    words, literals = [set(flights.words(row["question"])) for row in rows], [_literals(row["sql"]) for row in rows]
    with_word, both = Counter(word for said in words for word in said), defaultdict(Counter)
    for said, values in zip(words, literals, strict=True):
        for value in values:
            both[value].update(said)
    found = []
    for said, values in zip(words, literals, strict=True):
        unsaid = 0
        for value in values:
            plain = set(flights.words(value.replace("%", "")))
            known = plain <= said or any((both[value][word] - 1) >= 0.3 * max(1, with_word[word] - 1) and both[value][word] > 1 for word in said)
            unsaid += not known
        found.append(unsaid / len(values) if values else 0.0)
    return found


# ---------------------------------------------------------------- copies and leaks


def near_duplicates(rows: list[dict], least: float = 0.8) -> list[tuple[int, int]]:
    """Pairs of rows with the same answer whose questions are alike: cosine similarity of TF-IDF over parts of words, `least` or more (1: the same).

    With other answers they aren't copies: "in March" and "in April" are alike and ask for different things.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    groups = defaultdict(list)
    for i, row in enumerate(rows):
        groups[answer_key(row["sql"])].append(i)
    matrix = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True, use_idf=False).fit_transform([row["question"] for row in rows])
    found = []
    for at in (at for at in groups.values() if len(at) > 1):
        similar = (matrix[at] @ matrix[at].T).toarray()
        found += [(a, b) for m, b in enumerate(at) for n, a in enumerate(at[:m]) if similar[m, n] >= least]
    return sorted(found)


def contradictions(rows: list[dict]) -> list[tuple[int, int]]:
    """Pairs of rows that ask the same, capitals and marks aside, and have other answers."""
    first: dict[tuple, int] = {}
    found = []
    for i, row in enumerate(rows):
        j = first.setdefault(flights.words(row["question"]), i)
        if j != i and answer_key(rows[j]["sql"]) != answer_key(row["sql"]):
            found.append((j, i))
    return found


def leaked(rows: list[dict], held_out: list[dict]) -> list[int]:
    """Positions of rows whose question is a held-out one, capitals and marks aside."""
    known = {flights.words(row["question"]) for row in held_out}
    return [i for i, row in enumerate(rows) if flights.words(row["question"]) in known]


def counted(found, truth) -> dict:
    """A finder judged on rows of which it is known: {"found", "bad", "hits", "precision", "recall"}; precision and recall are None without a count under them."""
    found, truth = set(found), set(truth)
    hits = len(found & truth)
    return {"found": len(found), "bad": len(truth), "hits": hits, "precision": hits / len(found) if found else None, "recall": hits / len(truth) if truth else None}
