"""What another system lacks, taken away here: Windows' code pages and line ends, resource limits, fork; macOS's limits.

The checks on source read every file of helpers, course and tests, so that a new one is held to them as well.
"""

import _pyio
import ast
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path, PureWindowsPath

import pytest

from helpers import flights, runtime, sql
from helpers.runtime import ROOT
from helpers.worker import Worker, run_untrusted

FILES = [path for folder in ("helpers", "course", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
NEEDS = {"make": shutil.which("make"), "git": shutil.which("git")}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# ---------------------------------------------------------------- the source


def nameless_text(source: str) -> list[int]:
    """Lines that read or write text without naming its encoding, which on Windows is then a code page such as cp1252."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or "encoding" in {k.arg for k in node.keywords}:
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        on = node.func.value.id if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name) else ""
        # where the mode and a positional encoding stand: after the file's name, where that is not the object itself
        before = 0 if isinstance(node.func, ast.Attribute) and on != "io" else 1
        places = {"read_text": (None, 0), "write_text": (None, 1), "open": (before, before + 2)}
        if called not in places or on in ("os", "zipfile", "tarfile", "archive"):  # members of an archive are bytes
            continue
        mode_at, encoding_at = places[called]
        modes = [k.value for k in node.keywords if k.arg == "mode"] + (node.args[mode_at : mode_at + 1] if mode_at is not None else [])
        if len(node.args) > encoding_at or any(isinstance(m, ast.Constant) and "b" in str(m.value) for m in modes):
            continue
        found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", FILES, ids=name)
def test_all_text_names_its_encoding(path):
    found = nameless_text(path.read_text(encoding="utf-8"))
    assert not found, f'{name(path)}, lines {found}: add encoding="utf-8"'


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("p.read_text()", [1]),
        ("p.write_text('x', newline='')", [1]),
        ("open('x')", [1]),
        ("io.open('x', 'w')", [1]),
        ("p.open('w')", [1]),
        ("p.read_text('utf-8'); p.read_text(encoding='utf-8')", []),
        ("p.write_text('x', 'utf-8'); p.write_text('x', encoding='utf-8')", []),
        ("open('x', 'rb'); open('x', mode='wb'); p.open('rb'); open('x', 'r', -1, 'utf-8'); os.open('x', 1); safe_open('x')", []),
    ],
)
def test_the_check_of_encodings_can_fail(source, lines):
    assert nameless_text(source) == lines


POSIX_MODULES = {"fcntl", "grp", "pwd", "resource", "termios"}
POSIX_NAMES = {"SIGALRM", "SIGKILL", "alarm", "fork", "geteuid", "getuid", "killpg", "sched_getaffinity", "setsid", "uname"}


def posix_only(source: str) -> list[str]:
    """What Windows has not: modules imported when a file is (within a function, a fallback can stand beside them), and names."""
    nodes = list(ast.walk(ast.parse(source)))
    inner = {id(node) for f in nodes if isinstance(f, (ast.FunctionDef, ast.Lambda)) for node in ast.walk(f)}
    found = []
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
        found += [f"line {node.lineno}: {m}" for m in modules if m in POSIX_MODULES and id(node) not in inner]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("os", "signal") and node.attr in POSIX_NAMES:
            found.append(f"line {node.lineno}: {node.value.id}.{node.attr}")
    return found


@pytest.mark.parametrize("path", FILES, ids=name)
def test_nothing_is_used_that_only_posix_has(path):
    assert posix_only(path.read_text(encoding="utf-8")) == [], name(path)


def test_the_check_of_posix_names_can_fail():
    assert posix_only("import resource\nos.fork()\nsignal.SIGKILL") == ["line 1: resource", "line 2: os.fork", "line 3: signal.SIGKILL"]
    assert posix_only("def f():\n    import resource\n    os.replace(a, b)") == []


def runs_on_import(source: str) -> list[int]:
    """Lines of calls that a mere import makes: where processes are spawned (macOS, Windows), a child imports what it runs."""
    return [node.lineno for node in ast.parse(source).body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name != "tests" and p.name != "__main__.py"], ids=name)
def test_importing_runs_nothing(path):
    assert runs_on_import(path.read_text(encoding="utf-8")) == []


def test_the_check_of_imports_can_fail():
    assert runs_on_import("import x\nx.main()") == [2] and runs_on_import('"""Doc."""\nif __name__ == "__main__":\n    main()') == []


# ---------------------------------------------------------------- consoles

COMMANDS = [p for p in FILES if p.parent.name != "tests" and "sys.exit(main())" in p.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", COMMANDS, ids=name)
def test_every_command_survives_a_code_page(path):
    assert 'sys.stdout.reconfigure(errors="replace")' in path.read_text(encoding="utf-8"), "a letter that a pipe on Windows lacks would raise"


CONSOLE = """
import runpy, sys
from helpers import dense, flights, generation, models, runtime
def broken(*_, **__):
    raise runtime.CourseError("é … · → ł 😀")
sys.modules["transformers"] = None  # so that nothing is trained
if sys.argv[1] == "helpers.doctor":
    runtime.setup = runtime.memory_gb = models.model_path = flights.perturbed_paths = broken
else:
    runtime.setup, models.load_model, models.load_tokenizer = (lambda: None,) * 3
    dense.wanted = lambda model: False
    generation.generate = lambda *_, **__: ["SELECT 'é … · → ł 😀' AS t"]
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__")
"""


def command(*arguments: str, code: str = CONSOLE, page: str = "cp1252", asked: str = "") -> subprocess.CompletedProcess:
    """Runs a command of helpers as a pipe on Windows would see it, in a code page; without a model."""
    environment = {**os.environ, "PYTHONIOENCODING": page, "PYTHONUTF8": "0"}
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, capture_output=True, input=asked.encode(), timeout=120)


@pytest.mark.parametrize(("page", "shown"), [("cp1252", "é … · ? ? ?"), ("cp932", "? … ? → ? ?"), ("ascii", "? ? ? ? ? ?")])
def test_commands_print_what_a_code_page_has_and_a_question_mark_for_the_rest(page, shown):
    done = command("helpers.doctor", page=page)
    out = done.stdout.decode(page)
    assert done.returncode == 1 and f"PROBLEM: {shown}" in out and "Not ready: mend memory" in out and not done.stderr, done.stderr.decode()
    done = command("helpers.ask", "--stage", "base", "what?", page=page)
    assert done.returncode == 0 and done.stdout.decode(page).splitlines()[-1] == shown, done.stderr.decode()


def test_without_that_line_a_code_page_stops_a_command():
    run = "runpy.run_module(sys.argv[0], run_name="
    source = "exec(open(runpy.importlib.util.find_spec(sys.argv[0]).origin, encoding='utf-8').read().replace('sys.stdout.reconfigure', 'dict'), {'__name__': "
    done = command("helpers.doctor", code=CONSOLE.replace(run, source).replace("'__name__': \"__main__\")", "'__name__': '__main__'})"))
    assert done.returncode == 1 and b"UnicodeEncodeError" in done.stderr, done.stderr.decode()


def test_json_lines_are_the_same_in_any_code_page():
    for page in ("cp1252", "ascii", "utf-8"):
        done = command("helpers.ask", "--stage", "base", "--jsonl", page=page, asked="\ufeffwhat?\r\nhow → now?\n")
        assert done.returncode == 0, done.stderr.decode()
        rows = [json.loads(line) for line in done.stdout.decode("ascii").splitlines()]
        assert [(r["question"], r["rows"]) for r in rows] == [("what?", [["é … · → ł 😀"]]), ("how → now?", [["é … · → ł 😀"]])]


# ---------------------------------------------------------------- files


def test_files_have_the_same_line_ends_on_windows(tmp_path, monkeypatch):
    """Windows' text files, simulated: Python's own io module instead of C's, with Windows' line ends."""
    monkeypatch.setattr(io, "open", _pyio.open)
    monkeypatch.setattr(os, "linesep", "\r\n")
    (tmp_path / "plain").write_text("é\n", encoding="utf-8")
    assert (tmp_path / "plain").read_bytes() == "é\r\n".encode(), "the simulation works"
    runtime.write_whole(tmp_path / "whole", "é\n")
    assert (tmp_path / "whole").read_bytes() == "é\n".encode(), 'write_whole: add newline="\\n"'


@pytest.mark.skipif(not NEEDS["git"], reason="no git here")
@pytest.mark.parametrize("attributes", [True, False], ids=["with .gitattributes", "without"])
def test_a_checkout_on_windows_keeps_every_byte_of_the_data(tmp_path, attributes):
    names = ["data/questions/validation.jsonl", "data/preferences/style.jsonl", "data/results/sft.json", "data/nycflights/airports.parquet"]
    names += ["data/questions/phrasings/validation.toml", "data/held_out/text.txt"]
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "core.autocrlf=true", "-c", "core.safecrlf=false"]
    for path in [".gitattributes"] * attributes + names:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"], ["rm", "-rq", "data"], ["checkout", "-q", "HEAD", "--", "data"]):
        subprocess.run([*git, *arguments], cwd=tmp_path, check=True, capture_output=True)
    same = {path: (tmp_path / path).read_bytes() == (ROOT / path).read_bytes() for path in names}
    assert all(same.values()) if attributes else not any(ok for path, ok in same.items() if not path.endswith(".parquet")), same


def test_data_is_committed_with_one_kind_of_line_end():
    for path in (p for p in (ROOT / "data").rglob("*") if p.suffix in (".jsonl", ".json", ".toml", ".txt", ".md", ".py")):
        assert b"\r" not in path.read_bytes(), name(path)


@pytest.mark.parametrize(
    ("path", "address"),
    [
        (PureWindowsPath(r"C:\Users\é b\a?x#y.db"), "file:///C:/Users/%C3%A9%20b/a%3Fx%23y.db"),
        (PureWindowsPath(r"\\host\share\flights.db"), "file:////host/share/flights.db"),
        (Path(ROOT.anchor) / "x" / "flights.db", (Path(ROOT.anchor) / "x" / "flights.db").as_uri()),
    ],
)
def test_sqlite_takes_the_address_of_any_path(path, address):
    assert sql.address(path) == address
    with pytest.raises(sqlite3.OperationalError, match="unable to open"):  # and not "invalid uri authority"
        sqlite3.connect(f"{address}?mode=ro", uri=True).execute("SELECT 1 FROM sqlite_master")


def test_sqlite_refuses_a_host_in_an_address():
    with pytest.raises(sqlite3.OperationalError, match="authority"):
        sqlite3.connect("file://host/share/flights.db?mode=ro", uri=True)


def test_a_database_is_closed_before_it_is_renamed(tmp_path, monkeypatch):
    """Windows renames no open file. Here, every connection is watched."""
    opened, real, replace = [], sqlite3.connect, os.replace

    class Watched(sqlite3.Connection):
        open = True

        def close(self):
            self.open = False
            super().close()

    def checked(source, target):
        assert not any(connection.open for connection in opened)
        replace(source, target)

    monkeypatch.setenv("COURSE_CACHE", str(tmp_path))
    monkeypatch.setattr(flights.sqlite3, "connect", lambda *a, **k: opened.append(real(*a, **k, factory=Watched)) or opened[-1])
    monkeypatch.setattr(runtime.os, "replace", checked)
    assert flights._built.__wrapped__("small.db", lambda frame: frame.head(10)).exists() and len(opened) == 1
    with contextlib.closing(sql.connect(tmp_path / "small.db")) as connection:
        assert sql.execute(connection, "SELECT count(*) FROM flights").rows == [(10,)]
        with pytest.raises(AssertionError):
            checked(tmp_path / "small.db", tmp_path / "other.db")  # this one is open


# ---------------------------------------------------------------- the worker

SHIM = """
import runpy, sys
{there}
runpy.run_path({path!r}, run_name="__main__")
"""
LACKS = {  # a system that lacks something of what `helpers.sql._confine` uses
    "no resource module": "sys.modules['resource'] = None",
    "limits refused with ValueError": "import resource\ndef no(*_): raise ValueError('current limit exceeds maximum limit')\nresource.setrlimit = no",
    "limits refused with OSError": "import resource\ndef no(*_): raise OSError(22, 'Invalid argument')\nresource.setrlimit = no",
    "no such limits": "import resource\nfor name in dir(resource):\n    if name.startswith('RLIMIT_') and name != 'RLIMIT_CPU': delattr(resource, name)",
}
SLOW = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT "
UNSTOPPABLE = SLOW + "sum(length(trim(printf('%.99000c', 'a'), printf('%.8000c', 'b') || n || 'a'))) FROM c"


@pytest.fixture
def db(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "flights.db")) as connection:
        connection.executescript("CREATE TABLE flights (x); CREATE TABLE airports (x); INSERT INTO flights VALUES (1)")
    return tmp_path / "flights.db"


def reason(worker: Worker, query: str) -> str:
    try:
        worker.run(query)
    except sql.SqlError as error:
        return error.reason
    return "ok"


def worker_that(there: str, tmp_path: Path, monkeypatch, db: Path) -> Worker:
    """A worker whose process runs the lines `there` before helpers/sql.py."""
    (tmp_path / "shim.py").write_text(SHIM.format(there=there, path=sql.__file__), encoding="utf-8")
    monkeypatch.setattr(sql, "__file__", str(tmp_path / "shim.py"))
    return Worker(db, sql.Limits(seconds=0.3, kill_seconds=1.0))


@pytest.mark.parametrize("lacking", LACKS)
def test_the_worker_answers_refuses_and_is_killed_where_limits_are_lacking(lacking, tmp_path, monkeypatch, db):
    if "resource" in LACKS[lacking] and "None" not in LACKS[lacking]:
        pytest.importorskip("resource")
    with worker_that(LACKS[lacking], tmp_path, monkeypatch, db) as worker:
        assert worker.run("SELECT count(*) FROM flights").rows == [(1,)]
        assert reason(worker, "ATTACH 'evil.db' AS evil") == reason(worker, "SELECT load_extension('x')") == "forbidden"
        assert reason(worker, SLOW + "max(n) FROM c") == "time"
        assert reason(worker, UNSTOPPABLE) == "killed"
        assert worker.run("SELECT 2").rows == [(2,)]
    assert not (tmp_path / "evil.db").exists()


def test_what_is_taken_away_is_missed(tmp_path, monkeypatch, db):
    """An error that nobody expects ends the worker: the lines before helpers/sql.py do reach it."""
    pytest.importorskip("resource")
    unexpected = "import resource\ndef no(*_): raise RuntimeError\nresource.setrlimit = no"
    with worker_that(unexpected, tmp_path, monkeypatch, db) as worker:
        assert reason(worker, "SELECT 1") == "crashed"


def _spawned(path: Path, query: str) -> tuple:
    try:
        return tuple(run_untrusted(query, path).rows)
    except sql.SqlError as error:
        return (error.reason,)


def test_a_spawned_process_can_use_all_of_it(db):
    """macOS and Windows start processes by spawn: a child imports the course anew and is sent everything pickled."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        asked = [(db, "SELECT count(*) FROM flights"), (db, "DROP TABLE flights")]
        assert pool.starmap_async(_spawned, asked).get(60) == [((1,),), ("forbidden",)]
        assert pool.apply_async(run_untrusted, ("SELECT 1", db)).get(60) == sql.Result(["1"], [(1,)], False)
        with pytest.raises(sql.SqlError, match="SELECT") as caught:  # the error itself comes back
            pool.apply_async(run_untrusted, ("DROP TABLE flights", db)).get(60)
        assert isinstance(caught.value, sql.SqlError)


# ---------------------------------------------------------------- make


@pytest.mark.skipif(not NEEDS["make"], reason="no make here")
@pytest.mark.parametrize(("system", "folder", "python"), [("Windows_NT", "Scripts", "python"), ("", "bin", "python3")])
def test_make_finds_the_virtual_environment_of_each_system(system, folder, python):
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "PYTHON")}
    dry = ["make", "--dry-run", "--always-make", f"OS={system}", "install", "lab"]  # says what it would do
    shown = subprocess.run(dry, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert f"|| {python} -m venv .venv\n" in shown and f".venv/{folder}/python -m pip" in shown and f".venv/{folder}/jupyter lab" in shown
    assert f".venv/{'bin' if system else 'Scripts'}/" not in shown
