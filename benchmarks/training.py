"""Training speed and memory, side by side in one run: python benchmarks/training.py [rounds]  (about 10 minutes on 2 cores)

Arms, each a process of its own, in turn, `rounds` times (medians are shown, because machines are noisy):
  recipe     the course's SFT recipe: TRL's SFTTrainer made quick on a CPU
  bare       a loop in plain torch: same model, batches, precision and loss, nothing else
  default    TRL's SFTTrainer given only the model's path, the LoRA config and the batch size
The first two also run with glibc's allocator told to keep freed memory (MALLOC_MMAP_MAX_, MALLOC_TRIM_THRESHOLD_), which
some advise; the course does without, because a whole run then holds almost twice the memory for little speed.
"""

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS, WARM = 16, 4  # steps measured, after as many that aren't
ARMS = (("recipe", False), ("bare", False), ("recipe", True), ("bare", True), ("default", False))
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "68719476736"}


class Clock:
    """Seconds and tokens of each step: those of the batch, and those that the model computes (padding, too; not what rows share twice)."""

    def __init__(self):
        self.at, self.tokens, self.computed, self.supervised, self.seen = [time.perf_counter()], [], [], [], 0

    def watch(self, model):
        """Counts what goes through the first layer's MLP."""
        module = next(m for name, m in model.named_modules() if name.endswith("layers.0.mlp"))
        module.register_forward_hook(lambda _, inputs, output: setattr(self, "seen", self.seen + inputs[0].shape[:-1].numel()))

    def step(self, batch):
        self.at.append(time.perf_counter())
        self.tokens.append(int(batch["attention_mask"].sum()))
        self.computed.append(self.seen)
        self.seen = 0
        self.supervised.append(int((batch["labels"] != -100).sum()))

    def result(self) -> dict:
        seconds = self.at[-1] - self.at[WARM]
        total = {name: sum(getattr(self, name)[WARM:]) for name in ("tokens", "computed", "supervised")}
        return total | {"seconds": seconds, "steps": len(self.tokens) - WARM}


def timed(trainer, clock):
    """Notes each batch of a trainer on the clock."""
    from transformers import TrainerCallback

    batches, step = [], trainer.training_step

    def training_step(model, inputs, *rest):
        batches.append({k: v.clone() for k, v in inputs.items() if hasattr(v, "clone")})
        return step(model, inputs, *rest)

    class Tick(TrainerCallback):
        def on_train_begin(self, *_, **__):
            clock.at = [time.perf_counter()]

        def on_step_end(self, *_, **__):
            clock.step(batches[-1])

    trainer.training_step = training_step
    clock.watch(trainer.model)
    trainer.add_callback(Tick())
    return trainer


def arm(name: str, keep: bool) -> dict:
    """Runs one arm in this process."""
    from helpers import runtime

    where = runtime.setup()
    import torch

    from helpers import flights, models, recipes, training

    recipe, clock = recipes.SFTRecipe(steps=STEPS + WARM), Clock()
    folder = Path(tempfile.mkdtemp())
    if name == "default":
        from trl import SFTConfig, SFTTrainer

        rows = recipes.training_set(flights.load_questions("train"))
        # what can't be left out: a folder, the processor, the steps of this benchmark, and no bars in its output
        args = SFTConfig(
            str(folder),
            per_device_train_batch_size=recipe.batch_size,
            max_steps=STEPS + WARM,
            use_cpu=where.kind == "cpu",  # bf16 is TRL's default, and without a GPU it is refused unless this is said
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
        )
        trainer = SFTTrainer(str(models.model_path()), args=args, train_dataset=rows, peft_config=recipes.lora_config(recipe))
        with contextlib.redirect_stdout(sys.stderr):
            timed(trainer, clock).train()
    else:
        trainer = training.make_trainer(recipe, models.load_model(recipe.bits), models.load_tokenizer(), folder=folder, save_strategy="no")
        if name == "recipe":
            with contextlib.redirect_stdout(sys.stderr):
                training.fit(timed(trainer, clock), resume=False)
        else:
            model = trainer.model.train()
            clock.watch(model)
            batches = [b for b, _ in zip(trainer.get_train_dataloader(), range(STEPS + WARM), strict=False)]
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, fused=True)
            clock.at = [time.perf_counter()]
            for batch in batches:
                target = batch["labels"][:, 1:]
                with torch.autocast(where.kind, where.dtype, enabled=where.dtype != torch.float32):
                    base = model.get_base_model()
                    hidden = base.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).last_hidden_state
                    logits = base.lm_head(hidden[:, :-1][target != -100]).float()
                torch.nn.functional.cross_entropy(logits, target[target != -100]).backward()
                torch.nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                clock.step(batch)
    linear = {}
    for _, module in trainer.model.named_modules():
        if hasattr(module, "lora_A"):
            shape = (module.in_features, module.out_features)
            linear[shape] = linear.get(shape, 0) + 1
    return clock.result() | {
        "arm": name,
        "keep": keep,
        "peak_gb": runtime.peak_memory_gb(),
        "linear": [[*k, v] for k, v in linear.items()],
        "rank": recipe.rank,
    }


def flops(result: dict, width: int = 576, vocabulary: int = 49_152) -> float:
    """Floating-point operations of the matmuls in a measured stretch: forward 2 and backward 2 a weight and computed token
    (a frozen weight needs no gradient of its own), 6 a LoRA weight, 4 a weight of the head on supervised tokens.
    Attention's own products, a few per cent at these lengths, are left out: the share is a lower bound."""
    frozen = sum(i * o * n for i, o, n in result["linear"])
    adapters = sum((i + o) * result["rank"] * n for i, o, n in result["linear"])
    return result["computed"] * (4 * frozen + 6 * adapters) + result["supervised"] * 4 * width * vocabulary


def matmul_limit(linear, tokens: int) -> float:
    """FLOP/s of plain matmuls of the model's shapes in the compute dtype, best of 7 for each shape."""
    import torch

    from helpers import runtime

    work = seconds = 0.0
    for i, o, n in linear:
        a, w = torch.randn(tokens, i, dtype=runtime.device().dtype), torch.randn(o, i, dtype=runtime.device().dtype)
        times = []
        for _ in range(8):
            start = time.perf_counter()
            for _ in range(20):
                a @ w.T
            times.append((time.perf_counter() - start) / 20)
        work, seconds = work + 2 * tokens * i * o * n, seconds + min(times[1:]) * n
    return work / seconds


def processor() -> str:
    """The processor's name and the features that matter here."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    name = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), platform.machine())
    flags = next((line.split(":")[1].split() for line in info.splitlines() if line.startswith("flags")), [])
    return f"{name} ({', '.join(f for f in ('avx2', 'avx512f', 'avx512_bf16', 'amx_bf16') if f in flags) or 'no wide vectors'})"


def main(rounds: int) -> None:
    results = []
    for _ in range(rounds):
        for name, keep in ARMS:
            command = [sys.executable, __file__, "--arm", name, *(["--keep"] if keep else [])]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COURSE_PROGRESS": "0"} | (KEEP if keep else {}))
            if done.returncode:
                raise SystemExit(done.stderr[-3000:])
            results.append(json.loads(done.stdout.splitlines()[-1]))
            r = results[-1]
            print(
                f"  {name:8}{' keep' if keep else '     '} {r['seconds'] / r['steps']:.2f} s/step  {r['tokens'] / r['seconds']:.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )

    def speed(name, keep, what="tokens"):
        return statistics.median(r[what] / r["seconds"] for r in results if (r["arm"], r["keep"]) == (name, keep))

    from helpers import runtime

    print(
        f"{processor()}, {os.cpu_count()} cores; {runtime.device().dtype_name}; torch {__import__('torch').__version__}; median of {rounds} rounds of {STEPS} steps"
    )
    print(f"{'arm':10}{'allocator':>11}{'s/step':>9}{'tokens/s':>10}{'examples/s':>12}{'peak GB':>9}")
    for name, keep in ARMS:
        mine = [r for r in results if (r["arm"], r["keep"]) == (name, keep)]
        step = statistics.median(r["seconds"] / r["steps"] for r in mine)
        print(f"{name:10}{'kept' if keep else 'plain':>11}{step:9.2f}{speed(name, keep):10.0f}{8 / step:12.2f}{max(r['peak_gb'] for r in mine):9.2f}")
    reference = next(r for r in results if r["arm"] == "recipe")
    limit = matmul_limit(reference["linear"], reference["computed"] // reference["steps"])
    plain, kept = (statistics.median(flops(r) / r["seconds"] for r in results if (r["arm"], r["keep"]) == ("recipe", keep)) for keep in (False, True))
    print(
        f"recipe / bare loop, tokens a second: {speed('recipe', False) / speed('bare', False):.0%} plain (gate 80 %), {speed('recipe', True) / speed('bare', True):.0%} allocator kept"
    )
    print(
        f"recipe / SFTTrainer's defaults: {speed('recipe', False) / speed('default', False):.1f} times plain (target 2), {speed('recipe', True) / speed('default', False):.1f} allocator kept"
    )
    print(f"matmul limit {limit / 1e9:.0f} GFLOP/s; the recipe reaches {plain / limit:.0%} plain, {kept / limit:.0%} allocator kept (target 75 % in float32, 45 % in bfloat16)")
    whole, computed = (sum(r[what] for r in results if (r["arm"], r["keep"]) == (name, False)) for name, what in (("bare", "computed"), ("recipe", "computed")))
    print(f"tokens computed, recipe / bare loop: {computed / whole:.0%} (what all rows begin with once, no padding)")


if __name__ == "__main__":
    if "--arm" in sys.argv:
        print(json.dumps(arm(sys.argv[sys.argv.index("--arm") + 1], "--keep" in sys.argv)))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
