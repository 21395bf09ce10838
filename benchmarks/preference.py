"""Speed of a DPO step on a CPU, side by side in one run: python benchmarks/preference.py  (about 2 minutes on 2 cores)

The course's trainer (`dpo.cpu_trainer_class`) against TRL's own DPOTrainer: same pairs, settings, model and precision, turn about.
"""

import contextlib
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

STEPS, ROUNDS = 4, 2  # the first step isn't counted


def seconds_per_step(theirs: bool) -> float:
    """Median seconds of a step; the adapter is a fresh one, which costs what a trained one does."""
    import time

    from peft import get_peft_model
    from transformers import TrainerCallback
    from trl import DPOTrainer

    from helpers import dpo, models, recipes, training

    class Tick(TrainerCallback):
        def on_step_end(self, *_, **__):
            ticks.append(time.perf_counter())

    ticks, recipe, made = [], replace(dpo.DPORecipe(), steps=STEPS), dpo.cpu_trainer_class
    model = get_peft_model(models.load_model(4), recipes.lora_config(recipe.start))
    dpo.cpu_trainer_class = (lambda: DPOTrainer) if theirs else made
    try:
        trainer = dpo.make_trainer(recipe, model, models.load_tokenizer(), folder=Path(tempfile.mkdtemp()), save_strategy="no")
    finally:
        dpo.cpu_trainer_class = made
    trainer.callback_handler.callbacks = [c for c in trainer.callback_handler.callbacks if type(c).__name__ != "Watch"]
    trainer.add_callback(Tick())
    with contextlib.redirect_stdout(sys.stderr):
        training.fit(trainer, resume=False)
    return statistics.median(b - a for a, b in zip(ticks, ticks[1:], strict=False))


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from helpers import runtime

    print(f"{runtime.setup().name}, {runtime.device().dtype_name}")
    measured = {theirs: [] for theirs in (False, True)}
    for _ in range(ROUNDS):
        for theirs, values in measured.items():
            values.append(seconds_per_step(theirs))
    ours, library = (statistics.median(measured[which]) for which in (False, True))
    print(f"s/step: the course's {ours:.2f}, TRL's DPOTrainer {library:.2f}: {library / ours:.1f} times (target 1.5)")


if __name__ == "__main__":
    main()
