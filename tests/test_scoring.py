"""Execution accuracy: what matches, what doesn't, and that a broken query doesn't score."""

import random
import re
import time

import pytest

from helpers import flights, generation, intervals, scoring
from helpers.files import CourseError
from helpers.scoring import extract_sql, same_result, same_value
from helpers.worker import Worker

EXTRACT = {
    "SELECT 1": "SELECT 1",
    "SELECT 1;": "SELECT 1",
    "Sure! Here it is:\n```sql\nSELECT COUNT(*)\nFROM flights;\n```\nIt counts.": "SELECT COUNT(*)\nFROM flights",
    "```\nSELECT 1\n```": "SELECT 1",
    "```sql\nSELECT 1": "SELECT 1",
    "The query is SELECT dest FROM flights\n\nThis lists them.": "SELECT dest FROM flights",
    "SELECT ';' FROM flights; DROP TABLE flights": "SELECT ';' FROM flights",
    "SELECT 'it''s; fine' FROM flights": "SELECT 'it''s; fine' FROM flights",
    "Here: with a as (select 1) select * from a": "with a as (select 1) select * from a",
    "WITH RECURSIVE t(n) AS (SELECT 1) SELECT n FROM t": "WITH RECURSIVE t(n) AS (SELECT 1) SELECT n FROM t",
    "```sql\nSELECT 1;\n```\n```sql\nSELECT 2\n```": "SELECT 1",
    "-- count them; all\nSELECT COUNT(*) -- don't; stop\n\nFROM flights": "SELECT COUNT(*) -- don't; stop\n\nFROM flights",
    "-- SELECT 2 would be wrong\nSELECT 1": "SELECT 1",
    "/* SELECT 2; */ SELECT 1 /* ; */ + 1": "SELECT 1 /* ; */ + 1",
    'SELECT 1 AS "a;b"': 'SELECT 1 AS "a;b"',
    'SELECT 1 AS "a\n;b': 'SELECT 1 AS "a',
    "SELECT origin,\n\n  dest\n \nfrom flights\n\nWHERE month = 1": "SELECT origin,\n\n  dest\n \nfrom flights\n\nWHERE month = 1",
    "SELECT COUNT(\n\n*)": "SELECT COUNT(\n\n*)",
    "WITH a AS (\nSELECT 1\n)\n\nSELECT * FROM a\n\nSELECT 2": "WITH a AS (\nSELECT 1\n)\n\nSELECT * FROM a",
    "SELECT dest FROM flights\n\nFrom this we see": "SELECT dest FROM flights",
    "SELECT dest FROM flights\n\nSELECT origin FROM flights": "SELECT dest FROM flights",
    "I can't help with that.": "",
    "": "",
    "The selection is yours": "",
}


@pytest.mark.parametrize(("answer", "expected"), EXTRACT.items())
def test_extract_sql(answer, expected):
    assert extract_sql(answer) == expected


@pytest.mark.parametrize(
    ("predicted", "expected", "same"),
    [
        (3, 3, True),
        (3.0, 3, True),
        (3.04, 3, False),  # a count is exact
        (12.3, 12.345, True),  # rounded to one decimal
        (12.2, 12.345, False),
        (12.0, 12.345, False),  # rounded to none
        ("DL", "DL", True),
        ("Delta Air Lines Inc.", "DL", True),  # a code's name for the code
        ("DL", "Delta Air Lines Inc.", True),
        ("Los Angeles", "LAX", True),
        ("Chicago", "ORD", False),  # two airports: the city isn't a name for one
        (None, None, True),
        (None, 0, False),
        ("3", 3, False),
    ],
)
def test_same_value(predicted, expected, same):
    assert same_value(predicted, expected, flights.names()) is same


@pytest.mark.parametrize(
    ("predicted", "expected", "ordered", "same"),
    [
        ([(1,)], [(1,)], False, True),
        ([(1, "x")], [(1,)], False, True),  # an extra column
        ([("x", 1)], [(1,)], False, True),
        ([(1,)], [(1, 2)], False, False),  # a missing column
        ([(1, 2)], [(2, 1)], False, True),  # columns in another order
        ([("a",), ("b",)], [("b",), ("a",)], False, True),
        ([("a",), ("b",)], [("b",), ("a",)], True, False),  # the order was asked for
        ([("a",)], [("a",), ("b",)], False, False),  # a LIMIT that cuts rows
        ([("a",), ("a",)], [("a",), ("b",)], False, False),  # a multiset, not a set
        ([(1, 10), (2, 20)], [(1, 20), (2, 10)], False, False),  # right columns, rows mixed up
        ([], [], False, True),
        ([], [(1,)], False, False),
        ([(1, 1)], [(1, 1)], False, True),
        ([(1, 2)], [(1, 1)], False, False),  # one column can't serve twice
    ],
)
def test_same_result(predicted, expected, ordered, same):
    assert same_result(predicted, expected, ordered) is same


def test_tie_variants():
    assert scoring.tie_variants("SELECT a FROM flights") == []
    assert scoring.tie_variants("SELECT a FROM flights ORDER BY b DESC LIMIT 1")[0] == "SELECT a FROM flights ORDER BY b DESC, 1 ASC LIMIT 1"
    assert scoring.tie_variants("SELECT a, b FROM flights GROUP BY a ORDER BY COUNT(*) DESC LIMIT 3") == [
        "SELECT a, b FROM flights GROUP BY a ORDER BY COUNT(*) DESC, 1 ASC, 2 ASC LIMIT 3",
        "SELECT a, b FROM flights GROUP BY a ORDER BY COUNT(*) DESC, 1 DESC, 2 DESC LIMIT 3",
    ]


COUNT = "SELECT COUNT(*) FROM flights WHERE origin = 'JFK'"


@pytest.mark.parametrize(
    ("answer", "reference", "kind"),
    [
        (COUNT, COUNT, "right"),
        ("SELECT COUNT(*) AS flights FROM flights WHERE origin = 'JFK' AND year = 2013", COUNT, "right"),
        ("SELECT COUNT(*) FROM flights", COUNT, "wrong: the filter"),
        ("SELECT COUNT(dep_time) FROM flights WHERE origin = 'JFK'", COUNT, "wrong: what is computed"),
        ("SELECT COUNT(*) FROM planes", COUNT, "does not run"),
        ("no idea", COUNT, "no query"),
        (flights.REFUSAL, COUNT, "refused"),
        (flights.REFUSAL, flights.REFUSAL, "right"),
        (COUNT, flights.REFUSAL, "answered the unanswerable"),
    ],
)
def test_judge(answer, reference, kind):
    verdict = scoring.judge().judge(answer, reference)
    assert verdict["kind"].startswith(kind)
    assert verdict["correct"] is (kind == "right")


def test_a_query_runs_once_on_each_instance_and_the_oldest_results_make_room(monkeypatch):
    judge, ran, run = scoring.Judge(), [], Worker.run
    monkeypatch.setattr(Worker, "run", lambda worker, sql, seconds: ran.append(sql) or run(worker, sql, seconds))
    other = COUNT.replace("*", "1")
    assert all(judge.judge(other, COUNT)["correct"] for _ in range(2)) and ran == [other, COUNT] * 3
    monkeypatch.setattr(scoring, "KEPT", 7)
    assert judge.run(1, "SELECT 1").rows == judge.run(1, "SELECT 1").rows and len(ran) == 7
    judge.run(1, "SELECT 2")
    assert len(judge.results) == 7 and (0, other) not in judge.results and {(0, COUNT), (1, "SELECT 2")} <= judge.results.keys()
    monkeypatch.setattr(scoring, "KEPT_VALUES", 2000)
    judge.run(0, "SELECT dest, origin FROM flights LIMIT 900")
    assert judge.values <= 2000 and len(judge.results) == 7
    judge.run(0, "SELECT dest, origin, month FROM flights LIMIT 900")  # larger than all that may be kept: kept alone
    assert len(judge.results) == 1 and judge.values == 2700


def test_what_no_time_limit_can_stop_is_a_wrong_answer_like_others():
    slow, start = "SELECT printf('%.2147483647c','a'), printf('%.2147483646c','a')", time.monotonic()
    assert scoring.judge().judge(slow, COUNT)["kind"] in ("does not run (killed)", "does not run (too large)")
    assert scoring.judge().judge(COUNT, COUNT.replace("*", "1"))["correct"] and time.monotonic() - start < 20


# ---------------------------------------------------------------- however long


def test_ties_are_looked_for_in_time_that_grows_with_the_query():
    for hostile in (
        "SELECT a FROM b" + " ORDER BY a" * 900,
        "SELECT a FROM b ORDER BY (" + " ORDER BY a(" * 800,
        "SELECT " * 1500 + " FROM a ORDER BY 1",
        " " * 9000 + "x ORDER BY a" + " " * 9000 + "LIMIT 3 x",
        "SELECT a FROM b ORDER BY" + " (" * 5000,
    ):
        start = time.perf_counter()
        scoring.tie_variants(hostile)
        assert time.perf_counter() - start < 10, hostile[:30]  # milliseconds; it was minutes


@pytest.mark.parametrize(
    ("query", "variants"),
    [
        ("SELECT a, b FROM t ORDER BY a LIMIT 3", ["SELECT a, b FROM t ORDER BY a, 1 ASC, 2 ASC LIMIT 3", "SELECT a, b FROM t ORDER BY a, 1 DESC, 2 DESC LIMIT 3"]),
        (" SELECT a FROM t ORDER BY COUNT(*) DESC ", ["SELECT a FROM t ORDER BY COUNT(*) DESC, 1 ASC", "SELECT a FROM t ORDER BY COUNT(*) DESC, 1 DESC"]),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a)", []),
        ("SELECT a FROM t ORDER BY f(g(a))", []),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a) ORDER BY b", ["SELECT a FROM (SELECT a FROM t ORDER BY a) ORDER BY b, 1 ASC", "SELECT a FROM (SELECT a FROM t ORDER BY a) ORDER BY b, 1 DESC"]),
        ("SELECT 1", []),
    ],
)
def test_ties_of_the_last_order(query, variants):
    assert scoring.tie_variants(query) == variants


def test_rows_in_another_order_are_compared_in_time_that_grows_with_them():
    rng, rows = random.Random(0), [(i % 7, i * 1.37, f"x{i % 50}", None) for i in range(1000)]
    mixed = rng.sample(rows, len(rows))
    scoring.same_result(rows[:1], rows[:1], False)  # loads the names of airports
    count = 0
    real = scoring.same_value

    def counted(*values):
        nonlocal count
        count += 1
        return real(*values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "same_value", counted)
        assert scoring.same_result(mixed, rows, False) and not scoring.same_result(mixed, rows, True)
        assert not scoring.same_result([*mixed[1:], (8, 0.0, "x", None)], rows, False)
        assert count < 200_000  # of 16 pairs of columns; every row against every other would be millions
        count, near = 0, [(i / 30, (i * 7 % 1000) / 30) for i in range(1000)]  # within rounding of many others
        assert scoring.same_result(rng.sample(near, len(near)), near, False) in (True, False) and count < 200_000


@pytest.mark.parametrize(
    ("predicted", "expected", "same"),
    [
        ([(1.0, "b"), (1.0, "a")], [(0.97, "b"), (1.04, "a")], True),  # rounded, and sorted otherwise
        ([(1.0, 2.0), (1.0, 1.0)], [(0.98, 2.0), (1.04, 1.0)], True),
        ([(2, 2), (1, "JFK"), (0, 2.05), (0, 1)], [(0, 1), (0, 2.05), (1, "JFK"), (2, 2)], True),  # a whole number beside a near fraction
        ([(1.04,), (1,)], [(1.0,), (1,)], True),
        ([(1.04,), (1.04,)], [(1.0,), (1,)], False),
        ([(None,), ("a",)], [("a",), (None,)], True),
        ([("JFK",), ("LGA",)], [("LaGuardia",), ("John F Kennedy Intl",)], False),
        ([(b"a",), (1,)], [(1,), (b"a",)], True),
        ([(1, 2), (2, 1)], [(1, 1), (2, 2)], False),
    ],
)
def test_rows_as_a_multiset(predicted, expected, same):
    assert scoring.same_result(predicted, expected, False) is same


def test_luck_on_one_database_is_found_out():
    verdict = scoring.judge().judge("SELECT MAX(distance) FROM flights", "SELECT MAX(distance) FROM flights WHERE origin = 'JFK'", single=True)
    assert verdict["single"] and not verdict["correct"]


def broken(sql: str, rng: random.Random) -> list[str]:
    """The query with one thing wrong, each in turn: another column, function, value, comparison, order, limit or filter."""
    swaps = {"dep_delay": "arr_delay", "arr_delay": "dep_delay", "air_time": "distance", "distance": "air_time", "AVG(": "MAX(", "MAX(": "AVG(", "MIN(": "AVG(",
             "SUM(": "AVG(", "COUNT(DISTINCT": "COUNT(", "COUNT(*)": "COUNT(DISTINCT dest)", " DESC LIMIT": " ASC LIMIT", "SELECT carrier": "SELECT flight",
             "SELECT dest": "SELECT origin", "GROUP BY carrier": "GROUP BY origin", "GROUP BY month": "GROUP BY hour", "SELECT month": "SELECT hour",
             "dep_time IS NULL": "dep_time IS NOT NULL", "100.0 * ": "", "origin = 'JFK'": "origin = 'LGA'", "origin = 'EWR'": "origin = 'JFK'", "origin = 'LGA'": "origin = 'EWR'"}  # fmt: skip
    out = [sql.replace(a, b, 1) for a, b in swaps.items() if a in sql]
    for number in set(re.findall(r"(?:=|>|<|>=|AND|LIMIT) (\d+)", sql)):
        other = int(number) + rng.choice([1, 2, 5]) if int(number) < 12 else int(number) // 2
        out.append(re.sub(rf"((?:=|>|<|>=|AND|LIMIT) ){number}\b", rf"\g<1>{other}", sql, count=1))
    conditions = re.search(r" WHERE (.*?)( GROUP BY| ORDER BY|$)", sql)
    if conditions:
        parts = re.sub(r"BETWEEN (\d+) AND", r"BETWEEN \1 &", conditions[1]).split(" AND ")
        for i in range(len(parts)):
            rest = " AND ".join(parts[:i] + parts[i + 1 :]).replace("&", "AND")
            out.append(sql.replace(f" WHERE {conditions[1]}", f" WHERE {rest}" if rest else "", 1))
    return [b for b in dict.fromkeys(out) if b != sql]


@pytest.mark.slow
def test_at_least_95_percent_of_broken_references_are_rejected():
    rng = random.Random(0)
    questions = [q for q in flights.subset(flights.load_questions("validation"), 92) if q["sql"] != flights.REFUSAL]
    accepted, total = [], 0
    for q in questions:
        for wrong in rng.sample(every := broken(q["sql"], rng), min(4, len(every))):
            total += 1
            if scoring.judge().judge(wrong, q["sql"], q["ordered"])["correct"]:
                accepted.append((wrong, q["sql"]))
    assert total > 200
    assert len(accepted) <= 0.05 * total, accepted


def test_every_house_style_answer_matches_the_bare_one():
    import sys

    sys.path.insert(0, str(flights.QUESTIONS))
    from intents import INTENTS

    values = {"delay": 30, "miles": 1000, "low": 500, "high": 1000, "k": 3, "airline": "airline LIKE 'Delta%'"}
    for intent in INTENTS.values():
        own = intent.where.format(**values)
        where = " WHERE origin = 'JFK' AND month = 7" + (f" AND {own}" if own else "")
        bare, styled = (text.format(w=where, **values) for text in (intent.bare, intent.styled))
        assert scoring.judge().agrees(0, styled, bare, intent.ordered), intent.name


# ---------------------------------------------------------------- intervals


def rows(right, intents=1, phrasings=4, each=5):
    return [
        {"id": f"{i}-{p}-{e}", "intent": f"i{i}", "phrasing": f"i{i}/{p}", "correct": right(i, p, e)}
        for i in range(intents)
        for p in range(phrasings)
        for e in range(each)
    ]


def test_score_of_all_right_and_all_wrong():
    # four phrasings: 0.025 ** (1 / 4) = 0.3976
    right, wrong = intervals.score(rows(lambda *_: True)), intervals.score(rows(lambda *_: False))
    assert (right.n, right.correct, right.accuracy, round(right.low, 4), right.high) == (20, 20, 1.0, 0.3976, 1.0)
    assert (wrong.n, wrong.correct, wrong.accuracy, wrong.low, round(wrong.high, 4)) == (20, 0, 0.0, 0.0, 0.6024)
    with pytest.raises(CourseError, match="no questions"):
        intervals.score([])


def test_interval_resamples_phrasings_not_questions():
    clustered = intervals.score(rows(lambda i, p, e: p % 2 == 0, phrasings=8, each=10))  # a phrasing is all right or all wrong
    spread = intervals.score(rows(lambda i, p, e: e % 2 == 0, phrasings=8, each=10))  # every phrasing is half right
    assert clustered.accuracy == spread.accuracy == 0.5
    assert clustered.high - clustered.low > 0.4
    assert spread.high - spread.low == 0


def test_interval_covers_the_truth_about_95_times_in_100():
    rng, hits = random.Random(1), 0
    for trial in range(200):
        sample = rows(lambda *_: rng.random() < 0.6, intents=10, phrasings=8, each=1)
        result = intervals.score(sample, draws=400, seed=trial)
        hits += result.low <= 0.6 <= result.high
    assert 175 <= hits <= 199


def test_paired_difference():
    a, b = rows(lambda i, p, e: True), rows(lambda i, p, e: p > 0)
    difference, low, high = intervals.paired_difference(a, b)
    assert difference == 0.25 and low >= 0 and high <= 0.75
    assert intervals.paired_difference(a, a) == (0.0, 0.0, 0.0)
    with pytest.raises(CourseError, match="same questions"):
        intervals.paired_difference(a, b[::-1])
    own = [{"id": None, "question": f"q{i}", "correct": i > 1} for i in range(4)]  # a file of one's own without ids
    assert intervals.paired_difference(own, own) == (0.0, 0.0, 0.0)
    with pytest.raises(CourseError, match="the same questions"):
        intervals.paired_difference(own, own[::-1])
    with pytest.raises(CourseError, match="the same questions"):
        intervals.pooled([own, own[::-1]])


def test_pooled_seeds_count_by_their_share():
    a, b = rows(lambda i, p, e: True), rows(lambda i, p, e: p > 0)
    both = intervals.pooled([a, b])
    assert [r["correct"] for r in both] == [0.5] * 5 + [1.0] * 15
    assert intervals.paired_difference(both, b)[0] == 0.125
    with pytest.raises(CourseError, match="same questions"):
        intervals.pooled([a, b[::-1]])


# ---------------------------------------------------------------- generation


@pytest.mark.slow
def test_answers_do_not_depend_on_batch_size_or_prefix_cache(model32, tokenizer):
    asked = [
        "How many flights left JFK?",
        "avg delay",
        "Which airline has the most flights to Boston in July, and how many are they?",
        "longest flight from Newark please",
        "hi",
    ]
    for system in (flights.SYSTEM_PROMPT, flights.SCHEMA_PROMPT):  # a short prompt, and one long enough for the prefix cache
        chats = [flights.chat(q, system) for q in asked]
        one = [generation.generate(model32, tokenizer, [c], max_new_tokens=24)[0] for c in chats]  # alone: no prefix is shared
        for size in (2, 5):
            assert generation.generate(model32, tokenizer, chats, max_new_tokens=24, batch_size=size) == one


@pytest.mark.slow
def test_generation_stops_at_the_end_of_the_turn(model32, tokenizer):
    answer = generation.generate(model32, tokenizer, [[{"role": "user", "content": "What is the capital of France?"}]], max_new_tokens=60)[0]
    assert "Paris" in answer and "<|im" not in answer and len(tokenizer(answer).input_ids) < 60
