"""The exact mean and covariance of a layer's inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

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
from lorainit_diffusers.ridged import CholeskyRidged, FewRowsRidged, RidgedMoment
from lorainit_diffusers.statistics.base import MeanAndCount, full_float32
from lorainit_diffusers.statistics.sketch import SketchedSecondMoment

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


class SecondMoment(MeanAndCount):
    """The exact mean and scatter of rows, in (features x features) numbers.

    The scatter is kept about the running mean, so the covariance never comes from subtracting two large numbers.

    Args:
        features: Width of a row.
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
            ValueError: The shape is not (n, features).
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
            if self._few is not None:
                kept = centred[1:].clone() if len(rows) == 1 else centred  # one row is its own mean
                if sum(map(len, self._few)) + len(kept) <= self.max_few:
                    self._few.append(kept.to(self._device or rows.device))
                    return
                few, self._few = self._few, None
                for earlier in few:
                    self._add(earlier.to(rows.device))
            self._add(centred)

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
        """Add everything that `other` has seen."""
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

    def sums(self) -> Iterator[list[Tensor]]:
        """Join with the other processes' statistics (exact: each scatter is moved to the global mean, then summed)."""
        self._forget()
        self.mean()  # raises when empty
        self._settle()
        scatter = self._require_scatter()
        offset, num_rows = yield from self._mean_sums()
        scatter.addr_(offset, offset * num_rows)
        yield [scatter]

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
        """(k, features) float32 Y with Y' Y the covariance or second moment; `None` where the rows became a scatter.

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
        """The leading `count` eigenpairs, as `leading_eigenpairs` finds them; kept like `eigh`."""
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
        """E||`matrix` x||^2 over the rows x."""
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
        """`num_rows`, `mean` (features,) and `scatter` (features, features); empty before the first row."""
        if self._mean is None:
            return {}
        return {
            "num_rows": torch.tensor(self._num_rows),
            "mean": self._mean.clone(),
            "scatter": self._require_scatter().clone(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`."""
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
    """Products with `rows' rows`."""
    return lambda block: transposed_times(rows, times(rows, block))


def _eigh_of_few(rows: Tensor) -> Eigen:
    """The eigenpairs of `rows' rows` whose values are not zero, from the small matrix `rows rows'`."""
    rows = rows.to(search_dtypes(rows.device)[1])
    values, left = torch.linalg.eigh(rows @ rows.mT)
    keep = values > max(SMALLEST_VALUE, 64 * torch.finfo(values.dtype).eps) * values[-1]
    values, left = values[keep].flip(0), left[:, keep].flip(1)
    return Eigen(values, rows.mT @ (left / values.sqrt()))


def _add_product(target: Tensor, rows: Tensor) -> bool:
    """Add `rows' rows` to a (features, features) matrix; of a wide one, only the blocks on and below the diagonal.

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
