"""How much each micro-batch of an optimiser step counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor


def micro_batch_shares(weights: Sequence[float], accelerator: Accelerator) -> list[float] | None:
    """What each micro-batch's loss is multiplied by, so that the gradient is that of all of them in one batch.

    A loss is a mean: over the answers' tokens of a batch, over its images. With the weights w (how much each loss is
    the mean over), their sum W over all micro-batches of all processes, and gradients that are summed over the
    micro-batches and averaged over the processes, the factor is w * processes / W.

    Args:
        weights: Of this process's micro-batches, positive.
        accelerator: Of the run; every process calls this once a step.

    Returns:
        One factor a micro-batch, or `None` where all weights of all processes are equal: then dividing by the number of
        micro-batches is the same, and rounds less.
    """
    total, least, largest = sum(weights), min(weights), max(weights)
    if accelerator.num_processes > 1:
        own = torch.tensor([[total, least, largest]], dtype=torch.float64, device=accelerator.device)
        every = cast(Tensor, accelerator.gather(own))
        total, least, largest = float(every[:, 0].sum()), float(every[:, 1].min()), float(every[:, 2].max())
    if least == largest:
        return None
    return [weight * accelerator.num_processes / total for weight in weights]
