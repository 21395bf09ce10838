"""JSON Lines that anyone may have written: read whole or refused whole, each problem with its line, field and remedy, in bounded memory."""

import json
import re
import stat
import time
from pathlib import Path

from helpers.files import CourseError
from helpers.runtime import progress_bar

MAX_LINE_BYTES, MAX_BYTES = 1_000_000, 200_000_000  # of a line, of a file
SHOWN = 10  # problems that are listed
CHECK_SECONDS = 60  # that all checks of a file may take together
OPTIONAL = {"id": str, "intent": str, "phrasing": str, "style": str, "half": str, "ordered": bool, "held_out": bool}  # fields that the course knows
CONVERT = "python -m helpers.convert {0} makes the course's form of it"
FOREIGN = {  # other formats, told by their fields
    "Alpaca's": {"instruction", "output"},
    "a chat's (ShareGPT)": {"conversations"},
    "a chat's (messages)": {"messages"},
    "a prompt and completion's": {"prompt", "completion"},
}


TEMPLATE = re.compile(r"<\|\w{1,40}\|>|\[/?INST\]|<(?:start|end)_of_turn>|</?s>")  # marks of the common families' chat templates


class Problem(Exception):
    """What is wrong with one line, and the remedy."""


def same_question(row: dict) -> tuple[str, dict]:
    """What two rows with a question may not share, and what is said of it."""
    key = row["question"].strip().lower()
    return key, {key: "field 'question': the same question as line {}; remove one of them"}


def read(
    path: str | Path, required: tuple[str, ...], check=None, slow_check=None, seconds: float = CHECK_SECONDS, same=None, also: tuple[str, ...] = (), templates: bool = False
) -> list[dict]:
    """The rows of a JSON Lines file: the `required` fields, non-empty texts, and those of `OPTIONAL` that a row has (others None).

    Raises one CourseError for all that is wrong, with file, line, field and remedy. `same` gives a row's key, and the keys of earlier
    rows that it may not stand beside, each with what is said of it (None: no question comes twice, spaces around it and case aside). CRLF line ends and a byte-order mark, which Windows editors write, are read as if they
    weren't there. Fields that the course doesn't know are left out, and that is said. `check` is called with each row and
    raises a CourseError; so is `slow_check`, in a file that is otherwise good: all its calls together may take `seconds`, with a bar.
    `also` names further texts that a row may have; with `templates` a text may hold marks of chat templates.
    """
    path = Path(path)
    same = same or (same_question if "question" in required else lambda row: (None, {}))
    optional = OPTIONAL | dict.fromkeys(also, str)
    rows, problems, ignored = _parse(path, required, check, same, optional, templates)
    if slow_check and not problems:
        _check(rows, slow_check, seconds, problems)
    if problems:
        more = f"\n  … and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        said = "\n  ".join(f"line {number}: {problem}" for number, problem in problems[:SHOWN])
        raise CourseError(f"{path.name} was not loaded, nothing of it:\n  {said}{more}")
    if ignored:
        print(f"{path.name}: fields that the course doesn't use are left out: {', '.join(map(ascii, sorted(ignored)[:SHOWN]))}")
    names = [*required, *(name for name in optional if name not in required and any(name in row for _, row in rows))]
    order = [name for name in rows[0][1] if name in names]
    return [{name: row.get(name) for name in [*order, *(n for n in names if n not in order)]} for _, row in rows]


def _parse(path: Path, required, check, same, optional: dict, templates: bool) -> tuple[list[tuple[int, dict]], list[tuple[int, str]], set[str]]:
    """Rows and problems, each with its line's number, and the names of fields that are left out."""
    rows, problems, seen, ignored = [], [], {}, set()
    try:
        size, mode = path.stat().st_size, path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise CourseError(f"Can't read {path.name}: it is {'a folder' if stat.S_ISDIR(mode) else 'no plain file'}. Give the path of a file.")
        if size > MAX_BYTES:
            raise CourseError(f"{path.name} was not loaded: it has {size / 1e6:,.0f} MB (limit {MAX_BYTES / 1e6:,.0f}). Take a part of its rows.")
        with path.open("rb") as file:
            if shape := _other_shape(file.read(4096), required):
                raise CourseError(f"{path.name} was not loaded: {shape.format(path.name)}")
            file.seek(0)
            for number, raw in enumerate(lines(file), 1):
                if not raw.strip():
                    continue
                try:
                    row = _row(raw, required, path.name, optional, templates)
                    ignored |= row.keys() - optional.keys() - set(required)
                    key, others = same(row)
                    for other, said in others.items():
                        if other in seen:
                            raise Problem(said.format(seen[other]))
                    seen[key] = number
                    row = {name: value for name, value in row.items() if name in optional or name in required}
                    if check:
                        check(row)
                    rows.append((number, row))
                except (Problem, CourseError) as problem:
                    problems.append((number, str(problem)))
    except OSError as error:
        raise CourseError(f"Can't read {path.name}: {error.strerror}. Check the path; the file needs one JSON object a line.") from None
    if not problems and not rows:
        problems.append((1, "no rows; write one JSON object a line, with the fields " + ", ".join(required)))
    return rows, problems, ignored


def lines(file):
    """The lines of a binary file; of one that is too long no more than its beginning and its length (`TooLong`)."""
    first = True
    while raw := file.readline(MAX_LINE_BYTES + 1):
        if len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
            head, length = raw[:100], len(raw)
            while (more := file.readline(MAX_LINE_BYTES)) and not more.endswith(b"\n"):
                length += len(more)
            raw = TooLong(head)
            raw.length = length + len(more)
        yield raw.removeprefix(b"\xef\xbb\xbf") if first and not isinstance(raw, TooLong) else raw
        first = False


class TooLong(bytes):
    """The beginning of a line that isn't kept whole. length: of all of it, in bytes."""

    length: int


def _other_shape(head: bytes, required) -> str:
    """What the file is, by its first bytes, where it isn't JSON Lines; "" where it may be."""
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in head:
        if head[:2] in (b"\xff\xfe", b"\xfe\xff") or head[1::2].count(0) > len(head) / 4 or head[::2].count(0) > len(head) / 4:
            return f"it is UTF-16 text; save it as UTF-8, or {CONVERT}."
        return "it is no text file; it needs one JSON object a line, as UTF-8 text."
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    line = text.split(b"\n")[0].strip()
    if text.startswith(b"[") and (line in (b"[", b"[]") or re.match(rb"\[\s*\{", text)):
        return f"it is a JSON array, not JSON Lines; {CONVERT}."
    if line == b"{":
        return f"it is one JSON object over several lines, not one a line; {CONVERT}."
    names = [name.strip(b" \"'").lower() for name in re.split(rb"[,;\t]", line)]
    if not text.startswith((b"{", b"[")) and len(names) > 1 and any(name.encode() in names for name in (*required, "instruction", "prompt", "query", "answer")):
        return f"it is a table (CSV), not JSON Lines; {CONVERT}."
    return ""


def _row(raw: bytes, required, name: str, optional: dict, templates: bool) -> dict:
    """The object on one line, its fields looked at."""
    if isinstance(raw, TooLong):
        raise Problem(f"{raw.length:,} bytes long (limit {MAX_LINE_BYTES:,}); is a line end missing?")
    try:
        row = json.loads(raw.decode("utf-8"), object_pairs_hook=_object, parse_int=_whole, parse_constant=_constant)
    except UnicodeDecodeError as error:
        raise Problem(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    except RecursionError:
        raise Problem("nested too deeply; a row is one flat object") from None
    except ValueError as error:
        text = raw.strip()
        if text.endswith((b"},", b"];")) or re.search(rb",\s*[}\]]$", text):
            raise Problem("a comma too many at the end; remove it") from None
        if text.startswith(b"{'"):
            raise Problem("names and texts in 'single quotes' are Python, not JSON; write them in double quotes") from None
        raise Problem(f"not JSON ({error}); check quotes, commas and braces") from None
    if not isinstance(row, dict):
        raise Problem("not an object; write " + _example(required))
    for field in required:
        if field not in row:
            foreign = next((whose for whose, fields in FOREIGN.items() if fields <= row.keys() and not fields <= set(required)), None)
            if foreign:
                raise Problem(f"these are {foreign} fields, not {' and '.join(required)}; {CONVERT.format(name)}")
            near = next((n for n in row if n.strip().lower() == field), None)
            raise Problem(f"field {field!r} is missing; " + (f"{ascii(near)} is written otherwise: rename it" if near else "add it"))
        _check_text(field, row[field])
        if not row[field].strip():
            raise Problem(f"field {field!r} is empty; fill it in or remove the line")
        if not templates and (mark := TEMPLATE.search(row[field])):
            raise Problem(f"field {field!r} holds {mark[0]!r}, a mark of a chat template; write the text alone: the template is put around it later")
    _check_repeats(row, required[0], required[1:])
    for field, kind in optional.items():
        if field in required or row.get(field) is None:
            continue
        if field == "id" and isinstance(row[field], int) and not isinstance(row[field], bool):
            row[field] = str(row[field])
        if kind is str:
            _check_text(field, row[field])
        elif not isinstance(row[field], kind):
            raise Problem(f"field {field!r} is {_kind(row[field])}; write true or false, without quotes, or leave the field out")
    return row


def _check_repeats(row: dict, first: str, answers: tuple[str, ...]) -> None:
    """Problem where every answer begins with what was asked: then the model would learn to repeat it."""
    if all(row[answer].strip().startswith(row[first].strip()) for answer in answers):
        what = f"field {answers[0]!r} begins" if len(answers) == 1 else f"fields {' and '.join(map(repr, answers))} begin"
        raise Problem(f"{what} with the text of {first!r}; leave that out of the answer")


def _check_text(field: str, value) -> None:
    if value is None:
        raise Problem(f"field {field!r} is null; write its text in double quotes, or remove the line")
    if isinstance(value, list) and value and isinstance(value[-1], dict) and "content" in value[-1]:
        raise Problem(f"field {field!r} is a list of messages; write the last one's content, as text")
    if isinstance(value, (list, dict)):
        raise Problem(f"field {field!r} is {_kind(value)}, not text; write one text in double quotes")
    if not isinstance(value, str):
        raise Problem(f"field {field!r} is {_kind(value)}, not text; put it in double quotes")
    if half := re.search("[\ud800-\udfff]", value):
        raise Problem(f"field {field!r} holds half a character (\\u{ord(half[0]):04x}, a lone surrogate); write the whole one, or remove it")


def _kind(value) -> str:
    return {"bool": "true or false", "int": "a number", "float": "a number", "list": "a list", "dict": "an object", "str": "a text"}[type(value).__name__]


def _example(required) -> str:
    return "{" + ", ".join(f'"{field}": "…"' for field in required) + "}"


def _object(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise Problem(f"field {ascii(next(n for n in names if names.count(n) > 1))} stands twice in one object; keep one")
    return found


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) < 19 else float(digits[:400])  # no field of the course's is one: it is left out, or refused as a number


def _constant(word: str):
    raise ValueError(f"{word} is no JSON number")


def _check(rows, check, seconds: float, problems: list) -> None:
    """Calls `check` with each row, within a total of `seconds`; what it says is added to `problems`."""
    start = time.monotonic()
    with progress_bar(len(rows), "checking") as bar:
        for place, (number, row) in enumerate(rows):
            try:
                check(row)
            except CourseError as problem:
                problems.append((number, str(problem)))
            bar.update(1)
            if time.monotonic() - start > seconds and place + 1 < len(rows):
                problems.append((number, f"by here the checks took {seconds:g} s, with {len(rows) - place - 1:,} rows to go; make the queries do less, or check fewer rows"))
                return
