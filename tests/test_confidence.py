"""Confidence: Platt's curve, its ranking, and where it comes from."""

import math

import pytest

from helpers import confidence


def test_the_curve_is_a_logistic_with_slope_and_intercept():
    curve = confidence.Calibration(slope=2.0, intercept=1.0, n=4)
    assert curve(-0.5) == 0.5
    assert curve(0.0) == pytest.approx(1 / (1 + math.exp(-1)))
    assert 0 <= curve(-1e6) < 1e-20  # nothing overflows


def test_it_is_fitted_by_maximum_likelihood():
    """Two log-probabilities: at 0 three of four are right, at −2 one of four. The curve goes through both shares."""
    logps, correct = [0.0] * 4 + [-2.0] * 4, [1, 1, 1, 0, 1, 0, 0, 0]
    curve = confidence.fit(logps, correct)
    assert curve.n == 8
    assert curve(0.0) == pytest.approx(0.75, abs=1e-3) and curve(-2.0) == pytest.approx(0.25, abs=1e-3)
    assert curve.intercept == pytest.approx(math.log(3), abs=0.01) and curve.slope == pytest.approx(math.log(3), abs=0.01)


def test_answers_of_one_kind_give_no_curve():
    assert confidence.fit([-1.0, -2.0], [True, True]) is None
    assert confidence.fit([-1.0, -2.0], [0, 0]) is None


def test_auroc_counts_pairs_that_are_in_order():
    assert confidence.auroc([0.9, 0.8, 0.1], [1, 1, 0]) == 1.0
    assert confidence.auroc([0.1, 0.9], [1, 0]) == 0.0
    assert confidence.auroc([0.5, 0.5], [True, False]) == 0.5
    assert confidence.auroc([3, 2, 1, 0], [1, 0, 1, 0]) == 0.75  # three of four pairs


def test_the_surest_three_quarters():
    assert confidence.surest([4, 3, 2, 1], [1, 1, 0, 0]) == pytest.approx(2 / 3)
    assert confidence.surest([4, 3, 2, 1], [1, 1, 0, 0], share=0.5) == 1.0
    assert confidence.surest([1.0], [1], share=0.1) == 1.0


def test_reliability_in_parts_of_equal_size():
    parts = confidence.reliability([0.9, 0.1, 0.3, 0.7], [1, 0, 1, 1], bins=2)
    assert parts == [{"said": pytest.approx(0.2), "right": 0.5, "n": 2}, {"said": pytest.approx(0.8), "right": 1.0, "n": 2}]
    assert [part["n"] for part in confidence.reliability([0.5] * 3, [1, 0, 1], bins=10)] == [1, 1, 1]


def test_the_recorded_curve_takes_the_answers_of_all_seeds(monkeypatch):
    def runs(name, stage):
        assert (name, stage) == ("preference", "dpo")
        records = [[{"logp": -0.1, "correct": True}, {"logp": -3.0, "correct": False}], [{"logp": -0.2, "correct": True}, {"correct": True}]]
        return [{"splits": {"validation": {"records": part}}} for part in records] + [{"splits": {}}]

    monkeypatch.setattr(confidence.scoreboard, "recorded", runs)
    curve = confidence.recorded("dpo")
    assert curve.n == 3 and curve(-0.1) > 0.5 > curve(-3.0)
    assert confidence.recorded("base") is None  # nothing was fitted for it
    monkeypatch.setattr(confidence.scoreboard, "recorded", lambda name, stage: [])
    assert confidence.recorded("sft") is None
