"""The set-up of a hosted notebook: the same cell everywhere, twice, offline, over an existing folder; what it moves; disconnects."""

import json
import os
import re
import subprocess
import sys
import types

import nbformat
import pytest

from course import colab, hosted, runner
from helpers.files import CourseError
from helpers.runtime import ROOT

PROJECT = runner.project()
TAG, ADDRESS = "v" + PROJECT["version"], PROJECT["urls"]["Repository"]
CELLS = {p.stem: [c.source for c in nbformat.read(p, as_version=4).cells if c.cell_type == "code"] for p in (ROOT / "notebooks").glob("*.ipynb")}
SETUP = CELLS["00_start_here"][0]
HOST = {"COLAB_RELEASE_TAG": "test"}


def test_every_notebook_begins_with_the_same_two_cells():
    assert {tuple(cells[:2]) for cells in CELLS.values()} == {(SETUP, CELLS["00_start_here"][1])}
    assert len([line for line in SETUP.splitlines() if line.strip()]) <= 11
    assert f"--branch {TAG} {ADDRESS} " in SETUP and f'"course-{TAG}"' in SETUP  # the badge's own tag
    assert all(f'"{variable}"' in SETUP for variable in hosted.HOSTS)


def test_solutions_begin_with_the_same_cell_two_folders_deep():
    for path in (ROOT / "notebooks" / "solutions").glob("*.ipynb"):
        first = next(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")
        assert first == SETUP.replace('else "..")', 'else "../..")')


# ---------------------------------------------------------------- what would be installed

COLAB = colab.pins()


def test_plan_for_colab():
    todo = hosted.plan(hosted.requirements(), COLAB)
    assert [r.split("<")[0] for r in todo.install] == ["bitsandbytes", "datasets", "gguf", "pyarrow", "trl"]
    assert todo.remove == ["torchao"]
    pinned = dict(line.split("==") for line in todo.constraints)
    assert {name: pinned[name] for name in hosted.NEVER} == {"torch": "2.11.0", "numpy": "2.1.3", "pandas": "2.2.3", "transformers": "5.15.0"}
    assert pinned["fsspec"] == "2025.3.0" and pinned["peft"] == "0.20.0" and not pinned.keys() & set(hosted.MAY_MOVE)


@pytest.mark.parametrize(
    ("needed", "there", "install", "remove", "pins"),
    [
        (["trl>=1.16"], {}, ["trl>=1.16"], [], []),
        (["trl>=1.16"], {"trl": "1.17", "attrs": "26.1"}, [], [], ["attrs==26.1", "trl==1.17"]),
        (["peft>=0.20"], {"peft": "0.18", "attrs": "26.1"}, ["peft>=0.20"], [], ["attrs==26.1"]),  # an older host: what is too old may move
        (["scikit-learn>=1.5"], {"scikit-learn": "1.6.1"}, [], [], ["scikit-learn==1.6.1"]),
        (["torch>=2.6"], {"torch": "2.11.0+cu128"}, [], [], ["torch==2.11.0+cu128"]),
        ([], {"torchao": "0.10.0"}, [], ["torchao"], []),
        ([], {"torchao": "0.16.0", "datasets": "4.0.0"}, [], [], []),  # new enough; free to move
        ([], {"a-system-package": "2.9ubuntu1"}, [], [], []),  # no version that pip knows
    ],
)
def test_plan(needed, there, install, remove, pins):
    assert hosted.plan(needed, there) == hosted.Plan(install, remove, pins)


def test_plan_refuses_to_move_what_a_machine_is_built_on():
    with pytest.raises(CourseError, match=r"comes with transformers 4.57 \(the course needs >=5.15\): choose its newest environment"):
        hosted.plan(["transformers>=5.15"], {"transformers": "4.57"})
    assert hosted.plan(["transformers>=5.15"], {}).install == ["transformers>=5.15"]  # but what is missing is installed


def test_installed_takes_the_copy_that_an_import_finds(tmp_path, monkeypatch):
    for folder, version in (("first", "2.0"), ("second", "1.0")):
        info = tmp_path / folder / "a_Package.x-1.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: a_Package.x\nVersion: {version}\n", encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "first"), str(tmp_path / "second")])
    assert hosted.installed() == {"a-package-x": "2.0"}


# ---------------------------------------------------------------- install


@pytest.fixture
def host(monkeypatch):
    """Colab's versions in place of this machine's, and a pip that only moves them; `calls` has what it was told."""
    state = types.SimpleNamespace(there=dict(COLAB), calls=[])

    def pip(*arguments):
        state.calls.append(arguments)
        if arguments[0] == "uninstall":
            del state.there["torchao"]
        else:
            state.there |= {"datasets": "5.0.1", "pyarrow": "26.0.1", "dill": "0.4.1", "trl": "1.16.0", "bitsandbytes": "0.50.2", "gguf": "0.19.0"}

    for variable, value in HOST.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(hosted, "installed", lambda: dict(state.there))
    monkeypatch.setattr(hosted, "pip", pip)
    monkeypatch.setattr(hosted, "imported", set)
    return state


def test_install_twice(host, capsys):
    hosted.install()
    assert [c[0] for c in host.calls] == ["install", "uninstall"] and host.calls[1][-1] == "torchao"
    assert "installing bitsandbytes, datasets, gguf, pyarrow, trl; removing torchao" in capsys.readouterr().out
    hosted.install()
    assert len(host.calls) == 2 and capsys.readouterr().out == ""


def test_a_notebooks_extras_are_installed_beside_what_is_there(host, capsys):
    hosted.install()
    hosted.install("ship")
    asked = [a for a in host.calls[2] if a[0].isalpha()]
    assert [re.split("[<>]", a)[0] for a in asked[-4:]] == ["cryptography", "cyclonedx-python-lib[json-validation]", "model-signing", "pyOpenSSL"]
    assert "installing cryptography, cyclonedx-python-lib, model-signing, pyOpenSSL" in capsys.readouterr().out


@pytest.mark.parametrize(("imported", "named"), [("pyarrow", "pyarrow"), ("torchao", "torchao"), ("transformers", "transformers")])
def test_what_was_imported_before_needs_a_restart(host, monkeypatch, imported, named):
    monkeypatch.setattr(hosted, "imported", lambda: {imported, "numpy"})
    with pytest.raises(CourseError, match=f"^Installed, but {named} had been imported before: restart the session, then run this cell again.$"):
        hosted.install()
    monkeypatch.setattr(hosted, "imported", set)  # the new session
    hosted.install()


def test_elsewhere_nothing_is_done(monkeypatch):
    for variable in hosted.HOSTS:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(hosted, "installed", lambda: pytest.fail("looked"))
    hosted.install()


@pytest.mark.parametrize(
    ("stderr", "says"),
    [
        ("WARNING: Retrying ... NewConnectionError('refused')\nERROR: no version", "is there a network .* run this cell again"),
        ("ERROR: [Errno 28] No space left on device", "free some space"),
        ("WARNING: chatter\nERROR: ResolutionImpossible: a and b\n", "^Could not install: ERROR: ResolutionImpossible: a and b$"),
    ],
)
def test_pips_failures_are_one_sentence(monkeypatch, stderr, says):
    monkeypatch.setattr(hosted.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1, "", stderr))
    with pytest.raises(CourseError, match=says):
        hosted.pip("install", "x")


@pytest.mark.slow
def test_a_real_pip_without_a_network(monkeypatch):
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CourseError, match="is there a network"):
        hosted.pip("install", "--quiet", "--dry-run", "no-such-package-of-the-course")


# ---------------------------------------------------------------- the cell itself


def address(bare) -> dict:
    """Git's settings, as environment variables, that lead the course's address to a folder here."""
    where = bare.as_uri() if bare else "file:///nowhere/at/all"
    return {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{where}.insteadOf", "GIT_CONFIG_VALUE_0": ADDRESS}


def run_cell(folder, bare, after="", **variables):
    """Runs the set-up cell in a Python of its own, in `folder`."""
    code = SETUP + "\nprint('ready', hosted.__file__)" + after
    environment = {k: v for k, v in os.environ.items() if k not in hosted.HOSTS and k != "PYTHONPATH"} | address(bare) | variables
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    bare = tmp_path_factory.mktemp("host") / "course.git"
    colab.commit(bare, TAG)
    return bare


@pytest.mark.parametrize("variable", sorted(hosted.HOSTS))
def test_the_cell_fetches_the_course_once(tmp_path, repository, variable):
    first = run_cell(tmp_path, repository, **{variable: "x"})
    assert "ready" in first.stdout and str(tmp_path) in os.path.realpath(first.stdout.split()[1]), first.stderr
    assert [p.name for p in tmp_path.iterdir()] == [f"course-{TAG}"]
    (tmp_path / f"course-{TAG}" / "mine.txt").touch()
    again = run_cell(tmp_path, None, **{variable: "x"})  # no network any more
    assert "ready" in again.stdout and (tmp_path / f"course-{TAG}" / "mine.txt").exists()


def test_the_cell_without_a_network_or_over_a_strangers_folder(tmp_path, repository):
    offline = run_cell(tmp_path, None, **HOST)
    assert offline.returncode == 1 and "The course is not here and could not be fetched. Is there a network?" in offline.stderr
    assert not list(tmp_path.iterdir())  # nothing half there
    assert "ready" in run_cell(tmp_path, repository, **HOST).stdout  # run again
    other = tmp_path / "other"
    (other / f"course-{TAG}").mkdir(parents=True)
    (other / f"course-{TAG}" / "thesis.txt").touch()
    refused = run_cell(other, repository, **HOST)
    assert refused.returncode == 1 and "could not be fetched" in refused.stderr
    assert [p.name for p in (other / f"course-{TAG}").iterdir()] == ["thesis.txt"]


def test_the_cell_on_your_own_machine_fetches_nothing(tmp_path):
    done = run_cell(ROOT / "notebooks", None)
    assert done.stdout.split()[1:] == [os.path.join(ROOT / "notebooks", "..", "course", "hosted.py")] or "ready" in done.stdout
    alone = run_cell(tmp_path, None)  # the notebook was copied out of its folder
    assert "open the notebook in the course's folder" in alone.stderr and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- Drive


def fake_drive(monkeypatch, mount):
    modules = {"google": types.ModuleType("google"), "google.colab": types.ModuleType("google.colab")}
    modules["google.colab"].drive = types.SimpleNamespace(mount=mount)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_drive_keeps_the_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hosted, "Path", lambda place: tmp_path / "drive" if place == "/content/drive" else None)
    fake_drive(monkeypatch, lambda place: None)
    hosted.mount_drive()
    assert os.environ["COURSE_RUNS"] == str(tmp_path / "drive" / "MyDrive" / "first-llm-experiment" / "runs")
    assert os.path.isdir(os.environ["COURSE_RUNS"]) and str(tmp_path) not in capsys.readouterr().out


def test_drive_refused_or_not_there(monkeypatch):
    before = os.environ["COURSE_RUNS"]
    with pytest.raises(CourseError, match="Only Colab has a Drive to mount: elsewhere set COURSE_RUNS"):
        hosted.mount_drive()

    def refuse(place):
        raise ValueError("mount failed")

    fake_drive(monkeypatch, refuse)
    with pytest.raises(CourseError, match=r"not mounted \(ValueError\): run this cell again and allow it, or untick it"):
        hosted.mount_drive()
    assert os.environ["COURSE_RUNS"] == before


# ---------------------------------------------------------------- a lost session

RUN = """
from helpers import models, recipes, runtime, training
runtime.setup(seed=0)
recipe = recipes.SFTRecipe(steps=12, batch_size=2, warmup_steps=1, examples=40)
trainer = training.make_trainer(recipe, models.load_model(recipe.bits), models.load_tokenizer(), save_steps=2, logging_steps=1)
result = training.finish(trainer)
print([log["loss"] for log in result["history"] if "loss" in log][-1])
"""


def session(folder, store, repository, kill_at=None):
    """A kernel in an empty folder runs the set-up cell and trains; it is killed once the checkpoint of step `kill_at` is whole."""
    import time

    from jupyter_client.manager import start_new_kernel

    folder.mkdir()
    environment = os.environ | HOST | address(repository) | {"COURSE_RUNS": str(store)}
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(folder), env=environment)
    said = []

    def run(code):
        reply = client.execute_interactive(code, timeout=600, output_hook=lambda m: said.append(m["content"].get("text", "")))
        assert reply["content"]["status"] == "ok", reply["content"]

    try:
        run(SETUP)
        if kill_at is None:
            run(RUN)
        else:
            client.execute(RUN)
            limit = time.monotonic() + 300
            while not list(store.glob(f"sft-*/checkpoint-{kill_at}/trainer_state.json")):
                assert time.monotonic() < limit, "no checkpoint came"
                time.sleep(0.02)
    finally:
        manager.shutdown_kernel(now=True)  # kills it: nothing is said to it before
        client.stop_channels()
    return "".join(said)


@pytest.mark.slow
def test_a_killed_kernel_goes_on_twice_from_the_store_alone(tmp_path, repository):
    import torch
    from safetensors.torch import load_file

    stores = [tmp_path / "whole", tmp_path / "store"]
    whole = session(tmp_path / "a", stores[0], repository)
    session(tmp_path / "b", stores[1], repository, kill_at=4)
    session(tmp_path / "c", stores[1], repository, kill_at=8)
    assert not list(stores[1].glob("sft-*/adapter")) and not list(stores[1].glob("sft-*/history.json"))  # both were cut off
    gone_on = session(tmp_path / "d", stores[1], repository)
    states = [json.loads(next(s.glob("sft-*/checkpoint-12/trainer_state.json")).read_text(encoding="utf-8")) for s in stores]
    losses = [{log["step"]: log["loss"] for log in state["log_history"] if "loss" in log} for state in states]
    assert list(losses[0]) == list(losses[1]) == list(range(1, 13)), "each step is logged once"
    assert float(whole.split()[-1]) == pytest.approx(float(gone_on.split()[-1]), abs=0.02)
    a, b = (load_file(next(s.glob("sft-*/adapter/adapter_model.safetensors"))) for s in stores)
    assert a.keys() == b.keys()
    change = torch.stack([(a[k] - b[k]).norm() / a[k].norm() for k in a if "lora_B" in k]).max()
    assert change < 0.05, f"the adapters differ by {change:.1%}"
