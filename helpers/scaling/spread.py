"""One recipe on many GPUs: the batch shared out, and what starts the processes. From one GPU to many nodes that alone changes, never the recipe.

The processes are started by tools that exist (torchrun, Accelerate, SLURM); here are their configs. Keys: Accelerate 1.15.
"""

from helpers.files import CourseError
from helpers.scaling.yaml_text import file_text

MACHINES = {"1-gpu": (1, 1), "4-gpus": (1, 4), "8-gpus": (1, 8), "8-gpus-fsdp": (1, 8), "2-nodes-of-8": (2, 8)}  # nodes, GPUs of each


def split(batch: int, gpus: int, fits: int | None = None) -> tuple[int, int]:
    """Examples that a GPU takes at a time, and how many times before each step, so that all GPUs together see `batch` examples a step.

    `fits`: the most that one GPU's memory takes at a time. CourseError where the batch can't be shared out evenly.
    """
    if min(batch, gpus, 1 if fits is None else fits) < 1:
        raise CourseError(f"Batch, GPUs and what fits must each be at least 1, not {batch}, {gpus} and {fits}.")
    if batch % gpus:
        near = f"take {batch // gpus * gpus} or {(batch // gpus + 1) * gpus} examples" if batch > gpus else f"take {gpus} examples or more"
        raise CourseError(f"{gpus} GPUs can't share {batch} examples a step evenly: {near}, or a number of GPUs that divides {batch}.")
    each = batch // gpus
    at_once = max(n for n in range(1, min(each, fits or each) + 1) if each % n == 0)
    return at_once, each // at_once


def accelerate(machine: str) -> str:
    """Accelerate's config for one of MACHINES: how many processes, where, and how the model is spread over them. It knows nothing of the recipe."""
    if machine not in MACHINES:
        raise CourseError(f"Unknown machine {machine!r}: {', '.join(MACHINES)}.")
    nodes, gpus = MACHINES[machine]
    every, fsdp = nodes * gpus, machine.endswith("fsdp")
    keys = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "FSDP" if fsdp else "MULTI_GPU" if every > 1 else "NO"}
    keys |= {"num_machines": nodes, "num_processes": every, "machine_rank": 0, "mixed_precision": "no"}
    said = ["1 process, on one GPU." if every == 1 else f"{every} processes, one a GPU.", "Batch and precision stand in the engine's file, written for so many GPUs: engines.write(…, gpus=…)."]
    if nodes > 1:
        keys |= {"main_process_ip": "first-node", "main_process_port": 29500, "rdzv_backend": "static", "same_network": True}
        said.append(f"On each of the {nodes} nodes, with its own machine_rank (from 0), and the first node's address for first-node.")
    sections = {"the machine": keys}
    if fsdp:
        said.append("Weights, gradients and optimizer states are cut into a part for each GPU (FSDP, as ZeRO-3); else every GPU holds them all.")
        said.append("With 4 bits FSDP needs weights stored in the compute dtype (bnb_4bit_quant_storage): not what the engines' files say.")
        policy = {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_reshard_after_forward": True, "fsdp_offload_params": False}
        policy |= {"fsdp_cpu_ram_efficient_loading": True, "fsdp_state_dict_type": "FULL_STATE_DICT", "fsdp_activation_checkpointing": False}
        sections["how the model is spread"] = {"fsdp_config": policy}
    return file_text(said, sections)


def slurm(nodes: int, gpus: int, command: str, hours: int = 4) -> str:
    """A SLURM script that starts torchrun once a node, which starts a process a GPU: `command` is a script and its arguments.

    The first node is where all meet (c10d's rendezvous); a worker that dies ends the job, and --requeue starts it again from its checkpoint.
    """
    if min(nodes, gpus, hours) < 1:
        raise CourseError(f"Nodes, GPUs and hours must each be at least 1, not {nodes}, {gpus} and {hours}.")
    return f"""#!/bin/bash
#SBATCH --job-name=course
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --time={hours:02}:00:00
#SBATCH --requeue
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 torchrun --nnodes {nodes} --nproc_per_node {gpus} --max_restarts 0 \\
  --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$first:29500" \\
  {command}
"""
