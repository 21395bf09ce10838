"""Battles between systems that answered the same questions, and what a rating needs of them: who won how often against whom."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np

from helpers import jsonl
from helpers.files import CourseError

ELO = 400 / np.log(10)  # points of a rating per unit of log-strength: 400 of them make odds of 10 to 1 (Elo 1978)


def battles(records: dict[str, list[dict]], style: Callable[[dict], float] | None = None) -> list[dict]:
    """Every pair of systems on every question: {"question", "a", "b", "winner"}, the winner a name or "tie".

    `records`: {system: its per-question records, of the same questions in the same order}. A right answer beats a wrong one; of two
    right ones the one with more `style` wins, a number of a record (None: a tie); two wrong ones are a tie.
    """
    asked = {name: [r["id"] for r in rows] for name, rows in records.items()}
    if any(ids != next(iter(asked.values())) for ids in asked.values()):
        raise CourseError("A battle needs both sides' answers to one question: give records of the same questions in the same order.")
    found = []
    for rows in zip(*records.values(), strict=True):
        for (a, mine), (b, theirs) in combinations(zip(records, rows, strict=True), 2):
            strength = [(r["correct"], style(r) if style and r["correct"] else 0.0) for r in (mine, theirs)]
            winner = "tie" if strength[0] == strength[1] else a if strength[0] > strength[1] else b
            found.append({"question": mine["id"], "a": a, "b": b, "winner": winner})
    return found


def load_battles(path: str | Path) -> list[dict]:
    """Battles from your own JSON Lines file: question, a, b, and winner, which is the name of one of them or "tie".

    Read whole or not at all: each bad line is named with its remedy (CourseError).
    """

    def check(row):
        if row["a"] == row["b"]:
            raise CourseError("fields 'a' and 'b' are the same system: nobody battles against themselves; correct one of them")
        if row["winner"] not in (row["a"], row["b"], "tie"):
            raise CourseError(f"field 'winner' is {row['winner']!r}; write {row['a']!r}, {row['b']!r} or 'tie'")

    def same(row):
        key = row["question"], *sorted((row["a"], row["b"]))
        return key, {key: "the same battle as line {}; remove one of them"}

    return jsonl.read(path, ("question", "a", "b", "winner"), check, same=same)


def wins(battles: list[dict], systems: list[str] | None = None, ties: float = 0.5, check: bool = True) -> tuple[list[str], np.ndarray]:
    """The systems' names, and W (n, n): how often row i beat column j, a tie counting `ties` for both sides.

    `systems`: those that must be there (None: those that battled, in the order of their first battle). CourseError where no rating
    can follow: a system that never battled, ties only, or one that nobody, or everybody, ever beat (Ford 1957: the most likely
    strength would be infinite). Without `check` they are only counted.
    """
    there = list(dict.fromkeys(name for battle in battles for name in (battle["a"], battle["b"])))
    systems = systems or there
    if check:
        _check_battles(battles, systems, there)
    place, found = {name: i for i, name in enumerate(systems)}, np.zeros((len(systems), len(systems)))
    for battle in battles:
        a, b = place[battle["a"]], place[battle["b"]]
        if battle["winner"] == "tie":
            found[a, b] += ties
            found[b, a] += ties
        else:
            winner, loser = (a, b) if battle["winner"] == battle["a"] else (b, a)
            found[winner, loser] += 1
    if check:
        _check_connected(systems, found)
    return systems, found


def _check_battles(battles: list[dict], systems: list[str], there: list[str]) -> None:
    if idle := [name for name in systems if name not in there]:
        raise CourseError(f"{idle[0]} battles nobody, so nothing says how strong it is: add battles of it, or leave it out.")
    if strange := [name for name in there if name not in systems]:
        raise CourseError(f"{strange[0]} battles, but it isn't among the systems to be rated: add it, or leave its battles out.")
    if not battles or all(battle["winner"] == "tie" for battle in battles):
        raise CourseError("No battle was won: ties alone put nobody before anybody. Ask more, or harder, questions.")


def _check_connected(systems: list[str], found: np.ndarray) -> None:
    from scipy.sparse.csgraph import connected_components

    groups, labels = connected_components(found > 0, connection="strong")
    if groups > 1:
        alone = [systems[i] for i in range(len(systems)) if labels[i] == labels[np.bincount(labels)[labels].argmin()]]
        raise CourseError(
            f"Between {', '.join(alone)} and the rest every battle ended the same way, or there was none: the most likely difference is infinite. "
            "Add battles, or rate the two groups apart."
        )
