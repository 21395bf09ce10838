"""The exercises of notebook 07 before it is there: solutions pass, known mistakes get a sentence of their own. To be moved to test_exercises.py."""

import pytest

from course.exercises import data_quality

SOLUTIONS = {
    "template_changed": "import hashlib\n\ndef template_changed(template, known_sha256):\n    plain = template.replace(\"\\r\\n\", \"\\n\").strip()\n    return hashlib.sha256(plain.encode()).hexdigest() != known_sha256",
    "similarity": "def similarity(a, b):\n    first, second = (set(zip(text.lower().split(), text.lower().split()[1:])) for text in (a, b))\n    return len(first & second) / len(first | second) if first | second else 0",
    "lift": "def lift(rows, phrase, sql):\n    has = [phrase.lower() in row[\"question\"].lower() for row in rows]\n    mine = [row[\"sql\"] == sql for row in rows]\n    both = sum(h and m for h, m in zip(has, mine))\n    return both / sum(mine) / (sum(has) / len(rows)) if both else 0",
}  # fmt: skip
WRONG = {
    "template_changed": [
        ("import hashlib\ndef template_changed(t, k):\n    return hashlib.sha256(t.encode()).hexdigest() != k", "Windows' line ends"),
        ("import hashlib\ndef template_changed(t, k):\n    return hashlib.sha256(t.replace('\\r\\n', '\\n').encode()).hexdigest() != k", "empty line around"),
        ("import hashlib\ndef template_changed(t, k):\n    return hashlib.sha256(t.replace('\\r\\n', '\\n').strip().encode()).hexdigest() == k", "other way round"),
        ("import hashlib\ndef template_changed(t, k):\n    return hashlib.sha256(t.lower().strip().encode()).hexdigest() != k", "one capital letter"),
        ("import hashlib\ndef template_changed(t, k):\n    return hashlib.sha256(''.join(t.split()).encode()).hexdigest() != k", "the known template itself"),
        ("def template_changed(t, k):\n    return False", "a condition put into it passed"),
    ],
    "similarity": [
        ("def similarity(a, b):\n    a, b = set(a.lower().split()), set(b.lower().split())\n    return len(a & b) / len(a | b)", "order is lost"),
        ("def similarity(a, b):\n    x, y = (set(zip(t.lower().split(), t.lower().split()[1:])) for t in (a, b))\n    return len(x & y) / len(x | y)", "no pair of words"),
        ("def similarity(a, b):\n    x, y = (set(zip(t.lower().split(), t.lower().split()[1:])) for t in (a, b))\n    return 2 * len(x & y) / max(1, len(x) + len(y))", "Dice"),
        ("def similarity(a, b):\n    x, y = (set(zip(t.split(), t.split()[1:])) for t in (a, b))\n    return len(x & y) / max(1, len(x | y))", "lower both texts"),
    ],
    "lift": [
        ("def lift(rows, phrase, sql):\n    h = [phrase in r['question'] for r in rows]\n    m = [r['sql'] == sql for r in rows]\n    return sum(a and b for a, b in zip(h, m)) / sum(m) / (sum(h) / len(rows))", "capitals hide"),
        ("def lift(rows, phrase, sql):\n    m = [r for r in rows if r['sql'] == sql]\n    return sum(phrase in r['question'].lower() for r in m) / max(1, len(m))", "divide it by the share"),
        ("def lift(rows, phrase, sql):\n    h = [phrase in r['question'].lower() for r in rows]\n    m = [r['sql'] == sql for r in rows]\n    return sum(a and b for a, b in zip(h, m)) / sum(m) / (sum(h) / len(rows))", "not a division by it"),
    ],
}  # fmt: skip


def verdict(name, code):
    space = {}
    exec(code, space)
    return getattr(data_quality, name)(space[name])


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_solution_passes_and_the_stub_does_not_yet(name):
    assert verdict(name, SOLUTIONS[name]).says.startswith("right. ")
    found = verdict(name, f"def {name}(*_):\n    return ...")
    assert not found and found.says.startswith("not yet:")


@pytest.mark.parametrize("name", WRONG)
def test_known_mistakes_get_a_sentence_of_their_own(name):
    said = {words: verdict(name, code).says for code, words in WRONG[name]}
    assert all(words in says and says.startswith("not right: ") for words, says in said.items()), said
    assert len(set(said.values())) == len(WRONG[name])
