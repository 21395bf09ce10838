"""Adapters of strangers: what is refused before anything is loaded, in one sentence; and that every recipe's own passes."""

import json
import math
import os
import shutil
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import adapters, models, recipes, vetting
from helpers.files import CourseError
from helpers.recipes import SFTRecipe

pytestmark = pytest.mark.usefixtures("short_model")
METHODS = {
    "lora": SFTRecipe(), "rank 1": SFTRecipe(rank=1, alpha=1), "two modules": SFTRecipe(target_modules=("q_proj", "v_proj")),
    "rslora": SFTRecipe(method="rslora"), "dora": SFTRecipe(method="dora"), "ia3": SFTRecipe(method="ia3"), "prompt": SFTRecipe(method="prompt"),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(short_model, tmp_path_factory):
    """An untrained adapter of each method, exported as runs are."""
    import torch
    from peft import get_peft_model

    from helpers import runtime

    runtime.setup()
    place, found = tmp_path_factory.mktemp("adapters"), {}
    for name, recipe in METHODS.items():
        model = get_peft_model(models.load_model(16, torch.float32), recipes.peft_config(recipe))
        found[name] = adapters.export_adapter(model, place / name)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_the_adapters_of_every_recipe_load(made, name):
    config = vetting.check(made[name])
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    model = adapters.load_adapter(made[name], bits=16)
    assert model.active_peft_config.peft_type.value == config["peft_type"]


def test_the_hubs_name_of_the_base_does_too(made, tmp_path):
    assert vetting.check(changed(made, tmp_path, base_model_name_or_path="SmolLM2-135M-Instruct"))  # as the course wrote it before


def test_what_peft_itself_saves_differs_by_its_card_alone(made, tmp_path):
    """Somebody's own save_pretrained writes a README.md beside the two files: named, so that it can be removed."""
    model = adapters.load_adapter(made["lora"], bits=16)
    model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(CourseError, match="it has more than its two files: 'README.md'"):
        vetting.check(tmp_path / "theirs")
    (tmp_path / "theirs" / "README.md").unlink()
    assert vetting.check(tmp_path / "theirs")["r"] == 16  # its base is the cache's folder


# ---------------------------------------------------------------- refused


def changed(made, tmp_path, method="lora", **fields):
    """A copy of an adapter with other fields in its config."""
    folder = shutil.copytree(made[method], tmp_path / "bad")
    config = json.loads((folder / vetting.CONFIG).read_text(encoding="utf-8")) | fields
    (folder / vetting.CONFIG).write_text(json.dumps(config), encoding="utf-8")
    return folder


def reweighed(made, tmp_path, change, metadata=None):
    """A copy with other weights: `change` gets the dict of tensors."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(made["lora"], tmp_path / "bad")
    weights = load_file(folder / vetting.WEIGHTS)
    save_file({name: weight.contiguous() for name, weight in change(weights).items()}, folder / vetting.WEIGHTS, metadata=metadata)
    return folder


def first(weights, value):
    """The weights with one number changed."""
    name = sorted(weights)[0]
    weights[name] = weights[name].clone()
    weights[name].view(-1)[0] = value
    return weights


def files(made, tmp_path, change):
    folder = shutil.copytree(made["lora"], tmp_path / "bad")
    change(folder)
    return folder


def cut(path, count):
    path.write_bytes(path.read_bytes()[:count])


def pickled(folder):
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n")


def linked(folder, name):
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)


def piped(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)


def said(folder, text):
    (folder / vetting.CONFIG).write_bytes(text)


HOSTILE = "(a+)+$" * 20
CONFIGS = {  # fields of the config, and what is said
    "a regular expression": ({"target_modules": HOSTILE}, "'target_modules' in adapter_config.json is '(a+)+$"),
    "one module's name alone": ({"target_modules": "q_proj"}, "'target_modules' in adapter_config.json is 'q_proj', which the course doesn't take"),
    "patterns among names": ({"target_modules": ["q_proj", ".*"]}, "'target_modules'"),
    "no modules": ({"target_modules": []}, "'target_modules'"),
    "unknown modules": ({"target_modules": ["c_attn"]}, "names no layer of the model here: ['c_attn']"),
    "a rank pattern": ({"rank_pattern": {HOSTILE: 4}}, "'rank_pattern' in adapter_config.json is {"),
    "an alpha pattern": ({"alpha_pattern": {"^q": 1}}, "'alpha_pattern'"),
    "a layers pattern": ({"layers_pattern": HOSTILE, "layers_to_transform": [1]}, "a setting that the course doesn't use"),
    "modules left out by a pattern": ({"exclude_modules": HOSTILE}, "'exclude_modules'"),
    "a rank of a thousand million": ({"r": 10**9}, "'r' in adapter_config.json is 1000000000, which the course doesn't take"),
    "a rank of 0": ({"r": 0}, "'r'"),
    "a rank that is text": ({"r": "16"}, "'r'"),
    "a rank that is true": ({"r": True}, "'r'"),
    "fewer modules": ({"target_modules": ["q_proj"]}, "its config accounts for"),
    "another rank": ({"r": 8}, "has the shape (16, 576), and the model needs (8, 576)"),
    "an infinite alpha": ({"lora_alpha": math.inf}, "'lora_alpha'"),
    "dropout above 1": ({"lora_dropout": 2}, "'lora_dropout'"),
    "another base": ({"base_model_name_or_path": "gpt2"}, "it was made for 'gpt2', and the model here is SmolLM2-135M-Instruct"),
    "a path as base": ({"base_model_name_or_path": "/root/models/x"}, "it was made for '/root/models/x'"),
    "a base that is no text": ({"base_model_name_or_path": None}, "'base_model_name_or_path'"),
    "another task": ({"task_type": "SEQ_CLS"}, "'task_type'"),
    "another method": ({"peft_type": "LOHA"}, "its method is 'LOHA'; the course knows LORA, IA3, PROMPT_TUNING"),
    "a method that is a list": ({"peft_type": ["LORA"]}, "its method is ['LORA']"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "'modules_to_save'"),
    "code to import": ({"auto_mapping": {"base_model_class": "X", "parent_library": "os"}}, "'auto_mapping'"),
    "a field that nobody knows": ({"run_this": "rm"}, "'run_this' in adapter_config.json is 'rm', a setting that the course doesn't use"),
    "another start": ({"init_lora_weights": "pissa"}, "'init_lora_weights'"),
    "biases": ({"bias": "all"}, "'bias'"),
    "replicated layers": ({"layer_replication": [[0, 10**6]]}, "'layer_replication'"),
    "a foreign quantizer": ({"loftq_config": {"loftq_bits": 4}}, "'loftq_config'"),
    "terminal escapes": ({"\x1b[2J": 1}, r"'\x1b[2J'"),
}
WEIGHTS = {
    "no number": (lambda w: first(w, math.nan), None, "holds numbers that no training leaves"),
    "infinity": (lambda w: first(w, math.inf), None, "holds numbers that no training leaves"),
    "a huge number": (lambda w: first(w, 1e30), None, "holds numbers that no training leaves"),
    "1e308": (lambda w: {n: t.double() for n, t in first(w, 1).items()} | {sorted(w)[0]: first({n: t.double() for n, t in w.items()}, 1e308)[sorted(w)[0]]}, None, "F64|accounts for"),
    "whole numbers": (lambda w: {n: t.to(dtype=__import__("torch").int32) for n, t in w.items()}, None, "holds I32 numbers"),
    "other names": (lambda w: {n.replace("layers", "h"): t for n, t in w.items()}, None, r"56 of 56 weights are missing"),
    "one too few": (lambda w: dict(list(w.items())[1:]), None, r"1 of 56 weights are missing"),
    "one too many": (lambda w: w | {"lm_head.weight": next(iter(w.values())).clone()}, None, r"it has 1 weights that belong to nothing here"),
    "another shape": (lambda w: {n: t.T for n, t in w.items()}, None, "has the shape .* and the model needs"),
    "other base weights": (lambda w: w, {"format": "pt", "base_sha256": "0" * 64}, "it was trained on other weights of the same name"),
    "far too many numbers": (lambda w: w | {"x": __import__("torch").zeros(3_000_000)}, None, "its config accounts for"),
}
FOLDERS = {
    "a pickle beside": (pickled, "it has more than its two files: 'adapter_model.bin' (a pickle could run anything)"),
    "a pickle instead": (lambda f: (pickled(f), (f / vetting.WEIGHTS).unlink()), "adapter_model.safetensors is missing"),
    "no weights": (lambda f: (f / vetting.WEIGHTS).unlink(), "adapter_model.safetensors is missing"),
    "no config": (lambda f: (f / vetting.CONFIG).unlink(), None),
    "code beside": (lambda f: (f / "modeling.py").write_text("", encoding="utf-8"), "it has more than its two files: 'modeling.py'"),
    "a name that steers": (lambda f: (f / "\x1b[2J").write_text("", encoding="utf-8"), r"two files: '\x1b[2J'"),
    "many files": (lambda f: [(f / str(i)).touch() for i in range(500)], "more than its two files|is missing"),
    "cut weights": (lambda f: cut(f / vetting.WEIGHTS, 5000), "is damaged, or no safetensors file"),
    "empty weights": (lambda f: cut(f / vetting.WEIGHTS, 0), "is damaged, or no safetensors file"),
    "a header of any length": (lambda f: (f / vetting.WEIGHTS).write_bytes(b"\xff" * 8 + b"{}"), "is damaged, or no safetensors file"),
    "text for weights": (lambda f: (f / vetting.WEIGHTS).write_bytes(b"hello" * 100), "is damaged, or no safetensors file"),
    "linked weights": (lambda f: linked(f, vetting.WEIGHTS), "adapter_model.safetensors is no plain file"),
    "a linked config": (lambda f: linked(f, vetting.CONFIG), "adapter_config.json is no plain file"),
    "a pipe for weights": (lambda f: piped(f, vetting.WEIGHTS), "adapter_model.safetensors is no plain file"),
    "a pipe for a config": (lambda f: piped(f, vetting.CONFIG), "adapter_config.json is no plain file"),
    "half a config": (lambda f: cut(f / vetting.CONFIG, 100), "adapter_config.json is not JSON"),
    "a list for a config": (lambda f: said(f, b"[]"), "adapter_config.json is not an object"),
    "nothing in it": (lambda f: said(f, b"{}"), "its method is None"),
    "deep nesting": (lambda f: said(f, b"[" * 90_000), "not JSON (nested too deeply)"),
    "a name twice": (lambda f: said(f, b'{"r": 1, "r": 2}'), "not JSON (a name stands twice)"),
    "a config of megabytes": (lambda f: said(f, b" " * 200_000), "has 200,000 bytes (limit 100,000)"),
    "a config in UTF-16": (lambda f: said(f, "{}".encode("utf-16")), "adapter_config.json is not JSON"),
}


def refused(folder, says) -> None:
    import re

    start = time.perf_counter()
    with pytest.raises(CourseError) as told:
        adapters.load_adapter(folder)
    text = str(told.value)
    assert time.perf_counter() - start < 20  # a hang: two seconds are shown by `test_bad_adapters_take_little_time`
    if says:
        assert says in text or re.search(says, text), text
        assert text.startswith("The adapter bad/ was not loaded: ")
    assert "\n" not in text and "\x1b" not in text and str(folder.parent) not in text and not told.value.__cause__


@pytest.fixture
def offline(monkeypatch):
    """No model is loaded, nothing is asked of the Hub."""
    import socket

    monkeypatch.setattr(adapters, "load_model", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asked a network"))


@pytest.mark.parametrize(("fields", "says"), CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_is_not_the_courses_is_refused(made, tmp_path, offline, fields, says):
    refused(changed(made, tmp_path, **fields), says)


@pytest.mark.parametrize(("change", "metadata", "says"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_do_not_fit_are_refused(made, tmp_path, offline, change, metadata, says):
    refused(reweighed(made, tmp_path, change, metadata), says)


@pytest.mark.parametrize(("change", "says"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_that_is_more_or_less_than_two_files_is_refused(made, tmp_path, offline, change, says):
    refused(files(made, tmp_path, change), says)


@pytest.mark.parametrize(
    ("method", "fields", "says"),
    [
        ("ia3", {"feedforward_modules": ".*"}, "'feedforward_modules'"),
        ("ia3", {"feedforward_modules": ["k_proj"]}, "has the shape"),
        ("prompt", {"num_virtual_tokens": 10**9}, "'num_virtual_tokens'"),
        ("prompt", {"token_dim": 577}, "its tokens are 577 numbers wide, and the model's 576"),
        ("prompt", {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "some/repo"}, "'prompt_tuning_init'"),
        ("prompt", {"tokenizer_kwargs": {"trust_remote_code": True}}, "'tokenizer_kwargs'"),
        ("dora", {"use_dora": False}, "weights that belong to nothing here"),
    ],
)
def test_other_methods_fields_are_looked_at_as_well(made, tmp_path, offline, method, fields, says):
    refused(changed(made, tmp_path, method, **fields), says)


def test_there_are_forty_and_more():
    assert len(CONFIGS) + len(WEIGHTS) + len(FOLDERS) >= 40


def test_a_folder_named_as_on_the_hub_is_not_looked_for_there(tmp_path, monkeypatch, offline):
    (tmp_path / "team" / "adapter").mkdir(parents=True)
    (tmp_path / "team" / "adapter" / vetting.CONFIG).write_text("{}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CourseError, match="^The adapter team/adapter/ was not loaded: adapter_model.safetensors is missing"):
        adapters.load_adapter("team/adapter")


def test_the_shapes_are_pefts_own(made):
    from safetensors import safe_open

    for folder in made.values():
        with safe_open(folder / vetting.WEIGHTS, "pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict
        assert found == vetting.shapes(json.loads((folder / vetting.CONFIG).read_text(encoding="utf-8")))


FIELD = st.sampled_from([*vetting.EVERY, *vetting.FIELDS["LORA"], "peft_type", "rank_pattern", "bias", "x", "auto_mapping", "layers_pattern"])
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from(["LORA", "IA3", "CAUSAL_LM", HOSTILE, "all-linear"]),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=3), inside, max_size=2),
    max_leaves=5,
)


@pytest.mark.slow
@settings(max_examples=700, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=st.dictionaries(FIELD, VALUE, min_size=1, max_size=3) | VALUE, lacking=st.lists(FIELD, max_size=2), damage=st.none() | st.tuples(st.integers(0, 900), st.binary(max_size=3)))
def test_any_config_is_taken_or_refused_in_one_sentence(made, tmp_path, fields, lacking, damage):
    folder = tmp_path / "bad"
    if not folder.exists():
        shutil.copytree(made["lora"], folder)
    config = json.loads((made["lora"] / vetting.CONFIG).read_text(encoding="utf-8"))
    config = {k: v for k, v in (config | fields).items() if k not in lacking} if isinstance(fields, dict) else fields
    raw = json.dumps(config).encode()
    if damage:
        raw = raw[: damage[0]] + damage[1] + raw[damage[0] :]
    (folder / vetting.CONFIG).write_bytes(raw)
    try:
        taken = vetting.check(folder)
    except CourseError as told:
        assert str(told).startswith("The adapter bad/ was not loaded: ") and "\n" not in str(told)
        return
    assert taken["r"] == 16 and taken["target_modules"] == "all-linear" or vetting._names(taken["target_modules"])
