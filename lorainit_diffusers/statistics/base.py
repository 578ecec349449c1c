"""What the collection and the methods need of a statistic, and what the statistics of layer inputs share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from lorainit_diffusers.eigenbasis import Eigenbasis
from lorainit_diffusers.linalg import Eigen, solve_dtype
from lorainit_diffusers.ridged import RidgedMoment

SumAcrossProcesses = Callable[[Tensor], None]


class Statistic(Protocol):
    """What the collection loop needs of a statistic."""

    @property
    def num_rows(self) -> int:
        """Rows seen so far, over all processes once reduced."""
        ...

    @property
    def is_finite(self) -> Tensor:
        """0-d boolean tensor (on the statistic's device, so that reading it can wait): all rows were finite."""
        ...

    def update(self, rows: Tensor) -> None:
        """Add rows: (n, features), any floating dtype."""
        ...

    def sums(self) -> Iterator[list[Tensor]]:
        """Join with the other processes' statistics: round by round, tensors that are then summed in place."""
        ...

    def num_bytes(self, device: torch.device) -> int:
        """Memory of the accumulators when rows come from this device; known before the first of them does."""
        ...

    def move(self, device: torch.device) -> None:
        """Keep the accumulators on this device from now on; rows may still come from another."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to continue or to reuse the statistic."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`."""
        ...


class InputStatistic(Statistic, Protocol):
    """A statistic of layer inputs, as the methods read it; exact and sketched moments both are one."""

    @property
    def features(self) -> int:
        """Width of a row."""
        ...

    def mean(self) -> Tensor:
        """(features,) mean row."""
        ...

    def trace(self, *, centered: bool) -> float:
        """Total variance (centred) or mean squared norm of a row (uncentred)."""
        ...

    def eigh(self, *, centered: bool) -> Eigen:
        """Eigenpairs of the covariance (centred) or of the second moment X'X/n (uncentred); a sketch's leading ones."""
        ...

    def eigenbasis(self, *, centered: bool) -> Eigenbasis:
        """The whole eigenbasis of the same; a sketch spreads what it does not resolve evenly over the complement."""
        ...

    def leading(self, count: int, *, centered: bool) -> Eigen:
        """The leading `count` eigenpairs of the same (or all that a sketch resolves), without the others."""
        ...

    def times(self, block: Tensor) -> Tensor:
        """The second moment X'X/n times (features, n) float32 or float64 columns, in their precision."""
        ...

    def output_power(self, matrix: Tensor) -> float:
        """E||`matrix` x||^2 over the rows x; the matrix is (n, features)."""
        ...

    def ridged(self, share: float) -> RidgedMoment:
        """The second moment plus `share` > 0 of its mean eigenvalue (of 1, where all rows were zero)."""
        ...


@contextmanager
def _full_float32(device: torch.device) -> Generator[None, None, None]:
    precision = torch.get_float32_matmul_precision()
    with torch.autocast(device.type, enabled=False):
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)


def full_float32(device: torch.device) -> AbstractContextManager[None]:
    """Matrix products in true float32: autocast off, TF32 and bf16 shortcuts off; restored on exit."""
    # Entering contexts costs as much as a small product: only where there is something to switch off.
    if not torch.is_autocast_enabled(device.type) and torch.get_float32_matmul_precision() == "highest":
        return nullcontext()
    return _full_float32(device)


class MeanAndCount(ABC):
    """The part that both moments share: the row count, an online mean and the check for non-finite rows."""

    def __init__(self, features: int) -> None:
        self._features = features
        self._num_rows = 0
        self._mean: Tensor | None = None
        self._device: torch.device | None = None  # of the accumulators; the rows' when None
        # What was computed from the rows so far; layers that share inputs share it.
        self._eigen: dict[bool, Eigen] = {}
        self._leading: dict[bool, Eigen] = {}
        self._ridged: dict[float, RidgedMoment] = {}

    def _forget(self) -> None:
        """Drop what was computed from fewer rows."""
        self._eigen.clear()
        self._leading.clear()
        self._ridged.clear()

    @property
    def features(self) -> int:
        """Width of a row."""
        return self._features

    @property
    def num_rows(self) -> int:
        """Rows seen so far."""
        return self._num_rows

    @property
    def is_finite(self) -> Tensor:
        """0-d boolean tensor: all rows so far were finite."""
        # One infinite or NaN entry stays in its column's mean for good: n times cheaper than checking every row. The
        # squares of finite ones may overflow; none of the other products is larger.
        if self._mean is None:
            return torch.tensor(True)
        return torch.isfinite(self._mean).all() & torch.isfinite(self._squares()).all()

    @property
    def overflowed(self) -> bool:
        """Whether the rows were finite and their squares were not."""
        return self._mean is not None and bool(torch.isfinite(self._mean).all()) and not bool(self.is_finite)

    @abstractmethod
    def _squares(self) -> Tensor:
        """The sums of the squares that the moment has at hand."""

    def mean(self) -> Tensor:
        """(features,) mean row.

        Raises:
            ValueError: No row has been seen.
        """
        if self._mean is None:
            raise ValueError("the statistic is empty: it has seen no rows; run the collection pass first")
        return self._mean

    def eigh(self, *, centered: bool) -> Eigen:
        """Eigenpairs; computed once and kept until the next update, since layers that share inputs share them."""
        if centered not in self._eigen:
            self._eigen[centered] = self._decompose(centered)
        return self._eigen[centered]

    def ridged(self, share: float) -> RidgedMoment:
        """The second moment plus `share` > 0 of its mean eigenvalue; kept like `eigh`."""
        if share not in self._ridged:
            mean_eigenvalue = self.trace(centered=False) / self._features
            self._ridged[share] = self._add_ridge(share * (mean_eigenvalue if mean_eigenvalue > 0 else 1.0))
        return self._ridged[share]

    @abstractmethod
    def trace(self, *, centered: bool) -> float:
        """Total variance (centred) or mean squared norm of a row (uncentred)."""

    @abstractmethod
    def _add_ridge(self, ridge: float) -> RidgedMoment:
        """The second moment plus this much."""

    @abstractmethod
    def _decompose(self, centered: bool) -> Eigen:
        """The eigenpairs that the moment gives, all of them or the leading ones."""

    def _dtype(self, device: torch.device) -> torch.dtype:
        """Of the accumulators, when rows come from this device."""
        return solve_dtype(self._features, self._device or device)

    def _check(self, rows: Tensor) -> None:
        if rows.ndim != 2 or rows.shape[1] != self._features:
            raise ValueError(f"rows have shape {tuple(rows.shape)}, expected (n, {self._features})")

    def _fold(self, rows: Tensor) -> tuple[Tensor, Tensor, float]:
        """Fold the mean of float32 `rows` into the running one; returns (batch mean, step, weight).

        `step` is the new batch's mean minus the old mean and `weight` = n m / (n + m), so that
        `weight * step step'` is what the scatter gains between the two groups.
        """
        batch_mean = rows.mean(0)
        accumulator = batch_mean.to(device=self._device or rows.device, dtype=self._dtype(rows.device))
        if self._mean is None:
            self._mean = torch.zeros_like(accumulator)
        step = accumulator - self._mean
        num_rows = rows.shape[0]
        total = self._num_rows + num_rows
        weight = self._num_rows * num_rows / total
        self._mean.add_(step, alpha=num_rows / total)
        self._num_rows = total
        return batch_mean, step, weight

    def _mean_sums(self) -> Generator[list[Tensor], None, tuple[Tensor, int]]:
        """The round that makes count and mean global; returns (own mean minus global mean, own count)."""
        mean, num_rows = self.mean(), self._num_rows
        total = torch.tensor(float(num_rows), dtype=torch.float64, device=mean.device)
        weighted = mean * num_rows
        yield [total, weighted]
        self._num_rows = int(total.item())
        self._mean = weighted / self._num_rows
        return mean - self._mean, num_rows
