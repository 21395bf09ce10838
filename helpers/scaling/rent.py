"""Before you rent: does it fit, how long does it take, what does it cost, what does it draw: from 1B to 70B, on one card or many.

Estimates, from named inputs that you can change. Memory: helpers.budget; cut over cards as ZeRO-3 and FSDP do (Rajbhandari et al. 2020, Zhao et
al. 2023), for which nothing was measured here. Time: FLOP a weight and token (Kaplan et al. 2020) over the card's peak and the share of it that
was measured on one H200 (data/results/gpu.json); for the other cards that share is an assumption. Peaks and watts: NVIDIA's data sheets, 16-bit
matrix products without sparsity, the SXM form of A100 to H200. Prices: what public lists said on the day that stands beside them; they move weekly.
"""

from dataclasses import asdict, dataclass
from types import SimpleNamespace

from helpers import budget
from helpers.files import CourseError
from helpers.menu import MENU


@dataclass(frozen=True)
class Card:
    """A GPU for rent. gb: of 10**9 bytes, by its name (a T4's: what a process can have). tflops: 10**12 FLOP/s, dense, 16 bits. watts: its limit. dollars: an hour."""

    gb: float
    tflops: float
    watts: float
    dollars: float
    price: str  # whose
    date: str  # on which the price was read
    bfloat16: bool = True  # without it nothing is trained in full: weights in float16 lose the small steps


CARDS = {
    "T4": Card(15.6, 65, 70, 0.40, "Hugging Face Jobs, T4 small: huggingface.co/docs/hub/jobs-pricing", "2026-07-25", False),
    "L4": Card(24, 121, 72, 0.80, "Hugging Face Jobs, 1x L4: huggingface.co/docs/hub/jobs-pricing", "2026-07-25"),
    "A100 40GB": Card(40, 312, 400, 1.99, "Lambda, 8x A100 SXM 40 GB, for one: lambda.ai/instances", "2026-09-20"),
    "A100 80GB": Card(80, 312, 400, 1.79, "RunPod Secure, A100 SXM: runpod.io/pricing", "2026-11-09"),
    "H100": Card(80, 989, 700, 3.99, "RunPod Secure, H100 SXM: runpod.io/pricing", "2026-11-09"),
    "H200": Card(141, 989, 700, 4.59, "RunPod, H200: runpod.io/pricing", "2026-10-07"),
}
# Shapes beyond the menu, by their published config.json: width, MLP's width, layers, heads, key/value heads, a head's width, vocabulary
SHAPES = {
    "Llama-3.2-1B": ("llama", 2048, 8192, 16, 32, 8, 64, 128256, True),
    "Llama-3.2-3B": ("llama", 3072, 8192, 28, 24, 8, 128, 128256, True),
    "Llama-2-13B": ("llama", 5120, 13824, 40, 40, 40, 128, 32000, False),
    "Qwen2.5-32B": ("qwen2", 5120, 27648, 64, 40, 8, 128, 152064, False),
    "Llama-3-70B": ("llama", 8192, 28672, 80, 64, 8, 128, 128256, False),
}
NAMES = "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size tie_word_embeddings".split()
METHODS = ("full", "lora", "qlora")


@dataclass(frozen=True)
class Assumptions:
    """What an estimate rests on beside model, method and card. Change what you know better: `dataclasses.replace(Assumptions(), scaling=0.7)`."""

    rank: int = 8  # of the adapters, on all linear layers
    batch: int = 8  # texts a card reads at a time
    length: int = 512  # tokens of a text
    checkpointing: bool = True
    utilisation: float | None = None  # share of the card's peak; None: what was measured on an H200 for the method
    scaling: float = 0.9  # what is left of a card's speed among several: an assumption, 1 for no loss
    free: float = 0.1  # of the memory, for what the planner leaves out
    overhead: float = 1.56  # kWh that a data centre draws for one at its machines: Uptime Institute's survey of 2024; large clouds say 1.1
    dollars: float | None = None  # a card's price an hour; None: the list's


def card(name: str) -> Card:
    """The card of that name. CourseError for an unknown one."""
    if name not in CARDS:
        raise CourseError(f"Unknown card {name!r}: there are {', '.join(CARDS)}; another one is rent.Card(gb, tflops, watts, dollars, price, date) in rent.CARDS.")
    return CARDS[name]


def shape(name: str):
    """The sizes of a model of the menu or of SHAPES, as helpers.budget reads them. CourseError for an unknown one."""
    if name in MENU:
        return SimpleNamespace(**MENU[name].shape)
    if name not in SHAPES:
        raise CourseError(f"Unknown model {name!r}: there are {', '.join([*SHAPES, *MENU])}.")
    return SimpleNamespace(**dict(zip(NAMES, SHAPES[name], strict=True)))


# ---------------------------------------------------------------- memory


def options(method: str, state_bytes: float = 8) -> dict:
    """budget.training's options for a method on a GPU: AdamW's states a trained parameter, its update, and PEFT's casts, as they were measured."""
    budget.check_choice("method", method, METHODS)
    return {"state_bytes": state_bytes, "update": "fused" if method == "full" else "foreach", "cast_inputs": method == "lora"}


def memory(config, method: str, cards: int = 1, given: Assumptions | None = None, state_bytes: float = 8) -> dict[str, int]:
    """Named bytes on each card at the worst moment of a step. Over several cards all that lives between steps is cut into as many parts.

    "gathered" is what a card holds whole for a moment: the layer at work, the next one, embeddings and head; their gradients too where they are trained.
    """
    given = given or Assumptions()
    if cards < 1:
        raise CourseError(f"There must be at least one card, not {cards}.")
    moments = budget.training_moments(config, method, given.rank, given.batch, given.length, given.checkpointing, **options(method, state_bytes))
    if cards > 1:
        weights = budget.weight_bytes(config, 4 if method == "qlora" else 16)
        layers, tables = budget.sizes(config).layers, weights["embeddings"] + weights["head"]
        layer = (budget.total(weights) - tables) / layers
        gathered = int((2 * layer + tables) * (2 if method == "full" else 1))
        cut = ("weights", "adapters", "optimizer states", "gradients", "update")
        moments = {name: {part: n // cards if part in cut else n for part, n in parts.items()} | {"gathered": gathered} for name, parts in moments.items()}
    return max(moments.values(), key=budget.total)


def fits(config, method: str, name: str, cards: int = 1, given: Assumptions | None = None) -> bool:
    """Whether a step fits so many cards of that name, with a part of each left free, in a precision that trains there."""
    if method == "full" and not card(name).bfloat16:
        return False
    return budget.total(memory(config, method, cards, given)) <= (1 - (given or Assumptions()).free) * 1e9 * card(name).gb


def fewest(config, method: str, name: str, given: Assumptions | None = None, most: int = 64) -> int | None:
    """The smallest of 1, 2, 4, 8 … cards that a step fits on; None if not even `most` do: what a card needs for its own texts is the same on every one."""
    return next((n for n in (2**i for i in range(most.bit_length())) if n <= most and fits(config, method, name, n, given)), None)


# ---------------------------------------------------------------- time, money, energy


def flop(config, method: str, checkpointing: bool = True) -> int:
    """FLOP for each token: 2 a weight forward and 2 backward; 2 more for the weights' own gradients where they are trained, 2 for a second forward pass."""
    count = budget.parameters(config)
    weights = count["linear"] + (count["head"] or count["embeddings"])  # embeddings are looked up; a tied table is multiplied as the head
    return (4 + 2 * (method == "full") + 2 * checkpointing) * weights


def measured() -> list[dict]:
    """Each recorded H200 row: GB alive measured and estimated, the estimate's error as a share, tokens a second, share of the card's peak."""
    record, config, rows = budget.recorded(), shape("Mistral-7B-Instruct-v0.3"), []
    peak = next(one.tflops for name, one in CARDS.items() if name in record["card"]) * 1e12
    for case, row in record["rows"].items():
        method, given, states = case_of(case)
        estimate = budget.total(memory(config, method, 1, given, states))
        share = row["tokens_per_second"] * flop(config, method, given.checkpointing) / peak
        found = {"measured GB": row["peak"] / 1e9, "estimated GB": estimate / 1e9, "error": estimate / row["peak"] - 1}
        rows.append({"case": case, "method": method} | asdict(given) | found | {"tokens/s": row["tokens_per_second"], "share of peak": share})
    return rows


def case_of(name: str) -> tuple[str, Assumptions, float]:
    """Method, settings and bytes of optimizer states of a recorded case, by its name in data/results/gpu.json."""
    method = "full" if name.startswith("full") else name.split()[0].lower()
    given = Assumptions(rank=8, batch=8 if "8 of 512" in name else 1, length=512, checkpointing="no checkpointing" not in name)
    return method, given, 2 if "8-bit AdamW" in name else 8


def utilisation(method: str) -> float:
    """The share of an H200's peak that the method reached on eight texts of 512 tokens with checkpointing (recorded, AdamW in float32)."""
    rows = [row for row in measured() if row["method"] == method and row["batch"] == 8 and row["checkpointing"] and "8-bit" not in row["case"]]
    return rows[0]["share of peak"]


def plan(model: str, method: str, name: str, tokens: float, cards: int | None = None, given: Assumptions | None = None) -> dict:
    """What training `model` on so many tokens takes on cards of that name (None: the fewest that it fits on): cards, GB each, hours, dollars, kWh.

    Hours are of steps alone: loading, evaluation and mistakes come on top, and are paid for too. CourseError where it doesn't fit.
    """
    given, config, one = given or Assumptions(), shape(model), card(name)
    if method == "full" and not one.bfloat16:
        raise CourseError(f"A {name} has no bfloat16 units, and weights in float16 can't be trained in full: take an adapter, or a newer card.")
    found = fewest(config, method, name, given) if cards is None else cards
    if found is None or not fits(config, method, name, found, given):
        parts = memory(config, method, found or 64, given)
        most = max(parts, key=parts.get)
        raise CourseError(
            f"{model} by {method} needs {budget.total(parts) / 1e9:.1f} GB on each of {found or 64} {name}, most of it {most}, and {(1 - given.free) * one.gb:.1f} are there: "
            "take a larger card, more of them, fewer texts at a time, or an adapter."
        )
    share = utilisation(method) if given.utilisation is None else given.utilisation
    speed = found * (given.scaling if found > 1 else 1) * share * one.tflops * 1e12 / flop(config, method, given.checkpointing)
    hours = tokens / speed / 3600
    price = one.dollars if given.dollars is None else given.dollars
    return {
        "model": model, "method": method, "card": name, "cards": found, "GB a card": budget.total(memory(config, method, found, given)) / 1e9,
        "tokens/s": speed, "hours": hours, "dollars": hours * found * price, "kWh": hours * found * one.watts / 1000 * given.overhead,
    }  # fmt: skip
