"""Training: the same loss as TRL's, float32 adapters, resume, interrupt, kill, export."""

import contextlib
import dataclasses
import json
import subprocess
import sys

import pytest

from helpers import adapters, dense, flights, losses, models, recipes, training
from helpers.files import CourseError
from helpers.recipes import SFTRecipe
from helpers.runtime import ROOT

pytestmark = pytest.mark.usefixtures("short_model")
TINY = SFTRecipe(steps=4, batch_size=2, warmup_steps=1)
ROWS = [{"question": f"how many flights left in month {m}", "sql": f"SELECT COUNT(*) FROM flights WHERE month = {m}"} for m in range(1, 13)]


def trainer(folder, recipe=TINY, bits=4, **changes):
    return training.make_trainer(
        recipe, models.load_model(bits), models.load_tokenizer(), ROWS, folder, **{"logging_steps": 1, "save_steps": 2} | changes
    )


def interrupt_at(step):
    """A callback that presses Ctrl-C when a step is done."""
    from transformers import TrainerCallback

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise KeyboardInterrupt

    return Interrupt()


# ---------------------------------------------------------------- what needs no model


def test_key_changes_with_the_recipe_and_only_with_it():
    assert SFTRecipe().key() == SFTRecipe().key()
    keys = {dataclasses.replace(SFTRecipe(), **change).key() for change in ({}, {"seed": 1}, {"steps": 1}, {"learning_rate": 2e-3}, {"examples": 5})}
    assert len(keys) == 5


def test_key_changes_with_the_prompt(monkeypatch):
    before = SFTRecipe().key()
    monkeypatch.setattr(flights, "SYSTEM_PROMPT", "Other.")
    assert SFTRecipe().key() != before


def test_training_rows_by_examples_and_by_phrasings():
    rows = [{"intent": f"i{i}", "phrasing": f"i{i}/{p}", "question": f"{i}{p}{e}"} for i in range(3) for p in range(4) for e in range(2)]
    pick = recipes.training_rows
    assert pick(SFTRecipe(), rows) == rows
    assert len(pick(SFTRecipe(examples=5), rows)) == 5
    few = pick(SFTRecipe(phrasings=1), rows)
    assert len(few) == 6 and len({r["phrasing"] for r in few}) == 3
    assert pick(SFTRecipe(phrasings=1), rows) == few != pick(SFTRecipe(phrasings=1, seed=1), rows)


def test_half_written_checkpoints_are_passed_over(tmp_path):
    assert training.last_checkpoint(tmp_path) is None
    for step, files in {2: ("trainer_state.json", "optimizer.pt"), 10: ("optimizer.pt",), 4: ("trainer_state.json", "optimizer.pt")}.items():
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name in files:
            (tmp_path / f"checkpoint-{step}" / name).write_text("{}", encoding="utf-8")
    (tmp_path / "checkpoint-12").mkdir()
    for name, text in (("optimizer.pt", "…"), ("trainer_state.json", '{"global_step": 1')):  # cut short by a full disk
        (tmp_path / "checkpoint-12" / name).write_text(text, encoding="utf-8")
    assert training.last_checkpoint(tmp_path).name == "checkpoint-4"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rank": 0}, "rank r must be at least 1, not 0"),
        ({"method": "magic"}, "Unknown method 'magic': lora, rslora, dora, ia3, prompt or full"),
        ({"method": "full"}, "Quantized weights can't be trained: full fine-tuning needs bits=16"),
    ],
)
def test_a_recipe_that_cannot_be(change, says):
    recipe = dataclasses.replace(TINY, **change)
    with pytest.raises(CourseError, match=says):
        training.base_model(recipe) if recipe.method == "full" else recipes.peft_config(recipe)


def test_target_modules_that_match_nothing():
    import torch

    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(2, 2), "lm_head": torch.nn.Linear(2, 2), "act": torch.nn.ReLU()})
    training.check_targets(dataclasses.replace(TINY, target_modules=("q_proj",)), model)
    for wrong in ("query", ("q_proj", "query"), "lm_head"):
        with pytest.raises(CourseError, match=r"is called (query|lm_head): target_modules can name q_proj, or be 'all-linear'"):
            training.check_targets(dataclasses.replace(TINY, target_modules=wrong), model)


def test_one_flag_each_for_rslora_and_dora():
    flags = {m: recipes.lora_config(dataclasses.replace(TINY, method=m)) for m in ("lora", "rslora", "dora")}
    assert [(c.use_rslora, c.use_dora) for c in flags.values()] == [(False, False), (True, False), (False, True)]


# ---------------------------------------------------------------- what does


@pytest.mark.slow
@pytest.mark.parametrize(("method", "count"), [("ia3", 7_680), ("prompt", 9_216), ("full", 42_472_512), ("lora", 651_264)])
def test_every_method_trains_what_it_should_in_float32_and_nothing_else(tmp_path, method, count):
    recipe = dataclasses.replace(TINY, method=method, bits=16, steps=2, learning_rate=1e-3)
    built = training.make_trainer(recipe, training.base_model(recipe), models.load_tokenizer(), ROWS, tmp_path, save_strategy="no")
    learnt = training.trainable_state(built.model)
    frozen = {n: p.detach().clone() for n, p in built.model.named_parameters() if not p.requires_grad}
    assert sum(p.numel() for p in learnt.values()) == count
    assert {p.dtype.itemsize for p in built.model.parameters() if p.requires_grad} == {4}
    training.fit(built, resume=False)
    assert any(not p.equal(learnt[n]) for n, p in training.trainable_state(built.model).items())
    assert all(p.equal(frozen[n]) for n, p in built.model.named_parameters() if n in frozen)


@pytest.mark.slow
def test_merging_into_quantized_weights_is_refused_and_into_16_bits_it_changes_nothing():
    import torch
    from peft import get_peft_model

    with pytest.raises(CourseError, match="round the adapter away in part: load the base with bits=16"):
        adapters.merge(get_peft_model(models.load_model(4), recipes.lora_config(TINY)))
    model = get_peft_model(models.load_model(16, torch.float32), recipes.lora_config(TINY)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    ids = torch.arange(1000, 1008)[None]
    with torch.no_grad():
        on = model(ids).logits
        with model.disable_adapter():
            assert (model(ids).logits - on).abs().max() > 0.1
        torch.testing.assert_close(adapters.merge(model)(ids).logits, on, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_an_adapter_that_goes_on_keeps_its_values(tmp_path):
    """TRL rounds a trained adapter to bfloat16 when a trainer is built over a quantized base; the recipe puts it back."""
    import torch
    from peft import get_peft_model

    model = get_peft_model(models.load_model(4), recipes.lora_config(TINY))
    before = {n: torch.nn.init.normal_(p).detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    built = training.make_trainer(TINY, model, models.load_tokenizer(), ROWS, tmp_path)
    assert all(p.equal(before[n]) for n, p in training.trainable_state(built.model).items())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "ia3", "prompt", "full"])
def test_our_cpu_loss_is_trls_loss(tmp_path, method):
    """In float32, on an unquantized base, the same batch: our cheaper loss against TRL's, and its gradients."""
    import torch
    from trl import SFTTrainer

    results = []
    for kind in (SFTTrainer, losses.cpu_trainer_class()):
        torch.manual_seed(0)
        args = training.sft_config(TINY, tmp_path, bf16=False, fp16=False)
        built = kind(
            model=models.load_model(16, torch.float32), args=args, train_dataset=recipes.training_set(ROWS),
            processing_class=models.load_tokenizer(), peft_config=recipes.peft_config(dataclasses.replace(TINY, method=method)),
        )  # fmt: skip
        batch = built.data_collator([built.train_dataset[i] for i in range(4)])
        built.share_prefix = kind is not SFTTrainer  # as in `fit`
        with dense.training(built.model) if built.share_prefix else contextlib.nullcontext():
            loss = built.compute_loss(built.model, batch, num_items_in_batch=(batch["labels"][:, 1:] != -100).sum())
            loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in built.model.parameters() if p.grad is not None])
        results.append((loss.detach(), gradient))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-4)
    assert results[0][1].abs().max() > 0


@pytest.mark.slow
def test_the_mask_covers_the_answer_and_the_end_of_turn_only(tmp_path):
    built = trainer(tmp_path)
    batch = built.data_collator([built.train_dataset[0]])
    supervised = batch["input_ids"][0][batch["labels"][0] != -100]
    assert built.processing_class.decode(supervised) == ROWS[0]["sql"] + "<|im_end|>\n"


@pytest.mark.slow
def test_interrupt_keeps_the_checkpoint_and_resume_reaches_the_same_loss(tmp_path):
    whole = training.fit(trainer(tmp_path / "whole"))["history"]
    stopped = trainer(tmp_path / "stopped")
    stopped.add_callback(interrupt_at(3))
    with pytest.raises(CourseError, match="interrupted at step 3; the checkpoint of step 2 is kept. Run the same cell again"):
        training.fit(stopped)
    resumed = training.fit(trainer(tmp_path / "stopped"))["history"]
    assert [h["step"] for h in resumed] == [h["step"] for h in whole] == [1, 2, 3, 4]
    for a, b in zip(resumed, whole, strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), abs=0.02)  # the stated tolerance
    assert all(p.dtype.itemsize == 4 for p in stopped.model.parameters() if p.requires_grad)


@pytest.mark.slow
def test_interrupt_before_the_first_checkpoint_says_so(tmp_path):
    stopped = trainer(tmp_path)
    stopped.add_callback(interrupt_at(1))
    with pytest.raises(CourseError, match="there was no checkpoint yet"):
        training.fit(stopped)


@pytest.mark.slow
def test_a_disk_that_fills_up_in_a_run_keeps_the_last_checkpoint(small_disk):
    place = small_disk(16)  # one checkpoint, not two
    with pytest.raises(CourseError, match=r"The disk filled up at step 4; the checkpoint of step 2 is kept\. Free some space and run the same cell again") as told:
        training.fit(trainer(place / "run"))
    assert str(place) not in str(told.value) and told.value.__context__ is None
    kept = json.loads((place / "run" / "checkpoint-2" / "trainer_state.json").read_text(encoding="utf-8"))
    assert kept["global_step"] == 2
    again = training.fit(trainer(place / "run", save_strategy="no"))  # goes on from there
    assert again["history"][-1]["step"] == 4


@pytest.mark.slow
def test_kill_minus_nine_in_training_resumes(tmp_path, shortened):
    code = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
from helpers import models, runtime, training
models.model_path = lambda name=None: Path({str(shortened())!r})
runtime.setup()
from test_recipes import trainer
from transformers import TrainerCallback
class Say(TrainerCallback):
    def on_step_end(self, args, state, control, **k):
        print("step", state.global_step, flush=True)
        if state.global_step == 3 and "hang" in sys.argv:
            import time; time.sleep(120)
one = trainer(Path({str(tmp_path)!r}))
one.add_callback(Say())
print("loss", training.fit(one)["history"][-1])
"""
    process = subprocess.Popen([sys.executable, "-c", code, "hang"], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line == "step 3\n":
            break
    process.kill()
    process.wait()
    process.stdout.close()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    steps = [line for line in done.stdout.splitlines() if line.startswith("step")]
    assert steps == ["step 3", "step 4"]  # steps 1 and 2 were in the checkpoint


@pytest.mark.slow
def test_export_has_no_pickle_and_no_path_and_reloads_to_the_same_answers(tmp_path):
    import torch
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    built = trainer(tmp_path / "run", save_strategy="no")
    training.fit(built)
    folder = adapters.export_adapter(built.model, tmp_path / "adapter")
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "/" not in (folder / "adapter_config.json").read_text(encoding="utf-8").replace(config["base_model_name_or_path"], "")
    # in float32, so that nothing depends on rounding: the reloaded adapter against the trained tensors put on a twin
    again = adapters.load_adapter(folder, bits=16, dtype=torch.float32)
    trained, loaded = (get_peft_model_state_dict(m, save_embedding_layers=False) for m in (built.model, again))
    assert trained.keys() == loaded.keys() and all(torch.equal(loaded[k], v) for k, v in trained.items())
    twin = get_peft_model(models.load_model(16, torch.float32), recipes.lora_config(TINY)).eval()
    set_peft_model_state_dict(twin, trained)
    ids = models.load_tokenizer()("How many flights left JFK in July?", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = again(ids).logits
        torch.testing.assert_close(logits, twin(ids).logits)
        with again.disable_adapter():
            assert (again(ids).logits - logits).abs().max() > 0.01  # it was the adapter that spoke


@pytest.mark.slow
def test_a_finished_recipe_is_not_trained_again(tmp_path, capsys):
    built = trainer(tmp_path)
    first = training.finish(built)
    again = trainer(tmp_path)
    assert training.finish(again)["seconds"] == first["seconds"]
    assert "trained before" in capsys.readouterr().out
    for a, b in zip(training.trainable_state(built.model).values(), training.trainable_state(again.model).values(), strict=True):
        assert a.equal(b)
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"half of it")
    with pytest.raises(CourseError, match=rf"^The adapter {tmp_path.name}/adapter/ was not loaded: .*remove its folder first"):
        training.finish(again)
