"""Observing a model without changing it: the only place that registers hooks.

Both observers are ``with`` blocks. Whatever happens inside, an exception included, the model leaves the block as it
entered it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def observe_inputs(
    layers: Mapping[str, nn.Module], callback: Callable[[str, Tensor], None]
) -> Generator[None, None, None]:
    """Call ``callback(name, input)`` before each forward of each layer.

    The callback receives the very tensor object that the layer receives, so that two layers fed by one tensor can be
    told by identity. Inputs passed by keyword are seen too.

    Args:
        layers: name -> layer; the layers' forward takes the observed tensor first, or as ``input``/``hidden_states``.
        callback: must not keep or change the tensor.

    Raises:
        ValueError: a layer is called with no tensor.
    """

    def make_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            candidates = [*args, *(kwargs[key] for key in ("input", "hidden_states", "x") if key in kwargs)]
            for value in candidates:
                if isinstance(value, Tensor):
                    callback(name, value)
                    return
            raise ValueError(f"layer {name!r} was called without a tensor input; leave it out of the target modules")

        return hook

    with ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(make_hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextmanager
def observe_weight_gradients(
    layers: Mapping[str, nn.Module], callback: Callable[[str, Tensor], None]
) -> Generator[None, None, None]:
    """Call ``callback(name, gradient)`` as the backward pass finishes each layer's weight gradient, then free it.

    Only one weight's gradient is alive at a time, instead of a full set of ``.grad``. The weights require gradients
    inside the block; ``requires_grad`` and ``.grad`` are restored on exit.

    Args:
        layers: name -> layer with a ``weight`` parameter.
        callback: gets the gradient, of the weight's shape and dtype; must not keep it.
    """

    def make_hook(name: str) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            if weight.grad is not None:
                callback(name, weight.grad)
                weight.grad = None

        return hook

    def restore(weight: nn.Parameter, requires_grad: bool, gradient: Tensor | None) -> None:
        weight.requires_grad_(requires_grad)
        weight.grad = gradient

    with ExitStack() as stack:
        for name, layer in layers.items():
            weight = layer.weight
            assert isinstance(weight, nn.Parameter)
            stack.callback(restore, weight, weight.requires_grad, weight.grad)
            weight.grad = None
            weight.requires_grad_(True)
            handle = weight.register_post_accumulate_grad_hook(make_hook(name))
            stack.callback(handle.remove)
        yield


@contextmanager
def model_state_preserved(modules: Mapping[str, nn.Module]) -> Generator[None, None, None]:
    """Restore training mode, ``requires_grad`` and torch's global random state on exit, exceptions included."""
    training = [(module, module.training) for root in modules.values() for module in root.modules()]
    trainable = [(p, p.requires_grad) for root in modules.values() for p in root.parameters()]
    devices = sorted({p.device.index or 0 for p, _ in trainable if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for module, mode in training:
                module.training = mode
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)
