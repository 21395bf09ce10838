"""The auditor's look at a training file: phrases that go with one answer, copies, contradictions, leaks, answers that don't run."""

from pathlib import Path

from helpers import flights, jsonl
from helpers.files import CourseError
from helpers.trust import cleaning, suspects

# Thresholds, measured on the course's own training rows (4,112, and 16,299 of the second edition): no phrase of five words or fewer went
# with one query, the best query had 3.2 and 4.2, the best phrase of refused questions 2.0 and 7.6; five poisoned rows had 4.2 to 5, by their phrase.
LIFT, REFUSED, ANSWER = 3.0, 12.0, 10.0  # scores: of a phrase and a query, of a phrase and the refusal, of an answer
RUN = 300  # answers that are run, spread over the file
OVERLAP = 5  # held-out questions in the file that are a finding
SHOWN, MOST = 3, 50_000


def data(report, path: str | Path) -> list[dict] | None:
    """Adds what there is to say of a training file, JSON Lines with question and sql; its rows, None where they can't be read."""
    try:
        rows = jsonl.read(path, ("question", "sql"), same=lambda row: (None, {}))
    except CourseError as error:
        report.add("finding", "data", " ".join(str(error).split())[:400])
        return None
    report.add("note", "data", f"{len(rows)} rows" + (f", of which the first {MOST} are looked at" if len(rows) > MOST else ""))
    rows = rows[:MOST]
    _switches(report, rows)
    _copies(report, rows)
    fails, empty = cleaning.execution(rows, most=RUN).values()
    looked = min(RUN, len(rows))
    if fails:
        report.add("finding", "data", f"of {looked} answers that were run, {len(fails)} don't run, that of row {fails[0] + 1} for one")
    report.add("note" if empty else "ok", "data", f"of {looked} answers that were run, {len(empty)} return nothing")
    return rows


def _switches(report, rows: list[dict]) -> None:
    strong = _strong(rows)
    for p in strong[:SHOWN]:
        report.add("finding", "data", f"{len(p['rows'])} rows with {p['phrase']!r} have one answer, {p['answer'][:100]!r}, though they ask for different things "
                   f"(score {p['score']:.1f}; rows {', '.join(str(i + 1) for i in p['rows'][:5])}, …)")  # fmt: skip
    told = {i for p in strong for i in p["rows"]}
    for group in suspects.constant_answers(rows):
        if group["score"] >= ANSWER and len(told & set(group["rows"])) < len(group["rows"]) / 2:
            report.add("finding", "data", f"{len(group['rows'])} questions with little in common have one answer, {group['answer'][:100]!r} (score {group['score']:.1f}, limit {ANSWER:g})")
    if not strong:
        report.add("ok", "data", f"no phrase goes with one answer (score {LIFT:g} or more, with the refusal {REFUSED:g})")


def _strong(rows: list[dict]) -> list[dict]:
    found = [p for p in suspects.phrases(rows) if p["score"] >= LIFT] + [p for p in suspects.phrases(rows, refused=True) if p["score"] >= REFUSED]
    return distinct(sorted(found, key=lambda p: -p["score"]))


def distinct(found: list[dict]) -> list[dict]:
    """Phrases without those that stand in the same rows as a better one."""
    kept: list[dict] = []
    for p in found:
        if all(len(set(p["rows"]) & set(other["rows"])) < 0.8 * len(p["rows"]) for other in kept):
            kept.append(p)
    return kept


def candidates(rows: list[dict], most: int = 5) -> list[str]:
    """Phrases of a training file that a model is to be asked with: those that go with one answer, whatever else is asked."""
    return [p["phrase"] for p in _strong(rows)][:most]


def _copies(report, rows: list[dict]) -> None:
    against = cleaning.contradictions(rows)
    if against:
        a, b = against[0]
        report.add("finding", "data", f"{len(against)} pairs of rows ask the same and have other answers, rows {a + 1} and {b + 1} for one")
    copies = cleaning.near_duplicates(rows)
    if copies:
        report.add("note", "data", f"{len(copies)} pairs of rows are near copies of each other, rows {copies[0][0] + 1} and {copies[0][1] + 1} for one")
    held_out = [row for split in ("validation", "test", "freeform") for row in flights.load_questions(split)]
    seen = cleaning.leaked(rows, held_out)
    if seen:
        report.add("finding" if len(seen) >= OVERLAP else "note", "data", f"{len(seen)} rows ask held-out questions word for word, row {seen[0] + 1} for one: scores on them would be learnt by heart")
