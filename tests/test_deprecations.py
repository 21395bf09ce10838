"""What a notebook sets off that is deprecated is recorded, hidden or not, and makes its check fail."""

import os
import subprocess
import sys

import nbformat
import pytest

from course import deprecations, runner

WARNS = "import warnings\nwarnings.warn('old() is going', {}, stacklevel=1)"
CAUGHT = {  # code, and the category and a part of the message that are recorded
    WARNS.format("DeprecationWarning"): ("DeprecationWarning", "old() is going"),
    WARNS.format("PendingDeprecationWarning"): ("PendingDeprecationWarning", "old() is going"),
    "import warnings\nwarnings.filterwarnings('ignore')\n" + WARNS.format("FutureWarning"): ("FutureWarning", "old() is going"),
    "import warnings\nclass Mine(DeprecationWarning): pass\nwarnings.warn(Mine('farewell'))": ("Mine", "farewell"),
    "import warnings\nwarnings.warn('x is Deprecated')": ("UserWarning", "x is Deprecated"),
    "import warnings\nwarnings.warn_explicit('bye', FutureWarning, 'lib.py', 1)": ("FutureWarning", "bye"),
    "import logging\nlog = logging.getLogger('lib')\nlog.setLevel('ERROR')\nlog.warning('%s will be removed in v%d', 'x', 6)": (
        "log",
        "x will be removed in v6",
    ),
    "import logging\nlogging.LoggerAdapter(logging.getLogger('lib'), {}).info('no longer supported')": ("log", "no longer supported"),
    "class I(int): pass\nclass X:\n    def __int__(self): return I(1)\nint(X())": ("DeprecationWarning", "strict subclass of int"),  # raised in C
}
CLEAN = [
    "import warnings\nwarnings.warn('slow')",
    "import logging\nlogging.getLogger('lib').warning('100%s of it')\nlogging.getLogger('lib').error('%d', 'x')",
    "1 + 1",
]


def run(code: str, tmp_path, **modules: str) -> list[dict]:
    """What is recorded while a script runs as a notebook's kernel would, with modules beside it."""
    environment = deprecations.environment(tmp_path / "ipython")
    startup = (tmp_path / "ipython/profile_default/startup/00-deprecations.py").read_text(encoding="utf-8")
    for name, text in ({"cell": startup + code} | modules).items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    subprocess.run([sys.executable, tmp_path / "cell.py"], env=os.environ | environment, check=True, capture_output=True)
    return deprecations.read(environment)


@pytest.mark.parametrize("code", CAUGHT)
def test_what_is_deprecated_is_recorded_once(code, tmp_path):
    entry, *more = run(f"for _ in range(2):\n    exec({code!r}, globals())", tmp_path)
    category, message = CAUGHT[code]
    assert not more and entry["category"] == category and message in entry["message"] and entry["ours"].startswith("__main__: ")


@pytest.mark.parametrize("code", CLEAN)
def test_nothing_is_recorded_where_nothing_is_deprecated(code, tmp_path):
    assert run(code, tmp_path) == []


def test_the_module_that_warns_and_the_line_of_ours_are_named(tmp_path):
    """By `stacklevel`, through the import machinery where a module warns while it is imported; no path of a machine."""
    warns = "import warnings\ndef f(level): warnings.warn(f'level {level}', FutureWarning, stacklevel=level)\nwarnings.warn('all of it', DeprecationWarning, 2)"
    entries = run("import lib\nlib.f(1)\nlib.f(2)\nlib.f(99)", tmp_path, lib=warns)
    assert [(e["module"], e["message"], e["ours"]) for e in entries] == [
        ("__main__", "all of it", "__main__: import lib"),
        ("lib", "level 1", "__main__: lib.f(1)"),
        ("__main__", "level 2", "__main__: lib.f(2)"),
        ("__main__", "level 99", "__main__: lib.f(99)"),
    ]
    assert str(tmp_path) not in str(entries)


def test_a_warning_is_still_shown_or_raised_as_before(tmp_path):
    """With the same place, filters and catching; the kernel's names are left as they were."""
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    warnings.warn("x is deprecated", FutureWarning)
assert caught[0].filename == __file__ and caught[0].category is FutureWarning
warnings.simplefilter("error")
try:
    warnings.warn("x is deprecated")
    raise SystemExit(1)
except UserWarning:
    pass
assert "scope" not in globals()
"""
    assert len(run(code, tmp_path)) == 2


def test_only_what_is_allowed_is_let_through(tmp_path, capsys, monkeypatch):
    environment = deprecations.environment(tmp_path / "ipython")
    assert deprecations.report(environment) == 0 and capsys.readouterr().out == ""
    line = '{"module": "lib", "category": "FutureWarning", "message": "f is deprecated", "ours": "__main__: f()"}\n'
    (tmp_path / "ipython/record.jsonl").write_text(line * 2, encoding="utf-8")
    assert deprecations.report(environment) == 1
    assert capsys.readouterr().out == "DEPRECATED: FutureWarning of lib: f is deprecated\n   set off by __main__: f()\n"
    for entry, status in {("lib", "f is", "why"): 0, ("lib", "g is", "why"): 1, ("lib.x", "f is", "why"): 1}.items():
        monkeypatch.setattr(deprecations, "ALLOWED", (entry,))
        assert deprecations.report(environment) == status
        assert capsys.readouterr().out.startswith("DEPRECATED" if status else "allowed")


def test_each_exception_has_a_module_and_a_reason():
    assert all(module and why for module, _, why in deprecations.ALLOWED)
    assert len({(module, start) for module, start, _ in deprecations.ALLOWED}) == len(deprecations.ALLOWED)
    assert not any(module.split(".")[0] in ("__main__", "helpers", "course") for module, _, _ in deprecations.ALLOWED)  # ours is mended


@pytest.mark.slow
def test_nbval_fails_for_a_notebook_that_uses_what_is_deprecated(tmp_path, capfd):
    def write(*cells):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
        nbformat.write(notebook, tmp_path / "small.ipynb")
        return runner.nbval(["small"], tmp_path)

    hidden = "import warnings\nwarnings.filterwarnings('ignore')"
    assert write(hidden, "warnings.warn('fine')") == 0
    assert "deprecat" not in capfd.readouterr().out.lower()
    assert write(hidden, "warnings.warn('f is going', DeprecationWarning)") == 1
    said = capfd.readouterr().out
    assert "2 passed" in said and "DEPRECATED: DeprecationWarning of __main__: f is going\n   set off by __main__: warnings.warn('f is going'" in said
    assert write("1 / 0") == 1  # and a failing cell is one, as ever
