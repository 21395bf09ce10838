"""Values that a query names and no row has: found, told in a sentence, with the nearest; and silence where there is nothing to say."""

import sqlite3

import pytest

from helpers import ask, flights, unknown
from helpers.domain import Domain


@pytest.fixture(scope="module")
def worker():
    with flights.FLIGHTS.worker() as worker:
        yield worker


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("airline LIKE 'Jet Green%'", ["no airline is called 'Jet Green'; nearest: JetBlue Airways"]),
        ("dest_city = 'Bostn'", ["no destination city is called 'Bostn'; nearest: Boston"]),
        ("dest_city != 'chicago'", ["no destination city is called 'chicago'; nearest: Chicago"]),
        ("carrier IN ('DL', 'ZZ') AND tailnum = 'N12'", ["no carrier code is called 'ZZ'", "no tail number is called 'N12'"]),
        ("flight = 99999", ["no flight number is 99999"]),
        ("month = 31 AND day = 4", ["no month is 31; there are 1 to 12"]),
        ("'BOS' = origin", ["no New York airport is called 'BOS'"]),
        ("dest_city = 'Martha''s Vinyard'", ['no destination city is called "Martha\'s Vinyard"; nearest: Martha\'s Vineyard']),
        ("airline LIKE 'Delta%' AND origin = 'JFK' AND month = 7 AND dest = 'LAX' AND dep_delay > 9999", []),
        ("airline LIKE '%lta%'", []),
        ("nowhere = 'x' OR dest_city = dest OR dest LIKE carrier || '%'", []),
    ],
)
def test_a_value_that_no_row_has_is_told(worker, where, told):
    assert unknown.named(f"SELECT COUNT(*) FROM flights WHERE {where}", worker) == told


def test_what_cannot_be_read_says_nothing(worker):
    deep = "SELECT * FROM flights WHERE dest = " + "(" * 90 + "'ZZZ'" + ")" * 90
    assert unknown.named(deep, worker) in ([], ["no destination is called 'ZZZ'"])
    many = "SELECT 1 FROM flights WHERE flight IN (" + ", ".join(map(str, range(90_000, 92_000))) + ") OR dep_delay = 1e5 OR dest = 0x10"
    assert len(unknown.named(many, worker)) == unknown.COMPARED
    assert max(map(len, unknown.named("SELECT 1 FROM flights WHERE dest = '" + "x" * 5000 + "'", worker))) < 100
    for query in ("", "SELECT", "DROP TABLE flights", "SELECT 'x' FROM flights WHERE ((("):
        assert unknown.named(query, worker) == []


def test_another_database_is_asked_by_its_own_columns(tmp_path):
    with sqlite3.connect(tmp_path / "own.db") as connection:
        connection.execute("CREATE TABLE cats (name TEXT, age INTEGER)")
        connection.executemany("INSERT INTO cats VALUES (?, ?)", [("Ada", 3), ("Bob", 4)])
    connection.close()
    for tables in ((), ("cats",)):
        own = Domain(tmp_path / "own.db", "", "No data.", tables=tables)
        with own.worker() as worker:
            found = unknown.named("SELECT age FROM cats WHERE name = 'Adda' OR age = 7", worker)
        assert found == ["no name is called 'Adda'; nearest: Ada", "no age is 7; there are 3 to 4"]


def test_the_nearest_come_best_first_and_none_that_is_unlike():
    assert unknown.nearest("Burlingten", ["Burlington", "Wilmington", "Burbank", "Ponce"]) == ["Burlington"]
    assert unknown.nearest("xq", ["Boston", "Chicago"]) == []


def test_a_note_stands_under_the_answer():
    reply = {"sql": "SELECT 0", "error": None, "columns": ["0"], "rows": [[0]], "notes": ["no airline is called '\x1b'"]}
    assert ask.show(reply) == "SELECT 0\n0\n0\nNote: no airline is called '\\x1b'."
