"""Linear layers with packed weights, such as bitsandbytes' 4-bit ones; told without importing the package."""

from __future__ import annotations

from torch import Tensor, nn


def is_packed(layer: nn.Module) -> bool:
    """Whether the layer keeps its weight in another form than a floating-point (out_features, in_features) matrix."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    shape = (getattr(layer, "out_features", None), getattr(layer, "in_features", None))
    return not weight.is_floating_point() or tuple(weight.shape) != shape


def undo_cpu_packing(module: nn.Module) -> None:
    """Bring 4-bit weights back into the form in which they can be dequantised and differentiated through.

    On CPUs with AVX512-BF16, the first inference of bitsandbytes' 4-bit layers repacks the weights for a kernel without
    a backward pass, and `dequantize_4bit` then reads them in the wrong order (0.50). Saving undoes it in place, up to
    the rounding of the block scales to bfloat16 that came with the packing.
    """
    for layer in module.modules():
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            layer.state_dict()
