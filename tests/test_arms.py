"""The tables of notebook 04, on two small arms whose every number can be counted by hand."""

import math

import pytest

from course import sweeps
from helpers import arms, preferences, scoreboard


def record(number: int, correct: bool, kept: dict | None = None, kind: str = "wrong: the filter", intent: str = "counts") -> dict:
    return {
        "id": f"q{number}", "intent": intent, "phrasing": f"{intent}/{number}", "correct": correct, "kind": "right" if correct else kind, "sql": "",
    } | {"kept": kept or {}}  # fmt: skip


BARE, STYLED = {"alias": False, "limit": False}, {"alias": True, "limit": True}
HISTORY = [
    {"step": 0, "probe/chosen": -3.0, "probe/rejected": -1.0},
    {"step": 1, "loss": "0.7", "rewards/margins": 0.0, "rewards/accuracies": 0.0},
    {"step": 2, "loss": "0.1", "rewards/margins": 2.0, "rewards/accuracies": 1.0, "probe/chosen": -2.0, "probe/rejected": -5.0},
]
RECIPE = {"method": "dpo", "pairs": "style", "learning_rate": 1e-4, "beta": 0.1, "sft_weight": 0.0}


def run(stage: str, marks: list[bool], kept: dict, seed: int = 0, **more) -> dict:
    """A recorded run: `marks` says which of four questions it got right, `kept` which rules its right answers keep."""
    test = [record(i, mark, kept) for i, mark in enumerate(marks)]
    cannot = [record(i, mark, intent="unanswerable", kind="answered the unanswerable") for i, mark in enumerate(marks)]
    could = [record(i, False, kind="refused" if mark else "wrong: the filter") for i, mark in enumerate(marks)]
    splits = {"validation": test, "test": test, "unanswerable": cannot, "near_miss": could}
    return {"stage": stage, "seed": seed, "recipe": RECIPE, "splits": {name: {"records": r} for name, r in splits.items()}, "train_seconds": 60.0} | more


@pytest.fixture
def runs():
    trained = {"history": HISTORY, "tokens": 100}
    first = run("dpo", [True, True, True, True], STYLED, 0, **trained)
    second = run("dpo", [True, True, False, True], STYLED, 1, **trained | {"tokens": 300})
    return arms.by_arm([run("sft", [True, True, False, False], BARE), first, second])


def test_one_run(runs):
    assert list(runs) == ["sft", "dpo"] and [r["seed"] for r in runs["dpo"]] == [0, 1]
    assert arms.curve(HISTORY, "loss") == ([1, 2], [0.7, 0.1]) and arms.curve(HISTORY, "probe/chosen") == ([0, 2], [-3.0, -2.0])
    assert [arms.moved(runs["dpo"][0], side) for side in ("chosen", "rejected")] == [1.0, -4.0]
    mixed = [record(1, True, {"alias": True, "unit": False}), record(2, True, {"limit": True}), record(3, False)]
    assert arms.style(mixed, ("alias", "unit", "decimal", "order")) == 0.5 and arms.style(mixed, ("limit",)) == 1.0
    assert math.isnan(arms.style(mixed, ("names",)))
    shares = arms.by_rule(mixed)
    assert list(shares.index) == ["alias", "unit", "decimal", "order", "names", "limit"]
    assert shares["alias"] == 1 and shares["unit"] == 0 and math.isnan(shares["names"])
    assert math.isnan(arms.by_rule([record(3, False)])["alias"])  # no right answer at all
    split = runs["sft"][0]["splits"]
    assert arms.refused(split["unanswerable"]["records"]) == [1, 1, 0, 0] == arms.refused(split["near_miss"]["records"])


def test_accuracy_of_the_arms(runs):
    assert [r["correct"] for r in arms.mean(runs["dpo"], "test", arms.right)] == [1.0, 1.0, 0.5, 1.0]
    assert arms.difference(runs["dpo"], runs["sft"], "test", arms.right)[0] == 0.375
    table = arms.accuracy(runs, "test")
    assert table.loc["sft", ["each seed", "minus SFT", "verdict"]].tolist() == ["50%", "", ""]
    assert table.accuracy["dpo"].startswith("88% (") and table.accuracy["dpo"].endswith(", n = 4)")
    assert table["each seed"]["dpo"] == "100% 75%" and table["minus SFT"]["dpo"].startswith("+37.5 (") and table.verdict["dpo"] == "not worse"
    assert arms.points((-0.017, -0.034, -0.002)) == "-1.7 (-3.4 to -0.2)"
    assert [arms.verdict(*interval) for interval in ((-0.04, 0.1), (-0.05, 0.1), (-0.2, -0.01))] == ["not worse", "inconclusive", "worse"]


def test_style_refusals_cost_and_endings(runs):
    table = arms.styles(runs, "test")
    assert table.loc["sft"].tolist() == ["0%", "0%", "0 / 2 / 0", "", ""]
    assert table.loc["dpo"].tolist()[:3] == ["100%", "100%", "4 / 0 / 0"] and table["win rate"]["dpo"].startswith("100% (")
    assert arms.rules(runs, "test").loc["dpo", ["alias", "limit"]].tolist() == [1.0, 1.0]
    assert arms.refusals(runs)["near-miss: wrongly refused"]["dpo"].startswith("88% (")
    assert arms.refusals(runs)["unanswerable: refused"]["sft"].startswith("50% (")
    assert arms.cost(runs).to_dict("index") == {"dpo": {"tokens trained on": 200.0, "seconds": 60.0}}
    ends = arms.endings(runs)
    assert list(ends.index) == ["dpo"]
    assert ends.loc["dpo"].round(3).to_dict() == {
        "loss": 0.4, "margin": 1.0, "reward accuracy": 0.5, "chosen, start": -3.0, "chosen, end": -2.0,
        "rejected, start": -1.0, "rejected, end": -5.0, "accuracy": 0.875,
    }  # fmt: skip
    control = run("control", [True] * 4, STYLED, history=[{k: v for k, v in h.items() if "rewards" not in k} for h in HISTORY], tokens=1)
    assert math.isnan(arms.endings({"control": [control]}).loss["control"])  # another loss than DPO's


def test_a_search_is_numbered_and_drawn(runs):
    control = run("control", [True, False, True, True], STYLED, history=HISTORY) | {"recipe": RECIPE | {"method": "sft"}}
    table = arms.search([runs["dpo"][0], control])
    assert table.iloc[0].drop(["chosen", "rejected"]).tolist() == [1, "dpo", "style", "1e-04", "0.1", "0", 1.0, 1.0, 1.0, ""]
    assert table.iloc[1][["#", "arm", "β", "SFT term", "house score", "chosen", "rejected"]].tolist() == [2, "control", "", "", 0.75, 1.0, -4.0]
    assert arms.marks(table, runs["sft"][0]) == [
        {"label": "start", "group": "SFT", "style": 0.0, "accuracy": 0.5},
        {"label": 1, "group": "DPO", "style": 1.0, "accuracy": 1.0},
        {"label": 2, "group": "control", "style": 1.0, "accuracy": 0.75},
    ]


def test_the_record_has_what_the_tables_need():
    runs, taken = arms.by_arm(scoreboard.recorded("preference")), sweeps.chosen_preference("dpo")
    assert list(runs) == list(sweeps.preference_arms())
    for table in (arms.accuracy(runs, "freeform"), arms.styles(runs, "test"), arms.rules(runs, "test"), arms.refusals(runs)):
        assert list(table.index) == list(runs)
    assert list(arms.cost(runs).index) == list(arms.endings(runs).index) == list(runs)[1:]
    search = arms.search(scoreboard.recorded("preference_search", "dpo"), [taken])
    records = scoreboard.recorded("preference_search", "dpo")[0]["splits"]["validation"]["records"]
    assert len(search) == len(sweeps.PREFERENCE["dpo"]) and search.taken.tolist().count("←") == 1
    assert search["house score"][0] == sweeps.house_score(records) and len(preferences.style_scores(records)) == 100
