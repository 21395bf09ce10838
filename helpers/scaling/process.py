"""What each of several processes does that train together: started by torchrun (helpers/scaling/distributed.py), it runs its plan and writes down what it is.

Everything in float32 and on the processor, so that two processes can be held against one.
"""

import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from helpers import flights, models, recipes, runtime, training
from helpers.files import CourseError, write_whole
from helpers.scaling import spread

PATIENCE = 60  # seconds that a process waits for another before it gives up


@dataclass(frozen=True)
class Plan:
    """A run: `steps` steps of `batch` examples in all. `layers`: of the model, from the bottom (None: all); `save_steps`: between checkpoints, of DDP."""

    kind: str = "ddp"
    steps: int = 4
    batch: int = 4
    layers: int | None = None
    save_steps: int = 2
    examples: int = 64
    learning_rate: float = 1e-3


def said(folder: Path, rank: int) -> dict | None:
    """What a process has written of itself so far."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / f"process-{rank}.json").read_text(encoding="utf-8"))


def data_of(plan: Plan):
    """The first examples of the recipe, in their order: what every process shares out."""
    return recipes.training_rows(recipes.SFTRecipe())[: plan.examples]


def short_model(plan: Plan):
    """The course model in float32 with the plan's layers."""
    import torch

    model = models.load_model(16, torch.float32)
    if plan.layers:
        model.model.layers = model.model.layers[: plan.layers]
        model.config.num_hidden_layers = plan.layers
    return model


def tell(folder: Path, rank: int, **more) -> None:
    """Writes down what a process knows of itself: its number, and what `more` adds."""
    before = said(folder, rank) or {"rank": rank, "pid": os.getpid(), "step": 0}
    write_whole(folder / f"process-{rank}.json", json.dumps(before | more))


def ddp(plan: Plan, folder: Path, rank: int, world: int) -> dict:
    """LoRA by TRL's own trainer, a whole model in every process: Accelerate wraps it in DistributedDataParallel, which averages the gradients.

    Not the course's own trainer for a CPU: it calls the model past the wrapper, and no gradient would ever be averaged.
    """
    from transformers import TrainerCallback
    from trl import SFTTrainer

    class Told(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            tell(folder, rank, step=state.global_step)

    recipe, model = recipes.SFTRecipe(), short_model(plan)
    adapter = recipes.lora_config(recipe)
    adapter.layers_to_transform = None  # the model may be short
    changes = {"max_steps": plan.steps, "per_device_train_batch_size": spread.split(plan.batch, world)[0], "learning_rate": plan.learning_rate, "warmup_steps": 0}
    changes |= {"train_sampling_strategy": "sequential", "logging_steps": 1, "save_steps": plan.save_steps, "bf16": False, "fp16": False}
    changes |= {"ddp_timeout": PATIENCE, "ddp_find_unused_parameters": False, "gradient_checkpointing": False}
    trainer = SFTTrainer(model=model, args=training.sft_config(recipe, folder, **changes), train_dataset=recipes.training_set(data_of(plan)),
                         processing_class=models.load_tokenizer(), peft_config=adapter, callbacks=[Told()])  # fmt: skip
    state, checkpoint = trainer.accelerator.state, training.last_checkpoint(folder)
    about = {"world_size": trainer.accelerator.num_processes, "type": state.distributed_type.value, "backend": state.backend or "none"}
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    wrapped = type(trainer.model_wrapped).__name__
    if world > 1 and wrapped != "DistributedDataParallel":
        raise CourseError(f"The trainer's model is a {wrapped}, not a DistributedDataParallel: each process would train by itself.")
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    sizes = sum(p.numel() for p in model.parameters())
    return about | {"losses": losses, "parameters": sizes, "examples": trainer.args.per_device_train_batch_size, "from_step": int(checkpoint.name.split("-")[1]) if checkpoint else 0}


def fsdp(plan: Plan, folder: Path, rank: int, world: int) -> dict:
    """Full fine-tuning with torch's own FSDP: each process keeps its part of every weight, gradient and optimizer state, and fetches a layer when it is due.

    By torch alone: Accelerate's FSDP is for accelerators, and on a processor gives DDP in silence.
    """
    import datetime

    import torch
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model, tokenizer = short_model(plan).requires_grad_(True).train(), models.load_tokenizer()
    if world > 1:
        distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=PATIENCE))
        mesh = init_device_mesh("cpu", (world,))
        for part in [*model.model.layers, model]:
            fully_shard(part, mesh=mesh)
    optimizer, rows, losses = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate / 10), data_of(plan), []
    for step in range(plan.steps):
        ids, labels, mask = batch_of(rows[step * plan.batch : (step + 1) * plan.batch][rank::world], tokenizer)
        count = (labels[:, 1:] != -100).sum()
        if world > 1:
            distributed.all_reduce(count)  # of the whole batch: its mean, not the mean of two means
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / count
        (loss * world).backward()  # FSDP takes the mean of the gradients
        optimizer.step()
        optimizer.zero_grad()
        whole = loss.detach().clone()
        if world > 1:
            distributed.all_reduce(whole)
        losses.append(whole.item())
        tell(folder, rank, step=step + 1)
    kind = "FSDP" if isinstance(model, FSDPModule) else "NO"
    size = sum((p.to_local() if kind == "FSDP" else p).numel() for p in model.parameters())
    about = {"world_size": distributed.get_world_size() if world > 1 else 1, "type": kind, "backend": distributed.get_backend() if world > 1 else "none"}
    if world > 1:
        distributed.destroy_process_group()
    return about | {"losses": losses, "parameters": size, "examples": plan.batch // world, "from_step": 0}


def batch_of(rows: list[dict], tokenizer):
    """Token ids, labels (-100 for prompt and padding) and mask of the rows, each (rows, tokens)."""
    import torch

    chats = [flights.prompt_completion(row) for row in rows]
    ids = [tokenizer.apply_chat_template(chat["prompt"] + chat["completion"], return_dict=True)["input_ids"] for chat in chats]
    asked = [len(tokenizer.apply_chat_template(chat["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]) for chat in chats]
    found = torch.full((len(ids), max(map(len, ids))), tokenizer.pad_token_id)
    labels, mask = torch.full_like(found, -100), torch.zeros_like(found)
    for row, (tokens, prompt) in enumerate(zip(ids, asked, strict=True)):
        found[row, : len(tokens)], labels[row, prompt : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), torch.tensor(tokens[prompt:]), 1
    return found, labels, mask


def main(folder: Path) -> None:
    """One process of a run: its number and how many there are come from torchrun."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    plan, start = Plan(**json.loads((folder / "plan.json").read_text(encoding="utf-8"))), time.perf_counter()
    tell(folder, rank)
    try:
        runtime.setup()
        found = {"ddp": ddp, "fsdp": fsdp}[plan.kind](plan, folder, rank, world)
    except Exception as error:
        tell(folder, rank, error=str(error) if isinstance(error, CourseError) else f"Process {rank} stopped with {type(error).__name__}.")
        raise
    tell(folder, rank, **found, seconds=time.perf_counter() - start)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
