"""Streaming statistics of what a linear layer sees: what the initialisations are computed from.

Each statistic is fed row batches with :meth:`update`, joined across processes with :meth:`all_reduce` (or
:meth:`merge`), and read when the pass is over. All are additive: any split of the rows into batches, any order and any
number of processes give the same result up to rounding in the accumulator.

* :class:`SecondMoment`: the exact mean and covariance (Chan, Golub and LeVeque 1979, the pairwise update).
* :class:`SketchedSecondMoment`: a Nyström sketch of the same in ``features x k`` numbers (Tropp et al. 2017,
  arXiv:1706.05736, algorithm 3), for layers whose exact moment would not fit.
* :class:`GradientMean`: the mean gradient of a weight.

Accumulators live where the rows are, or on the device given to :meth:`move`; products are taken where the rows are, in
true float32 (no TF32, no autocast): half-precision activations are converted before anything is squared, so a float16
activation of 1e4 does not overflow.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lorainit_diffusers.eigenbasis import Eigenbasis
from lorainit_diffusers.linalg import (
    Eigen,
    eigh_descending,
    exact_dtype,
    leading_eigenpairs,
    search_dtypes,
    solve_dtype,
    times,
    transposed_times,
)
from lorainit_diffusers.ridged import CholeskyRidged, FewRowsRidged, RidgedMoment, ThinRidged

# Updates that are summed in float32 before they are added to a float64 scatter.
UPDATES_PER_FLUSH = 8
# Below this width, one product is as fast as those of its lower triangle.
MIN_TRIANGLE_WIDTH = 256
# Rows are kept as they are up to this share of the width: they take less memory than a scatter, and say more.
MAX_FEW = 0.5
# Below this share of the largest, an eigenvalue of few rows is rounding.
SMALLEST_VALUE = 1e-11
# Up to this width a Cholesky factor in float64 costs less than refining what one in float32 gives.
MAX_FLOAT64_FACTOR = 768

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

    def all_reduce(self, sum_across_processes: SumAcrossProcesses) -> None:
        """Join with the other processes' statistics; the argument sums a tensor over processes in place."""
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
        """Inverse of :meth:`state_dict`."""
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
        """The leading ``count`` eigenpairs of the same (or all that a sketch resolves), without the others."""
        ...

    def times(self, block: Tensor) -> Tensor:
        """The second moment X'X/n times (features, n) float32 or float64 columns, in their precision."""
        ...

    def output_power(self, matrix: Tensor) -> float:
        """E||``matrix`` x||^2 over the rows x; the matrix is (n, features)."""
        ...

    def ridged(self, share: float) -> RidgedMoment:
        """The second moment plus ``share`` > 0 of its mean eigenvalue (of 1, where all rows were zero)."""
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


class _MeanAndCount(ABC):
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
            ValueError: no row has been seen.
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
        """The second moment plus ``share`` > 0 of its mean eigenvalue; kept like :meth:`eigh`."""
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
        """Fold the mean of float32 ``rows`` into the running one; returns (batch mean, step, weight).

        ``step`` is the new batch's mean minus the old mean and ``weight`` = n m / (n + m), so that
        ``weight * step step'`` is what the scatter gains between the two groups.
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

    def _reduce_mean(self, sum_across_processes: SumAcrossProcesses) -> tuple[Tensor, int]:
        """Make count and mean global; returns (own mean minus global mean, own count)."""
        mean, num_rows = self.mean(), self._num_rows
        total = torch.tensor(float(num_rows), dtype=torch.float64, device=mean.device)
        weighted = mean * num_rows
        sum_across_processes(total)
        sum_across_processes(weighted)
        self._num_rows = int(total.item())
        self._mean = weighted / self._num_rows
        return mean - self._mean, num_rows


class SecondMoment(_MeanAndCount):
    """The exact mean and scatter of rows, in (features x features) numbers.

    The scatter is kept about the running mean, so the covariance never comes from subtracting two large numbers.

    Args:
        features: width of a row.
    """

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self._scatter: Tensor | None = None
        # While they are few, the rows themselves say more in less: centred, as they enter the scatter.
        self._few: list[Tensor] | None = []
        # Products of the latest updates, float32: a pass over a float64 scatter costs as much as a small product.
        # Where the scatter itself is float32 (large layers), this is the same tensor; on a device of its own there is
        # none.
        self._recent: Tensor | None = None
        self._num_recent = 0
        self._lower_only = False  # what lies above the diagonal blocks is out of date
        # What float32 products are taken with: the rows while they are few, or a copy of a float64 scatter.
        self._narrow: Tensor | None = None

    def _forget(self) -> None:
        super()._forget()
        self._narrow = None

    @property
    def max_few(self) -> int:
        """How many rows are kept as they are before they become a scatter."""
        return int(MAX_FEW * self._features)

    def _flush(self) -> None:
        """Move what the latest updates added into the scatter."""
        if self._scatter is not None and self._recent is not None and self._recent is not self._scatter:
            self._scatter += self._recent
            self._recent.zero_()
        self._num_recent = 0

    def _settle(self) -> None:
        """Make the scatter whole: everything added, and both halves of it."""
        if self._few is not None:
            few, self._few = self._few, None
            for centred in few:
                self._add(centred)
        self._flush()
        if self._scatter is not None and self._lower_only:
            lower = self._scatter.tril(-1)
            self._scatter.tril_().add_(lower.mT)
            self._lower_only = False

    def _squares(self) -> Tensor:
        if self._few is not None:
            return torch.stack([centred.square().sum(0) for centred in self._few]).sum(0)
        scatter = self._scatter
        assert scatter is not None
        squares = scatter.diagonal()
        return squares if self._recent is None or self._recent is scatter else squares + self._recent.diagonal()

    def update(self, rows: Tensor) -> None:
        """Add rows: (n, features), any floating dtype; products in float32, sums in float64 where that is cheap.

        Raises:
            ValueError: the shape is not (n, features).
        """
        self._check(rows)
        if rows.shape[0] == 0:
            return
        self._forget()
        with full_float32(rows.device):
            rows = rows.detach().float()
            batch_mean, step, weight = self._fold(rows)
            # The rank-one term between the old rows and the new ones rides along in the product as one more row.
            centred = rows.new_empty(len(rows) + 1, self._features)
            torch.sub(rows, batch_mean, out=centred[:-1])
            torch.mul(step.to(rows.device), weight**0.5, out=centred[-1])
            if self._few is not None and sum(map(len, self._few)) + len(centred) > self.max_few:
                few, self._few = self._few, None
                for earlier in few:
                    self._add(earlier.to(rows.device))
            if self._few is None:
                self._add(centred)
            elif len(rows) > 1:
                self._few.append(centred.to(self._device or rows.device))
            else:  # one row is its own mean
                self._few.append(centred[1:].to(self._device or rows.device))

    def _add(self, centred: Tensor) -> None:
        """Add the product of float32 rows that are centred."""
        assert self._mean is not None
        if self._scatter is None:
            self._scatter = torch.zeros(
                self._features, self._features, dtype=self._mean.dtype, device=self._mean.device
            )
        if self._device is not None:
            self._settle()
            self._scatter += (centred.mT @ centred).to(self._device)
            return
        if self._recent is None:
            self._recent = (
                self._scatter
                if self._scatter.dtype == centred.dtype
                else torch.zeros_like(self._scatter, dtype=centred.dtype)
            )
        self._lower_only |= _add_product(self._recent, centred)
        self._num_recent += 1
        if self._num_recent == UPDATES_PER_FLUSH:
            self._flush()

    def merge(self, other: SecondMoment) -> None:
        """Add everything that ``other`` has seen."""
        if other._mean is None:
            return
        if self._mean is None:
            self.load_state_dict(other.state_dict())
            return
        scatter = other._require_scatter()
        self._settle()
        assert self._scatter is not None
        self._forget()
        total = self._num_rows + other._num_rows
        step = other._mean - self._mean
        self._scatter += scatter + torch.outer(step, step) * (self._num_rows * other._num_rows / total)
        self._mean = self._mean + step * (other._num_rows / total)
        self._num_rows = total

    def all_reduce(self, sum_across_processes: SumAcrossProcesses) -> None:
        """Join with the other processes' statistics (exact: each scatter is moved to the global mean, then summed)."""
        self._forget()
        self.mean()  # raises when empty
        self._settle()
        scatter = self._require_scatter()
        offset, num_rows = self._reduce_mean(sum_across_processes)
        scatter.addr_(offset, offset * num_rows)
        sum_across_processes(scatter)

    def second_moment(self) -> Tensor:
        """(features, features) uncentred second moment X'X/n."""
        return self.covariance() + torch.outer(self.mean(), self.mean())

    def covariance(self) -> Tensor:
        """(features, features) covariance, divided by n."""
        return self._require_scatter() / self._num_rows

    def trace(self, *, centered: bool) -> float:
        """Total variance (centred) or mean squared norm of a row (uncentred)."""
        mean = self.mean()  # raises when empty
        self._flush()
        variance = self._squares().to(mean).sum() / self._num_rows
        return float(variance if centered else variance + mean.square().sum())

    def few_rows(self, *, centered: bool) -> Tensor | None:
        """(k, features) float32 Y with Y' Y the covariance or second moment; ``None`` where the rows became a scatter.

        Up to signs and rotations, which Y' Y does not show, these are the rows seen, over the root of their number.
        """
        mean = self.mean()  # raises when empty
        if self._few is None:
            return None
        rows = torch.cat(self._few) / self._num_rows**0.5
        return rows if centered else torch.cat([mean.to(rows)[None], rows])

    def _decompose(self, centered: bool) -> Eigen:
        """All eigenpairs; of few rows, those of the eigenvalues that are not zero."""
        rows = self.few_rows(centered=centered)
        if rows is None:
            return eigh_descending(self.covariance() if centered else self.second_moment())
        return _eigh_of_few(rows)

    def eigenbasis(self, *, centered: bool) -> Eigenbasis:
        """All eigenpairs, in the precision in which products with the layer's weight are taken."""
        values, vectors = self.eigh(centered=centered)
        dtype = solve_dtype(self._features, vectors.device)
        return Eigenbasis(Eigen(values.to(dtype), vectors.to(dtype)))

    def leading(self, count: int, *, centered: bool) -> Eigen:
        """The leading ``count`` eigenpairs, as :func:`leading_eigenpairs` finds them; kept like :meth:`eigh`."""
        known = self._leading.get(centered)
        if known is None or len(known.values) < count:
            rows = self.few_rows(centered=centered)
            if rows is not None:
                operator = _gram_times(rows)
            else:
                operator = self._covariance_times if centered else self.times
            start = None if centered else self.mean()[:, None]  # far ahead of every direction of the variance
            found = leading_eigenpairs(operator, self._features, count, device=self.mean().device, start=start)
            known = self._leading[centered] = Eigen(found.values, found.vectors)
        return Eigen(known.values[:count], known.vectors[:, :count])

    @property
    def _uncentred(self) -> Tensor | None:
        """Few rows whose products are the second moment; made once."""
        if self._narrow is None and self._few is not None:
            self._narrow = self.few_rows(centered=False)
        return None if self._few is None else self._narrow

    def times(self, block: Tensor) -> Tensor:
        """The second moment X'X/n times (features, n) columns."""
        rows = self._uncentred
        if rows is not None:
            return _gram_times(rows)(block)
        return _moment_times(self._scatter_like(block), self.mean(), self._num_rows)(block)

    def _covariance_times(self, block: Tensor) -> Tensor:
        return transposed_times(self._scatter_like(block), block) / self._num_rows  # it is symmetric

    def _scatter_like(self, block: Tensor) -> Tensor:
        """The scatter for products with these columns: a float32 copy of a float64 one is made once."""
        scatter = self._require_scatter()
        if block.dtype == scatter.dtype or scatter.dtype == torch.float32:
            return scatter
        if self._narrow is None:
            self._narrow = scatter.to(block.dtype)
        return self._narrow

    def output_power(self, matrix: Tensor) -> float:
        """E||``matrix`` x||^2 over the rows x."""
        rows = self._uncentred
        if rows is not None:
            return float((rows.to(matrix) @ matrix.mT).double().square().sum())
        return float((matrix * self.times(matrix.mT).mT).double().sum())

    def _add_ridge(self, ridge: float) -> RidgedMoment:
        rows = self._uncentred
        if rows is None:
            moment = self.second_moment()
            if self._features <= MAX_FLOAT64_FACTOR:
                moment = moment.to(exact_dtype(moment.device))
            return CholeskyRidged(moment, ridge, _moment_times(self._require_scatter(), self.mean(), self._num_rows))
        wide = rows.to(search_dtypes(rows.device)[1])
        return FewRowsRidged(rows, wide @ wide.mT, ridge, lambda: _eigh_of_few(rows))

    def num_bytes(self, device: torch.device) -> int:
        """Memory of the accumulators: the scatter, its mean and, beside a float64 scatter, the float32 buffer."""
        dtype = self._dtype(device)
        buffered = self._device is None and dtype != torch.float32
        return self._features**2 * (dtype.itemsize + 4 * buffered) + self._features * dtype.itemsize

    def move(self, device: torch.device) -> None:
        """Keep the accumulators on this device from now on; products are still taken where the rows are."""
        if self._few is None:
            self._settle()
        self._device, self._recent = device, None
        if self._mean is None or self._mean.device == device:
            return
        self._forget()
        self._mean = self._mean.to(device)
        self._scatter = None if self._scatter is None else self._scatter.to(device)
        self._few = None if self._few is None else [centred.to(device) for centred in self._few]

    def sketched(self, num_columns: int) -> SketchedSecondMoment:
        """The sketch of the rows seen so far: what it would be had they been sketched from the start.

        Y = scatter @ Omega sums over batches as the scatter does, and so does the trace: only rounding differs.
        """
        sketch = SketchedSecondMoment(self._features, num_columns)
        if self._device is not None:
            sketch.move(self._device)
        if self._num_rows:
            scatter = self._require_scatter()  # not by way of state_dict(), which would copy it
            with full_float32(scatter.device):
                product = scatter @ sketch.projection_like(scatter)
            trace, num_rows = scatter.diagonal().sum(), torch.tensor(self._num_rows)
            sketch.load_state_dict({"num_rows": num_rows, "mean": self.mean(), "sketch": product, "trace": trace})
        return sketch

    def state_dict(self) -> dict[str, Tensor]:
        """``num_rows``, ``mean`` (features,) and ``scatter`` (features, features); empty before the first row."""
        if self._mean is None:
            return {}
        return {
            "num_rows": torch.tensor(self._num_rows),
            "mean": self._mean.clone(),
            "scatter": self._require_scatter().clone(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of :meth:`state_dict`."""
        self._forget()
        self._num_rows = int(state["num_rows"]) if state else 0
        self._mean = state["mean"].clone() if state else None
        self._scatter = state["scatter"].clone() if state else None
        self._recent, self._num_recent, self._lower_only = None, 0, False
        self._few = None if state else []

    def _require_scatter(self) -> Tensor:
        """The scatter, both halves; of few rows a new one, since reading it must not change what comes after."""
        mean = self.mean()  # raises when empty
        if self._few is not None:
            whole = SecondMoment(self._features)
            whole._mean, whole._few = mean, self._few
            whole._settle()
            assert whole._scatter is not None
            return whole._scatter
        self._settle()
        assert self._scatter is not None
        return self._scatter


def _moment_times(scatter: Tensor, mean: Tensor, num_rows: int) -> Callable[[Tensor], Tensor]:
    """Products with the second moment. Holds the tensors and not the statistic, which may hold it."""

    def apply(block: Tensor) -> Tensor:
        # The mean apart: beside it in one matrix, its size would cost the other directions their last digits.
        return transposed_times(scatter, block) / num_rows + torch.outer(mean.to(block), mean.to(block) @ block)

    return apply


def _gram_times(rows: Tensor) -> Callable[[Tensor], Tensor]:
    """Products with ``rows' rows``."""
    return lambda block: transposed_times(rows, times(rows, block))


def _eigh_of_few(rows: Tensor) -> Eigen:
    """The eigenpairs of ``rows' rows`` whose values are not zero, from the small matrix ``rows rows'``."""
    rows = rows.to(search_dtypes(rows.device)[1])
    values, left = torch.linalg.eigh(rows @ rows.mT)
    keep = values > max(SMALLEST_VALUE, 64 * torch.finfo(values.dtype).eps) * values[-1]
    values, left = values[keep].flip(0), left[:, keep].flip(1)
    return Eigen(values, rows.mT @ (left / values.sqrt()))


def _add_product(target: Tensor, rows: Tensor) -> bool:
    """Add ``rows' rows`` to a (features, features) matrix; of a wide one, only the blocks on and below the diagonal.

    The product is symmetric, so a library that does not know it computes half of it for nothing: four block columns
    save three eighths. Adding inside the products makes no temporary.

    Returns:
        Whether the blocks above the diagonal were left out.
    """
    features = len(target)
    if features < MIN_TRIANGLE_WIDTH:
        target.addmm_(rows.mT, rows)
        return False
    step = -(-features // (4 * 16)) * 16  # multiples of 16 columns, a whole number of vector registers
    for start in range(0, features, step):
        end = min(start + step, features)
        target[start:end, :end].addmm_(rows[:, start:end].mT, rows[:, :end])
    return True


# Sketches of one size share their projection, which is as large as a sketch itself; it is freed with the last of them.
_PROJECTIONS: WeakValueDictionary[tuple[int, int, int, torch.device, torch.dtype], Tensor] = WeakValueDictionary()


def _projection(features: int, num_columns: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(features, num_columns) random orthonormal columns, the same on every device."""
    key = (features, num_columns, seed, device, dtype)
    omega = _PROJECTIONS.get(key)
    if omega is None:
        if (device, dtype) == (torch.device("cpu"), torch.float64):
            generator = torch.Generator().manual_seed(seed)
            gaussian = torch.randn(features, num_columns, generator=generator, dtype=torch.float64)
            omega = torch.linalg.qr(gaussian).Q
        else:
            omega = _projection(features, num_columns, seed, torch.device("cpu"), torch.float64).to(device, dtype)
        _PROJECTIONS[key] = omega
    return omega


class SketchedSecondMoment(_MeanAndCount):
    """A Nyström sketch of the mean and scatter of rows, in (features x num_columns) numbers.

    Keeps Y = scatter @ Omega for a fixed random orthonormal Omega, and the trace. The eigenpairs are those of the
    Nyström approximation Y (Omega' Y)^-1 Y' with Tropp et al.'s stabilising shift; the leading ones are accurate when
    ``num_columns`` is a few times the rank and the spectrum decays.

    Args:
        features: width of a row.
        num_columns: columns of the sketch, at most ``features``.
        seed: of Omega; must be the same on every process.

    Raises:
        ValueError: ``num_columns`` is not in 1..features.
    """

    def __init__(self, features: int, num_columns: int, seed: int = 0) -> None:
        super().__init__(features)
        if not 1 <= num_columns <= features:
            raise ValueError(f"num_columns is {num_columns}; use 1 to {features} (the width of the layer's input)")
        self._size = (features, num_columns, seed)
        self._omegas: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self.projection_like(torch.empty(0, dtype=torch.float64))
        self._sketch: Tensor | None = None
        self._trace: Tensor | None = None
        self._complete: dict[bool, tuple[Eigen, float]] = {}

    def _forget(self) -> None:
        super()._forget()
        self._complete.clear()

    @property
    def num_columns(self) -> int:
        """Columns of the sketch: how many eigenpairs it resolves."""
        return self._size[1]

    @property
    def projection_bytes(self) -> int:
        """Memory of Omega in both precisions, which all sketches of this size share."""
        return self._features * self.num_columns * (8 + 4)

    def projection_like(self, like: Tensor) -> Tensor:
        """(features, num_columns) Omega on the device and in the precision of another tensor."""
        key = (like.device, like.dtype)
        if key not in self._omegas:  # kept here: the shared table holds it only as long as somebody does
            self._omegas[key] = _projection(*self._size, like.device, like.dtype)
        return self._omegas[key]

    def _squares(self) -> Tensor:
        assert self._trace is not None
        return self._trace

    def update(self, rows: Tensor) -> None:
        """Add rows: (n, features), any floating dtype."""
        self._check(rows)
        if rows.shape[0] == 0:
            return
        self._forget()
        with full_float32(rows.device):
            rows = rows.detach().float()
            batch_mean, step, weight = self._fold(rows)
            centred = rows - batch_mean
            omega = self.projection_like(step)
            sketch = (centred.mT @ (centred @ self.projection_like(centred))).to(step)
            sketch += torch.outer(step * weight, step @ omega)
            trace = centred.square().sum().to(step) + weight * step.square().sum()
            self._sketch = sketch if self._sketch is None else self._sketch.add_(sketch)
            self._trace = trace if self._trace is None else self._trace + trace

    def merge(self, other: SketchedSecondMoment) -> None:
        """Add everything that ``other`` has seen; both must have been made with the same seed and size.

        Raises:
            ValueError: the two use different random projections.
        """
        if self._size != other._size:
            raise ValueError("the sketches use different random projections; make both with the same size and seed")
        if other._mean is None or other._sketch is None or other._trace is None:
            return
        if self._mean is None or self._sketch is None or self._trace is None:
            self.load_state_dict(other.state_dict())
            return
        self._forget()
        total = self._num_rows + other._num_rows
        step = other._mean - self._mean
        weight = self._num_rows * other._num_rows / total
        self._sketch += other._sketch + torch.outer(step * weight, step @ self.projection_like(step))
        self._trace = self._trace + other._trace + weight * step.square().sum()
        self._mean = self._mean + step * (other._num_rows / total)
        self._num_rows = total

    def all_reduce(self, sum_across_processes: SumAcrossProcesses) -> None:
        """Join with the other processes' sketches."""
        self._forget()
        sketch, trace = self._require_sketch()
        offset, num_rows = self._reduce_mean(sum_across_processes)
        sketch += torch.outer(offset * num_rows, offset @ self.projection_like(offset))
        self._trace = trace + num_rows * offset.square().sum()
        sum_across_processes(sketch)
        sum_across_processes(self._trace)

    def trace(self, *, centered: bool) -> float:
        """Total variance (centred) or mean squared norm of a row (uncentred); exact, not sketched."""
        _, trace = self._require_sketch()
        variance = trace / self._num_rows
        return float(variance if centered else variance + self.mean().square().sum())

    def num_bytes(self, device: torch.device) -> int:
        """Memory of the accumulators: the sketch, the mean and the trace; without the shared projection."""
        return (self._features * (self.num_columns + 1) + 1) * self._dtype(device).itemsize

    def move(self, device: torch.device) -> None:
        """Keep the accumulators on this device from now on; products are still taken where the rows are."""
        self._device = device
        if self._mean is None or self._sketch is None or self._trace is None or self._sketch.device == device:
            return
        self._forget()
        self._mean, self._sketch, self._trace = (t.to(device) for t in (self._mean, self._sketch, self._trace))

    def eigenbasis(self, *, centered: bool) -> Eigenbasis:
        """The leading eigenpairs, and the rest of the (exact) trace spread evenly over the complement."""
        return Eigenbasis(*self._completed(centered))

    def _completed(self, centered: bool) -> tuple[Eigen, float]:
        """The leading eigenpairs and the eigenvalue of all other directions."""
        if centered not in self._complete:
            values, vectors = self.eigh(centered=centered)
            rest = (self.trace(centered=centered) - float(values.sum())) / max(self._features - self.num_columns, 1)
            dtype = solve_dtype(self._features, values.device)
            self._complete[centered] = Eigen(values.to(dtype), vectors.to(dtype)), max(rest, 0.0)
        return self._complete[centered]

    def leading(self, count: int, *, centered: bool) -> Eigen:
        """The leading ``count`` eigenpairs, or all ``num_columns`` that the sketch resolves."""
        values, vectors = self.eigh(centered=centered)
        return Eigen(values[:count], vectors[:, :count])

    def times(self, block: Tensor) -> Tensor:
        """The completed second moment times (features, n) columns."""
        (values, vectors), rest = self._completed(centered=False)
        values, vectors = values.to(block), vectors.to(block)
        return rest * block + vectors @ ((values - rest)[:, None] * (vectors.mT @ block))

    def output_power(self, matrix: Tensor) -> float:
        """E||``matrix`` x||^2 over the rows x, of the completed moment."""
        return float((matrix * self.times(matrix.mT).mT).double().sum())

    def _add_ridge(self, ridge: float) -> RidgedMoment:
        (values, vectors), rest = self._completed(centered=False)
        return ThinRidged(values, vectors, rest, ridge)

    def _decompose(self, centered: bool) -> Eigen:
        """The leading ``num_columns`` eigenpairs of the Nyström approximation."""
        sketch, _ = self._require_sketch()
        sketch = sketch.double() / self._num_rows
        omega = self.projection_like(sketch)
        if not centered:
            mean = self.mean().double()
            sketch = sketch + torch.outer(mean, mean @ omega)
        # Tropp et al. 2017, algorithm 3: the shift keeps the core positive definite in floating point.
        shift = torch.finfo(torch.float32).eps * torch.linalg.matrix_norm(sketch)
        if float(shift) == 0.0:
            return Eigen(sketch.new_zeros(omega.shape[1]), omega)
        sketch = sketch + shift * omega
        core = omega.mT @ sketch
        factor = torch.linalg.cholesky((core + core.mT) / 2)
        left, values, _ = torch.linalg.svd(
            torch.linalg.solve_triangular(factor, sketch.mT, upper=False).mT, full_matrices=False
        )
        return Eigen((values.square() - shift).clamp_min(0), left)

    def state_dict(self) -> dict[str, Tensor]:
        """``num_rows``, ``mean``, ``sketch`` (features, num_columns) and ``trace``; empty before the first row."""
        if self._mean is None or self._sketch is None or self._trace is None:
            return {}
        return {
            "num_rows": torch.tensor(self._num_rows),
            "mean": self._mean.clone(),
            "sketch": self._sketch.clone(),
            "trace": self._trace.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of :meth:`state_dict`."""
        self._forget()
        self._num_rows = int(state["num_rows"]) if state else 0
        self._mean = state["mean"].clone() if state else None
        self._sketch = state["sketch"].clone() if state else None
        self._trace = state["trace"].clone() if state else None

    def _require_sketch(self) -> tuple[Tensor, Tensor]:
        self.mean()  # raises when empty
        assert self._sketch is not None
        assert self._trace is not None
        return self._sketch, self._trace


class GradientMean:
    """The weighted mean over batches of a weight's gradient, accumulated in float32 whatever the model's dtype.

    Args:
        shape: of the weight, (out_features, in_features).
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
            ValueError: the shape is not the weight's.
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
            ValueError: no gradient has been seen.
        """
        if self._sum is None:
            raise ValueError("the statistic is empty: no gradient reached this weight; does the loss depend on it?")
        return self._sum / self._total_weight

    def merge(self, other: GradientMean) -> None:
        """Add everything that ``other`` has seen."""
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

    def all_reduce(self, sum_across_processes: SumAcrossProcesses) -> None:
        """Join with the other processes' gradients."""
        self.mean()  # raises when empty
        assert self._sum is not None
        counts = torch.tensor([self._num_batches, self._total_weight], dtype=torch.float64, device=self._sum.device)
        sum_across_processes(counts)
        sum_across_processes(self._sum)
        self._num_batches, self._total_weight = int(counts[0]), float(counts[1])

    def state_dict(self) -> dict[str, Tensor]:
        """``num_batches``, ``total_weight``, ``sum`` (out_features, in_features); empty before the first gradient."""
        if self._sum is None:
            return {}
        total_weight = torch.tensor(self._total_weight, dtype=torch.float64)
        return {"num_batches": torch.tensor(self._num_batches), "total_weight": total_weight, "sum": self._sum.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of :meth:`state_dict`."""
        self._num_batches = int(state["num_batches"]) if state else 0
        self._total_weight = float(state["total_weight"]) if state else 0.0
        self._sum = state["sum"].clone() if state else None


@dataclass(frozen=True)
class InputsAndGradient:
    """Two statistics of one layer, for methods that need both.

    Attributes:
        inputs: filled by the forward passes; layers fed by one tensor hold the same object.
        gradient: filled by the backward passes.
    """

    inputs: SecondMoment | SketchedSecondMoment
    gradient: GradientMean

    @property
    def num_rows(self) -> int:
        """Rows of inputs seen so far."""
        return self.inputs.num_rows


@dataclass(frozen=True)
class InputsAndReference:
    """The inputs of one layer under two distributions, for methods that compare them.

    Attributes:
        inputs: filled by the fine-tuning batches; layers fed by one tensor hold the same object.
        reference: filled by batches of the pre-training distribution; shared alike.
    """

    inputs: SecondMoment | SketchedSecondMoment
    reference: SecondMoment | SketchedSecondMoment

    @property
    def num_rows(self) -> int:
        """Rows seen so far of the distribution that has fewer."""
        return min(self.inputs.num_rows, self.reference.num_rows)
