"""What must hold of every initialisation, whatever the weights and the data were.

Factors are finite, and every component of them can be trained: its row of A or its column of B is not zero. A component
whose both parts vanish has no gradient in either, and stays as it is for ever. That happens where a weight, the inputs
or a gradient is zero or of a rank below the adapter's.

* Weights that are not finite, and statistics whose numbers overflow, are an error that names the layer.
* A layer whose statistic says nothing (inputs or gradient zero, inputs that never vary), or whose components all
  vanish, gets Kaiming's factors, and the report says why.
* Single components that vanish get Kaiming's rows; their columns of B stay zero, so B A is what the method made it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorainit_diffusers.methods.base import Initializer, LoraFactors, Observed, Solution
from lorainit_diffusers.methods.declared import learns_from
from lorainit_diffusers.methods.kaiming import Kaiming
from lorainit_diffusers.statistics import GradientMean, InputsAndGradient, InputsAndReference

# Below this norm of both its parts a component of A and B is rounding, and Adam's epsilon is larger than its gradient.
VANISHING = 1e-6


def check_weights(layers: Mapping[str, nn.Linear], method: str) -> None:
    """See that the weights of the target layers are finite, before anything is computed from them.

    Packed weights are looked at when they are unpacked.

    Raises:
        ValueError: Naming the layer.
    """
    for name, layer in layers.items():
        if layer.weight.is_floating_point():
            check_weight(name, layer.weight, method)


def check_weight(layer: str, weight: Tensor, method: str) -> None:
    """See that one weight is finite.

    Raises:
        ValueError: Naming the layer.
    """
    if not _is_finite(weight):
        raise ValueError(
            f"layer {layer!r} cannot be decomposed or adapted by init {method!r}: its weight has NaN or infinity; load "
            "the base in float32 or bfloat16 if it overflows in float16, or give a checkpoint that was not damaged"
        )


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_meta or tensor.numel() == 0:
        return True
    with torch.no_grad():
        data = tensor.detach()
        return bool(torch.stack(torch.aminmax(data if data.dtype.itemsize > 1 else data.float())).isfinite().all())


def why_nothing_to_learn(method: Initializer, statistic: Observed | None) -> str | None:
    """Why what was observed of a layer says nothing that this method could use; `None` where it does."""
    inputs: Any = statistic
    gradient: GradientMean | None = None
    if isinstance(statistic, GradientMean):
        inputs, gradient = None, statistic
    elif isinstance(statistic, InputsAndGradient):
        inputs, gradient = statistic.inputs, statistic.gradient
    elif isinstance(statistic, InputsAndReference):
        inputs = statistic.inputs
    signals = learns_from(method)
    if inputs is not None:
        if inputs.trace(centered=False) == 0.0:
            return "all its inputs are zero"
        if "variation" in signals and inputs.trace(centered=True) <= 1e-12 * inputs.trace(centered=False):
            return "its inputs never vary"
    if gradient is not None and "gradient" in signals and not bool(gradient.mean().any()):
        return "its mean gradient is zero"
    return None


def guarded_factors(
    solution: Solution, rank: int, weight: Callable[[], Tensor], *, layer: str, method: str, scaling: float, seed: int
) -> tuple[LoraFactors, str | None]:
    """The factors of a solution, all of which can be trained.

    Args:
        solution: Of the method.
        rank: Of the layer.
        weight: Makes the (out_features, in_features) weight of the layer, where something has to be replaced.
        layer: Its name, for messages.
        method: Its name, for messages.
        scaling: Alpha / rank.
        seed: Of the rows in the place of vanishing ones.

    Returns:
        The factors, and what was put in the place of the method's, if anything was.

    Raises:
        ValueError: Factors that are not finite.
    """
    factors = solution.factors(rank)
    if not (_is_finite(factors.lora_A) and _is_finite(factors.lora_B)):
        raise ValueError(
            f"init {method!r} gives layer {layer!r} factors that are not finite: its weight, inputs or gradients are "
            "too large or too unequal to be decomposed; leave the layer out, or use another init such as orthonormal"
        )
    dead = (factors.lora_A.norm(dim=1) < VANISHING) & (factors.lora_B.norm(dim=0) < VANISHING)
    count = int(dead.sum())
    if count == 0:
        return factors, None
    generator = torch.Generator().manual_seed(seed)
    matrix = weight()
    kaiming = Kaiming().solve(matrix, None, rank, scaling=scaling, generator=generator).factors(rank)
    lora_A = torch.where(dead[:, None], kaiming.lora_A.to(factors.lora_A), factors.lora_A)
    lora_B = torch.where(dead[None, :], torch.zeros_like(factors.lora_B), factors.lora_B)
    because = "its weight is zero" if not bool(matrix.any()) else "the layer has no such directions"
    whole = "all" if count == rank else f"{count} of"
    reason = f"{whole} {rank} components of {method} vanish, since {because}: Kaiming A, zero B"
    return LoraFactors(lora_A, lora_B), reason
