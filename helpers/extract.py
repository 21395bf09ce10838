"""The query in an answer: one rule for every model."""

import re

START = re.compile(r"\bSELECT\b|\bWITH\s+(RECURSIVE\s+)?\w+\s*(\([^)]*\)\s*)?AS\b", re.I)
QUERY = re.compile(r"(?:'(?:[^']|'')*'|\n(?!\s*\n)|[^;'\n])*")  # up to a semicolon or blank line that is not quoted

ENDS = ";`\n"  # without one of these in it, no further piece of an answer makes it `complete`


def _parts(answer: str) -> tuple[str, bool]:
    """The query in an answer as it stands, and whether nothing that follows can change it."""
    fence = re.search(r"```(?:\w+)?\s*\n?(.*?)(```|\Z)", answer, re.S)
    text = fence[1] if fence else answer
    if not (start := START.search(text)):
        return "", False
    before, text = text[: start.start()], text[start.start() :]
    query = QUERY.match(text)[0]
    ended = text[len(query) : len(query) + 1] in (";", "\n") if len(query) < len(text) else bool(fence and fence[2])
    # Without a fence one may still follow, and be taken instead; a WITH before the query may become its beginning
    return query, ended and bool(fence) and not re.search(r"\bWITH\b", before, re.I)


def extract_sql(answer: str) -> str:
    """The one rule for every model: the first ```fenced``` block if there is one, else from the first SELECT (or WITH … AS) on;
    then up to the first semicolon or blank line. "" when there is no query in the answer."""
    return _parts(answer)[0].strip().rstrip("`").strip()


def complete(answer: str) -> bool:
    """Whether a model that has written this much need not go on: nothing that it adds can change the query in it (tested).

    So it is within a fence, once the query there has ended. Without a fence it never is, since a later one would be taken instead;
    base models do that: 2 of 128 answers of the prompted baselines ended in a lone closing fence, which leaves no query at all.
    """
    return _parts(answer)[1]
