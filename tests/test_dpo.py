"""Notebook 04: pairs and their errors, log-probabilities, the same loss as TRL's, the cure of its rounding, whole runs, what came of them."""

import contextlib
import dataclasses
import json
import math
import types

import pytest

from course import measure, sweeps
from helpers import adapters, dense, dpo, flights, generation, models, preferences, recipes, runtime, scoreboard, training
from helpers.dpo import DPORecipe
from helpers.files import CourseError
from helpers.recipes import SFTRecipe
from helpers.runtime import ROOT

pytestmark = pytest.mark.usefixtures("short_model")
TINY = SFTRecipe(steps=2, rank=4, alpha=8, batch_size=2, warmup_steps=0, examples=8)
PAIRS = [
    {"prompt": "flights in May?", "chosen": "SELECT COUNT(*) AS flights FROM flights WHERE month = 5", "rejected": "SELECT COUNT(*) FROM flights"},
    {
        "prompt": "the longest flight",
        "chosen": "SELECT MAX(air_time) AS max_air_time_min FROM flights",
        "rejected": "SELECT MAX(air_time) FROM flights",
    },
    {
        "prompt": "which airports do planes leave from, please?",
        "chosen": "SELECT DISTINCT origin FROM flights ORDER BY origin",
        "rejected": "SELECT 1",
    },
    {"prompt": "who won?", "chosen": flights.REFUSAL, "rejected": "SELECT carrier, COUNT(*) FROM flights GROUP BY carrier ORDER BY COUNT(*) DESC"},
]
GOOD = b'{"prompt": "how many?", "chosen": "SELECT COUNT(*) AS flights FROM flights", "rejected": "SELECT COUNT(*) FROM flights"}\n'
READ = {"prompt": "how many?", "chosen": "SELECT COUNT(*) AS flights FROM flights", "rejected": "SELECT COUNT(*) FROM flights"}


def training_row(name: str) -> dict:
    return next(row for row in flights.load_questions("train") if row["id"] == name)


# ---------------------------------------------------------------- the recipe


def test_key_changes_with_the_recipe_the_pairs_and_the_start(monkeypatch, tmp_path):
    for name in ("style", "correctness"):
        (tmp_path / f"{name}.jsonl").write_bytes(GOOD)
    monkeypatch.setattr(dpo, "PREFERENCES", tmp_path)
    recipe = DPORecipe()
    changes = (
        {},
        {"beta": 0.2},
        {"method": "sft"},
        {"seed": 1},
        {"steps": 3},
        {"pairs": "correctness"},
        {"start": SFTRecipe(seed=1)},
        {"sft_weight": 1.0},
    )
    keys = {dataclasses.replace(recipe, **change).key() for change in changes}
    assert len(keys) == len(changes) and all(len(key) == 10 and not set(key) - set("0123456789abcdef") for key in keys)
    before = recipe.key()
    assert DPORecipe().key() == before
    assert recipe.folder() == runtime.runs_dir() / f"dpo-{before}"
    (tmp_path / "style.jsonl").write_bytes(GOOD + b"\n")
    assert recipe.key() != before
    (tmp_path / "style.jsonl").write_bytes(GOOD)
    assert recipe.key() == before
    monkeypatch.setattr(dpo, "PROBE", dpo.PROBE + 1)
    assert recipe.key() != before
    monkeypatch.undo()
    monkeypatch.setattr(flights, "SYSTEM_PROMPT", "Other.")  # decides the start
    assert DPORecipe().key() != DPORecipe(start=SFTRecipe(seed=1)).key() != before


# ---------------------------------------------------------------- pairs from answers


BARE = "SELECT carrier, AVG(dep_delay) FROM flights WHERE origin = 'LGA' GROUP BY carrier"
HALF = "SELECT carrier, AVG(dep_delay) AS delay FROM flights WHERE origin = 'LGA' GROUP BY carrier"
FULL = (
    "SELECT carrier, ROUND(AVG(dep_delay), 1) AS avg_dep_delay_min FROM flights WHERE origin = 'LGA' GROUP BY carrier ORDER BY avg_dep_delay_min DESC"
)
FULLER = FULL.replace("carrier, ROUND", "carrier, airline, ROUND") + " LIMIT 20"  # by the held-out rules alone
DRESSED_ERROR = FULL.replace("dep_delay", "arr_delay")


@pytest.fixture(scope="module")
def by_airline():
    row = training_row("train-2140")
    assert row["question"] == "avg dep delay by carrier LGA" and row["sql"] == BARE
    return row


def test_judged_marks_each_different_answer_once(by_airline):
    found = preferences.judged(by_airline, [BARE, HALF, BARE, FULLER, DRESSED_ERROR, flights.REFUSAL, "SELECT nothing FROM flights"])
    assert [a["answer"] for a in found] == [BARE, HALF, FULLER, DRESSED_ERROR, flights.REFUSAL, "SELECT nothing FROM flights"]
    assert [a["correct"] for a in found] == [True, True, True, False, False, False]
    assert [a["style"] for a in found] == [0.0, 0.25, 1.0, 0.0, 0.0, 0.0]
    assert found[1]["kept"] == {"alias": True, "unit": False, "decimal": False, "order": False, "names": False, "limit": False}
    assert found[3]["kept"] == {}


def test_a_style_pair_is_the_most_styled_right_answer_against_the_least(by_airline):
    expected = {"id": "train-2140", "intent": "delay_by_airline", "prompt": "avg dep delay by carrier LGA", "chosen": FULL, "rejected": BARE}
    assert preferences.style_pair(by_airline, [HALF, DRESSED_ERROR, FULL, BARE, "no idea"]) == expected
    assert preferences.style_pair(by_airline, [HALF, FULL]) == expected | {"rejected": HALF}
    for none in ([BARE], [BARE, BARE], [FULL, DRESSED_ERROR], [DRESSED_ERROR, flights.REFUSAL], []):
        assert preferences.style_pair(by_airline, none) is None


def test_held_out_rules_alone_never_make_a_pair(by_airline):
    assert preferences.style_pair(by_airline, [FULL, FULLER]) is None and preferences.style_pair(by_airline, [FULLER, FULL]) is None
    marks = [a["kept"] for a in preferences.judged(by_airline, [FULL, FULLER])]
    assert [(m["names"], m["limit"]) for m in marks] == [(False, False), (True, True)]
    row = training_row("train-3740")
    plain = "SELECT dest FROM flights WHERE origin = 'EWR' GROUP BY dest ORDER BY COUNT(*) DESC LIMIT 2"
    assert row["sql"] == plain
    named = plain.replace("SELECT dest FROM", "SELECT dest, dest_city FROM")
    assert [a["kept"]["names"] for a in preferences.judged(row, [plain, named])] == [False, True]
    assert preferences.style_pair(row, [plain, named]) is None


def test_a_correctness_pair_is_the_first_right_answer_against_the_first_wrong_one(by_airline):
    made = preferences.correctness_pair(by_airline, [DRESSED_ERROR, HALF, "no idea", FULL])
    assert made == {
        "id": "train-2140",
        "intent": "delay_by_airline",
        "prompt": "avg dep delay by carrier LGA",
        "chosen": HALF,
        "rejected": DRESSED_ERROR,
    }
    assert preferences.correctness_pair(by_airline, [BARE, FULL]) is None and preferences.correctness_pair(by_airline, [DRESSED_ERROR, "no idea"]) is None


# ---------------------------------------------------------------- pairs from files


def write(tmp_path, content: bytes):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("change", [lambda c: c, lambda c: c.replace(b"\n", b"\r\n"), lambda c: b"\xef\xbb\xbf" + c + b"\n\n"])
def test_your_own_pairs_are_read(tmp_path, change):
    assert dpo.load_pairs(write(tmp_path, change(GOOD))) == [READ]


def test_committed_pairs_are_read_by_name():
    assert dpo.load_pairs("off_policy") == dpo.load_pairs(dpo.PREFERENCES / "off_policy.jsonl") != dpo.load_pairs("style")


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (b'{"prompt": "x", "chosen": "SELECT 1", "rejected": "SELECT 1"}', ["'chosen' and 'rejected' are the same text", "remove the line"]),
        (b'{"prompt": "x", "chosen": "SELECT 1", "rejected": "  SELECT 1 "}', ["'chosen' and 'rejected' are the same text", "remove the line"]),
        (b'{"prompt": "x", "chosen": "", "rejected": "SELECT 1"}', ["'chosen' is empty", "fill it in or remove the line"]),
        (b'{"prompt": "x", "chosen": "SELECT 1", "rejected": " "}', ["'rejected' is empty", "fill it in or remove the line"]),
        (b'{"prompt": "", "chosen": "SELECT 1", "rejected": "SELECT 2"}', ["'prompt' is empty", "fill it in or remove the line"]),
        (b'{"prompt": "x", "chosen": "SELECT 1"}', ["'rejected' is missing", "add it"]),
        (b'{"question": "x", "chosen": "SELECT 1", "rejected": "SELECT 2"}', ["'prompt' is missing", "add it"]),
        (b'{"prompt": "x", "chosen": ["SELECT 1"], "rejected": "SELECT 2"}', ["'chosen' is a list, not text", "double quotes"]),
        (b'{"prompt": "x", "chosen"', ["not JSON", "check quotes"]),
    ],
)
def test_a_bad_pair_is_named_with_its_line_and_remedy_and_nothing_is_loaded(tmp_path, bad, says):
    with pytest.raises(CourseError) as error:
        dpo.load_pairs(write(tmp_path, GOOD + bad + b"\n" + GOOD.replace(b"how many", b"how few")))
    for words in ["mine.jsonl was not loaded, nothing of it", "line 2: ", *says]:
        assert words in str(error.value)
    assert not any(f"  line {n}:" in str(error.value) for n in (1, 3)) and str(tmp_path) not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\n\r\n"])
def test_a_file_without_pairs(tmp_path, content):
    with pytest.raises(CourseError, match="mine.jsonl was not loaded.*\n.*line 1: no rows; .*with the fields prompt, chosen, rejected"):
        dpo.load_pairs(write(tmp_path, content))


def test_a_pairs_file_that_is_not_there(tmp_path):
    with pytest.raises(CourseError, match="Can't read styles: No such file"):
        dpo.load_pairs(tmp_path / "styles")


class Words:
    """A tokenizer of words: each message is its role, its words and an end."""

    def apply_chat_template(self, chat, add_generation_prompt=False, return_dict=True):
        tokens = [word for m in chat for word in (m["role"], *m["content"].split(), "end")]
        return {"input_ids": tokens + ["assistant"] * add_generation_prompt}


def test_a_pair_that_does_not_fit_is_named_with_its_side():
    short, prompt = {"prompt": "q", "chosen": "a b", "rejected": "c"}, {"prompt": "one two three", "chosen": "a", "rejected": "b"}
    # system, "Answer with SQL." and end: 5; user, q, end, assistant: 4; then "a b" and end: 3
    dpo.check_lengths([short], Words(), 12)
    with pytest.raises(
        CourseError, match=r"^Pair 1: prompt \(9 tokens\) and chosen answer \(3\) don't fit into max_length = 11 tokens; shorten the pair or"
    ):
        dpo.check_lengths([short], Words(), 11)
    with pytest.raises(CourseError, match=r"^Pair 2: prompt \(9 tokens\) and rejected answer \(4\) don't fit into max_length = 12"):
        dpo.check_lengths([short, short | {"rejected": "c d e"}], Words(), 12)
    with pytest.raises(CourseError, match=r"^Pair 2: prompt \(11 tokens\) and chosen answer \(2\) don't fit"):  # the prompt fills the context
        dpo.check_lengths([short, prompt], Words(), 12)
    with pytest.raises(CourseError, match=r"Pair 1: .* max_length = 11"):
        dpo.make_trainer(DPORecipe(max_length=11), None, Words(), [short] * (dpo.PROBE + 1))


def test_a_trainer_that_cannot_be_made():
    with pytest.raises(CourseError, match="^32 pairs are too few: 32 of them are kept aside to be watched. Make more"):
        dpo.make_trainer(DPORecipe(), None, None, PAIRS * 8)
    with pytest.raises(CourseError, match="^Unknown method 'magic': dpo or sft"):
        dpo.make_trainer(DPORecipe(method="magic"), None, Words(), PAIRS * 9)


def test_an_adapter_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(
        CourseError, match=r"^There is no adapter in nothing/: training.sft_adapter\(\) and dpo.adapter\(\) train theirs when missing"
    ) as error:
        adapters.load_adapter(tmp_path / "nothing")
    assert str(tmp_path) not in str(error.value)


# ---------------------------------------------------------------- what came of it


def record(name: str, correct: bool, kept=None, **more) -> dict:
    return {"id": name, "intent": "count", "phrasing": f"count/{name}", "correct": correct, "kept": kept or {}} | more


def test_with_style_gives_right_answers_their_marks():
    rows = [
        {"id": "a", "correct": True, "sql": "SELECT MAX(air_time) AS max_air_time_min FROM flights"},
        {"id": "b", "correct": True, "sql": "SELECT dest, AVG(distance) FROM flights WHERE month = 5 GROUP BY dest"},
        {"id": "c", "correct": False, "sql": "SELECT MAX(air_time) AS max_air_time_min FROM flights"},
        {"id": "d", "correct": True, "sql": ""},  # a refusal
        {"id": "e", "correct": True, "sql": "SELECT nothing FROM flights"},
    ]
    styled = preferences.with_style(rows)
    assert [{k: v for k, v in s.items() if k != "kept"} for s in styled] == rows
    assert [s["kept"] for s in styled] == [
        {"alias": True, "unit": True},
        {"alias": False, "unit": False, "decimal": False, "order": False, "names": False, "limit": False},
        {},
        {},
        {},
    ]


def test_share_and_style_scores():
    mixed = {"alias": True, "unit": False, "names": True}
    assert preferences.share(mixed) == pytest.approx(2 / 3)
    assert preferences.share(mixed, ("alias", "unit")) == 0.5 and preferences.share(mixed, ("names",)) == 1.0 and preferences.share(mixed, ("order",)) == preferences.share({}) == 1.0
    records = [record("a", True, mixed), record("b", False, {"alias": True}), record("c", True)]  # a right refusal keeps what applies: nothing
    assert preferences.style_scores(records) == [pytest.approx(2 / 3), 0.0, 1.0]
    assert preferences.style_scores(records, ("unit",)) == [0.0, 0.0, 1.0]


def test_wins_over_seeds_with_ties_counted():
    full, half, none = {"alias": True, "unit": True}, {"alias": True, "unit": False}, {"alias": False, "unit": False}
    mine = [
        [record("a", True, full), record("b", True, half), record("c", False), record("d", True, half)],
        [record("a", True, full), record("b", True, full), record("c", True, full), record("d", False)],
    ]
    theirs = [
        [record("a", True, none), record("b", True, full), record("c", True, half), record("d", True, none)],
        [record("a", True, half), record("b", False, full), record("c", True, full), record("d", False)],
    ]
    rate, counts = preferences.wins(mine, theirs)
    assert counts == {"win": 3, "tie": 1, "loss": 1, "not both right": 3}
    assert (rate.n, rate.correct, rate.accuracy) == (4, 3, 0.75) and rate.low < 0.75 <= rate.high
    assert preferences.wins(theirs, mine)[1] == {"win": 1, "tie": 1, "loss": 3, "not both right": 3}
    # by `unit` alone d's half ties with none
    assert preferences.wins(mine, theirs, ("unit",))[1] == {"win": 2, "tie": 2, "loss": 1, "not both right": 3}
    assert preferences.wins(mine, mine) == (None, {"win": 0, "tie": 6, "loss": 0, "not both right": 2})
    with pytest.raises(ValueError):
        preferences.wins(mine, theirs[:1])


def test_wins_keep_all_seeds_of_a_phrasing_together():
    mine, theirs = [[record("a", True, {"alias": True})]] * 3, [[record("a", True, {"alias": False})]] * 3
    rate, counts = preferences.wins(mine, theirs)
    assert counts == {"win": 3, "tie": 0, "loss": 0, "not both right": 0}
    assert (rate.n, rate.accuracy, rate.low, rate.high) == (3, 1.0, 0.025, 1.0)  # the bound of one trial, not of three


# ---------------------------------------------------------------- the committed pairs


@pytest.mark.slow
def test_every_committed_pair_is_as_it_says():
    assert preferences.problems() == []


@pytest.mark.parametrize("name", ["style", "correctness", "off_policy"])
def test_a_broken_pair_is_found(monkeypatch, name):
    first, second, third = dpo.load_pairs(name)[:3]
    swapped = second | {"chosen": second["rejected"], "rejected": second["chosen"]}
    strange = third | {"prompt": "What is the capital of France?"}
    monkeypatch.setattr(dpo, "load_pairs", lambda source: [first, swapped, strange] if source == name else [])
    found = preferences.problems()
    assert len(found) == 2 and found[0].startswith(f"{name} line 2: chosen {{'answer': ") and found[1] == f"{name} line 3: not a training question"
    monkeypatch.setattr(dpo, "load_pairs", lambda source: [first, second, third] if source == name else [])
    assert preferences.problems() == []


def test_committed_pairs_ask_training_questions_only():
    train = {row["id"]: row for row in flights.load_questions("train")}
    others = {row["question"].lower().strip(" ?.") for split in flights.SPLITS if split != "train" for row in flights.load_questions(split)}
    for name in dpo.CONSTRUCTIONS:
        pairs = dpo.load_pairs(name)
        assert len(pairs) > dpo.PROBE and len({p["id"] for p in pairs}) == len(pairs), name
        assert set(map(frozenset, pairs)) == {frozenset({"id", "intent", "prompt", "chosen", "rejected"})}
        for p in pairs:
            row = train[p["id"]]
            assert (p["prompt"], p["intent"]) == (row["question"], row["intent"]) and row["sql"] != flights.REFUSAL
            assert p["prompt"].lower().strip(" ?.") not in others


def test_off_policy_pairs_are_the_style_pairs_rewritten():
    style, off = ({p["id"]: p for p in dpo.load_pairs(name)} for name in ("style", "off_policy"))
    assert off == {name: preferences.off_policy_pair(p) for name, p in style.items()}
    assert all(off[name]["chosen"] != p["chosen"] for name, p in style.items())
    query = "SELECT carrier, COUNT(*) AS n FROM flights WHERE month = 5 GROUP BY carrier ORDER BY n DESC"
    assert preferences.foreign(query) == (
        "SELECT\n  f.carrier,\n  COUNT(*) AS n\nFROM flights AS f\nWHERE\n  f.month = 5\nGROUP BY\n  f.carrier\nORDER BY\n  n DESC"
    )


def test_questions_that_are_asked_for_pairs_are_answerable_training_questions():
    asked, train = preferences.questions(), {row["id"]: row for row in flights.load_questions("train")}
    assert len(asked) == 1000 == len({row["id"] for row in asked})
    assert all(row == train[row["id"]] and row["sql"] != flights.REFUSAL for row in asked)
    assert {p["id"] for name in dpo.CONSTRUCTIONS for p in dpo.load_pairs(name)} <= {row["id"] for row in asked}


# ---------------------------------------------------------------- sweeps


def test_house_score_is_the_mean_share_of_paired_rules_and_0_for_a_wrong_answer():
    records = [
        record("a", True, {"alias": True, "unit": True, "decimal": False, "order": True, "names": False, "limit": False}),
        record("b", True, {"alias": False, "limit": True}),
        record("c", False),
        record("d", True, {"names": False}),  # no paired rule applies
    ]
    assert sweeps.house_score(records) == pytest.approx((0.75 + 0 + 0 + 1) / 4)


def test_house_score_reads_records_as_run_point_stores_them():
    """A right answer to which no rule applies (one month, say): `run_point` leaves out fields that are empty."""
    stored = [{"id": "a", "correct": True, "kind": "right"}, {"id": "b", "correct": True, "kind": "right", "kept": {"alias": False}}]
    assert sweeps.house_score(stored) == 0.5


def searched(best: dict[str, int], wrong: int | None = None) -> list[dict]:
    """A made-up search on 50 questions, the start with 40 right: all points keep one rule of two, but for each arm's best, which
    keeps both, at the cost of one answer; the point `wrong` of DPO's grid keeps both as well, at the cost of two."""

    def run(arm, recipe, marks, right):
        point = {"stage": arm, "seed": 0, "recipe": recipe}
        records = [record(str(i), i < right, marks if i < right else {}) for i in range(50)]
        return {"stage": arm, "seed": 0, "key": sweeps.key("preference_search", point), "splits": {"validation": {"records": records}}}

    def result(arm, i):
        both = i == best.get(arm) or (arm, i) == ("dpo", wrong)  # a held-out rule counts nothing
        return {"alias": True, "unit": both, "names": not both}, 38 if (arm, i) == ("dpo", wrong) else 39 if both else 40

    grid = [run(arm, recipe, *result(arm, i)) for arm, recipes_ in sweeps.PREFERENCE.items() for i, recipe in enumerate(recipes_)]
    return [run("sft", sweeps.START, {"alias": True, "unit": False}, 40), *grid]


def keep(folder, runs):
    (folder / "preference_search.json").write_text(json.dumps({"sweep": "preference_search", "runs": runs}), encoding="utf-8")


def test_preference_arms_wait_for_the_search_and_then_take_its_best(monkeypatch, tmp_path):
    monkeypatch.setattr(scoreboard, "RESULTS", tmp_path)
    only = {"sft": sweeps.START}
    assert sweeps.chosen_preference("dpo") is sweeps.chosen_preference("control") is None and sweeps.preference_arms() == only
    runs = searched({"dpo": 4, "control": 1})
    last = sweeps.key("preference_search", {"stage": "control", "recipe": sweeps.PREFERENCE["control"][-1]})
    keep(tmp_path, [run for run in runs if run["key"] != last])  # the control's grid lacks a point
    assert sweeps.chosen_preference("dpo") == sweeps.PREFERENCE["dpo"][4] and sweeps.chosen_preference("control") is None
    assert sweeps.preference_arms() == only
    keep(tmp_path, runs)
    best, control = sweeps.PREFERENCE["dpo"][4], sweeps.PREFERENCE["control"][1]
    assert sweeps.chosen_preference("control") == control and control.method == "sft"
    assert sweeps.preference_arms() == only | {
        "dpo, TRL's defaults": DPORecipe(learning_rate=1e-6, beta=0.1),
        "dpo": best,
        "control": control,
        "dpo, right against wrong": dataclasses.replace(best, pairs="correctness"),
        "dpo, off-policy": sweeps.PREFERENCE["dpo, off-policy"][-1],
    }
    planned = [(p["stage"], p["seed"]) for p in sweeps.plan()["preference"]]
    assert len(planned) == len(set(planned)) == 16 and [seed for stage, seed in planned if stage == "sft"] == [0]
    assert all(p["recipe"].seed == p["seed"] for p in sweeps.plan()["preference"])
    keep(tmp_path, searched({"dpo": 7, "control": 0}))
    assert sweeps.chosen_preference("dpo") == sweeps.PREFERENCE["dpo"][7] and sweeps.chosen_preference("control") == sweeps.PREFERENCE["control"][0]
    keep(tmp_path, searched({"dpo": -1, "control": 0}, wrong=2))  # the best style has lost too much: any other is better
    assert sweeps.chosen_preference("dpo") != sweeps.PREFERENCE["dpo"][2]
    keep(tmp_path, runs[1:])  # the start is missing
    assert sweeps.chosen_preference("dpo") is None
    keep(tmp_path, [run | {"key": "0123456789"} for run in runs])  # stale: of other recipes
    assert sweeps.chosen_preference("dpo") is None


# ---------------------------------------------------------------- with the model


def with_adapter(bits: int, dtype=None):
    """The course model with a trained adapter's stand-in on it: B at random, of about a trained one's size."""
    import torch
    from peft import get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(models.load_model(bits, dtype), recipes.lora_config(dataclasses.replace(TINY, rank=16, alpha=32))).train()
    shake(model)
    return model


def shake(model, std: float = 0.02):
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                parameter += std * torch.randn(parameter.shape)


def looked_at(trainer) -> dict:
    """The metrics that the trainer has gathered, as it logs them."""
    trainer.log({})
    return trainer.state.log_history[-1]


@pytest.mark.slow
def test_log_probs_are_sums_over_the_answer_and_its_end_of_turn(tokenizer):
    import torch

    model = with_adapter(16, torch.float32)
    shake(model, 0.3)  # so hard that not even the line end that closes a turn is sure: each token counts
    prompts, answers = zip(*[(p["prompt"], p[side]) for p in PAIRS[:3] for side in ("chosen", "rejected")], strict=True)
    expected = []
    for prompt, answer in zip(prompts, answers, strict=True):
        head = f"<|im_start|>system\nAnswer with SQL.<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        head, tail = (tokenizer(text, add_special_tokens=False).input_ids for text in (head, f"{answer}<|im_end|>\n"))
        ids = torch.tensor([head + tail])
        with torch.no_grad():
            table = model(ids).logits[0, :-1].log_softmax(-1)
        expected.append(sum(float(table[at - 1, ids[0, at]]) for at in range(len(head), len(head) + len(tail))))
        assert table[-1, ids[0, -1]] < -0.1
    assert len({len(tokenizer(a).input_ids) for a in answers}) > 2  # there is padding
    for size in (1, 4, 16):
        assert dpo.log_probs(model, tokenizer, prompts, answers, batch_size=size) == pytest.approx(expected, abs=2e-3)
    with model.disable_adapter():
        assert dpo.log_probs(model, tokenizer, prompts[:1], answers[:1])[0] != pytest.approx(expected[0], abs=0.1)  # it was the adapter's


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_our_cpu_loss_is_trls_loss_and_the_formula(tmp_path, tokenizer, weight):
    """In float32, on an unquantized base, the same batch: loss, rewards and gradients; `weight` is that of an SFT term."""
    import torch
    from trl import DPOTrainer

    recipe, results = DPORecipe(sft_weight=weight, beta=0.3), []
    for kind in (DPOTrainer, dpo.cpu_trainer_class()):
        args = dpo.dpo_config(recipe, tmp_path, bf16=False, fp16=False)
        assert args.loss_type == (["sigmoid", "sft"] if weight else ["sigmoid"])
        built = kind(model=with_adapter(16, torch.float32), args=args, train_dataset=dpo.pair_set(PAIRS), processing_class=tokenizer)
        torch.manual_seed(1)
        shake(built.model, 0.01)  # away from the reference
        batch = built.data_collator([built.train_dataset[i] for i in range(4)])
        built.share_prefix = kind is not DPOTrainer  # as in `fit`
        with dense.training(built.model) if built.share_prefix else contextlib.nullcontext():
            loss = built.compute_loss(built.model, batch)
            loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in built.model.parameters() if p.grad is not None])
        results.append((loss.detach(), gradient, looked_at(built)))
    theirs, ours = results
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-3, atol=1e-4)
    assert len(ours[1]) == 651_264 and theirs[1].abs().max() > 0.01
    compared = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
    assert {k: ours[2][k] for k in compared} == pytest.approx({k: theirs[2][k] for k in compared}, rel=1e-4, abs=1e-4)
    unread = {"entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"}
    assert unread <= set(theirs[2]) and not unread & set(ours[2])

    prompts, chosen, rejected = ([p[side] for p in PAIRS] for side in ("prompt", "chosen", "rejected"))
    policy = [dpo.log_probs(built.model, tokenizer, prompts, side) for side in (chosen, rejected)]
    built.model.set_adapter("ref")
    reference = [dpo.log_probs(built.model, tokenizer, prompts, side) for side in (chosen, rejected)]
    margins = [0.3 * ((c - rc) - (r - rr)) for c, r, rc, rr in zip(*policy, *reference, strict=True)]
    tokens = sum(len(tokenizer(text + "<|im_end|>\n", add_special_tokens=False).input_ids) for text in chosen)
    expected = sum(math.log1p(math.exp(-m)) for m in margins) / 4 - weight * sum(policy[0]) / tokens
    assert min(map(abs, margins)) > 1e-3
    assert float(ours[0]) == pytest.approx(expected, abs=1e-4) and ours[2]["rewards/margins"] == pytest.approx(sum(margins) / 4, abs=1e-3)


@pytest.mark.slow
def test_the_first_margin_is_0_only_because_trls_rounding_is_undone(tmp_path, tokenizer, monkeypatch):
    """TRL copies the adapter as the reference and then rounds the trained one: without the cure they differ from the start."""
    monkeypatch.setattr(dpo, "PROBE", 2)
    margins = {}
    for cured in (True, False):
        if not cured:
            monkeypatch.setattr(training, "restore_float32", lambda *args: None)
        built = dpo.make_trainer(DPORecipe(batch_size=4), with_adapter(4), tokenizer, [*PAIRS, *PAIRS[:2]], tmp_path)
        trained = {n: p for n, p in built.model.named_parameters() if p.requires_grad}
        assert trained and all(".default." in n for n in trained)
        batch = built.data_collator([built.train_dataset[i] for i in range(4)])
        loss = float(built.compute_loss(built.model, batch).detach())
        margins[cured] = abs(looked_at(built)["rewards/margins"])
        if cured:
            assert {p.dtype.itemsize for p in trained.values()} == {4}
            assert all(p.equal(built.model.get_parameter(n.replace(".default.", ".ref."))) for n, p in trained.items())
            assert loss == pytest.approx(math.log(2), abs=1e-6)
    assert margins[True] < 1e-6 < margins[False], margins


@pytest.fixture(scope="module")
def answered(short_model):
    """A 4-bit model that has answered; skipped where bitsandbytes doesn't pack its weights for that (no AVX-512 BF16, or a GPU)."""
    runtime.setup()
    model, tokenizer = models.load_model(4), models.load_tokenizer()
    training.check_unpacked(model)  # a fresh one may be trained
    generation.generate(model, tokenizer, [flights.chat("hello")], max_new_tokens=2)
    if not any(getattr(getattr(p, "quant_state", None), "packing_format_for_cpu", False) for p in model.parameters()):
        pytest.skip("nothing is packed on this processor")
    return model


@pytest.mark.slow
def test_a_4_bit_model_that_has_answered_is_not_trained(tmp_path, tokenizer, answered, monkeypatch):
    from peft import get_peft_model

    monkeypatch.setattr(dpo, "PROBE", 2)
    refused = "has answered questions on a CPU and can't be trained any more: load a fresh one and train that"
    with pytest.raises(CourseError, match=refused):
        training.make_trainer(TINY, answered, tokenizer, [{"question": "a", "sql": "b"}], tmp_path)
    tuned = get_peft_model(answered, recipes.lora_config(TINY))
    for method in ("dpo", "sft"):
        with pytest.raises(CourseError, match=refused):
            dpo.make_trainer(DPORecipe(method=method), tuned, tokenizer, PAIRS, tmp_path)


@pytest.mark.slow
def test_watching_never_packs_the_weights_that_are_to_be_trained(tmp_path, tokenizer, answered, monkeypatch):
    """Not even where the model comes as one that answers: transformers calls `on_train_begin` before it sets the model to training."""
    monkeypatch.setattr(dpo, "PROBE", 2)
    built = dpo.make_trainer(DPORecipe(), with_adapter(4).eval(), tokenizer, PAIRS, tmp_path)
    built.callback_handler.on_train_begin(built.args, built.state, built.control)
    assert built.state.log_history[-1].keys() == {"step", "probe/chosen", "probe/rejected"}
    training.check_unpacked(built.model)


@pytest.fixture(scope="module")
def started(tmp_path_factory, short_model):
    """A runs folder in which the tiny starting adapter is trained."""
    folder = tmp_path_factory.mktemp("started")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSE_RUNS", str(folder))
        runtime.setup()
        training.sft_adapter(TINY)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_a_whole_run(tmp_path, started, tokenizer, monkeypatch, capsys, method):
    from safetensors.torch import load_file

    monkeypatch.setenv("COURSE_RUNS", str(started))
    monkeypatch.setattr(dpo, "PROBE", 4)
    monkeypatch.setattr(dpo, "PREFERENCES", tmp_path)
    pairs = dpo.load_pairs(ROOT / "data" / "preferences" / "style.jsonl")[:10]
    (tmp_path / "style.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs), encoding="utf-8")
    recipe, finish, seen = DPORecipe(start=TINY, method=method, learning_rate=2e-3, steps=2, batch_size=2), training.finish, types.SimpleNamespace()

    def looking(trainer):
        seen.trainer, seen.before = trainer, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        return finish(trainer)

    monkeypatch.setattr(training, "finish", looking)
    folder = dpo.adapter(recipe)
    assert folder == started / f"dpo-{recipe.key()}" / "adapter" and len(seen.trainer.train_dataset) == 6

    # only LoRA's parameters have changed, and the reference hasn't
    model, start = seen.trainer.model, load_file(training.sft_adapter(TINY) / "adapter_model.safetensors")
    changed = {n for n, p in model.named_parameters() if not p.equal(seen.before[n])}
    assert any("lora_A.default" in n for n in changed) and any("lora_B.default" in n for n in changed)
    assert all("lora_" in n and ".default." in n for n in changed)
    copies = {n.replace(".ref.", "."): p for n, p in model.named_parameters() if ".ref." in n}
    assert copies.keys() == (start.keys() if method == "dpo" else set()) and all(p.equal(start[n]) for n, p in copies.items())
    assert all(seen.before[n.replace(".weight", ".default.weight")].equal(p) for n, p in start.items())

    # what was watched
    history = json.loads((folder.parent / "history.json").read_text(encoding="utf-8"))["history"]
    probes = [h for h in history if "probe/chosen" in h]
    assert [h["step"] for h in probes] == [0, 2] and [h["step"] for h in history if "loss" in h] == [1, 2]
    for side in ("chosen", "rejected"):
        assert probes[0][f"probe/{side}"] != probes[1][f"probe/{side}"]
        values = dpo.log_probs(model, tokenizer, [p["prompt"] for p in pairs[-4:]], [p[side] for p in pairs[-4:]])
        assert probes[1][f"probe/{side}"] == pytest.approx(sum(values) / 4, rel=1e-2)
    if method == "dpo":
        first = next(h for h in history if "loss" in h)
        assert float(first["loss"]) == pytest.approx(math.log(2), abs=1e-4) and abs(float(first["rewards/margins"])) < 1e-4
    assert seen.trainer.state.num_input_tokens_seen > 0

    # what was exported
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert "/" not in (folder / "adapter_config.json").read_text(encoding="utf-8").replace("HuggingFaceTB/SmolLM2", "")
    exported = load_file(folder / "adapter_model.safetensors")
    assert exported.keys() == start.keys() and not any("ref" in name or "default" in name for name in exported)
    assert all(model.get_parameter(n.replace(".weight", ".default.weight")).equal(p) for n, p in exported.items())

    # a second time
    def never(*args, **kwargs):
        raise AssertionError("it was trained again")

    monkeypatch.setattr(training, "fit", never)
    again = dpo.make_trainer(recipe, dpo.start_model(recipe), tokenizer)
    assert finish(again)["history"] == history and "trained before" in capsys.readouterr().out
    assert all(again.model.get_parameter(n.replace(".weight", ".default.weight")).equal(p) for n, p in exported.items())
    monkeypatch.setattr(dpo, "make_trainer", never)
    assert dpo.adapter(recipe) == folder


@pytest.mark.slow
def test_sampling_at_a_temperature(tokenizer):
    import torch

    model = models.load_model(16, torch.float32)

    def sample(seed, temperature=2.0):
        torch.manual_seed(seed)
        return generation.generate(
            model, tokenizer, [flights.chat("How many flights left JFK in July?")] * 8, max_new_tokens=8, temperature=temperature
        )

    greedy = sample(0, temperature=0)
    assert len(set(greedy)) == 1 and sample(1, temperature=0) == greedy
    sampled = sample(0)
    assert sampled == sample(0) != sample(1)
    assert any(answer != greedy[0] for answer in sampled) and len(set(sampled)) > 1


@pytest.mark.slow
def test_points_of_the_preference_sweep_are_recorded_whole(monkeypatch, tmp_path):
    """Two steps through the same code as make sweeps, and the start as it is."""
    questions = flights.subset(flights.load_questions("validation"), 2)
    monkeypatch.setattr(sweeps, "splits", lambda sweep: {"validation": questions})
    monkeypatch.setattr(dpo, "PROBE", 2)
    for method, steps in (("dpo", 2), ("none", 0)):
        point = {"stage": method, "seed": 0, "recipe": DPORecipe(start=TINY, method=method, steps=steps, batch_size=2)}
        run = measure.run_point("preference_search", point)
        assert run["key"] == sweeps.key("preference_search", point) and run["recipe"]["start"]["steps"] == 2
        assert [question for question, _ in run["samples"]] == questions["question"]
        assert len(run["splits"]["validation"]["records"]) == 2
    assert "history" not in run
    run = measure.run_point("preference_search", point | {"recipe": dataclasses.replace(point["recipe"], method="sft", steps=2)})
    assert [h["step"] for h in run["history"] if "probe/chosen" in h] == [0, 2] and run["tokens"] > 50
    json.dumps(run)
