"""One definition of each training run, used by notebook, catch-up, sweep, benchmark and test alike; and what its step takes."""

import contextlib
import hashlib
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

from helpers import budget, flights
from helpers.domain import Domain
from helpers.files import CourseError
from helpers.flights import FLIGHTS
from helpers.menu import COURSE_MODEL, choose
from helpers.runtime import device, runs_dir


@dataclass(frozen=True)
class SFTRecipe:
    """Everything that decides an SFT run's result, but for the machine. Times are for 2 CPU cores with fast bfloat16."""

    bits: int = 4  # NF4 base weights; adapters are float32 on every profile
    rank: int = 16  # LoRA r
    alpha: int = 32  # LoRA scale is alpha / r
    target_modules: str | tuple = "all-linear"  # or names, such as ("q_proj", "v_proj")
    learning_rate: float = 3e-3  # chosen on validation, over 2e-3
    batch_size: int = 8
    steps: int = 440  # under six minutes
    warmup_steps: int = 15
    scheduler: str = "cosine"
    max_grad_norm: float = 1.0
    max_length: int = 256  # tokens; the longest training example has about half
    seed: int = 0
    examples: int | None = None  # train on this many examples only (None: all)
    phrasings: int | None = None  # and on this many phrasings an intent (None: all)
    method: str = "lora"  # or dora, rslora, ia3, prompt, full: what is trained (rank and alpha are LoRA's)

    def key(self) -> str:
        """Ten hex digits that change when the recipe, the training data, the prompt or the model does."""
        decides = {k: v for k, v in asdict(self).items() if (k, v) != ("method", "lora")}  # older records knew LoRA only
        parts = [decides, flights.SYSTEM_PROMPT, flights.REFUSAL, choose().name]
        data = hashlib.sha256((flights.QUESTIONS / "train.jsonl").read_bytes()).hexdigest()
        return hashlib.sha256(json.dumps([parts, data], sort_keys=True).encode()).hexdigest()[:10]

    def folder(self) -> Path:
        return runs_dir() / f"sft-{self.key()}"


def few_rows(rows: int, passes: int = 4) -> SFTRecipe:
    """The recipe for some dozens of rows of one's own, going on from an adapter that writes SQL already: `passes` times over them, four at a time.

    Chosen on data/own_example's training rows alone, two of four folds: from the flights' adapter 11 to 13 of 32 held-out questions
    were right with any of six settings of rate, batch and steps, from the bare model 4.
    """
    return SFTRecipe(steps=max(1, -(-passes * rows // 4)), batch_size=4, learning_rate=2e-3, warmup_steps=3)


def training_rows(recipe: SFTRecipe, rows=None) -> list[dict]:
    """The rows that the recipe trains on, chosen by its seed: some phrasings of each intent, then some examples."""
    rows = list(flights.load_questions("train") if rows is None else rows)
    rng = random.Random(recipe.seed)
    if recipe.phrasings and not all(row.get("intent") and row.get("phrasing") for row in rows):
        raise CourseError("The recipe keeps some phrasings of each intent, and these rows don't all have the fields intent and phrasing: leave `phrasings` out, or write them.")
    if recipe.phrasings:
        by_intent: dict[str, dict[str, None]] = {}  # the inner dict as a set that keeps its order
        for row in rows:
            by_intent.setdefault(row["intent"], {})[row["phrasing"]] = None
        kept = {name for names in by_intent.values() for name in rng.sample(list(names), min(recipe.phrasings, len(names)))}
        rows = [row for row in rows if row["phrasing"] in kept]
    if recipe.examples and recipe.examples < len(rows):
        rows = rng.sample(rows, recipe.examples)
    return rows


def training_set(rows, domain: Domain = FLIGHTS):
    """Rows with question and sql, in TRL's conversational prompt/completion form, as a `datasets.Dataset`."""
    from datasets import Dataset

    return Dataset.from_list([flights.prompt_completion(row, domain.system_prompt) for row in rows])


VIRTUAL_TOKENS = 16  # of prompt tuning


def lora_config(recipe: SFTRecipe):
    """PEFT's LoRA settings for the recipe (Hu et al. 2021); rsLoRA (Kalajdzievski 2023) and DoRA (Liu et al. 2024) are one flag each."""
    from peft import LoraConfig

    if recipe.rank < 1:
        raise CourseError(f"LoRA's rank r must be at least 1, not {recipe.rank}: with r = 0 there would be nothing to train.")
    return LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=recipe.target_modules if isinstance(recipe.target_modules, str) else list(recipe.target_modules),
        use_rslora=recipe.method == "rslora",
        use_dora=recipe.method == "dora",
        task_type="CAUSAL_LM",
    )


def peft_config(recipe: SFTRecipe):
    """PEFT's settings for the recipe's method; None where every weight is trained.

    IA³ (Liu et al. 2022) scales keys, values and the feed-forward's inner activations; prompt tuning (Lester et al. 2021)
    trains `VIRTUAL_TOKENS` input embeddings that stand before every prompt.
    """
    from peft import IA3Config, PromptTuningConfig

    if recipe.method in ("lora", "rslora", "dora"):
        return lora_config(recipe)
    if recipe.method == "ia3":
        return IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    if recipe.method == "prompt":
        return PromptTuningConfig(num_virtual_tokens=VIRTUAL_TOKENS, prompt_tuning_init="SAMPLE_VOCAB", task_type="CAUSAL_LM")
    if recipe.method == "full":
        return None
    raise CourseError(f"Unknown method {recipe.method!r}: lora, rslora, dora, ia3, prompt or full.")


LOSS_ROWS = 128  # supervised tokens at a time: their float32 logits take 25 MB


def step_options() -> dict:
    """What `budget.training` has to know of a training step on this machine: precision, attention, a loss that takes its logits in tiles."""
    here, size = device(), device().dtype.itemsize
    return {"attention": here.attention, "dtype_bytes": size, "compute_bytes": size, "logit_tokens": LOSS_ROWS, "cast_inputs": False}


def step_gb(recipe, name: str | None = None, checkpointing: bool = False) -> float:
    """Estimated GB of an SFTRecipe's or DPORecipe's LoRA step here, on a model of the menu (COURSE_MODEL's if none is named)."""
    start = getattr(recipe, "start", recipe)
    rows, method = recipe.batch_size * (1 if start is recipe else 2), "qlora" if start.bits == 4 else "lora"  # a pair has two answers
    return budget.total(budget.training(choose(name).config(), method, start.rank, rows, recipe.max_length, checkpointing, **step_options())) / 1e9


def needs_checkpointing(recipe, name: str | None = None) -> bool:
    """Whether a larger model's training step would leave less than a tenth of this machine's memory free; never for the course model."""
    return choose(name).name != COURSE_MODEL and step_gb(recipe, name) > 0.9 * device().memory_gb


def memory_advice(config, **step) -> str:
    """One sentence: what would make a training step smaller, each change with its estimated GB where budget knows the model.

    `step` holds budget.training's arguments: method, batch (sequences), length and checkpointing at least.
    """
    changes = {"half the batch_size": {"batch": max(1, step["batch"] // 2)}, "half the max_length": {"length": step["length"] // 2}}
    changes |= {"gradient_checkpointing=True in make_trainer": {"checkpointing": True}, "bits=4 with LoRA": {"method": "qlora"}}
    estimate = ""
    with contextlib.suppress(CourseError):
        now, *then = (budget.total(budget.training(config, **step | change)) / 1e9 for change in ({}, *changes.values()))
        changes = [f"{change} ({gb:.1f} GB)" for change, gb in zip(changes, then, strict=True) if gb < now]
        estimate = f" (estimates; as it is, a step takes {now:.1f} GB)"
    return f"Restart the kernel and change one thing: {', '.join(changes)}, or a smaller model (COURSE_MODEL){estimate}."
