"""The recipes as files of other engines: equal to the recipe, read by the engines' own parsers where they can be had, and a few steps of one."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields, replace

import psutil
import pytest
import yaml

from course import interop
from helpers import dpo, recipes
from helpers.dpo import DPORecipe
from helpers.files import CourseError
from helpers.recipes import SFTRecipe
from helpers.scaling import engines, spread
from helpers.scaling.yaml_text import file_text, value_text

ROWS = [{"question": f"How many flights left in hour {n}?", "sql": f"SELECT COUNT(*) FROM flights WHERE hour = {n}"} for n in range(4)]
PAIRS = [{"prompt": f"Question {n}?", "chosen": f"SELECT {n} AS n", "rejected": f"SELECT {n}"} for n in range(34)]


def written(recipe=None, rows=ROWS, **more) -> dict:
    """Every YAML file of a recipe as its reader sees it."""
    return {name: yaml.safe_load(text) for name, text in engines.files(recipe or SFTRecipe(), rows, **more).items() if name.endswith(".yaml")}


# ---------------------------------------------------------------- the text


@pytest.mark.parametrize("value", [1, 0, 1.0, 0.003, 1e-05, 2.5e-7, True, False, None, "text", "no", "Yes", "a: b", "#", "12fd25", "123", "1e5", "all-linear", r".*\.(1|2)", [1, 2], ["a", "on"], []])
def test_a_value_is_read_as_it_was(value):
    read = yaml.safe_load(f"key: {value_text(value)}\n")["key"]
    assert read == value and type(read) is type(value)


def test_a_file_reads_as_its_sections():
    text = file_text(["a comment: not a key"], {"one": {"a": 1, "b": [{"c": "d", "e": 2}]}, "two": {"f": {"g": False}}})
    assert yaml.safe_load(text) == {"a": 1, "b": [{"c": "d", "e": 2}], "f": {"g": False}}
    assert text.startswith("# a comment: not a key\n\n# one\na: 1\nb:\n  - c: d\n    e: 2\n")


# ---------------------------------------------------------------- the committed files


@pytest.fixture(scope="module")
def course_files():
    return engines.files()


def test_the_committed_files_are_the_recipes(course_files):
    """Fails after a change to a recipe, a prompt or the training data until `make configs` is run."""
    committed = {path.relative_to(engines.CONFIGS).as_posix(): path.read_text(encoding="utf-8") for path in interop.committed()}
    made = {name: text for name, text in course_files.items() if not name.endswith(".jsonl")}
    assert committed.keys() == made.keys() and len(made) == 18
    assert [name for name in made if committed[name] != made[name]] == []


def test_no_data_is_committed_twice():
    tracked = subprocess.run(["git", "ls-files", "configs"], cwd=engines.ROOT, capture_output=True, text=True).stdout.split()
    assert not [name for name in tracked if name.endswith(".jsonl")]


def test_nothing_of_this_machine_is_in_them(course_files):
    text = "".join(text for name, text in course_files.items() if not name.endswith(".jsonl"))
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in text and str(engines.ROOT) not in text and os.path.expanduser("~") not in text


# ---------------------------------------------------------------- what they say

ALL_LAYERS = {"upper_layers": 1} if hasattr(SFTRecipe, "upper_layers") else {}  # a later recipe adapts some
OTHER = {"bits": 16, "rank": 4, "alpha": 12, "target_modules": ("q_proj", "v_proj"), "learning_rate": 1e-5, "batch_size": 6, "steps": 77, "warmup_steps": 9,
         "scheduler": "linear", "max_grad_norm": 0.5, "max_length": 128, "seed": 3}  # fmt: skip
KEYS = {  # what each engine calls what a recipe says
    "trl": "lora_r lora_alpha lora_target_modules learning_rate per_device_train_batch_size max_steps warmup_steps lr_scheduler_type max_grad_norm max_length seed",
    "axolotl": "lora_r lora_alpha lora_target_modules learning_rate micro_batch_size max_steps warmup_steps lr_scheduler max_grad_norm sequence_len seed",
    "llamafactory": "lora_rank lora_alpha lora_target learning_rate per_device_train_batch_size max_steps warmup_steps lr_scheduler_type max_grad_norm cutoff_len seed",
}


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_every_setting_of_the_recipe_reaches_the_engine(engine):
    recipe = replace(SFTRecipe(), **OTHER | ALL_LAYERS)
    said = written(recipe)[f"{engine}/sft.yaml"]
    target = "q_proj,v_proj" if engine == "llamafactory" else ["q_proj", "v_proj"]
    assert [said[key] for key in KEYS[engine].split()] == [4, 12, target, 1e-5, 6, 77, 9, "linear", 0.5, 128, 3]
    assert said.get("load_in_4bit", False) is False and "quantization_bit" not in said
    known = {*OTHER, "examples", "phrasings", "method", "upper_layers", "lora_plus", "invented"}  # the data are of the recipe; method and the next below
    assert {field.name for field in fields(SFTRecipe)} <= known, "a new field of the recipe: say it in helpers.scaling.engines too"


def test_four_bits_are_the_courses_own():
    said = written(replace(SFTRecipe(), bits=4))
    assert said["trl/sft.yaml"]["load_in_4bit"] is True and said["trl/sft.yaml"]["bnb_4bit_quant_type"] == "nf4"
    assert said["axolotl/sft.yaml"]["bnb_config_kwargs"] == {"bnb_4bit_use_double_quant": False}  # Axolotl's default is True
    four = said["llamafactory/sft.yaml"]
    assert (four["quantization_bit"], four["quantization_type"], four["double_quantization"]) == (4, "nf4", False)
    assert {said[f"{engine}/sft.yaml"]["lora_dropout"] for engine in engines.ENGINES} == {0.0}  # theirs are 0.05 or none


def test_a_t4_computes_in_float16_and_trl_goes_without_four_bits_there():
    said, text = written(), engines.files(SFTRecipe(), ROWS)["trl/sft-t4.yaml"]
    for engine in engines.ENGINES:
        assert (said[f"{engine}/sft.yaml"]["bf16"], said[f"{engine}/sft.yaml"]["fp16"]) == (True, False)
        assert (said[f"{engine}/sft-t4.yaml"]["bf16"], said[f"{engine}/sft-t4.yaml"]["fp16"]) == (False, True)
    assert "load_in_4bit" not in said["trl/sft-t4.yaml"] and said["trl/sft-t4.yaml"]["dtype"] == "float16"
    assert "gradient scaler stops at the first step (trl issue 4901)" in text


def test_some_layers_and_lora_plus_are_said_where_an_engine_has_a_key(monkeypatch):
    from peft import LoraConfig

    modules = ["q_proj", "down_proj"]
    monkeypatch.setattr(recipes, "lora_config", lambda recipe: LoraConfig(r=2, lora_alpha=4, target_modules=modules, layers_to_transform=[2, 3]))
    recipe = SFTRecipe()
    object.__setattr__(recipe, "lora_plus", 8.0)
    said, texts = written(recipe), engines.files(recipe, ROWS)
    assert said["axolotl/sft.yaml"]["peft_layers_to_transform"] == [2, 3] and said["axolotl/sft.yaml"]["loraplus_lr_ratio"] == 8.0
    assert said["llamafactory/sft.yaml"]["loraplus_lr_ratio"] == 8.0
    assert "LoRA+ is left out, TRL has no key for it: B learns as fast as A, in the course 8 times as fast." in texts["trl/sft.yaml"]
    named = {f"{engine}/sft.yaml": said[f"{engine}/sft.yaml"] for engine in ("trl", "llamafactory")}
    wanted = sorted(f"model.layers.{layer}.{part}" for layer in (2, 3) for part in ("mlp.down_proj", "self_attn.q_proj"))
    assert adapted(named["trl/sft.yaml"]["lora_target_modules"]) == adapted(named["llamafactory/sft.yaml"]["lora_target"].split(",")) == wanted


def adapted(targets) -> list[str]:
    """The layers of a small model that PEFT adapts, given targets as an engine hands them on."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=13, num_attention_heads=1, num_key_value_heads=1, vocab_size=8))
    model = get_peft_model(small, LoraConfig(r=1, target_modules=targets, task_type="CAUSAL_LM"))
    return sorted(name.removeprefix("base_model.model.") for name, module in model.named_modules() if hasattr(module, "lora_A"))


@pytest.mark.parametrize(("method", "keys"), [("rslora", ("use_rslora", "peft_use_rslora")), ("dora", ("use_dora", "peft_use_dora"))])
def test_kinds_of_lora_are_said(method, keys):
    said = written(replace(SFTRecipe(), method=method))
    assert [said["trl/sft.yaml"][keys[0]], said["axolotl/sft.yaml"][keys[1]], said["llamafactory/sft.yaml"][keys[0]]] == [True] * 3


def test_full_fine_tuning_has_no_adapter():
    said = written(replace(SFTRecipe(), method="full", bits=16))
    assert said["trl/sft.yaml"]["use_peft"] is False and "adapter" not in said["axolotl/sft.yaml"] and said["llamafactory/sft.yaml"]["finetuning_type"] == "full"


def test_dpo_is_said_with_its_beta_and_its_extra_term():
    said = written(replace(DPORecipe(), beta=0.3, sft_weight=0.5), PAIRS)
    assert said["trl/dpo.yaml"]["loss_type"] == ["sigmoid", "sft"] == said["axolotl/dpo.yaml"]["dpo_loss_type"] and said["trl/dpo.yaml"]["loss_weights"] == [1.0, 0.5]
    assert said["trl/dpo.yaml"]["beta"] == said["axolotl/dpo.yaml"]["rl_beta"] == said["llamafactory/dpo.yaml"]["pref_beta"] == 0.3
    assert said["llamafactory/dpo.yaml"]["pref_ftx"] == 0.5 and said["axolotl/dpo.yaml"]["rl"] == said["llamafactory/dpo.yaml"]["stage"] == "dpo"
    assert {said[f"{engine}/dpo.yaml"][key] for engine, key in (("trl", "model_name_or_path"), ("axolotl", "base_model"), ("llamafactory", "model_name_or_path"))} == {"sft-merged"}


# ---------------------------------------------------------------- the data


def test_the_data_are_the_rows_in_each_engines_form():
    found = engines.data_files(SFTRecipe(), ROWS)
    trl, messages = ([json.loads(line) for line in text.splitlines()] for text in found.values())
    assert list(found) == ["sft.jsonl", "sft-messages.jsonl"] and trl == list(recipes.training_set(ROWS))
    assert messages[0]["messages"] == trl[0]["prompt"] + trl[0]["completion"] and [turn["role"] for turn in messages[0]["messages"]] == ["system", "user", "assistant"]


def test_the_pairs_are_those_that_the_course_learns_from():
    found = engines.data_files(DPORecipe(), PAIRS)
    trl, messages = ([json.loads(line) for line in text.splitlines()] for text in found.values())
    assert trl == list(dpo.pair_set(PAIRS[:2])) and len(messages) == 2  # the other 32 are watched
    assert messages[1]["chosen"] == {"role": "assistant", "content": "SELECT 1 AS n"} and messages[1]["messages"][-1]["content"] == "Question 1?"


def test_a_recipe_of_ones_own_becomes_all_files(tmp_path):
    names = engines.write(tmp_path, recipes.few_rows(4), ROWS, gpus=2)
    assert names == sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()) and len(names) == 14
    said = yaml.safe_load((tmp_path / "trl" / "sft.yaml").read_text(encoding="utf-8"))
    assert (said["max_steps"], said["per_device_train_batch_size"], said["learning_rate"]) == (4, 2, 2e-3)
    assert (tmp_path / "data" / "sft.jsonl").read_text(encoding="utf-8").count("\n") == 4


REFUSED = {
    "GPUs that don't divide the batch": (lambda: engines.files(replace(SFTRecipe(), batch_size=8), ROWS, gpus=3), "3 GPUs can't share 8 examples a step evenly: take 6 or 9 examples"),
    "more GPUs than examples": (lambda: spread.split(8, 16), "16 GPUs can't share 8 examples a step evenly: take 16 examples or more"),
    "no GPU": (lambda: spread.split(8, 0), "must each be at least 1, not 8, 0 and None"),
    "a method without a key": (lambda: written(replace(SFTRecipe(), method="ia3")), "ia3 has no key in these engines"),
    "the control of notebook 04": (lambda: written(DPORecipe(method="sft"), PAIRS), "write it as an SFTRecipe"),
    "too few pairs": (lambda: engines.data_files(DPORecipe(), PAIRS[:32]), "Too few pairs: the last 32 are watched"),
    "rows without a recipe": (lambda: engines.files(None, ROWS), "Rows of your own go with a recipe of your own"),
    "an unknown card": (lambda: engines.facts(SFTRecipe(), "amiga"), "Unknown card 'amiga': ampere or t4"),
    "an unknown machine": (lambda: spread.accelerate("9-gpus"), "Unknown machine '9-gpus': 1-gpu"),
    "no node": (lambda: spread.slurm(0, 8, "train.py"), "must each be at least 1, not 0, 8 and 4"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_written_gets_a_sentence(what):
    act, says = REFUSED[what]
    with pytest.raises(CourseError, match=re.escape(says)):
        act()


def test_rows_that_would_be_cut_are_refused_before_anything_is_written(tmp_path, tokenizer):
    with pytest.raises(CourseError, match=r"row 2 has \d+ tokens"):
        engines.write(tmp_path, SFTRecipe(), [ROWS[0], {"question": "long " * 300, "sql": "SELECT 1"}], tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- many GPUs


@pytest.mark.parametrize(("given", "expected"), [((8, 1), (8, 1)), ((8, 4), (2, 1)), ((64, 4, 6), (4, 4)), ((64, 4, 5), (4, 4)), ((12, 1, 5), (4, 3)), ((7, 1, 3), (1, 7))])
def test_a_batch_is_shared_out_whole(given, expected):
    at_once, times = spread.split(*given)
    assert (at_once, times) == expected and at_once * times * given[1] == given[0]


def test_accelerates_configs_are_taken_by_its_own_loader_and_a_wrong_key_is_not(tmp_path):
    for machine, (nodes, gpus) in spread.MACHINES.items():
        text = spread.accelerate(machine)
        (tmp_path / "good.yaml").write_text(text, encoding="utf-8")
        interop.parse_accelerate("", tmp_path / "good.yaml")
        said = yaml.safe_load(text)
        assert (said["num_machines"], said["num_processes"]) == (nodes, nodes * gpus)
        worse, key = interop.spoiled(text)
        (tmp_path / "worse.yaml").write_text(worse, encoding="utf-8")
        with pytest.raises(ValueError, match=key):
            interop.parse_accelerate("", tmp_path / "worse.yaml")


@pytest.mark.skipif(os.name == "nt", reason="bash reads it")
def test_the_slurm_script_is_a_script(tmp_path):
    text = spread.slurm(2, 8, "train.py --config sft.yaml", hours=12)
    (tmp_path / "job.sh").write_text(text, encoding="utf-8")
    assert subprocess.run(["bash", "-n", str(tmp_path / "job.sh")]).returncode == 0
    assert "--nodes=2" in text and "--nproc_per_node 8" in text and "--time=12:00:00" in text and text.rstrip().endswith("train.py --config sft.yaml")


# ---------------------------------------------------------------- the engines' own parsers


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_trls_own_parser_takes_the_files_and_refuses_a_wrong_key(stage, tmp_path):
    path, worse = engines.CONFIGS / "trl" / f"{stage}.yaml", tmp_path / f"{stage}.yaml"
    interop.parse_trl(f"trl/{stage}.yaml", path)
    text, key = interop.spoiled(path.read_text(encoding="utf-8"))
    worse.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"Unknown arguments.*{key}"):
        interop.parse_trl(f"trl/{stage}.yaml", worse)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["axolotl", "llamafactory"])
def test_the_engines_own_parsers_take_all_files_and_refuse_a_wrong_key_in_each(engine, course_files):
    try:
        interop.environment(engine)
    except CourseError as missing:
        pytest.skip(f"{missing}")
    assert interop.check(engine, course_files) == []


def test_a_file_that_its_parser_refuses_and_a_wrong_key_that_is_taken_are_both_told(monkeypatch):
    monkeypatch.setattr(interop, "ask", lambda engine, texts: {name: "ValueError: no b" if name == "trl/b.yaml" else "" for name in texts})
    found = {f"trl/{name}.yaml": f"{name}: 1\n" for name in "ab"} | {"axolotl/c.yaml": "c: 1\n"}
    assert interop.check("trl", found) == [
        "trl/b.yaml: ValueError: no b",
        "trl/a.yaml spoiled: the wrong key ax wasn't refused by name (it was taken)",
        "trl/b.yaml spoiled: the wrong key bx wasn't refused by name (it was taken)",
    ]


@pytest.mark.parametrize(("said", "words"), [("Connection refused", "is there a network?"), ("THESE PACKAGES DO NOT MATCH THE HASHES", "its pinned sha256 differs")])
def test_an_engine_that_cannot_be_fetched_gets_a_sentence(said, words, tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path))
    monkeypatch.setattr(interop, "_run", lambda command, what: subprocess.CompletedProcess(command, 1, "", said))
    with pytest.raises(CourseError, match=words.replace("?", r"\?")):
        interop.environment("axolotl")
    assert not [path for path in (tmp_path / "interop").iterdir() if path.suffix != ".lock"]  # nothing half there


def test_an_engine_that_takes_too_long_is_ended_with_what_it_started(tmp_path, monkeypatch):
    """A stand-in that starts another program, as Accelerate's launcher does, and waits for it."""
    monkeypatch.setattr(interop, "MINUTES", 0.05)
    inner = f"import os, time; open(r'{tmp_path / 'pid'}', 'w').write(str(os.getpid())); time.sleep(600)"
    with pytest.raises(CourseError, match="A stand-in took more than 0.05 minutes and was stopped"):
        interop._run([sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"], "A stand-in")
    if (tmp_path / "pid").exists() and (pid := (tmp_path / "pid").read_text(encoding="utf-8")):
        assert not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_trls_command_line_trains_as_the_courses_settings_do_without_the_cure(shortened, short_model):
    theirs, ours = interop.compare(recipe=replace(SFTRecipe(), **ALL_LAYERS))  # the short model has few
    assert len(theirs) == 3 and theirs == pytest.approx(ours, abs=interop.TOLERANCE) and theirs[0] != theirs[2]
