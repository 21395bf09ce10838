"""Installs the course from this folder, without a network: `python install.py`. Standard library only; safe to run again.

`make kit` puts this file into a kit's folder under that name.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import stat
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
MANIFEST = 10_000_000  # bytes of manifest.json at most
AGAIN = "then run install.py again: it goes on."


class Problem(Exception):
    """What stops the installation, in one plain sentence that says what to do next."""


def shown(text: str, most: int = 40) -> str:
    """A text of the manifest's on a screen: short, and with no control character that steers a terminal."""
    return text[:most].encode("unicode_escape").decode("ascii")


def check_machine(kit: dict) -> None:
    """Problem where Python or the machine is another than the kit's."""
    python, here = shown(kit["python"]), ".".join(map(str, sys.version_info[:2]))
    if here != python:
        run = "py -%s" % python if os.name == "nt" else "python%s" % python  # noqa: UP031 - an old Python must be able to say this
        raise Problem(f"This kit is for Python {python} and this is {here}: install Python {python}, then run {run} install.py")
    machine = f"{platform.system()} {platform.machine()}"
    if machine.lower() != kit["machine"].lower() or sys.maxsize < 2**32:
        bits = " (a 32-bit Python)" if sys.maxsize < 2**32 else ""
        raise Problem(f"This kit is for {shown(kit['machine'])} and this is {machine}{bits}: take the kit for this system.")


def read_manifest() -> dict:
    """The kit's manifest: python and machine (texts), files (name: sha256 and size). Problem where it is anything else."""
    damaged = Problem(f"kit/manifest.json is missing or damaged: copy the whole folder again, {AGAIN}")
    try:
        path = KIT / "manifest.json"
        if not stat.S_ISREG(path.lstat().st_mode) or path.stat().st_size > MANIFEST:
            raise damaged
        kit = json.loads(path.read_bytes().decode("utf-8"))
        whole = isinstance(kit, dict) and isinstance(kit.get("python"), str) and isinstance(kit.get("machine"), str) and isinstance(kit.get("files"), dict)
        if not whole or not kit["files"]:
            raise damaged
        for name, made in kit["files"].items():
            # within the kit: no way up, no other disk, none of Windows' separators, no half a character, which no file's name has
            plain = re.fullmatch(r"[^\\/:\x00-\x1f\x7f\ud800-\udfff]+(/[^\\/:\x00-\x1f\x7f\ud800-\udfff]+)*", name) and not {".", ".."} & set(name.split("/"))
            said = isinstance(made, dict) and isinstance(made.get("sha256"), str) and type(made.get("size")) is int
            if not plain or not said:
                raise damaged
        return kit
    except (OSError, ValueError, RecursionError):
        raise damaged from None


def check_files(files: dict) -> None:
    """Problem that names what is missing, differs from the manifest, or isn't listed there (1 to 5 s). No link is followed."""
    found = {}
    for folder, folders, names in os.walk(KIT):  # which enters no linked folder
        for name in [*names, *(f for f in folders if os.path.islink(os.path.join(folder, f)))]:
            path = Path(folder, name)
            found[path.relative_to(KIT).as_posix()] = path
    for name, made in files.items():
        path, digest = found.pop(name, None), hashlib.sha256()
        if path is None or not stat.S_ISREG(path.lstat().st_mode):
            raise Problem(f"kit/{shown(name, 200)} is missing: copy the whole folder again, {AGAIN}")
        if path.stat().st_size == made["size"]:
            with open(path, "rb") as file:
                for block in iter(lambda file=file: file.read(1 << 20), b""):
                    digest.update(block)
        if digest.hexdigest() != made["sha256"]:
            raise Problem(f"kit/{shown(name, 200)} is damaged: copy the whole folder again, {AGAIN}")
    found.pop("manifest.json", None)
    if strangers := sorted(name for name in found if name.startswith(("wheels/", "adapters/"))):  # what could be installed or loaded
        raise Problem(f"kit/{shown(strangers[0], 200)} doesn't belong to this kit: remove it, or copy the whole folder again, {AGAIN}")


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
    kit = read_manifest()
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
