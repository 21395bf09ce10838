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
        if not path.is_file() or path.stat().st_size > jsonl.MAX_BYTES:
            raise CourseError(f"{path.name} is no file, or has more than {jsonl.MAX_BYTES / 1e6:,.0f} MB: give the path of a smaller file.")
        raw = path.read_bytes()
    except OSError as error:
        raise CourseError(f"Can't read {path.name}: {error.strerror}. Check the path.") from None
    try:
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        raise CourseError(f"{path.name} is not UTF-8 text: save it as UTF-8 first.") from None
    try:
        if text.lstrip()[:1] not in ("[", "{"):
            return list(csv.DictReader(io.StringIO(text, newline=""), dialect=csv.Sniffer().sniff(text[:10_000], ",;\t")))
        try:
            whole = json.loads(text)
        except ValueError:  # one a line, then
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return whole if isinstance(whole, list) else [whole]
    except (ValueError, RecursionError, csv.Error) as error:
        raise CourseError(f"{path.name} is neither JSON, JSON Lines nor a table ({str(error)[:100]}): mend that first.") from None


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
    found = records(path)
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
    write_whole(target, "".join(json.dumps(row) + "\n" for row in rows))  # ASCII: half a character stays visible, and is named when it is read
    print(f"{target.name}: {len(rows):,} rows with {', '.join(fields)}")
    return target


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m helpers.convert", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    return status(convert, parser.parse_args(arguments).file)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a pipe on Windows can't say every letter
    sys.exit(main())
