"""A second moment with a ridge, S_l = S + ridge: products with it, its inverse and a factor F with F F' = S_l.

The methods need its inverse and a whitening of the inputs (any F^(-1), since what they read out does not depend on
which). An exact moment answers with one Cholesky factorisation for all layers that share it; a sketch with products of
its thin factors. Neither needs an eigendecomposition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class RidgedMoment(Protocol):
    """S_l = S + ridge and F with F F' = S_l, as functions of (features, n) columns.

    Attributes:
        ridge: what was added to every eigenvalue.
    """

    ridge: float

    def solve(self, block: Tensor) -> Tensor:
        """S_l^(-1) ``block``."""
        ...

    def solve_accurately(self, block: Tensor) -> Tensor:
        """S_l^(-1) ``block`` to the last digit of ``block``'s dtype, for results that nothing corrects any more."""
        ...

    def whiten(self, block: Tensor) -> Tensor:
        """F^(-1) ``block``."""
        ...

    def whiten_transposed(self, block: Tensor) -> Tensor:
        """F'^(-1) ``block``."""
        ...

    def colour_transposed(self, block: Tensor) -> Tensor:
        """F' ``block``."""
        ...


class CholeskyRidged:
    """Of an exact moment: F is the Cholesky factor of S_l.

    Args:
        moment: (features, features) S; not used any more after the call.
        ridge: positive.
        times: (features, n) float64 columns -> S times them, in float64.

    Raises:
        torch.linalg.LinAlgError: S_l is not positive definite (the moment holds non-finite values, say).
    """

    def __init__(self, moment: Tensor, ridge: float, times: Callable[[Tensor], Tensor]) -> None:
        self.ridge = ridge
        self._times = times
        moment.diagonal().add_(ridge)
        self._factor = torch.linalg.cholesky(moment)

    def solve(self, block: Tensor) -> Tensor:
        """S_l^(-1) ``block``."""
        return torch.cholesky_solve(block, self._factor)

    def solve_accurately(self, block: Tensor) -> Tensor:
        """S_l^(-1) ``block``, refined with residuals in float64 (Wilkinson 1963) where the factor is float32."""
        solved = self.solve(block)
        if self._factor.dtype == torch.float64 or self._factor.device.type == "mps":
            return solved
        wanted, refined = block.double(), solved.double()
        for _ in range(2):  # each gains as many digits as the factor has right
            residual = wanted - self._times(refined) - self.ridge * refined
            refined += self.solve(residual.to(block)).double()
        return refined.to(block)

    def whiten(self, block: Tensor) -> Tensor:
        """F^(-1) ``block``."""
        return torch.linalg.solve_triangular(self._factor, block, upper=False)

    def whiten_transposed(self, block: Tensor) -> Tensor:
        """F'^(-1) ``block``."""
        return torch.linalg.solve_triangular(self._factor.mT, block, upper=True)

    def colour_transposed(self, block: Tensor) -> Tensor:
        """F' ``block``."""
        return self._factor.mT @ block


class ThinRidged:
    """Of a sketched moment, V diag(values) V' + rest (I - V V'): F is the symmetric root of S_l.

    Args:
        values: (k,) leading eigenvalues.
        vectors: (features, k) their eigenvectors.
        rest: the eigenvalue of all other directions.
        ridge: positive.
    """

    def __init__(self, values: Tensor, vectors: Tensor, rest: float, ridge: float) -> None:
        self.ridge = ridge
        self._vectors = vectors
        self._values = values + ridge
        self._rest = torch.as_tensor(rest + ridge, dtype=values.dtype, device=values.device)

    def _apply(self, function: Callable[[Tensor], Tensor], block: Tensor) -> Tensor:
        outside = function(self._rest)
        inside = (function(self._values) - outside)[:, None] * (self._vectors.mT @ block)
        return outside * block + self._vectors @ inside

    def solve(self, block: Tensor) -> Tensor:
        """S_l^(-1) ``block``."""
        return self._apply(torch.reciprocal, block)

    def solve_accurately(self, block: Tensor) -> Tensor:
        """S_l^(-1) ``block``: nothing is lost in products of thin factors."""
        return self.solve(block)

    def whiten(self, block: Tensor) -> Tensor:
        """F^(-1) ``block``."""
        return self._apply(torch.rsqrt, block)

    def whiten_transposed(self, block: Tensor) -> Tensor:
        """F'^(-1) ``block``."""
        return self.whiten(block)

    def colour_transposed(self, block: Tensor) -> Tensor:
        """F' ``block``."""
        return self._apply(torch.sqrt, block)
