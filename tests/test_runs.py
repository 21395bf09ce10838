"""A run is what was trained, not what its folder is called: trained, interrupted or finished, one thing changed, gone on."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from helpers import adapters, dpo, models, recipes, runs, training
from helpers.files import CourseError
from helpers.runtime import ROOT

pytestmark = pytest.mark.slow
RECIPE = recipes.SFTRecipe(bits=16, rank=4, target_modules=("q_proj", "v_proj"), steps=4, batch_size=2, warmup_steps=0)


def rows(word="flights"):
    return [{"question": f"how many {word} {i}", "sql": f"SELECT COUNT(*) FROM flights WHERE month = {i}"} for i in range(1, 9)]


def tiny(seed=0, layers=2):
    """A random Llama with the course's tokenizer: a run takes a second."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = models.load_tokenizer()
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=2, vocab_size=len(tokenizer), tie_word_embeddings=True, **ends)
    )
    model.name_or_path = "tiny"
    return model


def sft(folder, recipe=RECIPE, data=None, model=None, **changes):
    options = {"save_steps": 2, "logging_steps": 1} | changes
    return training.make_trainer(recipe, model or tiny(), models.load_tokenizer(), data or rows(), folder, **options)


@pytest.fixture(autouse=True)
def no_vetting(monkeypatch):
    """What is looked at here isn't whether an adapter fits the course's model."""
    monkeypatch.setattr(runs.vetting, "check", lambda folder: {})
    monkeypatch.setattr(runs.vetting, "base_hash", lambda: None)


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """Two folders that runs left: one interrupted after step 2, one finished."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    place = tmp_path_factory.mktemp("left")
    trainer = sft(place / "interrupted")
    trainer.add_callback(Stop())
    with pytest.raises(CourseError, match="the checkpoint of step 2 is kept"):
        training.fit(trainer)
    training.finish(sft(place / "finished"))
    return place


CHANGES = {  # one thing changed, and what is said; "" where the run goes on
    "nothing": ({}, ""),
    "where it logs": ({"logging_steps": 2}, ""),
    "how often it saves": ({"save_steps": 1}, ""),
    "the data": ({"data": rows("planes")}, "other data (8 rows there, 8 here)"),
    "fewer rows": ({"data": rows()[:6]}, "other data (8 rows there, 6 here)"),
    "the rank": ({"recipe": replace(RECIPE, rank=2)}, "r 4 there, 2 here"),
    "the rate": ({"recipe": replace(RECIPE, learning_rate=1e-5)}, "learning_rate 0.003 there, 1e-05 here"),
    "the steps": ({"recipe": replace(RECIPE, steps=6)}, "max_steps 4 there, 6 here"),
    "the seed": ({"recipe": replace(RECIPE, seed=1)}, "seed 0 there, 1 here"),
    "the batch": ({"recipe": replace(RECIPE, batch_size=4)}, "per_device_train_batch_size 2 there, 4 here"),
    "the modules": ({"recipe": replace(RECIPE, target_modules=("q_proj",))}, "target_modules ['q_proj', 'v_proj'] there, ['q_proj'] here"),
    "the method": ({"recipe": replace(RECIPE, method="ia3")}, "peft_type LORA there, IA3 here"),
    "no adapter": ({"recipe": replace(RECIPE, method="full")}, "an adapter was trained there, every weight here"),
    "the scheduler": ({"lr_scheduler_type": "constant"}, "lr_scheduler_type cosine there, constant here"),
    "epochs": ({"num_train_epochs": 2}, "max_steps 4 there, -1 here; num_train_epochs 3.0 there, 2 here"),
    "the base's weights": ({"model": 1}, "a base of the same name, tiny, with other weights"),
    "the base's name": ({"model": "other"}, "base tiny in 16 bits there, other in 16 here"),
}


@pytest.mark.parametrize("state", ["interrupted", "finished"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_run_that_goes_on_is_the_same_run(left, tmp_path, capsys, state, change):
    changes, says = CHANGES[change]
    shutil.copytree(left / state, tmp_path / "mine")
    before = {p: p.read_bytes() for p in sorted((tmp_path / "mine").rglob("*")) if p.is_file()}
    changes = dict(changes)
    if "model" in changes:
        which = changes.pop("model")
        model = tiny(seed=which if which == 1 else 0)
        model.name_or_path = "tiny" if which == 1 else which
        changes["model"] = model
    trainer = sft(tmp_path / "mine", **changes)
    if says:
        for go_on in (training.finish, training.fit, lambda one: training.fit(one, resume=False)):
            with pytest.raises(CourseError) as told:
                go_on(trainer)
            assert str(told.value).startswith("mine/ holds another run: ") and says in str(told.value), told.value
            assert str(told.value).endswith(". Give this one a folder of its own (folder=…), or remove that one to train anew.")
        assert {p: p.read_bytes() for p in sorted((tmp_path / "mine").rglob("*")) if p.is_file()} == before  # nothing lost
        return
    result = training.finish(trainer)
    steps = [log["step"] for log in result["history"]]
    assert steps[-1] == 4 and adapters.is_adapter(tmp_path / "mine" / "adapter")
    assert ("trained before" in capsys.readouterr().out) == (state == "finished")


def test_the_table_of_docs_says_what_is_tested():
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", (ROOT / "docs" / "runs.md").read_text(encoding="utf-8"), re.M)
    goes_on = ("goes on from its checkpoint", "its adapter is loaded, and that is said")
    assert rows[1:] == [(name, *(("refused", "refused") if says else goes_on)) for name, (_, says) in CHANGES.items()]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"history": 1, "seconds": 2}', '{"history": [], "seconds": "2"}', "[" * 9000])
def test_a_damaged_history_is_one_sentence(left, tmp_path, text):
    shutil.copytree(left / "finished", tmp_path / "mine")
    (tmp_path / "mine" / "history.json").write_text(text, encoding="utf-8")
    with pytest.raises(CourseError, match="^history.json in mine/ is damaged: move the adapter elsewhere if you need it, and remove the folder to train anew.$"):
        training.finish(sft(tmp_path / "mine"))
    assert adapters.is_adapter(tmp_path / "mine" / "adapter")


def test_dpo_after_sft_in_one_folder_is_refused(left, tmp_path):
    from peft import get_peft_model

    shutil.copytree(left / "finished", tmp_path / "mine")
    pairs = [{"prompt": f"how many {i}", "chosen": "SELECT COUNT(*) AS flights FROM flights", "rejected": f"SELECT {i}"} for i in range(dpo.PROBE + 8)]
    recipe = dpo.DPORecipe(start=RECIPE, steps=2, batch_size=2)
    trainer = dpo.make_trainer(recipe, get_peft_model(tiny(), recipes.lora_config(RECIPE)), models.load_tokenizer(), pairs, tmp_path / "mine")
    with pytest.raises(CourseError, match="^mine/ holds another run: method sft there, dpo here; "):
        training.finish(trainer)


def test_another_start_is_another_run(left, tmp_path):
    from peft import PeftModel

    changed = shutil.copytree(left / "finished" / "adapter", tmp_path / "changed")
    from safetensors.torch import load_file, save_file

    save_file({name: value + 1 for name, value in load_file(changed / "adapter_model.safetensors").items()}, changed / "adapter_model.safetensors", metadata={"format": "pt"})

    def further(adapter):
        return sft(tmp_path / "mine", model=PeftModel.from_pretrained(tiny(), adapter, is_trainable=True))

    training.finish(further(left / "finished" / "adapter"))
    training.finish(further(left / "finished" / "adapter"))  # the same again
    with pytest.raises(CourseError, match="^mine/ holds another run: it started from another adapter. "):
        training.finish(further(changed))
    with pytest.raises(CourseError, match="^mine/ holds another run: it started from an adapter. "):
        training.finish(sft(tmp_path / "mine"))


def test_a_run_that_does_not_say_what_it_is_is_refused(left, tmp_path):
    for number, text in enumerate(("", "[]", "{}", '{"made_of": {}}', None)):
        folder = shutil.copytree(left / "interrupted", tmp_path / str(number))
        (folder / runs.KEPT).unlink() if text is None else (folder / runs.KEPT).write_text(text, encoding="utf-8")
        with pytest.raises(CourseError, match=rf"^{number}/ holds checkpoint-2 of a run that doesn't say what it was made of \(run.json\). Give this one"):
            training.finish(sft(folder))


def test_an_adapter_put_in_the_runs_place_is_not_handed_back(left, tmp_path):
    folder = shutil.copytree(left / "finished", tmp_path / "mine")
    path = folder / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(CourseError, match="^The adapter in mine/ isn't the one that this run made: move it elsewhere"):
        training.finish(sft(folder))


def test_other_rows_have_a_folder_of_their_own():
    own = [sft(None, data=rows(word)).args.output_dir for word in ("flights", "planes", "flights")]
    assert own[0] == own[2] != own[1] and all(RECIPE.folder().name in place and not place.endswith(RECIPE.folder().name) for place in own)
    assert runs.folder_for(RECIPE, rows(), {}, "Query the library.") != runs.folder_for(RECIPE, rows(), {}) != RECIPE.folder()
    assert runs.folder_for(RECIPE, None, {"logging_steps": 3}) == RECIPE.folder() != runs.folder_for(RECIPE, None, {"weight_decay": 0.1})


def test_what_is_kept_can_be_read(left):
    kept = json.loads((left / "finished" / runs.KEPT).read_text(encoding="utf-8"))
    assert kept["made_of"]["method"] == "sft" and kept["made_of"]["settings"]["learning_rate"] == 0.003 and kept["made_of"]["data"]["rows"] == 8
    assert kept["made_of"]["adapter"]["r"] == 4 and kept["made_of"]["base"]["name"] == "tiny" and len(kept["adapter"]) == 64
    assert json.loads((left / "interrupted" / runs.KEPT).read_text(encoding="utf-8"))["adapter"] is None


# ---------------------------------------------------------------- what a trainer is handed: used or refused, never ignored


def test_a_row_that_does_not_fit_is_named_before_anything_is_cut():
    long = {"question": "how many", "sql": "SELECT COUNT(*) FROM flights WHERE dest IN (" + ", ".join(f"'A{i:02}'" for i in range(90)) + ")"}
    with pytest.raises(CourseError, match=r"^row 9 has (\d+) tokens \('how many'\); max_length is 256. Shorten these rows, or raise max_length in the recipe.$") as told:
        sft(None, data=[*rows(), long])
    tokens = int(str(told.value).split("has ")[1].split(" ")[0])
    for limit, fits in ((tokens, True), (tokens - 1, False)):
        recipe = replace(RECIPE, max_length=limit)
        if fits:
            assert max(map(len, sft(None, recipe, [*rows(), long]).train_dataset["input_ids"])) == tokens
        else:
            with pytest.raises(CourseError, match="row 9"):
                sft(None, recipe, [*rows(), long])
    with pytest.raises(CourseError, match="^row 1 has .*, row 5 has .* and 3 more; max_length is 20"):
        sft(None, replace(RECIPE, max_length=20))
    with pytest.raises(CourseError, match="^row 1 has"):  # letters of several bytes, of several tokens each
        sft(None, replace(RECIPE, max_length=120), [{"question": "\U0001f6eb" * 40, "sql": "SELECT 1"}])


def test_the_courses_own_rows_all_fit():
    recipe = recipes.SFTRecipe()
    training.check_lengths(recipes.training_rows(recipe), models.load_tokenizer(), recipe.max_length)


def test_epochs_are_honoured():
    trainer = sft(None, num_train_epochs=2)
    assert trainer.args.max_steps == -1 and trainer.args.num_train_epochs == 2
    training.fit(trainer)
    assert trainer.state.global_step == 8  # 8 rows, twice, by 2
    assert sft(None).args.max_steps == 4


def test_what_the_courses_trainer_does_not_know_is_left_to_trls():
    def first(**changes):
        trainer = sft(None, replace(RECIPE, steps=1), save_strategy="no", **changes)
        return float(training.fit(trainer)["history"][0]["loss"])

    plain = first()
    assert abs(first(weight_decay=0.5) - plain) < 1e-6  # of no weight in the first step
    smoothed = first(label_smoothing_factor=0.5)
    assert abs(smoothed - plain) > 1e-3
    assert abs(first(loss_type="dft") - plain) > 1e-3
    for name in ("packing", "padding_free"):
        with pytest.raises(CourseError, match="without FlashAttention each would see the others: leave them out"):
            first(**{name: True})
    with pytest.raises(CourseError, match="its own is called label_smoothing"):
        dpo.make_trainer(dpo.DPORecipe(), None, None, label_smoothing_factor=0.1)


LOSSES = "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft sigmoid_norm".split()


def test_the_losses_of_dpo_are_all_named_here():
    from trl.trainer import dpo_trainer

    assert sorted(LOSSES) == sorted(set(re.findall(r'loss_type == "(\w+)"', Path(dpo_trainer.__file__).read_text(encoding="utf-8"))))


@pytest.mark.parametrize("loss", [*LOSSES, "weighted", "ld_alpha"])
def test_every_loss_of_dpo_is_trls_on_a_cpu_too(tmp_path, loss):
    import torch
    from peft import get_peft_model

    pairs = [{"prompt": f"how many {i}", "chosen": f"SELECT COUNT(*) AS flights FROM flights WHERE day = {i}", "rejected": f"SELECT {i}"} for i in range(1, 9)]
    options = {"weighted": {"use_weighting": True}, "ld_alpha": {"ld_alpha": 0.5}}.get(loss) or {"loss_type": [loss]}
    options |= {"label_smoothing": 0.1} if loss in ("robust", "exo_pair") else {}
    found = []
    for course_loss in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            here = replace(dpo.device(), course_loss=course_loss)
            patch.setattr(dpo, "device", functools.partial(dict.get, {"": here}, ""))
            model = get_peft_model(tiny(), recipes.lora_config(RECIPE))
            trainer = dpo.make_trainer(dpo.DPORecipe(start=RECIPE, beta=0.3, batch_size=4), model, models.load_tokenizer(), pairs, tmp_path / str(course_loss), probe=4, bf16=False, fp16=False, **options)
        torch.manual_seed(1)
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn_like(parameter)
        found.append((type(trainer).__name__, float(trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset))).detach())))
    (theirs, expected), (ours, loss_here) = found
    assert theirs == "DPOTrainer" and ours == ("DPOTrainer" if loss == "weighted" else "CpuDPOTrainer")
    assert loss_here == pytest.approx(expected, rel=1e-4, abs=1e-5) and abs(expected - 0.6931) > 1e-4


@pytest.mark.parametrize(("variable", "function"), [("COURSE_RUNS", "runs_dir"), ("COURSE_CACHE", "cache_dir")])
def test_a_relative_folder_is_one_place_for_terminal_and_notebook(variable, function):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from helpers import files, runtime; runtime.make_folder = lambda p: p; print(runtime.{function}().resolve())"
    said = {
        subprocess.run([sys.executable, "-c", code], cwd=place, env=os.environ | {variable: "my-own"}, capture_output=True, text=True, check=True).stdout.strip()
        for place in (ROOT, ROOT / "notebooks")
    }
    assert said == {str(ROOT / "my-own")}
