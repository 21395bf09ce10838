"""Memory that runs out in training: what is said, and when a larger model trains with gradient checkpointing."""

from types import SimpleNamespace

import pytest

from helpers import menu, models, recipes, training
from helpers.dpo import DPORecipe
from helpers.files import CourseError
from helpers.recipes import SFTRecipe
from helpers.runtime import decide

pytestmark = pytest.mark.usefixtures("short_model")
TINY = SFTRecipe(steps=4, batch_size=2, warmup_steps=1)
ROWS = [{"question": f"how many flights left in month {m}", "sql": f"SELECT COUNT(*) FROM flights WHERE month = {m}"} for m in range(1, 13)]
MISTRAL = menu.MENU["Mistral-7B-Instruct-v0.3"].config()
STEP = {"method": "lora", "batch": 8, "length": 256, "checkpointing": False, "logit_tokens": 128}


@pytest.fixture
def machine(monkeypatch):
    """Sets another machine's facts and the model of the menu."""

    def set_to(gb, model):
        monkeypatch.setattr(recipes, "device", lambda: decide("cuda", "a GPU", gb, (8, 0)))
        monkeypatch.setenv("COURSE_MODEL", model)

    return set_to


# ---------------------------------------------------------------- the advice


def test_the_advice_in_full():
    assert recipes.memory_advice(MISTRAL, **STEP) == (
        "Restart the kernel and change one thing: half the batch_size (22.4 GB), half the max_length (22.4 GB), "
        "gradient_checkpointing=True in make_trainer (16.3 GB), bits=4 with LoRA (19.6 GB), or a smaller model (COURSE_MODEL) "
        "(estimates; as it is, a step takes 29.6 GB)."
    )
    halved = recipes.memory_advice(MISTRAL, **STEP | {"batch": 4})
    assert "as it is, a step takes 22.4 GB" in halved and "half the batch_size (18.7 GB)" in halved


def test_what_would_change_nothing_is_not_proposed():
    least = recipes.memory_advice(MISTRAL, **STEP | {"method": "qlora", "batch": 1, "checkpointing": True})
    assert "bits=4" not in least and "checkpointing" not in least and "batch_size" not in least
    assert "half the max_length (" in least and "a smaller model" in least


def test_a_model_that_budget_does_not_know_gets_the_knobs_without_figures():
    says = recipes.memory_advice(SimpleNamespace(model_type="gpt2"), **STEP)
    assert says == (
        "Restart the kernel and change one thing: half the batch_size, half the max_length, gradient_checkpointing=True in make_trainer, "
        "bits=4 with LoRA, or a smaller model (COURSE_MODEL)."
    )


# ---------------------------------------------------------------- checkpointing


def test_a_larger_model_checkpoints_where_it_would_not_fit_otherwise(machine):
    machine(15.8, "Mistral-7B-Instruct-v0.3")
    assert recipes.step_gb(SFTRecipe()) == pytest.approx(17.4, abs=0.1) and recipes.step_gb(SFTRecipe(), checkpointing=True) < 7
    assert recipes.needs_checkpointing(SFTRecipe())
    machine(19.2, "Mistral-7B-Instruct-v0.3")  # it fits, but leaves less than a tenth
    assert recipes.needs_checkpointing(SFTRecipe())
    machine(24.0, "Mistral-7B-Instruct-v0.3")
    assert not recipes.needs_checkpointing(SFTRecipe())
    assert recipes.needs_checkpointing(SFTRecipe(bits=16)) and not recipes.needs_checkpointing(SFTRecipe(bits=16, batch_size=1))
    assert recipes.needs_checkpointing(DPORecipe())  # 8 pairs are 16 answers
    assert not recipes.needs_checkpointing(SFTRecipe(), "SmolLM2-1.7B-Instruct")


def test_the_course_model_never_does(machine):
    machine(0.1, menu.COURSE_MODEL)
    assert not recipes.needs_checkpointing(SFTRecipe()) and not recipes.needs_checkpointing(DPORecipe())
    assert recipes.needs_checkpointing(SFTRecipe(), "SmolLM2-360M-Instruct")


# ---------------------------------------------------------------- training


def trainer(folder, **changes):
    return training.make_trainer(TINY, models.load_model(4), models.load_tokenizer(), ROWS, folder, **{"logging_steps": 1, "save_steps": 2} | changes)


def failing(step, error):
    """A callback that raises at a step."""
    from transformers import TrainerCallback

    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise error

    return Fail()


def allocator_error():
    """torch's own error on a CPU."""
    import torch

    with pytest.raises(RuntimeError) as error:
        torch.empty(10**15)
    return error.value


@pytest.mark.slow
def test_memory_that_runs_out_is_one_sentence_and_leaves_the_checkpoint(tmp_path):
    import torch

    says = "^The memory ran out at step 3; the checkpoint of step 2 is kept. Restart the kernel and change one thing: half the batch_size"
    for number, error in enumerate([torch.OutOfMemoryError("Allocation on device"), allocator_error()]):
        built = trainer(tmp_path / str(number))
        built.add_callback(failing(3, error))
        with pytest.raises(CourseError, match=says) as told:
            training.fit(built)
        assert "gradient_checkpointing=True in make_trainer (0." in str(told.value) and "bits=4" not in str(told.value)  # it has 4 bits
        assert told.value.__context__ is None and training.last_checkpoint(tmp_path / str(number)).name == "checkpoint-2"
    built = trainer(tmp_path / "none")
    built.add_callback(failing(1, error))
    with pytest.raises(CourseError, match="^The memory ran out at step 1; there was no checkpoint yet. Restart"):
        training.fit(built)
    built = trainer(tmp_path / "other")
    built.add_callback(failing(1, RuntimeError("CUDA error: an illegal memory access was encountered")))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        training.fit(built)


@pytest.mark.slow
def test_the_advice_counts_a_pair_as_two(tmp_path):
    """DPO's figure is that of twice the sequences."""
    args = SimpleNamespace(output_dir=str(tmp_path), per_device_train_batch_size=8, max_length=256, gradient_checkpointing=False, bf16=False)
    model, made_of = models.load_model(16), {}  # what the run is made of isn't asked: no checkpoint, no history

    def said(**more):
        def train(resume_from_checkpoint):
            raise RuntimeError("out of memory")

        nothing = SimpleNamespace(global_step=0, log_history=[])
        arguments = SimpleNamespace(**vars(args), **more)
        hooks = {"train": train, "remove_callback": print, "add_callback": lambda _: None}
        made = SimpleNamespace(args=arguments, model=model, state=nothing, made_of=made_of, **hooks)
        with pytest.raises(CourseError) as told:
            training.fit(made)
        return float(str(told.value).split("a step takes ")[1].split(" GB")[0])

    assert said(beta=1.0) > 1.3 * said()


@pytest.mark.slow
def test_checkpointing_trains_the_same_and_in_less_memory(tmp_path):
    """The course's trainer with gradient checkpointing, as a larger model may get it: the same losses."""
    plain, checkpointed = (training.fit(trainer(tmp_path / str(on), gradient_checkpointing=on, save_strategy="no"))["history"] for on in (False, True))
    for a, b in zip(plain, checkpointed, strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), abs=0.02)
