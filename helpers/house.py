"""The house style as rules: what a query and its result must look like to be read by a person.

A rule is a function of its own, of a query's SELECT (as sqlglot parses it) and its result: True kept, False broken, None
where it doesn't apply. What a query puts out is followed into its subqueries and CTEs by name; conditions and what
COUNT counts are not put out.
"""

import math
import re

PAIRED = ("alias", "unit", "decimal", "order")  # the rules that preference pairs are made by
HELD_OUT = ("names", "limit")  # never used to make a pair, so that a gain on them isn't circular
MEASURES = {"dep_delay": "_min", "arr_delay": "_min", "air_time": "_min", "distance": "_miles"}
NAMES = {"carrier": "airline", "dest": "dest_city"}  # of a code: its name


def _select(query: str):
    """The query's sqlglot Select, a UNION's first one with the ORDER BY and LIMIT of the whole; None if it isn't one SELECT."""
    import logging

    import sqlglot

    logging.getLogger("sqlglot").setLevel(logging.CRITICAL)  # it would warn of what it only half knows
    try:
        trees = [t for t in sqlglot.parse(query, dialect="sqlite") if t is not None and not isinstance(t, sqlglot.exp.Semicolon)]
    except Exception:  # ParseError, TokenError, RecursionError, and what else its parser does with nonsense
        return None
    whole = tree = trees[0] if len(trees) == 1 else None
    while isinstance(tree, sqlglot.exp.SetOperation):
        tree = tree.this
    if not isinstance(tree, sqlglot.exp.Select) or not tree.expressions:  # it reads a lone "SELECT" as well
        return None
    for part in {"with", "with_", "order", "limit"} & whole.args.keys():  # "with" is "with_" in newer versions
        tree.set(part, whole.args[part])
    return tree


def _outputs(select, result) -> list[tuple]:
    """(name in lower case or "", expression) of each output column; a star stands for the result's columns."""
    from sqlglot import exp

    more, outputs = len(result.columns) - len(select.expressions), []
    for output in select.expressions:
        inside = output.unalias().unnest()
        if output.is_star:
            outputs += [(column.lower(), exp.column(column, quoted=True)) for column in result.columns[len(outputs) :][: more + 1]]
        else:
            outputs.append(((output.alias or (inside.name if inside.key == "column" else "")).lower(), inside))
    return outputs


def _shown(select, output) -> list:
    """The parts of an output whose value can be seen in it: no conditions, nothing counted, no PARTITION BY or WHERE."""
    from sqlglot import exp

    inner = {a.alias.lower(): a.this for s in select.find_all(exp.Select) if s is not select for a in s.expressions if isinstance(a, exp.Alias)}
    stack, shown = [output], []
    while stack:
        node = stack.pop()
        if isinstance(node, (exp.Count, exp.Predicate, exp.Not, exp.Connector)):
            continue
        shown.append(node)
        if isinstance(node, exp.Column):
            stack += [inner.pop(node.name.lower())] if node.name.lower() in inner else []  # each once, so that it ends
        elif isinstance(node, (exp.Window, exp.Filter, exp.Order)):
            stack.append(node.this)
        elif isinstance(node, exp.Select):
            stack += node.expressions
        else:
            looked_at = node.this if isinstance(node, (exp.Case, exp.If)) else None
            stack += [child for child in node.iter_expressions() if child is not looked_at]
    return shown


def _columns(select, output) -> set[str]:
    return {node.name.lower() for node in _shown(select, output) if node.key == "column"}


def _unit(select, output) -> str | None:
    """The ending that an output's name needs; None if it measures nothing, or in no unit of the house (hours, miles an hour)."""
    shown = _shown(select, output)
    units = {MEASURES[column] for column in _columns(select, output) & MEASURES.keys()}
    if not units:
        hundred = any(node.key == "literal" and re.fullmatch(r"100(\.0*)?", node.name) for node in shown)
        return "_pct" if hundred and any(node.key in ("avg", "div") for node in shown) else None
    for node in shown:
        if node.key in ("mul", "div"):
            sides = [node.this.unnest(), node.expression.unnest()]
            numbers = [side.name for side in sides if side.key == "literal"]
            if set(numbers) - {"1", "1.0", "1."} or (not numbers and all(_columns(select, side) & MEASURES.keys() for side in sides)):
                return None
    return units.pop() if len(units) == 1 else None


# ---------------------------------------------------------------- the rules


def alias(select, result) -> bool | None:
    """Every computed output column has a readable alias: lower-case snake_case of 3 or more letters."""
    computed = [output.alias for output in select.expressions if output.unalias().unnest().key not in ("column", "star")]
    return all(re.fullmatch(r"(?=([^a-z]*[a-z]){3})[a-z][a-z0-9]*(_[a-z0-9]+)*", name) for name in computed) if computed else None


def unit(select, result) -> bool | None:
    """Every output that measures something ends in its unit: `_min`, `_miles` or `_pct`."""
    endings = [(name, ending) for name, output in _outputs(select, result) if (ending := _unit(select, output))]
    return all(name.endswith(ending) for name, ending in endings) if endings else None


def decimal(select, result) -> bool | None:
    """Every fractional number in the result has one decimal at most."""
    floats = [value for row in result.rows for value in row if isinstance(value, float)]
    return all(math.isclose(value, round(value, 1), rel_tol=0, abs_tol=1e-9) for value in floats) if floats else None


def order(select, result) -> bool | None:
    """A list (more than one row) has an ORDER BY."""
    return bool(select.args.get("order")) if len(result.rows) + result.truncated > 1 else None


def names(select, result) -> bool | None:
    """Beside the code of an airline or a destination stands its name."""
    shown = set().union(*(_columns(select, output) for _, output in _outputs(select, result)))
    return all(name in shown for code, name in NAMES.items() if code in shown) if shown & {*NAMES, *NAMES.values()} else None


def limit(select, result) -> bool | None:
    """A list (more than one row) has a LIMIT."""
    return bool(select.args.get("limit")) if len(result.rows) + result.truncated > 1 else None


RULES = {rule.__name__: rule for rule in (alias, unit, decimal, order, names, limit)}


def kept(query: str, result) -> dict[str, bool]:
    """The rules that apply to a query and its result (a `sql.Result`), each kept or not.

    A query that can't be parsed or isn't one SELECT (with or without WITH or UNION), or that has no result (None), keeps
    nothing: every rule is False. Never raises.
    """
    select = None if result is None else _select(query)
    marks = {name: False if select is None else rule(select, result) for name, rule in RULES.items()}
    return {name: mark for name, mark in marks.items() if mark is not None}


def share(kept: dict[str, bool], rules=tuple(RULES)) -> float:
    """The share of the `rules` that are kept, of those that apply; 1 where none does."""
    applying = [bool(kept[rule]) for rule in rules if rule in kept]
    return sum(applying) / len(applying) if applying else 1.0


def style(query: str, result, rules=tuple(RULES)) -> float:
    """The share (0 to 1) of the applicable `rules` that are kept; 1.0 if none applies."""
    return share(kept(query, result), rules)
