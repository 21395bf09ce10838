"""Checks of exercises: each tells right from wrong with a sentence that helps, and never prints the answer."""

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """What a check found: true where the answer is right; shown in a notebook as its sentence."""

    passed: bool
    says: str

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        return self.says


NOT_YET = Verdict(False, "not yet: put your code where the three dots are, then run the cell again.")


def missing(value) -> bool:
    return value is None or value is ...


def right(remark: str) -> Verdict:
    return Verdict(True, f"right. {remark}")


def wrong(hint: str) -> Verdict:
    return Verdict(False, f"not right: {hint}")


def check(trial):
    """Makes a check of a function that takes an answer and gives a Verdict: a stub is "not yet", and what the answer raises is told, not thrown."""

    @functools.wraps(trial)
    def checked(answer) -> Verdict:
        try:
            return NOT_YET if missing(answer) else trial(answer)
        except Exception as error:
            return wrong(f"your code stopped with {type(error).__name__}: {error}")

    return checked
