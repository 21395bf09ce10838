"""The memory budget: hand-worked values, real models' parameter counts, and what a loaded model and a training step really take."""

import contextlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from helpers import budget
from helpers.files import CourseError
from helpers.runtime import ROOT

FAMILIES = ["llama", "mistral", "qwen2", "gemma"]


def tiny(family="llama", **changes):
    """Width 8, MLP 16, 2 layers, 2 heads over 1 KV head of 4, 10 tokens in the vocabulary, head not tied."""
    from transformers import AutoConfig

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return AutoConfig.for_model(family, **sizes | {"head_dim": 4, "vocab_size": 10, "pad_token_id": 0, "tie_word_embeddings": False} | changes)


# ---------------------------------------------------------------- worked by hand


def test_parameters_by_hand():
    # a layer: q, o 8 * 8 = 64 each; k, v 8 * 4 = 32 each; gate, up, down 8 * 16 = 128 each: 576. Norms: 2 layers * 2 * 8, and 8 at the end
    assert budget.parameters(tiny()) == {"embeddings": 80, "linear": 1152, "norms and biases": 40, "head": 80}
    assert budget.parameters(tiny(tie_word_embeddings=True))["head"] == 0
    # qwen2: biases of q (8), k (4), v (4) in both layers
    assert budget.parameters(tiny("qwen2"))["norms and biases"] == 40 + 32


@pytest.mark.parametrize(
    ("options", "linear", "state", "rest"),
    [
        ({"bits": 32}, 4608, 0, 800),
        ({"bits": 16}, 2304, 0, 400),
        ({"bits": 8}, 1152, 512, 400),  # scales: 4 * (8 + 4 + 4 + 8 + 16 + 16 + 8) = 256 a layer
        ({"bits": 4}, 576, 976, 400),  # blocks of 64: 1 + 1 + 1 + 1 + 2 + 2 + 2 = 10; 4 * (10 + 7 * 16) = 488 a layer
        ({"bits": 4, "double_quant": True}, 576, 15364, 400),  # 10 + 4 * 7 * (1 + 256 + 16 + 1) = 7682 a layer
        ({"bits": 4, "dtype_bytes": 4}, 576, 976, 800),
    ],
)
def test_weight_bytes_by_hand(options, linear, state, rest):
    got = budget.weight_bytes(tiny(), **options)
    assert (got.pop("linear"), got.pop("quantization state"), budget.total(got)) == (linear, state, rest)  # rest: 200 parameters


def test_qlora_papers_bits_a_parameter():
    from transformers import LlamaConfig

    def bits(**options):
        parts = budget.weight_bytes(LlamaConfig(), 4, **options)
        return 8 * (parts["linear"] + parts["quantization state"]) / budget.parameters(LlamaConfig())["linear"]

    assert sum(budget.parameters(LlamaConfig()).values()) == 6_738_415_616  # Llama-2-7B
    assert bits() == pytest.approx(4.5, abs=0.001)
    assert bits(double_quant=True) == pytest.approx(4.127, abs=0.001)


def test_lora_parameters_by_hand():
    # in + out: q 16, k 12, v 12, o 16, gate 24, up 24, down 24 = 128; 2 layers * rank 2
    assert budget.lora_parameters(tiny(), 2) == 512
    assert budget.lora_parameters(tiny(), 2, ["q_proj", "v_proj"]) == 2 * 2 * 28
    assert budget.lora_parameters(tiny(), 2, "q_proj") == 2 * 2 * 16


def test_inference_by_hand():
    # KV cache: 2 * 2 layers * 1 head * 4 * 6 tokens * 2 bytes; activations: 6 tokens * 2 bytes * (4 * 8 + 3 * 16)
    assert budget.inference(tiny(), 16, batch=2, length=3) == {"weights": 2704, "KV cache": 192, "activations": 960}
    # 4 bits: one projection dequantized, 8 * 16 * 2; weights 576 + 976 + 400
    assert budget.inference(tiny(), 4, batch=2, length=3) == {"weights": 1952, "KV cache": 192, "activations": 960 + 256}
    assert budget.inference(tiny(), 16, batch=2, length=1)["activations"] == 2 * 2 * 80  # more than the logits' 2 * 10 * 6


def test_layer_activations_by_hand():
    # 6 tokens, 2 bytes, rank 2. Norms: 2 * 6 * (8 + 1) * 4. Inputs: 6 * 2 * (8 * 5 for q, k, v, gate, up; 8 for o; 16 for down).
    # Attention: 6 * 2 * (q 8, out 8, k 4, v 4) + 6 * 2 heads * 4. MLP: 3 * 6 * 16 * 2. A x: 6 * 2 * 7 * 2.
    parts = {"norms": 432, "projection inputs": 768, "attention": 336, "MLP": 576, "between A and B": 168}
    assert budget.layer_activations(tiny(), 2, 3, rank=2) == parts
    # eager: q, k, v of 8 each and its scores: 2 * 2 heads * 9 * (4 + 2)
    assert budget.layer_activations(tiny(), 2, 3, rank=2, attention="eager")["attention"] == 6 * 24 * 2 + 216
    # without casts q, k, v read one tensor, gate and up another, o the attention's output: 6 * 2 * (8 + 8 + 16)
    assert budget.layer_activations(tiny(), 2, 3, rank=2, cast_inputs=False)["projection inputs"] == 384


def test_training_by_hand():
    moments = budget.training_moments(tiny(), "qlora", rank=2, batch=2, length=3)
    lives = {"weights": 1952, "adapters": 2048, "optimizer states": 4096}
    # 2 layers * 2280, the last norm 6 * 9 * 4, autocast's copy of the adapters 2 * 512; 60 logits * 12 bytes
    assert moments["backward"] == lives | {"gradients": 0, "activations": 4560 + 216 + 1024, "logits": 720, "update": 0}
    assert moments["forward"]["logits"] == 60 * 10
    assert moments["layer"]["activations"] == 5800 + 6 * (16 * 8 + 2 * 8 * 2)
    # AdamW one tensor at a time: two copies of the largest, 2 * 16 float32
    assert moments["update"] == lives | {"gradients": 2048, "activations": 0, "logits": 0, "update": 256}
    assert budget.training(tiny(), "qlora", rank=2, batch=2, length=3) == moments["layer"]
    kept = budget.training_moments(tiny(), "qlora", rank=2, batch=2, length=3, checkpointing=True)["backward"]
    assert (kept["activations"], kept["gradients"]) == (2 * 6 * 8 * 2 + 216, 0)  # each layer's input, the last norm
    assert budget.training_moments(tiny(), rank=2, batch=2, length=3, logit_tokens=2)["backward"]["logits"] == 2 * 10 * 12


def test_training_seconds_by_hand():
    # 4 * 1e9 parameters * 1000 tokens = 4e12; a second forward pass with checkpointing: 6e12
    assert budget.training_seconds(1_000_000_000, 1000, 2e12) == 2.0
    assert budget.training_seconds(1_000_000_000, 1000, 2e12, checkpointing=True) == 3.0


def test_full_fine_tuning_by_hand():
    # 1352 parameters; ZeRO's 16 bytes each: 2 of weights, 2 of gradients, 12 of master copy and states
    parts = budget.training_moments(tiny(), "full", batch=1, length=1, master_bytes=4, update="fused")["update"]
    assert budget.total(parts) == 16 * 1352
    eight = budget.training_moments(tiny(), "full", batch=1, length=1, state_bytes=2, update="foreach")["update"]
    assert (eight["optimizer states"], eight["update"]) == (2 * 1352, 1352)
    # tied: the table of 80 gets one gradient as head, then another as embeddings
    assert budget.training_moments(tiny(tie_word_embeddings=True), "full", batch=1, length=1, update="fused")["update"]["update"] == 160


def test_the_table_of_a_7b_model():
    from transformers import LlamaConfig

    small = {"rank": 8, "batch": 1, "length": 512, "checkpointing": True}
    assert budget.total(budget.training(LlamaConfig(), "full", master_bytes=4, update="fused", **small)) > 80e9
    assert 10e9 < budget.total(budget.training(LlamaConfig(), "lora", **small)) < 20e9
    assert budget.total(budget.training(LlamaConfig(), "qlora", double_quant=True, **small)) < 10e9


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: budget.weight_bytes(tiny(), 3), "bits must be 32, 16, 8 or 4, not 3."),
        (lambda: budget.training(tiny(), "dora"), "method must be qlora, lora or full, not 'dora'."),
        (lambda: budget.training(tiny(), attention="flash"), "attention must be sdpa or eager, not 'flash'."),
        (lambda: budget.training(tiny(), update="paged"), "update must be loop, foreach or fused, not 'paged'."),
        (
            lambda: budget.lora_parameters(tiny(), 2, ["qkv"]),
            "targets must be all-linear or some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, not qkv.",
        ),
        (lambda: budget.lora_parameters(tiny(), 2, []), "gate_proj, up_proj, down_proj, not none."),
        (
            lambda: budget.parameters(SimpleNamespace(model_type="gpt2")),
            "The budget knows llama, mistral, qwen2, gemma, not gpt2: measure it with peak_live_bytes instead.",
        ),
        (
            lambda: budget.check_fits("QLoRA of a 7B model", {"weights": 4e9, "logits": 2.5e9}, 4e9),
            "QLoRA of a 7B model needs about 6.5 GB (of which weights: 4.0 GB) and 4.0 GB are there: "
            "use fewer bits, a smaller batch, shorter texts, gradient checkpointing or a smaller model.",
        ),
    ],
)
def test_refusals_are_one_sentence(call, says):
    with pytest.raises(CourseError) as error:
        call()
    assert str(error.value).endswith(says)


def test_what_fits_passes():
    assert budget.check_fits("it", {"a": 3, "b": 4}, 7) == 7


# ---------------------------------------------------------------- against real models


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_parameters_equal_a_real_models(family, changes):
    import torch
    from transformers import AutoModelForCausalLM

    if "attention_bias" in changes and family != "llama":
        changes = {}  # only llama reads both
    config = tiny(family, **changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(budget.parameters(config).values()) == sum(p.numel() for p in model.parameters())
    shapes = {name.split(".")[-1]: (m.in_features, m.out_features) for name, m in model.model.layers[0].named_modules() if hasattr(m, "in_features")}
    assert budget.projections(config) == shapes


def test_peak_live_bytes_by_hand():
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU's allocator rounds up")
    before = torch.zeros(10_000)

    def step():
        a = torch.zeros(1000)
        b = torch.zeros(500)  # 6,000 bytes: the peak
        del a
        return b, torch.zeros(250), before

    assert budget.peak_live_bytes(step) == 6000


def test_live_bytes_count_a_storage_once_and_what_a_footprint_misses():
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight  # tied
    assert budget.measured_weight_bytes(model) == 64
    nested = SimpleNamespace(absmax=torch.zeros(2), code=torch.zeros(256))
    model[0].weight.quant_state = SimpleNamespace(
        absmax=torch.zeros(8, dtype=torch.uint8), code=torch.zeros(16), offset=torch.zeros(()), state2=nested
    )
    assert budget.measured_weight_bytes(model) == 64 + 8 + 64 + 4 + 8 + 1024
    del model[0].weight.quant_state
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert budget.live_bytes(model, optimizer) == 64 + 64 + 128 + 4  # weights, gradients, two states, a step counter
    optimizer.zero_grad()
    assert budget.live_bytes(model, optimizer) == 64 + 128 + 4


def training_step(model, trained, tokens, autocast, **optimizer):
    """The step that is measured: forward, backward, AdamW. Returns it and the optimizer."""
    import torch

    optimizer = torch.optim.AdamW(trained, **optimizer)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, optimizer


@pytest.mark.parametrize("family", [FAMILIES[0], *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES[1:])])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {}),
        ("lora", {"attention": "eager", "cast_inputs": False}),
        ("lora", {"checkpointing": True}),
        ("lora", {"dtype_bytes": 4, "compute_bytes": 4, "targets": ["q_proj", "v_proj"]}),
        ("full", {"dtype_bytes": 4}),
        ("full", {"dtype_bytes": 4, "attention": "eager", "checkpointing": True}),
        ("full", {"state_bytes": 4, "update": "foreach"}),
    ],
)
def test_a_small_models_step(family, method, options):
    """Layers outweigh the head here, so that every term of a layer counts; more than a twentieth off is too much."""
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.helpers import disable_input_dtype_casting
    from transformers import AutoModelForCausalLM

    if torch.cuda.is_available():
        pytest.skip("measured on the CPU")
    small = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 5, "num_attention_heads": 4, "head_dim": 16, "vocab_size": 128}
    config, batch, length = tiny(family, **small), 2, 96
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if options.get("dtype_bytes") == 4 else torch.bfloat16)
    model.set_attn_implementation(options.get("attention", "sdpa"))
    if method == "lora":
        model = get_peft_model(model, LoraConfig(r=8, target_modules=options.get("targets", "all-linear"), task_type="CAUSAL_LM"))
    if options.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.config.use_cache = False
        if method == "lora":
            model.enable_input_require_grads()
    autocast = (options.get("dtype_bytes", 2), options.get("compute_bytes", 2)) != (4, 4) and not (method == "full" and "dtype_bytes" not in options)
    trained = [p for p in model.train().parameters() if p.requires_grad]
    step, optimizer = training_step(model, trained, torch.randint(0, 128, (batch, length)), autocast, foreach=options.get("update") == "foreach")
    with contextlib.nullcontext() if options.get("cast_inputs", True) else disable_input_dtype_casting(model):
        step()
        measured = budget.live_bytes(model, optimizer) + budget.peak_live_bytes(step)
    predicted = budget.total(budget.training(config, method, 8, batch, length, **options))
    assert predicted == pytest.approx(measured, rel=0.05)
    if method == "lora" and not options:  # the check can fail: without any of a layer's larger terms it does
        layer = budget.layer_activations(config, batch, length, method, 8)
        for part in ("norms", "projection inputs", "attention", "MLP"):
            assert predicted - config.num_hidden_layers * layer[part] != pytest.approx(measured, rel=0.05), part


# ---------------------------------------------------------------- the course model


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "quant_type", "double_quant"), [(16, "nf4", 0), (8, "nf4", 0), (4, "nf4", 0), (4, "fp4", 0), (4, "nf4", 1)])
def test_weights_of_the_course_model(bits, quant_type, double_quant):
    """Exact but for the rotary frequencies (256 bytes), so that one part in a thousand is held."""
    from helpers import models

    model = models.load_model(bits, quant_type=quant_type, double_quant=bool(double_quant))
    measured = budget.measured_weight_bytes(model)
    rest = model.get_input_embeddings().weight.element_size()
    predicted = budget.total(budget.weight_bytes(model.config, 32 if (bits, rest) == (16, 4) else bits, double_quant, rest))
    assert predicted == pytest.approx(measured, rel=0.001)
    if bits < 16:  # the check can fail: without the quantization state it does
        assert model.get_memory_footprint() != pytest.approx(measured, rel=0.001)


MEASURE = """
import gc, json, sys
import torch
sys.path.insert(0, "tests")
from peft import LoraConfig, get_peft_model
from helpers import budget, models, runtime
from test_budget import training_step

fast = runtime.setup().dtype == torch.bfloat16  # else float32 throughout
def measured_and_predicted(method, attention, batch, length, checkpointing):
    model = models.load_model(4 if method == "qlora" else 16, torch.float32 if method == "full" else None)
    model.set_attn_implementation(attention)
    rest, config = model.get_input_embeddings().weight.element_size(), model.config
    if method == "full":
        model.requires_grad_(True)
    else:
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        model.config.use_cache = False
    trained = [p for p in model.train().parameters() if p.requires_grad]
    step, optimizer = training_step(model, trained, torch.randint(0, 1000, (batch, length)), fast)
    step()
    measured = budget.live_bytes(model, optimizer) + budget.peak_live_bytes(step)
    options = {"attention": attention, "dtype_bytes": rest, "compute_bytes": 2 if fast else 4}
    parts = budget.training(config, method, 16, batch, length, checkpointing, **options)
    return measured, parts
for setting in json.loads(sys.argv[1]):
    print(json.dumps(measured_and_predicted(*setting)), flush=True)
    gc.collect()
"""


STEPS = [
    ("qlora", "sdpa", 4, 64, False),
    ("qlora", "sdpa", 4, 128, False),
    ("qlora", "eager", 2, 192, False),
    ("qlora", "sdpa", 2, 64, True),
    ("lora", "sdpa", 4, 96, False),
    ("full", "sdpa", 2, 64, False),
]


@pytest.fixture(scope="module")
def course_steps():
    """Each of `STEPS` measured, one after another in a process of its own: the bytes, and what the planner says."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("measured on the CPU")
    done = subprocess.run([sys.executable, "-c", MEASURE, json.dumps(STEPS)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return dict(zip(STEPS, map(json.loads, done.stdout.splitlines()[-len(STEPS) :]), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("setting", STEPS, ids=lambda s: "-".join(map(str, s)))
def test_training_the_course_model(setting, course_steps):
    measured, parts = course_steps[setting]
    predicted = budget.total(parts)
    print(f"{setting}: measured {measured / 1e6:.1f} MB, predicted {predicted / 1e6:.1f} MB ({predicted / measured - 1:+.1%})")
    assert predicted == pytest.approx(measured, rel=0.15)
    if not setting[-1] and setting[0] != "full":  # the check of what a step adds to the weights can fail: without the logits it does
        added = measured - parts["weights"]
        assert predicted - parts["weights"] == pytest.approx(added, rel=0.15)
        assert predicted - parts["weights"] - parts["logits"] != pytest.approx(added, rel=0.15)
        assert predicted - parts["weights"] - parts["activations"] != pytest.approx(added, rel=0.15)
