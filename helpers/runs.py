"""What a run was made of, kept beside its checkpoints, history and adapter: nothing is gone on with, or handed back, by another's name."""

import hashlib
import json
from pathlib import Path

from helpers import vetting
from helpers.files import CourseError, sha256, write_whole
from helpers.flights import SYSTEM_PROMPT
from helpers.runtime import runs_dir

KEPT = "run.json"
SETTINGS = (  # of TRL's and transformers' arguments: those that decide what is learnt, but for the machine's precision and kernels
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "train_sampling_strategy", "seed", "data_seed"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_length", "packing", "completion_only_loss", "label_smoothing_factor", "neftune_noise_alpha", "loss_type", "loss_weights", "beta"),
)
ASIDE = ("base_model_name_or_path", "inference_mode", "revision", "peft_version", "runtime_config", "auto_mapping")  # of PEFT's settings: decide nothing
CLOSE = 0.02  # of the base's sampled weights, relative: 16 bits round, another model's differ


def described(trainer) -> dict:
    """All that decides what a trainer's run becomes, but for the machine: method, settings, data, base, adapter and what it starts from."""
    if not hasattr(trainer, "made_of"):
        model, args = trainer.model, trainer.args
        settings = {name: _plain(getattr(args, name)) for name in SETTINGS if hasattr(args, name)}
        rows = trainer.train_dataset[:]  # a dict of columns
        data = {"rows": len(trainer.train_dataset), "sha256": hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()}
        adapter = {}
        if hasattr(model, "peft_config"):
            adapter = {name: _plain(value) for name, value in model.peft_config["default"].to_dict().items() if name not in ASIDE}
        start = getattr(trainer, "starts_from", None)
        method = "dpo" if hasattr(args, "beta") else "sft"
        trainer.made_of = {"method": method, "settings": settings, "data": data, "base": _base(model), "adapter": adapter, "start": start}
    return trainer.made_of


def _plain(value):
    """A setting as JSON keeps it."""
    value = getattr(value, "value", value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, dict, type(None))) else str(value)


def _base(model) -> dict:
    """A base model's name, bits and size, with eight of its input weights: as they are before anything is trained."""
    bits = 4 if getattr(model, "is_loaded_in_4bit", False) else 8 if getattr(model, "is_loaded_in_8bit", False) else 16
    words = model.get_input_embeddings().weight
    sample = words.detach()[len(words) // 2, :8].float().tolist()
    return {"name": Path(model.name_or_path or "").name, "bits": bits, "words": list(words.shape), "weights": sample}


def digest(state: dict) -> str:
    """sha256 of tensors by name, as float32."""
    whole = hashlib.sha256()
    for name in sorted(state):
        whole.update(name.encode())
        whole.update(state[name].detach().float().cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()


def folder_for(recipe, rows, changes: dict, prompt: str = SYSTEM_PROMPT) -> Path:
    """The recipe's own folder, or beside it one of their own for other rows, settings and system prompts."""
    other = {name: _plain(value) for name, value in changes.items() if name in SETTINGS}
    asked = [prompt] if prompt != SYSTEM_PROMPT else []
    if rows is None and not other and not asked:
        return recipe.folder()
    said = json.dumps([None if rows is None else list(rows), other, *asked], sort_keys=True, default=str)
    return runs_dir() / f"{recipe.folder().name}-{hashlib.sha256(said.encode()).hexdigest()[:6]}"


def check(folder: Path, now: dict) -> None:
    """CourseError where a folder holds checkpoints, a history or an adapter of a run made of something else: it says what differs."""
    holds = [path.name for path in (*sorted(folder.glob("checkpoint-*")), folder / "history.json") if path.exists()]
    if not holds:
        return
    then = "Give this one a folder of its own (folder=…), or remove that one to train anew"
    try:
        before = json.loads((folder / KEPT).read_text(encoding="utf-8"))["made_of"]
        found = differences(before, now)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CourseError(f"{folder.name}/ holds {holds[-1]} of a run that doesn't say what it was made of ({KEPT}). {then}.") from None
    if found:
        raise CourseError(f"{folder.name}/ holds another run: {'; '.join(found)}. {then}.")


def differences(before: dict, now: dict) -> list[str]:
    """What two runs were made of that differs, each in a few words."""
    found = [] if before["method"] == now["method"] else [f"method {before['method']} there, {now['method']} here"]
    for part in ("settings", "adapter"):
        for name in sorted(before[part].keys() & now[part].keys()):
            if before[part][name] != now[part][name]:
                found.append(f"{name} {_short(before[part][name])} there, {_short(now[part][name])} here")
    if bool(before["adapter"]) != bool(now["adapter"]):
        found.append(f"{'an adapter' if before['adapter'] else 'every weight'} was trained there, {'an adapter' if now['adapter'] else 'every weight'} here")
    old, new = before["base"], now["base"]
    if any(old[part] != new[part] for part in ("name", "bits", "words")):
        found.append(f"base {old['name']} in {old['bits']} bits there, {new['name']} in {new['bits']} here")
    elif any(abs(a - b) > CLOSE * max(abs(a), abs(b), 1e-3) for a, b in zip(old["weights"], new["weights"], strict=True)):
        found.append(f"a base of the same name, {new['name']}, with other weights")
    if before["data"] != now["data"]:
        found.append(f"other data ({before['data']['rows']:,} rows there, {now['data']['rows']:,} here)")
    if before["start"] != now["start"]:
        found.append("it started from another adapter" if before["start"] and now["start"] else f"it started from {'an' if before['start'] else 'no'} adapter")
    return found


def _short(value) -> str:
    text = str(value)
    return text if len(text) < 60 else text[:60] + "…"


def keep(folder: Path, now: dict, adapter: Path | None = None) -> None:
    """Writes what the folder's run is made of, and, once there is one, the hash of its adapter's weights; nothing where it says so already."""
    path, text = folder / KEPT, json.dumps({"made_of": now, "adapter": sha256(adapter / vetting.WEIGHTS) if adapter else None}, indent=1) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8", errors="replace") != text:
        write_whole(path, text)


def check_adapter(folder: Path) -> None:
    """CourseError where the adapter in a finished run's folder is damaged, or isn't the one that the run made."""
    vetting.check(folder / "adapter")
    made = json.loads((folder / KEPT).read_text(encoding="utf-8")).get("adapter")
    if made != sha256(folder / "adapter" / vetting.WEIGHTS):
        raise CourseError(f"The adapter in {folder.name}/ isn't the one that this run made: move it elsewhere, and remove the folder to train anew.")


def history(folder: Path) -> dict:
    """A finished run's history and seconds, as `finish` kept them. CourseError where the file is damaged."""
    try:
        kept = json.loads((folder / "history.json").read_text(encoding="utf-8"))
        if isinstance(kept["history"], list) and isinstance(kept["seconds"], (int, float)):
            return kept
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise CourseError(f"history.json in {folder.name}/ is damaged: move the adapter elsewhere if you need it, and remove the folder to train anew.")
