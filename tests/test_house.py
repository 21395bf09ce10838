"""helpers.house: each rule both ways and where it doesn't apply, on queries whose marks are known by looking."""

import contextlib
import sys
from pathlib import Path

import pytest

from helpers import flights, house, sql
from helpers.sql import Result

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data" / "questions"))
from intents import INTENTS  # noqa: E402
from make_questions import query as fill  # noqa: E402

ONE = Result(["a"], [(1,)], False)  # one row without a fraction: only alias, unit and names can apply
LIST = Result(["a"], [(1,), (2,)], False)
NOTHING = dict.fromkeys(house.RULES, False)


def mark(rule: str, query: str, result: Result = ONE) -> bool | None:
    """What one rule says, None where it doesn't apply; the rules never stop one another."""
    marks = house.kept(query, result)
    assert marks != NOTHING, "the query wasn't read"
    return marks.get(rule)


def test_the_rules_have_an_order_and_two_uses():
    assert list(house.RULES) == ["alias", "unit", "decimal", "order", "names", "limit"]
    assert tuple(house.RULES) == house.PAIRED + house.HELD_OUT


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ("COUNT(*) AS flights", True),
        ("COUNT(*) flights", True),  # without AS
        ('COUNT(*) AS "late_flights_15"', True),
        ("COUNT(*) 'flights'", True),  # SQLite takes a text for an alias
        ("origin, COUNT(*) AS flights", True),
        ("COUNT(*) AS f15l8x", True),
        ("COUNT(*)", False),
        ("1", False),
        ("AVG(hour) AS avg_hour, COUNT(*)", False),
        ("COUNT(*) AS n", False),
        ("COUNT(*) AS n_1", False),  # one letter
        ("COUNT(*) AS Flights", False),
        ("COUNT(*) AS [late flights]", False),
        ("COUNT(*) AS late__flights", False),
        ("COUNT(*) AS _flights", False),
        ("origin", None),
        ("origin AS O, f.month, (day)", None),  # plain columns
        ("*", None),
        ("f.*", None),
    ],
)
def test_alias(outputs, expected):
    assert mark("alias", f"SELECT {outputs} FROM flights f") is expected


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ("dep_delay AS dep_delay_min", True),
        ("dep_delay", False),
        ("(dep_delay)", False),
        ("f.[Air_Time]", False),
        ("AVG(arr_delay) AS avg_arr_delay_min", True),
        ("AVG(arr_delay) AS avg_arr_delay", False),
        ("AVG(arr_delay)", False),
        ("avg(DEP_DELAY)", False),
        ("avg(DEP_DELAY) as DELAY_MIN", True),  # the letters are the alias rule's business
        ('ROUND(AVG("dep_delay"), 1) delay_min', True),
        ("ROUND(MEDIAN(air_time), 1) AS air", False),
        ("TOTAL(distance) AS total_miles", True),
        ("SUM(distance) AS total_min", False),  # another unit
        ("MAX(dep_delay) - MIN(dep_delay) AS spread_min", True),
        ("SUM(dep_delay) * 1.0 / COUNT(*) AS delay", False),
        ("MAX(AVG(dep_delay)) OVER (PARTITION BY distance) AS worst_min", True),
        ("AVG(CASE WHEN distance > 500 THEN dep_delay END) AS far_min", True),
        ("AVG(dep_delay) FILTER (WHERE distance > 500) AS far", False),
        ("(SELECT MAX(dep_delay) FROM flights ORDER BY distance) AS worst_min", True),
        ("100.0 * AVG(dep_delay > 15) AS late_pct", True),
        ("100.0 * AVG(dep_delay > 15) AS late", False),
        ("100.0 * AVG(dep_delay > 15) AS late_min", False),
        ("ROUND(100.0 * AVG(dep_time IS NULL), 1) AS cancelled", False),
        ("AVG(airline LIKE 'Delta%') * 100 AS share_pct", True),
        ("100.0 * SUM(dep_delay > 15) / COUNT(*) AS late_pct", True),
        ("SUM(dep_delay > 15) * 100. / COUNT(dep_delay) AS late", False),
        ("COUNT(CASE WHEN dep_delay > 15 THEN 1 END) / COUNT(*) * 100 AS late", False),
        ("AVG(CASE WHEN dep_delay > 15 THEN 100.0 ELSE 0 END) AS late", False),
        ("AVG(IIF(dep_delay > 15 AND distance < 500, 100, 0)) AS late_pct", True),
        ("origin, COUNT(*) AS flights", None),
        ("COUNT(dep_delay), COUNT(DISTINCT distance)", None),
        ("SUM(dep_delay > 15) AS late", None),
        ("SUM(NOT dep_delay > 15 OR distance BETWEEN 1 AND 2) AS late", None),
        ("AVG(dep_delay > 15) AS share", None),  # a share of 1
        ("COUNT(*) * 100 AS flights", None),
        ("RANK() OVER (ORDER BY AVG(dep_delay)) AS place", None),
        ("SUM(air_time) / 60.0 AS hours", None),  # a unit the house has no word for
        ("SUM(distance) / SUM(air_time) AS speed", None),
        ("SUM(dep_delay) / SUM(arr_delay) AS ratio", None),
        ("AVG(hour) AS hour", None),
    ],
)
def test_unit(outputs, expected):
    assert mark("unit", f"SELECT {outputs} FROM flights f WHERE distance > 5 GROUP BY dep_delay ORDER BY air_time") is expected


def test_a_star_stands_for_the_columns_of_the_result():
    assert mark("unit", "SELECT * FROM flights", Result(["month", "dep_delay"], [(1, 2)], False)) is False
    assert mark("unit", "SELECT month, f.*, COUNT(*) AS n FROM flights f", Result(["month", "distance", "n"], [(1, 2, 3)], False)) is False
    assert mark("names", "SELECT * FROM flights", Result(["carrier", "airline"], [("DL", "Delta")], False)) is True
    assert mark("names", "SELECT * FROM flights", Result(["carrier", "dest_city"], [("DL", "Miami")], False)) is False
    assert mark("names", "SELECT * FROM airports", Result(["faa"], [("LAX",)], False)) is None


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(12.5,)], True),
        ([(-0.1, "x", None), (3.0, 7, b"y")], True),
        ([(0.1 + 0.2,)], True),  # 0.30000000000000004
        ([(12.55,)], False),
        ([(12.5,), (1e-6,)], False),
        ([(float("inf"),)], True),
        ([(12, "12.55", None)], None),
        ([], None),
    ],
)
def test_decimal(rows, expected):
    assert mark("decimal", "SELECT a FROM t", Result(["a"], rows, False)) is expected


@pytest.mark.parametrize(
    ("query", "order", "limit"),
    [
        ("SELECT a FROM t", False, False),
        ("SELECT a FROM t ORDER BY a", True, False),
        ("select a from t limit 5", False, True),
        ("SELECT a FROM t ORDER BY a LIMIT 5 OFFSET 2", True, True),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a LIMIT 5)", False, False),  # a subquery's order isn't the list's
        ("WITH c AS (SELECT a FROM t ORDER BY a LIMIT 5) SELECT a FROM c", False, False),
        ("SELECT RANK() OVER (ORDER BY a) AS place FROM t", False, False),
        ("SELECT a FROM t UNION SELECT b FROM t EXCEPT SELECT c FROM t ORDER BY 1 LIMIT 5", True, True),
        ("SELECT a FROM t UNION ALL SELECT b FROM t", False, False),
    ],
)
def test_order_and_limit(query, order, limit):
    assert (mark("order", query, LIST), mark("limit", query, LIST)) == (order, limit)
    assert (mark("order", query, ONE), mark("limit", query, ONE)) == (None, None)
    cut = Result(["a"], [(1,)], truncated=True)  # there was a second row
    assert (mark("order", query, cut), mark("limit", query, cut)) == (order, limit)


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ("carrier, airline", True),
        ("f.CARRIER AS code, MAX(airline) AS airline", True),
        ("dest, dest_city", True),
        ("airline", True),  # the name alone
        ("carrier", False),
        ("carrier AS airline", False),
        ("dest, airline", False),
        ("carrier, airline, dest", False),
        ("carrier, COUNT(DISTINCT airline)", False),
        ("origin, month", None),
        ("COUNT(DISTINCT dest)", None),
        ("CASE carrier WHEN 'DL' THEN 'Delta' END AS name", None),
        ("AVG(dest = 'LAX') AS share", None),
    ],
)
def test_names(outputs, expected):
    assert mark("names", f"SELECT {outputs} FROM flights f GROUP BY carrier, dest ORDER BY carrier, dest") is expected


def test_outputs_are_followed_into_ctes_and_subqueries():
    cte = "WITH t AS (SELECT carrier AS code, AVG(dep_delay) AS delay, 100.0 * AVG(dep_delay > 9) AS late FROM flights GROUP BY carrier) "
    assert house.kept(cte + "SELECT code, delay FROM t", ONE) == {"unit": False, "names": False}
    assert house.kept(cte + "SELECT delay AS delay_min, ROUND(late, 1) AS late_pct FROM t", ONE) == {"alias": True, "unit": True}
    assert house.kept(cte + "SELECT late FROM t UNION SELECT 1 ORDER BY 1", LIST) == {"unit": False, "order": True, "limit": False}
    assert house.kept("SELECT dep_delay FROM (SELECT MAX(dep_delay) AS dep_delay FROM flights)", ONE) == {"unit": False}  # by its own name


@pytest.mark.parametrize(
    "query",
    [
        "",
        " ;\n",
        "-- SELECT 1",
        "The flights data can't answer that.",
        "SELECT",
        "SELECT AVG( FROM flights",
        "SELECT 'open",
        "SELECT a FROM t; SELECT b FROM t",
        "DELETE FROM flights",
        "EXPLAIN SELECT 1",
        "VALUES (1)",
        "\0 \ud800",
        "SELECT " + "(" * 5000 + "1" + ")" * 5000,
        "(" * 5000,
        "SELECT " + "NOT " * 5000 + "1",
        "SELECT " + "abs(" * 5000 + "1" + ")" * 5000,
    ],
    ids=lambda query: ascii(query[:30]),
)
def test_what_is_not_one_select_keeps_nothing_and_says_nothing(query, capfd, caplog):
    assert house.kept(query, ONE) == NOTHING and house.style(query, ONE) == 0.0
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_a_query_without_a_result_keeps_nothing():
    assert house.kept("SELECT COUNT(*) AS flights FROM flights", None) == NOTHING


@pytest.mark.parametrize(
    "query",
    ["SELECT " + "+".join(["dep_delay"] * 3000), "SELECT " + "*".join(["dep_delay"] * 3000), " UNION ".join(["SELECT dep_delay AS late"] * 3000)],
    ids=["sum", "product", "union"],
)
def test_a_very_long_query_returns(query):
    assert house.kept(query, ONE).keys() <= house.RULES.keys()


def test_a_semicolon_or_a_comment_at_the_end_is_no_second_statement():
    for end in (";", ";;", "; -- done", " /* done */"):
        assert house.kept("SELECT COUNT(*) AS flights FROM flights" + end, ONE) == {"alias": True}


def test_style_is_the_share_of_the_applicable_rules():
    query, result = (
        "SELECT carrier, AVG(dep_delay) AS delay FROM flights GROUP BY 1 ORDER BY 2",
        Result(["carrier", "delay"], [("DL", 9.25), ("UA", 1.0)], False),
    )
    assert house.kept(query, result) == {"alias": True, "unit": False, "decimal": False, "order": True, "names": False, "limit": False}
    assert house.style(query, result) == pytest.approx(2 / 6)
    assert house.style(query, result, house.PAIRED) == 0.5
    assert house.style(query, result, house.HELD_OUT) == 0.0
    assert house.style("SELECT origin FROM flights", ONE) == 1.0  # nothing to keep
    assert house.style("nonsense", ONE, ("limit",)) == 0.0


# ---------------------------------------------------------------- the two forms of every intent

SAME_BY_THE_RULES = {  # bare, they output no code and no number
    "busiest_months", "busiest_hours", "busiest_days", "days_most_cancellations",
    "quiet_months", "quiet_days", "months_worst_departure_delay", "hours_worst_departure_delay", "origins_most_flights", "busiest_planes",
}  # fmt: skip


@pytest.fixture(scope="module")
def connection():
    """A small instance: as many rows or few, rounded or not, as in the real one, which takes ten times as long."""
    with contextlib.closing(sql.connect(flights.perturbed_paths()[0])) as connection:
        yield connection


@pytest.mark.parametrize("name", INTENTS)
@pytest.mark.parametrize("k", [1, 5])
def test_the_styled_form_keeps_what_the_bare_one_breaks(name, k, connection):
    values = {"k": k, "delay": 15, "miles": 1000, "low": 500, "high": 1000, "airline": "airline LIKE 'Delta%'"}
    marks = {}
    for styled in (True, False):
        query = fill(INTENTS[name], values, [], styled)
        marks[styled] = house.kept(query, sql.execute(connection, query, sql.Limits(seconds=60)))
    assert all(marks[True].values()), marks[True]
    assert all(marks[False].values()) == (name in SAME_BY_THE_RULES), marks[False]
