"""The exercises of notebook 08 before they stand in it: solutions pass, stubs say "not yet", mistakes get a sentence of their own. When the
notebook is there, WRONG goes to tests/test_exercises.py, and this file goes."""

import pytest

from course.exercises import scale_out

SOLUTIONS = {
    "shared_batch": """
def shared_batch(batch, gpus, fits):
    each = batch // gpus
    at_once = max(n for n in range(1, fits + 1) if each % n == 0)
    return at_once, each // at_once""",
    "shard_gb": """
def shard_gb(parameters, gpus, stage):
    weights, gradients, states = 2 * parameters, 2 * parameters, 12 * parameters
    states /= gpus if stage >= 1 else 1
    gradients /= gpus if stage >= 2 else 1
    weights /= gpus if stage >= 3 else 1
    return (weights + gradients + states) / 1e9""",
    "rent": """
def rent(parameters, tokens, tflops, utilisation, dollars, cards, scaling):
    speed = cards * scaling * utilisation * tflops * 1e12
    hours = 6 * parameters * tokens / speed / 3600
    return hours * cards * dollars""",
}
WRONG = {
    "shared_batch": [
        ("def shared_batch(batch, gpus, fits):\n    return fits, batch // gpus // fits", "are 60 examples a step, not 64"),
        ("def shared_batch(batch, gpus, fits):\n    n = max(n for n in range(1, fits + 1) if batch % n == 0)\n    return n, batch // n", "each has its part"),
        ("def shared_batch(batch, gpus, fits):\n    return batch // gpus, 1", "more at a time than fits"),
        ("def shared_batch(batch, gpus, fits):\n    return 1, batch // gpus", "wastes the card"),
        ("def shared_batch(batch, gpus, fits):\n    n = max(n for n in range(1, fits + 1) if batch // gpus % n == 0)\n    return batch // gpus // n, n", "comes first"),
        ("def shared_batch(batch, gpus, fits):\n    return 1, 2, 3", "two numbers are asked for"),
    ],
    "shard_gb": [
        ("def shard_gb(p, g, s):\n    return p * (2 / (g if s > 2 else 1) + 2 / (g if s > 1 else 1) + 8 / (g if s > 0 else 1)) / 1e9", "12 bytes, not 8"),
        ("def shard_gb(p, g, s):\n    return p * (2 / (g if s > 2 else 1) + 12 / (g if s > 0 else 1)) / 1e9", "gradients are missing"),
        ("def shard_gb(p, g, s):\n    return p * 16 / (g if s > 0 else 1) / 1e9", "stage 1 cuts the optimizer's part alone"),
        ("def shard_gb(p, g, s):\n    return p * 16 / 1e9", "nothing is cut"),
        ("def shard_gb(p, g, s):\n    return p * (2 / (g if s > 2 else 1) + 2 / (g if s > 1 else 1) + 12 / (g if s > 0 else 1)) / 2**30", "gibibytes"),
        ("def shard_gb(p, g, s):\n    return p * (4 / (g if s > 2 else 1) + 4 / (g if s > 1 else 1) + 12 / (g if s > 0 else 1)) / 1e9", "two bytes each"),
    ],
    "rent": [
        ("def rent(p, t, f, u, d, c, s):\n    return 4 * p * t / (c * s * u * f * 1e12) / 3600 * c * d", "without checkpointing"),
        ("def rent(p, t, f, u, d, c, s):\n    return 8 * p * t / (c * s * u * f * 1e12) / 3600 * c * d", "full fine-tuning"),
        ("def rent(p, t, f, u, d, c, s):\n    return 6 * p * t / (c * s * u * f * 1e12) / 3600 * d", "all cards are paid for"),
        ("def rent(p, t, f, u, d, c, s):\n    return 6 * p * t / (c * u * f * 1e12) / 3600 * c * d", "less than so many times as fast"),
        ("def rent(p, t, f, u, d, c, s):\n    return 6 * p * t / (c * s * f * 1e12) / 3600 * c * d", "no card reaches its peak"),
        ("def rent(p, t, f, u, d, c, s):\n    return 6 * p * t / (c * s * u * f * 1e12) * c * d", "these are seconds"),
    ],
}


def verdict(name: str, code: str):
    space = {}
    exec(code, space)
    return getattr(scale_out, name)(space[name])


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_solution_passes_and_the_stub_is_not_yet(name):
    found = verdict(name, SOLUTIONS[name])
    assert found and found.says.startswith("right. ")
    assert verdict(name, f"def {name}(*given):\n    ...").says.startswith("not yet:")
    assert verdict(name, f"def {name}(*given):\n    raise ValueError('oops')").says == "not right: your code stopped with ValueError: oops"


@pytest.mark.parametrize(("name", "code", "words"), [(name, code, words) for name, wrong in WRONG.items() for code, words in wrong])
def test_known_mistakes_get_a_sentence_of_their_own(name, code, words):
    found = verdict(name, code)
    telling = [line.strip() for line in SOLUTIONS[name].splitlines() if line.strip() and not line.startswith("def")]
    assert not found and found.says.startswith("not right: ") and words in found.says and not any(line in found.says for line in telling)
