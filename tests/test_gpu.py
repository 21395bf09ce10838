"""`make gpu-check` on a CPU: its memory and finite checks whole, on small shapes in float16; and each gate can fail.

What only a GPU can show: the sizes themselves, its kernels and allocator, AdamW's foreach update, the time a step takes.
"""

import dataclasses
import gc
import json

import pytest

from course import gpu
from helpers import budget, menu, models, runtime
from helpers.files import CourseError
from helpers.runtime import runs_dir

T4 = runtime.T4_BYTES
SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4, "head_dim": 64, "vocab_size": 1024}
KV_HEADS = dict(zip(gpu.SHAPES, (4, 2), strict=True))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The two shapes cut small, of each a short step, timed once."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("measured on the CPU")
    for name, heads in KV_HEADS.items():
        entry = menu.MENU[name]
        monkeypatch.setitem(menu.MENU, name, dataclasses.replace(entry, shape=entry.shape | SMALL | {"num_key_value_heads": heads}))
    monkeypatch.setattr(gpu, "LENGTH", 32)
    monkeypatch.setattr(gpu, "REPEATS", 1)


@pytest.fixture
def cpu(monkeypatch):
    """The CPU stands in for the card, float16 as on a T4; returns the calls of nbval, which passes."""
    import torch

    calls = []
    device = dataclasses.replace(runtime.decide("cuda", "a CPU", T4 / 1e9, (7, 5)), kind="cpu")
    assert device.dtype == torch.float16
    monkeypatch.setattr(gpu, "need_gpu", lambda: None)
    monkeypatch.setattr(gpu, "card", lambda: device)
    monkeypatch.setattr(gpu, "as_itself", lambda: [])
    monkeypatch.setattr(gpu.runner, "nbval", lambda names, **environment: calls.append((names, environment)) or 0)
    return calls


def config(name=gpu.SHAPES[0]):
    return menu.MENU[name].config()


def float16():
    import torch

    return torch.float16


def bfloat16():
    import torch

    return torch.bfloat16


# ---------------------------------------------------------------- the plan


def test_the_published_shapes_fit_a_t4(monkeypatch):
    monkeypatch.undo()
    plans = [gpu.plan(menu.MENU[name].config(), "cuda", float16(), T4) for name in gpu.SHAPES]
    assert plans == [gpu.Case("qlora", 8, checkpointing, rank=16, length=256) for checkpointing in (False, True)]
    assert gpu.plan(menu.MENU[gpu.SHAPES[1]].config(), "cuda", float16(), 6.4e9).rows == 4


def test_what_fits_nowhere_is_refused():
    with pytest.raises(CourseError, match="^The smallest step needs about .* use fewer bits"):
        gpu.plan(config(), "cpu", float16(), 1e6)


# ---------------------------------------------------------------- the random model


@pytest.mark.slow
def test_building_holds_one_matrix_in_16_bits(monkeypatch):
    """Made on "meta"; then the peak is what stays and, at most, the making and quantizing of the largest matrix."""
    import torch
    from transformers.integrations import bitsandbytes

    replace, normal, empty, made, beside = bitsandbytes.replace_with_bnb_linear, torch.Tensor.normal_, [], [], []

    def look(model, *rest):
        assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        empty.append(replace(model, *rest))
        return empty[-1]

    def storages(tensors):
        there = [t for t in tensors if isinstance(t, torch.Tensor) and t.dtype == float16() and not t.is_meta]
        return {t.untyped_storage().data_ptr() for t in there}

    def spy(new, *rest, **named):
        if not new.is_meta:
            beside.append(storages(gc.get_objects()) - storages(empty[0].parameters()) - before)
        return normal(new, *rest, **named)

    monkeypatch.setattr(bitsandbytes, "replace_with_bnb_linear", look)
    before = storages(gc.get_objects())
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "normal_", spy)
        gpu.random_model(config(gpu.SHAPES[1]), "cpu", float16())
    assert [len(found) for found in beside] == [1] * (7 * SMALL["num_hidden_layers"] + 2)  # that which is being filled
    shape = config(gpu.SHAPES[1])
    peak = budget.peak_live_bytes(lambda: made.append(gpu.random_model(shape, "cpu", float16())))
    stays = budget.measured_weight_bytes(made[0])

    def one():
        weight = torch.empty(shape.intermediate_size, shape.hidden_size, dtype=float16()).normal_()
        return bitsandbytes.bnb.nn.Params4bit(weight, quant_type="nf4", compress_statistics=False).to("cpu")

    most = stays + budget.peak_live_bytes(one)
    assert stays < peak <= most < budget.total(budget.weight_bytes(shape, 16))


@pytest.mark.slow
def test_it_is_as_from_pretrained_would_leave_it():
    """Of the course model's shape: every parameter's kind, dtype, shape and quantization, every buffer's dtype and shape; the tied head."""

    def looks(model):
        state = {n: getattr(p, "quant_state", None) for n, p in model.named_parameters()}
        kinds = {n: s and (s.quant_type, s.blocksize, s.nested, s.dtype, s.shape, s.absmax.dtype, s.absmax.shape) for n, s in state.items()}
        return {n: (type(p).__name__, p.dtype, p.shape, p.requires_grad and "trained", kinds[n]) for n, p in model.named_parameters()}

    random, loaded = gpu.random_model(menu.choose().config(), "cpu", float16()), models.load_model(4, float16())
    loaded.requires_grad_(False)
    assert looks(random) == looks(loaded)
    buffers = [{n: (b.dtype, b.shape) for n, b in model.named_buffers()} for model in (random, loaded)]
    assert buffers[0] == buffers[1] and buffers[0]
    assert random.lm_head.weight is random.model.embed_tokens.weight
    assert random.config._attn_implementation == loaded.config._attn_implementation == "sdpa"
    assert budget.measured_weight_bytes(random) == budget.measured_weight_bytes(loaded)


def test_weights_are_random_norms_are_one_and_positions_right():
    import bitsandbytes as bnb
    from transformers import AutoModelForCausalLM

    model = gpu.random_model(config(gpu.SHAPES[1]), "cpu", float16())
    weight = model.model.layers[5].mlp.up_proj.weight
    values = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    assert values.std().item() == pytest.approx(0.02, rel=0.05) and abs(values.mean().item()) < 1e-3
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.lm_head.weight.float().std().item() == pytest.approx(0.02, rel=0.05)
    assert (model.model.norm.weight == 1).all()
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    made = dict(AutoModelForCausalLM.from_config(config(gpu.SHAPES[1])).named_buffers())  # not by way of "meta"
    assert made and made.keys() == dict(model.named_buffers()).keys()
    assert all((made[name] == buffer).all() and made[name].dtype == buffer.dtype for name, buffer in model.named_buffers())


# ---------------------------------------------------------------- the gates


@pytest.mark.slow
@pytest.mark.parametrize("name", gpu.SHAPES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_takes_what_the_planner_says(monkeypatch, name, checkpointing):
    monkeypatch.setattr(gpu, "PLANS", ((2, checkpointing),))
    row = gpu.check(name, "cpu", float16(), T4)
    print(gpu.table([row]))
    assert row["passed"] and row["finite"] and row["tokens"] == [2, 32] and row["checkpointing"] == checkpointing
    assert abs(gpu.error(row, "peak")) < 0.02 and abs(gpu.error(row, "weights")) < 1e-3
    assert row["seconds"] > 0


@pytest.mark.slow
def test_the_trained_model_is_looked_at_too(monkeypatch):
    monkeypatch.setattr(gpu, "PLANS", ((1, True),))
    monkeypatch.setattr(gpu, "LENGTH", 8)
    row = gpu.check(menu.COURSE_MODEL, "cpu", float16(), T4, trained=True)
    print(gpu.table([row]))
    assert row["passed"] and row["finite"] and row["weights"][0] == pytest.approx(row["weights"][1], rel=1e-3)


@pytest.mark.slow
def test_a_wrong_estimate_fails(monkeypatch, cpu, capsys):
    right = gpu.estimate
    monkeypatch.setattr(gpu, "estimate", lambda *a: (parts := right(*a)) | {"activations": parts["activations"] + budget.total(parts) // 3})
    monkeypatch.setattr(gpu, "SHAPES", gpu.SHAPES[:1])
    monkeypatch.setattr(gpu, "PLANS", ((1, False),))
    assert gpu.main(["--no-notebooks"]) == 1
    assert "NOT passed" in capsys.readouterr().out
    kept = json.loads((runs_dir() / "gpu-check.json").read_text(encoding="utf-8"))
    assert not kept["passed"] and not kept["rows"][0]["passed"] and kept["rows"][0]["finite"]


@pytest.mark.parametrize(
    ("weights", "peak", "finite", "passed"),
    [(1, 1.14, True, True), (1, 1.16, True, False), (1, 0.86, True, True), (1, 0.84, True, False)]
    + [(1.009, 1, True, True), (1.011, 1, True, False), (0.989, 1, True, False), (1, 1, False, False)],
)
def test_the_gates_edges(weights, peak, finite, passed):
    assert gpu.passes({"weights": [1000, 1000 * weights], "peak": [1000, 1000 * peak], "finite": finite}) == passed


@pytest.mark.slow
def test_weights_that_overflow_fail(monkeypatch):
    import torch

    monkeypatch.setattr(gpu, "WARM_UPS", 2)
    model, tokens = gpu.random_model(config(), "cpu", float16()), torch.zeros(1, 8, dtype=torch.long)
    assert gpu.finite(model, tokens)
    model.model.norm.weight.data.fill_(float("inf"))
    assert not gpu.finite(model, tokens)
    case = gpu.Case("qlora", 1, False, length=8)
    row = gpu.measure("it", model, tokens, case, gpu.estimate(config(), case, "cpu", float16()), "cpu", float16())
    assert not row["finite"] and not row["passed"]


@pytest.mark.slow
def test_gradients_that_overflow_fail(monkeypatch):
    """The logits are finite here, but no update goes through."""
    import torch

    monkeypatch.setattr(gpu, "WARM_UPS", 2)
    monkeypatch.setattr(gpu, "finite", lambda *a: True)
    model, tokens = gpu.random_model(config(), "cpu", float16()), torch.zeros(1, 8, dtype=torch.long)
    model.model.norm.weight.data.fill_(float("inf"))
    case = gpu.Case("qlora", 1, False, length=8)
    row = gpu.measure("it", model, tokens, case, gpu.estimate(config(), case, "cpu", float16()), "cpu", float16())
    assert not row["finite"] and not row["passed"]


@pytest.mark.slow
def test_adapters_are_float32_beside_4_bit_layers(monkeypatch):
    import peft
    import torch

    made, wrap = [], peft.get_peft_model
    monkeypatch.setattr(peft, "get_peft_model", lambda *a: made.append(wrap(*a)) or made[0])
    monkeypatch.setattr(gpu, "PLANS", ((1, False),))
    gpu.check(gpu.SHAPES[1], "cpu", float16(), T4)
    layers = [module for module in made[0].modules() if hasattr(module, "lora_A")]
    assert len(layers) == 7 * SMALL["num_hidden_layers"] and {type(layer) for layer in layers} == {peft.tuners.lora.Linear4bit}
    trained = [p for p in made[0].parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == budget.lora_parameters(config(gpu.SHAPES[1]), 16)
    assert {p.dtype for p in trained} == {torch.float32} and any(
        p.abs().sum() for layer in layers for p in layer.lora_B.parameters()
    )  # a step was made


@pytest.mark.slow
def test_out_of_memory_is_one_sentence(monkeypatch):
    import torch

    def full(*a):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, "measure", full)
    with pytest.raises(CourseError, match="ran out of memory where the planner says it fits: end what else uses the GPU and run again.$"):
        gpu.check(gpu.SHAPES[0], "cpu", float16(), T4)


# ---------------------------------------------------------------- notebook 01's table


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in gpu.TABLE if "8 of 512" not in name or "no checkpointing" in name])
def test_a_step_of_the_table_takes_what_the_planner_says(monkeypatch, name):
    """Cut small, on a CPU, in bfloat16: two rows in place of eight, 32 tokens in place of 512."""
    case = dataclasses.replace(gpu.TABLE[name], rows=min(2, gpu.TABLE[name].rows), length=32)
    row = gpu.check_case(name, config(gpu.SHAPES[1]), case, "cpu", bfloat16())
    print(gpu.table([row]))
    assert row["finite"] and row["tokens"] == [case.rows, 32] and row["model"] == name and abs(gpu.error(row, "weights")) < 1e-3
    if case.method != "full":
        assert row["passed"] and abs(gpu.error(row, "peak")) < 0.03
    else:  # a CPU has no kernel for bitsandbytes' optimizers: float32 copies of the matrix at hand, up to six
        copy = 4 * SMALL["vocab_size"] * SMALL["hidden_size"]
        assert 0 < row["peak"][0] - row["peak"][1] < 6 * copy


def test_the_table_in_full():
    assert len(gpu.TABLE) == 10 and {case.length for case in gpu.TABLE.values()} == {512} and {case.rank for case in gpu.TABLE.values()} == {8}
    methods = [case.method for case in gpu.TABLE.values()]
    assert methods == ["full"] * 4 + ["lora"] * 3 + ["qlora"] * 3
    assert sorted(name for name, case in gpu.TABLE.items() if case.rows == 8) == sorted(name for name in gpu.TABLE if "8 of 512" in name)
    assert [name for name, case in gpu.TABLE.items() if not case.checkpointing] == [f"{m} r = 8, 8 of 512, no checkpointing" for m in ("LoRA", "QLoRA")]


@pytest.mark.parametrize(
    ("memory", "dtype", "fit"),
    [(T4, "float16", 2), (24e9, "bfloat16", 4), (80e9, "bfloat16", 8), (150e9, "bfloat16", 10), (150e9, "float16", 6)],
)
def test_what_cannot_fit_a_card_is_left_out_and_said(monkeypatch, capsys, memory, dtype, fit):
    import torch

    monkeypatch.undo()  # the published shape
    monkeypatch.setattr(gpu, "check_case", lambda name, config, case, device, dtype: name)
    measured = gpu.check_table("cuda", getattr(torch, dtype), memory)
    said = capsys.readouterr().out
    assert len(measured) == fit and said.count("left out: ") == 10 - fit
    assert all(f"left out: {name}: " in said for name in gpu.TABLE if name not in measured)
    assert ("weights in float16 can't be trained" in said) == (dtype == "float16")


def test_the_planner_is_near_every_recorded_row(monkeypatch):
    monkeypatch.undo()
    record, shape = budget.recorded(), menu.MENU[gpu.TABLE_MODEL].config()
    assert set(record["rows"]) <= set(gpu.TABLE) and record["card"] and record["versions"]["bitsandbytes"]
    for name, row in record["rows"].items():
        case = gpu.TABLE[name]
        assert budget.total(gpu.estimate(shape, case, "cuda", bfloat16())) == pytest.approx(row["peak"], rel=0.03), name
        assert row["reserved"] > row["peak"]
        assert row["tokens_per_second"] == pytest.approx(case.rows * case.length / row["seconds"], rel=1e-3)


def test_a_record_is_written_as_budget_reads_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "DATA", tmp_path)
    monkeypatch.setattr(budget, "DATA", tmp_path)
    monkeypatch.delenv("COURSE_PROFILE", raising=False)
    device = runtime.decide("cuda", "NVIDIA H100", 85.0, (9, 0))
    row = {"model": "QLoRA r = 8, one text of 512", "tokens": [1, 512], "checkpointing": True, "weights": [4, 4], "peak": [10**9, 10**9]}
    row |= {"reserved": 2 * 10**9, "seconds": 0.25, "finite": True, "passed": True}
    monkeypatch.setattr(gpu, "need_gpu", lambda: None)
    monkeypatch.setattr(gpu, "as_itself", lambda: [row])
    monkeypatch.setattr(gpu.runtime, "setup", lambda: device)
    monkeypatch.setattr(gpu.runtime, "device", lambda: device)
    assert gpu.main(["--record"]) == 0
    kept = budget.recorded()
    assert (kept["card"], kept["profile"], kept["dtype"]) == ("NVIDIA H100", "none", "bfloat16") and kept["versions"]["python"].startswith("3.")
    assert kept["rows"] == {"QLoRA r = 8, one text of 512": {"peak": 10**9, "reserved": 2 * 10**9, "seconds": 0.25, "tokens_per_second": 2048}}
    assert "2,048" in capsys.readouterr().out


# ---------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_whole_command(monkeypatch, cpu, capsys):
    """Notebooks, both shapes, the trained model; table and JSON."""
    import bitsandbytes
    import torch

    trained = []
    check = gpu.check
    monkeypatch.setattr(gpu, "PLANS", ((1, True),))
    monkeypatch.setattr(gpu, "check", lambda name, *a, trained=False: trained_row(name) if trained else check(name, *a))

    def trained_row(name):
        trained.append(name)
        return check(gpu.SHAPES[0], "cpu", float16(), T4) | {"model": name}

    assert gpu.main([]) == 0
    assert cpu == [(gpu.lessons.all_notebooks(), {"COURSE_PROFILE": "t4"})] and trained == [menu.COURSE_MODEL]
    out = capsys.readouterr().out
    assert "a CPU: notebooks passed" in out and "1 x 32, checkpointing" in out and all(name in out for name in (*gpu.SHAPES, menu.COURSE_MODEL))
    text = (runs_dir() / "gpu-check.json").read_text(encoding="utf-8")
    kept = json.loads(text)
    assert (kept["torch"], kept["bitsandbytes"], kept["card"]) == (torch.__version__, bitsandbytes.__version__, "a CPU")
    assert kept["passed"] and kept["notebooks"] == "passed" and len(kept["rows"]) == 3 and str(runs_dir()) not in text


ROW = {"reserved": 0, "model": "it", "tokens": [8, 256], "checkpointing": False, "weights": [10**9, 10**9], "peak": [2 * 10**9, 21 * 10**8], "seconds": 1.5}


@pytest.mark.parametrize(
    ("notebooks", "passed", "status", "says"),
    [(None, True, 0, "not run"), (0, True, 0, "passed"), (1, True, 1, "FAILED"), (0, False, 1, "passed")],
)
def test_the_report(capsys, notebooks, passed, status, says):
    assert gpu.report("a card", notebooks, [ROW | {"finite": True, "passed": passed}]) == status
    out = capsys.readouterr().out
    assert f"a card: notebooks {says};" in out and ("NO" in out.split()) == (not passed)
    assert all(text in out for text in ("8 x 256", "1.000 / 1.000", "2.000 / 2.100", "+5.0%", "1.50"))
    assert json.loads((runs_dir() / "gpu-check.json").read_text(encoding="utf-8"))["passed"] == (not status)


def test_failed_notebooks_dont_stop_the_rest(monkeypatch, cpu):
    monkeypatch.setattr(gpu.runner, "nbval", lambda names, **environment: 1)
    monkeypatch.setattr(gpu, "check", lambda *a, **k: ROW | {"finite": True, "passed": True})
    assert gpu.main([]) == 1
    kept = json.loads((runs_dir() / "gpu-check.json").read_text(encoding="utf-8"))
    assert kept["notebooks"] == "FAILED" and not kept["passed"] and len(kept["rows"]) == 3


def test_without_a_gpu_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(gpu.runner, "nbval", lambda *a, **k: pytest.fail("the notebooks ran"))
    assert gpu.main([]) == 1
    said = capsys.readouterr()
    assert said.err.strip().startswith("make gpu-check needs an NVIDIA GPU: ") and said.err.strip().count("\n") == 0 and not said.out


def test_a_stop_is_no_traceback(monkeypatch, capsys):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "need_gpu", stop)
    assert gpu.main([]) == 130 and capsys.readouterr().err == "\nStopped.\n"


def test_any_card_passes_for_a_t4(monkeypatch):
    """A simulated H100: the policy, the memory, and none of the attention kernels that a T4 lacks."""
    import torch

    class H100:
        name, total_memory, major, minor = "NVIDIA H100", 85_000_000_000, 9, 0

    off, shares = [], []
    monkeypatch.setenv("COURSE_PROFILE", "none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: H100)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, index: shares.append(share))
    for kernel in ("flash", "cudnn"):
        monkeypatch.setattr(torch.backends.cuda, f"enable_{kernel}_sdp", lambda on, kernel=kernel: off.append((kernel, on)))
    runtime.device.cache_clear()
    try:
        gpu.need_gpu()
        device = gpu.card()
    finally:
        runtime.device.cache_clear()
    assert (device.kind, device.dtype, device.capability) == ("cuda", float16(), (7, 5)) and "NVIDIA H100" in device.name
    assert 1e9 * device.memory_gb == pytest.approx(T4) and shares == [pytest.approx(T4 / H100.total_memory)]
    assert off == [("flash", False), ("cudnn", False)]
