"""Estimates of time: by hand from given rates, against the measured runs that are kept, and as they are told."""

import pytest

from helpers import dpo, recipes, times
from helpers.times import Rates, Work

CPU = Rates("cpu", "float32", training=100e9, answering=50e9, single=5e9)
GPU = Rates("cuda", "float16", training=50e12, answering=10e12, single=1e12)


@pytest.fixture
def shares(monkeypatch):
    """Round shares, so that what is asserted can be worked out by hand."""
    monkeypatch.setattr(times, "TRAINING", {"float32": 0.5, "bfloat16": 0.25})
    monkeypatch.setattr(times, "ANSWERING", {"float32": 0.8, "bfloat16": 0.4})


def test_the_counted_weights_are_the_course_models():
    assert times.LINEAR == 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536) and times.HEAD == 576 * 49152
    assert times.LORA == 30 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))


def test_work_in_flop_by_hand():
    # 2 steps of 8 rows: 55 tokens through the layers, 30 of them through the head
    run = times.sft(recipes.SFTRecipe(steps=2))
    assert run == Work(train=2 * 8 * (55 * (4 * 106_168_320 + 6 * 16 * 305_280) + 30 * 4 * 28_311_552), steps=2)
    full = times.sft(recipes.SFTRecipe(steps=2, method="full"))
    assert full == Work(train=2 * 8 * (55 * 6 * 106_168_320 + 30 * 6 * 28_311_552), steps=2)
    pairs = times.dpo(dpo.DPORecipe(steps=1, batch_size=4))
    assert pairs == Work(train=8 * (55 * 6 * (106_168_320 + 16 * 305_280) + 30 * 6 * 28_311_552), steps=2)
    assert times.answers(10, own=5, written=7, shared=3, longest=9) == Work(read=2 * 106_168_320 * 53, write=2 * 134_479_872 * 70, passes=9)
    assert times.answers(129, longest=9).passes == 18


def test_work_adds_up():
    assert Work(1, 2, 3, 4, 5, 6) + Work(10, 20, 30, 40, 50, 60) == Work(11, 22, 33, 44, 55, 66)
    assert Work(1, 2, 3, 4, 5, 6) * 2 == Work(2, 4, 6, 8, 10, 12)


def test_seconds_by_hand(shares):
    work = Work(train=100e9, read=80e9, write=80e9, steps=9, passes=9, rest=5)
    assert times.seconds(work, CPU) == pytest.approx(2 + 1 + 2 + 5)
    assert times.seconds(work, CPU, slower=3) == pytest.approx(6 + 1 + 2 + 5)
    assert times.seconds(work, Rates("cpu", "bfloat16", 200e9, 100e9, 0)) == pytest.approx(2 + 1 + 2 + 5)


def test_a_gpu_takes_its_launches_or_its_flop_whichever_is_longer():
    assert times.seconds(Work(train=1e12, steps=100, write=1e12, passes=50, rest=1), GPU) == pytest.approx(15 + 3 + 1)
    assert times.seconds(Work(train=1e15, steps=100, write=1e15, passes=50), GPU) == pytest.approx(20 + 100)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.2, "about 10 seconds"), (34, "about 30 seconds"), (89, "about 90 seconds"), (90, "about 2 minutes"), (1560, "about 26 minutes")],
)
def test_times_are_told_as_coarsely_as_they_are_known(seconds, said):
    assert times.spell(seconds) == said


def test_long_work_is_announced(shares, monkeypatch, capsys):
    monkeypatch.setattr(times, "rates", lambda: CPU)
    times.announce("training", Work(train=100e9 * 780))
    assert capsys.readouterr().out == "training: about 26 minutes on this machine (estimate)\n"


def test_the_table_has_each_notebook_and_their_sum(shares, monkeypatch):
    monkeypatch.setattr(times, "lessons", lambda: {"00_start_here": Work(rest=20), "03_sft_with_trl": Work(train=100e9 * 300, rest=60)})
    monkeypatch.setattr(times, "exam", lambda: Work(rest=120))
    lines = ["Minutes on this machine, estimated:", "  00_start_here            1", "  03_sft_with_trl         11"]
    assert times.table(CPU).splitlines() == [*lines, "  exam                     2", "  make course             13"]
    step = times.seconds(times.sft(recipes.SFTRecipe()), CPU) / 440
    assert "03_sft_with_trl         21" in times.table(CPU, step=2 * step)  # a measured step that takes twice as long


def test_this_machine_is_measured():
    rates = times.rates(matrices=2)
    assert rates.kind in ("cpu", "cuda") and all(1e7 < rate < 1e16 for rate in (rates.training, rates.answering, rates.single))


def test_every_lesson_has_an_estimate():
    assert sorted(times.lessons()) == [p.stem for p in sorted((times.DATA.parent / "notebooks").glob("*.ipynb"))]


def far(estimate: float, measured: float) -> bool:
    return abs(estimate - measured) > 0.4 * measured


def test_estimates_are_near_the_kept_runs():
    works, runs = times.lessons(), times.kept()
    assert runs.keys() == {"bfloat16", "float32"} and any(run["seconds"] for run in runs.values())
    told = {
        (dtype, name): (round(times.seconds(works[name], times.kept_rates(run, dtype))), seconds)
        for dtype, run in runs.items()
        for name, seconds in run["seconds"].items()
    }
    assert {what: pair for what, pair in told.items() if far(*pair)} == {}


def test_an_estimate_can_be_too_far_off_to_be_kept():
    assert [far(e, 100) for e in (59, 61, 139, 141)] == [True, False, False, True]
