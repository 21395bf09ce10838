"""The bill of materials: valid by the official schema, the same bytes each time, and each change of a folder told in a sentence of its own."""

import json
from types import SimpleNamespace

import pytest

from helpers.files import CourseError, sha256
from helpers.shipping import bill, card, energy, parcel

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
USED = energy.Used(60.0, 0.002, 0.001, 0.001, 0.0, 500.0, "a grid", "2 cores", "estimated")
MADE_OF = {"method": "sft", "settings": {"seed": 0, "learning_rate": 0.003}, "adapter": {"r": 16}, "data": {"rows": 7, "sha256": "ab"}}


@pytest.fixture
def billed(exported, board):
    """An exported folder with a template of its own, its card and its bill."""
    (exported / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    card.write(exported, card.make("flights-sql", board))
    bill.write(exported, bill.make(exported, "flights-sql", board, energy=USED, training=MADE_OF))
    return exported


def test_the_bill_is_valid_by_the_official_schema_and_says_what_the_model_is(billed):
    made = bill.read(billed)
    assert bill.invalid(made) is None
    assert bill.invalid(made | {"specVersion": "1.7", "$schema": "http://cyclonedx.org/schema/bom-1.7.schema.json"}) is None
    model = made["metadata"]["component"]
    metrics = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert metrics[1] == {
        "type": "execution accuracy", "value": "0.7000", "slice": "test, n = 40, seed 0, live",
        "confidenceInterval": {"lowerBound": "0.6000", "upperBound": "0.8000"},
    }  # fmt: skip
    assert {"name": "training:learning_rate", "value": "0.003"} in model["modelCard"]["properties"]
    cost = model["modelCard"]["considerations"]["environmentalConsiderations"]["energyConsumptions"][0]
    assert cost["activityEnergyCost"] == {"value": 0.002, "unit": "kWh"} and cost["co2CostEquivalent"] == {"value": 1e-6, "unit": "tCO2eq"}
    assert model["pedigree"]["ancestors"][0]["name"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_its_parts_are_there_with_hashes_licences_and_who_comes_from_whom(billed):
    made = bill.read(billed)
    parts = {part["bom-ref"]: part for part in made["components"]}
    assert parts["template"]["hashes"] == [{"alg": "SHA-256", "content": bill.hash_template(TEMPLATE)}]
    assert parts["file:adapter_model.safetensors"]["hashes"][0]["content"] == sha256(billed / "adapter_model.safetensors")
    assert parts["library:torch"]["purl"].startswith("pkg:pypi/torch@") and parts["library:trl"]["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert parts["base"]["purl"].startswith("pkg:huggingface/HuggingFaceTB/SmolLM2-135M-Instruct@12fd25f")
    needs = next(one["dependsOn"] for one in made["dependencies"] if one["ref"] == "model")
    assert {"base", "template", "data:questions/train.jsonl", "library:peft"} <= set(needs) and not [one for one in needs if one.startswith("file:")]
    refs = {part["bom-ref"] for part in made["components"]}
    assert {one["ref"] for one in made["metadata"]["component"]["modelCard"]["modelParameters"]["datasets"]} <= refs


def test_the_same_folder_gives_the_same_bytes_and_another_one_others(billed, board):
    first = (billed / parcel.BILL).read_bytes()
    bill.write(billed, bill.make(billed, "flights-sql", board, energy=USED, training=MADE_OF))
    assert (billed / parcel.BILL).read_bytes() == first and b"timestamp" not in first
    (billed / "NOTICE").write_text("another", encoding="utf-8")
    other = bill.make(billed, "flights-sql", board)
    assert other["serialNumber"] != json.loads(first)["serialNumber"]


def test_a_folder_as_it_was_made_has_no_problem(billed):
    assert bill.verify(billed) == []
    (billed / parcel.SIGNATURE).write_text("{}", encoding="utf-8")  # made after the bill
    (billed / ".gitattributes").write_text("x", encoding="utf-8")  # the Hub's own
    assert bill.verify(billed, SimpleNamespace(chat_template=TEMPLATE)) == []


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


CHANGES = {
    "a byte of the weights": (lambda f: flip(f / "adapter_model.safetensors"), "The file adapter_model.safetensors was changed: its sha256"),
    "a letter of the template": (lambda f: (f / "chat_template.jinja").write_text(TEMPLATE + " ", encoding="utf-8"), "The chat template chat_template.jinja was changed"),
    "a missing file": (lambda f: (f / "NOTICE").unlink(), "NOTICE is missing: the bill names it."),
    "another file": (lambda f: (f / "extra.txt").write_text("x", encoding="utf-8"), "extra.txt was added: the bill doesn't name it."),
    "a file in a folder": (lambda f: ((f / ".git").mkdir(), (f / ".git" / "hook").write_text("x", encoding="utf-8")), ".git/hook was added"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_each_change_gets_one_sentence(billed, what):
    change, says = CHANGES[what]
    change(billed)
    found = bill.verify(billed)
    assert len(found) == 1 and found[0].startswith(says)


def test_a_template_inside_the_tokenizers_settings_counts_as_well(exported, board):
    settings = {"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}
    (exported / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    bill.write(exported, bill.make(exported, "flights-sql", board))
    assert bill.verify(exported) == []
    (exported / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ evil }}"}), encoding="utf-8")
    assert [problem[:35] for problem in bill.verify(exported)] == ["The file tokenizer_config.json was ", "The chat template in tokenizer_conf"]


def test_an_adapters_template_is_its_bases_and_another_tokenizer_is_told(exported, board):
    bill.write(exported, bill.make(exported, "flights-sql", board))
    assert bill.verify(exported) == []
    assert "by another chat template than the bill names" in bill.verify(exported, SimpleNamespace(chat_template=TEMPLATE))[0]


@pytest.mark.slow
def test_the_bases_template_is_the_one_that_its_tokenizer_writes_by(exported, board, tokenizer):
    bill.write(exported, bill.make(exported, "flights-sql", board))
    assert bill.verify(exported, tokenizer) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "has no bill of materials"), ("{", "is no bill that can be read"), ("[]", "is no bill"), ('{"bomFormat": "CycloneDX"}', "is no bill"),
        ('{"bomFormat": "CycloneDX", "components": []}', "isn't one of the course's"), ('{"bomFormat": "CycloneDX", "components": [1]}', "isn't one of the course's"),
    ],
)  # fmt: skip
def test_a_missing_or_a_strange_bill_is_told(exported, text, says):
    if text is not None:
        (exported / parcel.BILL).write_text(text, encoding="utf-8")
    with pytest.raises(CourseError, match=says):
        bill.verify(exported)


def test_the_schema_can_refuse(billed):
    made = bill.read(billed)
    made["metadata"]["component"]["modelCard"]["accuracy"] = "good"
    assert "Additional properties are not allowed ('accuracy'" in bill.invalid(made)
    assert bill.invalid(made | {"specVersion": "0.1"}) == "specVersion '0.1' is none of CycloneDX"
    with pytest.raises(CourseError, match="The run was of seed 0"):
        bill.make(billed, "flights-sql", [], seed=2, training=MADE_OF)
