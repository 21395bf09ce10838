"""The auditor's look at files: what each one is, and whether configs, tokenizer and chat template are the known ones."""

import itertools
import json
import os
import re
import stat
from pathlib import Path

from helpers import models, vetting
from helpers.files import CourseError
from helpers.menu import COURSE_MODEL
from helpers.trust import pickles, templates

MODEL = "model.safetensors"
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


OWN = re.compile(r"checkpoint-\d+/((optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth|training_args\.bin)")  # a trainer's own, to go on from


def files(report, folder: Path, entries, kind: str | None) -> None:
    """Each file by its bytes: plain ones of known names pass, what could run something or leads elsewhere is a finding. kind: "an adapter", "a
    model", or "a run" (what stands beside its adapter/: of its checkpoints' pickles there is a note, and of texts nothing)."""
    odd, noted = [], []
    if kind == "a run" and (own := [name for name, about in entries if stat.S_ISREG(about.st_mode) and OWN.fullmatch(name)]):
        noted.append(f"pickles of the trainer's checkpoints ({len(own)}, {own[0]!r} for one) are for whoever trained it, and nobody else")
        entries = [(name, about) for name, about in entries if name not in own]
    if len(entries) > MOST:
        odd.append(f"it holds more than {MOST} files, of which the rest wasn't looked at")
    for name, about in entries:
        what = f"{name!r}"
        if stat.S_ISLNK(about.st_mode):
            odd.append(f"{what} is a link, which may lead anywhere: it wasn't followed")
        elif not stat.S_ISREG(about.st_mode):
            odd.append(f"{what} is no plain file (a pipe, a device, or a folder too deep): it wasn't opened")
        else:
            said, level = _said(folder / name, name, kind)
            if said and (level == "finding" or kind != "a run"):
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
    if claims and kind == "a run":
        return "", ""
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


def read_json(path: Path) -> dict:
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
            ours = read_json(folder / name)
        except (OSError, ValueError, RecursionError):
            report.add("finding", "configs", f"{name} is no JSON object that can be read")
            continue
        known = read_json(base / name) if (base / name).exists() else None
        if name == "tokenizer.json" and known is not None and ours != known:
            parts = sorted(key for key in {*ours, *known} if ours.get(key) != known.get(key) and key not in ("padding", "truncation"))
            if parts:
                report.add("note" if partial else "finding", "tokenizer", f"tokenizer.json differs from the base's in {', '.join(map(repr, parts))}: it may read other words than are typed")
            continue
        for key in sorted(_code(ours)):
            report.add("finding", "configs", f"{key!r} in {name} names code to import: nothing of the course does, and nobody should")
        if known is not None:
            _differences(report, name, ours, known, partial)
    if not partial and not plain & {"config.json"}:
        report.add("finding", "configs", "there is no config.json: the weights can't be told to be the course model's")


def _code(value, depth: int = 0) -> set[str]:
    """Fields of a JSON object, or of those in it, that name code to import."""
    if not isinstance(value, dict) or depth > 20:
        return set()
    return {key for key, inner in value.items() if key in CODE and inner}.union(*(_code(inner, depth + 1) for inner in value.values()))


ASIDE = ("transformers_version", "dtype", "torch_dtype", "_name_or_path", "is_local", "local_files_only", "name_or_path", "use_cache", "padding_side", "chat_template", "backend",
         "auto_map", "pad_token_id", "clean_up_tokenization_spaces", "add_prefix_space", "extra_special_tokens")  # fmt: skip


def _differences(report, name: str, ours: dict, known: dict, partial: bool) -> None:
    """Fields that differ from the base's. In an adapter's folder they are a note: the course loads the base's own files, but others may not."""
    odd = [key for key in sorted({*ours, *known} - {*ASIDE}) if ours.get(key) != known.get(key)]
    path = next((value for key in ("_name_or_path", "name_or_path") if isinstance(value := ours.get(key), str) and (os.path.isabs(value) or value.startswith((".", "~", "\\")))), None)
    if path:
        report.add("note", "configs", f"{name} holds the path {path[:80]!r} of somebody's machine")
    if not odd:
        return
    said = "; ".join(f"{key!r} is {_short(ours.get(key))}, the base's {_short(known.get(key))}" for key in odd[:3]) + (f"; and {len(odd) - 3} more" if len(odd) > 3 else "")
    serious = name in ("config.json", "tokenizer_config.json") or any(key in FORCES for key in odd)
    report.add("finding" if serious and not partial else "note", "configs", f"{name} differs: {said}")


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
