"""Hold everything that a training step moves in place while the loop's losses are collected.

The loop goes on calling its optimiser, its scheduler and its clipping; nothing of it has an effect, and
`accelerator.sync_gradients` is false, as it is between the steps of gradient accumulation: a loop that counts its
steps by it, as diffusers' scripts do, counts none.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import LRScheduler


@contextmanager
def standing_still(
    accelerator: Accelerator, models: Sequence[nn.Module], parameters: Iterable[nn.Parameter]
) -> Generator[None, None, None]:
    """Inside the block no step of the loop has an effect, or is counted by `accelerator.sync_gradients`.

    Args:
        accelerator: Of the loop, which is inside its step.
        models: As `prepare` returned them; data parallelism waits for no gradients of theirs.
        parameters: That the loop trains; schedulers of their optimisers stand still, prepared or not.

    Raises:
        ValueError: A compiled model, and a torch that cannot run it uncompiled.
    """
    gradient_state: Any = accelerator.gradient_state
    position, synced = accelerator.step, gradient_state.sync_gradients
    with ExitStack() as stack:
        for model in models:
            if hasattr(model, "require_backward_grad_sync"):
                stack.callback(setattr, model, "require_backward_grad_sync", model.require_backward_grad_sync)
                model.require_backward_grad_sync = False  # type: ignore[assignment]
        for scheduler in _schedulers(parameters):
            stack.enter_context(replaced(scheduler, "step", _nothing))
            stack.callback(setattr, scheduler, "_step_count", vars(scheduler)["_step_count"])
        for name in ("clip_grad_norm_", "clip_grad_value_", "unscale_gradients"):
            stack.enter_context(replaced(accelerator, name, _no_norm))
        if any(_compiled(model) for model in models):
            stack.enter_context(_uncompiled())
        gradient_state._set_sync_gradients(False)
        try:
            yield
        finally:
            accelerator.step = position
            gradient_state._set_sync_gradients(synced)


@contextmanager
def replaced(owner: Any, name: str, value: Callable[..., Any]) -> Generator[None, None, None]:
    """An attribute of one object, for the block; the class's own is seen again after it."""
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What a step does meanwhile."""


def _no_norm(*args: Any, **kwargs: Any) -> torch.Tensor:
    """What clipping returns meanwhile: there are no gradients."""
    return torch.zeros(())


def _schedulers(parameters: Iterable[nn.Parameter]) -> list[LRScheduler]:
    """Every scheduler of an optimiser that holds one of these: the loop need not have prepared it."""
    held = {id(parameter) for parameter in parameters}
    return [
        item
        for item in gc.get_objects()
        # by type: asking a lazy proxy for its class may import or raise
        if issubclass(type(item), LRScheduler)
        and any(id(parameter) in held for group in item.optimizer.param_groups for parameter in group["params"])
    ]


def _compiled(model: nn.Module) -> bool:
    return any(
        type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


@contextmanager
def _uncompiled() -> Generator[None, None, None]:
    """Compiled models run as they were written: a graph would skip the hooks of the pass, or keep them."""
    set_stance: Any = getattr(torch.compiler, "set_stance", None)
    if set_stance is None:
        raise ValueError(
            f"the model is compiled, and torch {torch.__version__} cannot run it uncompiled for the collection pass: "
            "compile it after the first steps, or use torch 2.6 or newer"
        )
    set_stance("force_eager")
    try:
        yield
    finally:
        set_stance("default")
