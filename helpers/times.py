"""How long the course's long pieces of work take on this machine: from their FLOP and from how fast it multiplies matrices, measured in a second."""

import functools
import json
import timeit
from dataclasses import dataclass, fields

from helpers.runtime import DATA, device

KEPT = DATA / "results" / "times.json"  # measured runs of the notebooks, one for each kind of processor (make refresh, make timings)
LINEAR, HEAD, LORA = 106_168_320, 28_311_552, 305_280  # weights of the course model: layers, head; of an adapter for each unit of rank
ROW_TOKENS, LEARNT = 55, 30  # of a training example: those that a step computes (what all share is run once), and those learnt
PADDED_TOKENS, GPU_SHARE = 67, 0.3  # on a GPU: padding and what all share included; of the matmul rate, for models large enough to fill it
# The share of the matmul rate that each kind of work reaches, on a CPU by dtype. The rest is attention, norms, the cache.
TRAINING = {"float32": 0.6, "bfloat16": 0.45}
ANSWERING = {"float32": 0.7, "bfloat16": 0.5}
STEP, PASS = 0.15, 0.06  # seconds that a training step and a token of all rows take on a GPU at least, launching kernels: estimates


@dataclass(frozen=True)
class Rates:
    """FLOP/s of matrix products shaped as the model's: of a training step, of a hundred answers at once, of a single one."""

    kind: str  # cpu or cuda
    dtype: str
    training: float
    answering: float
    single: float


@dataclass(frozen=True)
class Work:
    """train, read, write: FLOP of training, of prompts, of answers. steps: of training. passes: tokens written one after another. rest: seconds of all else."""

    train: float = 0
    read: float = 0
    write: float = 0
    steps: float = 0
    passes: float = 0
    rest: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)))

    def __mul__(self, times: float) -> "Work":
        return Work(*(getattr(self, f.name) * times for f in fields(Work)))


@functools.cache
def rates(matrices: int = 24) -> Rates:
    """Measures this machine, in about a second; as many matrices as no processor's cache holds, since a model's weights aren't in it either."""
    import torch

    here = device()
    weights = [torch.ones(576, 1536, dtype=here.dtype, device=here.kind) for _ in range(matrices)]

    def rate(rows):
        a = torch.ones(rows, 576, dtype=here.dtype, device=here.kind)

        def products():
            for weight in weights:
                last = a @ weight
            return last[0, 0].item()  # waits for a GPU

        return 2 * rows * 576 * 1536 * matrices / min(timeit.repeat(products, number=1, repeat=3)[1:])  # the first one warms up

    return Rates(here.kind, here.dtype_name, rate(400), rate(100), rate(1))


# ---------------------------------------------------------------- pieces of work


def sft(recipe) -> Work:
    """A run of an SFTRecipe: 4 FLOP for each frozen weight and token, 6 for each trained one; the head only where there is something to learn."""
    frozen = 6 if recipe.method == "full" else 4
    trained = 0 if recipe.method == "full" else LORA * recipe.rank
    step = recipe.batch_size * (ROW_TOKENS * (frozen * LINEAR + 6 * trained) + LEARNT * frozen * HEAD)
    return Work(train=recipe.steps * step, steps=recipe.steps)


def dpo(recipe) -> Work:
    """A run of a DPORecipe: two answers a pair, and 2 FLOP more for the reference, which only reads."""
    step = 2 * recipe.batch_size * (ROW_TOKENS * (6 * LINEAR + 6 * LORA * recipe.start.rank) + LEARNT * 6 * HEAD)
    return Work(train=recipe.steps * step, steps=2 * recipe.steps)


def answers(questions: int, own: int = 35, written: int = 30, shared: int = 30, longest: int = 96) -> Work:
    """Answering: tokens of each prompt that are its own and of what all share, tokens written, on average and at most."""
    read = 2 * LINEAR * (shared + questions * own)
    return Work(read=read, write=2 * (LINEAR + HEAD) * questions * written, passes=longest * -(-questions // 128))


BASELINES = answers(100, 55, 50, 330) + answers(100, 35, 35, 460) + answers(100, 35, 30, 650) + answers(100, 500, 30, 330)  # of notebook 00

OWN = answers(36, 20, 60, 200) + answers(36, 400, 40, 200) + answers(36)  # a second domain, at the end of notebook 03


def lessons() -> dict[str, Work]:
    """What each notebook does, those before it finished. `rest` is loading, judging, plots and the small computations by hand."""
    from helpers.recipes import SFTRecipe

    run, pairs = sft(SFTRecipe()), 2 * 8 * (ROW_TOKENS * 6 * (LINEAR + 16 * LORA) + LEARNT * 6 * HEAD)
    step = run * (1 / SFTRecipe().steps)
    return {
        "00_start_here": BASELINES + Work(rest=25),
        "01_quantized_loading": sft(SFTRecipe(method="full", steps=12, batch_size=2)) + Work(read=2 * LINEAR * 20_000, rest=30),
        "02_lora_injection": step * 140 + answers(100) * 5 + Work(rest=40),
        "03_sft_with_trl": step * 487 + answers(100) * 3 + answers(100, 35, 50) + OWN + Work(rest=40),
        "04_dpo": Work(train=24 * pairs, steps=48) + step * 32 + answers(100) * 3 + answers(48) + answers(36) * 2 + Work(rest=45),
    }


def exam() -> Work:
    """The end of `make course`: both main runs on all of test and half of freeform."""
    return answers(382 + 69) * 2


# ---------------------------------------------------------------- times


def seconds(work: Work, at: Rates | None = None, slower: float = 1) -> float:
    """Estimated seconds of the work at these rates (None: this machine's). `slower`: how many times longer training takes than estimated."""
    at = at or rates()
    if at.kind == "cuda":
        training, answering = max(work.train / at.training, STEP * work.steps), max((work.read + work.write) / at.answering, PASS * work.passes)
    else:
        share = ANSWERING[at.dtype]
        training, answering = work.train / (TRAINING[at.dtype] * at.training), work.read / (share * at.training) + work.write / (share * at.answering)
    return slower * training + answering + work.rest


def spell(seconds: float) -> str:
    """About so long, no finer than an estimate is: tens of seconds up to a minute and a half, then minutes."""
    return f"about {max(10, round(seconds, -1)):.0f} seconds" if seconds < 90 else f"about {seconds / 60:.0f} minutes"


def announce(what: str, work: Work) -> None:
    """Prints, before it starts, how long it will take here."""
    print(f"{what}: {spell(seconds(work))} on this machine (estimate)", flush=True)


def minutes(at: Rates | None = None, slower: float = 1) -> dict[str, float]:
    """Estimated minutes of each notebook, with the adapters before it there, and of the exam."""
    return {name: seconds(work, at, slower) / 60 for name, work in (lessons() | {"exam": exam()}).items()}


def table(at: Rates | None = None, step: float | None = None) -> str:
    """Those minutes and their sum, as lines. `step`: seconds of a training step of the main recipe, where they were measured."""
    from helpers.recipes import SFTRecipe

    recipe = SFTRecipe()
    parts = minutes(at := at or rates(), step * recipe.steps / seconds(sft(recipe), at) if step else 1)
    lines = [f"  {name:22}{max(1, value):4.0f}" for name, value in (parts | {"make course": sum(parts.values())}).items()]
    return "\n".join(["Minutes on this machine, estimated:", *lines])


def training_pace(at: Rates | None = None) -> tuple[int, float]:
    """For a model of any size: the tokens of a training example that a step computes, and the FLOP/s that training reaches."""
    at = at or rates()
    return (PADDED_TOKENS, GPU_SHARE * at.training) if at.kind == "cuda" else (ROW_TOKENS, TRAINING[at.dtype] * at.training)


# ---------------------------------------------------------------- measured runs


def kept() -> dict[str, dict]:
    """The measured runs, by dtype: machine, cores, rates, and the seconds of each notebook that was measured with the course as it is."""
    return json.loads(KEPT.read_text(encoding="utf-8"))


def kept_rates(run: dict, dtype: str) -> Rates:
    """A kept run's rates; answering is taken to be as fast as training where it wasn't measured."""
    rates = run["rates"]
    return Rates("cpu", dtype, rates["training"], rates.get("answering", rates["training"]), rates.get("single", 0))
