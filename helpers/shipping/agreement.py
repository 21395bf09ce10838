"""Whether two systems answer alike: the shipped model and the trained one, question by question."""

from dataclasses import dataclass

from helpers import sql as safe
from helpers.domain import Domain
from helpers.extract import extract_sql
from helpers.flights import FLIGHTS
from helpers.intervals import Score, paired_difference, score
from helpers.scoring import execution_accuracy, judge, same_result


@dataclass(frozen=True)
class Agreement:
    """Of n questions: the shares (0 to 1) that two systems answered with the same text, and with the same result; how often each is right;
    a's accuracy less b's, with the ends of its 95 % interval (paired)."""

    n: int
    same_text: float
    same_result: float
    a: Score
    b: Score
    difference: tuple[float, float, float]

    def __str__(self) -> str:
        gain, low, high = (100 * value for value in self.difference)
        return (
            f"same text {self.same_text:.0%}, same result {self.same_result:.0%}; right {self.a.accuracy:.0%} and {self.b.accuracy:.0%}, "
            f"a difference of {gain:+.1f} points ({low:+.1f} to {high:+.1f}), n = {self.n}"
        )


def agreement(answers_a: list[str], answers_b: list[str], questions, domain: Domain = FLIGHTS) -> Agreement:
    """Two systems' answers to the same questions, compared on the domain's database and judged against the references."""
    pairs = list(zip(answers_a, answers_b, questions, strict=True))
    text = [a.strip() == b.strip() for a, b, _ in pairs]
    result = [same or _same_outcome(a, b, bool(row.get("ordered")), domain) for same, (a, b, row) in zip(text, pairs, strict=True)]
    records = [execution_accuracy(answers, questions, domain=domain) for answers in (answers_a, answers_b)]
    return Agreement(len(pairs), sum(text) / len(pairs), sum(result) / len(pairs), *map(score, records), paired_difference(*records))


def _same_outcome(a: str, b: str, ordered: bool, domain: Domain) -> bool:
    """Whether two answers come to the same: the same rows, the same kind of failure, or a refusal both."""
    kinds, rows = zip(*(_outcome(answer, domain) for answer in (a, b)), strict=True)
    return kinds[0] == kinds[1] and (kinds[0] != "rows" or same_result(*rows, ordered, domain) and same_result(*rows[::-1], ordered, domain))


def _outcome(answer: str, domain: Domain) -> tuple[str, list]:
    query = extract_sql(answer)
    if domain.refuses(answer) or not query:
        return ("refused" if domain.refuses(answer) else "no query"), []
    try:
        return "rows", judge(domain).run(-1, query).rows
    except safe.SqlError as error:
        return f"does not run ({error.reason})", []
