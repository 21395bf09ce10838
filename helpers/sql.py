"""Runs SQL that a person or a language model typed against the flights database (or another), which it can read and nothing else.

Two ways in. `execute` runs a query in this process, fast enough to score hundreds: SQLite refuses all but SELECT, and
a time limit stops a slow query between two of its steps. `helpers.worker` runs it in a process of its own,
which can also be killed in the middle of a step, and which has no rights worth stealing. This file is that process's
script as well, hence only the standard library and no import from the course.

In this order: what is allowed, its limits and sentences; in this process; the worker's own side.
"""

import contextlib
import itertools
import json
import os
import re
import signal
import sqlite3
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

# ---------------------------------------------------------------- what is allowed, its limits and sentences

TABLES = ("flights", "airports")  # of the flights database
# An allow-list, so that what a later SQLite adds is refused until someone has looked at it. Left out on purpose:
# load_extension and fts3_tokenizer (run code), zeroblob, randomblob, hex and json_* (no use here but to make it big).
FUNCTIONS = frozenset(
    """
    abs acos asin atan atan2 avg ceil ceiling char coalesce concat concat_ws cos count cume_dist current_date
    current_time current_timestamp date datetime degrees dense_rank exp first_value floor format glob group_concat if
    ifnull iif instr julianday lag last_value lead length like ln log log10 log2 lower ltrim max median min mod
    nth_value ntile nullif percent_rank percentile percentile_cont percentile_disc pi pow power printf radians random
    rank replace round row_number rtrim sign sin sqrt strftime string_agg substr substring sum tan time timediff total
    trim trunc typeof unicode unixepoch upper
    """.split()
)
# What one statement may be made of. LENGTH (bytes of one text or row, also in between) is what keeps a single step
# of SQLite short, since no time limit can stop one: instr() on megabytes runs for seconds, on 100 kB for a tenth.
SQLITE_LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 100_000,
    sqlite3.SQLITE_LIMIT_COLUMN: 100,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 200,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 50,
    sqlite3.SQLITE_LIMIT_VDBE_OP: 25_000,
    sqlite3.SQLITE_LIMIT_FUNCTION_ARG: 50,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 500,
    sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER: 0,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 0,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}
STEPS_BETWEEN_CHECKS = 200  # of SQLite's virtual machine: about 5 µs; at 50 the check's own cost begins to show
MESSAGES = {  # reason: the sentence; {detail} is SQLite's own message, which learners need
    "empty": "There is no SQL here: type one SELECT.",
    "syntax": "SQLite can't read this query ({detail}): correct it and run it again.",
    "unknown name": "SQLite doesn't know a name in this query ({detail}): check the columns of {tables}, put text in 'single quotes'.",
    "several statements": "Only one statement is run at a time: keep one SELECT and remove the rest.",
    "forbidden": "Only SELECT from {tables} is allowed here ({detail}): rewrite the query as one SELECT.",
    "time": "The query was stopped after {seconds:g} s: make it do less, with a narrower WHERE or one join fewer.",
    "killed": "The query was stopped with its process, which was busy for {kill_seconds:g} s: make it do less.",
    "crashed": "The query ended its process, twice, out of memory perhaps: make it do less.",
    "too large": "The query, or what it makes, is too large ({detail}): ask for fewer or shorter things.",
    "missing database": "The {name} database is missing or damaged ({detail}): {remedy}.",
}


@dataclass(frozen=True)
class Limits:
    """What one query may read and cost. Beyond `rows` the answer is cut; beyond any other limit there is a SqlError."""

    seconds: float = 2.0  # wall time, checked between SQLite's steps: reason "time"
    kill_seconds: float = 3.0  # wall time after which the worker is killed, whatever it is doing: reason "killed"
    rows: int = 1000
    value_bytes: int = 10_000  # of one text or blob in the answer (this and what follows: reason "too large")
    result_bytes: int = 2_000_000  # of all values in the answer together
    sql_bytes: int = 10_000  # of the query
    memory_mb: int = 128  # of SQLite's heap (10**6 bytes); the worker's own cap is 64 MB above it, for Python
    tables: tuple[str, ...] = TABLES  # that may be read; none named: all that the database has


@dataclass
class Result:
    """An answer: `truncated` says that there were more rows than `Limits.rows`, and the rest was left out."""

    columns: list[str]
    rows: list[tuple]
    truncated: bool


class SqlError(Exception):
    """A query that gave no answer: `reason` is a key of `MESSAGES`, the message says what to do next."""

    def __init__(self, message: str, reason: str = "syntax"):  # the default is for pickle, which knows the message only
        super().__init__(message)
        self.reason = reason


# What a terminal would obey instead of showing it: control characters, and those that turn the direction of writing
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


def printable(text: str, keep: str = "") -> str:
    """The text with each control character written out, as \\x1b, but for those to `keep`: nothing in it moves a cursor or ends a line."""

    def written(found: re.Match) -> str:  # by hand: the worker, which may open no file, could not import Python's codec for it
        code = ord(found[0])
        return found[0] if found[0] in keep else f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"

    return CONTROLS.sub(written, text)


def problem(reason: str, detail: str = "", limits: Limits = Limits()) -> SqlError:
    detail = printable(" ".join(detail.split()))  # SQLite quotes the query, lines and all
    detail = detail if len(detail) <= 200 else detail[:200] + "…"
    flights = tuple(limits.tables) == TABLES
    words = {"tables": " and ".join(limits.tables) or "the database's tables", "name": "flights" if flights else "SQLite"}
    words["remedy"] = "delete what there is and call helpers.flights.database_path()" if flights else "check its path, and that it is whole"
    return SqlError(MESSAGES[reason].format(detail=detail, **asdict(limits) | words), reason)


# ---------------------------------------------------------------- in this process


def connect(path: str | Path, limits: Limits = Limits()) -> sqlite3.Connection:
    """Opens a database for reading `limits.tables` and nothing else; for the thread that opens it.

    Of `limits` only `tables` and `memory_mb` count here, and the latter holds for all SQLite connections of this process together:
    SQLite has no smaller unit. Raises SqlError ("missing database") when the file is not there or lacks one of the tables.
    """
    path = Path(path).resolve()
    if not path.is_file():  # SQLite's own message would name the path
        raise problem("missing database", "no such file", limits)
    connection = None
    try:
        # immutable: the file is renamed into place once built, so no locks and no look for a journal beside it
        connection = sqlite3.connect(f"{address(path)}?mode=ro&immutable=1", uri=True, isolation_level=None)
        for pragma in (
            "query_only=ON",
            "trusted_schema=OFF",
            "temp_store=MEMORY",  # sorting must not write files
            "cache_size=-8000",  # KiB
            f"hard_heap_limit={limits.memory_mb * 10**6}",  # it can be lowered later, never raised
        ):
            connection.execute(f"PRAGMA {pragma}").fetchall()
        known = {row[0].lower() for row in connection.execute("SELECT name FROM sqlite_master")}
        tables = frozenset(map(str.lower, limits.tables)) or frozenset(name for name in known if not name.startswith("sqlite_"))
        if missing := tables - known:
            raise sqlite3.DatabaseError(f"no table {' or '.join(sorted(missing))}")
        known |= {row[0].lower() for row in connection.execute("PRAGMA module_list")}
    except sqlite3.Error as error:
        if connection:
            connection.close()
        raise problem("missing database", str(error), limits) from None
    if hasattr(connection, "enable_load_extension"):  # some builds of Python leave it out
        connection.enable_load_extension(False)
    if hasattr(connection, "setconfig"):  # Python 3.12; see _names_only for 3.11
        connection.setconfig(sqlite3.SQLITE_DBCONFIG_DQS_DML, False)
        connection.setconfig(sqlite3.SQLITE_DBCONFIG_DEFENSIVE, True)
    for category, value in SQLITE_LIMITS.items():
        connection.setlimit(category, value)
    connection.text_factory = lambda raw: raw.decode("utf-8", "replace")  # CAST(blob AS TEXT) can make anything
    connection.set_authorizer(_authorizer(known, tables))
    return connection


def address(path) -> str:
    """The path as a file: address: as_uri percent-encodes, so that a "?" in a folder's name can't start the options.

    SQLite takes no host in it: a Windows share, \\\\host\\folder, is written with two more slashes.
    """
    return re.sub("^file://(?=[^/])", "file:////", path.as_uri())


def _authorizer(known: set[str], tables: frozenset[str]):
    """SQLite asks it about each thing a statement would do, before it does it; an exception in it counts as a no."""

    def allow(action, first, second, database, trigger) -> int:
        ok = action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_RECURSIVE)  # endless recursion is the limits' business
        if action == sqlite3.SQLITE_FUNCTION:
            ok = second.lower() in FUNCTIONS
        if action == sqlite3.SQLITE_READ:
            table = (first or "").lower()
            ok = table in tables and database in ("main", None)
            # A table read without a column (count(*)) is named as in the query, which may be the name of a CTE:
            # let through what is certainly not the name of anything real. SQLite makes some tables only when they are
            # named, hence the prefixes.
            unreal = table not in known and not table.startswith(("sqlite_", "pragma_", "json"))
            ok = ok or (second == "" and database is None and unreal)
        return sqlite3.SQLITE_OK if ok else sqlite3.SQLITE_DENY

    return allow


def execute(connection: sqlite3.Connection, sql: str, limits: Limits = Limits()) -> Result:
    """Runs one SELECT on a connection made by `connect`, which can be used again whatever happens.

    Raises SqlError. Not for hostile SQL: one step of SQLite that takes long (trim() with a long second argument) runs
    to its end here, past `seconds`; a `Worker` would be killed.
    """
    check_text(sql, limits)
    if not hasattr(connection, "setconfig"):
        sql = _names_only(sql)
    deadline = time.monotonic() + limits.seconds
    connection.set_progress_handler(lambda: time.monotonic() > deadline, STEPS_BETWEEN_CHECKS)
    cursor = connection.cursor()
    try:
        cursor.execute(sql)
        if cursor.description is None:  # nothing to run, or a statement that does its work unasked (REINDEX)
            bare = re.sub(r"--[^\n]*|/\*.*?(\*/|\Z)", "", sql, flags=re.S).strip("; \t\r\n\f\ufeff")
            raise problem("forbidden" if bare else "empty", "not a SELECT", limits)
        return _collect(cursor, limits)
    except (sqlite3.Error, sqlite3.Warning, MemoryError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise problem(reason, str(error) or "out of memory", limits) from None
    finally:
        cursor.close()  # first: a half-read query would hold its memory
        connection.set_progress_handler(None, 0)


def check_text(sql: str, limits: Limits) -> None:
    if re.search("[\0\ud800-\udfff]", sql):  # SQLite would stop reading at the one; the other can't be sent to it
        raise problem("syntax", "a null character, or half a character (a lone surrogate), is in it")
    if (size := len(sql.encode())) > limits.sql_bytes:
        raise problem("too large", f"the query has {size:,} bytes, the limit is {limits.sql_bytes:,}")


def _names_only(sql: str) -> str:
    """The same query with its "names" in backticks, so that Python 3.11 refuses airline = "Delta" as 3.12 does.

    SQLite takes a name in double quotes that it doesn't know for a text, and finds nothing, silently; backticks have
    no such exception. Strings, comments and other quotes are matched only to be passed over.
    """
    token = r"""'(?:[^']|'')*+'|`[^`]*`|\[[^]]*\]|--[^\n]*|/\*.*?(?:\*/|\Z)|"((?:[^"]|"")*+)\""""

    def change(match: re.Match) -> str:
        return match[0] if match[1] is None else "`" + match[1].replace('""', '"').replace("`", "``") + "`"

    return re.sub(token, change, sql, flags=re.S)


def _collect(cursor: sqlite3.Cursor, limits: Limits) -> Result:
    """Reads the rows up to the limits, one at a time, so that no more than that is ever held."""
    rows, total = [], 0
    for row in itertools.islice(cursor, limits.rows):
        for value in row:
            size = len(value.encode()) if isinstance(value, str) else len(value) if isinstance(value, bytes) else 8
            total += size
            if size > limits.value_bytes:
                raise problem("too large", f"a value has {size:,} bytes, the limit is {limits.value_bytes:,}")
        if total > limits.result_bytes:
            raise problem("too large", f"the answer has more than {limits.result_bytes:,} bytes")
        rows.append(row)
    return Result([column[0] for column in cursor.description], rows, truncated=next(cursor, None) is not None)


def _reason(error: Exception) -> str | None:
    """The word for what SQLite reports; None for a mistake of the calling code, such as a closed connection."""
    text, code = str(error), getattr(error, "sqlite_errorcode", 0) & 0xFF  # without the details in the higher bits
    if isinstance(error, (MemoryError, sqlite3.DataError)) or code in (sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_NOMEM):
        return "too large"
    if "one statement at a time" in text:  # Python's own, without a code
        return "several statements"
    if not code:
        return None
    if code == sqlite3.SQLITE_INTERRUPT:
        return "time"
    if code in (sqlite3.SQLITE_AUTH, sqlite3.SQLITE_READONLY) or re.search("not authorized|prohibited|vtable|may not be", text):
        return "forbidden"
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
        return "missing database"
    if text.startswith("no such"):
        return "unknown name"
    # variables: a "?" in the query, of which no number is allowed
    if re.search("too (many|large|big|complex)|at most|stack overflow", text) and "variable" not in text:
        return "too large"
    return "syntax"


# ---------------------------------------------------------------- the worker's own side


def _serve() -> None:
    """The worker's side: the database and the limits on the first line, then a query a line; an answer a line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; what becomes of this one is its parent's business
    connection = None
    for line in iter(sys.stdin.buffer.readline, b""):  # nothing more to read: the parent has gone
        message, answer = json.loads(line), {}
        try:
            if connection is None:
                limits = Limits(**message["limits"])
                connection = connect(message["path"], limits)
                connection.execute("SELECT random()").fetchall()  # SQLite reads its seed from a file, once
                _confine(limits)
            else:
                limits = replace(limits, seconds=message["seconds"])
                _confine_cpu(limits)
                answer = vars(execute(connection, message["sql"], limits))
        except SqlError as error:
            answer = {"reason": error.reason, "message": str(error)}
        sys.stdout.buffer.write(json.dumps(answer, default=lambda blob: {"hex": blob.hex()}).encode() + b"\n")
        sys.stdout.buffer.flush()


def _confine(limits: Limits) -> None:
    """Where the system can (not Windows): from here on no file opened, written or made longer, no process, no core."""
    try:
        import resource
    except ImportError:
        return
    free = os.dup(0)  # the lowest free file number: with that as the limit, none can be opened any more
    os.close(free)
    memory = (limits.memory_mb + 64) * 10**6
    for name, value in {"NOFILE": free, "FSIZE": 0, "NPROC": 0, "CORE": 0, "DATA": memory}.items():
        with contextlib.suppress(ValueError, OSError, AttributeError):  # each is a second fence; macOS lacks some
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def _confine_cpu(limits: Limits) -> None:
    """Where the system can: the process ends by itself if the parent that would have killed it is gone."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        seconds = int(sum(os.times()[:2]) + max(limits.kill_seconds, limits.seconds + 1)) + 2
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))


if __name__ == "__main__" and "--worker" in sys.argv:
    _serve()
