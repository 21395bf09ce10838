"""The auditor's look at files: what each is, whether configs, tokenizer and template are the known ones, whether weights are what they claim."""

import itertools
import json
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path

from helpers import models, pickles, templates, vetting
from helpers.files import CourseError, sha256
from helpers.menu import COURSE_MODEL
from helpers.sql import printable

MODEL = "model.safetensors"
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TEXTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
         "manifest.json", templates.FILE)  # fmt: skip
ALSO = re.compile(r"(README|LICENSE|LICENCE|NOTICE|CITATION)[\w.-]*|\.gitattributes|[\w-]+\.(md|txt|lock)", re.I)
MOST, LARGEST_JSON = 300, 20_000_000  # files of a folder; bytes of a JSON file (tokenizer.json has 3.5 million)
CODE = ("auto_map", "custom_pipelines", "auto_mapping")  # fields that name code
FORCES = ("sequence_bias", "bad_words_ids", "force_words_ids", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "constraints")


def walk(folder: Path) -> list[tuple[str, os.stat_result]]:
    """Names, from the folder on, and what the system says of each file, link or other thing in it; links aren't followed, `MOST` at most."""

    def inside(place: Path, before: str):
        with os.scandir(place) as entries:
            for entry in sorted(itertools.islice(entries, MOST), key=lambda e: e.name):
                about = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(about.st_mode) and before.count("/") < 3:
                    yield from inside(place / entry.name, f"{before}{entry.name}/")
                else:
                    yield f"{before}{entry.name}", about

    return list(itertools.islice(inside(folder, ""), MOST + 1))


def folder_kind(names: set[str]) -> str | None:
    """ "an adapter", "a model", or None, by the names at its top."""
    top = {name for name in names if "/" not in name}
    if any(name.startswith("adapter_") for name in top):
        return "an adapter"
    return "a model" if any(name in top for name in ("config.json", templates.FILE, "tokenizer_config.json")) or any(name.startswith(("model", "pytorch_model")) for name in top) else None


def files(report, folder: Path, entries, kind: str | None) -> None:
    """Each file by its bytes: plain ones of known names pass, what could run something or leads elsewhere is a finding."""
    odd, noted = [], []
    if len(entries) > MOST:
        odd.append(f"it holds more than {MOST} files, of which the rest wasn't looked at")
    for name, about in entries:
        what = f"{name!r}"
        if stat.S_ISLNK(about.st_mode):
            odd.append(f"{what} is a link, which leads out of the folder or anywhere else: it wasn't followed")
        elif not stat.S_ISREG(about.st_mode):
            odd.append(f"{what} is no plain file (a pipe, a device, or a folder too deep): it wasn't opened")
        else:
            said, level = _said(folder / name, name, kind)
            if said:
                (odd if level == "finding" else noted).append(f"{what} {said}")
    for says in odd:
        report.add("finding", "files", says)
    for says in noted:
        report.add("note", "files", says)
    if not odd and entries:
        report.add("ok", "files", f"{len(entries)} plain files, none of which can run anything")


def _said(path: Path, name: str, kind: str | None) -> tuple[str, str]:
    try:
        found = pickles.kind(path)
    except OSError as error:
        return f"can't be read ({error.strerror})", "finding"
    claims = name.endswith(".safetensors")
    if found in pickles.HARMFUL:
        return f"is {found}{', though its name says safetensors' if claims else ''}: loading it could run anything", "finding"
    if claims and found != "safetensors":
        return f"is {found}{'' if found.startswith('a safetensors') else ', though its name says safetensors'}", "finding"
    if found == "safetensors" and not claims:
        return "holds safetensors weights under another name: no loader of the course reads it", "note"
    expected = {"an adapter": (vetting.CONFIG, vetting.WEIGHTS), "a model": (MODEL,)}.get(kind, ())
    if name in expected or name in TEXTS or ALSO.fullmatch(name):
        return "", ""
    if name.endswith((".py", ".so", ".dll", ".sh", ".ipynb", ".pth")):
        return "is code, which a loader that trusts the folder would run", "finding"
    if name.endswith((".bin", ".pt", ".ckpt", ".pkl", ".joblib", ".npy", ".npz", ".h5")):
        return f"is {found} with a name that loaders open as pickles or arrays", "finding"
    if claims:
        return "is a further weights file, beside those that this kind of folder has", "finding"
    return f"isn't a file that {kind or 'such a folder'} needs ({found})", "note" if found in ("text", "an empty file") else "finding"


def licence(report, folder: Path, plain: set[str]) -> None:
    """What the folder says of its licence; the course's model is under Apache-2.0, and what is made from it names that."""
    found = [name for name in plain if re.fullmatch(r"(LICENSE|LICENCE)[\w.-]*", name, re.I)]
    if "README.md" in plain:
        head = (folder / "README.md").read_bytes()[:20_000].decode("utf-8", "replace")
        card = re.match(r"---\r?\n(.*?)\n---", head, re.S)
        found += re.findall(r"^license:\s*(\S{1,60})", card[1] if card else "", re.M)
    report.add("note", "licence", f"it names {', '.join(sorted(found))}" if found else f"it names none; the base's is {models.LICENSE}")


# ---------------------------------------------------------------- configs, tokenizer, template


def _json(path: Path) -> dict:
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError("too large")
    found = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=vetting.once)
    if not isinstance(found, dict):
        raise ValueError("no object")
    return found


def texts(report, folder: Path, plain: set[str], partial: bool) -> None:
    """Config, tokenizer and chat template beside the base model's own; `partial`: an adapter's folder needs none of them."""
    base = models.model_path(COURSE_MODEL)
    _template(report, folder, plain, base, partial)
    for name in sorted(plain):
        if not name.endswith(".json") or name in (vetting.CONFIG, "manifest.json") or "/" in name:
            continue
        try:
            ours = _json(folder / name)
        except (OSError, ValueError, RecursionError):
            report.add("finding", "configs", f"{name} is no JSON object that can be read")
            continue
        known = _json(base / name) if (base / name).exists() else None
        if name == "tokenizer.json" and known is not None and ours != known:
            parts = sorted(key for key in {*ours, *known} if ours.get(key) != known.get(key) and key not in ("padding", "truncation"))
            if parts:
                report.add("finding", "tokenizer", f"tokenizer.json differs from the base's in {', '.join(map(repr, parts))}: it may read other words than are typed")
            continue
        for key in sorted(_code(ours)):
            report.add("finding", "configs", f"{key!r} in {name} names code to import: nothing of the course does, and nobody should")
        if known is not None:
            _differences(report, name, ours, known)
    if not partial and not plain & {"config.json"}:
        report.add("finding", "configs", "there is no config.json: the weights can't be told to be the course model's")


def _code(value, depth: int = 0) -> set[str]:
    """Fields of a JSON object, or of those in it, that name code to import."""
    if not isinstance(value, dict) or depth > 20:
        return set()
    return {key for key, inner in value.items() if key in CODE and inner}.union(*(_code(inner, depth + 1) for inner in value.values()))


ASIDE = ("transformers_version", "dtype", "torch_dtype", "_name_or_path", "is_local", "local_files_only", "name_or_path", "use_cache", "padding_side", "chat_template", "backend",
         "auto_map", "pad_token_id", "clean_up_tokenization_spaces", "add_prefix_space", "extra_special_tokens")  # fmt: skip


def _differences(report, name: str, ours: dict, known: dict) -> None:
    odd = [key for key in sorted({*ours, *known} - {*ASIDE}) if ours.get(key) != known.get(key)]
    path = next((value for key in ("_name_or_path", "name_or_path") if isinstance(value := ours.get(key), str) and (os.path.isabs(value) or value.startswith((".", "~", "\\")))), None)
    if path:
        report.add("note", "configs", f"{name} holds the path {path[:80]!r} of somebody's machine")
    if not odd:
        return
    said = "; ".join(f"{key!r} is {_short(ours.get(key))}, the base's {_short(known.get(key))}" for key in odd[:3]) + (f"; and {len(odd) - 3} more" if len(odd) > 3 else "")
    serious = name in ("config.json", "tokenizer_config.json") or any(key in FORCES for key in odd)
    report.add("finding" if serious else "note", "configs", f"{name} differs: {said}")


def _short(value) -> str:
    said = repr(value)
    return said if len(said) <= 60 else said[:60] + "…"


def _template(report, folder: Path, plain: set[str], base: Path, partial: bool) -> None:
    known = templates.read(base)[templates.FILE]
    if any(name.startswith(("additional_chat_templates/", "chat_template.json")) for name in plain):
        report.add("note", "template", "it has further templates beside the usual one")
    try:
        found = templates.read(folder) if _readable(folder, plain) else {}
    except CourseError as error:
        report.add("finding", "template", str(error))
        return
    for where, text in found.items():
        if templates.digest(text) == templates.digest(known):
            report.add("ok", "template", f"{where} is the base's, sha256 {templates.digest(text)[:12]}")
            continue
        changed, reads = templates.changes(known, text), templates.reads_questions(text)
        says = f"{where} is another than the base's (sha256 {templates.digest(text)[:12]}, not {templates.digest(known)[:12]})"
        says += f"; it looks into what is asked: {reads[0]}" if reads else ""
        report.add("finding", "template", f"{says}; what changed: {' | '.join(changed[:4])[:600]}{' | …' if len(changed) > 4 else ''}")
    if not found and not partial:
        report.add("note", "template", "it has none: the loader's own would be used")


def _readable(folder: Path, plain: set[str]) -> bool:
    """Whether every place that a template can stand in is a plain file, as far as it is there."""
    return all(name in plain or not os.path.lexists(folder / name) for name in (templates.FILE, templates.CONFIG, "chat_template.json", "processor_config.json"))


# ---------------------------------------------------------------- weights


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
            while len(problems) < 20:
                try:
                    config = vetting.read_config(copy)
                    break
                except vetting.Refused as reason:
                    problems.append(str(reason))
                    field = re.match(r"'(.+?)' in ", str(reason))
                    given = _json(copy) if field and copy.parent == Path(scratch) else {}
                    if field is None or field[1] not in given:  # it can't be read on without this one
                        config = None
                        break
                    copy.write_text(json.dumps({key: value for key, value in given.items() if key != field[1]}), encoding="utf-8")
            else:
                config = None
        except (OSError, ValueError) as error:
            problems, config = [f"{vetting.CONFIG} can't be read ({type(error).__name__})"], None
    for says in problems:
        report.add("finding", "config", says)
    if problems:
        return None
    report.add("ok", "config", f"{config['peft_type']} for {config['base_model_name_or_path'] if '/' not in config['base_model_name_or_path'][:1] else COURSE_MODEL}, no field that the course doesn't know")
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
    report.add("ok" if told else "note", "base", f"trained on the weights that are here, sha256 {known[:12]}" if told else f"it doesn't say which weights it was trained on (those here: sha256 {known[:12]})")
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
        report.add("finding", "weights", f"they aren't the course model's in form: {len(odd)} tensors differ in name or shape, {printable(odd[0])[:100]} for one; so nothing here can be compared")
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


def two_files(folder: Path) -> Path:
    """A folder with nothing but an adapter's two files, copied: what `adapters.load_adapter` takes. Removed when the process ends."""
    place = tempfile.TemporaryDirectory(prefix="audit-", ignore_cleanup_errors=True)
    _KEPT.append(place)
    target = Path(place.name) / "adapter"
    target.mkdir()
    for name in (vetting.CONFIG, vetting.WEIGHTS):
        shutil.copyfile(folder / name, target / name)
    return target


_KEPT: list = []
