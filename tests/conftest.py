"""Shared fixtures. Tests use the user's cache for model and database, and a runs folder of their own."""

import functools
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import helpers  # noqa: F401  # before torch

os.environ.setdefault("COURSE_PROGRESS", "0")


@pytest.fixture(autouse=True)
def own_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))


def shorten(source: Path, layers: int, target: Path) -> Path:
    """The course model's folder with the first few of its 30 layers: real weights, for what holds of a model of any depth, in less time."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    shutil.copytree(source, target, ignore=shutil.ignore_patterns("model.safetensors", "manifest.json"))
    with safe_open(source / "model.safetensors", "pt") as file:
        kept = [name for name in file.keys() if ".layers." not in name or int(name.split(".")[2]) < layers]  # noqa: SIM118
        save_file({name: file.get_tensor(name) for name in kept}, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}), encoding="utf-8")
    return target


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a real disk of so many MB and gives its folder, where this system and its rights allow that."""
    place = tmp_path / "small"

    def mounted(megabytes: int) -> Path:
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            place.rmdir()
            pytest.skip("no disk can be mounted here")
        return place

    yield mounted
    if place.exists():
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(scope="session")
def shortened(tmp_path_factory):
    """In place of `models.model_path`: the course model with 4 layers, made when it is first asked for."""
    from helpers import models

    whole = models.model_path
    return functools.cache(lambda name=None: shorten(whole(), 4, tmp_path_factory.mktemp("shortened") / "SmolLM2-135M-Instruct"))


@pytest.fixture(scope="module")
def short_model(shortened):
    """For a whole file of tests that train: `models.load_model` gives 4 of the model's 30 layers."""
    from helpers import models

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "model_path", shortened)
        yield


@pytest.fixture(scope="session")
def tokenizer():
    from helpers import models, runtime

    runtime.setup()
    return models.load_tokenizer()


@pytest.fixture(scope="session")
def model32():
    """The course model in float32, for what must not depend on rounding."""
    import torch

    from helpers import models, runtime

    runtime.setup()
    model = models.load_model(bits=16, dtype=torch.float32)
    assert model.config.num_hidden_layers == 30, "asked for in a file whose model is short"
    return model


@pytest.fixture
def exported(tmp_path):
    """A folder such as `adapters.export_adapter` writes, with one small tensor."""
    import numpy as np
    from safetensors.numpy import save_file

    folder = tmp_path / "flights-sql"
    folder.mkdir()
    save_file({"base_model.model.x.lora_A.weight": np.ones((2, 3), np.float32)}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct", "peft_type": "LORA", "r": 2}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture
def board():
    """Rows of a scoreboard: a model's own, live and recorded, another seed's, and a baseline's."""
    row = {"n": 40, "correct": 28, "accuracy": 0.7, "low": 0.6, "high": 0.8, "seconds": 9.0, "seed": 0}
    return [
        row | {"stage": "sft", "split": "test", "source": "recorded", "accuracy": 0.725},
        row | {"stage": "sft", "split": "test", "source": "live"},
        row | {"stage": "sft", "split": "test", "source": "recorded", "seed": 1, "accuracy": 0.5},
        row | {"stage": "sft", "split": "freeform", "source": "recorded", "accuracy": 0.65},
        row | {"stage": "retrieved-8-shot", "split": "test", "source": "recorded", "accuracy": 0.05, "low": 0.02, "high": 0.1, "correct": 2},
    ]
