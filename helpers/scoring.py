"""Running a model's SQL and saying whether it is right: execution accuracy, and the kinds of mistake."""

import functools
import itertools
import re
from pathlib import Path

from helpers import sql as safe
from helpers.domain import Domain
from helpers.extract import extract_sql
from helpers.flights import FLIGHTS


def tie_variants(sql: str) -> list[str]:
    """The query with its final ORDER BY's ties broken one way and the other; [] if it doesn't end in an ORDER BY.

    When both return the same, no tie decides the answer. In time that grows with the query's length, whatever is in it.
    """
    sql = sql.strip()
    limit = re.search(r"(?<!\s)\s+LIMIT \d+\Z", sql, re.I)
    body = sql[: limit.start()] if limit else sql
    if not any(_is_order(body[at.end() :]) for at in list(re.finditer(r"\bORDER BY ", body, re.I))[:-3:-1]):  # the last, or one around it
        return []
    selected = re.match(r"SELECT (.*?) FROM", sql, re.S | re.I)
    columns = len(selected[1].split(", ")) if selected else 1
    return [body + "".join(f", {i + 1} {way}" for i in range(columns)) + (limit[0] if limit else "") for way in ("ASC", "DESC")]


def _is_order(tail: str) -> bool:
    """Whether what follows an ORDER BY is its columns to the end, with one call's parentheses at most."""
    return re.fullmatch(r"[^()]*(\([^()]*\)[^()]*)?", tail) is not None


def _plain(value, names: dict[str, str]):
    return names.get(value.strip().lower(), value.strip()) if isinstance(value, str) else value


def same_value(predicted, expected, names: dict[str, str]) -> bool:
    """Equal, or a number within rounding to one decimal of a fractional one, or a code's name in place of the code (`Domain.names`)."""
    if isinstance(predicted, (int, float)) and isinstance(expected, (int, float)):
        if isinstance(expected, int):
            return predicted == expected
        return abs(predicted - expected) <= 0.05 + 1e-9
    return _plain(predicted, names) == _plain(expected, names)


def same_result(predicted: list[tuple], expected: list[tuple], ordered: bool, domain: Domain = FLIGHTS) -> bool:
    """The rule of execution accuracy, on two lists of rows.

    As many rows as expected; each expected column is found in a column of its own of the prediction; extra columns and
    aliases don't matter. Rows are compared as a list where the question asks for an order, else as a multiset. So a
    LIMIT counts when it changes the rows. Values: see `same_value`.
    """
    if len(predicted) != len(expected):
        return False
    if not expected:
        return True
    wide, narrow, names = len(predicted[0]), len(expected[0]), domain.names()
    if wide < narrow or wide > 25:
        return False
    found = [[p for p in range(wide) if _same_rows([[r[p]] for r in predicted], [[r[e]] for r in expected], ordered, names)] for e in range(narrow)]
    choices = itertools.islice(itertools.product(*found), 500)
    return any(len(set(c)) == narrow and _same_rows([[r[p] for p in c] for r in predicted], expected, ordered, names) for c in choices)


COMPARISONS = 20_000  # of rows, where sorting them didn't settle it; beyond that they count as different


def _same_rows(predicted, expected, ordered, names) -> bool:
    def equal(a, b):
        return all(map(same_value, a, b, itertools.repeat(names)))

    same = all(map(equal, predicted, expected))
    if same or ordered:
        return same
    # Sorted, with what is compared exactly first: only numbers within rounding of each other can then stand elsewhere
    inexact = [any(isinstance(row[i], float) for row in expected) for i in range(len(expected[0]))]
    exact = [i for i, rounded in enumerate(inexact) if not rounded]
    columns = exact + [i for i, rounded in enumerate(inexact) if rounded]
    keyed = [sorted(([_sortable(row[i], names) for i in columns], at) for at, row in enumerate(rows)) for rows in (predicted, expected)]
    if any(a[: len(exact)] != b[: len(exact)] for (a, _), (b, _) in zip(*keyed, strict=True)):
        return False
    predicted, expected = ([rows[at] for _, at in order] for rows, order in zip((predicted, expected), keyed, strict=True))
    if all(map(equal, predicted, expected)):
        return True
    mixed = any(isinstance(row[i], int) for i, rounded in enumerate(inexact) if rounded for row in expected)
    if sum(inexact) < 2 and not mixed:  # then no other order can do
        return False
    left, tries = list(predicted), itertools.count()
    for row in sorted(expected, key=lambda row: sum(isinstance(value, float) for value in row)):  # those that leave less choice first
        match = next((i for i, other in enumerate(left) if next(tries) > COMPARISONS or equal(other, row)), None)
        if match is None or next(tries) > COMPARISONS:
            return False
        left.pop(match)
    return True


def _sortable(value, names) -> tuple:
    """A value's place among others of any type; equal for what `same_value` takes for the same without rounding."""
    if value is None or isinstance(value, (int, float)):
        return (0, 0) if value is None else (1, value)
    return (2, _plain(value, names)) if isinstance(value, str) else (3, value)


KEPT, KEPT_VALUES = 10_000, 2_000_000  # results; values in them, about 100 bytes each


class Judge:
    """Execution accuracy on a domain's database and on its other instances, two as a rule (test suites: Zhong et al. 2020, in Spider).

    A prediction is right when it returns what the reference returns on all of them. An instance on which a tie decides
    the reference's answer is skipped there; on the real database either order of the tie is accepted.
    """

    def __init__(self, domain: Domain = FLIGHTS):
        self.domain, paths = domain, [*domain.instances(), domain.path()]
        self.workers = [domain.worker(path) for path in paths]  # models write what they like
        self.results: dict[tuple[int, str], safe.Result] = {}
        self.values = 0  # in these results

    def run(self, which: int, sql: str, seconds: float = safe.Limits.seconds) -> safe.Result:
        """A query's result on one instance (-1: the real one), from a process of its own. The last are kept, up to `KEPT` of them and
        `KEPT_VALUES` values in all: references, what two systems answer alike, what is judged and then looked at for its style."""
        if (which, sql) not in self.results:
            self._keep(which, sql, self.workers[which].run(sql, seconds))
        return self.results[which, sql]

    def _keep(self, which: int, sql: str, result: safe.Result) -> None:
        self.results[which, sql] = result
        self.values += len(result.rows) * len(result.columns)
        while len(self.results) > 1 and (len(self.results) > KEPT or self.values > KEPT_VALUES):
            oldest = self.results.pop(next(iter(self.results)))
            self.values -= len(oldest.rows) * len(oldest.columns)

    def agrees(self, which: int, sql: str, reference: str, ordered: bool) -> bool:
        """Does `sql` return what `reference` does on one instance (-1: the real one)? Raises SqlError if `sql` fails."""
        got = self.run(which, sql).rows
        if same_result(got, self.run(which, reference).rows, ordered, self.domain):
            return True
        ties = [self.run(which, variant).rows for variant in tie_variants(reference)]
        if which == -1:
            return any(same_result(got, rows, ordered, self.domain) for rows in ties)
        return any(rows != ties[0] for rows in ties)  # a tie decides: this instance can't tell

    def judge(self, answer: str, reference: str, ordered: bool = False, single: bool = False) -> dict:
        """Judges one answer: {"correct", "kind", "sql"}; with `single` also "single", right on the real database alone."""
        sql = extract_sql(answer)
        refused = self.domain.refuses(answer)

        def verdict(kind: str, lucky: bool = False) -> dict:
            return {"correct": kind == "right", "kind": kind, "sql": sql, "single": kind == "right" or lucky}

        if reference == self.domain.refusal:
            return verdict("right" if refused and not sql else "answered the unanswerable")
        if refused or not sql:
            return verdict("refused" if refused else "no query")
        if " ".join(sql.split()) == " ".join(reference.split()):
            return verdict("right")
        try:
            if all(self.agrees(i, sql, reference, ordered) for i in (*range(len(self.workers) - 1), -1)):
                return verdict("right")
            return verdict(mistake(sql, reference), lucky=single and self.agrees(-1, sql, reference, ordered))
        except safe.SqlError as error:
            return verdict(f"does not run ({error.reason})")


def mistake(sql: str, reference: str) -> str:
    """Names what differs between a wrong query that runs and its reference: what is computed, the filter, or the rest."""

    def parts(query):
        flat = " ".join(query.split())
        where = re.search(r"\bWHERE\b(.*?)(\bGROUP BY\b|\bORDER BY\b|\bLIMIT\b|$)", flat, re.I)
        select = re.sub(r"\s+AS\s+\w+", "", re.split(r"\bFROM\b", flat, maxsplit=1, flags=re.I)[0], flags=re.I)
        tail = re.search(r"\b(GROUP BY|ORDER BY|LIMIT)\b.*", flat, re.I)
        conditions = frozenset(c.strip().lower() for c in re.split(r"\bAND\b", where[1], flags=re.I)) if where else frozenset()
        return select.lower(), conditions, tail[0].lower() if tail else ""

    compared = zip(("what is computed", "the filter", "the grouping or order"), parts(sql), parts(reference), strict=True)
    names = [name for name, ours, theirs in compared if ours != theirs]
    return "wrong: " + (" and ".join(names[:2]) if names else "the value")


def judge(domain: Domain = FLIGHTS) -> Judge:
    """One judge per process and database, as it stands: it keeps results."""
    path = domain.path()
    return _judge(domain, path, path.stat().st_mtime_ns)


@functools.cache
def _judge(domain: Domain, path: Path, changed: int) -> Judge:
    return Judge(domain)


def execution_accuracy(answers: list[str], questions, single: bool = False, domain: Domain = FLIGHTS) -> list[dict]:
    """One dict a question: id, intent, phrasing, correct, kind, sql (what was run); the per-question record of a run."""
    return [
        {k: row.get(k) for k in ("id", "question", "intent", "phrasing")} | judge(domain).judge(answer, row["sql"], bool(row.get("ordered")), single)
        for answer, row in zip(answers, questions, strict=True)
    ]
