"""The auditor's look at weights and at the config that explains them: what they claim, whether it is so, before a loader sees them."""

import contextlib
import json
import re
import shutil
import tempfile
from pathlib import Path

from helpers import models, vetting
from helpers.files import sha256
from helpers.menu import COURSE_MODEL
from helpers.trust import pickles

MODEL = "model.safetensors"
SOUND = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "base_model_name_or_path": COURSE_MODEL}  # put in for a field that isn't, to read on
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapter_config(report, folder: Path, plain: set[str]) -> dict | None:
    """The adapter's config where it is sound; each thing that isn't is a finding."""
    if vetting.CONFIG not in plain:
        report.add("finding", "config", f"{vetting.CONFIG} is missing, or no plain file")
        return None
    with tempfile.TemporaryDirectory(prefix="audit-", ignore_cleanup_errors=True) as scratch:
        copy, problems = Path(scratch) / vetting.CONFIG, []
        try:
            if (folder / vetting.CONFIG).stat().st_size > vetting.CONFIG_BYTES:
                copy = folder / vetting.CONFIG
            else:
                shutil.copyfile(folder / vetting.CONFIG, copy)
            config = None
            while config is None and len(problems) < 20:
                try:
                    config = vetting.read_config(copy)
                except vetting.Refused as reason:
                    problems.append(str(reason))
                    wrong = re.match(r"'(.+?)' in ", str(reason))
                    given = json.loads(copy.read_text(encoding="utf-8")) if wrong and copy.parent == Path(scratch) else {}
                    if wrong is None or wrong[1] not in given:  # it can't be read on without this one
                        break
                    given.pop(wrong[1])
                    copy.write_text(json.dumps(given | ({wrong[1]: SOUND[wrong[1]]} if wrong[1] in SOUND else {})), encoding="utf-8")
        except (OSError, ValueError) as error:
            problems, config = [f"{vetting.CONFIG} can't be read ({type(error).__name__})"], None
    for says in problems:
        report.add("finding", "config", says)
    if problems:
        return None
    report.add("ok", "config", f"{config['peft_type']} for {COURSE_MODEL}, no field that the course doesn't know")
    return config


def adapter_weights(report, folder: Path, plain: set[str], config: dict | None) -> bool:
    """Whether the adapter's weights are sound: plain numbers, of the names and shapes that the config and the model here ask for."""
    path = folder / vetting.WEIGHTS
    if vetting.WEIGHTS not in plain:
        report.add("finding", "weights", f"{vetting.WEIGHTS} is missing, or no plain file")
        return False
    if pickles.kind(path) != "safetensors":
        return False  # said of the files
    if config is None:
        problem = header(path)[1]
        report.add(*(("finding", "weights", problem) if problem else ("note", "weights", "not compared: the config doesn't say what they should be")))
        return False
    try:
        vetting.check_weights(path, config)
    except vetting.Refused as reason:
        report.add("finding", "weights", str(reason))
        return False
    told = (header(path)[0].get("__metadata__") or {}).get("base_sha256")
    known = vetting.base_hash()
    report.add("ok" if told else "note", "base", f"it says that it was trained on the weights that are here, sha256 {known[:12]}" if told else f"it doesn't say which weights it was trained on (those here: sha256 {known[:12]})")
    return True


def header(path: Path) -> tuple[dict, str]:
    """A safetensors file's header, or {} and what is wrong with it; no tensor is read."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > vetting.HEADER_BYTES or length > path.stat().st_size - 8:
            return {}, f"{path.name} claims a header of {length:,} bytes, and {'the file ends before that' if length > path.stat().st_size - 8 else f'{vetting.HEADER_BYTES:,} are plenty'}"
        try:
            found = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=vetting.once)
            end = max((entry["data_offsets"][1] for name, entry in found.items() if name != "__metadata__"), default=0)
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError):
            return {}, f"{path.name} has a header that can't be read: it is damaged, or no safetensors file"
    if end + 8 + length != path.stat().st_size:
        return {}, f"{path.name} is damaged: its header accounts for {end + 8 + length:,} bytes, and it has {path.stat().st_size:,}"
    return found, ""


def model_weights(report, folder: Path, plain: set[str]) -> str | None:
    """ "same" where a model's weights are the base's to the bit, "fits" where they are other numbers of its names and shapes, None where they can't be used."""
    if MODEL not in plain:
        report.add("finding", "weights", f"{MODEL} is missing, or no plain file")
        return None
    path, base = folder / MODEL, models.model_path(COURSE_MODEL) / MODEL
    if pickles.kind(path) != "safetensors":
        return None
    if path.stat().st_size == base.stat().st_size and (digest := sha256(path)) == vetting.base_hash():
        report.add("ok", "weights", f"they are the base's to the bit, sha256 {digest[:12]}")
        return "same"
    found, problem = header(path)
    if problem:
        report.add("finding", "weights", problem)
        return None

    def shapes(told):
        return {name: entry["shape"] for name, entry in told.items() if name != "__metadata__"}

    ours, known = shapes(found), shapes(header(base)[0])
    ours.pop("lm_head.weight", None)  # the course model's is its input embedding, and some savers write it twice
    if ours != known:
        odd = sorted(name for name in {*ours, *known} if ours.get(name) != known.get(name))
        report.add("finding", "weights", f"they aren't the course model's in form: {len(odd)} tensors differ in name or shape, {odd[0][:100]} for one; so nothing here can be compared")
        return None
    if any(entry["dtype"] not in vetting.DTYPES for name, entry in found.items() if name != "__metadata__"):
        report.add("finding", "weights", f"they hold numbers of another kind than {', '.join(vetting.DTYPES)}")
        return None
    if not _finite(path):
        report.add("finding", "weights", "they hold numbers that no training leaves (infinite, none at all, or huge)")
        return None
    report.add("note", "weights", f"they aren't the base's (sha256 {sha256(path)[:12]}), but fit its names and shapes")
    return "fits"


def _finite(path: Path) -> bool:
    import torch
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return all((t := file.get_tensor(name).to(torch.float32)).isfinite().all() and t.abs().max() <= vetting.LARGEST for name in file.keys())  # noqa: SIM118


@contextlib.contextmanager
def two_files(folder: Path):
    """Within a `with`, a folder that holds copies of an adapter's two files and nothing else: what `adapters.load_adapter` takes."""
    with tempfile.TemporaryDirectory(prefix="audit-", ignore_cleanup_errors=True) as place:
        target = Path(place) / "adapter"
        target.mkdir()
        for name in (vetting.CONFIG, vetting.WEIGHTS):
            shutil.copyfile(folder / name, target / name)
        yield target
