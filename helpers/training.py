"""Training: TRL's trainers for the recipes, and runs that go on where they were stopped."""

import contextlib
import json
import time
from pathlib import Path

from helpers import dense, flights, losses, runs, vetting
from helpers.adapters import export_adapter, have_adapter, is_adapter
from helpers.domain import Domain
from helpers.files import CourseError, write_whole
from helpers.flights import FLIGHTS
from helpers.models import load_model, load_tokenizer
from helpers.recipes import SFTRecipe, memory_advice, needs_checkpointing, peft_config, step_options, training_rows, training_set
from helpers.runtime import device, progress_bar, seed_everything


def check_targets(recipe: SFTRecipe, model) -> None:
    """Raises CourseError when a name in `target_modules` is no layer's: it would train nothing there, in silence."""
    if recipe.target_modules == "all-linear":
        return
    there = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if hasattr(module, "in_features")} - {"lm_head"})
    wanted = [recipe.target_modules] if isinstance(recipe.target_modules, str) else recipe.target_modules
    if missing := [name for name in wanted if name not in there]:
        raise CourseError(f"No layer of this model is called {', '.join(missing)}: target_modules can name {', '.join(there)}, or be 'all-linear'.")


def check_unpacked(model) -> None:
    """Raises CourseError for a 4-bit model that has answered on a CPU: bitsandbytes then packed its weights anew, and gradients
    don't pass through the packed kernel (torch warns of it once; training goes on, and learns less)."""
    if any(getattr(getattr(p, "quant_state", None), "packing_format_for_cpu", False) for p in model.parameters()):
        raise CourseError("This 4-bit model has answered questions on a CPU and can't be trained any more: load a fresh one and train that.")


def base_model(recipe: SFTRecipe):
    """The model that the recipe starts from; for full fine-tuning its weights are float32, as every trained parameter here."""
    import torch

    if recipe.method == "full" and recipe.bits != 16:
        raise CourseError("Quantized weights can't be trained: full fine-tuning needs bits=16.")
    return load_model(recipe.bits, torch.float32 if recipe.method == "full" else None)


def common_settings(recipe, folder: Path) -> dict:
    """What every TRL trainer of the course is told, by an SFTRecipe or a DPORecipe and by this machine."""
    return {
        "output_dir": str(folder),
        "max_steps": recipe.steps,
        "per_device_train_batch_size": recipe.batch_size,
        "learning_rate": recipe.learning_rate,
        "max_length": recipe.max_length,
        "pad_to_multiple_of": 8,  # few shapes: torch's CPU library keeps a kernel for each it meets
        "gradient_checkpointing": needs_checkpointing(recipe),  # False for the course model: memory is there, time isn't
        "optim": device().optimizer,
    } | device().flags


def row_ids(row: dict, tokenizer, domain: Domain = FLIGHTS) -> list[int]:
    """Token ids of a training row as it is learnt: the whole conversation, its answer included."""
    turns = [turn for side in flights.prompt_completion(row, domain.system_prompt).values() for turn in side]
    return tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]


def check_lengths(rows: list[dict], tokenizer, max_length: int, domain: Domain = FLIGHTS) -> None:
    """CourseError that names each row which doesn't fit: TRL would cut the end off its answer, end of turn included, in silence."""
    found = []
    for number, row in enumerate(rows, 1):
        if len(row["question"].encode()) + len(row["sql"].encode()) + len(domain.system_prompt.encode()) < max_length - 100:  # a token has a byte at least; a template has its own
            continue
        if (tokens := len(row_ids(row, tokenizer, domain))) > max_length:
            found.append(f"row {number} has {tokens} tokens ({row['question'][:40]!r})")
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise CourseError(f"{', '.join(found[:5])}{more}; max_length is {max_length}. Shorten these rows, or raise max_length in the recipe.")


# Settings that the course's own trainer on a CPU doesn't know, and their usual values: with another one TRL's own is taken.
USUAL = {"label_smoothing_factor": 0, "loss_type": "nll", "neftune_noise_alpha": None}


def honoured(changes: dict) -> dict:
    """A caller's own settings as a trainer takes them: epochs stand in place of the recipe's steps. CourseError for what can't be had here."""
    if changes.get("packing") or changes.get("padding_free"):
        raise CourseError("packing and padding_free put several examples into one row, where without FlashAttention each would see the others: leave them out.")
    return ({"max_steps": -1} if "num_train_epochs" in changes else {}) | changes


def sft_config(recipe: SFTRecipe, folder: Path, **changes):
    """TRL's settings for the recipe on this machine."""
    from trl import SFTConfig

    changes = honoured(changes)
    settings = {
        "lr_scheduler_type": recipe.scheduler,
        "warmup_steps": recipe.warmup_steps,
        "max_grad_norm": recipe.max_grad_norm,
        "train_sampling_strategy": "group_by_length",  # batches of like length: little padding
        "save_steps": 50,
    }
    return SFTConfig(**common_settings(recipe, folder) | settings | housekeeping(recipe) | changes)


def housekeeping(recipe: SFTRecipe) -> dict:
    """The settings that don't decide what is learnt."""
    return {
        "seed": recipe.seed,
        "logging_steps": 10,
        "save_total_limit": 1,  # checkpoints kept
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": device().flags["dataloader_pin_memory"],
    }


def make_trainer(recipe: SFTRecipe, model, tokenizer, rows=None, folder: Path | None = None, domain: Domain = FLIGHTS, **changes):
    """TRL's SFTTrainer for the recipe, over `model`, with float32 adapters and what makes it quick on a CPU.

    `rows` with question and sql (None: the recipe's own), asked with the system prompt of `domain`; `changes` are TRL's settings.
    """
    from trl import SFTTrainer

    check_targets(recipe, model)
    check_unpacked(model)
    seed_everything(recipe.seed)
    trained = trainable_state(model) if hasattr(model, "peft_config") else None  # an adapter that goes on from where it was
    model.set_attn_implementation(device().attention)
    chosen, config = training_rows(recipe, rows), sft_config(recipe, folder or runs.folder_for(recipe, rows, changes, domain.system_prompt), **changes)
    check_lengths(chosen, tokenizer, config.max_length, domain)
    usual = all(getattr(config, name) == value for name, value in USUAL.items())
    trainer = (losses.cpu_trainer_class() if device().course_loss and usual else SFTTrainer)(
        model=model,
        args=config,
        train_dataset=training_set(chosen, domain),
        processing_class=tokenizer,
        peft_config=None if hasattr(model, "peft_config") else peft_config(recipe),
    )
    restore_float32(trainer.model, trained)
    start_scaler_low(trainer)
    trainer.starts_from = trained and runs.digest(trained)
    return trainer


FIRST_SCALE = 1024.0  # torch starts at 65,536, and a step that overflows is lost: simulated on a CPU, DPO's first four were


def start_scaler_low(trainer) -> None:
    """A float16 trainer's gradient scaler, if there is one, starts at `FIRST_SCALE`."""
    import torch

    if trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler = torch.amp.GradScaler(device().kind, init_scale=FIRST_SCALE)


def trainable_state(model) -> dict:
    """A float32 copy of the trainable parameters by name, to be put back by `restore_float32`."""
    return {name: p.detach().float().clone() for name, p in model.named_parameters() if p.requires_grad}


def restore_float32(model, state: dict | None = None) -> None:
    """Undoes TRL's cast of a quantized model's trainable parameters to bfloat16, values included where `state` has them.

    TRL 1.16 casts them when a trainer is built: a T4's gradient scaler then fails, and an adapter that was trained
    before is rounded. A fresh adapter needs no `state`: its B is 0 and its A was drawn at random anyway.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = (state[name].to(parameter.device) if state and name in state else parameter.data).float()


def progress_callback():
    """One live line with step, loss, time gone and time to go; cleared at the end."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.bar = progress_bar(state.max_steps, "training")
            self.bar.update(state.global_step)

        def on_step_end(self, args, state, control, **kwargs):
            self.bar.update(1)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

        def on_train_end(self, args, state, control, **kwargs):
            self.bar.close()

    return Progress()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written whole (the trainer's state is the last file of one)."""
    found = [p for p in folder.glob("checkpoint-*") if _is_whole(p)]
    return max(found, key=lambda p: int(p.name.rsplit("-", 1)[1]), default=None)


def _is_whole(checkpoint: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):  # a full disk cuts the state short
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        return (checkpoint / "optimizer.pt").exists()
    return False


def fit(trainer, resume: bool = True) -> dict:
    """Trains, going on from the last whole checkpoint in the trainer's folder; returns history and seconds.

    In a folder that holds another run's checkpoints nothing is trained (CourseError, `runs.check`). An interrupt (Ctrl-C, the stop
    button), memory that runs out and a disk that fills up leave the last checkpoint and say how to go on (CourseError).
    """
    from peft.helpers import disable_input_dtype_casting
    from transformers import PrinterCallback

    args, model, folder = trainer.args, trainer.model, Path(trainer.args.output_dir)
    trainer.remove_callback(PrinterCallback)  # what `disable_tqdm` puts in place of transformers' own bar
    trainer.add_callback(progress_callback())
    runs.check(folder, made_of := runs.described(trainer))
    checkpoint = last_checkpoint(folder) if resume else None
    runs.keep(folder, made_of)
    start = time.perf_counter()
    # under autocast PEFT's own cast of each layer's input to float32 and back is work for nothing
    lora = any(hasattr(module, "lora_A") for module in model.modules())
    casting = disable_input_dtype_casting(model) if lora and args.bf16 else contextlib.nullcontext()
    trainer.share_prefix = device().course_loss
    try:
        with casting, dense.training(model):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        history = [log for log in trainer.state.log_history if log.keys() & {"loss", "probe/chosen"}]
        return {"history": history, "seconds": time.perf_counter() - start}
    except KeyboardInterrupt:
        stopped, then = "Training was interrupted", "Run the same cell again to go on from it."
    except Exception as error:  # torch, safetensors and tokenizers each have a kind of their own for a full disk
        signs = ("no space left", "disk quota", "inline_container", "pytorchstreamwriter")  # the last two: torch's words for a file that it couldn't write
        if any(sign in repr(error).lower() for sign in signs):
            stopped, then = "The disk filled up", "Free some space and run the same cell again to go on from it."
        elif not any(sign in repr(error).lower() for sign in ("outofmemory", "out of memory", "enough memory", "allocate memory", "alloc_failed")):
            raise
        else:
            stopped, then = "The memory ran out", _memory_advice(args, model, lora)
    # raised out here, where the error is gone: its traceback would keep the step's tensors alive
    kept, step = last_checkpoint(folder), trainer.state.global_step
    left = f"the checkpoint of step {kept.name.split('-')[1]} is kept" if kept else "there was no checkpoint yet"
    raise CourseError(f"{stopped} at step {step}; {left}. {then}")


def _memory_advice(args, model, lora: bool) -> str:
    method = "qlora" if getattr(model, "is_loaded_in_4bit", False) else "lora" if lora else "full"
    step = {"batch": args.per_device_train_batch_size * (1 + hasattr(args, "beta")), "length": args.max_length}  # beta: DPO's, of pairs
    step |= step_options() | {"method": method, "checkpointing": args.gradient_checkpointing, "dtype_bytes": model.dtype.itemsize}
    return memory_advice(model.config, **step)


def finish(trainer) -> dict:
    """`fit`, unless this very run was finished before: then its adapter and history are loaded, and said so.

    CourseError where the folder holds a run made of something else (`runs.check`).
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    folder = Path(trainer.args.output_dir)
    done = folder / "history.json"
    runs.check(folder, runs.described(trainer))
    if done.exists() and is_adapter(folder / "adapter"):
        runs.check_adapter(folder)
        print("This very recipe was trained before: its adapter is loaded. Delete runs/ (or make course FRESH=1) to train again.")
        set_peft_model_state_dict(trainer.model, load_file(folder / "adapter" / vetting.WEIGHTS))
        return runs.history(folder)
    result = fit(trainer)
    runs.keep(folder, runs.described(trainer), export_adapter(trainer.model, folder / "adapter"))
    write_whole(done, json.dumps(result))
    return result


def sft_adapter(recipe: SFTRecipe | None = None) -> Path:
    """The folder of the recipe's trained adapter: from `runs/` or the workshop kit, else trained now."""
    folder = (recipe := recipe or SFTRecipe()).folder() / "adapter"
    if not have_adapter(folder):
        finish(make_trainer(recipe, load_model(recipe.bits), load_tokenizer()))
    return folder
