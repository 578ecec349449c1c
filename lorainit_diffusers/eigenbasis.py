"""The basis in which a second moment is diagonal, also where only its leading eigenvectors are known.

The methods work in coordinates in which the second moment S of a layer's inputs is diagonal: there S, its inverse, its
square root and every other function of it are one factor a column. A sketch gives k leading eigenpairs and the exact
trace. What is left of the trace is then spread evenly over the other directions,

    S = V diag(values) V' + rest (I - V V'),    rest = (trace - sum(values)) / (features - k),

which is the choice that assumes least: of all completions with this trace it has the largest entropy (of the Gaussian
with that covariance), it keeps E||x||^2 exact, and it prefers no direction that the sketch did not see. It has the form
of probabilistic PCA (Tipping & Bishop 1999, equation 8). Any orthonormal basis of the complement diagonalises it, so a
block reflection (Schreiber & Parlett 1988) supplies one that is never formed: changing coordinates costs products with
thin (features, k) matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorainit_diffusers.linalg import Eigen


class Eigenbasis:
    """An orthonormal basis that diagonalises a symmetric positive semi-definite matrix.

    Args:
        leading: Eigenpairs; all of them, or the leading k of `features`.
        rest: The eigenvalue of every direction orthogonal to the leading ones; unused when there is none.

    Attributes:
        values: (features,) eigenvalues: the leading ones, then `rest`.
        vectors: (features, k) the leading eigenvectors.
    """

    def __init__(self, leading: Eigen, rest: float = 0.0) -> None:
        values, self.vectors = leading
        features, k = self.vectors.shape
        self.values = values
        self._outer: Tensor | None = None
        if k < features:
            self.values = torch.cat([values, values.new_full((features - k,), max(rest, 0.0))])
            # I - Y T Y' with Y = E O - V maps the first k axes (E) to V O'. This O, the polar factor of -V[:k], makes
            # T symmetric with eigenvalues in [1/2, 1], whatever V is.
            left, singular, right = torch.linalg.svd(self.vectors[:k])
            self._rotation = -left @ right
            self._core = right.mT / (1 + singular) @ right
            self._outer = self.vectors[k:]

    @property
    def num_known(self) -> int:
        """Number of eigenvectors that are known one by one."""
        return self.vectors.shape[1]

    def project(self, matrix: Tensor) -> Tensor:
        """(n, features) rows in this basis's coordinates."""
        known = matrix @ self.vectors
        if self._outer is None:
            return known
        k = self.num_known
        thin = (matrix[:, :k] @ self._rotation - known) @ self._core
        return torch.cat([known, matrix[:, k:] + thin @ self._outer.mT], dim=1)

    def lift(self, coordinates: Tensor) -> Tensor:
        """Inverse of `project`: (n, features) coordinates as rows."""
        if self._outer is None:
            return coordinates @ self.vectors.mT
        k = self.num_known
        thin = coordinates[:, k:] @ self._outer @ self._core
        rows = (coordinates[:, :k] - thin) @ self.vectors.mT
        rows[:, :k] += thin @ self._rotation.mT
        rows[:, k:] += coordinates[:, k:]
        return rows
