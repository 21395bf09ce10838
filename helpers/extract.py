"""The query in an answer: one rule for every model, which reads SQL as SQL does (texts, quoted names, comments, blank lines inside)."""

import re

FENCE = re.compile(r"```(?:\w+)?\s*\n?(.*?)(```|\Z)", re.S)
START = re.compile(r"\bSELECT\b|\bWITH\s+(RECURSIVE\s+)?\w+\s*(\([^)]*\)\s*)?AS\b", re.I)
COMMENT = r"--[^\n]*|/\*.*?(?:\*/|\Z)"
COMMENTS = re.compile(rf"^[ \t]*{COMMENT}", re.S | re.M)  # before a query: a dash in the midst of a line may be prose
# A text in quotes is one piece, however many lines it has; so are a quoted name and a comment
PIECE = re.compile(rf"""'(?:[^']|'')*'|"(?:[^"\n]|"")*"|{COMMENT}|\n\s*\n|[^-'"();\n/]+|.""", re.S)
WORDS = "FROM WHERE GROUP HAVING ORDER LIMIT OFFSET UNION EXCEPT INTERSECT JOIN INNER LEFT CROSS NATURAL ON USING AND OR WINDOW AS".split()
GOES_ON = re.compile(rf"(?:{'|'.join([*WORDS, *map(str.lower, WORDS)])})\b|[(),]")  # what stands behind a blank line inside a query
SELECT, SPACES, LAST = re.compile(r"\bSELECT\b", re.I), re.compile(r"\s*"), re.compile(r"(\S)\s*\Z")

ENDS = ";`\n"  # without one of these in it, no further piece of an answer makes it `complete`


def _query(text: str) -> tuple[str, bool]:
    """The query with which a text begins, and whether nothing that is added to the text can change it.

    It goes up to a semicolon, or a blank line with which it may end, that doesn't stand in quotes or a comment.
    """
    depth, selected, quote = 0, False, False
    for piece in PIECE.finditer(text):
        said, start, end = piece[0], piece.start(), piece.end()
        if said == "'":  # of a text that isn't closed, as yet
            return text[:start], False
        if said == ";":
            return text[:start], not quote or "\n" in text[end:]
        if said.isspace() and said.count("\n") > 1:
            rest, last = SPACES.match(text, end).end(), LAST.search(text, max(0, start - 80), start)
            inside = depth or (last and last[1] == ",") or GOES_ON.match(text, rest)
            begins = not selected and (rest == len(text) or SELECT.match(text, rest))  # a WITH, and here is its SELECT
            if not (inside or begins):
                return text[:start], re.search(f"[{ENDS}]", text[rest:]) is not None
        depth = max(0, depth + {"(": 1, ")": -1}.get(said, 0))
        selected = selected or (not depth and SELECT.search(said) is not None)
        quote = said == '"' or (quote and "\n" not in said)  # of a name that isn't closed: it may be, on the same line
    return text, False


def _parts(answer: str) -> tuple[str, bool]:
    """The query in an answer as it stands, and whether nothing that follows can change it."""
    fence = FENCE.search(answer)
    text = fence[1] if fence else answer
    if not (start := START.search(COMMENTS.sub(lambda comment: " " * len(comment[0]), text))):
        return "", False
    query, ended = _query(text[start.start() :])
    # Without a fence one may still follow, and be taken instead; a WITH before the query may become its beginning
    return query, bool(fence) and (bool(fence[2]) or ended and not re.search(r"\bWITH\b", text[: start.start()], re.I))


def extract_sql(answer: str) -> str:
    """The one rule for every model: the first ```fenced``` block if there is one, else from the first SELECT (or WITH … AS) on;
    then up to the first semicolon or blank line, but for those in quotes, comments or the midst of the query. "" when there is no query."""
    return _parts(answer)[0].strip().rstrip("`").strip()


def complete(answer: str) -> bool:
    """Whether a model that has written this much need not go on: nothing that it adds can change the query in it (tested).

    So it is within a fence, once the query there has ended. Without a fence it never is, since a later one would be taken instead;
    base models do that: 2 of 128 answers of the prompted baselines ended in a lone closing fence, which leaves no query at all.
    """
    return _parts(answer)[1]


def reads_whole(query: str) -> bool:
    """Whether `extract_sql`, given a query as the answer, reads all of it, but for comments and semicolons around it."""
    if not (read := extract_sql(query)):
        return False
    before, _, after = query.partition(read)
    return not re.sub(rf"{COMMENT}|[;\s]", "", f"{before}\n{after}", flags=re.S)
