"""What a learner sees: metadata, badges, links, cell lengths, and outputs from one clean run."""

import json
import re
import statistics
import tomllib

import nbformat
import pytest

from helpers.runtime import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SLUG = PROJECT["urls"]["Repository"].removeprefix("https://github.com/")
TAG = "v" + PROJECT["version"]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SOLUTIONS = sorted(FOLDER.glob("solutions/*.ipynb"))
MACHINE_PATH = re.compile(r"/(?:home|root|tmp|work|Users|usr|opt|mnt|var|content)/|[A-Z]:\\\\")
WIDTH = 100  # columns of code that a browser shows without scrolling
TOKEN = re.compile(r"hf_[A-Za-z0-9]{20}|sk-[A-Za-z0-9]{20}|gh[pousr]_[A-Za-z0-9]{20}")


def lines(source: str) -> int:
    return sum(bool(line.strip()) for line in source.splitlines())


def anchors(markdown: str) -> set[str]:
    """What a link can name in a Markdown file: its headings as GitHub writes them."""
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in re.findall(r"^#+ (.+)$", markdown, re.M)}


def problems(notebook, name: str) -> list[str]:
    """Everything wrong with a notebook (its path in notebooks/), each in a few words."""
    found, code = [], [c for c in notebook.cells if c.cell_type == "code"]
    meta = notebook.metadata
    if meta.get("accelerator") != "GPU" or meta.get("colab", {}).get("gpuType") != "T4":
        found.append("metadata does not ask Colab for a T4")
    if meta.get("kernelspec", {}).get("name") != "python3":
        found.append("kernel is not python3")
    if f"https://colab.research.google.com/github/{SLUG}/blob/{TAG}/notebooks/{name}" not in notebook.cells[0].source:
        found.append("badge does not point to this notebook at the tag")
    if not notebook.cells[0].source.startswith("# "):
        found.append("does not begin with a title")
    if "hosted.install()" not in code[0].source or not any("runtime.setup(" in c.source for c in code[:3]):
        found.append("does not begin with the set-up")
    lengths = [lines(c.source) for c in code]
    if statistics.median(lengths[1:]) > 6 or max(lengths) > 20:  # the set-up cell is the same everywhere
        found.append(f"cells too long: median {statistics.median(lengths[1:])}, longest {max(lengths)}")
    if wide := [line for c in code for line in c.source.splitlines() if len(line) > WIDTH]:
        found.append(f"{len(wide)} lines too wide, more than {WIDTH} columns: {max(wide, key=len)}")
    if [c.execution_count for c in code] != list(range(1, len(code) + 1)):
        found.append("outputs are not from one run in order")
    outputs = [o for c in code for o in c.outputs]
    if not outputs:
        found.append("no outputs")
    if any(o.output_type == "error" for o in outputs):
        found.append("a traceback")
    if any(o.get("name") == "stderr" for o in outputs):
        found.append("something on stderr")
    text = json.dumps([o.get("text", "") or {k: v for k, v in o.get("data", {}).items() if not k.startswith("image/")} for o in outputs])
    for what, pattern in {
        "a machine's path": MACHINE_PATH,
        "a token": TOKEN,
        "a warning": re.compile(r"Warning:|WARNING"),
        "progress debris": re.compile(r"it/s|\d+%\|"),
    }.items():
        if match := pattern.search(text):
            found.append(f"{what} in an output: {match[0]}")
    prose = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    for target, _, anchor in re.findall(r"\]\((?!http)([^)#]+)(#([^)]+))?\)", prose):
        path = (FOLDER / name).parent / target
        if not path.exists() or anchor and anchor not in anchors(path.read_text(encoding="utf-8")):
            found.append(f"link to nowhere: {target} {anchor}")
    if name.startswith("solutions/"):
        return found
    for what, pattern in {
        "what you will be able to do": r"\*\*You will be able to\*\*\n\n(- .+\n){3,5}\n\*\*You need\*\* \S",
        "minutes": r"\*\*Time\.\*\* \d+ minutes? of computing on two CPU cores with fast bfloat16 .+, \d+ without, .+ On a T4 .+ estimate",
        "a word to predict": r"\*\*Predict",
        "papers with links": r"\*\*Read on\.\*\* .*\(https://arxiv\.org/abs/\d{4}\.\d{5}\)",
        "terms": r"\]\(\.\./GLOSSARY\.md#[\w-]+\)",
    }.items():
        if not re.search(pattern, prose):
            found.append(f"lacks {what}")
    return found


def test_there_are_notebooks():
    assert [p.stem for p in NOTEBOOKS][:5] == ["00_start_here", "01_quantized_loading", "02_lora_injection", "03_sft_with_trl", "04_dpo"]


@pytest.mark.parametrize("path", NOTEBOOKS + SOLUTIONS, ids=lambda p: p.relative_to(FOLDER).as_posix())
def test_notebook_is_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert problems(notebook, path.relative_to(FOLDER).as_posix()) == []


def test_each_notebook_has_solutions_that_must_come_out_right():
    assert [p.name for p in SOLUTIONS] == [p.name for p in NOTEBOOKS]
    for path in SOLUTIONS:
        checked = [c for c in nbformat.read(path, as_version=4).cells if "nbval-check-output" in c.metadata.get("tags", [])]
        assert len(checked) >= 3 and all(c.outputs[0].data["text/plain"].startswith("right. ") for c in checked), path.name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_some_cells_must_reproduce_and_something_is_asserted(path):
    code = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert sum("nbval-check-output" in c.metadata.get("tags", []) for c in code) >= 3
    assert sum("assert " in c.source for c in code) >= 3


BREAK = {
    "ask Colab": lambda nb: nb.metadata.pop("accelerator"),
    "kernel": lambda nb: nb.metadata.kernelspec.update(name="other"),
    "badge": lambda nb: nb.cells[0].update(source="# Title"),
    "title": lambda nb: nb.cells[0].update(source="x" + nb.cells[0].source),
    "set-up": lambda nb: next(c for c in nb.cells if c.cell_type == "code").update(source="1"),
    "too long": lambda nb: next(c for c in nb.cells if c.cell_type == "code").update(source="runtime.setup()\n" + "x = 1\n" * 20),
    "too wide": lambda nb: next(c for c in nb.cells if c.cell_type == "code").update(source="hosted.install()\nx = " + 97 * "1"),
    "one run": lambda nb: next(c for c in nb.cells if c.cell_type == "code").update(execution_count=9),
    "traceback": lambda nb: next(c for c in nb.cells if c.cell_type == "code").outputs.append(
        nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])
    ),
    "stderr": lambda nb: next(c for c in nb.cells if c.cell_type == "code").outputs.append(nbformat.v4.new_output("stream", name="stderr", text="x")),
    "path": lambda nb: next(c for c in nb.cells if c.cell_type == "code").outputs.append(
        nbformat.v4.new_output("stream", name="stdout", text="in /home/me/x")
    ),
    "token": lambda nb: next(c for c in nb.cells if c.cell_type == "code").outputs.append(
        nbformat.v4.new_output("stream", name="stdout", text="hf_" + "a" * 30)
    ),
    "progress": lambda nb: next(c for c in nb.cells if c.cell_type == "code").outputs.append(
        nbformat.v4.new_output("stream", name="stdout", text="50%|##")
    ),
    "nowhere: gone": lambda nb: nb.cells[0].update(source=nb.cells[0].source + "\n[x](gone.ipynb)"),
    "nowhere: ../GLOSSARY.md no-such": lambda nb: nb.cells[0].update(source=nb.cells[0].source + "\n[x](../GLOSSARY.md#no-such-term)"),
    "able to do": lambda nb: nb.cells[0].update(source=nb.cells[0].source.replace("\n- ", "\n* ")),
    "minutes": lambda nb: nb.cells[0].update(source=nb.cells[0].source.replace("**Time.**", "")),
    "papers": lambda nb: nb.cells[-1].update(source=nb.cells[-1].source.replace("arxiv.org", "example.org")),
    "terms": lambda nb: [c.update(source=c.source.replace("GLOSSARY.md#", "glossary/")) for c in nb.cells],
    "predict": lambda nb: [c.update(source=c.source.replace("**Predict", "**Guess")) for c in nb.cells],
}


@pytest.mark.parametrize("what", BREAK)
def test_each_check_can_fail(what):
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    BREAK[what](notebook)
    assert any(what in problem for problem in problems(notebook, NOTEBOOKS[0].name)), what


def test_readme_and_folder_agree():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        assert f"(notebooks/{path.name})" in readme and f"/blob/{TAG}/notebooks/{path.name}" in readme
    for name in re.findall(r"\(notebooks/([\w.]+ipynb)\)", readme):
        assert (ROOT / "notebooks" / name).exists(), f"the README links to {name}"
