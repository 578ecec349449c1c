"""The mean gradient of a weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class GradientMean:
    """The weighted mean over batches of a weight's gradient, accumulated in float32 whatever the model's dtype.

    Args:
        shape: Of the weight, (out_features, in_features).
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self._shape = shape
        self._num_batches = 0
        self._total_weight = 0.0
        self._sum: Tensor | None = None
        self._device: torch.device | None = None  # of the accumulator; the gradients' when None

    @property
    def num_rows(self) -> int:
        """Gradients seen so far (one a batch, not one a token)."""
        return self._num_batches

    @property
    def is_finite(self) -> Tensor:
        """0-d boolean tensor: all gradients so far were finite."""
        return torch.tensor(True) if self._sum is None else torch.isfinite(self._sum.sum())

    def update(self, rows: Tensor, weight: float = 1.0) -> None:
        """Add one batch's gradient: (out_features, in_features), and how much it counts beside the others.

        Raises:
            ValueError: The shape is not the weight's.
        """
        if tuple(rows.shape) != self._shape:
            raise ValueError(f"the gradient has shape {tuple(rows.shape)}, expected {self._shape}")
        gradient = rows.detach().to(device=self._device or rows.device, dtype=torch.float32)
        self._sum = weight * gradient if self._sum is None else self._sum.add_(gradient, alpha=weight)
        self._num_batches += 1
        self._total_weight += weight

    def mean(self) -> Tensor:
        """(out_features, in_features) mean gradient, float32.

        Raises:
            ValueError: No gradient has been seen.
        """
        if self._sum is None:
            raise ValueError("the statistic is empty: no gradient reached this weight; does the loss depend on it?")
        return self._sum / self._total_weight

    def merge(self, other: GradientMean) -> None:
        """Add everything that `other` has seen."""
        if other._sum is None:
            return
        self._sum = other._sum.clone() if self._sum is None else self._sum + other._sum
        self._num_batches += other._num_batches
        self._total_weight += other._total_weight

    def num_bytes(self, device: torch.device) -> int:
        """Memory of the sum."""
        return 4 * self._shape[0] * self._shape[1]

    def move(self, device: torch.device) -> None:
        """Keep the sum on this device from now on."""
        self._device = device
        self._sum = None if self._sum is None else self._sum.to(device)

    def sums(self) -> Iterator[list[Tensor]]:
        """Join with the other processes' gradients."""
        self.mean()  # raises when empty
        assert self._sum is not None
        counts = torch.tensor([self._num_batches, self._total_weight], dtype=torch.float64, device=self._sum.device)
        yield [counts, self._sum]
        self._num_batches, self._total_weight = int(counts[0]), float(counts[1])

    def state_dict(self) -> dict[str, Tensor]:
        """`num_batches`, `total_weight`, `sum` (out_features, in_features); empty before the first gradient."""
        if self._sum is None:
            return {}
        total_weight = torch.tensor(self._total_weight, dtype=torch.float64)
        return {"num_batches": torch.tensor(self._num_batches), "total_weight": total_weight, "sum": self._sum.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`."""
        self._num_batches = int(state["num_batches"]) if state else 0
        self._total_weight = float(state["total_weight"]) if state else 0.0
        self._sum = state["sum"].clone() if state else None
