"""The one policy on precision: a table of machines, and real float16 steps as a T4 would take them, simulated on a CPU."""

import dataclasses
import math
from types import SimpleNamespace

import pytest

from helpers import dpo, models, recipes, runtime, training
from helpers.dpo import DPORecipe
from helpers.files import CourseError
from helpers.recipes import SFTRecipe

pytestmark = pytest.mark.usefixtures("short_model")
TINY = SFTRecipe(steps=4, rank=4, alpha=8, batch_size=2, warmup_steps=0)
PAIRS = [{"prompt": f"flights in month {m}?", "chosen": f"SELECT {m} AS month", "rejected": f"SELECT COUNT({m})"} for m in range(1, 13)]
ROWS = [{"question": p["prompt"], "sql": p["chosen"]} for p in PAIRS]
METHODS = pytest.mark.parametrize("method", ["sft", "dpo"])

# ---------------------------------------------------------------- the table

T4 = ("cuda", "Tesla T4", 15.8, (7, 5))
TABLE = {  # kind, name, memory, capability, speedup: dtype, attention, optimizer, bf16, fp16, use_cpu, pinned memory, the course's loss
    ("cpu", "fast at bfloat16", 16.0, None, 3.0): ("bfloat16", "eager", "adamw_torch_fused", True, False, True, False, True),
    ("cpu", "slow at bfloat16", 16.0, None, 1.2): ("float32", "eager", "adamw_torch_fused", False, False, True, False, True),
    ("cpu", "emulates bfloat16", 16.0, None, 0.014): ("float32", "eager", "adamw_torch_fused", False, False, True, False, True),
    ("cuda", "Tesla V100", 16.9, (7, 0), None): ("float16", "sdpa", "adamw_torch", False, True, False, True, False),
    (*T4, None): ("float16", "sdpa", "adamw_torch", False, True, False, True, False),
    ("cuda", "NVIDIA A100", 42.4, (8, 0), None): ("bfloat16", "sdpa", "adamw_torch_fused", True, False, False, True, False),
    ("cuda", "NVIDIA L4", 23.6, (8, 9), None): ("bfloat16", "sdpa", "adamw_torch_fused", True, False, False, True, False),
    ("cuda", "NVIDIA H100", 85.0, (9, 0), None): ("bfloat16", "sdpa", "adamw_torch_fused", True, False, False, True, False),
    ("cpu", "Apple M2", 16.0, None, 0.9): ("float32", "eager", "adamw_torch_fused", False, False, True, False, True),
}


@pytest.mark.parametrize("facts", TABLE, ids=lambda facts: facts[1])
def test_what_each_machine_gets(facts):
    chosen = runtime.decide(*facts)
    flags = chosen.flags
    assert list(flags) == ["bf16", "fp16", "use_cpu", "dataloader_pin_memory"]
    assert (chosen.dtype_name, chosen.attention, chosen.optimizer, *flags.values(), chosen.course_loss) == TABLE[facts]
    assert (chosen.kind, chosen.name, chosen.memory_gb, chosen.capability) == facts[:4]


def test_each_decision_says_why():
    says = {facts[1]: runtime.decide(*facts).why for facts in TABLE}
    assert says["fast at bfloat16"] == "a bfloat16 matmul runs at 3.0 times float32's speed on this processor"
    assert says["Apple M2"] == "a bfloat16 matmul runs at 0.9 times float32's speed on this processor"
    assert says["emulates bfloat16"] == "a bfloat16 matmul is more than ten times slower than a float32 one on this processor"
    assert runtime.decide("cpu", "", 16.0, speedup=0.25).why == "a bfloat16 matmul is 4.0 times slower than a float32 one on this processor"
    assert says["Tesla T4"] == says["Tesla V100"] == "this GPU has no bfloat16 units, so float16"
    assert says["NVIDIA A100"] == "this GPU has bfloat16 units"


def test_a_mac_counts_as_a_cpu(monkeypatch):
    import torch

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(runtime, "bfloat16_speedup", lambda: 0.9)
    assert (runtime.device.__wrapped__().kind, runtime.device.__wrapped__().dtype_name) == ("cpu", "float32")


class Gpu:
    name, total_memory, major, minor = "Tesla T4", 15_800_000_000, 7, 5


class H100:
    name, total_memory, major, minor = "NVIDIA H100", 85_000_000_000, 9, 0


@pytest.fixture
def cuda(monkeypatch):
    """A machine with the GPU given, as torch reports it; returns what was set as this process's share of its memory."""
    import torch

    monkeypatch.delenv("COURSE_PROFILE", raising=False)

    def machine(gpu):
        shares = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or gpu.major >= 8)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, index: shares.append((share, index)))
        return shares

    return machine


def test_a_t4_that_emulates_bfloat16_gets_float16(cuda):
    import torch

    shares = cuda(Gpu)
    assert torch.cuda.is_bf16_supported()  # so it says, on a real one too
    chosen = runtime.device.__wrapped__()
    assert (chosen.dtype_name, chosen.flags["fp16"], chosen.flags["bf16"]) == ("float16", True, False)
    assert chosen == runtime.decide(*T4) and shares == []


def test_an_h100_can_pass_for_a_t4(cuda, monkeypatch):
    shares = cuda(H100)
    assert runtime.device.__wrapped__() == runtime.decide("cuda", "NVIDIA H100", 85.0, (9, 0)) and shares == []
    monkeypatch.setenv("COURSE_PROFILE", "t4")
    memory = 14.5 * 2**30
    assert runtime.device.__wrapped__() == runtime.decide("cuda", "NVIDIA H100 as a T4", memory / 1e9, (7, 5))
    assert shares == [(memory / 85e9, 0)]


def test_a_gpu_smaller_than_a_t4_keeps_what_it_has(cuda, monkeypatch):
    class Small(Gpu):
        total_memory = 8_000_000_000

    shares = cuda(Small)
    monkeypatch.setenv("COURSE_PROFILE", "t4")
    assert runtime.device.__wrapped__().memory_gb == 8.0 and shares == [(1.0, 0)]


@pytest.mark.parametrize(("profile", "gpu"), [("t4", None), ("v100", None), ("v100", H100), ("T4 ", H100)])
def test_a_profile_that_cannot_be(cuda, monkeypatch, profile, gpu):
    import torch

    if gpu:
        cuda(gpu)
    else:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("COURSE_PROFILE", profile)
    with pytest.raises(CourseError, match=f"^COURSE_PROFILE={profile} can't be had here: there is t4, on a machine with a CUDA GPU, and laptop; unset it otherwise.$"):
        runtime.device.__wrapped__()


@pytest.mark.parametrize("gpu", [None, H100])
def test_a_laptop_is_float32_on_a_cpu_whatever_there_is(cuda, monkeypatch, gpu):
    if gpu:
        cuda(gpu)
    monkeypatch.setattr(runtime, "bfloat16_speedup", lambda: 3.0)
    monkeypatch.setenv("COURSE_PROFILE", "laptop")
    laptop = runtime.device.__wrapped__()
    assert (laptop.kind, laptop.dtype_name, laptop.course_loss, laptop.capability) == ("cpu", "float32", True, None)
    assert laptop.name.endswith(" as a laptop") and laptop.why.startswith("COURSE_PROFILE=laptop ") and laptop.flags["bf16"] is False
    monkeypatch.setenv("COURSE_PROFILE", "")
    assert runtime.device.__wrapped__().dtype_name == "bfloat16"


def test_an_empty_profile_is_none(monkeypatch):
    monkeypatch.setenv("COURSE_PROFILE", "")
    monkeypatch.setattr(runtime, "bfloat16_speedup", lambda: 1.0)
    assert runtime.device.__wrapped__().dtype_name  # this machine's own


def test_a_float16_runs_scaler_starts_low():
    import torch

    accelerator = SimpleNamespace(scaler=torch.amp.GradScaler("cpu"))
    training.start_scaler_low(SimpleNamespace(accelerator=accelerator))
    assert accelerator.scaler.get_scale() == 1024.0
    accelerator.scaler = None
    training.start_scaler_low(SimpleNamespace(accelerator=accelerator))
    assert accelerator.scaler is None  # bfloat16 needs none


def test_8_bits_are_refused_on_a_v100_only(monkeypatch):
    monkeypatch.setattr(models, "model_path", lambda name: pytest.fail("it went on to load"))
    for facts in TABLE:
        monkeypatch.setattr(models, "device", lambda facts=facts: runtime.decide(*facts))
        if facts[1] == "Tesla V100":
            with pytest.raises(CourseError, match="compute capability 7.5, a T4's, or newer; Tesla V100 is older: load with bits=4 or 16"):
                models.load_model(8)
            with pytest.raises(pytest.fail.Exception, match="it went on to load"):
                models.load_model(4)
        else:
            with pytest.raises(pytest.fail.Exception, match="it went on to load"):
                models.load_model(8)


def place(monkeypatch, where):
    """Makes `where` the machine that the course runs on."""
    for module in (runtime, models, recipes, training, dpo):
        monkeypatch.setattr(module, "device", lambda: where)
    return where


def simulated_t4(monkeypatch, **changes):
    """What is decided for a T4, but placed on this CPU."""
    return place(monkeypatch, dataclasses.replace(runtime.decide(*T4), kind="cpu", **changes))


@pytest.mark.parametrize("machine", ["fast at bfloat16", "slow at bfloat16", "T4"])
@METHODS
def test_the_configs_say_what_was_decided(tmp_path, monkeypatch, method, machine):
    facts = {facts[1]: facts for facts in TABLE}.get(machine)
    where = place(monkeypatch, runtime.decide(*facts)) if facts else simulated_t4(monkeypatch)
    args = training.sft_config(TINY, tmp_path) if method == "sft" else dpo.dpo_config(DPORecipe(), tmp_path)
    assert {name: getattr(args, name) for name in where.flags} == where.flags and args.optim == where.optimizer


# ---------------------------------------------------------------- a simulated T4
#
# A SIMULATION: a T4's decisions on a CPU. Real are the float16 weights and activations under autocast, the loss scaling,
# TRL's own trainers and their cast, NF4's dequantization to float16. Not shown: that CUDA's kernels run in float16 at all,
# and what they round; memory; speed; PEFT's casts of inputs (on a CPU it doesn't notice autocast). CUDA's refusal to unscale
# bfloat16 gradients is imitated, and later versions of torch may not have it: so we test dtypes first.


def bfloat16_left(trainer) -> list[str]:
    """Every place in a built or trained trainer where bfloat16 is left: weights, 4-bit states, buffers, gradients, optimizer, settings."""
    import torch

    model, found = trainer.model, {}
    for name, parameter in model.named_parameters():  # of the base, of the trained adapter and of DPO's reference
        state = getattr(parameter, "quant_state", None)
        found |= {name: parameter, f"{name}.grad": parameter.grad, f"{name}.quant_state": state, f"{name}.absmax": getattr(state, "absmax", None)}
        for key, value in getattr(trainer.optimizer, "state", {}).get(parameter, {}).items():
            found[f"{name}.optimizer.{key}"] = value
    found |= dict(model.named_buffers())
    dtypes = {name: getattr(value, "dtype", None) for name, value in found.items()}
    dtypes |= {f"{name}.compute_dtype": getattr(module, "compute_dtype", None) for name, module in model.named_modules()}
    dtypes |= {"config.dtype": model.config.dtype, "config.compute_dtype": model.config.quantization_config.bnb_4bit_compute_dtype}
    flags = {f"args.{name}": getattr(trainer.args, name) for name in ("bf16", "bf16_full_eval")}
    flags["accelerator.mixed_precision"] = trainer.accelerator.mixed_precision == "bf16"
    return [name for name, dtype in dtypes.items() if dtype == torch.bfloat16] + [name for name, on in flags.items() if on]


def strict_scaler(scale: float):
    """A gradient scaler that refuses bfloat16 gradients, as CUDA's does, and notes whether each step's gradients were finite."""
    import torch

    class Strict(torch.amp.GradScaler):
        finite = ()

        def unscale_(self, optimizer):
            if any(p.grad is not None and p.grad.dtype == torch.bfloat16 for group in optimizer.param_groups for p in group["params"]):
                raise NotImplementedError("\"_amp_foreach_non_finite_check_and_unscale_cuda\" not implemented for 'BFloat16'")
            super().unscale_(optimizer)
            self.finite += (not any(self._found_inf_per_device(optimizer).values()),)

    return Strict("cpu", init_scale=scale)


SCALES = {"sft": 2.0**16, "dpo": 2.0**10}  # torch's own: SFT's first step overflows and is skipped, DPO's first four would be


def build(method: str, folder, **changes):
    """The recipe's trainer over a fresh 4-bit model, for DPO with a stand-in for its start adapter, and what CUDA would have had it scale with."""
    import torch
    from peft import get_peft_model

    model, tokenizer, quiet = models.load_model(4), models.load_tokenizer(), {"logging_steps": 1, "save_strategy": "no"}
    torch.manual_seed(0)
    if method == "sft":
        trainer = training.make_trainer(TINY, model, tokenizer, ROWS, folder, **quiet | changes)
    else:
        model = get_peft_model(model, recipes.lora_config(TINY)).train()  # before any answer: see training.check_unpacked
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        trainer = dpo.make_trainer(DPORecipe(start=TINY, steps=2, batch_size=2), model, tokenizer, PAIRS, folder, **quiet | changes)
    trainer.accelerator.native_amp, trainer.accelerator.scaler = True, strict_scaler(SCALES[method])  # accelerate leaves both out on a CPU
    return trainer


@pytest.fixture
def t4(monkeypatch):
    """A simulated T4, with a short watch over the pairs."""
    runtime.setup()
    monkeypatch.setattr(dpo, "PROBE", 2)
    return simulated_t4(monkeypatch)


@pytest.mark.slow
@METHODS
def test_a_simulated_t4_trains_in_float16(tmp_path, t4, method):
    import torch
    import trl

    trainer = build(method, tmp_path)
    assert type(trainer) is {"sft": trl.SFTTrainer, "dpo": trl.DPOTrainer}[method]
    assert trainer.model.config._attn_implementation == "sdpa" and trainer.args.fp16
    before, outputs = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}, set()
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    for module in trainer.model.modules():
        module.register_forward_hook(lambda module, inputs, output: outputs.add(getattr(output, "dtype", None)))
    assert bfloat16_left(trainer) == []
    history = [h for h in training.fit(trainer, resume=False)["history"] if "loss" in h]
    assert bfloat16_left(trainer) == [] and torch.bfloat16 not in outputs and torch.float16 in outputs

    after = dict(trainer.model.named_parameters())
    assert {before[n].dtype for n in trained} == {after[n].dtype for n in trained} == {torch.float32}
    assert {n for n in after if not after[n].equal(before[n])} == trained  # every LoRA tensor, and nothing else
    reference = {n for n in after if ".ref." in n}
    assert {after[n].dtype for n in reference} == ({torch.float32} if method == "dpo" else set())
    assert {m.compute_dtype for m in trainer.model.modules() if hasattr(m, "compute_dtype")} == {torch.float16}

    scaler = trainer.accelerator.scaler
    assert all(math.isfinite(float(h["loss"])) for h in history) and len(history) == len(scaler.finite) == trainer.args.max_steps
    assert [math.isfinite(float(h["grad_norm"])) for h in history] == list(scaler.finite)
    assert math.isfinite(scaler.get_scale()) and scaler.get_scale() == SCALES[method] / 2 ** scaler.finite.count(False)
    real = sum(scaler.finite)
    assert real >= 2 and {int(s["step"]) for s in trainer.optimizer.state.values()} == {real}
    rates = [h["learning_rate"] for h in history]  # the learning rate waits for a step that was skipped
    assert all((rates[i] == rates[i + 1]) != taken for i, taken in enumerate(scaler.finite[:-1]))
    if method == "sft":  # the first scale is too large here, the last steps are taken; between them the processor's rounding decides
        assert not scaler.finite[0] and scaler.finite[-2:] == (True, True)


@pytest.mark.slow
@METHODS
def test_without_the_cure_a_simulated_t4_fails(tmp_path, t4, monkeypatch, method):
    """TRL's cast, the failure that it leads to, and the cure: dtypes and values."""
    import torch

    cure = training.restore_float32
    monkeypatch.setattr(training, "restore_float32", lambda *args: None)
    trainer = build(method, tmp_path)
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    left = bfloat16_left(trainer)
    assert left, "TRL no longer casts: restore_float32 can go"
    assert set(left) == set(trained)
    with pytest.raises(NotImplementedError, match="unscale_cuda.* not implemented for 'BFloat16'"):
        training.fit(trainer, resume=False)
    trainer.model.zero_grad()
    values = {n: torch.randn(p.shape) for n, p in trained.items()}
    cure(trainer.model, values)
    assert bfloat16_left(trainer) == []
    assert all(p.dtype == torch.float32 and p.equal(values[n]) for n, p in trained.items())
    assert all(v.equal(values[n]) for n, v in training.trainable_state(trainer.model).items())


@pytest.mark.slow
def test_the_check_reports_a_recipe_that_asks_for_bfloat16(tmp_path, t4, monkeypatch):
    import torch

    assert bfloat16_left(build("sft", tmp_path, bf16=True, fp16=False)) == ["args.bf16", "accelerator.mixed_precision"]
    simulated_t4(monkeypatch, dtype=torch.bfloat16)
    left = bfloat16_left(build("dpo", tmp_path))
    layer = "base_model.model.model.layers.0.mlp.up_proj.base_layer"
    for place in ("base_model.model.model.norm.weight", f"{layer}.weight.quant_state", f"{layer}.compute_dtype", "config.dtype", "args.bf16"):
        assert place in left
    assert not any("lora_" in place for place in left)  # the cure holds in any precision


@pytest.mark.slow
def test_the_check_finds_bfloat16_wherever_it_is_put(tmp_path, t4):
    import torch

    trainer = build("dpo", tmp_path)
    model, attention = trainer.model, trainer.model.base_model.model.model.layers[3].self_attn
    query, name = attention.q_proj, "base_model.model.model.layers.3.self_attn.q_proj"
    assert bfloat16_left(trainer) == []
    for adapter in ("ref", "default"):
        weight = query.lora_A[adapter].weight
        weight.data = weight.data.bfloat16()
        assert bfloat16_left(trainer) == [f"{name}.lora_A.{adapter}.weight"]
        weight.data = weight.data.float()
    weight.grad, saved = None, query.base_layer.weight.quant_state.dtype
    query.base_layer.weight.quant_state.dtype = torch.bfloat16
    assert bfloat16_left(trainer) == [f"{name}.base_layer.weight.quant_state"]
    query.base_layer.weight.quant_state.dtype, query.base_layer.compute_dtype = saved, torch.bfloat16
    assert bfloat16_left(trainer) == [f"{name}.base_layer.compute_dtype"]
    query.base_layer.compute_dtype = saved
    model.register_buffer("odd", torch.zeros(1, dtype=torch.bfloat16))
    assert bfloat16_left(trainer) == ["odd"]
