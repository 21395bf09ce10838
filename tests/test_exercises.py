"""Every exercise: its card is whole, its stub says "not yet", its solution passes, and known mistakes get a sentence of their own."""

import re

import nbformat
import pytest

from course import exercises
from course.exercises import comparing
from helpers.checks import check, right
from helpers.runtime import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
HEAVY = ("00.1", "00.3", "01.3")  # these run queries on the real database, or read the model's weights
# exercise: wrong answers, as the whole cell without its check, and words of the sentence that each must get
WRONG = {
    "00.1": [
        ("answer = \"SELECT airline, AVG(dep_delay) FROM flights WHERE origin = 'JFK' GROUP BY airline ORDER BY 2 DESC\"", "every month"),
        ("answer = \"SELECT carrier, AVG(dep_delay) FROM flights WHERE month = 7 GROUP BY carrier ORDER BY 2 DESC\"", "all three airports"),
        ("answer = \"SELECT airline, AVG(dep_delay) FROM flights WHERE origin = 'JFK' AND month = 7 GROUP BY airline ORDER BY 2\"", "worst first"),
        ("answer = \"SELECT airline, AVG(arr_delay) FROM flights WHERE origin = 'JFK' AND month = 7 GROUP BY airline ORDER BY 2 DESC\"", "at departure"),
        ("answer = \"SELECT AVG(dep_delay) FROM flights WHERE origin = 'JFK' AND month = 7\"", "says *each*"),
        ("answer = \"SELECT AVG(dep_delay) d FROM flights WHERE origin='JFK' AND month=7 GROUP BY carrier ORDER BY d DESC\"", "which airline"),
        ("answer = \"SELECT carrier, AVG(dep_delay) d FROM flights WHERE origin='JFK' AND month=7 GROUP BY 1 ORDER BY d DESC LIMIT 5\"", "5 came"),
        ("answer = \"SELECT carrier, MAX(dep_delay) d FROM flights WHERE origin='JFK' AND month=7 GROUP BY 1 ORDER BY d DESC\"", "differs"),
        ("answer = \"SELECT carrier FROM flights WHERE origin='JFK' AND month=7 GROUP BY 1 ORDER BY AVG(dep_delay) DESC\"", "column is missing"),
        ("answer = 'DROP TABLE flights'", "doesn't run"),
    ],
    "00.2": [
        ("def probabilities(logits, temperature):\n    return (logits * temperature).softmax(0)", "less likely"),
        ("def probabilities(logits, temperature):\n    return logits.softmax(0)", "isn't used"),
        ("def probabilities(logits, temperature):\n    return logits.softmax(0) / temperature", "add up to 1"),
        ("def probabilities(logits, temperature):\n    return logits / temperature", "not yet probabilities"),
    ],
    "00.3": [
        ("answer = \"SELECT MAX(dep_delay) FROM flights WHERE airline LIKE 'Hawaiian%'\"", "agrees on all three"),
        ("answer = \"SELECT MAX(dep_delay) FROM flights WHERE carrier = 'UA'\"", "no luck to uncover"),
        ("answer = 'SELECT 1301'", "ask the table"),
        ("answer = 'SELECT 1301 FROM flights LIMIT 1'", "ask the table"),
        ("answer = 'VALUES (1301)'", "ask the table"),
        ("answer = 'SELECT MAX(delay) FROM flights'", "doesn't run"),
    ],
    "01.1": [
        ("def megabytes(parameters, bits, block):\n    return parameters * bits / 8 / 1e6", "scales are missing"),
        ("def megabytes(parameters, bits, block):\n    return (parameters * bits + 32 * parameters / block) / 1e6", "a byte has eight"),
        ("def megabytes(parameters, bits, block):\n    return (parameters * bits / 8 + 4 * parameters / block) / 2**20", "mebibytes"),
        ("def megabytes(parameters, bits, block):\n    return (parameters * bits / 8 + 2 * parameters / block) / 1e6", "not two"),
        ("def megabytes(parameters, bits, block):\n    return (parameters * bits / 8 + 32 * parameters / block) / 1e6", "not 32 bytes"),
        ("def megabytes(parameters, bits, block):\n    return (parameters * bits + 4 * parameters / block) / 1e6", "weights are counted in bits"),
    ],
    "01.2": [
        ("def blockwise(w, bits, block):\n    scale = w.abs().max() / 7\n    return torch.round(w / scale) * scale", "whole tensor"),
        ("def blockwise(w, bits, block):\n    scale = w.abs().amax(1, keepdim=True) / 7\n    return torch.round(w / scale) * scale", "scale a row"),
        ("def blockwise(w, bits, block):\n    return w", "nothing is rounded"),
        (
            "def blockwise(w, bits, block):\n    b = w.reshape(-1, block)\n    s = b.abs().amax(1, keepdim=True) / 2 ** (bits - 1)\n"
            "    return (torch.round(b / s) * s).reshape(w.shape)",
            "the largest is 7, not 8",
        ),
        (
            "def blockwise(w, bits, block):\n    b = w.reshape(-1, block)\n    s = b.amax(1, keepdim=True) / 7\n"
            "    return (torch.round(b / s) * s).reshape(w.shape)",
            "take the absmax",
        ),
        (
            "def blockwise(w, bits, block):\n    b = w.reshape(-1, block)\n    s = b.abs().amax(1, keepdim=True) / 7\n"
            "    return torch.round(b / s).reshape(w.shape)",
            "these are the codes",
        ),
    ],
    "01.3": [
        ("import bitsandbytes.functional as bnb\ndef better_levels(x):\n    return bnb.get_4bit_type('nf4', device='cpu')", "NF4's own error"),
        ("def better_levels(x):\n    return torch.quantile(x, torch.linspace(0, 1, 16))", "equally often"),
        ("def better_levels(x):\n    return torch.linspace(-1, 1, 16)", "more rounds"),
        ("def better_levels(x):\n    return torch.linspace(-1, 1, 17)", "(17,), and (16,) is asked for"),
    ],
    "02.1": [
        ("def lora_parameters(shapes, r):\n    return sum(o * i for o, i in shapes)", "layers themselves"),
        ("def lora_parameters(shapes, r):\n    return sum(r * o * i for o, i in shapes)", "thin matrices"),
        ("def lora_parameters(shapes, r):\n    return sum(r * i for o, i in shapes)", "only A"),
        ("def lora_parameters(shapes, r):\n    for o, i in shapes:\n        return r * (o + i)", "inside the loop"),
    ],
    "02.2": [
        ("def lora_forward(x, W, A, B, alpha):\n    return x @ W.T + x @ A.T @ B.T", "scale is missing"),
        ("def lora_forward(x, W, A, B, alpha):\n    return x @ W.T + alpha * x @ A.T @ B.T", "not alpha"),
        ("def lora_forward(x, W, A, B, alpha):\n    return alpha / len(A) * x @ A.T @ B.T", "update alone"),
        ("def lora_forward(x, W, A, B, alpha):\n    return x @ W.T + alpha / A.shape[1] * x @ A.T @ B.T", "width of the input"),
        ("def lora_forward(x, W, A, B, alpha):\n    return x @ W.T + alpha // len(A) * x @ A.T @ B.T", "rounds down"),
        ("def lora_forward(x, W, A, B, alpha):\n    return x @ W", "RuntimeError"),
    ],
    "02.3": [
        ("def mean_adapter(A1, B1, A2, B2):\n    return torch.cat([A1, A2]), torch.cat([B1, B2], 1)", "the sum"),
        ("def mean_adapter(A1, B1, A2, B2):\n    return torch.cat([A1, A2]) / 2, torch.cat([B1, B2], 1) / 2", "quarters"),
        ("def mean_adapter(A1, B1, A2, B2):\n    return (A1 + A2) / 2, (B1 + B2) / 2", "mean of the A's"),
        ("def mean_adapter(A1, B1, A2, B2):\n    return (B1 @ A1 + B2 @ A2) / 2", "not their product"),
        ("def mean_adapter(A1, B1, A2, B2):\n    return torch.eye(A1.shape[1]), (B1 @ A1 + B2 @ A2) / 2", "written out"),
        ("def mean_adapter(A1, B1, A2, B2):\n    return torch.cat([B1, B2], 1), torch.cat([A1, A2])", "must be possible"),
    ],
    "03.1": [
        ("def make_labels(prompt, completion):\n    return prompt + completion", "prompt is supervised"),
        ("def make_labels(prompt, completion):\n    return [0] * len(prompt) + completion", "a token like any other"),
        ("def make_labels(prompt, completion):\n    return [-100] * len(prompt) + completion[:-1] + [-100]", "learn to stop"),
        ("def make_labels(prompt, completion):\n    return completion", "as long as"),
    ],
    "03.2": [
        ("def completion_loss(logits, labels):\n    return torch.nn.functional.cross_entropy(logits, labels)", "shift the logits"),
        ("def completion_loss(logits, labels):\n    return torch.nn.functional.cross_entropy(logits[1:], labels[:-1])", "wrong way"),
        ("def completion_loss(logits, labels):\n    return torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction='sum')", "the sum"),
        (
            "def completion_loss(logits, labels):\n    kept = labels[1:] != -100\n"
            "    return -logits[:-1].log_softmax(0)[kept.nonzero()[:, 0], labels[1:][kept]].mean()",
            "the last axis",
        ),
    ],
    "03.3": [
        (
            "import numpy as np\ndef interval(gain, phrasing):\n    rng = np.random.default_rng(1)\n"
            "    return np.quantile([rng.choice(gain, len(gain)).mean() for _ in range(2000)], [0.025, 0.975])",
            "as if all questions were independent",
        ),
        ("import numpy as np\ndef interval(gain, phrasing):\n    return gain.mean() - 1.96 * gain.std(), gain.mean() + 1.96 * gain.std()", "single questions"),
        ("def interval(gain, phrasing):\n    return gain.mean() + 0.1, gain.mean() - 0.1", "low comes first"),
        (
            "import numpy as np\ndef interval(gain, phrasing):\n    each = np.bincount(phrasing, weights=gain) / np.bincount(phrasing)\n"
            "    return np.quantile(each[np.random.default_rng(1).integers(0, 60, (2000, 60))].mean(1), [0.025, 0.975])",
            "each phrasing counts once",
        ),
        (
            "import numpy as np\ndef interval(gain, phrasing):\n    rng = np.random.default_rng(1)\n"
            "    return np.quantile([gain[np.isin(phrasing, rng.integers(0, 60, 60))].mean() for _ in range(2000)], [0.025, 0.975])",
            "drawn twice",
        ),
        (
            "import numpy as np\ndef interval(gain, phrasing):\n    sums, n = np.bincount(phrasing, weights=gain), np.bincount(phrasing)\n"
            "    picks = np.random.default_rng(1).integers(0, len(n), (2000, len(n)))\n"
            "    return np.quantile(sums[picks].sum(1) / n[picks].sum(1), [0.05, 0.95])",
            "drawn twice",
        ),
    ],
    "04.1": [
        ("import math\ndef margin_of(loss):\n    return math.log(math.exp(loss) - 1)", "the sign"),
        ("import math\ndef margin_of(loss):\n    return math.exp(-loss)", "probability"),
        ("def margin_of(loss):\n    return -loss", "forgets the 1"),
        ("import math\ndef margin_of(loss):\n    return abs(math.log(math.exp(loss) - 1))", "has a sign"),
    ],
    "04.2": [
        ("def simpo_loss(c, r, nc, nr, beta, gamma):\n    return -torch.nn.functional.logsigmoid(beta * (c - r) - gamma).mean()", "lengths"),
        ("def simpo_loss(c, r, nc, nr, beta, gamma):\n    return -torch.nn.functional.logsigmoid(beta * (c / nc - r / nr) + gamma).mean()", "subtracted"),
        ("def simpo_loss(c, r, nc, nr, beta, gamma):\n    return -torch.nn.functional.logsigmoid(beta * (c / nc - r / nr - gamma)).mean()", "not γ"),
        ("def simpo_loss(c, r, nc, nr, beta, gamma):\n    return -torch.nn.functional.logsigmoid(beta * (r / nr - c / nc) - gamma).mean()", "swapped"),
        ("def simpo_loss(c, r, nc, nr, beta, gamma):\n    return -torch.nn.functional.logsigmoid(beta * (c / nc - r / nr) - gamma).sum()", "sum over the pairs"),
        ("def simpo_loss(c, r, nc, nr, beta, gamma):\n    return -torch.sigmoid(beta * (c / nc - r / nr) - gamma).mean().log()", "logarithm of the mean"),
    ],
    "04.3": [
        ("def brevity_pair(answers):\n    few = [a for a in answers if a['correct']]\n    return few[0], few[-1]", "not the dicts"),
        (
            "def brevity_pair(answers):\n    few = [a for a in answers if a['correct']]\n    return min(few, key=len)['answer'], max(few, key=len)['answer']",
            "the number of its keys",
        ),
        ("def brevity_pair(answers):\n    texts = sorted((a['answer'] for a in answers), key=len)\n    return texts[0], texts[-1]", "a wrong answer is in the pair"),
        ("def brevity_pair(answers):\n    texts = sorted((a['answer'] for a in answers if a['correct']), key=len)\n    return texts[-1], texts[0]", "the longer one"),
        (
            "def brevity_pair(answers):\n    texts = sorted((a['answer'] for a in answers if a['correct']), key=len)\n"
            "    return (texts[0], texts[-1]) if len(texts) > 1 else None",
            "equally long",
        ),
        (
            "def brevity_pair(answers):\n    texts = sorted((a['answer'] for a in answers if a['correct']), key=len)\n    return (texts[0], texts[1]) if texts else None",
            "shortest and the longest",
        ),
    ],
}


def cells(path) -> dict[str, str]:
    """Sources of a notebook's cells with the tag "exercise", by number (00.1, …)."""
    tagged = [c.source for c in nbformat.read(path, as_version=4).cells if "exercise" in c.metadata.get("tags", [])]
    return {f"{path.stem[:2]}.{i}": source for i, source in enumerate(tagged, 1)}


STUBS = {number: source for path in NOTEBOOKS for number, source in cells(path).items()}
SOLUTIONS = {number: source for path in NOTEBOOKS for number, source in cells(path.parent / "solutions" / path.name).items()}


def numbers(*which):
    return [pytest.param(number, marks=pytest.mark.slow if number in HEAVY else ()) for number in which]


def verdict(code: str, check_line: str):
    """What the check of `check_line` says after `code`, as the notebook's cell would show it."""
    import torch

    space = {"exercises": exercises, "torch": torch}
    exec(code, space)
    return eval(check_line, space)


def parts(source: str) -> tuple[str, str]:
    """An exercise's cell: its code, and its last line, the check."""
    code, check_line = source.rstrip().rsplit("\n", 1)
    assert re.fullmatch(r"exercises\.\w+\(\w+\)", check_line)
    return code, check_line


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_each_notebook_has_three_exercises_with_whole_cards(path):
    levels, all_cells = [], nbformat.read(path, as_version=4).cells
    for card, stub in zip(all_cells, all_cells[1:], strict=False):
        if "exercise" in stub.metadata.get("tags", []):
            assert re.match(rf"### {path.stem[:2]}\.{len(levels) + 1} · \S", card.source)
            level, minutes = re.search(r"\*(Warm-up|Core|Stretch), (\d+) minutes\.\*", card.source).groups()
            assert 5 <= int(minutes) <= 30 and "**Objective:**" in card.source and "<summary>Hint</summary>" in card.source
            assert re.search(r"^1\. ", card.source, re.M) and "..." in stub.source
            levels.append(level)
    assert levels == ["Warm-up", "Core", "Stretch"]


def test_solutions_answer_the_same_exercises_with_the_same_checks():
    assert STUBS.keys() == SOLUTIONS.keys() == WRONG.keys() and len(STUBS) == 15
    assert all(parts(STUBS[number])[1].split("(")[0] == parts(SOLUTIONS[number])[1].split("(")[0] for number in STUBS)


@pytest.mark.parametrize("number", STUBS)
def test_the_stub_fails_its_check_and_says_not_yet(number):
    found = verdict(*parts(STUBS[number]))
    assert not found and repr(found).startswith("not yet:")


@pytest.mark.parametrize("number", numbers(*SOLUTIONS))
def test_the_solution_passes(number):
    found = verdict(*parts(SOLUTIONS[number]))
    assert found and repr(found).startswith("right. ")


@pytest.mark.parametrize("number", numbers(*WRONG))
def test_known_mistakes_get_a_sentence_of_their_own_that_does_not_give_the_answer_away(number):
    said, check_line = set(), parts(STUBS[number])[1]
    code = parts(SOLUTIONS[number])[0]
    telling = [line.strip() for line in code.splitlines() if line.strip() and not re.match(r"\s*(def|import|answer) ?", line)]
    assert len(WRONG[number]) >= 2
    for wrong_code, words in WRONG[number]:
        name = re.search(r"def (\w+)|answer", wrong_code)
        assert (name[1] or "answer") in check_line
        found = verdict(wrong_code, check_line)
        assert not found and found.says.startswith("not right: ") and words in found.says
        assert not any(line in found.says for line in telling)
        said.add(found.says)
    assert len(said) == len({words for _, words in WRONG[number]})


@pytest.mark.parametrize("number", [n for n in STUBS if n not in HEAVY])
def test_what_an_answer_raises_is_told(number):
    code, check_line = parts(STUBS[number])
    found = verdict(code.replace("...", 'raise ValueError("oops")'), check_line)
    assert not found and found.says == "not right: your code stopped with ValueError: oops"


@pytest.mark.slow
@pytest.mark.parametrize("delay", ["ROUND(AVG(dep_delay), 1)", "ROUND(AVG(dep_delay), 2)", "AVG(dep_delay)"])
@pytest.mark.parametrize("key", ["carrier, airline", "carrier", "airline"])
def test_other_right_queries_pass(key, delay):
    where = "WHERE month = 7 AND origin = 'JFK'"
    assert exercises.query(f"SELECT {key}, {delay} AS delay_min FROM flights {where} GROUP BY {key} ORDER BY delay_min DESC")
    assert exercises.query(f"WITH d AS (SELECT {key}, {delay} AS x FROM flights {where} GROUP BY carrier) SELECT * FROM d ORDER BY x DESC;")


@pytest.mark.slow
def test_fewer_rounds_of_the_right_idea_pass():
    code, check_line = parts(SOLUTIONS["01.3"])
    assert verdict(code.replace("range(30)", "range(17)"), check_line)
    assert "more rounds" in verdict(code.replace("range(30)", "range(5)"), check_line).says


def test_an_unknown_mistake_and_a_wrong_shape_are_told_apart():
    def tried(value):
        return comparing.compare(value, [1.0, 2.0], {}, "yes").says

    assert tried([1.0, 2.0]) == "right. yes"
    assert tried([1.0, 2.5]).startswith("not right: the numbers differ.")
    assert tried([1.0]) == "not right: the result has the shape (1,), and (2,) is asked for."
    assert tried(None).startswith("not yet") and tried([float("nan"), 2.0]).startswith("not right")


def test_a_check_keeps_its_name_and_passes_on_what_the_trial_says():
    @check
    def trial(answer):
        """words"""
        return right(answer)

    assert trial.__name__ == "trial" and trial.__doc__ == "words" and trial("x") and str(trial("x")) == "right. x"
    assert not trial(...) and not trial(None)
