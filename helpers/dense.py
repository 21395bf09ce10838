"""4-bit weights and adapters as plain float32 matrices, for as long as a model answers or trains on a CPU without a kernel for them."""

import functools
from contextlib import contextmanager

FREE = 0.5  # of the free memory may be taken


def wanted(model) -> bool:
    """Whether it pays: on a CPU that computes in float32, where there is memory for it, 4 bytes a weight (0.4 GB for the course model).

    With bfloat16, bitsandbytes has a kernel of its own for packed weights where the processor is fast at it.
    """
    import psutil
    import torch

    if model.device.type != "cpu" or model.dtype != torch.float32:
        return False
    sizes = (m.in_features * m.out_features for m in model.modules() if isinstance(m, torch.nn.Linear))
    return 4 * sum(sizes) < FREE * psutil.virtual_memory().available


@contextmanager
def written_out(model):
    """Within a `with`, each linear layer's NF4 weights stand in float32, its LoRA adapter in them: W + sBA (4 bytes a weight).

    bitsandbytes dequantizes a matrix whenever it is multiplied with, for each token anew; here once, to the very same numbers.
    W + sBA isn't rounded to 4 bits again, so that answers are those of the adapter beside NF4 (tested). Where it doesn't pay
    (`wanted`), or where they are written out already, nothing is changed.
    """
    with _forwards([(module, _Linear(weight, module.bias)) for module, weight in _weights(model)] if wanted(model) and not _are_written_out(model) else []):
        yield


def _are_written_out(model) -> bool:
    return any(isinstance(vars(module).get("forward"), _Linear) for module in model.modules())


@contextmanager
def _forwards(replaced):
    """Within a `with`, each module of the (module, forward) pairs has that forward; afterwards the one that it had."""
    before = [(module, vars(module).get("forward")) for module, _ in replaced]
    for module, forward in replaced:
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in before:
            del module.forward  # the class's own again
            if forward:
                module.forward = forward


class _Linear:
    """x W^T + b in place of a layer's forward."""

    def __init__(self, weight, bias):
        self.weight, self.bias = weight, bias

    def __call__(self, x, *_, **__):
        import torch

        return torch.nn.functional.linear(x, self.weight, self.bias)


def _weights(model):
    """The layers that can be written out, each with its matrix (out, in)."""
    from bitsandbytes.nn import Linear4bit

    inside = set()
    for module in model.modules():
        if id(module) in inside:
            continue
        if _adapted_linear(module):
            if module.merged or module.disable_adapters or any(getattr(module, "use_dora", {}).values()):
                continue  # what stands in it is looked at by itself
            weight = plain(module.get_base_layer())
            if weight is None:
                continue
            for name in module.active_adapters:
                weight = weight + module.get_delta_weight(name) if name in module.scaling else weight
            inside |= set(map(id, module.modules()))
            yield module, weight
        elif isinstance(module, Linear4bit):
            yield module, plain(module)


def plain(layer):
    """A linear layer's weight (out, in) in floating point; None for another kind, such as 8-bit weights."""
    from bitsandbytes.functional import dequantize_4bit

    weight = layer.weight
    if getattr(weight, "quant_state", None) is not None:
        return dequantize_4bit(weight.data, weight.quant_state).to(layer.compute_dtype or weight.quant_state.dtype)
    return weight.data if weight.dtype.is_floating_point else None


@contextmanager
def training(model):
    """Within a `with`, a training step multiplies with W + sBA once where PEFT multiplies with W, A and B, in both directions.

    The same function and the same gradients for A and B, up to float32's last digits (tested), in a fifth less time; NF4 is
    dequantized once a step, not twice. Takes the memory of the written out weights for as long as a step. Where it doesn't
    pay (`wanted`) nothing is changed.
    """
    with _forwards([(module, _Adapted(module)) for module in model.modules() if _adapted_linear(module)] if wanted(model) else []):
        yield


def _adapted_linear(module) -> bool:
    """Whether it is a linear layer with a LoRA adapter."""
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer) and hasattr(module.get_base_layer(), "in_features")


class _Adapted:
    """A LoRA layer's forward: x (W + sBA)^T + b."""

    def __init__(self, layer):
        self.layer, self.otherwise = layer, layer.forward

    def __call__(self, x, *rest, **more):
        import torch

        layer, names = self.layer, self.layer.active_adapters
        name = names[0] if len(names) == 1 and names[0] in layer.lora_A else None
        plain_lora = name and not (layer.merged or layer.disable_adapters or layer.use_dora.get(name)) and isinstance(layer.lora_dropout[name], torch.nn.Identity)
        weight = plain(layer.get_base_layer()) if plain_lora and x.dtype == torch.float32 else None
        if weight is None or weight.requires_grad or torch.is_autocast_enabled("cpu"):
            return self.otherwise(x, *rest, **more)
        y = _function().apply(x, weight, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
        return y if layer.bias is None else y + layer.bias


@functools.cache
def _function():
    """y = x (W + sBA)^T with gradients for x, A and B: torch's own would keep a gradient of the size of W."""
    import torch

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w, a, b, scale):
            whole = torch.addmm(w, b, a, alpha=scale)
            inner = x @ a.T
            ctx.save_for_backward(x, whole, a, b, inner)
            ctx.scale = scale
            return torch.nn.functional.linear(x, whole)

        @staticmethod
        def backward(ctx, slope):
            x, whole, a, b, inner = ctx.saved_tensors
            into = slope @ b * ctx.scale  # the gradient of x A^T
            to_x = slope @ whole if ctx.needs_input_grad[0] else None
            if not ctx.needs_input_grad[2]:
                return to_x, None, None, None, None
            flat = [t.flatten(0, -2) for t in (into, x, slope, inner)]
            return to_x, None, flat[0].T @ flat[1], flat[2].T @ flat[3] * ctx.scale, None

    return Linear
