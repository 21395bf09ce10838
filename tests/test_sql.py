"""helpers.sql: what a good query gives, what a bad one says, and a corpus of hostile ones that must change nothing.

`hostile.sql.jsonl` holds one statement a line with the reasons that may stop it ("ok": it may run, for it does no
harm); `{{text*n}}` in it stands for n times that text. Times are never asserted, reasons are.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from helpers import sql
from helpers.sql import Limits, Result, SqlError, connect, execute
from helpers.worker import Worker, run_untrusted

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = """
CREATE TABLE flights (
    year INTEGER, month INTEGER, day INTEGER, dep_time INTEGER, sched_dep_time INTEGER, dep_delay INTEGER,
    arr_time INTEGER, sched_arr_time INTEGER, arr_delay INTEGER, carrier TEXT, airline TEXT, flight INTEGER,
    tailnum TEXT, origin TEXT, dest TEXT, dest_city TEXT, air_time INTEGER, distance INTEGER, hour INTEGER,
    minute INTEGER);
CREATE TABLE airports (faa TEXT, name TEXT, lat REAL, lon REAL, alt INTEGER, tz INTEGER, dst TEXT);
CREATE TABLE secrets (word TEXT);
CREATE VIEW leak AS SELECT word FROM secrets;
"""
CANARY = "canary-8c1f"  # stands in the forbidden table and files; it must never come back in an answer
DELAYS = {"DL": [10, -5, None], "UA": [60]}  # departure delays by carrier: the whole fixture database


def build(path: Path, flights: list[tuple]) -> Path:
    """A database with the real schema plus a table that no query may see; a flight is (carrier, delay, tail number)."""
    names = {"DL": "Delta Air Lines Inc.", "UA": "United Air Lines Inc."}
    rows = [
        (2013, 7, 1 + i % 28, 600, 600, delay, 800, 800, delay, code, names[code], i, tail) + ("JFK", "LAX", "Los Angeles", 300, 2475, i % 24, 0)
        for i, (code, delay, tail) in enumerate(flights)
    ]
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(SCHEMA)
        connection.executemany(f"INSERT INTO flights VALUES ({','.join('?' * 20)})", rows)
        connection.execute("INSERT INTO airports VALUES ('LAX', 'Los Angeles Intl', 33.9, -118.4, 126, -8, 'A')")
        connection.execute("INSERT INTO secrets VALUES (?)", [CANARY])
        connection.commit()
    return path


@pytest.fixture(scope="module")
def db(tmp_path_factory):
    flights = [(carrier, delay, None) for carrier, delays in DELAYS.items() for delay in delays]
    return build(tmp_path_factory.mktemp("small") / "flights.db", flights)


@pytest.fixture
def connection(db):
    with contextlib.closing(connect(db)) as connection:
        yield connection


@pytest.fixture(scope="module")
def worker(db):
    with Worker(db) as worker:
        yield worker


def reason_of(run, *args) -> str:
    """Why a call was refused, or "ok"."""
    try:
        run(*args)
    except SqlError as error:
        assert str(error) and "\n" not in str(error), "one plain sentence"
        return error.reason
    return "ok"


# ---------------------------------------------------------------- good queries

GOOD = [
    ("SELECT count(*) FROM flights", ["count(*)"], [(4,)]),
    ("select carrier, avg(dep_delay) AS mean from flights group by carrier order by 1;", ["carrier", "mean"], [("DL", 2.5), ("UA", 60.0)]),
    ("SELECT carrier FROM flights WHERE dep_delay > 100", ["carrier"], []),
    ("SELECT count(*) FROM FLIGHTS WHERE airline LIKE 'delta%'", ["count(*)"], [(3,)]),
    ("WITH late AS (SELECT * FROM flights WHERE dep_delay > 0) SELECT count(*) FROM late", ["count(*)"], [(2,)]),
    ("SELECT count(*) AS n FROM (SELECT DISTINCT carrier FROM flights)", ["n"], [(2,)]),
    (
        "SELECT f.carrier, a.name FROM flights f JOIN airports a ON a.faa = f.dest WHERE f.dep_delay = 60",
        ["carrier", "name"],
        [("UA", "Los Angeles Intl")],
    ),
    ("SELECT carrier, rank() OVER (ORDER BY dep_delay DESC) AS r FROM flights LIMIT 1", ["carrier", "r"], [("UA", 1)]),
    ("WITH RECURSIVE d(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM d WHERE n < 3) SELECT n FROM d", ["n"], [(1,), (2,), (3,)]),
    ("SELECT 1 UNION SELECT 2 EXCEPT SELECT 1", ["1"], [(2,)]),
    ("VALUES (1, 'a')", ["column1", "column2"], [(1, "a")]),
    ("SELECT 100.0 * sum(dep_delay IS NULL) / count(*) AS pct FROM main.flights", ["pct"], [(25.0,)]),
    ('SELECT "carrier" AS "the code" FROM "flights" WHERE "dep_delay" = 60', ["the code"], [("UA",)]),
    ("SELECT strftime('%w', printf('%d-%02d-%02d', year, month, day)) AS weekday FROM flights LIMIT 1", ["weekday"], [("1",)]),
    (
        "SELECT NULL AS a, 9223372036854775807 AS b, 0.5 AS c, x'00ff' AS d, 'é😀' AS e, 9e999 AS f",
        list("abcdef"),
        [(None, 2**63 - 1, 0.5, b"\x00\xff", "é😀", float("inf"))],
    ),
    ("SELECT 'a' || char(0, 10) || 'b' AS t", ["t"], [("a\0\nb",)]),
    ("SELECT CAST(x'61ff' AS TEXT) AS t", ["t"], [("a\ufffd",)]),  # not UTF-8: replaced, no crash
]


@pytest.mark.parametrize(("query", "columns", "rows"), GOOD)
def test_good_query_gives_these_rows_in_process_and_in_the_worker(connection, worker, query, columns, rows):
    expected = Result(columns, rows, truncated=False)
    assert execute(connection, query) == expected
    assert worker.run(query) == expected


def test_run_untrusted_is_a_worker_for_one_query(db):
    assert run_untrusted("SELECT count(*) AS n FROM flights", db) == Result(["n"], [(4,)], False)


@pytest.mark.parametrize(("limit", "rows", "truncated"), [(3, 3, True), (4, 4, False), (5, 4, False)])
def test_truncated_tells_that_rows_were_left_out(connection, limit, rows, truncated):
    result = execute(connection, "SELECT carrier FROM flights", Limits(rows=limit))
    assert (len(result.rows), result.truncated) == (rows, truncated)


def test_limits_on_query_value_and_answer_are_exact(connection):
    def run(query, **limits):
        return reason_of(execute, connection, query, Limits(**limits))

    assert run("SELECT 'éé'", value_bytes=4) == "ok"
    assert run("SELECT 'éé'", value_bytes=3) == "too large"
    assert run("SELECT x'0102'", value_bytes=1) == "too large"
    assert run("SELECT 'ab', 'cd', 7", result_bytes=12) == "ok"
    assert run("SELECT 'ab', 'cd', 7", result_bytes=11) == "too large"
    assert run("SELECT 'é'", sql_bytes=11) == "ok"
    assert run("SELECT 'é'", sql_bytes=10) == "too large"


# ---------------------------------------------------------------- what a refusal says


@pytest.mark.parametrize(
    ("query", "reason", "said"),
    [
        ("  ", "empty", "type one SELECT"),
        ("SELECT carier FROM flights", "unknown name", "no such column: carier"),
        ("SELECT * FROM flight", "unknown name", "no such table: flight"),
        ("SELECT median_delay(1)", "unknown name", "no such function: median_delay"),
        ("SELECT 1 FORM flights", "syntax", 'near "flights": syntax error'),
        ("SELECT 1, 2 UNION SELECT 1", "syntax", "do not have the same number of result columns"),
        ("SELECT sum(9223372036854775807) FROM flights", "syntax", "integer overflow"),
        ("SELECT 1; SELECT 2", "several statements", "keep one SELECT"),
        ("DELETE FROM flights", "forbidden", "Only SELECT from flights and airports"),
        ("SELECT load_extension('x')", "forbidden", "load_extension"),
        ("SELECT word FROM secrets", "forbidden", "secrets.word"),
        ("SELECT " + "1," * 200 + "1", "too large", "too many columns"),
    ],
)
def test_message_keeps_what_sqlite_says(connection, worker, query, reason, said):
    for run in (lambda: execute(connection, query), lambda: worker.run(query)):
        with pytest.raises(SqlError) as caught:
            run()
        assert caught.value.reason == reason and said in str(caught.value)
    assert execute(connection, "SELECT count(*) FROM flights").rows == [(4,)], "usable after an error"


def test_text_in_double_quotes_is_an_unknown_name_on_every_python(connection):
    with pytest.raises(SqlError, match="Delta.*'single quotes'") as caught:
        execute(connection, 'SELECT count(*) FROM flights WHERE airline = "Delta"')
    assert caught.value.reason == "unknown name"
    with contextlib.closing(sqlite3.connect(":memory:")) as plain:  # what SQLite does by itself
        assert plain.execute('SELECT "Delta"').fetchall() == [("Delta",)]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ('SELECT "a" FROM "b c"', "SELECT `a` FROM `b c`"),
        ('SELECT "a""b`c"', 'SELECT `a"b``c`'),
        ('SELECT \'it\'\'s "x"\', ["y"], `"z"`', 'SELECT \'it\'\'s "x"\', ["y"], `"z"`'),
        ('SELECT 1 -- "x"\n, "y" /* "z" */', 'SELECT 1 -- "x"\n, `y` /* "z" */'),
        ('SELECT 1 /* "x"', 'SELECT 1 /* "x"'),
        ('SELECT "unfinished', 'SELECT "unfinished'),
        ("SELECT " + "'" * 4001, "SELECT " + "'" * 4001),
    ],
)
def test_names_only_changes_nothing_but_names(query, expected):
    assert sql._names_only(query) == expected


def test_a_copy_of_a_worker_starts_a_process_of_its_own(db):
    with Worker(db, sql.Limits(rows=1)) as worker:
        worker.run("SELECT 1")
        with pickle.loads(pickle.dumps(worker)) as copy:
            assert copy.run("SELECT month FROM flights").truncated and copy._process.pid != worker._process.pid
    hashed = "from datasets.fingerprint import Hasher\nprint(Hasher.hash(lambda row: row['sql'] != flights.REFUSAL))"
    code = f"from helpers import flights\nfrom helpers.worker import Worker\nworker = Worker(flights.database_path())\nworker.run('SELECT 1')\n{hashed}"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(sql.__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_names_only_is_what_python_311_uses(db, monkeypatch):
    class Old(sqlite3.Connection):  # looks like Python 3.11's: no setconfig
        def __getattribute__(self, name):
            if name == "setconfig":
                raise AttributeError(name)
            return super().__getattribute__(name)

    real = sqlite3.connect
    monkeypatch.setattr(sql.sqlite3, "connect", lambda *args, **kwargs: real(*args, **kwargs, factory=Old))
    with contextlib.closing(connect(db)) as old:
        assert reason_of(execute, old, 'SELECT "Delta"') == "unknown name"
        assert execute(old, 'SELECT max("dep_delay") AS "m" FROM "flights"') == Result(["m"], [(60,)], False)


def test_missing_database_has_a_reason_and_no_path(tmp_path):
    (tmp_path / "empty.db").touch()
    (tmp_path / "folder.db").mkdir()
    (tmp_path / "text.db").write_text("not a database " * 100, encoding="utf-8")
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as other:
        other.execute("CREATE TABLE flights (x)")
    before = sorted(tmp_path.iterdir())
    for name in ("none.db", "nofolder/none.db", "empty.db", "folder.db", "text.db", "other.db"):
        for run in (connect, lambda path: run_untrusted("SELECT 1", path)):
            with pytest.raises(SqlError, match="helpers.flights.database_path") as caught:
                run(tmp_path / name)
            assert caught.value.reason == "missing database" and str(tmp_path) not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before, "looking for a database creates none"


@pytest.mark.parametrize("name", ["a b%41é.db", "a#mode=rwc.db"] + ["a?mode=rwc&x.db"] * (os.name != "nt"))
def test_odd_file_names_are_opened_read_only(db, tmp_path, name):
    shutil.copy(db, tmp_path / name)
    with contextlib.closing(connect(tmp_path / name)) as connection:
        connection.set_authorizer(None)  # leaves the file's own protection
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            connection.execute("DELETE FROM flights")
    assert run_untrusted("SELECT count(*) FROM flights", tmp_path / name).rows == [(4,)]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_error_survives_pickle():
    error = pickle.loads(pickle.dumps(SqlError("Do this.", "time")))
    assert (str(error), error.reason) == ("Do this.", "time")


def test_mistakes_of_the_caller_are_not_called_the_learners(db):
    connection = connect(db)
    connection.close()
    with pytest.raises(sqlite3.ProgrammingError):
        execute(connection, "SELECT 1")


# ---------------------------------------------------------------- limits and the worker

ENDLESS = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) "
# SQLite can't be interrupted in a trim() that compares 10**9 times, nor between a few of them.
SLOW_STEP = ENDLESS + "SELECT sum(length(trim(printf('%.99000c', 'a'), printf('%.8000c', 'b') || n || 'a'))) FROM c"


@pytest.mark.slow
def test_default_limits_stop_an_endless_query(connection):
    with pytest.raises(SqlError, match="after 2 s") as caught:
        execute(connection, ENDLESS + "SELECT max(n) FROM c")
    assert caught.value.reason == "time"
    assert execute(connection, "SELECT count(*) FROM flights").rows == [(4,)]


@pytest.mark.slow
def test_default_limits_kill_what_sqlite_cannot_interrupt_and_the_worker_is_replaced(db):
    with Worker(db) as worker:
        assert worker.run("SELECT 1").rows == [(1,)]
        first = worker._process.pid
        with pytest.raises(SqlError, match="busy for 3 s") as caught:
            worker.run(SLOW_STEP)
        assert caught.value.reason == "killed" and worker._process is None
        assert worker.run("SELECT 2").rows == [(2,)]
        assert worker._process.pid != first


def test_memory_limit_is_live(tmp_path):
    path = build(tmp_path / "flights.db", [("DL", i, "N" * 100) for i in range(20_000)])
    query = "SELECT * FROM flights ORDER BY dep_delay DESC"
    assert reason_of(run_untrusted, query, path) == "ok"
    assert reason_of(run_untrusted, query, path, Limits(memory_mb=3)) == "too large"
    assert reason_of(run_untrusted, "SELECT * FROM airports ORDER BY faa", path, Limits(memory_mb=3)) == "ok"


def test_threads_may_share_a_worker(db):
    answers = {}
    with Worker(db) as worker:

        def ask(i):
            answers[i] = [worker.run(f"SELECT {i} * {j}").rows for j in range(10)]

        threads = [threading.Thread(target=ask, args=[i]) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert answers == {i: [[(i * j,)] for j in range(10)] for i in range(8)}


def test_worker_that_died_while_idle_is_replaced(db):
    with Worker(db) as worker:
        worker.run("SELECT 1")
        worker._process.kill()
        worker._process.wait()
        assert worker.run("SELECT 2").rows == [(2,)]


def test_worker_that_dies_in_a_query_gives_a_reason(db):
    with Worker(db, Limits(seconds=60, kill_seconds=2)) as worker:  # its second process is killed for its time, never stopped between two steps
        worker.run("SELECT 1")
        threading.Timer(0.3, worker._process.kill).start()
        assert reason_of(worker.run, ENDLESS + "SELECT max(n) FROM c") == "killed"
        assert worker.run("SELECT 2").rows == [(2,)]


@pytest.mark.skipif(os.name == "nt", reason="no signals to the own process")
def test_interrupted_query_does_not_answer_the_next_one(db, request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist's processes ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with Worker(db, Limits(seconds=20, kill_seconds=20)) as worker:
        worker.run("SELECT 1")
        threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            worker.run(ENDLESS + "SELECT max(n) FROM c")
        assert worker._process is None
        assert worker.run("SELECT 2").rows == [(2,)]


def test_a_kill_that_comes_just_after_the_answer_never_hits_the_next_query(db, monkeypatch):
    class Late(threading.Timer):  # fires when it is too late to be cancelled
        def start(self):
            pass

        def cancel(self):
            self.function()

        def join(self):
            pass

    with Worker(db) as worker:
        for i in range(5):
            worker.run("SELECT 1")
            with monkeypatch.context() as patch:
                patch.setattr(threading, "Timer", Late)
                assert worker.run(f"SELECT {i}").rows == [(i,)], "the answer was there, so it counts"
            assert worker.run(f"SELECT -{i}").rows == [(-i,)]


def test_crash_of_the_worker_is_silent(db, capfd):
    assert reason_of(run_untrusted, "SELECT 1", db, Limits(memory_mb="many")) == "crashed"  # a TypeError in there
    assert capfd.readouterr() == ("", "")


def test_a_worker_that_died_between_two_queries_is_started_again(db):
    with Worker(db) as worker:
        assert worker.run("SELECT 1").rows == [(1,)]
        for end in (lambda process: process.kill(), lambda process: (process.kill(), process.wait())):
            before = worker._process
            end(before)
            assert worker.run("SELECT 2").rows == [(2,)] and worker._process is not before


def test_a_query_that_ends_the_process_twice_says_so_and_the_next_one_works(db, monkeypatch):
    with Worker(db) as worker:
        worker.run("SELECT 1")
        ask, asked = worker._ask, []

        def dying(message, limits):
            if message.get("sql") == "SELECT 2":
                asked.append(worker._process.pid)
                worker._process.kill()
            return ask(message, limits)

        monkeypatch.setattr(worker, "_ask", dying)
        with pytest.raises(SqlError, match="The query ended its process, twice") as told:
            worker.run("SELECT 2")
        assert told.value.reason == "crashed" and len(set(asked)) == 2 and worker.run("SELECT 3").rows == [(3,)]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_fork_has_a_worker_of_its_own(db):
    def child():
        cut = all(os.path.samestat(os.fstat(pipe.fileno()), os.stat(os.devnull)) for pipe in (parents.stdin, parents.stdout))
        assert cut and worker._process is None and worker.run("SELECT 2").rows == [(2,)] and worker._process.pid != pid
        worker.close()

    with Worker(db) as worker:
        worker.run("SELECT 1")
        parents, pid = worker._process, worker._process.pid
        fork = multiprocessing.get_context("fork").Process(target=child)
        fork.start()
        fork.join()
        assert fork.exitcode == 0 and worker.run("SELECT 3").rows == [(3,)] and worker._process.pid == pid


def test_ctrl_c_on_a_terminal_is_not_the_workers_business(db):
    with Worker(db) as worker:
        worker.run("SELECT 1")
        process = worker._process
        os.kill(process.pid, signal.SIGINT)
        assert worker.run("SELECT 2").rows == [(2,)] and worker._process is process


def test_a_time_limit_of_one_querys_own(db):
    with Worker(db, Limits(seconds=0.2, kill_seconds=5)) as worker:
        assert reason_of(worker.run, ENDLESS + "SELECT max(n) FROM c") == "time"
        start = time.monotonic()
        with pytest.raises(SqlError, match="stopped after 1 s"):
            worker.run(ENDLESS + "SELECT max(n) FROM c", 1)
        assert 0.9 < time.monotonic() - start < 20
        assert reason_of(worker.run, ENDLESS + "SELECT max(n) FROM c") == "time"


@pytest.mark.parametrize("text", ["\x1b[2J", "a\x9bb", "\u202e", "\x07", "\u2066"])
def test_what_sqlite_says_of_a_query_steers_no_terminal(db, text):
    for run in (lambda query: run_untrusted(query, db), lambda query: execute(connect(db), query)):
        with pytest.raises(SqlError) as told:
            run(f'SELECT `{text}` FROM flights')
        assert text not in str(told.value) and not sql.CONTROLS.search(str(told.value))


def test_printable_writes_out_what_would_not_be_shown():
    assert sql.printable("a\x1b\n\tb\u2028é😀") == "a\\x1b\\x0a\\x09b\\u2028é😀" and sql.printable("a\nb\x00", keep="\n") == "a\nb\\x00"


def test_worker_ends_with_its_parent(db):
    code = "import sys\nfrom helpers.worker import Worker\nw = Worker(sys.argv[1])\nw.run('SELECT 1')\nprint(w._process.pid)"
    done = subprocess.run([sys.executable, "-c", code, db], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if not Path("/proc/self").exists():
        pytest.skip("no /proc here")
    stat = Path(f"/proc/{int(done.stdout)}/stat")
    for _ in range(100):  # up to 5 s
        if not stat.exists() or ") Z " in stat.read_text(encoding="utf-8"):
            return
        threading.Event().wait(0.05)
    pytest.fail("the worker outlived its parent")


def test_worker_sees_no_tokens(db, monkeypatch):
    if not Path("/proc/self/environ").exists():
        pytest.skip("no /proc here")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with Worker(db) as worker:
        worker.run("SELECT 1")
        assert b"hf_secret" not in Path(f"/proc/{worker._process.pid}/environ").read_bytes()


def test_importing_sql_imports_nothing_heavy():
    code = "import sys, helpers.sql\nprint(*{name.split('.')[0] for name in sys.modules} - set(sys.stdlib_module_names))"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert set(done.stdout.split()) <= {"__main__", "helpers"} and done.returncode == 0


CONFINED = """
import os, sys
sys.path.insert(0, sys.argv[1])
from helpers.sql import Limits, _confine
log = os.open("log", os.O_WRONLY | os.O_CREAT)
def can(what):
    try:
        what()
        return True
    except (OSError, MemoryError):
        return False
tries = [lambda: open("canary.txt"), lambda: open("evil.txt", "w"), lambda: os.write(log, b"x"), lambda: bytearray(3 * 10**8)]
print([can(what) for what in tries])
_confine(Limits())
print([can(what) for what in tries])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have some of these limits, or none")
def test_confined_process_opens_no_file_writes_none_and_gets_no_memory(tmp_path):
    (tmp_path / "canary.txt").write_text(CANARY, encoding="utf-8")
    run = [sys.executable, "-c", CONFINED, str(ROOT)]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["[True, True, True, True]", "[False, False, False, False]"], done.stderr


# ---------------------------------------------------------------- the hostile corpus


def expand(text: str) -> str:
    return re.sub(r"\{\{(.*?)\*(\d+)\}\}", lambda match: match[1] * int(match[2]), text, flags=re.S)


CORPUS = [json.loads(line) for line in (ROOT / "tests/hostile.sql.jsonl").read_text("utf-8").splitlines()]
QUICK = Limits(seconds=0.3, kill_seconds=1.0)
# Runs the corpus in a small process of its own: what it reads as its children's peak memory is the workers' alone.
DRIVER = """
import json, sys
root, path, limits = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
sys.path.insert(0, root)
from helpers.sql import Limits, SqlError
from helpers.worker import Worker
def peak():
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e6
with Worker(path) as worker:
    worker.run("SELECT 1")
before, answers = peak(), []
with Worker(path, Limits(**limits)) as worker:
    for query in json.load(sys.stdin):
        try:
            result = worker.run(query)
            answer = ["ok", repr((result.columns, result.rows))[:5000]]
        except SqlError as error:
            answer = [error.reason, str(error)]
        answers.append(answer + [worker.run("SELECT count(*) FROM airports").rows])
print(json.dumps({"answers": answers, "peak_before_mb": before, "peak_mb": peak()}))
"""


def contents(folder: Path) -> dict:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """The corpus, run once: what came of each statement, and the two folders before and after."""
    data, cwd = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("cwd")
    # 20,000 flights squared are more than any limit lets through, as the real 336,776 are
    path = build(data / "flights.db", [("DL", i % 90 - 10, f"N{i % 4000}") for i in range(20_000)])
    for folder in (data, cwd):
        (folder / "canary.txt").write_text(CANARY, encoding="utf-8")
        shutil.copy(build(folder / "x.db", []), folder / "canary.db")
        (folder / "x.db").unlink()
    before = contents(data), contents(cwd)
    limits = json.dumps({"seconds": QUICK.seconds, "kill_seconds": QUICK.kill_seconds})
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(ROOT), str(path), limits],
        input=json.dumps([expand(case["sql"]) for case in CORPUS]),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr[-2000:]
    return json.loads(done.stdout) | {"before": before, "after": (contents(data), contents(cwd)), "folders": (data, cwd)}


def test_corpus_is_large_and_uses_known_words_only():
    assert len({case["sql"] for case in CORPUS}) == len(CORPUS) >= 250
    assert {reason for case in CORPUS for reason in case["reasons"]} <= {*sql.MESSAGES, "ok"}


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CORPUS)), ids=lambda i: f"{i}-{CORPUS[i]['kind'].replace(' ', '-')}")
def test_hostile_statement_is_stopped_for_its_reason(hostile, number):
    case, (reason, said, next_answer) = CORPUS[number], hostile["answers"][number]
    assert reason in case["reasons"], (case["sql"][:200], said)
    assert CANARY not in said
    assert next_answer == [[1]], "the query after it is answered"
    if reason != "ok":
        assert not any(str(folder) in said for folder in (*hostile["folders"], ROOT)), "no path of this machine"
        assert len(said) < 600


@pytest.mark.slow
def test_hostile_corpus_changes_and_creates_no_file(hostile):
    assert hostile["after"] == hostile["before"]
    assert set(hostile["before"][0]) == {"flights.db", "canary.db", "canary.txt"}


@pytest.mark.slow
def test_hostile_corpus_stays_within_memory(hostile):
    if hostile["peak_mb"] is None:
        pytest.skip("this system tells no peak of child processes")
    extra = hostile["peak_mb"] - hostile["peak_before_mb"]
    assert 50 < extra < 200, "MB; the lower bound shows that the bombs were measured"


def test_in_process_refuses_the_same(db, connection):
    """All of the corpus that is refused before it runs, which a trusted process may try without a guard."""
    before = contents(db.parent)
    fast = [case for case in CORPUS if {"forbidden", "syntax", "unknown name", "several statements", "empty"} & {*case["reasons"]}]
    got = [reason_of(execute, connection, expand(case["sql"])) for case in fast]
    assert len(fast) > 200
    assert [case["sql"] for case, reason in zip(fast, got, strict=True) if reason not in case["reasons"]] == []
    assert contents(db.parent) == before


# The other side: that what is forbidden would have worked, so that the checks above are able to fail.

WRITES = [case["sql"] for case in CORPUS if case["kind"] == "write"]


def test_each_write_of_the_corpus_does_write_on_a_plain_connection(db, tmp_path):
    assert len(WRITES) > 20
    for number, statement in enumerate(WRITES):
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.copy(db, folder / "flights.db")
        before = contents(folder)
        with contextlib.closing(sqlite3.connect(folder / "flights.db")) as plain:
            plain.execute("PRAGMA synchronous=OFF")
            plain.execute(statement).fetchall()
            plain.commit()
        assert contents(folder) != before, statement


def test_without_the_authorizer_the_secret_and_other_files_are_in_reach(db, tmp_path):
    shutil.copy(db, tmp_path / "flights.db")
    with contextlib.closing(connect(tmp_path / "flights.db")) as connection:
        connection.set_authorizer(None)
        for query in ("SELECT * FROM secrets", "SELECT * FROM leak", "WITH x AS (SELECT word FROM secrets) SELECT * FROM x"):
            assert execute(connection, query).rows == [(CANARY,)]
        assert execute(connection, "SELECT count(*) FROM sqlite_master").rows == [(4,)]
        assert Path(execute(connection, "SELECT file FROM pragma_database_list").rows[0][0]) == tmp_path / "flights.db"
    with contextlib.closing(sqlite3.connect(tmp_path / "flights.db")) as plain:
        plain.execute(f"VACUUM INTO '{(tmp_path / 'evil.db').as_posix()}'")
    assert (tmp_path / "evil.db").exists()


def test_without_its_limit_a_slow_statement_goes_on(connection):
    query = ENDLESS + "SELECT n FROM c LIMIT 1 OFFSET 300000"
    assert reason_of(execute, connection, query, Limits(seconds=0.01)) == "time"
    assert reason_of(execute, connection, query, Limits(seconds=30)) == "ok"


def test_every_allowed_function_is_needed_to_be_listed(connection):
    """A function that SQLite has and the list has not is refused by name; one that is listed runs."""
    assert reason_of(execute, connection, "SELECT soundex('a')") in ("forbidden", "unknown name")
    assert reason_of(execute, connection, "SELECT lower('A'), 'a' LIKE 'A', date('2013-07-01')") == "ok"
    dangerous = {"load_extension", "fts3_tokenizer", "readfile", "writefile", "edit", "randomblob", "zeroblob"}
    assert not dangerous & sql.FUNCTIONS and not any(name.startswith(("sqlite_", "json", "fts")) for name in sql.FUNCTIONS)
