"""`make laptop-check`: what helpers sets before torch is imported, what the profile makes of bitsandbytes, what the command runs."""

import os
import subprocess
import sys

import pytest

from course import laptop, runner
from helpers import models
from helpers.runtime import ROOT

VARIABLES = ("OMP_WAIT_POLICY", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "CUDA_VISIBLE_DEVICES")
SAYS = "import os, {0}; print([os.environ.get(name) for name in {1!r}])"


def there(package: str, **environment) -> str:
    """What a fresh process has of VARIABLES after it imported the package."""
    clean = {name: value for name, value in os.environ.items() if name not in (*VARIABLES, "COURSE_PROFILE")}
    code = SAYS.format(package, VARIABLES)
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean | environment, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("package", ["helpers.sql", "course"])
def test_variables_are_set_by_whatever_is_imported_first(package):
    assert there(package) == "['PASSIVE', None, None, None, None]"
    assert there(package, COURSE_PROFILE="t4", OMP_WAIT_POLICY="ACTIVE") == "['ACTIVE', None, None, None, None]"
    assert there(package, COURSE_PROFILE="laptop") == "['PASSIVE', 'avx2', 'AVX2', 'AVX2', '']"


def test_torch_then_has_avx2_at_most():
    code = "import helpers, torch; print(torch.backends.cpu.get_cpu_capability(), torch.cuda.is_available())"
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES} | {"COURSE_PROFILE": "laptop"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean, capture_output=True, text=True, check=True)
    assert run.stdout.split() in (["AVX2", "False"], ["DEFAULT", "False"], ["NO", "AVX", "False"])


@pytest.mark.slow
def test_bitsandbytes_packs_nothing(monkeypatch, shortened):
    import torch
    from bitsandbytes.nn import modules

    monkeypatch.setattr(models, "model_path", shortened)
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)

    def would_pack():
        return {m.support_avx512bf16_for_cpu for m in models.load_model(4, torch.float32).modules() if isinstance(m, modules.Linear4bit)}

    monkeypatch.setenv("COURSE_PROFILE", "")
    assert would_pack() == {True}
    monkeypatch.setenv("COURSE_PROFILE", "laptop")
    assert would_pack() == {False}


def test_files_that_depend_on_the_device():
    found = laptop.files()
    assert {"tests/test_models.py", "tests/test_recipes.py", "tests/test_dpo.py", "tests/test_policy.py", "tests/test_scoring.py"} <= set(found)
    assert not {"tests/test_sql.py", "tests/test_workflows.py", "tests/test_gpu.py"} & set(found) and all((ROOT / name).exists() for name in found)


@pytest.mark.parametrize(("tests", "notebooks", "status"), [(0, 0, 0), (1, 0, 1), (0, 1, 1), (2, 1, 1)])
def test_the_command_runs_both_as_a_laptop(monkeypatch, tests, notebooks, status):
    calls = []
    monkeypatch.setattr(runner, "pytest", lambda *names, **environment: calls.append((list(names), environment)) or tests)
    monkeypatch.setattr(runner, "nbval", lambda names, **environment: calls.append((names, environment)) or notebooks)
    assert laptop.run() == status
    core = ["00_start_here", "01_quantized_loading", "02_lora_injection", "03_sft_with_trl", "04_dpo"]
    assert calls == [(laptop.files(), {"COURSE_PROFILE": "laptop"}), (core, {"COURSE_PROFILE": "laptop"})]
