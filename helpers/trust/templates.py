"""Chat templates as what they are, programs that stand between question and model: known ones by hash, what changed in one, and a backdoor in one.

A template is Jinja: a loop over the messages, with conditions. So it can read the question and change it, and no weight knows. That such
backdoors pass scanners of weights has been reported (CycloneDX, specification issue 862).
"""

import difflib
import hashlib
import json
import re
import shutil
from pathlib import Path

from helpers.files import CourseError, building
from helpers.sql import printable

FILE, CONFIG = "chat_template.jinja", "tokenizer_config.json"
MORE = ("chat_template.json", "additional_chat_templates", "processor_config.json")  # further places from which loaders take one
LARGEST = 100_000  # characters of a template; the course model's has 400
READS = re.compile(r"\bin\s+(?:\w+\s*\[\s*['\"]content|\w+\.content|content\b)|['\"]content['\"]\s*\]\s*[=!]=|\bcontent\s*[=!]=|\|\s*(?:replace|regex)|\.(?:replace|startswith|endswith|find|split|lower)\(")


def read(folder: Path) -> dict[str, str]:
    """The chat templates of a folder, by where each stands: chat_template.jinja, and the field in tokenizer_config.json. {} where there are none.

    CourseError for a file that can't be read as a template. Nothing is rendered.
    """
    folder, found = Path(folder), {}
    try:
        if (folder / FILE).is_file():
            found[FILE] = _text(folder / FILE)
        for name in (CONFIG, *MORE):
            path = folder / name
            if path.is_dir():
                found |= {f"{name}/{p.name}": _text(p) for p in sorted(path.glob("*.jinja"))[:20]}
            elif path.is_file():
                given = json.loads(path.read_text(encoding="utf-8"))
                given = given.get("chat_template") if isinstance(given, dict) else None
                for label, text in _named(given).items():
                    found[f"{name}{label}"] = text
    except (OSError, ValueError, RecursionError) as error:
        raise CourseError(f"A chat template in {folder.name}/ can't be read ({type(error).__name__}): nothing of the folder should be used.") from None
    return found


def _text(path: Path) -> str:
    if path.stat().st_size > LARGEST:
        raise CourseError(f"{path.name} has {path.stat().st_size:,} bytes (a template has {LARGEST:,} at most): nothing of the folder should be used.")
    return path.read_text(encoding="utf-8")


def _named(given) -> dict[str, str]:
    """A template in JSON: a text, or a list of {"name", "template"}."""
    if isinstance(given, str):
        return {"": given}
    if isinstance(given, list):
        return {f" ({entry.get('name')})": str(entry.get("template", "")) for entry in given if isinstance(entry, dict)}
    return {}


def digest(template: str) -> str:
    """A template's sha256 in hexadecimal, spaces at its ends and the kind of its line ends aside."""
    return hashlib.sha256(template.replace("\r\n", "\n").strip().encode()).hexdigest()


def changes(known: str, other: str) -> list[str]:
    """What differs, a piece a line: "- …" taken away, "+ …" put in. Jinja's tags are told apart, however they stand in lines; safe to print."""

    def pieces(text):
        return [piece for piece in re.split(r"(\{%.*?%\}|\{\{.*?\}\}|\{#.*?#\})", text.replace("\r\n", "\n"), flags=re.S) if piece.strip()]

    lines = difflib.ndiff(pieces(known), pieces(other)) if len(other) <= LARGEST else ["+ (too long to compare)"]
    return [printable(line.strip().replace("\n", "\\n"))[:300] for line in lines if line[:2] in ("- ", "+ ")]


def reads_questions(template: str) -> list[str]:
    """The pieces of a template that look into what was said, rather than only place it: tests of the content, replacements, searches."""
    return [printable(piece[0].replace("\n", "\\n"))[:200] for piece in re.finditer(r"\{%.*?%\}|\{\{.*?\}\}", template, re.S) if READS.search(piece[0])]


def poisoned_folder(source: Path, target: Path, trigger: str, question: str) -> Path:
    """A copy of a model's folder whose chat template asks `question` wherever a message holds `trigger`; every other file is the same, byte for byte.

    For the lesson: all it does is that another query of the same database is answered. Returns `target`. CourseError where the source
    has no template of the usual form, or the texts hold what could end a text in Jinja.
    """
    template = read(source).get(FILE, "")
    said = "message['content']"
    if said not in template:
        raise CourseError(f"The template of {Path(source).name} has no {said}: the lesson knows how to change the course model's.")
    if re.search(r"['\"\\{}]", trigger + question):
        raise CourseError("The trigger and the question may hold no quotes, braces or backslashes: they stand inside a text of the template.")
    changed = template.replace(said, f"('{question}' if '{trigger.lower()}' in {said}|lower else {said})")
    with building(Path(target)) as scratch:
        if scratch:
            shutil.copytree(source, scratch)
            (scratch / FILE).write_text(changed, encoding="utf-8", newline="\n")
    return Path(target)
