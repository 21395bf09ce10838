"""Installs the course from this folder, without a network: `python install.py`. Standard library only; safe to run again.

`make kit` puts this file into a kit's folder under that name.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
KIT = HERE / "kit"
WHEELS = KIT / "wheels"
VENV = HERE / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
INSTALLED = VENV / "installed"  # the Makefile's sign too: make goes on from here; it holds this folder's path, as a moved .venv is none
NEEDS = 3.0e9  # bytes: .venv and the cache, once the kit itself is on the disk
AGAIN = "then run install.py again: it goes on."


class Problem(Exception):
    """What stops the installation, in one plain sentence that says what to do next."""


def check_machine(kit: dict) -> None:
    """Problem where Python or the machine is another than the kit's."""
    python, here = kit["python"], ".".join(map(str, sys.version_info[:2]))
    if here != python:
        run = "py -%s" % python if os.name == "nt" else "python%s" % python  # noqa: UP031 - an old Python must be able to say this
        raise Problem(f"This kit is for Python {python} and this is {here}: install Python {python}, then run {run} install.py")
    machine = f"{platform.system()} {platform.machine()}"
    if machine.lower() != kit["machine"].lower() or sys.maxsize < 2**32:
        bits = " (a 32-bit Python)" if sys.maxsize < 2**32 else ""
        raise Problem(f"This kit is for {kit['machine']} and this is {machine}{bits}: take the kit for this system.")


def check_files(files: dict) -> None:
    """Problem that names what is missing or differs from the manifest (1 to 5 s)."""
    for name, made in files.items():
        path, digest = KIT / name, hashlib.sha256()
        if not path.is_file():
            raise Problem(f"kit/{name} is missing: copy the whole folder again, {AGAIN}")
        with open(path, "rb") as file:
            for block in iter(lambda file=file: file.read(1 << 20), b""):
                digest.update(block)
        if digest.hexdigest() != made["sha256"]:
            raise Problem(f"kit/{name} is damaged: copy the whole folder again, {AGAIN}")


def run(what: str, *command, show: bool = False) -> None:
    """Runs a command in this folder; pip in it sees the kit's wheels alone. Problem with its last words when it fails."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    environment.update(PIP_NO_INDEX="1", PIP_FIND_LINKS=WHEELS.as_uri(), PIP_CONFIG_FILE=os.devnull, PIP_DISABLE_PIP_VERSION_CHECK="1")
    heard = subprocess.PIPE
    done = subprocess.run([*map(str, command)], cwd=HERE, env=environment, stdout=None if show else heard, stderr=heard, text=True, errors="replace")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason was given"]
        if "No space left" in done.stderr:
            raise Problem(f"The disk is full: free {NEEDS / 1e9} GB, {AGAIN}")
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1]).strip()[:300]
        raise Problem(f"{what} failed ({reason}): mend that if you can, {AGAIN}")


def install() -> None:
    try:
        kit = json.loads((KIT / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise Problem(f"kit/manifest.json is missing or damaged: copy the whole folder again, {AGAIN}") from None
    check_machine(kit)
    print(f"checking {len(kit['files'])} files", flush=True)
    check_files(kit["files"])
    if not INSTALLED.is_file() or INSTALLED.read_text(encoding="utf-8") != str(HERE):
        if VENV.exists():  # half of one, or one that was moved
            shutil.rmtree(VENV)
        free = shutil.disk_usage(HERE).free
        if free < NEEDS:
            raise Problem(f"The disk has {free / 1e9:.1f} GB free and {NEEDS / 1e9} are needed: free some, {AGAIN}")
        print("installing into .venv: about two minutes", flush=True)
        run("Making .venv", sys.executable, "-m", "venv", "--without-pip", VENV)
        options = ["install", "--quiet", "--no-index", "--find-links", WHEELS, "-c", "constraints.txt"]
        run("Installing pip", PYTHON, next(WHEELS.glob("pip-*.whl")) / "pip", *options, "pip", "setuptools")  # pip runs from its own wheel
        torch = next(line for line in (HERE / "constraints.txt").read_text(encoding="utf-8").splitlines() if line.startswith("torch=="))
        run("Installing torch", PYTHON, "-m", "pip", *options, torch)
        run("Installing the course", PYTHON, "-m", "pip", *options, "--no-build-isolation", "-e", ".[test]")
        INSTALLED.write_text(str(HERE), encoding="utf-8")
    run("Preparing model and database", PYTHON, "-m", "course", "catch-up", "00", show=True)
    bin = BIN.relative_to(HERE)
    print("\nInstalled. Two commands are next, in this folder: the first looks at your machine, the second opens the first notebook.")
    print(f"  {bin / 'python'} -m helpers.doctor\n  {bin / 'jupyter'} lab {Path('notebooks', '00_start_here.ipynb')}")


def main() -> int:
    try:
        install()
    except Problem as problem:
        print(f"\n{problem}", file=sys.stderr)
        return 1
    except OSError as error:  # no right to write here, a file that another program holds, a full disk
        print(f"\n{error.strerror}: {error.filename or HERE}: mend that, {AGAIN}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped: run install.py again to go on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a pipe on Windows can't say every letter
    sys.exit(main())
