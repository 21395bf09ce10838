"""The query in an answer: one rule for every model."""

import re


def extract_sql(answer: str) -> str:
    """The one rule for every model: the first ```fenced``` block if there is one, else from the first SELECT (or WITH … AS) on;
    then up to the first semicolon or blank line. "" when there is no query in the answer."""
    fence = re.search(r"```(?:\w+)?\s*\n?(.*?)(?:```|\Z)", answer, re.S)
    text = fence.group(1) if fence else answer
    start = re.search(r"\bSELECT\b|\bWITH\s+(RECURSIVE\s+)?\w+\s*(\([^)]*\)\s*)?AS\b", text, re.I)
    if not start:
        return ""
    query = re.match(r"(?:'(?:[^']|'')*'|\n(?!\s*\n)|[^;'\n])*", text[start.start() :]).group(0)
    return query.strip().rstrip("`").strip()
