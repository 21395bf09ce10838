"""Values that a query names and no row has: each in a sentence, with the nearest that there are. A count of 0 says nothing of them."""

import difflib
import functools
import os
import re

from helpers import sql
from helpers.worker import Worker

COMPARED = 10  # values that are looked for: each is a query
MOST = 5000  # distinct values of a column that are compared; a column with more is one of numbers or free text
LABELS = {"dest_city": "destination city", "dest": "destination", "origin": "New York airport", "carrier": "carrier code", "tailnum": "tail number", "flight": "flight number"}
ALIKE = 0.5  # the least likeness, 0 to 1, of a value that is offered: "Jet Green" and "JetBlue A…" have 0.6


def conditions(query: str) -> tuple[list[tuple[str, str, object]], list[str]]:
    """(column, "=" or "LIKE", value) of each comparison of a column with a constant in a query, a negated one too; and the tables it
    names. Neither of a query that can't be read."""
    import sqlglot
    from sqlglot import exp

    try:
        tree = sqlglot.parse_one(query, dialect="sqlite")
    except (sqlglot.errors.SqlglotError, RecursionError):
        return [], []

    def constant(node):
        if isinstance(node, exp.Literal) and (node.is_string or re.fullmatch(r"[0-9]{1,15}", node.this)):
            return node.this if node.is_string else int(node.this)
        return None

    found = []
    for node in tree.find_all(exp.EQ, exp.NEQ, exp.Like, exp.ILike, exp.In, bfs=False):
        column, values = node.this, node.expressions if isinstance(node, exp.In) else [node.expression]
        if isinstance(values[0] if values else None, exp.Column) and isinstance(column, exp.Literal):  # 'JFK' = origin
            column, values = values[0], [column]
        if isinstance(column, exp.Column):
            kind = "LIKE" if isinstance(node, exp.Like | exp.ILike) else "="
            found += [(column.name, kind, value) for value in map(constant, values) if value is not None]
    return list(dict.fromkeys(found)), [table.name for table in tree.find_all(exp.Table)]


def named(query: str, worker: Worker) -> list[str]:
    """A sentence for each value that `query` compares a column with and that no row of the worker's database has.

    "no airline is called 'Jet Green'; nearest: JetBlue Airways". A column is looked for in the tables that the query names; one that
    can't be read says nothing.
    """
    told = []

    @functools.cache
    def columns(table: str) -> set[str]:
        return {name.lower() for name in worker.run(f'SELECT * FROM "{table}" LIMIT 1').columns}

    compared, tables = conditions(query)
    for column, kind, value in compared[:COMPARED]:
        try:
            table = next(table for table in tables if column.lower() in columns(table))
            literal = value if not isinstance(value, str) else "'" + value.replace("'", "''") + "'"
            if worker.run(f'SELECT 1 FROM "{table}" WHERE "{column}" {kind} {literal} LIMIT 1').rows:
                continue
            there = [row[0] for row in worker.run(f'SELECT DISTINCT "{column}" FROM "{table}" WHERE "{column}" IS NOT NULL LIMIT {MOST}').rows]
        except (sql.SqlError, StopIteration):
            continue
        told.append(_sentence(column, str(value).strip("%")[:60], there))
    return told


def _sentence(column: str, value: str, there: list) -> str:
    label = LABELS.get(column.lower(), column)
    if there and all(isinstance(one, int | float) for one in there):
        low, high = min(there), max(there)
        return f"no {label} is {value}" + (f"; there are {low:,} to {high:,}" if label == column else "")
    near = nearest(value, [str(one) for one in there]) if column.lower() != "tailnum" else []  # one number is as good as another
    return f"no {label} is called {value!r}" + (f"; nearest: {', '.join(near)}" if near else "")


def nearest(value: str, there: list[str], count: int = 3) -> list[str]:
    """The values most like it, the best first, case aside: by their letters, of the whole or of as much as `value` is long, the more
    with an equal beginning (Winkler 1990)."""

    def like(one: str) -> float:
        a, b = value.lower(), one.lower()
        ratio = max(difflib.SequenceMatcher(None, a, b).ratio(), difflib.SequenceMatcher(None, a, b[: len(a)]).ratio())
        return ratio + 0.1 * len(os.path.commonprefix([a[:4], b[:4]])) * (1 - ratio)

    ranked = sorted(((like(one), one) for one in there), key=lambda pair: (-pair[0], pair[1]))[:count]
    return [one for likeness, one in ranked if likeness >= max(ALIKE, ranked[0][0] - 0.15)]
