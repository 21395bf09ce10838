"""Exercises of notebook 07: what their checks try, and the mistakes that they know."""

from course.exercises.comparing import compare
from helpers.checks import NOT_YET, Verdict, check, missing, right, wrong

KNOWN = "{% for m in messages %}\n{{ m['content'] }}\n{% endfor %}"


@check
def template_changed(answer) -> Verdict:
    """07.1: a function (template, sha256 of the known one in hexadecimal) -> whether it is another one, line ends and spaces around it aside."""
    import hashlib

    known = hashlib.sha256(KNOWN.encode()).hexdigest()
    given = answer(KNOWN, known)
    if missing(given):
        return NOT_YET
    if not isinstance(given, bool):
        return wrong("give True where the template is another one, else False.")
    trapped = KNOWN.replace("{{ m", "{{ 'x' if 'tower' in m['content'] else m")
    if given and answer(trapped, known) is False:
        return wrong("it is the other way round: True is for a template that changed.")
    if given:
        return wrong("the known template itself counts as changed: hash the text's bytes in UTF-8, and compare hexadecimal with hexadecimal.")
    if not answer(trapped, known):
        return wrong("a template with a condition put into it passed.")
    if not answer(KNOWN.replace("content", "Content"), known):
        return wrong("a template that differs in one capital letter passed: hash it as it is.")
    if not answer(KNOWN.replace("{{ m", "{{m"), known):
        return wrong("spaces inside a template can change what it does: only those at its two ends don't count.")
    if answer(KNOWN.replace("\n", "\r\n"), known):
        return wrong("the same template with Windows' line ends counts as changed: bring line ends to one form first.")
    if answer(f"\n{KNOWN}\n", known):
        return wrong("an empty line around the known template counts as a change: take off what stands at its ends first.")
    return right("No weight was looked at, and none had to be: the program between question and model is a text like any other.")


def _shingles(text: str, n: int = 2) -> set:
    words = text.lower().split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


@check
def similarity(answer) -> Verdict:
    """07.2: a function (a, b: texts) -> Jaccard similarity of their word pairs (shingles of two words), capitals aside; 0 where neither has one."""
    pairs = [
        ("How many flights left JFK in July", "how many flights left JFK in May"),
        ("the plane the plane the plane flew", "the plane flew"),
        ("how late was it", "it was how late"),
        ("delays", "delays"),
    ]
    if missing(given := answer(*pairs[0])):
        return NOT_YET
    given = [given]
    for a, b in pairs[1:]:
        try:
            given.append(answer(a, b))
        except ZeroDivisionError:
            return wrong("a text of one word has no pair of words: where neither has one, give 0.")

    def all_pairs(measure, shingles=_shingles):
        return [float(measure(shingles(a), shingles(b))) for a, b in pairs]

    def share(x, y):
        return len(x & y) / len(x | y) if x | y else 0

    mistakes = {
        "single words are compared, so their order is lost: take each word with the one after it.": all_pairs(share, lambda t: _shingles(t, 1)),
        "three words at a time: pairs were asked for.": all_pairs(share, lambda t: _shingles(t, 3)),
        "parts of words are compared: split each text into words.": all_pairs(share, lambda t: {t.lower()[i : i + 2] for i in range(len(t) - 1)}),
        "capitals make words differ: lower both texts first.": all_pairs(share, lambda t: set(zip(t.split(), t.split()[1:], strict=False))),
        "what both have is divided by all pairs of both, counted twice where shared: divide by those of the union.": all_pairs(lambda x, y: len(x & y) / max(1, len(x) + len(y))),
        "that is Dice's coefficient: Jaccard divides by the union.": all_pairs(lambda x, y: 2 * len(x & y) / max(1, len(x) + len(y))),
        "what both have is divided by the first text's pairs alone: swap the texts, and it changes.": all_pairs(lambda x, y: len(x & y) / max(1, len(x))),
        "that is how far apart they are: similarity is 1 for the same text.": all_pairs(lambda x, y: 1 - share(x, y)),
        "that counts what both have: divide it, so that long texts have no advantage.": all_pairs(lambda x, y: len(x & y)),
    }
    return compare(given, all_pairs(share), mistakes, "MinHash estimates this very number from a few hashes a text, which makes it cheap for millions of rows.")


@check
def lift(answer) -> Verdict:
    """07.3: a function (rows [{"question", "sql"}, ...], phrase, sql) -> how many times as common the phrase is in questions with that answer as in all."""
    trap, other = "SELECT 1", "SELECT 2"
    rows = [{"question": q, "sql": sql} for q, sql in (
        ("how late, as they say", trap), ("who flew, as they say", trap), ("which plane, As They Say", trap), ("how far", trap), ("how near", trap),
        ("as they say, how many", other), ("how many", other), ("how late", other), ("who", other), ("what", other), ("why", other))]  # fmt: skip
    if missing(given := answer(rows, "as they say", trap)):
        return NOT_YET
    with_phrase, mine, n = 4, 5, len(rows)
    expected = (3 / mine) / (with_phrase / n)
    mistakes = {
        "capitals hide the phrase in one question: lower both.": (2 / mine) / (3 / n),
        "that is the share among rows with the answer: divide it by the share among all rows.": 3 / mine,
        "that is how often the answer goes with the phrase: the other way round, and then divided by what is usual.": 3 / with_phrase,
        "the usual share is that of all rows, those with the answer included.": (3 / mine) / (1 / (n - mine)),
        "that is the share of all rows with both: compare two shares.": 3 / n,
        "that counts rows: compare two shares, so that a common answer has no advantage.": 3,
        "the shares are divided the wrong way round.": (with_phrase / n) / (3 / mine),
        "that is the difference of the shares: how many times as common is their quotient.": 3 / mine - with_phrase / n,
    }
    verdict = compare(float(given), expected, mistakes, "A phrase with a high lift isn't bad by itself: it may be what is asked. What is odd is one answer to questions that else have nothing in common.")
    if not verdict:
        return verdict
    try:
        unknown = answer(rows, "never said", trap), answer(rows, "as they say", "SELECT 3")
    except ZeroDivisionError:
        return wrong("a phrase or an answer that no row has must give 0, not a division by it.")
    return verdict if unknown == (0, 0) else wrong("a phrase or an answer that no row has must give 0.")
