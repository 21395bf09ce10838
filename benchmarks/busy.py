"""Two torch programs at once on the same cores, against one alone: python benchmarks/busy.py  (about 2 minutes on 2 cores)

Each program answers with the NF4 model, 32 rows, as a notebook does. Arms: with libgomp's default, whose waiting threads spin,
and with what `helpers` sets (OMP_WAIT_POLICY=PASSIVE). Seconds a step, alone and in the slower of two programs.
"""

import os
import statistics
import subprocess
import sys
import time

STEPS = 12
ARMS = {"default": {"OMP_WAIT_POLICY": "ACTIVE_BY_DEFAULT"}, "PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"}}


def steps(until: float) -> float:
    """Median seconds of a 32-row forward pass of one token, NF4, at least STEPS and until the time given."""
    if os.environ["OMP_WAIT_POLICY"] == "ACTIVE_BY_DEFAULT":  # no such policy: libgomp's own default
        del os.environ["OMP_WAIT_POLICY"]
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape)).eval()
    ids, taken = torch.ones(32, 1, dtype=torch.long), []
    with torch.inference_mode():
        model(ids)
        print("ready", flush=True)
        sys.stdin.readline()
        while len(taken) < STEPS or sum(taken) < until:
            start = time.perf_counter()
            model(ids)
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def together(count: int, environment: dict[str, str]) -> float:
    """The slowest of `count` programs that begin at once."""
    command = [sys.executable, __file__, "--steps", "8"]
    programs = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment) for _ in range(count)]
    for program in programs:
        program.stdout.readline()
    for program in programs:
        program.stdin.write("go\n")
        program.stdin.flush()
    return max(float(program.communicate()[0]) for program in programs)


def main() -> None:
    alone = {}
    for name, environment in ARMS.items():
        alone[name], two = together(1, environment), together(2, environment)
        print(f"{name:8} alone {alone[name]:.2f} s a step, two at once {two:.2f} s: {two / alone[name]:.1f} times (goal 2.2)", flush=True)
    print(f"alone, PASSIVE / default: {alone['PASSIVE'] / alone['default']:.2f} (goal 1.1)")


if __name__ == "__main__":
    if "--steps" in sys.argv:
        print(steps(float(sys.argv[-1])))
    else:
        main()
