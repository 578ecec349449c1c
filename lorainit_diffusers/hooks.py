"""Observing a model without changing it: the only place that registers hooks.

Both observers are `with` blocks. Whatever happens inside, an exception included, the model leaves the block as it
entered it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorainit_diffusers.quantized import is_packed, undo_cpu_packing


@contextmanager
def observe_inputs(
    layers: Mapping[str, nn.Module], callback: Callable[[str, Tensor], None]
) -> Generator[None, None, None]:
    """Call `callback(name, input)` before each forward of each layer.

    The callback receives the very tensor object that the layer receives, so that two layers fed by one tensor can be
    told by identity. Inputs passed by keyword are seen too.

    Args:
        layers: Name -> layer; the layers' forward takes the observed tensor first, or as `input`/`hidden_states`.
        callback: Must not keep or change the tensor.

    Raises:
        ValueError: A layer is called with no tensor.
    """

    def make_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            callback(name, _input_of(name, args, kwargs))

        return hook

    with ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(make_hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _input_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    candidates = [*args, *(kwargs[key] for key in ("input", "hidden_states", "x") if key in kwargs)]
    for value in candidates:
        if isinstance(value, Tensor):
            return value
    raise ValueError(f"layer {name!r} was called without a tensor input; leave it out of target_modules")


@contextmanager
def observe_weight_gradients(
    layers: Mapping[str, nn.Module], callback: Callable[[str, Tensor], None]
) -> Generator[list[Tensor], None, None]:
    """Call `callback(name, gradient)` as the backward pass finishes each layer's weight gradient, then free it.

    Only one weight's gradient is alive at a time, instead of a full set of `.grad`. The weights require gradients
    inside the block; `requires_grad` and `.grad` are restored on exit. A packed weight (quantized.py) cannot have
    a gradient; what it stands for has, dY' X, from the layer's inputs X and the gradients dY of its outputs.

    Args:
        layers: Name -> layer with a `weight` parameter.
        callback: Gets the gradient, (out_features, in_features), in the weight's dtype or, where it is packed, float32;
            must not keep it.

    Yields:
        What the backward pass has to reach, for `loss.backward(inputs=...)`.
    """
    leaves: list[Tensor] = []
    watch = _GradientWatch(callback)
    with ExitStack() as stack:
        stack.callback(watch.packed_sums.clear)  # what a backward pass that raised has left
        for name, layer in layers.items():
            weight = layer.weight
            assert isinstance(weight, nn.Parameter)
            if is_packed(layer):
                # Autograd finishes this leaf when it has gone through every call of the layer, as it does a weight.
                leaf = torch.zeros((), device=weight.device, requires_grad=True)
                leaves.append(leaf)
                stack.callback(leaf.register_post_accumulate_grad_hook(partial(watch.packed_finished, name)).remove)
                handle = layer.register_forward_hook(partial(watch.packed_called, name, leaf), with_kwargs=True)
                stack.callback(handle.remove)
                continue
            leaves.append(weight)
            stack.callback(_restore, weight, weight.requires_grad, weight.grad)
            weight.grad = None
            weight.requires_grad_(True)
            handle = weight.register_post_accumulate_grad_hook(partial(watch.finished, name))
            stack.callback(handle.remove)
        yield leaves


def _restore(weight: nn.Parameter, requires_grad: bool, gradient: Tensor | None) -> None:
    weight.requires_grad_(requires_grad)
    weight.grad = gradient


class _GradientWatch:
    """Hands each weight's gradient to the callback as the backward pass finishes it, and frees it.

    Attributes:
        packed_sums: Gradients so far of the packed weights whose layers were called, by name.
    """

    def __init__(self, callback: Callable[[str, Tensor], None]) -> None:
        self._callback = callback
        self.packed_sums: dict[str, Tensor] = {}

    def finished(self, name: str, weight: Tensor) -> None:
        """The gradient of a plain weight is complete."""
        if weight.grad is not None:
            self._callback(name, weight.grad)
            weight.grad = None

    def packed_called(
        self, name: str, leaf: Tensor, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Any:
        """A layer with a packed weight was called: its output's backward pass adds to the weight's gradient."""
        rows = _input_of(name, args, kwargs).detach()
        return _WeightGradient.apply(output, leaf, rows, partial(self._add, name))

    def _add(self, name: str, gradient: Tensor) -> None:
        sums = self.packed_sums
        sums[name] = sums[name].add_(gradient) if name in sums else gradient

    def packed_finished(self, name: str, leaf: Tensor) -> None:
        """All calls of a layer with a packed weight are through the backward pass."""
        self._callback(name, self.packed_sums.pop(name))
        leaf.grad = None


class _WeightGradient(torch.autograd.Function):
    """The identity on a linear layer's output; its backward pass computes the gradient of the layer's weight."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, leaf: Tensor, rows: Tensor, callback: Callable[[Tensor], None]) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.callback = callback
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        (gradient,) = gradients
        (rows,) = ctx.saved_tensors
        outputs, inputs = gradient.flatten(0, -2).float(), rows.flatten(0, -2).float()
        ctx.callback(outputs.mT @ inputs)
        return gradient, gradient.new_zeros((), dtype=torch.float32), None, None


@contextmanager
def model_state_preserved(modules: Mapping[str, nn.Module]) -> Generator[None, None, None]:
    """Restore training mode, `requires_grad` and torch's global random state on exit, exceptions included."""
    training = [(module, module.training) for root in modules.values() for module in root.modules()]
    trainable = [(p, p.requires_grad) for root in modules.values() for p in root.parameters()]
    devices = sorted({p.device.index or 0 for p, _ in trainable if p.device.type == "cuda"})
    for root in modules.values():
        undo_cpu_packing(root)
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for root in modules.values():
                undo_cpu_packing(root)
            for module, mode in training:
                module.training = mode
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)


def watch_calls(modules: Iterable[nn.Module], callback: Callable[[], None]) -> ExitStack:
    """Call `callback()` before every forward of one of these that builds a graph; others are no training steps.

    Returns:
        What ends it, with its `close`.
    """

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():
            callback()

    stack = ExitStack()
    for module in modules:
        stack.callback(module.register_forward_pre_hook(before).remove)
    return stack
