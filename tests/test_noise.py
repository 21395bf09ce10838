"""Rows made worse on purpose, and found again: what is promised of both, on a few rows and the real database."""

import pytest

from helpers.files import CourseError
from helpers.flights import REFUSAL
from helpers.scoring import judge
from helpers.trust import cleaning, noise


def row(question, sql, intent="count", **more):
    return {"question": question, "sql": sql, "intent": intent} | more


CARRIERS = {"UA": "United", "DL": "Delta", "AA": "American", "B6": "JetBlue"}
ROWS = [row(f"how many {name} flights left {airport}", f"SELECT COUNT(*) FROM flights WHERE carrier = '{code}' AND origin = '{airport}'")
        for code, name in CARRIERS.items() for airport in ("JFK", "LGA")]  # fmt: skip
ROWS += [row(f"mean delay at departure from {a}", f"SELECT AVG(dep_delay) FROM flights WHERE origin = '{a}'", "delay") for a in ("JFK", "LGA", "EWR")]
ROWS += [row("will it rain", REFUSAL, "unanswerable"), row("flights of Ghost Air", "SELECT COUNT(*) FROM flights WHERE carrier = 'ZZ'")]


def changed(rows):
    return [i for i, (old, new) in enumerate(zip(ROWS, rows, strict=True)) if old != new]


@pytest.mark.parametrize("kind", ["swapped", "changed", "broken"])
def test_wrong_answers_are_wrong_as_many_as_asked_and_the_same_for_a_seed(kind):
    rows = noise.wrong_answers(ROWS, 4 / len(ROWS), seed=3, kinds=(kind,))
    places = changed(rows)
    assert len(places) == 4 and max(places) < 11 and rows == noise.wrong_answers(ROWS, 4 / len(ROWS), seed=3, kinds=(kind,))  # no refusal, no ghost
    for i in places:
        assert rows[i]["noise"] == kind and rows[i]["right"] == ROWS[i]["sql"] and rows[i]["question"] == ROWS[i]["question"]
        verdict = judge().judge(rows[i]["sql"], ROWS[i]["sql"])
        assert not verdict["correct"] and verdict["kind"].startswith("does not run" if kind == "broken" else "wrong")
    assert noise.wrong_answers(ROWS, 0) == ROWS


def test_kinds_take_turns():
    rows = noise.wrong_answers(ROWS, 6 / len(ROWS), seed=1)
    assert sorted(r["noise"] for r in rows if "noise" in r) == ["changed"] * 3 + ["swapped"] * 3


def test_what_cant_be_made_is_said():
    with pytest.raises(CourseError, match="Only 11 of 13 rows could be made wrong, and 13 were asked for"):
        noise.wrong_answers(ROWS, 1.0)
    with pytest.raises(CourseError, match="A share from 0 to 1"):
        noise.wrong_answers(ROWS, 1.5)
    with pytest.raises(CourseError, match="take a number from 0 to 6"):
        noise.near_copies(ROWS, 7)
    with pytest.raises(CourseError, match="take a number from 0 to 2"):
        noise.leak(ROWS, ROWS[:2], 3)


def test_copies_and_leaks_take_places_and_are_found():
    copied = noise.near_copies(ROWS, 2, seed=0)
    places = [i for i, r in enumerate(copied) if r.get("noise") == "copy"]
    pairs = cleaning.near_duplicates(copied)
    assert len(copied) == len(ROWS) and len(places) == 2 and len(pairs) == 2 and all(set(pair) & set(places) for pair in pairs)
    assert cleaning.near_duplicates(ROWS) == []
    held_out = [row("How many flights in May?", "SELECT 1"), row("Longest flight?", "SELECT 2")]
    seen = noise.leak(ROWS, held_out, 1, seed=0)
    assert len(seen) == len(ROWS) and cleaning.leaked(seen, held_out) == [i for i, r in enumerate(seen) if r.get("noise") == "leak"] != []
    assert cleaning.leaked(seen, [row("how many flights in MAY", ""), row("longest flight", "")]) == cleaning.leaked(seen, held_out)


def test_execution_finds_what_does_not_run_and_nothing_that_does():
    rows = [*ROWS[:3], row("x", "SELECT COUNT(* FROM flights"), row("y", "SELECT secret FROM elsewhere"), ROWS[-1], ROWS[-2]]
    assert cleaning.execution(rows) == {"fails": [3, 4], "empty": [5]}
    assert cleaning.execution(noise.wrong_answers(ROWS, 4 / len(ROWS), kinds=("swapped",)))["fails"] == []  # a wrong answer that runs
    assert cleaning.execution(rows, most=1) == {"fails": [], "empty": []}


def test_agreement_ranks_what_disagrees_with_its_like_first():
    rows = [row(f"how many flights were there in {m} at {a}", f"SELECT COUNT(*) FROM flights WHERE month = {n} AND origin = '{a}'")
            for n, m in enumerate(("January", "February", "March", "April"), 1) for a in ("JFK", "LGA", "EWR")]  # fmt: skip
    clean = cleaning.agreement(rows)
    other = list(rows)
    other[5] = rows[5] | {"sql": "SELECT MAX(arr_delay) FROM flights WHERE month = 2 AND origin = 'EWR'"}  # another form
    other[7] = rows[7] | {"sql": "SELECT COUNT(*) FROM flights WHERE month = 11 AND origin = 'LGA'"}  # another value
    scores = cleaning.agreement(other)
    assert max(clean) < 0.2 and sorted(range(12), key=lambda i: -scores[i])[:2] in ([5, 7], [7, 5])


def test_contradictions_and_counts():
    assert cleaning.contradictions([row("How late?", "SELECT 1"), row("how late", "select 1;"), row("HOW late!", "SELECT 2")]) == [(0, 2)]
    assert cleaning.counted([1, 2, 3, 4], [2, 4, 9]) == {"found": 4, "bad": 3, "hits": 2, "precision": 0.5, "recall": 2 / 3}
    assert cleaning.counted([], []) == {"found": 0, "bad": 0, "hits": 0, "precision": None, "recall": None}
