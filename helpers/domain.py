"""What questions are about: a SQLite database, the prompts, the one refusal, and what an answer is checked on. The flights are one, yours is another."""

import contextlib
import re
import sqlite3
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from helpers import sql
from helpers.files import CourseError, building, sha256
from helpers.runtime import cache_dir
from helpers.worker import Worker

LARGEST = 300_000_000  # bytes of a database that is copied in part, to judge answers on


@dataclass(frozen=True)
class Domain:
    """A database and how it is asked; every function of the course that needs one takes it as `domain`, and has the flights by default.

    `tables` are those that a query may read (none named: all), `other_instances` further databases with the same tables on which a
    query that is right by luck gives itself away (by default two copies, each with half of the rows), `names` the texts, in lower
    case, that mean the same as another value, such as an airline's name and its code.
    """

    database: Path | Callable[[], Path]
    schema_prompt: str  # for a model that wasn't trained on this database
    refusal: str  # the one fixed answer to what the database can't answer
    system_prompt: str = "Answer with SQL."  # training moves the schema into the weights, so the prompt can be short
    tables: tuple[str, ...] = ()
    other_instances: Callable[[], list[Path]] | None = None
    names: Callable[[], dict[str, str]] = dict

    def path(self) -> Path:
        """The database's file. CourseError where it is none."""
        if callable(self.database):
            return self.database()
        path = Path(self.database)
        with contextlib.suppress(OSError), path.open("rb") as file:
            if file.read(16) == b"SQLite format 3\0":
                log = path.with_name(f"{path.name}-wal")
                if log.exists() and log.stat().st_size:  # it is opened as a file that nobody writes to
                    raise CourseError(f"{log.name} holds changes that aren't in {path.name} yet: close the program that has it open.")
                return path
        raise CourseError(f"{path.name} is no SQLite database, or isn't there: check the path.")

    def instances(self) -> list[Path]:
        """The other databases on which an answer is judged."""
        return self.other_instances() if self.other_instances else halves(self.path())

    def worker(self, path: Path | None = None) -> Worker:
        """A process that runs queries on the database, or on another instance of it, read-only and bounded."""
        return Worker(path or self.path(), sql.Limits(tables=self.tables))

    def refuses(self, answer: str) -> bool:
        """Whether an answer is the refusal, or holds it: capitals, the full stop and the kind of apostrophe aside."""
        return self.refusal.lower().rstrip(".") in answer.lower().replace("’", "'")


def read(path: str | Path) -> Domain:
    """The domain that a TOML file describes (data/own_example/domain.toml is one): database, schema_prompt and refusal, and where
    wanted system_prompt and tables. The database's path begins in the file's folder. CourseError says what is wrong with it."""
    path = Path(path)
    try:
        if path.stat().st_size > 100_000:
            raise CourseError(f"{path.name} has {path.stat().st_size:,} bytes: it is no description of a domain.")
        said = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise CourseError(f"Can't read {path.name}: {error.strerror}. Give the path of a TOML file such as data/own_example/domain.toml.") from None
    except UnicodeDecodeError:
        raise CourseError(f"{path.name} is not UTF-8 text: save it as UTF-8.") from None
    except (ValueError, RecursionError) as error:
        if any(sign in str(error) for sign in ("nvalid hex", "nescaped '\\'")):  # tomllib's words for an escape that there isn't
            raise CourseError(f"{path.name}: a backslash in double quotes means something else in TOML; write the path with / or in single quotes.") from None
        raise CourseError(f"{path.name} is not TOML ({str(error)[:100]}): compare it with data/own_example/domain.toml.") from None
    kinds = {"database": str, "schema_prompt": str, "refusal": str, "system_prompt": str, "tables": list}
    if missing := [name for name in ("database", "schema_prompt", "refusal") if name not in said]:
        raise CourseError(f"{path.name} lacks {' and '.join(missing)}: compare it with data/own_example/domain.toml.")
    for name, value in said.items():
        if name not in kinds:
            raise CourseError(f"{path.name}: {name!r} is nothing that a domain has; there are {', '.join(kinds)}.")
        texts = [value] if kinds[name] is str else value if isinstance(value, list) else []
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise CourseError(f"{path.name}: {name} must be {'a list of texts' if kinds[name] is list else 'a text'}, and not empty.")
    more = {"system_prompt": said["system_prompt"].strip()} if "system_prompt" in said else {}
    about = Domain(path.parent / Path(said["database"]).expanduser(), said["schema_prompt"].strip(), said["refusal"].strip(), tables=tuple(said.get("tables", ())), **more)
    _check_tables(about, path.name)
    return about


def _check_tables(about: Domain, name: str) -> None:
    """CourseError where the database lacks a table that the description names, or has none."""
    try:
        path = about.path()
        with contextlib.closing(sqlite3.connect(f"{sql.address(path.resolve())}?mode=ro&immutable=1", uri=True)) as connection:
            there = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'")]
    except CourseError as error:
        raise CourseError(f"{name}: {error}") from None
    except sqlite3.Error as error:
        raise CourseError(f"{name}: {path.name} can't be read ({error}): is it whole?") from None
    if lacking := [table for table in about.tables if table.lower() not in map(str.lower, there)] or ([] if there else ["at all"]):
        tables = ", ".join(map(sql.printable, there[:8])) or "none"
        raise CourseError(f"{name}: no table {' or '.join(lacking)} in {path.name}; its tables: {tables}. A view can't be read: make it a table.")


def halves(database: Path) -> list[Path]:
    """Two copies of a database, each with another half of every table's rows, kept in the cache; none of one that is too large or holds virtual tables.

    A query that is right on the whole by luck (a filter that removes nothing, a tie) is seldom right on both. After
    Zhong et al. 2020, "Semantic Evaluation for Text-to-SQL with Distilled Test Suites".
    """
    if (size := database.stat().st_size) > LARGEST:
        return []
    targets = [cache_dir() / f"half-{sha256(database)[:12]}-{half}.db" for half in (0, 1)]
    try:
        with contextlib.closing(sqlite3.connect(f"{sql.address(database.resolve())}?mode=ro", uri=True)) as source:
            about = source.execute("SELECT type, name, coalesce(sql, '') FROM sqlite_master").fetchall()
            if any(re.match(r"\s*CREATE\s+VIRTUAL", text, re.I) for _, _, text in about):
                return []
            for half, target in enumerate(targets):
                with building(target, need_bytes=2 * size) as scratch:
                    if scratch is not None:
                        _write_half(source, scratch, half, about)
    except sqlite3.Error as error:
        raise CourseError(f"{database.name} can't be read ({error}): is it whole?") from None
    return targets


def _write_half(source, target: Path, half: int, about: list[tuple[str, str, str]]) -> None:
    """A copy of an open database with one half of its rows. `about`: type, name and SQL of all that it has."""
    with contextlib.closing(sqlite3.connect(target)) as copy:
        source.backup(copy)
        for _, name, _ in (entry for entry in about if entry[0] == "trigger"):
            copy.execute(f"DROP TRIGGER {_quoted(name)}")
        for _, name, text in (entry for entry in about if entry[0] == "table"):
            if not name.startswith("sqlite_") and not re.search(r"WITHOUT\s+ROWID", text, re.I):  # such a one stays whole
                copy.execute(f"DELETE FROM {_quoted(name)} WHERE rowid * 2654435761 / 65536 % 2 = {half}")
        copy.commit()


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
