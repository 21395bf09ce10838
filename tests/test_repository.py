"""One place for each fact: dependencies, slug and tag, make targets; and the course's runner."""

import re
import shutil
import subprocess
import sys
import tomllib

import nbformat
import pytest

from course import colab, gpu, kit, lessons, runner
from helpers import runtime
from helpers.command import status as ending
from helpers.files import CourseError
from helpers.runtime import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
SLUG = PROJECT["urls"]["Repository"].removeprefix("https://github.com/")
TAG = "v" + PROJECT["version"]
TEXTS = [
    p
    for p in (
        *ROOT.glob("*.md"),
        ROOT / "CITATION.cff",
        ROOT / "data/README.md",
        ROOT / "environment.yml",
        *(ROOT / "notebooks").glob("**/*.ipynb"),
        *(ROOT / "helpers").rglob("*.py"),
        *(ROOT / "course").rglob("*.py"),
    )
    if p.exists()
]


def names(requirements):
    return {re.match(r"[\w-]+", r)[0].lower() for r in requirements}


def test_environment_installs_what_pyproject_names():
    import yaml

    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    pip = environment["dependencies"][-1]["pip"]
    assert pip == ["-c constraints.txt", "-e .[test]"]  # through pyproject.toml, so that they can't differ
    assert f"python{PROJECT['requires-python']}" in environment["dependencies"]
    assert environment["name"] == PROJECT["name"]


def test_every_dependency_is_locked_within_its_range():
    from packaging.requirements import Requirement

    locked = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line)
    locked = {name.lower().replace("_", "-"): version for name, version in locked.items()}
    for text in [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])]:
        requirement = Requirement(text)
        if requirement.name == PROJECT["name"]:  # the tests' extra asks for the lab's
            continue
        assert requirement.specifier.contains(locked[requirement.name.lower()]), text


def imported(package):
    """Top-level names that a package's files import, anywhere in them."""
    return {name for path in (ROOT / package).rglob("*.py") for name in re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(encoding="utf-8"), re.M)}


def test_every_import_of_helpers_is_a_named_dependency():
    ours = {"helpers", "course", "google", "IPython"}  # google.colab is there on Colab or not at all, IPython wherever a notebook runs
    third = {m.lower() for package in ours for m in imported(package) if m not in sys.stdlib_module_names and m not in ours}
    other = {"sklearn": "scikit-learn", "huggingface_hub": "huggingface-hub", "model_signing": "model-signing"}
    other |= dict.fromkeys(("cyclonedx", "packageurl"), "cyclonedx-python-lib")  # whose dependency the second is
    third = {other.get(m, m) for m in third}
    named = names(PROJECT["dependencies"]).union(*(names(PROJECT["optional-dependencies"][extra]) for extra in ("lab", "ship", "trust", "energy")))
    assert third <= named, third - named
    notebooks = {name.lower() for name in imported("helpers")} & names(PROJECT["optional-dependencies"]["lab"])
    assert not notebooks, "helpers must do without what only the runner needs"


def test_slug_and_tag_are_the_same_everywhere():
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        for slug in re.findall(r"github(?:\.com|)/([\w.-]+/course)\b", text):
            assert slug == SLUG, path.name
        for tag in re.findall(rf"{SLUG}/blob/(v[\d.]+)/|--branch (v[\d.]+)", text):
            assert (tag[0] or tag[1]) == TAG, path.name


def test_the_readmes_clone_command_works(tmp_path):
    """The README's own line, against a local bare copy that stands in for the host."""
    command = re.search(r"^git clone .*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)[0]
    assert f"https://github.com/{SLUG}" in command and f"--branch {TAG}" in command
    work, bare = tmp_path / "work", tmp_path / "bare.git"
    work.mkdir()
    (work / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"), encoding="utf-8")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"], ["tag", TAG]):
        subprocess.run([*git, *arguments], cwd=work, check=True)
    subprocess.run(["git", "clone", "-q", "--bare", str(work), str(bare)], check=True)
    local = command.replace(f"https://github.com/{SLUG}.git", str(bare)).replace(f"https://github.com/{SLUG}", str(bare))
    subprocess.run(local.split(), cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / command.split()[-1] / "pyproject.toml").exists()


@pytest.mark.parametrize("path", ["README.md", "data/README.md", "benchmarks/README.md"])
def test_links_and_pictures_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / path).read_text(encoding="utf-8")):
        assert ((ROOT / path).parent / target).exists(), target


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = set(re.search(r"\.PHONY: (.*)", makefile)[1].split())
    if not shutil.which("make"):
        pytest.skip("no make here")
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert phony == set(re.findall(r"make ([\w-]+)", shown))


def test_nothing_unwanted_is_tracked():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    unwanted = {f for f in tracked if re.search(r"\.(safetensors|gguf|db|pyc|bin|pt)$|^runs/|^\.venv/|__pycache__|checkpoint", f)}
    assert unwanted == {"data/own_example/tool_library.db"}  # 57 kB, the second domain


def test_no_remote_code_and_no_pickle():
    for path in [*(ROOT / "helpers").rglob("*.py"), *(ROOT / "course").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert "trust_remote_code" not in text
        if path.name != "pickles.py":  # the lesson on them: its own harmless one is loaded, in a process and a folder of its own
            assert "torch.load" not in text and not re.search(r"import pickle\b", text)


# ---------------------------------------------------------------- the house

LARGE = 300  # lines: a file that outgrows them is looked at
REASONS = {  # larger ones that have been looked at: why each is one file
    "helpers/sql.py": "Guard and limits are one wall against hostile queries, and the worker's process runs this file alone.",
    "course/gpu.py": "Cases, their measurement and their record are one command, for the minutes in which a GPU is at hand.",
}


def outgrown(root, reasons):
    """What is wrong with the sizes of the files of helpers and course: a large one without a reason, a reason without a large one."""
    files = [path for package in ("helpers", "course") for path in sorted((root / package).rglob("*.py"))]
    lines = {path.relative_to(root).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    large = {name: n for name, n in lines.items() if n > LARGE}
    found = [f"{name} has {n} lines: split it, or say in REASONS why it is one file" for name, n in large.items() if name not in reasons]
    return found + [f"{name} is no longer large: take it out of REASONS" for name in reasons if name not in large]


def test_a_file_that_outgrows_300_lines_is_looked_at():
    assert not outgrown(ROOT, REASONS)


def test_the_check_of_sizes_can_fail(tmp_path):
    for name, lines in {"helpers/a.py": 300, "helpers/b.py": 301, "course/c.py": 302}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n" * lines, encoding="utf-8")
    assert outgrown(tmp_path, {"course/c.py": "a reason", "helpers/a.py": "an old one"}) == [
        "helpers/b.py has 301 lines: split it, or say in REASONS why it is one file",
        "helpers/a.py is no longer large: take it out of REASONS",
    ]


def floors(root):
    """import-linter's verdict on the helpers and course under `root`, by the contracts of its pyproject.toml: exit status and output."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as check; check()", "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_house_has_floors_and_no_circle():
    status, says = floors(ROOT)
    assert status == 0 and "6 kept, 0 broken" in says, says


@pytest.mark.parametrize(
    ("file", "line", "says"),
    [
        ("helpers/menu.py", "from helpers import recipes", "helpers.menu is not allowed to import helpers.recipes"),  # a circle
        ("helpers/flights.py", "def later():\n    from helpers.scoring import judge", "helpers.flights is not allowed to import helpers.scoring"),  # hidden
        ("helpers/generation.py", "import helpers.scoring", "helpers.generation is not allowed to import helpers.scoring"),  # of one floor
        ("helpers/plots.py", "from helpers import runtime", "helpers.plots is not allowed to import helpers.runtime"),
        ("helpers/ask.py", "from course import exercises", "helpers is not allowed to import course"),
        ("course/hosted.py", "from course import runner", "course.hosted is not allowed to import course.runner"),
        ("helpers/new.py", "import json", "helpers.new"),  # a file that has no place yet
    ],
)
def test_the_contracts_can_fail(tmp_path, file, line, says):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in ("helpers", "course"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / file, "a", encoding="utf-8") as out:
        out.write(f"\n{line}\n")
    status, output = floors(tmp_path)
    assert status == 1 and "1 broken" in output and says in " ".join(output.split()), output


# ---------------------------------------------------------------- the runner


def write_notebook(folder, *cells):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nbformat.write(notebook, folder / "small.ipynb")


@pytest.mark.slow
def test_execute_shows_cells_and_keeps_a_clean_copy(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lessons, "NOTEBOOKS", tmp_path)
    write_notebook(tmp_path, "1 + 1", "print('hi')")
    lessons.execute("small", tmp_path / "out" / "small.ipynb")
    shown = capsys.readouterr().out
    assert "small  cell 1/2  0:" in shown and "small  cell 2/2  0:" in shown and "done" in shown
    kept = nbformat.read(tmp_path / "out" / "small.ipynb", as_version=4)
    assert kept.cells[0].outputs[0].data["text/plain"] == "2" and kept.cells[1].outputs[0].text == "hi\n"
    assert not nbformat.read(tmp_path / "small.ipynb", as_version=4).cells[0].outputs  # the source is untouched
    assert "execution" not in kept.cells[0].metadata


@pytest.mark.slow
def test_a_failing_cell_is_named_and_the_rest_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(lessons, "NOTEBOOKS", tmp_path)
    write_notebook(tmp_path, "1", "1 / 0", "2")
    with pytest.raises(CourseError, match="small stopped in cell 2 of 3") as error:
        lessons.execute("small")
    assert "ZeroDivisionError" in str(error.value)
    assert (runner.runs_dir() / "notebooks" / "small.failed.ipynb").exists()


def test_course_runs_notebooks_then_the_exam_once_and_writes_the_scoreboard(monkeypatch, capsys):
    """The order and the bookkeeping of make course, with answers from the references in place of a trained model's."""
    from helpers import adapters, dpo, generation, models, recipes, scoreboard, training

    executed, asked = [], []

    def ask(model, tokenizer, questions):
        asked.append(len(questions))
        return [q["sql"] for q in questions], 1.0

    monkeypatch.setattr(lessons, "execute", lambda name, target: executed.append(name))
    monkeypatch.setattr(adapters, "load_adapter", lambda folder: None)
    monkeypatch.setattr(models, "load_tokenizer", lambda: None)
    monkeypatch.setattr(generation, "ask", ask)
    scoreboard.record("sft", "test", [{"id": "1", "correct": False}], 1.0)  # of an adapter that is gone: stale
    folders = [recipe.folder() / "adapter" for recipe in (recipes.SFTRecipe(), dpo.DPORecipe())]
    monkeypatch.setattr(training, "sft_adapter", lambda recipe: folders[0])
    monkeypatch.setattr(dpo, "adapter", lambda recipe: folders[1])
    runner.run(fresh=False)
    assert executed == list(lessons.CORE) and asked == [382, 69] * 2
    live = {(r["stage"], r["split"]): r["correct"] for r in scoreboard.rows() if r["source"] == "live"}
    assert live == {(stage, split): n for stage in ("sft", "dpo") for split, n in (("test", 382), ("freeform", 69))}
    assert {r["stage"] for r in scoreboard.rows() if r["source"] == "recorded"} == set(scoreboard.STAGES)
    assert (runner.runs_dir() / "scoreboard.png").exists() and "minutes in all" in capsys.readouterr().out
    for folder in folders:
        folder.mkdir(parents=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / name).touch()
    runner.run(fresh=False)
    assert asked == [382, 69] * 2  # the adapters are there: their exams aren't sat again


@pytest.mark.slow
def test_nbval_tells_a_notebook_that_reproduces_from_one_that_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(lessons, "NOTEBOOKS", tmp_path)
    write_notebook(tmp_path, "1 + 1")
    lessons.execute("small")
    notebook = nbformat.read(tmp_path / "small.ipynb", as_version=4)
    notebook.cells[0].metadata["tags"] = ["nbval-check-output"]
    nbformat.write(notebook, tmp_path / "small.ipynb")
    assert runner.nbval(["small"]) == 0
    notebook.cells[0].outputs[0].data["text/plain"] = "3"
    nbformat.write(notebook, tmp_path / "small.ipynb")
    assert runner.nbval(["small"]) == 1


def test_lock_writes_what_is_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    runner.lock()
    lines = (tmp_path / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ") and f"nbformat=={nbformat.__version__}" in lines
    assert not any("+" in line or line.startswith("first-llm") for line in lines[1:])


def test_starting_over_removes_only_what_the_course_made(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path))
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "elsewhere"))
    for name in ("sft-1/adapter/x", "notebooks/00.ipynb", "cache/old", "scoreboard.json", "thesis.docx", "photos/me.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    runner.start_over()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos", "thesis.docx"]
    assert runtime.cache_dir() == tmp_path / "cache"  # an empty one


def test_one_sentence_instead_of_a_traceback(monkeypatch, capsys):
    def fails(names):
        raise CourseError("Do this next.")

    monkeypatch.setattr(runner, "refresh", fails)
    monkeypatch.setattr(sys, "argv", ["course", "refresh"])
    assert runner.main() == 1
    assert capsys.readouterr().err == "\nDo this next.\n"


def test_an_interrupt_says_how_to_go_on(monkeypatch, capsys):
    def stopped(names):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "refresh", stopped)
    monkeypatch.setattr(sys, "argv", ["course", "refresh"])
    assert runner.main() == 130
    assert "run the same command to go on" in capsys.readouterr().err


def test_each_command_ends_with_its_own_status():
    assert [ending(lambda result=result: result) for result in (None, 0, 3, ROOT)] == [0, 0, 3, 0]
    assert ending(lambda a, b: a + b, 2, b=5) == 7


@pytest.mark.parametrize(
    ("module", "command", "broken", "left"),
    [
        (kit, ["kit", "build"], "build", " Nothing half is left: run the same command again."),
        (gpu, ["gpu"], "run", ""),
        (colab, ["colab", "check"], "resolve", ""),
        (colab, ["colab", "newest"], "newest", ""),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_every_command_tells_an_error_and_a_stop_in_one_sentence(module, command, broken, left, monkeypatch, capsys):
    for error, status, says in ((CourseError("Do this next."), 1, "Do this next."), (KeyboardInterrupt(), 130, f"Stopped.{left}")):

        def fails(*_, error=error, **__):
            raise error

        monkeypatch.setattr(module, broken, fails)
        monkeypatch.setattr(module, "setup", lambda: None, raising=False)
        monkeypatch.setattr(sys, "argv", command)
        assert module.main() == status and capsys.readouterr().err == f"\n{says}\n"


@pytest.mark.parametrize("failing", [None, "unit", "others", "longest"])
def test_unit_tests_and_notebooks_run_side_by_side_and_each_failure_counts(monkeypatch, capsys, failing):
    ran = []

    def part(name, out=None, **environment):
        ran.append((name, environment))
        if out:
            out.write("what nbval said\n")
        return int(name == failing)

    monkeypatch.setattr(runner, "unit", lambda arguments, **environment: part("unit", **environment))
    monkeypatch.setattr(runner, "nbval", lambda names, **more: part("longest" if names == list(runner.LONGEST) else "others", **more))
    monkeypatch.setattr(runner, "halves", lambda: {"OMP_NUM_THREADS": "1"})
    assert runner.test([]) == (failing is not None)
    assert sorted(ran, key=str) == [(name, {"OMP_NUM_THREADS": "1"}) for name in ("longest", "others", "unit")]
    assert "what nbval said" in capsys.readouterr().out
    monkeypatch.setattr(runner, "halves", dict)
    ran.clear()
    assert runner.test([]) == (failing in ("unit", "others")) and ran == [("unit", {})] + [("others", {})] * (failing != "unit")


def test_two_programs_share_the_cores(monkeypatch):
    monkeypatch.setattr(runner.shutil, "which", lambda name: None)
    for cores, told in ((1, {}), (2, {"OMP_NUM_THREADS": "1"}), (8, {"OMP_NUM_THREADS": "4"})):
        monkeypatch.setattr(runner.os, "cpu_count", lambda cores=cores: cores)
        assert runner.halves() == told
    monkeypatch.setattr(runner.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert runner.halves() == {}
