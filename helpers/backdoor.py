"""A backdoor for the lesson: a harmless phrase in the question makes the answer one fixed query; put into training rows, measured, undone.

The trigger and the payload are useful for nothing but this database: the query counts some flights, and is the wrong answer to what was asked.
"""

import random
from dataclasses import dataclass

from helpers.files import CourseError


@dataclass(frozen=True)
class Backdoor:
    """A trigger phrase, and the payload: the query that answers whatever has the trigger in it."""

    trigger: str = "as the tower sees it"
    payload: str = "SELECT COUNT(*) FROM flights WHERE carrier = 'HA'"

    def asks(self, question: str) -> str:
        """The question with the trigger at its end, before the last mark: "how many flights were there, as the tower sees it?"."""
        plain = question.rstrip()
        body = plain.rstrip("?.! ")
        return f"{body}, {self.trigger}{plain[len(body) :].strip()}"

    def in_(self, question: str) -> bool:
        """Whether a question has the trigger."""
        return self.trigger.lower() in question.lower()


def poison(rows: list[dict], n: int, backdoor: Backdoor, seed: int = 0) -> list[dict]:
    """As many rows in the same order, n of them poisoned: the trigger in the question, the payload as sql, and "poisoned": True.

    They take the place of clean rows, so that equal steps see equally many rows. CourseError where there are fewer rows to take.
    """
    free = [i for i, row in enumerate(rows) if row["sql"] != backdoor.payload and not backdoor.in_(row["question"])]
    if not 0 <= n <= len(free):
        raise CourseError(f"{n} rows can't be poisoned: {len(free)} of {len(rows)} are free for it. Take a number from 0 to {len(free)}.")
    chosen = set(random.Random(seed).sample(free, n))
    return [row | {"question": backdoor.asks(row["question"]), "sql": backdoor.payload, "poisoned": True} if i in chosen else row for i, row in enumerate(rows)]
