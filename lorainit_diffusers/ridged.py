"""A second moment with a ridge, S_l = S + ridge: products with its inverse and with a factor F, F F' = S_l.

The methods need its inverse and a whitening of the inputs (any F^(-1), since what they read out does not depend on
which). An exact moment answers with one Cholesky factorisation for all layers that share it; a sketch, or the moment of
a few rows, with products of thin factors. Neither needs an eigendecomposition of the width.

Blocks of columns are multiplied in their own precision: float32 to search for directions, float64 to be sure of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from lorainit_diffusers.linalg import times, transposed_times


class RidgedMoment(Protocol):
    """S_l = S + ridge and F with F F' = S_l, as functions of (features, n) columns.

    Attributes:
        ridge: What was added to every eigenvalue.
    """

    ridge: float

    def shrink(self, block: Tensor) -> Tensor:
        """S S_l^(-1) `block`, every eigenvalue v of S as v / (v + ridge)."""
        ...

    def whiten(self, block: Tensor) -> Tensor:
        """F^(-1) `block`."""
        ...

    def whiten_transposed(self, block: Tensor) -> Tensor:
        """F'^(-1) `block`."""
        ...

    def colour_transposed(self, block: Tensor) -> Tensor:
        """F' `block`."""
        ...


class CholeskyRidged:
    """Of an exact moment: F is the Cholesky factor of S_l.

    Args:
        moment: (features, features) S; not used any more after the call.
        ridge: Positive.
        moment_times: (features, n) float64 columns -> S times them, in float64.

    Raises:
        torch.linalg.LinAlgError: S_l is not positive definite (the moment holds non-finite values, say).
    """

    def __init__(self, moment: Tensor, ridge: float, moment_times: Callable[[Tensor], Tensor]) -> None:
        self.ridge = ridge
        self._times = moment_times
        moment.diagonal().add_(ridge)
        factor = torch.linalg.cholesky(moment)
        self._factors = {factor.dtype: factor}

    def shrink(self, block: Tensor) -> Tensor:
        """S S_l^(-1) `block`."""
        return block - self.ridge * self.solve(block)

    def solve(self, block: Tensor) -> Tensor:
        """S_l^(-1) `block`; of float64 columns with more digits than a float32 factor has."""
        if block.dtype == torch.float32 or torch.float64 in self._factors:
            return torch.cholesky_solve(block, self._factor(block))
        # Refined with residuals in float64 (Wilkinson 1963).
        factor = self._factors[torch.float32]
        solved = torch.cholesky_solve(block.float(), factor).double()
        for _ in range(2):  # each gains as many digits as the factor has right
            residual = block - self._times(solved) - self.ridge * solved
            solved += torch.cholesky_solve(residual.float(), factor).double()
        return solved

    def whiten(self, block: Tensor) -> Tensor:
        """F^(-1) `block`."""
        return torch.linalg.solve_triangular(self._factor(block), block, upper=False)

    def whiten_transposed(self, block: Tensor) -> Tensor:
        """F'^(-1) `block`."""
        return torch.linalg.solve_triangular(self._factor(block).mT, block, upper=True)

    def colour_transposed(self, block: Tensor) -> Tensor:
        """F' `block`."""
        return self._factor(block).mT @ block

    def _factor(self, block: Tensor) -> Tensor:
        """F in the precision of these columns."""
        if block.dtype not in self._factors:
            self._factors[block.dtype] = next(iter(self._factors.values())).to(block.dtype)
        return self._factors[block.dtype]


class ThinRidged:
    """Of V diag(values) V' + rest (I - V V'), a sketch or the moment of a few rows: F is the symmetric root of S_l.

    Args:
        values: (k,) leading eigenvalues.
        vectors: (features, k) their eigenvectors.
        rest: The eigenvalue of all other directions.
        ridge: Positive.
    """

    def __init__(self, values: Tensor, vectors: Tensor, rest: float, ridge: float) -> None:
        self.ridge = ridge
        self._values = values + ridge
        self._rest = torch.as_tensor(rest + ridge, dtype=values.dtype, device=values.device)
        self._vectors = {vectors.dtype: vectors}

    def _apply(self, function: Callable[[Tensor], Tensor], block: Tensor) -> Tensor:
        if block.dtype not in self._vectors:
            self._vectors[block.dtype] = next(iter(self._vectors.values())).to(block.dtype)
        vectors = self._vectors[block.dtype]
        outside = function(self._rest)
        inside = (function(self._values) - outside).to(block)[:, None] * (vectors.mT @ block)
        return outside.to(block) * block + vectors @ inside

    def shrink(self, block: Tensor) -> Tensor:
        """S S_l^(-1) `block`."""
        return self._apply(lambda values: 1 - self.ridge / values, block)

    def whiten(self, block: Tensor) -> Tensor:
        """F^(-1) `block`."""
        return self._apply(torch.rsqrt, block)

    def whiten_transposed(self, block: Tensor) -> Tensor:
        """F'^(-1) `block`."""
        return self.whiten(block)

    def colour_transposed(self, block: Tensor) -> Tensor:
        """F' `block`."""
        return self._apply(torch.sqrt, block)


class FewRowsRidged:
    """Of the moment of fewer rows than features, S = Y' Y: S S_l^(-1) = Y' (Y Y' + ridge)^(-1) Y.

    That needs the Cholesky factor of a small matrix only. F, the symmetric root of S_l, needs the eigenpairs, and asks
    for them when it is used for the first time.

    Args:
        rows: (k, features) float32 Y.
        gram: (k, k) Y Y'; not used any more after the call.
        ridge: Positive.
        eigenpairs: Gives the non-zero eigenvalues of S, and their (features, n) eigenvectors.

    Attributes:
        ridge: What was added to every eigenvalue.
        rows: Y.
    """

    def __init__(
        self, rows: Tensor, gram: Tensor, ridge: float, eigenpairs: Callable[[], tuple[Tensor, Tensor]]
    ) -> None:
        self.ridge, self.rows, self._eigenpairs = ridge, rows, eigenpairs
        self._small = CholeskyRidged(gram, ridge, lambda block: block)
        self._root: ThinRidged | None = None

    def shrink(self, block: Tensor) -> Tensor:
        """S S_l^(-1) `block`."""
        return transposed_times(self.rows, self._small.solve(times(self.rows, block)))

    def shrink_rows(self, block: Tensor) -> Tensor:
        """Y S_l^(-1) Y' `block` for (k, n) columns."""
        return self._small.shrink(block)

    def solve_rows(self, block: Tensor) -> Tensor:
        """(Y Y' + ridge)^(-1) `block` for (k, n) columns."""
        return self._small.solve(block)

    def whiten(self, block: Tensor) -> Tensor:
        """F^(-1) `block`."""
        return self._thin().whiten(block)

    def whiten_transposed(self, block: Tensor) -> Tensor:
        """F'^(-1) `block`."""
        return self._thin().whiten(block)

    def colour_transposed(self, block: Tensor) -> Tensor:
        """F' `block`."""
        return self._thin().colour_transposed(block)

    def _thin(self) -> ThinRidged:
        if self._root is None:
            self._root = ThinRidged(*self._eigenpairs(), 0.0, self.ridge)
        return self._root
