"""Before you rent: sizes, memory over cards, hours, money, energy, each against figures worked out apart, and against the recorded H200."""

import re
from dataclasses import replace

import pytest

from course import gpu
from helpers import budget, menu
from helpers.files import CourseError
from helpers.scaling import rent

SEVEN = "Mistral-7B-Instruct-v0.3"
PUBLISHED = {  # parameters, as the models' own pages state them
    "Llama-3.2-1B": 1_235_814_400, "Llama-3.2-3B": 3_212_749_824, SEVEN: 7_248_023_552, "Llama-3-8B-Instruct": 8_030_261_248,
    "Llama-2-13B": 13_015_864_320, "Qwen2.5-32B": 32_763_876_352, "Llama-3-70B": 70_553_706_496,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_shapes_have_the_published_numbers_of_parameters(name):
    assert sum(budget.parameters(rent.shape(name)).values()) == PUBLISHED[name]


def test_a_shape_is_counted_as_the_librarys_config_is():
    assert budget.parameters(rent.shape(SEVEN)) == budget.parameters(menu.MENU[SEVEN].config())


def test_every_recorded_row_is_estimated_within_three_per_cent():
    rows = {row["case"]: row for row in rent.measured()}
    assert len(rows) == 10 and all(abs(row["error"]) < 0.03 for row in rows.values())
    assert {case: round(100 * row["error"], 1) for case, row in rows.items() if row["batch"] == 8} == {
        "full, 16-bit, float32 AdamW, 8 of 512": 0.7, "full, 16-bit, 8-bit AdamW, 8 of 512": 0.9,
        "LoRA r = 8, 8 of 512": -0.4, "LoRA r = 8, 8 of 512, no checkpointing": 0.0,
        "QLoRA r = 8, 8 of 512": -1.3, "QLoRA r = 8, 8 of 512, no checkpointing": -0.1,
    }  # fmt: skip


@pytest.mark.parametrize("name", gpu.TABLE)
def test_a_recorded_case_is_read_off_its_name(name):
    """The record names its cases; what they were stands in course.gpu, above helpers."""
    case = gpu.TABLE[name]
    method, given, states = rent.case_of(name)
    assert (method, given.batch, given.checkpointing, given.rank, given.length) == (case.method, case.rows, case.checkpointing, case.rank, case.length)
    assert states == {"torch": 8, "32bit": 8, "8bit": 2}[case.optimizer]


def test_the_articles_table_for_a_7b():
    """80+ GB in full, 10 to 20 by LoRA, less than 10 by QLoRA; 0.1 to 0.5 % of the parameters in an adapter of rank 8."""
    config = rent.shape(SEVEN)
    gb = {method: budget.total(rent.memory(config, method)) / 1e9 for method in rent.METHODS}
    assert gb["full"] > 80 and 10 < gb["lora"] < 20 and gb["qlora"] < 10
    assert 0.001 < budget.lora_parameters(config, 8) / PUBLISHED[SEVEN] < 0.005


def test_adapters_save_memory_more_than_time():
    plans = {method: rent.plan(SEVEN, method, "H200", 15_360_000) for method in rent.METHODS}
    assert plans["full"]["GB a card"] > 5 * plans["lora"]["GB a card"] > 10 * plans["qlora"]["GB a card"]
    assert 0.8 < plans["qlora"]["hours"] / plans["full"]["hours"] < 1.1
    assert plans["qlora"]["tokens/s"] == pytest.approx(8332)  # the recorded rate itself: same card, same texts


def test_flop_are_counted_by_what_is_trained_and_read_twice():
    small = rent.shape("Llama-3.2-1B")  # tied: its table is multiplied once, as the head
    weights = 16 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192) + 128256 * 2048
    assert [rent.flop(small, method, reread) // weights for method in ("lora", "full") for reread in (False, True)] == [4, 6, 6, 8]
    assert rent.flop(small, "full") % weights == 0


def test_hours_money_and_energy_follow_from_the_inputs():
    given = rent.Assumptions(utilisation=0.5, scaling=1.0, overhead=1.0, dollars=2.0)
    plan = rent.plan(SEVEN, "qlora", "H100", 1e9, cards=4, given=given)
    weights = PUBLISHED[SEVEN] - 32768 * 4096 - 65 * 4096  # without embeddings and norms
    hours = 1e9 * 6 * weights / (4 * 0.5 * 989e12) / 3600
    assert plan["hours"] == pytest.approx(hours) and plan["dollars"] == pytest.approx(hours * 4 * 2) and plan["kWh"] == pytest.approx(hours * 4 * 0.7)
    half = rent.plan(SEVEN, "qlora", "H100", 1e9, cards=4, given=replace(given, scaling=0.5))
    assert half["hours"] == pytest.approx(2 * hours) and half["dollars"] == pytest.approx(2 * plan["dollars"])
    alone = rent.plan(SEVEN, "qlora", "H100", 1e9, cards=1, given=replace(given, scaling=0.5))
    assert alone["hours"] == pytest.approx(4 * hours)  # one card loses nothing to others


def test_cut_over_cards_what_lives_between_steps_is_a_part_and_the_texts_are_not():
    config, given = rent.shape("Llama-3-70B"), rent.Assumptions()
    one, eight = (rent.memory(config, "full", n, given) for n in (1, 8))
    assert eight["weights"] == one["weights"] // 8 and eight["optimizer states"] == one["optimizer states"] // 8 and "gathered" not in one
    layer = 8192 * (2 * 8192 + 2 * 1024 + 3 * 28672) * 2
    assert eight["gathered"] == pytest.approx(2 * (2 * layer + 2 * 128256 * 8192 * 2), rel=1e-3)
    many = rent.memory(config, "full", 64, given)  # 2 bytes a weight and AdamW's 8, in 64 parts (Rajbhandari et al. 2020)
    assert many["weights"] + many["optimizer states"] == pytest.approx(10 * 70_553_706_496 / 64, rel=1e-6)


@pytest.mark.parametrize(
    ("model", "method", "card", "cards"),
    [(SEVEN, "qlora", "T4", 1), (SEVEN, "lora", "L4", 1), (SEVEN, "full", "H200", 1), (SEVEN, "full", "A100 80GB", 2), ("Llama-3-70B", "qlora", "A100 80GB", 1),
     ("Llama-3-70B", "lora", "H100", 4), ("Llama-3-70B", "full", "H200", 8), ("Llama-3-70B", "full", "L4", None), (SEVEN, "full", "T4", None)],
)  # fmt: skip
def test_the_fewest_cards_are_enough_and_half_of_them_are_not(model, method, card, cards):
    config = rent.shape(model)
    assert rent.fewest(config, method, card) == cards
    if cards:
        assert rent.fits(config, method, card, cards) and (cards == 1 or not rent.fits(config, method, card, cards // 2))


REFUSED = {
    "an unknown card": (lambda: rent.plan(SEVEN, "lora", "B9000", 1e6), "Unknown card 'B9000': there are T4, L4, A100 40GB"),
    "an unknown model": (lambda: rent.plan("gpt-9", "lora", "T4", 1e6), "Unknown model 'gpt-9': there are Llama-3.2-1B"),
    "an unknown method": (lambda: rent.plan(SEVEN, "magic", "L4", 1e6), "method must be full, lora or qlora, not 'magic'"),
    "no card": (lambda: rent.memory(rent.shape(SEVEN), "lora", 0), "at least one card, not 0"),
    "too small a card": (lambda: rent.plan(SEVEN, "full", "H100", 1e6, cards=1), "needs 88.2 GB on each of 1 H100, most of it optimizer states, and 72.0 are there"),
    "a card on which no number is enough": (lambda: rent.plan("Llama-3-70B", "full", "L4", 1e6), "on each of 64 L4, most of it gathered"),
    "float16 in full": (lambda: rent.plan(SEVEN, "full", "T4", 1e6), "A T4 has no bfloat16 units"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_had_gets_a_sentence(what):
    act, says = REFUSED[what]
    with pytest.raises(CourseError, match=re.escape(says)):
        act()


def test_a_card_of_ones_own_is_one_line(monkeypatch):
    monkeypatch.setitem(rent.CARDS, "mine", rent.Card(48, 200, 300, 1.0, "a friend", "2026-11-30"))
    assert rent.plan(SEVEN, "lora", "mine", 1e6)["cards"] == 1


def test_every_price_has_a_source_and_a_date():
    assert all(card.price and card.date.startswith("2026-") and 0 < card.dollars < 10 for card in rent.CARDS.values())
