"""`python -m helpers.convert FILE`: another form of questions or preferences (JSON array, CSV, Alpaca, chats) as the course's JSON Lines.

The new file stands beside the old one, as NAME.course.jsonl; rows that have no text for a field are named and nothing is written.
"""

import argparse
import csv
import io
import json
import sys
from pathlib import Path

from helpers import jsonl
from helpers.command import status
from helpers.files import CourseError, write_whole
from helpers.jsonl import Problem

NAMES = {  # of a field of the course's: what others call it, the likeliest first
    "question": ("question", "instruction", "prompt", "input", "nl", "text"),
    "sql": ("sql", "query", "output", "response", "completion", "answer"),
    "prompt": ("prompt", "question", "instruction", "input"),
    "chosen": ("chosen", "preferred"),
    "rejected": ("rejected", "dispreferred"),
}
TURNS = {"user": "question", "human": "question", "assistant": "sql", "gpt": "sql", "model": "sql"}  # by role


def records(path: Path) -> list:
    """What the file holds, one a row, whatever form it is in."""
    try:
        if not path.is_file():
            raise CourseError(f"{path.name} is no file: check the path.")
        if path.stat().st_size > jsonl.MAX_BYTES:
            raise CourseError(f"{path.name} has more than {jsonl.MAX_BYTES / 1e6:,.0f} MB: give the path of a smaller file.")
        raw = path.read_bytes()
    except OSError as error:
        raise CourseError(f"Can't read {path.name}: {error.strerror}. Check the path.") from None
    if raw[:2] == b"PK":
        raise CourseError(f"{path.name} is a spreadsheet or another packed file: save the sheet as CSV (UTF-8) first.")
    try:
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        raise CourseError(f"{path.name} is not UTF-8 text: save it as UTF-8 first.") from None
    if not text.strip():
        raise CourseError(f"{path.name} is empty.")
    try:
        if text.lstrip()[:1] not in ("[", "{"):
            return table(text)
        try:
            whole = json.loads(text)
        except ValueError:  # one a line, then
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return whole if isinstance(whole, list) else [whole]
    except (ValueError, RecursionError, csv.Error) as error:
        raise CourseError(f"{path.name} is neither JSON, JSON Lines nor a table ({str(error)[:100]}): mend that first.") from None


def table(text: str) -> list[dict]:
    """The rows of a table with commas, semicolons or tabs. ValueError where a row has more cells than the first line has names."""
    first = text.lstrip().split("\n", 1)[0]
    found = list(csv.DictReader(io.StringIO(text.lstrip(), newline=""), delimiter=max(",;\t", key=first.count)))
    if wide := next((number for number, row in enumerate(found, 2) if None in row), None):
        raise ValueError(f"line {wide} has more cells than the first line has names: put a text that has the separator in it in double quotes")
    return found


def named(record):
    """A record with its names in lower case and without blanks around them; what has no names stays as it is."""
    return {name.strip().lower(): value for name, value in record.items()} if isinstance(record, dict) else record


def turned(record, fields: tuple[str, ...]) -> dict[str, str]:
    """One row in the course's form. Problem: what it lacks."""
    if not isinstance(record, dict):
        raise Problem("no fields with names; write one object for each row")
    for turns in (record.get("conversations"), record.get("messages")):
        if isinstance(turns, list) and "chosen" not in fields:
            record = record | _said(turns)
    row = {}
    for field in fields:
        value = next((record[name] for name in NAMES[field] if record.get(name)), None)
        if isinstance(value, list) and value and isinstance(value[-1], dict):
            value = value[-1].get("content")
        if not isinstance(value, str) or not value.strip():
            raise Problem(f"no text for {field!r} (looked for {', '.join(NAMES[field])}); its fields are {', '.join(map(ascii, list(record)[:8]))}")
        row[field] = value.strip()
    more = record.get("input")
    if isinstance(more, str) and more.strip() and record.get("instruction") and "question" in row and row["question"] != more.strip():
        row["question"] += f"\n{more.strip()}"
    return row


def _said(turns: list) -> dict[str, str]:
    """The last question of a chat and the answer to it."""
    said = {}
    for turn in turns:
        if isinstance(turn, dict) and (field := TURNS.get(turn.get("role") or turn.get("from"))):
            said[field] = turn.get("content") or turn.get("value")
    return said


def convert(path: Path) -> Path:
    """Writes NAME.course.jsonl beside the file; returns it. CourseError for what can't be turned, each row named."""
    found = [named(record) for record in records(path)]
    pairs = bool(found) and isinstance(found[0], dict) and {"chosen", "rejected"} <= found[0].keys()
    fields = ("prompt", "chosen", "rejected") if pairs else ("question", "sql")
    rows, problems = [], []
    for number, record in enumerate(found, 1):
        try:
            rows.append(turned(record, fields))
        except Problem as problem:
            problems.append(f"row {number}: {problem}")
    if problems or not rows:
        more = f"\n  … and {len(problems) - jsonl.SHOWN} more" if len(problems) > jsonl.SHOWN else ""
        raise CourseError(f"{path.name} was not converted:\n  " + "\n  ".join(problems[: jsonl.SHOWN] or ["there are no rows in it"]) + more)
    target = path.with_name(f"{path.stem}.course.jsonl")
    if target.exists():
        raise CourseError(f"{target.name} is there already: move it away, or delete it, to write it anew.")
    write_whole(target, "".join(json.dumps(row) + "\n" for row in rows))  # ASCII: half a character stays visible, and is named when it is read
    known = {name for field in fields for name in NAMES[field]} | {"conversations", "messages"}
    spare = sorted(set().union(*found) - known)
    left = f"; left out: {', '.join(map(ascii, spare[:8]))}{' …' if len(spare) > 8 else ''}" if spare else ""
    print(f"{target.name}: {len(rows):,} rows with {', '.join(fields)}{left}")
    return target


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m helpers.convert", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    return status(convert, parser.parse_args(arguments).file)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a pipe on Windows can't say every letter
    sys.exit(main())
