"""The set-up of a hosted notebook (Colab, Kaggle): what is missing gets installed, what is there is left alone.

It runs before anything is installed: standard library and `packaging` only.
"""

import importlib
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from helpers.files import CourseError
from helpers.runtime import ROOT

HOSTS = {"COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"}  # variables that these two set in every session
MAY_MOVE = ("datasets", "pyarrow", "dill", "multiprocess", "torchao")  # preinstalled too old for TRL, or for PEFT
NEVER = ("torch", "numpy", "pandas", "transformers")  # everything else on such a machine is built against them
TORCHAO = "0.16"  # where an older one is installed, PEFT raises ImportError when it meets an unquantized layer
NO_NETWORK = re.compile("NewConnectionError|ConnectTimeout|ReadTimeout|NameResolution|Temporary failure|ProxyError")  # in what pip says
REMEMBER = {"transformers", "peft", "accelerate"}  # these keep in mind, from their import on, what is installed


def requirements(*extras: str) -> list[str]:
    """What the notebooks need, and some of them more (`extras`), from pyproject.toml: the one place that names it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return sum((project["optional-dependencies"][extra] for extra in extras), project["dependencies"])


def normal(name: str) -> str:
    """A package's name as the index compares it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """What this Python has: normal name and version, of the copy that an import finds."""
    found: dict[str, str] = {}
    for package in metadata.distributions():
        if package.name and package.version:
            found.setdefault(normal(package.name), package.version)
    return found


@dataclass(frozen=True)
class Plan:
    """What has to be done on a machine: requirements to install, packages to remove, and pins for all that must stay."""

    install: list[str]
    remove: list[str]
    constraints: list[str]


def plan(needed: list[str], there: dict[str, str]) -> Plan:
    """What is missing or incompatible, and a pin for everything there but that and `MAY_MOVE`.

    Raises CourseError where one of `NEVER` is too old or too new: to move it would break the machine.
    """
    from packaging.requirements import Requirement
    from packaging.version import InvalidVersion, Version

    wanted = {normal(r.name): r for r in map(Requirement, needed)}
    todo = {name for name, r in wanted.items() if name not in there or not r.specifier.contains(there[name], prereleases=True)}
    if stuck := sorted(todo & set(NEVER) & there.keys()):
        says = " and ".join(f"{name} {there[name]} (the course needs {wanted[name].specifier})" for name in stuck)
        raise CourseError(f"This machine comes with {says}: choose its newest environment, or run the course on your own machine.")
    pins = []
    for name, version in sorted(there.items()):
        try:
            pins += [f"{name}=={Version(version)}"] if name not in todo and name not in MAY_MOVE else []
        except InvalidVersion:  # a system's own package, which pip does not know either
            continue
    old = "torchao" in there and Version(there["torchao"]) < Version(TORCHAO)
    return Plan([str(wanted[name]) for name in sorted(todo)], ["torchao"] if old else [], pins)


def pip(*arguments: str) -> None:
    """Runs this Python's pip in silence; CourseError with its last words when it fails."""
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
    if not done.returncode:
        return
    if "No space left" in done.stderr:
        raise CourseError("The disk filled up while installing: free some space, then run this cell again.")
    if NO_NETWORK.search(done.stderr):
        raise CourseError("Could not install: is there a network (on Kaggle: Settings, Internet)? Nothing is lost: run this cell again.")
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-3:]
    raise CourseError(f"Could not install: {' '.join(errors)[:500]}")


def imported() -> set[str]:
    """Modules that this session has imported."""
    return set(sys.modules)


def install(*extras: str) -> None:
    """On Colab or Kaggle, installs what the notebooks miss (and what a notebook's `extras` name), within two minutes; elsewhere does nothing.
    Safe to run again."""
    if not HOSTS & os.environ.keys():
        return
    before = installed()
    todo = plan(requirements(*extras), before)
    if not todo.install and not todo.remove:
        return
    names = [re.split(r"[^\w-]", r)[0] for r in todo.install]
    print(f"One to two minutes, once a session: installing {', '.join(names) or 'nothing'}" + "; removing torchao" * bool(todo.remove), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "pins.txt"
        pins.write_text("\n".join(todo.constraints), encoding="utf-8")
        if todo.install:
            pip("install", "--quiet", "--prefer-binary", "--retries", "2", "--timeout", "20", "-c", str(pins), *todo.install)
        if todo.remove:
            pip("uninstall", "--quiet", "--yes", *todo.remove)
    importlib.invalidate_caches()
    after = installed()
    moved = {name.replace("-", "_") for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    if stale := sorted((moved | REMEMBER) & imported()):
        raise CourseError(f"Installed, but {', '.join(stale)} had been imported before: restart the session, then run this cell again.")


def mount_drive() -> None:
    """Colab: mounts your Drive and keeps runs there (COURSE_RUNS), so that a lost session goes on from its last checkpoint."""
    try:
        from google.colab import drive
    except ImportError:
        raise CourseError("Only Colab has a Drive to mount: elsewhere set COURSE_RUNS to a folder that lasts.") from None
    place = Path("/content/drive")
    try:
        drive.mount(str(place))
        runs = place / "MyDrive" / "first-llm-experiment" / "runs"
        runs.mkdir(parents=True, exist_ok=True)
    except Exception as error:  # refused, timed out, a full Drive: Colab has a kind of its own for each
        says = f"Your Drive was not mounted ({type(error).__name__})"
        raise CourseError(f"{says}: run this cell again and allow it, or untick it; runs then last as long as this session.") from None
    os.environ["COURSE_RUNS"] = str(runs)
    print("runs are kept in your Drive, in first-llm-experiment/runs")
