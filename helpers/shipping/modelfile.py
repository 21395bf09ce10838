"""A Modelfile for ollama, whose chat template is the model's own in Go's words; and a small evaluator that shows what it makes of a chat.

ollama reads neither transformers' files nor, as a rule, the Jinja template in a GGUF file: it guesses a template of its own list, or takes
the Modelfile's. ollama isn't needed here: what its `parser` and `template` packages do (2026-08) with a Modelfile like this is done in
Python, and so can be compared with transformers' rendering.
"""

import hashlib
import re
from pathlib import Path

from helpers.files import CourseError, write_whole

JINJA_SHA256 = "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788"  # of the chat template that this one is made after
TEMPLATE = """\
{{ range $i, $message := .Messages }}{{ if and (eq $i 0) (ne .Role "system") }}<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
{{ end }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
PARAMETERS = (  # greedy; older versions of ollama punish repetition unless told not to, and SQL repeats itself
    ("temperature", "0"),
    ("repeat_penalty", "1"),
    ("stop", '"<|im_end|>"'),
    ("stop", '"<|im_start|>"'),
)


def write(target: Path, gguf: str, system: str, jinja: str) -> Path:
    """Writes a Modelfile for a GGUF file beside it, with the system prompt that the model was trained with.

    `jinja`: the tokenizer's chat template; CourseError where it is another than the one that `TEMPLATE` was written after.
    """
    if hashlib.sha256(jinja.encode()).hexdigest() != JINJA_SHA256:
        raise CourseError("This model has another chat template than the course model: write its Go template by hand, and compare what render() makes of it.")
    if '"""' in system or Path(gguf).name != gguf:
        raise CourseError('Name a file that stands beside the Modelfile, and a system prompt without """.')
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{TEMPLATE}"""', f'SYSTEM """{system}"""', *(f"PARAMETER {name} {value}" for name, value in PARAMETERS)]
    write_whole(Path(target), "\n".join(lines) + "\n")
    return Path(target)


def read(path: Path) -> dict:
    """What a Modelfile says: {"from", "template", "system", "parameters": [(name, value), …]}. CourseError for what ollama would refuse."""
    said = {"from": "", "template": "", "system": "", "parameters": []}
    text = Path(path).read_text(encoding="utf-8")
    line = re.compile(r'\s*(?:(FROM|TEMPLATE|SYSTEM)\s+|PARAMETER\s+(\w+)\s+)(?:"""(.*?)"""|"(.*?)"|([^"\n]*))[ \t]*(?:\n|\Z)', re.S)
    place = 0
    while text[place:].strip():
        if not (found := line.match(text, place)):
            raise CourseError(f"{Path(path).name} can't be read from here on: {text[place:].strip()[:60]!r}.")
        place, value = found.end(), next((part for part in found.groups()[2:] if part is not None), "")
        if found[2]:
            said["parameters"].append((found[2], value))
        else:
            said[found[1].lower()] = value
    return said


def render(path: Path, conversation: list[dict]) -> str:
    """The prompt that ollama makes of a chat with this Modelfile.

    As ollama does, its SYSTEM goes before a chat that doesn't begin with a system message, and messages of one role that follow each
    other become one (transformers keeps them apart: the one difference between the two).
    """
    said = read(path)
    if said["system"] and (not conversation or conversation[0]["role"] != "system"):
        conversation = [{"role": "system", "content": said["system"]}, *conversation]
    messages = []
    for message in conversation:
        if messages and messages[-1]["Role"] == message["role"]:
            messages[-1]["Content"] += "\n\n" + message["content"]
        else:
            messages.append({"Role": message["role"], "Content": message["content"]})
    return evaluate(said["template"], {"Messages": messages, "System": said["system"]})


# ---------------------------------------------------------------- Go's templates, as far as chat templates go

ACTION = re.compile(r"\{\{(-\s)?\s*(.*?)\s*(\s-)?\}\}", re.S)
WORD = re.compile(r'\s*("[^"\\]*"|[()]|-?\d+|[$.]?[\w.]*[\w.])')


def evaluate(template: str, values: dict) -> str:
    """Go's text/template: range, if, else, end, fields, variables, and, or, not, eq, ne, len. CourseError for anything else."""
    pieces, place = [], 0
    for action in ACTION.finditer(template):
        text = template[place : action.start()]
        text = text.lstrip() if pieces and pieces[-1][2] else text
        pieces.append(("text", text.rstrip() if action[1] else text, False))
        pieces.append(("action", action[2], bool(action[3])))
        place = action.end()
    pieces.append(("text", template[place:].lstrip() if pieces and pieces[-1][2] else template[place:], False))
    nodes, rest = _block(pieces, 0)
    if rest < len(pieces):
        raise _unknown(pieces[rest][1])
    return _write(nodes, values, {})


def _unknown(said: str) -> CourseError:
    return CourseError(f"This template says {{{{ {said} }}}}, which isn't understood here.")


def _block(pieces, place: int):
    """The nodes up to an `else` or `end` that belongs to no inner block, and where that stands."""
    nodes = []
    while place < len(pieces):
        kind, said, _ = pieces[place]
        word, _, tail = said.partition(" ") if kind == "action" else ("", "", "")
        if kind == "action" and word in ("end", "else"):
            break
        if word in ("if", "range"):
            inner, place = _block(pieces, place + 1)
            other = []
            if place < len(pieces) and pieces[place][1] == "else":
                other, place = _block(pieces, place + 1)
            if place >= len(pieces) or pieces[place][1] != "end":
                raise _unknown(said)
            nodes.append((word, tail, inner, other))
        else:
            nodes.append((kind, said))
        place += 1
    return nodes, place


def _write(nodes, dot, variables: dict) -> str:
    out = []
    for kind, said, *blocks in nodes:
        if kind == "text":
            out.append(said)
        elif kind == "action":
            out.append(str(_value(said, dot, variables)))
        elif kind == "if":
            out.append(_write(blocks[0] if _value(said, dot, variables) else blocks[1], dot, variables))
        else:
            names = re.fullmatch(r"(?:(\$\w+)\s*(?:,\s*(\$\w+)\s*)?:=\s*)?(.*)", said)
            items = _value(names[3], dot, variables)
            index, item = (names[1], names[2]) if names[2] else (None, names[1])
            for number, each in enumerate(items):
                out.append(_write(blocks[0], each, variables | {index: number, item: each}))
            out.append("" if items else _write(blocks[1], dot, variables))
    return "".join(out)


def _value(said: str, dot, variables: dict):
    words, place = [], 0
    while said[place:].strip():
        if not (found := WORD.match(said, place)):
            raise _unknown(said)
        words.append(found[1])
        place = found.end()
    value, rest = _call(words, dot, variables, said)
    if rest:
        raise _unknown(said)
    return value


def _call(words: list[str], dot, variables: dict, said: str):
    """A function with its arguments, or one value; and the words that are left (up to a closing parenthesis)."""
    functions = {
        "and": lambda *args: next((a for a in args if not a), args[-1]),
        "or": lambda *args: next((a for a in args if a), args[-1]),
        "not": lambda a: not a,
        "eq": lambda a, *others: any(a == b for b in others),
        "ne": lambda a, b: a != b,
        "len": len,
    }
    function = functions.get(words[0]) if words else None
    words, found = words[1:] if function else words, []
    while words and words[0] != ")":
        if words[0] == "(":
            value, words = _call(words[1:], dot, variables, said)
            if not words:
                raise _unknown(said)
            words = words[1:]
        else:
            value, words = _single(words[0], dot, variables, said), words[1:]
        found.append(value)
    if not found or (not function and len(found) > 1):
        raise _unknown(said)
    return (function(*found) if function else found[0]), words


def _single(word: str, dot, variables: dict, said: str):
    if word[0] == '"':
        return word[1:-1]
    if re.fullmatch(r"-?\d+", word):
        return int(word)
    name, _, fields = word.partition(".")
    value = dot if not name else variables.get(name, _single)
    for field in filter(None, fields.split(".")):
        value = value[field] if isinstance(value, dict) and field in value else _single
    if value is _single:
        raise _unknown(said)
    return value
