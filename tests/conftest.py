"""Shared fixtures. Tests use the user's cache for model and database, and a runs folder of their own."""

import os

import pytest

os.environ.setdefault("COURSE_PROGRESS", "0")


@pytest.fixture(autouse=True)
def own_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))


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
    return models.load_model(bits=16, dtype=torch.float32)
