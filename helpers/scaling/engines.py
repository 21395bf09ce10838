"""One recipe, many engines: an SFT or DPO recipe as the files of TRL's command line, Axolotl, LLaMA-Factory and Accelerate.

`write` makes a folder of them, the training data in each engine's form with it; the engines are run in that folder. The committed one
is configs/ (`make configs`), held equal to the recipes by a test, and `make interop-check` shows each file to its engine's own parser.
What an engine can't say stands in the file as a comment. Keys: TRL 1.16, Axolotl 0.19 to 0.21, LLaMA-Factory 0.9.5, Accelerate 1.15.
"""

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

from helpers import dpo, flights, recipes, training
from helpers.command import status
from helpers.domain import Domain
from helpers.dpo import DPORecipe
from helpers.files import CourseError, write_whole
from helpers.flights import FLIGHTS
from helpers.menu import choose
from helpers.recipes import SFTRecipe
from helpers.runtime import ROOT
from helpers.scaling import spread
from helpers.scaling.yaml_text import file_text

CONFIGS = ROOT / "configs"
CARDS = {"ampere": "", "t4": "-t4"}  # precision: bfloat16 on Ampere and newer, float16 on a T4; and what its files' names end in
MERGED = "sft-merged"  # where DPO starts in every engine: a folder that you make
LOGGING = {"logging_steps": 10, "save_steps": 50, "save_total_limit": 1}
TEMPLATES = {"SmolLM2": "smollm", "Qwen2.5": "qwen", "gemma": "gemma", "Mistral": "mistral", "Llama": "llama3"}  # LLaMA-Factory's names


# ---------------------------------------------------------------- what all engines are told


def facts(recipe, card: str = "ampere", gpus: int = 1) -> SimpleNamespace:
    """What a recipe says, under names that every engine's writer below reads. CourseError for what no engine file can carry."""
    if card not in CARDS:
        raise CourseError(f"Unknown card {card!r}: {' or '.join(CARDS)}.")
    start, preference = getattr(recipe, "start", recipe), hasattr(recipe, "beta")
    if start.method not in ("lora", "rslora", "dora", "full"):
        raise CourseError(f"{start.method} has no key in these engines: lora, rslora, dora and full have.")
    if preference and recipe.method != "dpo":
        raise CourseError("The control of notebook 04 is plain SFT on the chosen answers: write it as an SFTRecipe.")
    entry, (at_once, times) = choose(), spread.split(recipe.batch_size, gpus)
    lora = None if start.method == "full" else recipes.lora_config(start)
    modules = lora and (lora.target_modules if isinstance(lora.target_modules, str) else sorted(lora.target_modules))
    common = {"max_steps": recipe.steps, "per_device_train_batch_size": at_once, "gradient_accumulation_steps": times}
    common |= {"learning_rate": recipe.learning_rate, "lr_scheduler_type": getattr(recipe, "scheduler", "linear")}
    common |= {"warmup_steps": getattr(recipe, "warmup_steps", 0), "max_grad_norm": getattr(recipe, "max_grad_norm", 1.0), "weight_decay": 0.0}
    common |= {"optim": "adamw_torch_fused" if card == "ampere" else "adamw_torch", "seed": recipe.seed}
    return SimpleNamespace(
        stage="dpo" if preference else "sft", recipe=recipe, card=card, entry=entry, bits=start.bits, lora=lora, modules=modules, common=common,
        layers=lora and lora.layers_to_transform, lora_plus=getattr(recipe, "lora_plus", 1) if lora else 1,
        model=MERGED if preference else entry.repo, revision=None if preference else entry.revision,
        precision={"bf16": card == "ampere", "fp16": card == "t4"},
    )  # fmt: skip


def head(f: SimpleNamespace, command: str, data: str) -> list[str]:
    """The comments on top of every file: where it comes from, how it is run, what it differs in from the course's own run."""
    said = [f"{f.stage.upper()} recipe {f.recipe.key()} of the course, written by helpers.scaling.engines: change the recipe and write it anew, not this file.",
            f"In this folder: {command}", data]  # fmt: skip
    if f.stage == "dpo":
        said.append(f"{MERGED}/ is your SFT adapter merged into the 16-bit model, with its tokenizer, saved there (adapters.merge, save_pretrained).")
        said.append("A fresh adapter starts on it and the reference is the model without it; the course goes on with the SFT adapter itself.")
    return said


ORDER = "The order of the examples is the engine's own: as many steps, of other batches than the course's."


def data_files(recipe, rows=None, domain: Domain = FLIGHTS) -> dict[str, str]:
    """The recipe's training data as JSON Lines, by file name: TRL's columns, and messages as Axolotl and LLaMA-Factory read them.

    `rows`: your own, as `training.make_trainer` and `dpo.make_trainer` take them. Same rows, same bytes. For DPO without the pairs that are only watched.
    """
    if hasattr(recipe, "beta"):
        pairs = (dpo.load_pairs(recipe.pairs) if rows is None else list(rows))[: -dpo.PROBE]
        if not pairs:
            raise CourseError(f"Too few pairs: the last {dpo.PROBE} are watched and not trained on.")
        said = [{side: {"role": "assistant", "content": pair[side]} for side in ("chosen", "rejected")} for pair in pairs]
        asked = [flights.chat(pair["prompt"], domain.system_prompt) for pair in pairs]
        trl = [{"prompt": chat, "chosen": [s["chosen"]], "rejected": [s["rejected"]]} for chat, s in zip(asked, said, strict=True)]
        messages = [{"messages": chat} | s for chat, s in zip(asked, said, strict=True)]
    else:
        trl = [flights.prompt_completion(row, domain.system_prompt) for row in recipes.training_rows(recipe, rows)]
        messages = [{"messages": row["prompt"] + row["completion"]} for row in trl]
    name = "dpo" if hasattr(recipe, "beta") else "sft"
    return {f"{name}.jsonl": _lines(trl), f"{name}-messages.jsonl": _lines(messages)}


def _lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# ---------------------------------------------------------------- one writer for each engine


def trl(f: SimpleNamespace, data: str) -> str:
    """`trl sft` or `trl dpo`."""
    quantized = f.bits == 4 and f.card == "ampere"
    model = {"model_name_or_path": f.model, "model_revision": f.revision} if f.revision else {"model_name_or_path": f.model}
    model |= {"dtype": "bfloat16" if f.card == "ampere" else "float16", "attn_implementation": "sdpa"}
    model |= {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if quantized else {}
    adapter, own = {"use_peft": False}, []
    if f.lora:
        targets = f.modules
        if f.layers:  # a single text is a regular expression to PEFT
            targets = rf".*\.layers\.({'|'.join(map(str, f.layers))})\..*\.({'|'.join(f.modules)})"
        adapter = {"use_peft": True, "lora_r": f.lora.r, "lora_alpha": f.lora.lora_alpha, "lora_dropout": 0.0, "lora_target_modules": targets}
        adapter |= {key: True for key in ("use_rslora", "use_dora") if getattr(f.lora, key)}
    if quantized:
        own.append("TRL casts a quantized model's adapter to bfloat16, and its command line can't undo that as the course does.")
    if f.bits == 4 and f.card == "t4":
        own.append("Without 4 bits: TRL casts a quantized model's adapter to bfloat16, on which a T4's gradient scaler stops at the first step (trl issue 4901).")
        own.append("So a model must fit the T4 in 16 bits here; for QLoRA of a larger one on a T4 take the course's own trainer.")
    if f.lora_plus != 1:
        own.append(f"LoRA+ is left out, TRL has no key for it: B learns as fast as A, in the course {f.lora_plus:g} times as fast.")
    learnt = {"beta": f.recipe.beta, "loss_type": ["sigmoid"]} if f.stage == "dpo" else {"completion_only_loss": True, "train_sampling_strategy": "group_by_length"}
    if f.stage == "dpo" and f.recipe.sft_weight:
        learnt |= {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, f.recipe.sft_weight]}
    return file_text(head(f, f"trl {f.stage} --config trl/{f.stage}{CARDS[f.card]}.yaml --accelerate_config accelerate/1-gpu.yaml", data) + own, {
        "the model": model,
        "what is trained": adapter,
        "the data": {"datasets": [{"path": "json", "data_files": f"data/{f.stage}.jsonl", "split": "train"}], "max_length": f.recipe.max_length},
        "how it learns": f.common | learnt,
        "the machine": f.precision | {"gradient_checkpointing": False, "output_dir": f"runs/trl-{f.stage}", "report_to": "none"} | LOGGING,
    })  # fmt: skip


def axolotl(f: SimpleNamespace, data: str) -> str:
    """`axolotl train`."""
    model = {"base_model": f.model} | ({"revision_of_model": f.revision} if f.revision else {})
    adapter, own = {}, [ORDER]
    if f.lora:
        adapter = {"adapter": "qlora" if f.bits == 4 else "lora", "load_in_4bit": f.bits == 4, "lora_r": f.lora.r, "lora_alpha": f.lora.lora_alpha}
        adapter |= {"lora_dropout": 0.0} | ({"lora_target_linear": True} if f.modules == "all-linear" else {"lora_target_modules": f.modules})
        adapter |= {"bnb_config_kwargs": {"bnb_4bit_use_double_quant": False}} if f.bits == 4 else {}  # its default is True
        adapter |= {"peft_layers_to_transform": list(f.layers)} if f.layers else {}
        adapter |= {"loraplus_lr_ratio": float(f.lora_plus)} if f.lora_plus != 1 else {}
        adapter |= {f"peft_{key}": True for key in ("use_rslora", "use_dora") if getattr(f.lora, key)}
    own += ["In which precision it keeps the adapter is Axolotl's own choice; the course keeps it in float32."] if f.lora else []
    if f.card == "t4":
        own.append("On a T4 it has not been run: if the gradient scaler stops, load_in_4bit: false and adapter: lora.")
    source = {"path": f"data/{f.stage}-messages.jsonl", "ds_type": "json"}
    if f.stage == "dpo":
        source |= {"type": "chat_template.default", "split": "train", "field_messages": "messages", "field_chosen": "chosen", "field_rejected": "rejected"}
        learnt = {"rl": "dpo", "rl_beta": f.recipe.beta}
        learnt |= {"dpo_loss_type": ["sigmoid", "sft"], "dpo_loss_weights": [1.0, f.recipe.sft_weight]} if f.recipe.sft_weight else {}
    else:
        source |= {"type": "chat_template", "field_messages": "messages", "roles_to_train": ["assistant"], "train_on_eos": "turn"}
        learnt = {"group_by_length": True}
    renamed = {"per_device_train_batch_size": "micro_batch_size", "lr_scheduler_type": "lr_scheduler", "optim": "optimizer"}
    return file_text(head(f, f"axolotl train axolotl/{f.stage}{CARDS[f.card]}.yaml", data) + own, {
        "the model": model | {"attn_implementation": "sdpa"},
        "what is trained": adapter,
        "the data": {"chat_template": "tokenizer_default", "datasets": [source], "sequence_len": f.recipe.max_length, "sample_packing": False},
        "how it learns": {renamed.get(key, key): value for key, value in f.common.items()} | learnt,
        "the machine": f.precision | {"gradient_checkpointing": False, "output_dir": f"runs/axolotl-{f.stage}"} | LOGGING,
    })  # fmt: skip


def llamafactory(f: SimpleNamespace, data: str) -> str:
    """`llamafactory-cli train`; it finds the data through data/dataset_info.json."""
    model = {"model_name_or_path": f.model} | ({"model_revision": f.revision} if f.revision else {})
    model |= {"flash_attn": "sdpa", "template": next(name for start, name in TEMPLATES.items() if f.entry.name.startswith(start))}
    adapter, own = {"finetuning_type": "full"}, [ORDER]
    if f.lora:
        if f.bits == 4:
            model |= {"quantization_bit": 4, "quantization_method": "bnb", "quantization_type": "nf4", "double_quantization": False}
        targets = "all" if f.modules == "all-linear" else ",".join(f.modules)
        if f.layers:  # PEFT takes the end of a module's name for it
            own.append("It has no key for layers: each matrix that gets an adapter is named.")
            parts = {name: "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn" for name in f.modules}
            targets = ",".join(f"layers.{layer}.{parts[name]}.{name}" for layer in f.layers for name in f.modules)
        adapter = {"finetuning_type": "lora", "lora_rank": f.lora.r, "lora_alpha": f.lora.lora_alpha, "lora_dropout": 0.0, "lora_target": targets}
        adapter |= {"loraplus_lr_ratio": float(f.lora_plus)} if f.lora_plus != 1 else {}
        adapter |= {key: True for key in ("use_rslora", "use_dora") if getattr(f.lora, key)}
    if f.card == "t4":
        own.append("On a T4 it has not been run.")
    learnt = {"pref_beta": f.recipe.beta, "pref_loss": "sigmoid", "pref_ftx": f.recipe.sft_weight} if f.stage == "dpo" else {"train_on_prompt": False}
    return file_text(head(f, f"llamafactory-cli train llamafactory/{f.stage}{CARDS[f.card]}.yaml", data) + own, {
        "the model": model,
        "what is trained": {"stage": f.stage, "do_train": True} | adapter,
        "the data": {"dataset_dir": "data", "dataset": f.stage, "cutoff_len": f.recipe.max_length, "packing": False},
        "how it learns": f.common | learnt,
        "the machine": f.precision | {"disable_gradient_checkpointing": True, "output_dir": f"runs/llamafactory-{f.stage}", "report_to": "none"} | LOGGING,
    })  # fmt: skip


def dataset_info() -> str:
    """LLaMA-Factory's list of the data files beside it, and what their columns hold."""
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
    sft = {"file_name": "sft-messages.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    sides = {"columns": {name: name for name in ("messages", "chosen", "rejected")}}
    return json.dumps({"sft": sft, "dpo": sft | {"file_name": "dpo-messages.jsonl", "ranking": True} | sides}, indent=2) + "\n"


# ---------------------------------------------------------------- all together


ENGINES = {"trl": trl, "axolotl": axolotl, "llamafactory": llamafactory}


def files(recipe=None, rows=None, domain: Domain = FLIGHTS, gpus: int = 1) -> dict[str, str]:
    """Every file of a recipe (None: both of the course's) by its path in the folder; the data too. `gpus` share the recipe's batch."""
    if recipe is None and rows is not None:
        raise CourseError("Rows of your own go with a recipe of your own: give it as well.")
    found = {f"accelerate/{machine}.yaml": spread.accelerate(machine) for machine in spread.MACHINES} | {"data/dataset_info.json": dataset_info()}
    for one in (SFTRecipe(), DPORecipe()) if recipe is None else (recipe,):
        data = {f"data/{name}": text for name, text in data_files(one, rows, domain).items()}
        for card, ending in CARDS.items():
            f = facts(one, card, gpus)
            for name, engine in ENGINES.items():
                file = f"data/{f.stage}{'' if name == 'trl' else '-messages'}.jsonl"
                digest = hashlib.sha256(data[file].encode()).hexdigest()
                found[f"{name}/{f.stage}{ending}.yaml"] = engine(f, f"{file}: {data[file].count(chr(10)):,} rows, sha256 {digest[:16]}…")
        found |= data
    return found


def write(folder: Path, recipe=None, rows=None, domain: Domain = FLIGHTS, gpus: int = 1, tokenizer=None) -> list[str]:
    """Writes `files` into a folder, each whole; their paths. With a `tokenizer`, SFT rows that max_length would cut are refused first."""
    if tokenizer is not None and not hasattr(recipe, "beta"):
        one = recipe or SFTRecipe()
        training.check_lengths(recipes.training_rows(one, rows), tokenizer, one.max_length, domain)
    found = files(recipe, rows, domain, gpus)
    for name, text in found.items():
        write_whole(Path(folder) / name, text)
    return sorted(found)


def main() -> None:
    """Writes configs/ anew, with the data, which stays out of the repository."""
    print("\n".join(f"configs/{name}" for name in write(CONFIGS)))


if __name__ == "__main__":
    sys.exit(status(main))
