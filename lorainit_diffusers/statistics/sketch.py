"""The mean and covariance of a layer's inputs in fewer numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lorainit_diffusers.eigenbasis import Eigenbasis
from lorainit_diffusers.linalg import Eigen, solve_dtype
from lorainit_diffusers.ridged import RidgedMoment, ThinRidged
from lorainit_diffusers.statistics.base import MeanAndCount, full_float32

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


class SketchedSecondMoment(MeanAndCount):
    """A Nyström sketch of the mean and scatter of rows, in (features x num_columns) numbers.

    Keeps Y = scatter @ Omega for a fixed random orthonormal Omega, and the trace. The eigenpairs are those of the
    Nyström approximation Y (Omega' Y)^-1 Y' with Tropp et al.'s stabilising shift; the leading ones are accurate when
    `num_columns` is a few times the rank and the spectrum decays.

    Args:
        features: Width of a row.
        num_columns: Columns of the sketch, at most `features`.
        seed: Of Omega; must be the same on every process.

    Raises:
        ValueError: `num_columns` is not in 1..features.
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
        """Add everything that `other` has seen; both must have been made with the same seed and size.

        Raises:
            ValueError: The two use different random projections.
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

    def sums(self) -> Iterator[list[Tensor]]:
        """Join with the other processes' sketches."""
        self._forget()
        sketch, trace = self._require_sketch()
        offset, num_rows = yield from self._mean_sums()
        sketch += torch.outer(offset * num_rows, offset @ self.projection_like(offset))
        self._trace = trace + num_rows * offset.square().sum()
        yield [sketch, self._trace]

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
        """The leading `count` eigenpairs, or all `num_columns` that the sketch resolves."""
        values, vectors = self.eigh(centered=centered)
        return Eigen(values[:count], vectors[:, :count])

    def times(self, block: Tensor) -> Tensor:
        """The completed second moment times (features, n) columns."""
        (values, vectors), rest = self._completed(centered=False)
        values, vectors = values.to(block), vectors.to(block)
        return rest * block + vectors @ ((values - rest)[:, None] * (vectors.mT @ block))

    def output_power(self, matrix: Tensor) -> float:
        """E||`matrix` x||^2 over the rows x, of the completed moment."""
        return float((matrix * self.times(matrix.mT).mT).double().sum())

    def _add_ridge(self, ridge: float) -> RidgedMoment:
        (values, vectors), rest = self._completed(centered=False)
        return ThinRidged(values, vectors, rest, ridge)

    def _decompose(self, centered: bool) -> Eigen:
        """The leading `num_columns` eigenpairs of the Nyström approximation."""
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
        """`num_rows`, `mean`, `sketch` (features, num_columns) and `trace`; empty before the first row."""
        if self._mean is None or self._sketch is None or self._trace is None:
            return {}
        return {
            "num_rows": torch.tensor(self._num_rows),
            "mean": self._mean.clone(),
            "sketch": self._sketch.clone(),
            "trace": self._trace.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`."""
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
