"""Preference pairs, and the runs of notebook 04: DPO (Rafailov et al. 2023) and its control, SFT on the chosen answers."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from helpers import adapters, flights, losses, runs, times, training
from helpers.domain import Domain
from helpers.files import CourseError
from helpers.flights import FLIGHTS
from helpers.models import load_tokenizer
from helpers.recipes import SFTRecipe
from helpers.runtime import DATA, device, runs_dir, seed_everything, setup

PREFERENCES = DATA / "preferences"
CONSTRUCTIONS = ("style", "correctness", "off_policy")  # the committed sets of pairs: data/preferences/<name>.jsonl
PROBE = 32  # pairs at the end of a set that no run trains on: their log-probabilities are watched


@dataclass(frozen=True)
class DPORecipe:
    """Everything that decides a run of preference tuning, but for the machine; it starts from the adapter of `start`."""

    start: SFTRecipe = field(default_factory=SFTRecipe)
    method: str = "dpo"  # or sft, the control: plain SFT on the chosen answers (none, in the sweeps: no further training)
    pairs: str = "style"  # one of CONSTRUCTIONS
    beta: float = 1.0  # this and the learning rate were chosen on validation (`make sweeps`: preference_search)
    learning_rate: float = 1e-4
    sft_weight: float = 0.0  # of an SFT term added to the DPO loss
    batch_size: int = 8  # pairs
    steps: int = 24
    max_length: int = 256  # tokens of prompt and answer together
    seed: int = 0  # of the order of the pairs

    def key(self) -> str:
        """Ten hex digits that change when the recipe, the pairs or the starting adapter's recipe does."""
        parts = [asdict(self) | {"start": self.start.key()}, PROBE]
        pairs = hashlib.sha256((PREFERENCES / f"{self.pairs}.jsonl").read_bytes()).hexdigest()
        return hashlib.sha256(json.dumps([parts, pairs], sort_keys=True).encode()).hexdigest()[:10]

    def folder(self) -> Path:
        return runs_dir() / f"dpo-{self.key()}"


# ---------------------------------------------------------------- pairs


def load_pairs(source: str | Path = "style") -> list[dict]:
    """Pairs by the name of a committed set, or from your own JSON Lines file: `prompt`, `chosen`, `rejected`, each a text.

    Read whole or not at all: each bad line is named with its number and remedy (CourseError). Equal sides are refused, and a pair that
    comes twice or beside its reverse; a prompt may come more than once.
    """

    def check(row):
        if row["chosen"].strip() == row["rejected"].strip():
            raise CourseError("fields 'chosen' and 'rejected' are the same text: there is nothing to prefer; remove the line")

    def same(row):
        prompt, chosen, rejected = (row[name].strip() for name in ("prompt", "chosen", "rejected"))
        twice = {(prompt, chosen, rejected): "the same pair as line {}; remove one of them"}
        return (prompt, chosen, rejected), twice | {(prompt, rejected, chosen): "the reverse of line {}, which prefers the other side; keep one of them"}

    path = PREFERENCES / f"{source}.jsonl" if source in CONSTRUCTIONS else source
    return flights.read_jsonl(path, ("prompt", "chosen", "rejected"), check=check, same=same)


# ---------------------------------------------------------------- log-probabilities


def encode(tokenizer, prompt: str, answer: str, domain: Domain = FLIGHTS) -> tuple[list[int], int]:
    """Token ids of the conversation with its answer, and how many of them are the prompt's."""
    chat = flights.chat(prompt, domain.system_prompt)
    head = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    return tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": answer}], return_dict=True)["input_ids"], len(head)


def check_lengths(pairs: list[dict], tokenizer, max_length: int, domain: Domain = FLIGHTS) -> None:
    """Raises CourseError for a pair that doesn't fit: TRL would cut the end off its answers, or all of them, in silence."""
    for number, row in enumerate(pairs, 1):
        for side in ("chosen", "rejected"):
            ids, prompt = encode(tokenizer, row["prompt"], row[side], domain)
            if len(ids) > max_length:
                raise CourseError(
                    f"Pair {number}: prompt ({prompt} tokens) and {side} answer ({len(ids) - prompt}) don't fit into "
                    f"max_length = {max_length} tokens; shorten the pair or raise max_length."
                )


def log_probs(model, tokenizer, prompts: list[str], answers: list[str], batch_size: int = 16, domain: Domain = FLIGHTS) -> list[float]:
    """log p(answer | prompt) under the model, in nats: the sum over the answer's tokens, the end of the turn included."""
    import torch

    base, head, found = model.get_base_model(), model.get_output_embeddings().weight, []
    encoded = [encode(tokenizer, prompt, answer, domain) for prompt, answer in zip(prompts, answers, strict=True)]
    with torch.no_grad(), torch.autocast(head.device.type, head.dtype, enabled=head.dtype != torch.float32):  # as in training
        for start in range(0, len(encoded), batch_size):
            rows = encoded[start : start + batch_size]
            width = max(len(ids) for ids, _ in rows)
            ids = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in rows], device=model.device)
            place = torch.arange(width, device=model.device)
            starts, ends = (torch.tensor(t, device=model.device)[:, None] for t in ([p for _, p in rows], [len(i) for i, _ in rows]))
            answer = ((place >= starts) & (place < ends))[:, 1:]  # (rows, width - 1): the positions that are predicted
            hidden = losses.hidden_states(model, base, ids, (place < ends).long(), share=device().course_loss)[:, :-1][answer]
            values = losses.token_log_probs(hidden.to(head.dtype), head, ids[:, 1:][answer])
            found += [float(part.sum()) for part in values.split(answer.sum(1).tolist())]
    return found


def watch(tokenizer, pairs: list[dict], every: int = 8, domain: Domain = FLIGHTS):
    """A callback that logs the mean log-probability of chosen and of rejected answers over `pairs` before, during and after training."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def look(self, model, state):
            prompts, sides = [p["prompt"] for p in pairs], {}
            for side in ("chosen", "rejected"):
                values = log_probs(model, tokenizer, prompts, [p[side] for p in pairs], domain=domain)
                sides[f"probe/{side}"] = sum(values) / len(values)
            state.log_history.append({"step": state.global_step} | sides)

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 0:
                self.look(model, state)

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step % every == 0 or state.global_step == state.max_steps:
                self.look(model, state)

    return Watch()


# ---------------------------------------------------------------- training


def pair_set(pairs: list[dict], domain: Domain = FLIGHTS):
    """Pairs in TRL's conversational preference form (prompt, chosen, rejected: lists of messages), as a `datasets.Dataset`."""
    from datasets import Dataset

    def said(text):
        return [{"role": "assistant", "content": text}]

    return Dataset.from_list([{"prompt": flights.chat(p["prompt"], domain.system_prompt), "chosen": said(p["chosen"]), "rejected": said(p["rejected"])} for p in pairs])


def dpo_config(recipe: DPORecipe, folder: Path, **changes):
    """TRL's settings for the recipe on this machine; what isn't named is TRL's default."""
    from trl import DPOConfig

    changes = training.honoured(changes)
    settings = {
        "beta": recipe.beta,
        "loss_type": ["sigmoid", "sft"] if recipe.sft_weight else ["sigmoid"],
        "loss_weights": [1.0, recipe.sft_weight] if recipe.sft_weight else [1.0],
        "precompute_ref_log_probs": False,  # each pair is seen about once: nothing to save
    }
    return DPOConfig(**training.common_settings(recipe, folder) | settings | housekeeping(recipe) | changes)


def housekeeping(recipe: DPORecipe) -> dict:
    """The settings that don't decide what is learnt."""
    return training.housekeeping(recipe) | {"logging_steps": 1, "save_steps": 10, "include_num_input_tokens_seen": "non_padding"}


def cpu_trainer_class():
    """DPOTrainer with the answers' log-probabilities computed more cheaply on a CPU (a test holds loss and gradients equal).

    TRL's fused head scores every position, prompts and padding too, in float32 tiles made for a GPU; here the LM head
    runs on the answers' tokens only. Entropy, mean logits and token accuracy, which nothing here reads, aren't logged.
    """
    import functools
    from types import SimpleNamespace

    import torch
    from trl import DPOTrainer

    class CpuDPOTrainer(DPOTrainer):
        share_prefix = False  # as the SFT trainer's

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            base, theirs = self.model.get_base_model(), self.model.get_base_model().forward

            @functools.wraps(type(base).forward)
            def forward(input_ids=None, attention_mask=None, fused_lm_head=False, labels=None, **kwargs):
                if not fused_lm_head:
                    return theirs(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
                hidden = losses.hidden_states(self.model, base, input_ids, attention_mask, self.share_prefix)[:, :-1]
                targets, head = labels[:, 1:], base.lm_head.weight
                answer = targets != -100
                values = losses.token_log_probs(hidden[answer].to(head.dtype), head, targets[answer])
                nothing = torch.zeros(answer.shape)
                return SimpleNamespace(log_probs=nothing.masked_scatter(answer, values), entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())

            base.forward = forward

        def log(self, logs, start_time=None):
            for metrics in self._metrics.values():
                for name in ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"):
                    metrics.pop(name, None)
            super().log(logs, start_time)

    return CpuDPOTrainer


def make_trainer(
    recipe: DPORecipe, model, tokenizer, pairs: list[dict] | None = None, folder: Path | None = None, domain: Domain = FLIGHTS, probe: int | None = None, **changes
):
    """TRL's trainer for the recipe over `model`, which carries the starting adapter, trainable (`adapters.load_adapter`).

    DPOTrainer, or for the control the SFT trainer of notebook 03 on the chosen answers alone. TRL keeps a frozen copy of
    the adapter, named "ref", as the reference; the trained one is put back into float32 (`training.restore_float32`).
    The last `probe` pairs (None: `PROBE`) are watched, not trained on. `domain`: whose system prompt the pairs are asked with.
    """
    from trl import DPOTrainer

    if recipe.method not in ("dpo", "sft"):
        raise CourseError(f"Unknown method {recipe.method!r}: dpo or sft.")
    if changes.get("label_smoothing_factor"):
        raise CourseError("DPO doesn't know label_smoothing_factor: its own is called label_smoothing (conservative DPO).")
    folder = folder or runs.folder_for(recipe, pairs, changes, domain.system_prompt)
    pairs = load_pairs(recipe.pairs) if pairs is None else pairs
    probe = PROBE if probe is None else probe
    if len(pairs) <= probe or probe < 1:
        raise CourseError(f"{len(pairs)} pairs are too few: {probe} of them are kept aside to be watched. Make more, or watch fewer (probe=…).")
    check_lengths(pairs, tokenizer, recipe.max_length, domain)
    learnt, watched = pairs[:-probe], pairs[-probe:]
    model.train()  # the probe before the first step would else pack 4-bit weights (see `training.check_unpacked`)
    if recipe.method == "sft":
        control = replace(recipe.start, learning_rate=recipe.learning_rate, steps=recipe.steps, batch_size=recipe.batch_size, seed=recipe.seed)
        control = replace(control, warmup_steps=0, scheduler="linear", max_length=recipe.max_length)  # as DPOConfig has them by default
        rows = [{"question": p["prompt"], "sql": p["chosen"]} for p in learnt]
        trainer = training.make_trainer(control, model, tokenizer, rows, folder, domain, **housekeeping(recipe) | changes)
    else:
        seed_everything(recipe.seed)
        trained = training.trainable_state(model)
        model.set_attn_implementation(device().attention)
        training.check_unpacked(model)
        config = dpo_config(recipe, folder, **changes)
        kind = cpu_trainer_class() if device().course_loss and not config.use_weighting else DPOTrainer  # weighting needs every logit
        trainer = kind(model=model, args=config, train_dataset=pair_set(learnt, domain), processing_class=tokenizer)
        training.restore_float32(trainer.model, trained)
        training.start_scaler_low(trainer)
        trainer.starts_from = runs.digest(trained)
    trainer.add_callback(watch(tokenizer, watched, domain=domain))
    return trainer


def start_model(recipe: DPORecipe, dtype=None):
    """The model that the recipe starts from: the course model with the SFT adapter (trained now if it is missing), trainable."""
    return adapters.load_adapter(training.sft_adapter(recipe.start), recipe.start.bits, dtype, trainable=True)


def adapter(recipe: DPORecipe | None = None) -> Path:
    """The folder of the recipe's trained adapter: from `runs/` or the workshop kit, else trained now (SFT first, if need be)."""
    folder = (recipe := recipe or DPORecipe()).folder() / "adapter"
    if not adapters.have_adapter(folder):
        training.finish(make_trainer(recipe, start_model(recipe), load_tokenizer()))
    return folder


# ---------------------------------------------------------------- the main runs


def main_runs() -> dict:
    """The main runs, of notebooks 03 and 04: stage, its recipe, and what gives the folder of its adapter (trained if it is missing)."""
    return {"sft": (SFTRecipe(), training.sft_adapter), "dpo": (DPORecipe(), adapter)}


def main_adapter(stage: str) -> Path:
    """The folder of a main run's adapter: from `runs/` or the workshop kit, else trained now, and said so before."""
    recipe, make = main_runs()[stage]
    if not adapters.have_adapter(recipe.folder() / "adapter"):
        if stage == "dpo":
            main_adapter("sft")  # where it starts
        setup()
        what = f"{recipe.folder().name}: neither in runs/ nor in a kit; training it, from its last checkpoint if there is one"
        times.announce(what, times.sft(recipe) if stage == "sft" else times.dpo(recipe))
    return make(recipe)
