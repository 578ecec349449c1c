"""Nothing that is not finite is ever written: one NaN in a file is a checkpoint that can never be used again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that holds NaN or an infinity, or `None`; one transfer a device where all are finite."""
    flags = {name: tensor.detach().isfinite().all() for name, tensor in tensors.items() if tensor.is_floating_point()}
    if _all_true(flags.values()):
        return None
    return next(name for name, flag in flags.items() if not bool(flag))


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Refuse to write NaN and infinities.

    Args:
        tensors: What is about to be written, by name.
        what: Names it in the message, such as `the checkpoint of step 500`.

    Raises:
        ValueError: Naming the first tensor that is not finite, and the remedy.
    """
    name = first_not_finite(tensors)
    if name is not None:
        raise ValueError(
            f"{what} is not written: {name!r} holds values that are not finite, so the training has diverged; go on "
            "from the last checkpoint with a lower learning rate"
        )


def _all_true(flags: Iterable[Tensor]) -> bool:
    by_device: dict[torch.device, list[Tensor]] = {}
    for flag in flags:
        by_device.setdefault(flag.device, []).append(flag)
    return all(bool(torch.stack(some).all()) for some in by_device.values())
