"""Memory before you rent: bytes of inference, LoRA, QLoRA and full fine-tuning from a config, and what a step really takes.

Every number is in bytes of live tensors. Not covered: what the allocator holds beyond them (fragmentation), the CUDA
context (about 0.3 to 0.5 GB), kernels' own workspace, gradient clipping, DoRA, training on LLM.int8 weights. Leave a
tenth of the card free.

Sources: Dettmers et al. 2023 (QLoRA: 4.5 bits a parameter, 4.127 with double quantization; LoRA beside it); Dettmers et
al. 2022 (LLM.int8()); Hu et al. 2021 (LoRA's r (in + out)); Rajbhandari et al. 2020 (ZeRO: bytes of gradients and optimizer
states); Kingma & Ba 2015 and Loshchilov & Hutter 2019 (AdamW's two states a parameter); Korthikanti et al. 2022 (activations
layer by layer, and what checkpointing keeps of them); Ainslie et al. 2023 (grouped-query attention: the KV cache shrinks
with its heads); Kaplan et al. 2020 (FLOP a parameter and token).
"""

import json
from itertools import accumulate
from math import ceil
from types import SimpleNamespace

from helpers.files import CourseError
from helpers.runtime import DATA

FAMILIES = ("llama", "mistral", "qwen2", "gemma")  # decoders of one shape: RMSNorm, rotary positions, gated MLP
FLOAT32 = 4  # bytes
BLOCK, NESTED_BLOCK = 64, 256  # bitsandbytes: weights that share an absmax; absmax that share a second one


def sizes(config) -> SimpleNamespace:
    """The config's sizes under short names: layers, h (width), f (MLP width), heads, a and kv (all heads' and KV heads' width), vocab."""
    if config.model_type not in FAMILIES:
        raise CourseError(f"The budget knows {', '.join(FAMILIES)}, not {config.model_type}: measure it with peak_live_bytes instead.")
    heads, h = config.num_attention_heads, config.hidden_size
    dim = getattr(config, "head_dim", None) or h // heads
    names = {"layers": config.num_hidden_layers, "h": h, "f": config.intermediate_size, "vocab": config.vocab_size}
    return SimpleNamespace(**names, heads=heads, a=heads * dim, kv=config.num_key_value_heads * dim)


def check_choice(name: str, value, allowed: tuple) -> None:
    """CourseError where the value is none of those allowed."""
    if value not in allowed:
        raise CourseError(f"{name} must be {', '.join(map(str, allowed[:-1]))} or {allowed[-1]}, not {value!r}.")


def projections(config, targets="all-linear") -> dict[str, tuple[int, int]]:
    """One layer's matrices, (in, out) features: all seven, which bitsandbytes quantizes, or those that LoRA's targets name."""
    s = sizes(config)
    attention = {"q_proj": (s.h, s.a), "k_proj": (s.h, s.kv), "v_proj": (s.h, s.kv), "o_proj": (s.a, s.h)}
    shapes = attention | {"gate_proj": (s.h, s.f), "up_proj": (s.h, s.f), "down_proj": (s.f, s.h)}
    names = list(shapes) if targets == "all-linear" else [targets] if isinstance(targets, str) else list(targets)
    unknown = [name for name in names if name not in shapes]
    if unknown or not names:
        raise CourseError(f"targets must be all-linear or some of {', '.join(shapes)}, not {', '.join(unknown) or 'none'}.")
    return {name: shape for name, shape in shapes.items() if name in names}


def parameters(config) -> dict[str, int]:
    """How many parameters each part has; a head tied to the embeddings has none of its own."""
    s, shapes = sizes(config), projections(config)
    qkv = s.a + 2 * s.kv
    biases = qkv if config.model_type == "qwen2" else qkv + s.h if getattr(config, "attention_bias", False) else 0
    biases += 2 * s.f + s.h if getattr(config, "mlp_bias", False) else 0
    linear, table, small = s.layers * sum(i * o for i, o in shapes.values()), s.vocab * s.h, s.layers * (2 * s.h + biases) + s.h
    return {"embeddings": table, "linear": linear, "norms and biases": small, "head": 0 if config.tie_word_embeddings else table}


def weight_bytes(config, bits: int = 16, double_quant: bool = False, dtype_bytes: int = 2) -> dict[str, int]:
    """Bytes of the weights and of what bitsandbytes keeps beside them ("quantization state"), as loaded.

    4 bits: half a byte a weight, a float32 absmax for each block of 64 and a float32 table of 16 levels for each matrix:
    4.5 bits. Double quantization: the absmax in one byte, a float32 for 256 of them, and for each matrix a table of 256
    levels and an offset: 4.127 bits and the tables. 8 bits: a byte a weight and a float32 scale an output row. Embeddings,
    norms and head stay in `dtype_bytes` (at 16 and 32 bits all weights have 2 and 4). Ready to answer on a CPU with
    bfloat16 units, bitsandbytes repacks a 4-bit matrix at its first use, with a bfloat16 absmax.
    """
    check_choice("bits", bits, (32, 16, 8, 4))
    count, s = parameters(config), sizes(config)
    rest = {32: 4, 16: 2}.get(bits, dtype_bytes)
    shapes = projections(config).values()
    blocks = [ceil(i * o / BLOCK) for i, o in shapes]
    single = sum(FLOAT32 * (n + 16) for n in blocks)
    double = sum(n + FLOAT32 * (ceil(n / NESTED_BLOCK) + 256 + 16 + 1) for n in blocks)
    state = {8: FLOAT32 * sum(o for _, o in shapes), 4: double if double_quant else single}.get(bits, 0)  # of a layer
    linear = {"linear": count.pop("linear") * bits // 8, "quantization state": s.layers * state}
    return linear | {part: n * rest for part, n in count.items()}


def measured_weight_bytes(model) -> int:
    """Bytes that a loaded model's weights and buffers really take: each storage once, tied weights too.

    Counts bitsandbytes' quant_state (absmax, levels, offset, nested state) and LLM.int8's scales, which
    `get_memory_footprint` leaves out. An adapter's weights are in it.
    """
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        holders = (state, getattr(state, "state2", None), weight, getattr(module, "state", None))
        tensors += [getattr(holder, name, None) for holder in holders for name in ("absmax", "code", "offset", "CB", "SCB")]
    return _storage_bytes(tensors)


def live_bytes(model, optimizer=None) -> int:
    """Bytes that live between two steps: weights and adapters, gradients not yet zeroed, the optimizer's states."""
    states = [value for state in optimizer.state.values() for value in state.values()] if optimizer else []
    return measured_weight_bytes(model) + _storage_bytes([p.grad for p in model.parameters()] + states)


def _storage_bytes(tensors) -> int:
    """Bytes of the tensors among them, each storage once."""
    import torch

    storages = {(s.device, s.data_ptr()): s.nbytes() for s in (t.untyped_storage() for t in tensors if torch.is_tensor(t))}
    return sum(storages.values())


def peak_live_bytes(step) -> int:
    """Runs step() once; the most bytes of tensors alive at one time in it, above what lived before it.

    Add `live_bytes(model, optimizer)`, taken before, for the whole. Run one step first, so that the optimizer has its
    states, and end it with zero_grad. On a GPU its allocator counts; elsewhere torch's profiler lists the CPU tensors made
    and freed (a step takes up to twice as long), but not the end of one made before: it counts as alive to the end.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = sorted((e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(accumulate((e.nbytes() for e in events), initial=0))


def lora_parameters(config, rank: int, targets="all-linear") -> int:
    """Trained parameters: A is (r, in) and B (out, r), so r (in + out) for each adapted matrix (Hu et al. 2021)."""
    return sizes(config).layers * rank * sum(i + o for i, o in projections(config, targets).values())


def inference(config, bits: int = 16, batch: int = 1, length: int = 512, double_quant=False, dtype_bytes: int = 2) -> dict[str, int]:
    """Bytes to answer `batch` prompts, `length` tokens each with the answer, fused attention.

    KV cache: a key and a value for each layer, KV head and token (Ainslie et al. 2023). Activations: what lives while
    the prompt passes one layer's MLP (embeddings, the layer's input, residual and its norm, three of the MLP's width; at 4
    bits one dequantized projection as well), or the last token's logits with their float32 copy, if those are more.
    """
    s, tokens = sizes(config), batch * length
    logits = batch * s.vocab * (dtype_bytes + FLOAT32)
    dequantized = s.h * s.f * dtype_bytes if bits == 4 else 0
    return {
        "weights": total(weight_bytes(config, bits, double_quant, dtype_bytes)),
        "KV cache": 2 * s.layers * s.kv * tokens * dtype_bytes,
        "activations": max(tokens * dtype_bytes * (4 * s.h + 3 * s.f) + dequantized, logits),
    }


def layer_activations(config, batch, length, method="qlora", rank=16, targets="all-linear", attention="sdpa", dtype_bytes=2,
                      compute_bytes=2, cast_inputs=True) -> dict[str, int]:  # fmt: skip
    """Bytes that autograd keeps of one layer until its backward pass, by what is kept (after Korthikanti et al. 2022, sec. 4).

    T tokens, c bytes of compute. A frozen matrix keeps no input; an adapted or trained one does. `cast_inputs`: PEFT casts
    each adapted matrix's input to the adapter's float32 and autocast casts it back, a copy each, also where three matrices
    read one tensor (no copies under `peft.helpers.disable_input_dtype_casting`). "eager" attention keeps batch * heads *
    length^2 scores, "sdpa" only each row's log-sum.
    """
    s, t, c = sizes(config), batch * length, compute_bytes
    full, eager = method == "full", attention == "eager"
    kept = set(projections(config, "all-linear" if full else targets))
    mixed = dtype_bytes > c if full else cast_inputs and c < FLOAT32  # inputs are cast for each matrix
    inputs = 0
    for width, readers in ((s.h, {"q_proj", "k_proj", "v_proj"}), (s.h, {"gate_proj", "up_proj"}), (s.f, {"down_proj"})):
        inputs += t * width * c * (len(readers & kept) if mixed else min(1, len(readers & kept)))
    if "o_proj" in kept and (eager or (mixed and not full)):
        inputs += t * s.a * c  # else it is the attention's own output, kept below
    gain = s.h * (FLOAT32 if config.model_type == "gemma" else dtype_bytes) if full else 0  # a trained one keeps what it multiplies
    norms = 2 * t * (s.h * FLOAT32 + FLOAT32 + gain)  # float32 input and 1 / rms
    if eager:  # queries, keys and values repeated for every head; float32 softmax and its cast
        scores = t * s.a * 3 * c + batch * s.heads * length**2 * (FLOAT32 + (c if c < FLOAT32 else 0))
    else:  # queries, output; keys and values of the KV heads
        scores = t * (2 * s.a + 2 * s.kv) * c + t * s.heads * FLOAT32
    mlp = 3 * t * s.f * c  # gate before and after its activation, up
    between = 0 if full else t * rank * len(kept) * c  # A x
    return {"norms": norms, "projection inputs": inputs, "attention": scores, "MLP": mlp, "between A and B": between}


def training_moments(config, method="qlora", rank=16, batch=8, length=512, checkpointing=False, targets="all-linear", attention="sdpa",
                     double_quant=False, dtype_bytes=2, compute_bytes=2, state_bytes=2 * FLOAT32, master_bytes=0, update="loop",
                     logit_tokens=None, cast_inputs=True) -> dict[str, dict[str, int]]:  # fmt: skip
    """What lives at the four moments where a training step can peak, each as named bytes: gradients and activations don't
    peak together.

    "forward": the loss is just computed. "backward" begins: all activations, the logits with their two gradients. "layer":
    one layer's backward. "update": all gradients, the optimizer at work.

    method: "qlora" (4 bits), "lora" or "full". dtype_bytes: of weights (of the unquantized ones for "qlora"); compute_bytes:
    of matrix products (autocast). state_bytes: the optimizer's for a trained parameter: 8 for AdamW's two in float32, 4 in
    16 bits, 2 for 8-bit AdamW, 0 for paged ones off the card. master_bytes: 4 where a float32 copy of trained 16-bit
    weights is kept (ZeRO's 2 + 2 + 12 bytes: dtype_bytes=2, master_bytes=4). update: "loop" (torch's default on a CPU),
    "foreach" (its default on a GPU: one more copy of everything trained) or "fused" (none). logit_tokens: positions that get
    logits at one time, by default all.
    """
    check_choice("method", method, ("qlora", "lora", "full"))
    check_choice("attention", attention, ("sdpa", "eager"))
    check_choice("update", update, ("loop", "foreach", "fused"))
    s, t, c, count, full = sizes(config), batch * length, compute_bytes, parameters(config), method == "full"
    trained = sum(count.values()) if full else lora_parameters(config, rank, targets)
    trained_bytes = dtype_bytes if full else FLOAT32
    widest = s.vocab * s.h if full else rank * max(max(shape) for shape in projections(config, targets).values())
    layer = total(layer_activations(config, batch, length, method, rank, targets, attention, dtype_bytes, c, cast_inputs))
    gain = FLOAT32 if config.model_type == "gemma" else dtype_bytes
    last = t * (s.h * FLOAT32 + FLOAT32) + (t * s.h * (gain + c) if full else 0)  # last norm; a trained head's input
    head = s.vocab * s.h if full else 0
    cast = trained_bytes > c  # autocast copies what is trained, all of it until the forward pass ends
    copies = c * (count["linear"] + head if full else trained) if cast else 0
    gradients, border = trained * trained_bytes, s.layers * t * s.h * dtype_bytes  # checkpointing keeps each layer's input
    widest_gradient = FLOAT32 if cast_inputs and not full and c < FLOAT32 else c
    work = t * (s.f * (2 * c + widest_gradient) + 2 * s.h * c)  # gradients of the MLP's inner activations and of the residual
    inside = kept = in_layer = s.layers * layer + last + copies
    growing = 0
    if checkpointing:  # the last layer's backward has all inputs kept and no gradients, the first one's the reverse
        inside, kept = border + last + copies, border + last + c * head * cast
        growing, inputs = (gradients, 0) if gradients > border else (0, border)
        in_layer = layer + copies // s.layers + inputs
    logits = (t if logit_tokens is None else logit_tokens) * s.vocab
    scratch = {"loop": 2 * widest * trained_bytes, "foreach": int(trained * state_bytes / 2), "fused": 0}[update]
    second = head * dtype_bytes if config.tie_word_embeddings else 0  # a tied table's gradient as embeddings, before it is added
    base = weight_bytes(config, 4 if method == "qlora" else 8 * dtype_bytes, double_quant, dtype_bytes)
    lives = {"weights": total(base), "adapters": 0 if full else gradients, "optimizer states": int(trained * (state_bytes + master_bytes))}

    def moment(grads, activations, logits, update):
        return lives | {"gradients": grads, "activations": activations, "logits": logits, "update": update}

    return {
        "forward": moment(0, inside, logits * (2 * FLOAT32 + (c if c < FLOAT32 else 0)), 0),
        "backward": moment(0, kept, logits * 3 * FLOAT32, 0),
        "layer": moment(growing, in_layer + work, 0, 0),
        "update": moment(gradients, 0, 0, max(scratch, second)),
    }


def training(config, method: str = "qlora", rank: int = 16, batch: int = 8, length: int = 512, checkpointing: bool = False, **options):
    """Named bytes at the worst moment of a training step (`training_moments`, which explains the options): dict[str, int]."""
    return max(training_moments(config, method, rank, batch, length, checkpointing, **options).values(), key=total)


def training_seconds(parameters: int, tokens: int, flops_per_second: float, checkpointing: bool = False) -> float:
    """Estimated seconds of training an adapter on `tokens` tokens: 4 FLOP for each parameter and token.

    2 for the forward pass, 2 for the backward pass through the activations (Kaplan et al. 2020; frozen weights get no
    gradient, which would be 2 more), with checkpointing 2 for the second forward pass.
    """
    return (6 if checkpointing else 4) * parameters * tokens / flops_per_second


def recorded() -> dict:
    """What steps of Mistral-7B's shape really took on a GPU (data/results/gpu.json, by `course.gpu --record`): card, date, versions,
    and `rows`: by case the most bytes alive (`peak`) and held by the allocator (`reserved`), seconds of a step, tokens a second."""
    record = json.loads((DATA / "results" / "gpu.json").read_text(encoding="utf-8"))
    return record | {"rows": {row["case"]: {name: value for name, value in row.items() if name != "case"} for row in record["rows"]}}


def total(parts: dict[str, int]) -> int:
    """The sum of the parts, in bytes."""
    return sum(parts.values())


def check_fits(name: str, parts: dict[str, int], have_bytes: float) -> int:
    """The bytes needed; CourseError where the machine has fewer."""
    need = total(parts)
    if need > have_bytes:
        largest = max(parts, key=parts.get)
        raise CourseError(
            f"{name} needs about {need / 1e9:.1f} GB (of which {largest}: {parts[largest] / 1e9:.1f} GB) and {have_bytes / 1e9:.1f} GB "
            "are there: use fewer bits, a smaller batch, shorter texts, gradient checkpointing or a smaller model."
        )
    return need
