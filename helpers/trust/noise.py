"""Training rows made worse on purpose, always the same way for a seed: wrong answers at a given share, near copies, a leak from held-out questions.

The number of rows stays, so that equal steps see equally many. What was done to a row stands in it: "noise" names it, and "right" keeps
the answer that was taken away. So what a cleaner finds can be counted.
"""

import contextlib
import itertools
import random
import re

from helpers import sql as safe
from helpers.domain import Domain
from helpers.files import CourseError
from helpers.flights import FLIGHTS
from helpers.scoring import Judge, judge

KINDS = ("swapped", "changed")  # and "broken", which doesn't run
PATIENCE = 20.0  # seconds that a query may take here
TRIES = 12  # of other answers, before another row is taken
CHANGES = (  # pattern → what it becomes: what a hurried person mixes up
    (r"\bdep_delay\b", "arr_delay"), (r"\barr_delay\b", "dep_delay"), (r"\bAVG\(", "MAX("), (r"\bMAX\(", "AVG("), (r"\bMIN\(", "MAX("),
    (r"\bSUM\(", "AVG("), (r" DESC\b", ""), (r"(ORDER BY (?:\w+\([^()]*\)|\w+))(?! (?:DESC|ASC))", r"\1 DESC"), (r" > ", " < "), (r" <= ", " > "),
    (r" AND [^()]*?(?= AND | GROUP BY | ORDER BY |$)", ""), (r"'JFK'", "'EWR'"), (r"'EWR'", "'LGA'"), (r"'LGA'", "'JFK'"),
    (r"\bmonth = 1\b", "month = 2"), (r"\bmonth = (?!1\b)\d+", "month = 1"), (r"\bcarrier = '\w+'", "carrier = 'UA'"), (r"\bdest = '\w+'", "dest = 'ORD'"),
)  # fmt: skip


def wrong_answers(rows: list[dict], share: float, seed: int = 0, kinds=KINDS, domain: Domain = FLIGHTS) -> list[dict]:
    """As many rows in the same order, this share (0 to 1) of them with a wrong answer: one that runs and doesn't return what the right one does, by
    the judge of execution accuracy; each kind as often, as far as it goes.

    swapped: the answer of another row of the same intent (of any row, where there are no intents, or too few). changed: the right one with one thing mixed up
    (`CHANGES`). broken: the right one cut off, so that it doesn't run. Rows without a result to tell apart (refusals, invented values) are passed over.
    CourseError where fewer can be made wrong than are asked for.
    """
    if not 0 <= share <= 1 or not set(kinds) <= {*KINDS, "broken"} or not kinds:
        raise CourseError(f"A share from 0 to 1 and kinds among {', '.join(KINDS)}, broken are needed, not {share} and {kinds}.")
    rng, judges, want = random.Random(seed), judge(domain), round(share * len(rows))
    order, made = rng.sample(range(len(rows)), len(rows)), {}
    by_intent: dict[str | None, list[dict]] = {}
    for row in rows:
        by_intent.setdefault(row.get("intent"), []).append(row)
    for i in order:
        if len(made) == want:
            break
        row = rows[i]
        if row["sql"] == domain.refusal or not _has_result(judges, row["sql"]):
            continue
        for kind in rng.sample(kinds[:], len(kinds)) if len(made) % len(kinds) == 0 else sorted(kinds, key=lambda k: sum(m["noise"] == k for m in made.values())):
            if other := next((sql for sql in _others(row, kind, by_intent, rows, rng) if _is_wrong(judges, sql, row, kind)), None):
                made[i] = row | {"sql": other, "noise": kind, "right": row["sql"]}
                break
    if len(made) < want:
        raise CourseError(f"Only {len(made)} of {len(rows)} rows could be made wrong, and {want} were asked for: take a smaller share, or more rows.")
    return [made.get(i, row) for i, row in enumerate(rows)]


def _has_result(judges: Judge, sql: str) -> bool:
    try:
        return any(value not in (None, 0) for line in judges.run(-1, sql, PATIENCE).rows for value in line)
    except safe.SqlError:
        return False


def _others(row: dict, kind: str, by_intent: dict, rows: list[dict], rng: random.Random):
    """Candidates for a wrong answer, at most `TRIES` of each source."""
    if kind == "broken":
        yield row["sql"][: max(8, rng.randrange(len(row["sql"]) // 2, len(row["sql"])))]
    elif kind == "changed":
        tried = [re.sub(pattern, to, row["sql"], count=1) for pattern, to in rng.sample(CHANGES, len(CHANGES))]
        yield from [sql for sql in tried if sql != row["sql"]][:TRIES]
    else:
        for source in (by_intent[row.get("intent")], rows):
            yield from (other["sql"] for other in rng.sample(source, min(TRIES, len(source))) if other["sql"] != row["sql"])


def _is_wrong(judges: Judge, sql: str, row: dict, kind: str) -> bool:
    if sql == judges.domain.refusal:
        return False
    for which, query in itertools.product((*range(len(judges.workers) - 1), -1), (row["sql"], sql)):
        with contextlib.suppress(safe.SqlError):
            judges.run(which, query, PATIENCE)  # kept for the judge: what a busy machine takes long for doesn't change the rows
    verdict = judges.judge(sql, row["sql"], bool(row.get("ordered")))
    return not verdict["correct"] and (verdict["kind"].startswith("wrong") if kind != "broken" else verdict["kind"].startswith("does not run"))


def near_copies(rows: list[dict], n: int, seed: int = 0) -> list[dict]:
    """As many rows, n of them replaced by near copies of others: the same answer, and a question with another beginning, end or mark."""
    _check_number(n, len(rows) // 2, "replaced by copies")
    rng = random.Random(seed)
    places = rng.sample(range(len(rows)), 2 * n)
    out = list(rows)
    for place, source in zip(places[:n], places[n:], strict=True):
        out[place] = rows[source] | {"question": _reworded(rows[source]["question"], rng), "noise": "copy"}
    return out


def _reworded(question: str, rng: random.Random) -> str:
    body = question.strip().rstrip("?.! ")
    ways = (f"{body.lower()}", f"{body}!", f"Please: {body}?", f"{body} please", f"So, {body}?", f"Tell me: {body}.")
    return rng.choice([way for way in ways if way != question])


def leak(rows: list[dict], held_out: list[dict], n: int, seed: int = 0) -> list[dict]:
    """As many rows, n of them replaced by held-out questions with their answers: what then counts as unseen was learnt by heart."""
    _check_number(n, min(len(rows), len(held_out)), "replaced by held-out questions")
    rng = random.Random(seed)
    out = list(rows)
    for place, row in zip(rng.sample(range(len(rows)), n), rng.sample(list(held_out), n), strict=True):
        out[place] = dict(row) | {"noise": "leak"}
    return out


def _check_number(n: int, most: int, what: str) -> None:
    if not 0 <= n <= most:
        raise CourseError(f"{n} rows can't be {what}: take a number from 0 to {most}.")
