"""Training in several processes on this machine's processor: torchrun starts them, gloo carries what they tell each other (DDP, FSDP).

`run` is what a notebook calls; this file is also the script that each process runs. Everything in float32, so that two processes can be held
against one. What each process found out about itself is written down and compared: two that are silently one are an error here.
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from helpers import flights, models, recipes, runtime, spread, training
from helpers.files import CourseError, write_whole
from helpers.runtime import ROOT

KINDS = {"ddp": "MULTI_CPU", "fsdp": "FSDP"}  # every process has the whole model, or its part; what Accelerate or torch then calls it
PATIENCE = 60  # seconds that a process waits for another before it gives up
LOOPBACK = {"linux": "lo", "darwin": "lo0"}  # gloo's messages stay on this machine


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


# ---------------------------------------------------------------- who starts the processes, and watches them


def run(folder: Path, processes: int = 2, plan: Plan | None = None, port: int | None = None, kill: tuple[int, int] | None = None, minutes: float = 10) -> dict:
    """Trains by the plan in so many processes, going on from the folder's last checkpoint; losses of all steps, and what the processes say of themselves.

    `port` is where they meet (None: a free one). `kill`: (process, step): that one is killed once it has done that step, as a lost machine would be.
    CourseError for a batch that can't be shared out, a port in use, a process that died, or fewer processes than were asked for.
    """
    plan, folder = plan or Plan(), Path(folder)
    if plan.kind not in KINDS:
        raise CourseError(f"Unknown kind {plan.kind!r}: {' or '.join(KINDS)}.")
    spread.split(plan.batch, processes)
    port = check_port(port) if port else free_port()
    for old in folder.glob("process-*"):
        old.unlink()
    write_whole(folder / "plan.json", json.dumps(dataclasses.asdict(plan)))
    words = ["-m", "helpers.distributed", str(folder)]
    if processes > 1:
        words = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_addr", "127.0.0.1", "--master_port", str(port), *words]
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": "", "COURSE_PROFILE": "", "COURSE_PROGRESS": "0", "USE_LIBUV": "0"}
    where = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))), "GLOO_SOCKET_IFNAME": LOOPBACK.get(sys.platform, "")}
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        environment = {name: value for name, value in (os.environ | quiet | where).items() if value or name in quiet}
        started = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        ended = _watch(started, folder, kill, time.monotonic() + 60 * minutes)
    if ended != 0:
        raise CourseError(_what_ended_it(folder, ended, processes))
    return _together(folder, processes, plan)


def free_port() -> int:
    """A port that no program listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def check_port(port: int) -> int:
    """The port, if processes can meet there; CourseError if a program listens at it, or there is none of that number."""
    with socket.socket() as one:
        try:
            one.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            raise CourseError(f"Port {port} is in use or can't be had: give another one (port=…), or none, and a free one is taken.") from None
    return port


def _watch(started: subprocess.Popen, folder: Path, kill, until: float) -> int | None:
    """Waits for the end: the exit status, None if it took too long. Whatever comes, no process is left behind."""
    try:
        while started.poll() is None:
            if time.monotonic() > until:
                return None
            if kill and (done := _said(folder, kill[0])) and done["step"] >= kill[1]:
                os.kill(done["pid"], getattr(signal, "SIGKILL", signal.SIGTERM))
                kill = None
            time.sleep(0.05)
        return started.returncode
    finally:
        if started.poll() is None:
            started.terminate()  # torchrun ends its own processes
            with contextlib.suppress(subprocess.TimeoutExpired):
                started.wait(PATIENCE)
            started.kill()
            for rank in range(len(list(folder.glob("process-*.json")))):
                with contextlib.suppress(OSError, TypeError):
                    os.kill(_said(folder, rank)["pid"], getattr(signal, "SIGKILL", signal.SIGTERM))


def _said(folder: Path, rank: int) -> dict | None:
    """What a process has written of itself so far."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / f"process-{rank}.json").read_text(encoding="utf-8"))


def _what_ended_it(folder: Path, ended: int | None, processes: int) -> str:
    """The sentence for a run that didn't finish: which process ended first and how, and what is kept."""
    kept = training.last_checkpoint(folder)
    then = f"the checkpoint of step {kept.name.split('-')[1]} is kept: run it again to go on from there" if kept else "there was no checkpoint yet: run it again"
    if ended is None:
        return f"The run took too long and was stopped; {then}."
    log = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    if "EADDRINUSE" in log or "address already in use" in log.lower():
        return "Another program took the port before the processes could meet there: run it again."
    told = [said["error"] for rank in range(processes) if (said := _said(folder, rank)) and said.get("error")]
    root = log[log.rfind("Root Cause") :] if "Root Cause" in log else ""
    dead = re.search(r"rank\s*:\s*(\d+).*?exitcode\s*:\s*(-\d+)", root, re.S)
    if dead:
        return f"Process {dead[1]} of {processes} (they count from 0) was ended by signal {-int(dead[2])}, and torchrun ended the others; {then}."
    return f"{told[0] if told else 'A process ended with an error, which log.txt in the folder shows.'} ({then[0].upper()}{then[1:]}.)"


def _together(folder: Path, processes: int, plan: Plan) -> dict:
    """What all processes said, as one result; CourseError where they weren't as many, or not of the kind, that was asked for."""
    said = [one for rank in range(processes) if (one := _said(folder, rank))]
    check_really(said, processes, plan.kind)
    gone = {"losses": said[0]["losses"], "processes": len(said), "type": said[0]["type"], "backend": said[0]["backend"], "seconds": max(s["seconds"] for s in said)}
    return gone | {"parameters": [one["parameters"] for one in said], "examples": [one["examples"] for one in said], "from_step": said[0]["from_step"]}


def check_really(said: list[dict], processes: int, kind: str) -> None:
    """CourseError unless there really were so many processes, each knowing of all, spread in the way that was asked for, with the same losses."""
    found = sorted((one["rank"], one["world_size"]) for one in said)
    if found != [(rank, processes) for rank in range(processes)]:
        raise CourseError(f"Asked for {processes} processes, and those that ran say (number, of how many): {found}. A comparison would compare one process with itself.")
    types = {one["type"] for one in said}
    if types != {KINDS[kind] if processes > 1 else "NO"}:
        raise CourseError(f"Asked for {kind} in {processes} processes, and they ran as {', '.join(sorted(types))}.")
    if any(one["losses"] != said[0]["losses"] for one in said):
        raise CourseError("The processes report different losses: they weren't one training.")


# ---------------------------------------------------------------- what each process does


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
    before = _said(folder, rank) or {"rank": rank, "pid": os.getpid(), "step": 0}
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
