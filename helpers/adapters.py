"""Adapters as files: written for others, loaded, taken from the workshop kit, merged into the weights."""

import contextlib
import json
import os
import shutil
import stat
from pathlib import Path

from helpers import vetting
from helpers.files import CourseError, building, sha256
from helpers.menu import choose
from helpers.models import load_model
from helpers.runtime import ROOT


def export_adapter(model, target: Path) -> Path:
    """Writes the adapter for others: safetensors and adapter_config.json only; no pickle, no path of this machine.

    The base is named as the Hub has it, so that any loader finds it; the weights that were really under it are known by their
    sha256, `base_sha256` in the safetensors file's metadata (the course model's come from a Q4_1 file, not from the Hub).
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    if target.exists():
        shutil.rmtree(target)
    with building(target) as scratch:
        scratch.mkdir()
        state = {k: v.detach().cpu().contiguous() for k, v in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
        known = {"base_sha256": digest} if (digest := vetting.base_hash()) else {}
        save_file(state, scratch / vetting.WEIGHTS, metadata={"format": "pt"} | known)
        config = model.peft_config["default"].to_dict() | {"base_model_name_or_path": choose().repo, "inference_mode": True}
        text = json.dumps(config, indent=1, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
        (scratch / vetting.CONFIG).write_text(text + "\n", encoding="utf-8")
    return target


def load_adapter(folder: Path, bits: int = 4, dtype=None, trainable: bool = False):
    """The course model at `bits` bits with an exported adapter on it, ready to answer (`trainable`: to be trained further).

    Anybody's adapter: it is looked at first (`vetting.check`), and refused in one sentence (CourseError).
    """
    from peft import PeftModel

    if not (Path(folder) / vetting.CONFIG).exists():
        raise CourseError(f"There is no adapter in {Path(folder).name}/: training.sft_adapter() and dpo.adapter() train theirs when missing.")
    vetting.check(folder)
    model = PeftModel.from_pretrained(load_model(bits, dtype), folder, is_trainable=trainable).train(trainable)
    model.peft_config["default"].base_model_name_or_path = model.name_or_path  # else PEFT asks the Hub for it at each checkpoint
    return model


def merge(model):
    """Folds the adapter into the base's weights, W + sBA, and returns the plain model; refused over quantized weights.

    There W + sBA would be rounded to the 4-bit levels again, and the answers would change (peft issues 1043 and 2321).
    """
    if any(type(p).__name__ in ("Params4bit", "Int8Params") for p in model.parameters()):
        raise CourseError("Merging into quantized weights would round the adapter away in part: load the base with bits=16 and merge there.")
    return model.merge_and_unload()


def merged(folder: Path, dtype=None):
    """The course model with an exported adapter folded into it: into NF4's own values, written out in `dtype` (default: float32).

    Those are the weights beside which the course trains (notebook 02), so that the answers are the adapter's; the weights from before
    NF4 are others. In float32 they are the same to the last digits (tested); what is stored in 16 bits is rounded once more.
    """
    import torch
    from peft import PeftModel

    if not is_adapter(folder):
        raise CourseError(f"There is no adapter in {Path(folder).name}/: training.sft_adapter() and dpo.adapter() train theirs when missing.")
    vetting.check(folder)
    dtype = dtype or torch.float32
    return merge(PeftModel.from_pretrained(load_model(4, dtype).dequantize(dtype), folder)).eval()


def is_adapter(folder: Path) -> bool:
    """Whether an exported adapter stands in a folder, both of its files."""
    return all((Path(folder) / name).exists() for name in (vetting.CONFIG, vetting.WEIGHTS))


def have_adapter(folder: Path) -> bool:
    """Whether a run's adapter folder is there, or could be copied from the workshop kit (`kit/`, or the folder that COURSE_KIT names): whole or not at all.

    A kit has a folder for each recipe: another recipe's is never taken. CourseError where a copied byte differs from the manifest.
    """
    kit, run = ROOT / Path(os.environ.get("COURSE_KIT") or "kit").expanduser(), f"adapters/{folder.parent.name}/adapter/"
    if (kit / run).is_dir() and not folder.exists():
        damaged = CourseError(f"The kit's copy of {folder.parent.name} is damaged: copy the kit again, or remove {kit / run}.")
        listed = {name: digest for name, digest in _listed(kit / "manifest.json").items() if name.startswith(run)}
        with building(folder, need_bytes=50_000_000) as scratch:
            if scratch:
                scratch.mkdir()
                names = [f"{run}{name}" for name in (vetting.CONFIG, vetting.WEIGHTS)]
                if sorted(listed) != sorted(names) or sorted(run + entry.name for entry in (kit / run).iterdir()) != sorted(names):
                    raise damaged
                for name in names:
                    if not stat.S_ISREG((kit / name).lstat().st_mode):  # a link would lead out of the kit, a pipe nowhere
                        raise damaged
                    copy = scratch / Path(name).name
                    shutil.copyfile(kit / name, copy)
                    if sha256(copy) != listed[name]:
                        raise damaged
                print(f"{folder.parent.name}: taken from the workshop kit")
    return is_adapter(folder)


def _listed(manifest: Path) -> dict[str, str]:
    """Names and sha256 that a kit's manifest lists; {} where it is none."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {name: about["sha256"] for name, about in json.loads(manifest.read_text(encoding="utf-8"))["files"].items()}
    return {}
