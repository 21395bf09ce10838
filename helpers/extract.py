"""The query in an answer: one rule for every model."""

import re

START = re.compile(r"\bSELECT\b|\bWITH\s+(RECURSIVE\s+)?\w+\s*(\([^)]*\)\s*)?AS\b", re.I)
QUERY = re.compile(r"(?:'(?:[^']|'')*'|\n(?!\s*\n)|[^;'\n])*")  # up to a semicolon or blank line that is not quoted

ENDS = ";`\n"  # without one of these in it, no further piece of an answer makes it `complete`


def _parts(answer: str) -> tuple[str, bool, bool]:
    """The query in an answer as it stands, whether something ends it, and whether a fence holds it."""
    fence = re.search(r"```(?:\w+)?\s*\n?(.*?)(```|\Z)", answer, re.S)
    text = fence[1] if fence else answer
    if not (start := START.search(text)):
        return "", False, bool(fence)
    text = text[start.start() :]
    query = QUERY.match(text)[0]
    ended = text[len(query) : len(query) + 1] in (";", "\n") if len(query) < len(text) else bool(fence and fence[2])
    return query, ended, bool(fence)


def extract_sql(answer: str) -> str:
    """The one rule for every model: the first ```fenced``` block if there is one, else from the first SELECT (or WITH … AS) on;
    then up to the first semicolon or blank line. "" when there is no query in the answer."""
    return _parts(answer)[0].strip().rstrip("`").strip()


def complete(answer: str) -> bool:
    """Whether a model that has written this much need not go on: what it adds can't change the query in it.

    Within a fence that is so for certain, once the query has ended. Without one, a fence might still follow and be taken
    instead; no answer of the course's models has done that after a query of its own that ended with a semicolon (tested).
    """
    query, ended, fenced = _parts(answer)
    return ended and (fenced or answer[answer.index(query) + len(query) :][:1] == ";")
