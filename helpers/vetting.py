"""What a stranger's adapter is, found out before anything of it is loaded: two plain files, a config of known fields, weights that fit.

For the course's own runs, a workshop kit's and anybody's folder alike. Nothing is fetched, no field is taken on trust (a
string in target_modules would be a regular expression, a folder without weights a question to the Hub), and each refusal is
one sentence. What it can't tell is whether the weights mean well: that takes measuring.
"""

import dataclasses
import itertools
import json
import math
import os
import re
import stat
from pathlib import Path

from helpers import models
from helpers.files import CourseError, sha256
from helpers.menu import COURSE_MODEL, choose

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CONFIG_BYTES, HEADER_BYTES = 100_000, 2_000_000
LARGEST = 1e4  # of a weight; trained ones stay below 10
RANK, TOKENS = 1024, 1024
DTYPES = ("F32", "F16", "BF16")


class Refused(Exception):
    """Why an adapter isn't loaded."""


def _whole(low: int, high: int):
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(low: float, high: float):
    return lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and low <= value <= high


def _names(value) -> bool:
    """Modules by their names; one string would be a regular expression, which can run for ever."""
    return isinstance(value, list) and 0 < len(value) <= 100 and all(isinstance(n, str) and re.fullmatch(r"\w{1,60}(\.\w{1,60}){0,20}", n) for n in value)


def _one_of(*values):
    return lambda value: any(value is v or (isinstance(value, str) and value == v) for v in values)


_flag = _one_of(True, False)
EVERY = {  # fields of every method, and what they may say; those that aren't named here must have PEFT's default
    "peft_version": lambda value: value is None or (isinstance(value, str) and len(value) < 40),
    "inference_mode": _flag,
    "base_model_name_or_path": lambda value: isinstance(value, str),  # looked at by `_check_base`
    "task_type": _one_of("CAUSAL_LM"),
}
MAY_LACK = ("peft_version", "inference_mode", "lora_dropout", "use_rslora", "use_dora", "prompt_tuning_init")  # older PEFTs wrote fewer
FIELDS = {
    "LORA": {
        "r": _whole(1, RANK), "lora_alpha": _number(0, 1e5), "lora_dropout": _number(0, 0.999), "use_rslora": _flag, "use_dora": _flag,
        "target_modules": lambda value: value == "all-linear" or _names(value),
    },
    "IA3": {"target_modules": _names, "feedforward_modules": _names},
    "PROMPT_TUNING": {
        "num_virtual_tokens": _whole(1, TOKENS), "prompt_tuning_init": _one_of("RANDOM", "SAMPLE_VOCAB"), "token_dim": _whole(1, 10**6),
        "num_transformer_submodules": _whole(1, 1), "num_attention_heads": _whole(1, 10**6), "num_layers": _whole(1, 10**6),
    },
}  # fmt: skip


def check(folder: Path) -> dict:
    """The config of the adapter in a folder that may be loaded on COURSE_MODEL's model. CourseError: why not, in one sentence."""
    folder = Path(folder)
    name = f"{folder.parent.name}/{folder.name}" if folder.name == "adapter" and folder.parent.name else folder.name  # a run's: the run tells it apart
    try:
        _check_files(folder)
        config = _config(folder / CONFIG)
        _check_weights(folder / WEIGHTS, config)
        return config
    except Refused as reason:
        then = "Nothing of it was used; ask whoever made it for another, or train your own (where it stands in runs/, remove its folder first)."
        raise CourseError(f"The adapter {name}/ was not loaded: {reason}. {then}") from None
    except OSError as error:
        raise CourseError(f"The adapter {name}/ can't be read ({error.strerror}): check the path.") from None


def _check_files(folder: Path) -> None:
    with os.scandir(folder) as entries:
        found = {entry.name: entry.stat(follow_symlinks=False) for entry in itertools.islice(entries, 20)}
    if missing := {CONFIG, WEIGHTS} - found.keys():
        raise Refused(f"{' and '.join(sorted(missing))} is missing")
    if more := sorted(found.keys() - {CONFIG, WEIGHTS}):
        pickle = " (a pickle could run anything)" if any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in more) else ""
        raise Refused(f"it has more than its two files: {more[0]!r}{pickle}")
    for name, about in found.items():
        if not stat.S_ISREG(about.st_mode):
            raise Refused(f"{name} is no plain file, but a link, a pipe or a folder")


def once(pairs: list[tuple[str, object]]) -> dict:
    """For `json.loads`: an object whose names are all different. ValueError otherwise."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def _config(path: Path) -> dict:
    if path.stat().st_size > CONFIG_BYTES:
        raise Refused(f"{CONFIG} has {path.stat().st_size:,} bytes (limit {CONFIG_BYTES:,})")
    try:
        config = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{CONFIG} is not JSON ({'nested too deeply' if isinstance(error, RecursionError) else str(error)[:80]})") from None
    if not isinstance(config, dict):
        raise Refused(f"{CONFIG} is not an object")
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in FIELDS:
        raise Refused(f"its method is {_short(kind)}; the course knows {', '.join(FIELDS)}")
    rules, defaults = EVERY | FIELDS[kind], _defaults(kind)
    for name in rules:
        if name not in config and name not in MAY_LACK:
            raise Refused(f"{CONFIG} lacks {name!r}")
    for name, value in config.items():
        if name == "peft_type":
            continue
        if name in rules:
            if not rules[name](value):
                raise Refused(f"{name!r} in {CONFIG} is {_short(value)}, which the course doesn't take")
        elif not (value == defaults[name] if name in defaults and type(value) is type(defaults[name]) else value in (None, False, [], {}, "")):
            raise Refused(f"{name!r} in {CONFIG} is {_short(value)}, a setting that the course doesn't use")
    _check_base(config)
    return config


def _defaults(kind: str) -> dict:
    """PEFT's own default of each field of a method."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

    found = {}
    for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]):
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        found[field.name] = getattr(made, "value", made)
    return found


def _check_base(config: dict) -> None:
    entry, base = choose(), config["base_model_name_or_path"]
    own = [str(models.model_path(COURSE_MODEL))] if entry.name == COURSE_MODEL else []  # as PEFT itself writes it
    if base not in (entry.name, entry.repo, *own):
        raise Refused(f"it was made for {_short(base)}, and the model here is {entry.name} (COURSE_MODEL)")


def _short(value) -> str:
    said = repr(value)
    return said if len(said) <= 60 else said[:60] + "…"


# ---------------------------------------------------------------- weights


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that an adapter of this config has on the model here (read off the model's shape: no weights are loaded)."""
    import torch
    from transformers import AutoModelForCausalLM

    kind, found = config["peft_type"], {}
    if kind == "PROMPT_TUNING":
        return {"prompt_embeddings": (config["num_virtual_tokens"], config["token_dim"])}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_model_config())
    wanted, rank = config["target_modules"], config.get("r")
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or not _is_target(name, wanted):
            continue
        into, out = module.in_features, module.out_features
        if kind == "IA3":
            own = {"ia3_l": (1, into) if _is_target(name, config["feedforward_modules"]) else (out, 1)}
        else:
            own = {"lora_A.weight": (rank, into), "lora_B.weight": (out, rank)} | ({"lora_magnitude_vector": (out,)} if config.get("use_dora") else {})
        found |= {f"base_model.model.{name}.{part}": shape for part, shape in own.items()}
    if not found:
        raise Refused(f"'target_modules' in {CONFIG} names no layer of the model here: {_short(wanted)}")
    return found


def _model_config():
    """The config of the model here, without a network."""
    from transformers import AutoConfig

    entry = choose()
    return AutoConfig.from_pretrained(models.model_path(COURSE_MODEL)) if entry.name == COURSE_MODEL else entry.config()


def _is_target(name: str, wanted) -> bool:
    if wanted == "all-linear":
        return not name.endswith("lm_head")
    return any(name == target or name.endswith(f".{target}") for target in wanted)


def _check_weights(path: Path, config: dict) -> None:
    import torch
    from safetensors import SafetensorError, safe_open

    expected = shapes(config)
    if config["peft_type"] == "PROMPT_TUNING" and config["token_dim"] != _model_config().hidden_size:
        raise Refused(f"its tokens are {config['token_dim']} numbers wide, and the model's {_model_config().hidden_size}")
    most = HEADER_BYTES + 4 * sum(map(math.prod, expected.values()))
    if path.stat().st_size > most:
        raise Refused(f"{WEIGHTS} has {path.stat().st_size:,} bytes, and its config accounts for {most:,} at most")
    try:
        with safe_open(path, "pt") as file:
            _check_names({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, expected)  # noqa: SIM118 - not a dict
            _check_hash(file.metadata() or {})
            for name in expected:
                if file.get_slice(name).get_dtype() not in DTYPES:
                    raise Refused(f"{name} holds {file.get_slice(name).get_dtype()} numbers; {', '.join(DTYPES)} are taken")
                weights = file.get_tensor(name).to(torch.float32)
                if not weights.isfinite().all() or weights.abs().max() > LARGEST:
                    raise Refused(f"{name} holds numbers that no training leaves (infinite, none at all, or above {LARGEST:g})")
    except SafetensorError as error:
        raise Refused(f"{WEIGHTS} is damaged, or no safetensors file ({str(error)[:80]})") from None


def _check_names(found: dict, expected: dict) -> None:
    if missing := expected.keys() - found.keys():
        raise Refused(f"{len(missing)} of {len(expected)} weights are missing, {sorted(missing)[0]} for one")
    if more := found.keys() - expected.keys():
        raise Refused(f"it has {len(more)} weights that belong to nothing here, {_short(sorted(more)[0])} for one")
    for name, shape in expected.items():
        if found[name] != shape:
            raise Refused(f"{name} has the shape {found[name]}, and the model needs {shape}")


def _check_hash(metadata: dict) -> None:
    known, made = base_hash(), metadata.get("base_sha256")
    if known and made and made != known:
        raise Refused("it was trained on other weights of the same name, as their hash says")


def base_hash() -> str | None:
    """sha256 of the weights that COURSE_MODEL names here; None for a model of the Hub, which is known by its pinned revision."""
    if choose().name != COURSE_MODEL:
        return None
    manifest = models.model_path(COURSE_MODEL) / "manifest.json"
    listed = json.loads(manifest.read_text(encoding="utf-8"))["files"] if manifest.exists() else {}
    return listed.get("model.safetensors") or sha256(models.model_path(COURSE_MODEL) / "model.safetensors")


# ---------------------------------------------------------------- part by part, for an audit that goes on after a finding


def read_config(path: Path) -> dict:
    """An adapter's config, looked at as `check` does. Refused: the first thing that is wrong."""
    return _config(path)


def check_weights(path: Path, config: dict) -> None:
    """An adapter's weights, looked at as `check` does, against its config. Refused: the first thing that is wrong."""
    _check_weights(path, config)
