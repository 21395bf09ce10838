"""How large an update is, layer by layer and module by module, beside the weights that it changes: measured on files, without a model."""

import math
import re
from pathlib import Path

from helpers import models, vetting
from helpers.menu import COURSE_MODEL

PREFIX = "base_model.model."


def base_weights(names) -> dict:
    """float32 weights (out, in) of the course model's layers, by module name, read one by one from its file."""
    import torch
    from safetensors import safe_open

    with safe_open(models.model_path(COURSE_MODEL) / "model.safetensors", "pt") as file:
        there = set(file.keys())
        places = {name: "model.embed_tokens.weight" if name == "lm_head" else f"{name}.weight" for name in names}  # the head is the input embedding
        return {name: file.get_tensor(place).to(torch.float32) for name, place in places.items() if place in there}


def lora_scale(config: dict) -> float:
    """The factor s of sBA: alpha / r, or with rsLoRA alpha / sqrt(r)."""
    return config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])


def of_adapter(folder: Path, config: dict) -> list[dict]:
    """One row a module that a LoRA adapter changes: its name, layer, module, and the `measures` of sBA; [] for another method.

    folder: with adapter_model.safetensors, looked at before (`vetting`). The singular values of BA are those of a small matrix of r by r.
    """
    import torch
    from safetensors import safe_open

    if config["peft_type"] != "LORA":
        return []
    found = {}
    with safe_open(Path(folder) / vetting.WEIGHTS, "pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a dict
            name, _, part = key.removeprefix(PREFIX).rpartition(".lora_")
            if part in ("A.weight", "B.weight"):
                found.setdefault(name, {})[part[0]] = file.get_tensor(key).to(torch.float32)
    base, scale, rows = base_weights(found), lora_scale(config), []
    for name, part in found.items():
        left, right = torch.linalg.qr(part["B"])[1], torch.linalg.qr(part["A"].T)[1]  # BA = Q (left right^T) P^T with orthonormal Q and P
        rows.append(_row(name, scale * torch.linalg.svdvals(left @ right.T), base.get(name)))
    return sorted(rows, key=lambda row: (row["layer"], row["module"]))


def of_weights(path: Path) -> list[dict]:
    """The same rows for a whole model's file (safetensors, the course model's names and shapes): what it changes in each layer.

    Tensors without a change are left out; those that aren't a layer's weight have layer -1.
    """
    import torch
    from safetensors import safe_open

    rows = []
    with safe_open(path, "pt") as file, safe_open(models.model_path(COURSE_MODEL) / "model.safetensors", "pt") as base:
        for key in base.keys():  # noqa: SIM118
            if key in set(file.keys()):
                before = base.get_tensor(key).to(torch.float32)
                change = file.get_tensor(key).to(torch.float32) - before
                if change.abs().max() > 0:
                    values = torch.linalg.svdvals(change) if change.ndim == 2 and min(change.shape) <= 2048 else change.norm()[None]
                    rows.append(_row(key.removesuffix(".weight"), values, before))
    return sorted(rows, key=lambda row: (row["layer"], row["module"]))


def _row(name: str, values, base) -> dict:
    """`values`: the update's singular values, largest first."""
    frobenius, spectral = float(values.norm()), float(values.max())
    layer = re.search(r"\.layers\.(\d+)\.", name)
    size = float(base.norm()) if base is not None else 0.0
    return {
        "name": name, "layer": int(layer[1]) if layer else -1, "module": name.rsplit(".", 1)[-1], "frobenius": frobenius, "spectral": spectral,
        "relative": frobenius / size if size else 0.0, "stable_rank": (frobenius / spectral) ** 2 if spectral else 0.0,
    }  # fmt: skip
