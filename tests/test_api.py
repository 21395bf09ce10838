"""Every argument that the notebooks, the helpers and the course code pass to TRL, PEFT, transformers, bitsandbytes and datasets is one that the
installed release takes, and none that it is about to drop. Read off the sources with `ast`: no model is loaded."""

import ast
import dataclasses
import functools
import importlib
import inspect
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from helpers import dpo, menu, prefix, recipes, training
from helpers.runtime import ROOT, device

LIBRARIES = ("trl", "peft", "transformers", "bitsandbytes", "datasets")
DEPRECATED = {  # gone or going, and what took its place
    "torch_dtype": "dtype", "use_auth_token": "token", "tokenizer": "processing_class", "max_seq_length": "max_length",
    "max_prompt_length": "max_length", "evaluation_strategy": "eval_strategy", "no_cuda": "use_cpu", "group_by_length": "train_sampling_strategy",
    "warmup_ratio": "warmup_steps", "use_liger_kernel": "Hub kernels", "pad_token": "tokenizer.pad_token", "model_init_kwargs": "a loaded model",
    "compute_loss_func": "an own compute_loss", "logging_dir": "TENSORBOARD_LOGGING_DIR", "push_to_hub_token": "hub_token",
}  # fmt: skip
STILL_NEEDED = {"gradient_checkpointing": "activation_checkpointing"}  # see `test_the_old_name_of_checkpointing_is_still_needed`
LLAMA = "transformers.LlamaForCausalLM.forward"
METHODS = {  # methods of objects that the libraries made, by name
    "generate": "transformers.GenerationMixin.generate",
    **dict.fromkeys(("set_attn_implementation", "get_memory_footprint", "dequantize", "save_pretrained"), "transformers.PreTrainedModel.{}"),
    **dict.fromkeys(("get_output_embeddings", "get_input_embeddings"), "transformers.PreTrainedModel.{}"),
    **dict.fromkeys(("apply_chat_template", "decode", "batch_decode", "convert_tokens_to_ids"), "transformers.PreTrainedTokenizerBase.{}"),
    **dict.fromkeys(("compute_loss", "compute_loss_context_manager", "add_callback", "remove_callback"), "trl.SFTTrainer.{}"),
    **dict.fromkeys(("add_weighted_adapter", "merge_and_unload", "merge_adapter", "unmerge_adapter"), "peft.LoraModel.{}"),
    **dict.fromkeys(("load_adapter", "set_adapter", "disable_adapter", "get_base_model", "get_prompt"), "peft.PeftModel.{}"),
    **dict.fromkeys(("print_trainable_parameters", "get_nb_trainable_parameters"), "peft.PeftModel.{}"),
    "get_delta_weight": "peft.tuners.lora.Linear.{}", "to_pandas": "datasets.Dataset.{}", "batch_repeat_interleave": "transformers.DynamicCache.{}",
    "to_json_string": "transformers.BitsAndBytesConfig.{}", "unwrap_model": "accelerate.Accelerator.{}", "autocast": "accelerate.Accelerator.{}",
}  # fmt: skip
CALLED = {  # objects that are called, or methods whose name says too little, as the sources write them
    "tokenizer": "transformers.PreTrainedTokenizerBase.__call__", "models.load_tokenizer(BIGGER)": "transformers.PreTrainedTokenizerBase.__call__",
    **dict.fromkeys(("model", "trainer.model", "quantized", "one", "theirs"), LLAMA), "base.model": "transformers.LlamaModel.forward",
    "trainer.train": "transformers.Trainer.train", "both.load_adapter": "peft.PeftModel.load_adapter",
}  # fmt: skip
STARRED = {  # what `**name` stands for in a call; a dict of the course's own settings is built and looked at below
    ("peft.LoraConfig", "flag"): ("use_rslora", "use_dora"),
    ("bitsandbytes.functional.quantize_4bit", "more"): ("compress_statistics",),
    ("transformers.GenerationMixin.generate", "prompt"): ("input_ids", "attention_mask"),
    ("transformers.GenerationMixin.generate", "sampling"): ("do_sample", "temperature", "top_k", "past_key_values"),
    (LLAMA, "tokenizer(text[:600], return_tensors='pt').to(model.device)"): ("input_ids", "attention_mask"),
    ("transformers.LlamaModel.forward", "kept"): ("past_key_values",),  # or its later name: `prefix.cache_argument`
    ("transformers.LlamaModel.forward", "kwargs"): ("input_ids", "attention_mask", "use_cache"),  # what TRL's trainer hands to the forward
    (LLAMA, "kwargs"): ("input_ids", "attention_mask", "use_cache"),
    ("transformers.AutoConfig.for_model", "self.shape"): (),
}  # fmt: skip
BUILT = r"((training|dpo)\.)?(housekeeping|common_settings)\(recipe(, folder)?\)|settings|changes"  # of a config: `settings` below builds these
BUILDERS = {f"{module}.{name}": kind for module, name, kind in (  # their `**changes` reach a config
    ("training", "make_trainer", "SFT"), ("training", "sft_config", "SFT"), ("dpo", "make_trainer", "DPO"), ("dpo", "dpo_config", "DPO"))}  # fmt: skip


# ---------------------------------------------------------------- what is passed


def source(path: Path) -> str:
    if path.suffix == ".py":
        return path.read_text(encoding="utf-8")
    return "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")


def library_names(tree) -> dict[str, str]:
    """Names of a module or notebook that stand for something of a library, wherever they are imported, and chosen ones: `A if … else B`."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.asname or a.name: a.name for a in node.names if a.name.split(".")[0] in LIBRARIES}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.IfExp) and (target := names.get(ast.unparse(node.value.orelse))):
            names[node.targets[0].id] = target
    return names


def resolve(node, names: dict[str, str], module: str = "") -> str | None:
    """The dotted name of what is called; None if it is none of a library's."""
    if isinstance(node, ast.IfExp):
        return resolve(node.orelse, names)
    text = ast.unparse(node)
    root, _, rest = text.partition(".")
    if root in names and re.fullmatch(r"[\w.]+", text):
        return f"{names[root]}.{rest}".rstrip(".")
    if kind := BUILDERS.get(text) or BUILDERS.get(f"{module}.{text}"):
        return f"trl.{kind}Config"
    if text in CALLED:
        return CALLED[text]
    if re.fullmatch(r"(adapters|generation|scoring|recipes|models|training|dpo|torch|self|raw)\.\w+", text):
        return None
    if isinstance(node, ast.Attribute) and node.attr in METHODS:
        return METHODS[node.attr].format(node.attr)
    return None


def calls(text: str, module: str = "") -> set[tuple[str, str]]:
    """(callable, argument) pairs: a keyword, `()` for the call itself, `n positional`, or `**what` where that isn't known."""
    tree, found = ast.parse(text), set()
    names, own = library_names(tree), {"SFT": parameters(training.make_trainer), "DPO": parameters(dpo.make_trainer)}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        target = resolve(call.func, names, module)
        if target is None or (ast.unparse(call.func) in CALLED and not call.keywords and target == LLAMA):
            continue
        builder = target in ("trl.SFTConfig", "trl.DPOConfig") and ast.unparse(call.func) not in names
        found.add((target, "()"))
        if not builder and call.args and not any(isinstance(a, ast.Starred) for a in call.args):
            found.add((target, f"{len(call.args)} positional"))
        for keyword in call.keywords:
            if keyword.arg and not (builder and keyword.arg in own[target[4:7]]):
                found.add((target, keyword.arg))
            elif keyword.arg is None:
                found |= {(target, name) for name in spread(target, keyword.value)}
    return found


def spread(target: str, value) -> list[str]:
    """The names that `**value` passes: a dict's own, those of both sides of `|`, and what STARRED says."""
    if isinstance(value, ast.BinOp):
        return spread(target, value.left) + spread(target, value.right)
    if isinstance(value, ast.Dict):
        return [key.value for key in value.keys]
    text = ast.unparse(value)
    if target in ("trl.SFTConfig", "trl.DPOConfig") and re.fullmatch(BUILT, text):
        return []
    return list(STARRED.get((target, text), [f"**{text}"]))


def settings(kind: str) -> set[str]:
    """The names of all settings that reach TRL's config from the course's dicts, built here with TRL's class replaced by dict."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "trl", SimpleNamespace(SFTConfig=dict, DPOConfig=dict))
        if kind == "SFT":  # the control of notebook 04 hands `dpo.housekeeping` to SFT's
            return set(training.sft_config(recipes.SFTRecipe(), Path("x"), **dpo.housekeeping(dpo.DPORecipe())))
        return set(dpo.dpo_config(dpo.DPORecipe(), Path("x"))) | set(dpo.dpo_config(dpo.DPORecipe(sft_weight=1.0), Path("x")))


def everything() -> list[tuple[str, str]]:
    found = {(f"trl.{kind}Config", name) for kind in ("SFT", "DPO") for name in settings(kind)}
    for path in [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("helpers/**/*.py"), *ROOT.glob("course/**/*.py")]:
        found |= calls(source(path), path.stem)
    for path in {*ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py")} - {Path(__file__)}:  # what these change in a config
        found |= {(name, what) for name, what in calls(source(path), path.stem) if name in ("trl.SFTConfig", "trl.DPOConfig") and what.isidentifier()}
    return sorted(found)


# ---------------------------------------------------------------- what is taken


def look_up(name: str):
    """The object of a dotted name: the longest module, then attributes."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        return functools.reduce(getattr, parts[end:], found)
    raise LookupError(name)


def parameters(function) -> dict:
    """A function's parameters by name, or a class's: of `__new__` where it is that which takes them (torch's parameters)."""
    if isinstance(function, type) and function.__init__ is object.__init__:
        function = function.__new__
    return dict(inspect.signature(function).parameters)


def taken_out_of_kwargs(*functions) -> set[str]:
    return {name for f in functions for name in re.findall(r"kwargs\.(?:pop|get)\(\s*\"(\w+)\"", inspect.getsource(f))}


def taken(name: str) -> set[str]:
    """The arguments that a callable takes: those of its signature, and those that it takes out of its `**kwargs`, where its source or a class tells."""
    import transformers

    more, base = set(), transformers.PreTrainedModel
    if name.endswith("AutoModelForCausalLM.from_pretrained"):
        more = set(parameters(base.from_pretrained)) | taken_out_of_kwargs(base.from_pretrained)
    elif name.endswith("AutoModelForCausalLM.from_config"):
        more = taken_out_of_kwargs(base._from_config)
    elif name.endswith("AutoTokenizer.from_pretrained"):
        more = taken_out_of_kwargs(look_up(name))
    elif name.endswith("generate"):
        more = set(vars(transformers.GenerationConfig())) | set(parameters(look_up(LLAMA)))
    elif name.endswith("LlamaModel.forward"):  # what it doesn't know it hands to the attention function, here the course's own (test_generation)
        more = set(parameters(prefix.attend))
    return {p.name for p in parameters(look_up(name)).values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)} | more


def problem(name: str, argument: str) -> str | None:
    """What is wrong with passing the argument to the callable; None if nothing is."""
    if argument.startswith("**"):
        return f"what {argument} passes is not known: name it in STARRED"
    if argument in DEPRECATED:
        return f"{argument} is deprecated: {DEPRECATED[argument]} took its place"
    found = look_up(name)
    if argument == "()":
        return None if callable(found) else f"{name} can't be called"
    if argument.endswith(" positional"):
        places = [p for p in parameters(found).values() if p.kind != p.KEYWORD_ONLY and p.name != "self" and p.kind != p.VAR_KEYWORD]
        room = not places or any(p.kind == p.VAR_POSITIONAL for p in places) or int(argument.split()[0]) <= len(places)
        return None if room else f"{name} takes {len(places)} positional arguments"
    if argument not in taken(name):
        return f"{name} takes no {argument}"
    fields = [c.__dataclass_fields__[argument] for c in getattr(found, "__mro__", ()) if argument in getattr(c, "__dataclass_fields__", ())]
    told = any(re.search(rf"^deprecated|`{argument}` is deprecated", f.metadata.get("help") or "", re.I) for f in fields)
    return f"{argument} is deprecated, as its help text says" if told and argument not in STILL_NEEDED else None


PAIRS = everything()


@pytest.mark.parametrize(("name", "argument"), PAIRS, ids=lambda part: part)
def test_the_installed_release_takes(name, argument):
    assert problem(name, argument) is None


def test_nothing_was_overlooked():
    """The sources pass what they are known to pass: a reading that found nothing would find no fault either."""
    assert len(PAIRS) > 150 and {name.split(".")[0] for name, _ in PAIRS} >= set(LIBRARIES)
    assert {("trl.SFTConfig", "save_strategy"), ("trl.DPOConfig", "beta"), ("peft.PeftModel.from_pretrained", "is_trainable")} <= set(PAIRS)
    assert {("transformers.Trainer.train", "resume_from_checkpoint"), ("trl.SFTTrainer", "peft_config"), ("trl.DPOTrainer", "args")} <= set(PAIRS)


WRONG = {
    "from trl import SFTConfig\nSFTConfig(max_seq_length=1)": "max_length took its place",
    "from trl import SFTConfig\nSFTConfig(evaluation_strategy='no')": "eval_strategy took its place",
    "from trl import SFTTrainer\nSFTTrainer(model, tokenizer=t)": "processing_class took its place",
    "from transformers import AutoModelForCausalLM as A\nA.from_pretrained(p, torch_dtype=d)": "dtype took its place",
    "from transformers import AutoModelForCausalLM as A\nA.from_pretrained(p, use_safetensor=True)": "takes no use_safetensor",
    "from trl import DPOConfig\nDPOConfig(betta=1)": "takes no betta",
    "training.make_trainer(recipe, model, tokenizer, savesteps=1)": "trl.SFTConfig takes no savesteps",
    "import peft\npeft.LoraConfig(**surprise)": "name it in STARRED",
    "import bitsandbytes as bnb\nbnb.functional.quantize_4bit(w, quant='nf4')": "takes no quant",
    "import bitsandbytes.functional as F\nF.dequantize_4bit(1, 2, 3, 4, 5, 6, 7, 8, 9)": "positional arguments",
    "model.generate(ids, max_tokens=3)": "takes no max_tokens",
    "tokenizer.apply_chat_template(c, add_generation=True)": "takes no add_generation",
    "model.merge_and_unload(safe=True)": "takes no safe",
    "from trl import DPOConfig\nDPOConfig(pad_to_multiple_of=8, truncation_mode='x', gradient_checkpointing_kwargs={})": "as its help text says",
}


@pytest.mark.parametrize("text", WRONG)
def test_the_check_can_fail(text):
    found = [said for pair in sorted(calls(text)) if (said := problem(*pair))]
    assert len(found) == 1 and WRONG[text] in found[0]


def test_the_old_name_of_checkpointing_is_still_needed():
    """transformers renamed it after 5.20; the course also runs on 5.15, which Colab has, and TRL's own configs set the old name. When either
    ends, write activation_checkpointing, empty STILL_NEEDED and take the name out of course/deprecations.py."""
    from trl import DPOConfig, SFTConfig

    assert all(config.__dataclass_fields__["gradient_checkpointing"].default is True for config in (SFTConfig, DPOConfig))
    assert '"transformers>=5.15' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


# ---------------------------------------------------------------- what the helpers lean on without an argument


def arguments(name: str) -> list[str]:
    return list(parameters(look_up(name)))


def text_of(name: str) -> str:
    return inspect.getsource(look_up(name))


def fields(name: str) -> set[str]:
    return {f.name for f in dataclasses.fields(look_up(name))}


def quantized():
    """bitsandbytes' state of a small matrix, absmax quantized too."""
    import bitsandbytes.functional as bnb
    import torch

    return bnb.quantize_4bit(torch.ones(64, 64), quant_type="nf4", compress_statistics=True)[1]


INTERNALS = {
    "SFTTrainer.compute_loss": lambda: arguments("trl.SFTTrainer.compute_loss") == ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    "DPOTrainer.log": lambda: arguments("trl.DPOTrainer.log") == ["self", "logs", "start_time"],
    "DPOTrainer asks the fused head": lambda: "labels=labels, fused_lm_head=True)" in text_of("trl.DPOTrainer"),
    "the fused head's output": lambda: {"log_probs", "entropy", "mean_logits", "is_top1"} <= fields("trl.trainer.utils.FusedCausalLMOutput"),
    "DPOTrainer._metrics": lambda: "_metrics" in look_up("trl.DPOTrainer.__init__").__code__.co_names,
    "names of DPO's metrics": lambda: all(
        f'["{name}"].append' in text_of("trl.DPOTrainer")
        for name in "rewards/margins rewards/chosen rewards/rejected entropy mean_token_accuracy logits/chosen logits/rejected".split()
    ),
    "DPO's reference is an adapter": lambda: 'add_adapter("ref"' in text_of("trl.DPOTrainer.__init__"),
    "DPO's losses": lambda: all(f'loss_type == "{name}"' in text_of("trl.DPOTrainer") for name in ("sigmoid", "sft")),
    "SFTTrainer reads completion masks": lambda: "completion_mask" in text_of("trl.SFTTrainer"),
    "disable_input_dtype_casting": lambda: arguments("peft.helpers.disable_input_dtype_casting")[0] == "model",
    "get_peft_model_state_dict": lambda: "save_embedding_layers" in arguments("peft.get_peft_model_state_dict"),
    "set_peft_model_state_dict": lambda: arguments("peft.set_peft_model_state_dict")[:2] == ["model", "peft_model_state_dict"],
    "PEFT's files": lambda: (look_up("peft.utils.SAFETENSORS_WEIGHTS_NAME"), look_up("peft.utils.CONFIG_NAME")) == ("adapter_model.safetensors", "adapter_config.json"),
    "PeftModel.active_peft_config": lambda: hasattr(look_up("peft.PeftModel"), "active_peft_config"),
    "PeftConfig.is_prompt_learning": lambda: look_up("peft.PromptTuningConfig")(num_virtual_tokens=1, task_type="CAUSAL_LM").is_prompt_learning is True,
    "prompt tuning's SAMPLE_VOCAB": lambda: "SAMPLE_VOCAB" in look_up("peft.PromptTuningInit").__members__,
    "LoRA layers' scaling": lambda: {"lora_A", "lora_B"} <= set(look_up("peft.tuners.lora.Linear").adapter_layer_names) and "scaling" in look_up("peft.tuners.lora.Linear").other_param_names,
    "add_weighted_adapter's cat": lambda: '"cat"' in text_of("peft.LoraModel.add_weighted_adapter"),
    "GgufConfig": lambda: {"gguf_file", "dequantize"} <= taken("transformers.GgufConfig"),
    "set_attn_implementation": lambda: arguments("transformers.PreTrainedModel.set_attn_implementation")[1] == "attn_implementation",
    "PrinterCallback": lambda: issubclass(look_up("transformers.PrinterCallback"), look_up("transformers.TrainerCallback")),
    "TrainerCallback": lambda: all(
        arguments(f"transformers.TrainerCallback.{moment}")[:4] == ["self", "args", "state", "control"]
        for moment in ("on_train_begin", "on_step_end", "on_log", "on_train_end")
    ),
    "TrainerState": lambda: {"global_step", "max_steps", "log_history", "num_input_tokens_seen"} <= fields("transformers.TrainerState"),
    "TrainerControl": lambda: "should_training_stop" in fields("transformers.TrainerControl"),
    "a checkpoint's files": lambda: [look_up(f"transformers.trainer.{n}") for n in ("TRAINER_STATE_NAME", "OPTIMIZER_NAME")] == ["trainer_state.json", "optimizer.pt"],
    "a checkpoint's folder": lambda: look_up("transformers.trainer_utils.PREFIX_CHECKPOINT_DIR") == "checkpoint",
    "quant_state": lambda: None not in [getattr(quantized(), n) for n in ("absmax", "code", "offset", "state2", "blocksize", "quant_type")],
    "quant_state.state2": lambda: None not in [getattr(quantized().state2, n) for n in ("absmax", "code")],
    "quant_state.packing_format_for_cpu": lambda: "packing_format_for_cpu = True" in text_of("bitsandbytes.functional"),
    "LLM.int8's scales": lambda: {"CB", "SCB"} <= set(arguments("bitsandbytes.nn.Int8Params.__new__")) & set(vars(look_up("bitsandbytes.MatmulLtState"))),
    "names of quantized parameters": lambda: look_up("bitsandbytes.nn.Params4bit") and look_up("bitsandbytes.nn.Int8Params"),
}  # fmt: skip


@pytest.mark.parametrize("what", INTERNALS)
def test_internals_that_the_helpers_lean_on_are_there(what):
    assert INTERNALS[what]()


@pytest.mark.parametrize("entry", menu.MENU.values(), ids=lambda entry: entry.name)
def test_each_model_of_the_menu_has_a_shape_that_transformers_knows(entry):
    config = look_up("transformers.AutoConfig").for_model(entry.shape["model_type"])
    assert all(hasattr(config, name) for name in entry.shape.keys() - {"head_dim"})  # some models read that one only if it is there


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_the_configs_are_built_with_the_values_that_the_course_gives(kind, tmp_path):
    made = training.sft_config(recipes.SFTRecipe(), tmp_path) if kind == "SFT" else dpo.dpo_config(dpo.DPORecipe(sft_weight=1.0), tmp_path)
    assert isinstance(made, look_up(f"trl.{kind}Config")) and made.max_length == 256 and made.use_cpu == (device().kind == "cpu")
