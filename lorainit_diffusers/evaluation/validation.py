"""A validation loss that compares: between the steps of a run, and between runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lorainit_diffusers.families.base import ModelFamily, evaluating, loss_weight

_SEED = 20250709


def fixed_noise_loss(family: ModelFamily, batches: Iterable[Mapping[str, Tensor]], num_samples: int) -> float:
    """Mean loss over held-out batches under noise and timesteps that are the same in every call.

    The timesteps are stratified over the samples, so that a small set covers the whole training distribution. The loss
    is the family's own, with its weighting, and without dropout of any kind: no caption is dropped, no image augmented,
    and the modules are in evaluation mode meanwhile. A batch counts as much as its loss is a mean over.

    Args:
        family: The model and its loss.
        batches: The same batches in every call.
        num_samples: How many samples they hold in total.

    Raises:
        ValueError: When there are no batches.
    """
    total, seen = 0.0, 0.0
    with evaluating(family), family.stratified_timesteps(num_samples, torch.Generator().manual_seed(_SEED)):
        for index, batch in enumerate(batches):
            size = loss_weight(family, batch)
            loss = family.loss(batch, torch.Generator().manual_seed(_SEED + 1 + index))
            total, seen = total + float(loss) * size, seen + size
    if seen == 0:
        raise ValueError("there are no validation batches to compute a loss on")
    return total / seen
