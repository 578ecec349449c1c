"""What one training loss is, as the collection pass sees it: a family's own, or a function of the user's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorainit_diffusers.families.base import loss_weight

if TYPE_CHECKING:
    from lorainit_diffusers.families.base import ModelFamily


@dataclass(frozen=True)
class TrainingStep:
    """One training loss, and what is known about the step that it was.

    Attributes:
        loss_fn: Batch -> 0-d loss.
        token_mask: Layer -> (batch, tokens) boolean mask of the current batch, or `None`; rows outside are left out
            of the statistics. `None` where nothing is known of padding.
        batch_weight: How much the gradient of a batch counts in the mean, positive; `None` for all alike. Inputs need
            none: every row counts.
        describe_step: Says what the current step was (its timesteps), for error messages.
        stratified: Number of batches -> a block inside which timesteps cover their distribution evenly.
        generator: Of the noise and timesteps that `loss_fn` draws, where they are the family's.
    """

    loss_fn: Callable[[Any], Tensor]
    token_mask: Callable[[str], Tensor | None] | None = None
    batch_weight: Callable[[Any], float] | None = None
    describe_step: Callable[[], str] | None = None
    stratified: Callable[[int], AbstractContextManager[None]] = field(default=lambda _: nullcontext())
    generator: torch.Generator = field(default_factory=torch.Generator)


def training_step(
    family: ModelFamily | None,
    loss_fn: Callable[[Any], Tensor] | None,
    location: Mapping[str, tuple[str, str]],
    *,
    mask_padding: bool = True,
) -> TrainingStep:
    """The training step of a family, or of a loss function.

    Args:
        family: If any; its loss is used unless `loss_fn` is given, which then goes before it.
        loss_fn: Batch -> 0-d loss.
        location: Layer -> (component, name inside it), by which a family knows the layer's padding.
        mask_padding: Leave padded tokens out of the statistics, where the family knows them.

    Raises:
        ValueError: Neither a family nor a loss function.
    """
    if family is None:
        if loss_fn is None:
            raise ValueError("loss_fn is missing: pass the function that computes one training loss from a batch")
        return TrainingStep(loss_fn)
    generator = torch.Generator()

    def family_loss(batch: Any) -> Tensor:
        return family.loss(batch, generator)

    def token_mask(layer: str) -> Tensor | None:
        return family.step.token_mask(*location[layer])

    def describe_step() -> str:
        timesteps = family.step.timesteps
        return "" if timesteps is None else f"timesteps {timesteps.flatten().tolist()}"

    return TrainingStep(
        loss_fn or family_loss,
        token_mask=token_mask if mask_padding else None,
        # a loss of the user's own may be a mean over anything
        batch_weight=partial(loss_weight, family) if loss_fn is None else None,
        describe_step=describe_step,
        stratified=lambda num_batches: family.stratified_timesteps(num_batches, generator),
        generator=generator,
    )
