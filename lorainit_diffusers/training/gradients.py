"""Clipping of gradients, and what stops a run whose numbers are no longer finite before anything of it is used."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lorainit_diffusers.finite import first_not_finite

# A scaler that has halved its factor below this finds infinities at any: they are in the gradients, not in float16.
LEAST_SCALE = 2.0**-10


class DivergedError(ValueError):
    """A loss, a gradient or a weight is no longer finite."""


def clip_gradients(parameters: Sequence[nn.Parameter], max_grad_norm: float) -> float:
    """Scale the gradients down to this norm; the norm that they had, over all of them.

    Args:
        parameters: Those without a gradient are passed over.
        max_grad_norm: 0 clips nothing, as in transformers and sd-scripts.

    Returns:
        The norm. Where it is not finite, the gradients are left as they are: scaled, none would say where it came from.
    """
    limit = max_grad_norm or math.inf
    try:
        return float(torch.nn.utils.clip_grad_norm_(parameters, limit, error_if_nonfinite=True))
    except RuntimeError:
        norms = [p.grad.detach().float().norm() for p in parameters if p.grad is not None]
        norm = float(torch.stack([value.cpu() for value in norms]).norm()) if norms else 0.0
        if math.isfinite(norm):  # something else went wrong
            raise
        return norm


def names_of(modules: Mapping[str, nn.Module], parameters: Iterable[nn.Parameter]) -> list[str]:
    """What the parameters are called in these modules (`unet.down_blocks...`); by place where they are in none."""
    known = {id(p): f"{prefix}.{name}" for prefix, module in modules.items() for name, p in module.named_parameters()}
    return [known.get(id(parameter), f"parameter {index}") for index, parameter in enumerate(parameters)]


def gradient_at_fault(modules: Mapping[str, nn.Module], parameters: Sequence[nn.Parameter]) -> tuple[str, bool]:
    """The parameter whose gradient makes the norm infinite, and whether it is not finite itself; else the largest."""
    gradients = {
        name: parameter.grad
        for name, parameter in zip(names_of(modules, parameters), parameters, strict=True)
        if parameter.grad is not None
    }
    name = first_not_finite(gradients)
    if name is not None:
        return name, True
    largest: dict[str, Tensor] = {name: gradient.abs().amax() for name, gradient in gradients.items()}
    return max(largest, key=lambda name: float(largest[name])), False


def weight_at_fault(modules: Mapping[str, nn.Module], parameters: Sequence[nn.Parameter]) -> str | None:
    """The first trained weight that is not finite, or `None`."""
    index = first_not_finite({str(index): parameter for index, parameter in enumerate(parameters)})
    return None if index is None else names_of(modules, parameters)[int(index)]


def gradient_error(
    modules: Mapping[str, nn.Module],
    parameters: Sequence[nn.Parameter],
    norm: float,
    *,
    step: int,
    loss: float,
    remedy: str,
    scale: float | None = None,
) -> DivergedError | None:
    """The error of a step whose gradients have this norm; `None` where it may be used, or a scaler skips it.

    Args:
        modules: That hold the parameters, by the beginning of their names.
        parameters: The trained weights.
        norm: Of the gradients, over all of them.
        step: Number of the step, for the message.
        loss: Of the step, for the message.
        remedy: For the message.
        scale: The factor of the scaler of gradients (float16), which skips steps that it has scaled too far.
    """
    if math.isfinite(norm):
        return None
    name, infinite = gradient_at_fault(modules, parameters)
    if scale is not None and infinite and scale >= LEAST_SCALE:
        return None
    what = "is not finite" if infinite else "is the largest of those whose squares exceed float32"
    return DivergedError(f"the gradient of {name} {what} at step {step}, where the loss is {loss:g}; {remedy}")
