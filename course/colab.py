"""Proof without Colab: `python -m course.colab check|pins|newest`, called by the Makefile.

check   a resolver's answer for Colab's own Python and versions, then a replica of them here, on which the set-up cell's
        install runs and the core notebooks pass, opened alone in an empty folder as Colab opens them.
pins    renews `colab.txt` from a `pip freeze` of a Colab GPU session.
newest  the core notebooks with the newest version of every library that the ranges in pyproject.toml allow.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from course import hosted, lessons, runner
from helpers.command import status
from helpers.files import CourseError, write_whole
from helpers.runtime import ROOT, runs_dir, setup

PINS = ROOT / "course" / "colab.txt"
PYTHON = "3.13"  # Colab's, as the head of PINS says
PLATFORMS = ("manylinux2014_x86_64", *(f"manylinux_2_{minor}_x86_64" for minor in range(17, 36)))  # glibc 2.35 and what it can run
KERNEL = ("ipykernel", "ipywidgets", "pip", "setuptools")  # beside the course's own needs: what runs cells and draws progress bars
RENEW = """# What a Colab GPU session has preinstalled of all that the course's dependencies reach, on {date} (Python {python}).
# To renew: run `!pip freeze` on Colab, save it as freeze.txt, then `.venv/bin/python -m course.colab pins freeze.txt DATE`.
"""


def pins(path: Path = PINS) -> dict[str, str]:
    """Colab's versions by normal name, from name==version lines."""
    found = re.findall(r"^([\w.-]+)==([^\s;]+)", path.read_text(encoding="utf-8"), re.M)
    return {hosted.normal(name): version.split("+")[0] for name, version in found}


def answer(*requirements: str, constraints: list[str] = ()) -> list[dict]:
    """The index's metadata of what pip would install on Colab (its Python, its platform), without installing anything."""
    with tempfile.TemporaryDirectory() as folder:
        limits, report = Path(folder) / "pins.txt", Path(folder) / "report.json"
        write_whole(limits, "\n".join(constraints))
        place = [word for platform in PLATFORMS for word in ("--platform", platform)]
        place += ["--python-version", PYTHON, "--implementation", "cp", "--only-binary=:all:", "--target", str(Path(folder) / "none")]
        hosted.pip("install", "--quiet", "--dry-run", "--report", str(report), *place, "-c", str(limits), *requirements)
        return [package["metadata"] for package in json.loads(report.read_text(encoding="utf-8"))["install"]]


def reached(there: dict[str, str]) -> dict[str, str]:
    """Of a machine's versions, those that the course's dependencies and a kernel lead to, by the index's metadata of these versions."""
    from packaging.requirements import Requirement

    machine = {"python_version": PYTHON, "python_full_version": PYTHON + ".0", "sys_platform": "linux", "platform_machine": "x86_64"}
    left = [Requirement(r) for r in (*hosted.requirements(), *hosted.MAY_MOVE, *KERNEL)]
    extras: dict[str, set] = {}  # of each name: the extras asked for so far
    asked: dict[str, list] = {}  # of each name: its own requirements
    while left:
        names = {hosted.normal(r.name) for r in left}
        for r in left:
            extras.setdefault(hosted.normal(r.name), {""}).update(r.extras)
        new = [f"{name}=={there[name]}" for name in names if name in there and name not in asked]
        for found in answer("--no-deps", *new) if new else []:
            asked[hosted.normal(found["name"])] = [Requirement(r) for r in found.get("requires_dist", [])]
        left = [r for name in names for r in asked.get(name, ()) if not r.marker or any(r.marker.evaluate(machine | {"extra": e}) for e in extras[name])]
        left = [r for r in left if not {"", *r.extras} <= extras.get(hosted.normal(r.name), set())]
    return {name: there[name] for name in asked}


def renew(freeze: Path, date: str) -> None:
    """Writes colab.txt: of a Colab freeze, what the course's dependencies reach."""
    kept = reached(pins(freeze))
    lines = "".join(f"{name}=={version}\n" for name, version in sorted(kept.items()))
    write_whole(PINS, RENEW.format(date=date, python=PYTHON) + lines)
    print(f"{len(kept)} pins in {PINS.name}")


def moves(before: dict[str, str], after: dict[str, str]) -> tuple[dict, dict]:
    """What of `before` has another version in `after` or is gone, and what came in addition."""
    moved = {name: (version, after.get(name, "removed")) for name, version in before.items() if after.get(name) != version}
    return moved, {name: version for name, version in after.items() if name not in before}


def check_moves(moved: dict) -> None:
    """CourseError where anything moved that must not."""
    for name, (old, new) in sorted(moved.items()):
        print(f"  {name} {old} -> {new}")
    if wrong := moved.keys() - set(hosted.MAY_MOVE):
        raise CourseError(f"The set-up cell would move {', '.join(sorted(wrong))} on Colab: adapt the ranges in pyproject.toml.")


def resolve() -> None:
    """Asks pip what the set-up cell's install would do with Colab's Python and versions, without installing anything."""
    there = pins()
    todo = hosted.plan(hosted.requirements(), there)
    print(f"resolver: the set-up cell would install {', '.join(todo.install)}; remove {', '.join(todo.remove) or 'nothing'}")
    found = answer(*todo.install, constraints=todo.constraints)
    after = {hosted.normal(p["name"]): p["version"] for p in found}
    touched = {name: version for name, version in there.items() if name in after or name in todo.remove}
    moved, added = moves(touched, after)
    added = {name: version for name, version in added.items() if not re.match("nvidia|cuda|triton", name)}  # torch's own, there on Colab
    print(f"resolver: {len(after)} packages reached; moved:")
    check_moves(moved)
    print(f"  added: {', '.join(f'{name} {version}' for name, version in sorted(added.items()))}")


CPU = ["--index-url", "https://download.pytorch.org/whl/cpu"] if sys.platform == "linux" and not shutil.which("nvidia-smi") else []


def environment(folder: Path) -> list[str]:
    """A fresh virtual environment in `folder`/venv with torch as the course locks it; returns the command that is its pip install."""
    shutil.rmtree(folder / "venv", ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    install = [str(python(folder)), "-m", "pip", "install", "--quiet"]
    torch = re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)[0]
    if not CPU or subprocess.run([*install, "--retries", "1", "--timeout", "20", *CPU, torch], capture_output=True).returncode:
        subprocess.run([*install, torch], check=True)
    return install


def python(folder: Path) -> Path:
    """The Python of the environment in `folder`."""
    return folder / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def versions(folder: Path) -> dict[str, str]:
    """What the environment in `folder` has installed, as `hosted.installed` tells it."""
    code = "import json; from course import hosted; print(json.dumps(hosted.installed()))"
    return json.loads(subprocess.run([str(python(folder)), "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout)


def commit(bare: Path, tag: str) -> None:
    """A bare repository that holds this folder's files, as they are now and git does not ignore them, under `tag`."""

    def git(*arguments, **variables):
        command = ["git", "-c", "user.name=course", "-c", "user.email=course@example.org", *arguments]
        return subprocess.run(command, cwd=ROOT, env=os.environ | variables, check=True, capture_output=True, text=True).stdout.strip()

    index = {"GIT_INDEX_FILE": str(bare) + ".index"}
    git("init", "--quiet", "--bare", str(bare))
    git("add", "--all", **index)
    git("push", "--quiet", str(bare), git("commit-tree", git("write-tree", **index), "-m", tag) + f":refs/tags/{tag}")


def notebooks(folder: Path, **variables: str) -> None:
    """The core notebooks by nbval with the kernel of the environment in `folder`, alone in an empty folder; the course's address leads to the files here."""
    content, bare, project = folder / "content", folder / "course.git", runner.project()
    for old in (content, bare):
        shutil.rmtree(old, ignore_errors=True)
    content.mkdir(parents=True)
    for name in lessons.CORE:
        shutil.copy(lessons.NOTEBOOKS / f"{name}.ipynb", content)
    commit(bare, "v" + project["version"])
    argv = [str(python(folder)), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "replica", "language": "python"}
    write_whole(folder / "jupyter" / "kernels" / "replica" / "kernel.json", json.dumps(spec))
    redirect = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{bare.as_uri()}.insteadOf", "GIT_CONFIG_VALUE_0": project["urls"]["Repository"]}
    if runner.nbval(list(lessons.CORE), content, "replica", JUPYTER_PATH=str(folder / "jupyter"), **redirect, **variables):
        raise CourseError("A notebook failed there: read above.")


def replica() -> None:
    """Colab's versions as far as this Python and a CPU go; torch stays the locked one, with the setuptools that it asks for."""
    folder, start = runs_dir() / "colab", time.perf_counter()
    wanted = [f"{name}=={version}" for name, version in pins().items() if name not in ("torch", "setuptools")]
    print(f"replica: installing {len(wanted)} of Colab's versions", flush=True)
    subprocess.run([*environment(folder), "--no-deps", *wanted], check=True)
    before = versions(folder)
    print(f"replica: {time.perf_counter() - start:.0f} s; {', '.join(f'{n} {before[n]}' for n in ('torch', 'transformers', 'peft', 'torchao', 'datasets'))}")
    check_cure_is_needed(folder)
    notebooks(folder, COLAB_RELEASE_TAG="replica")
    print("replica: the notebooks pass; moved by the set-up cell:")
    moved, added = moves(before, versions(folder))
    check_moves(moved)
    print(f"  added: {', '.join(f'{name} {version}' for name, version in sorted(added.items()))}")


def check_cure_is_needed(folder: Path) -> None:
    """CourseError where PEFT no longer minds the old torchao: the set-up need not touch it any more."""
    code = "import torch, peft; peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), peft.LoraConfig(target_modules=['0']))"
    done = subprocess.run([str(python(folder)), "-c", code], capture_output=True, text=True)
    if done.returncode == 0 or "torchao" not in done.stderr:
        raise CourseError("PEFT accepts this torchao: hosted.py need not remove it any more (or the replica is broken: " + done.stderr[-300:] + ")")
    print(f"replica: without the cure, PEFT says: {done.stderr.strip().splitlines()[-1][:150]}")


def newest() -> None:
    """The core notebooks with the newest of everything; torch's newest where its CPU build (or a GPU) is to be had."""
    folder, project = runs_dir() / "newest", runner.project()
    install = environment(folder)
    if subprocess.run([*install, "--upgrade", "--retries", "1", "--timeout", "20", *CPU, "torch"], capture_output=True).returncode:
        print("newest: no newer torch is to be had here")
    keep = folder / "torch.txt"
    write_whole(keep, f"torch=={versions(folder)['torch']}")
    needed = [*hosted.requirements(), *project["optional-dependencies"]["lab"]]
    subprocess.run([*install, "--upgrade", "--upgrade-strategy", "eager", "-c", str(keep), *needed], check=True)
    found = versions(folder)
    write_whole(folder / "versions.txt", "".join(f"{name}=={version}\n" for name, version in sorted(found.items())))
    newer = {name: (old, found[name]) for name, old in pins(ROOT / "constraints.txt").items() if found.get(name, old).split("+")[0] != old}
    print("newer than the lock: " + (", ".join(f"{name} {old} -> {new}" for name, (old, new) in sorted(newer.items())) or "nothing"), flush=True)
    notebooks(folder, COLAB_RELEASE_TAG="newest")


def check(resolver_only: bool) -> None:
    """What pip would move on Colab, and the notebooks on a replica of it."""
    resolve()
    if not resolver_only:
        replica()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m course.colab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check").add_argument("--resolver-only", action="store_true")
    renewing = commands.add_parser("pins")
    renewing.add_argument("freeze", type=Path)
    renewing.add_argument("date")
    commands.add_parser("newest")
    chosen = parser.parse_args()
    setup()
    if chosen.command == "pins":
        return status(renew, chosen.freeze, chosen.date)
    return status(newest) if chosen.command == "newest" else status(check, chosen.resolver_only)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a pipe on Windows can't say every letter
    sys.exit(main())
