"""Exercises of notebook 00: what their checks try, and the mistakes that they know."""

from course.exercises.comparing import compare
from helpers.checks import Verdict, check, right, wrong

DELAYS = "SELECT airline, AVG(dep_delay) FROM flights WHERE origin = 'JFK' AND month = 7 GROUP BY airline ORDER BY AVG(dep_delay) DESC"
LONGEST = "SELECT MAX(dep_delay) FROM flights WHERE carrier = 'HA'"


def rows_of(answer: str) -> list:
    """What an answer's SQL returns on the real database; SqlError where it doesn't run."""
    from helpers import flights, scoring, worker

    return worker.run_untrusted(scoring.extract_sql(answer) or answer, flights.database_path()).rows


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
