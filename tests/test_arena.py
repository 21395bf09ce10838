"""The arena: battles from records, what is refused, and what no rating can follow from."""

import json

import numpy as np
import pytest

from helpers import arena
from helpers.files import CourseError


def records(*correct, kept=()):
    return [{"id": f"q{i}", "correct": bool(c), "kept": {"alias": True} if i in kept else {}} for i, c in enumerate(correct)]


def battle(a, b, winner, question="q"):
    return {"question": question, "a": a, "b": b, "winner": winner}


def test_a_right_answer_beats_a_wrong_one_then_style_decides_and_the_rest_are_ties():
    systems = {"x": records(1, 1, 0, 0), "y": records(0, 1, 0, 1, kept=(1,)), "z": records(0, 1, 0, 0)}
    plain = arena.battles(systems)
    assert len(plain) == 12 and plain[0] == battle("x", "y", "x", "q0")
    assert [b["winner"] for b in plain if (b["a"], b["b"]) == ("x", "y")] == ["x", "tie", "tie", "y"]
    styled = arena.battles(systems, lambda r: len(r["kept"]))
    assert [b["winner"] for b in styled if (b["a"], b["b"]) == ("x", "y")] == ["x", "y", "tie", "y"]


def test_style_never_makes_a_wrong_answer_win():
    systems = {"wrong, in style": records(0, kept=(0,)), "wrong": records(0), "right": records(1)}
    found = {(b["a"], b["b"]): b["winner"] for b in arena.battles(systems, lambda r: len(r["kept"]))}
    assert found == {("wrong, in style", "wrong"): "tie", ("wrong, in style", "right"): "right", ("wrong", "right"): "right"}


def test_records_of_other_questions_are_refused():
    with pytest.raises(CourseError, match="same questions"):
        arena.battles({"x": records(1, 0), "y": records(1)})


def test_wins_are_counted_and_a_tie_is_half_a_win_for_both():
    names, W = arena.wins([battle("x", "y", "x"), battle("y", "x", "x"), battle("x", "y", "y"), battle("x", "y", "tie")])
    assert names == ["x", "y"] and W.tolist() == [[0, 2.5], [1.5, 0]]
    names, W = arena.wins([battle("x", "y", "x"), battle("x", "y", "y")], ["y", "x"])
    assert names == ["y", "x"] and W.tolist() == [[0, 1], [1, 0]]
    assert arena.wins([battle("x", "y", "x")], check=False)[1].tolist() == [[0, 1], [0, 0]]


@pytest.mark.parametrize(
    ("battles", "systems", "says"),
    [
        ([battle("x", "y", "x"), battle("x", "y", "y")], ["x", "y", "z"], "z battles nobody"),
        ([battle("x", "y", "x"), battle("x", "y", "y")], ["x"], "y battles, but it isn't among"),
        ([battle("x", "y", "tie")], None, "No battle was won"),
        ([], None, "No battle was won"),
        ([battle("x", "y", "x")], None, "infinite"),  # y never won
        ([battle("x", "y", "x"), battle("x", "y", "y"), battle("v", "w", "v"), battle("v", "w", "w")], None, "infinite"),  # two rooms
    ],
)
def test_what_no_rating_can_follow_from_is_refused(battles, systems, says):
    with pytest.raises(CourseError, match=says):
        arena.wins(battles, systems)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"winner": "z", "question": "q2"}, "'winner' is 'z'; write 'x', 'y' or 'tie'"),
        ({"b": "x", "question": "q2"}, "the same system"),
        ({}, "the same battle as line 1"),
        ({"a": "y", "b": "x"}, "the same battle as line 1"),  # the other way round
    ],
)
def test_a_bad_line_of_a_log_is_named(tmp_path, change, says):
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(map(json.dumps, [battle("x", "y", "x"), battle("x", "y", "y") | change])), encoding="utf-8")
    with pytest.raises(CourseError, match="line 2") as told:
        arena.load_battles(log)
    assert says in str(told.value)


def test_a_good_log_is_read(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(map(json.dumps, [battle("x", "y", "x"), battle("x", "y", "tie", "q2"), battle("x", "z", "z")])), encoding="utf-8")
    assert [b["winner"] for b in arena.load_battles(log)] == ["x", "tie", "z"]


def test_four_hundred_points_are_odds_of_ten_to_one():
    assert np.isclose(arena.ELO * np.log(10), 400)
