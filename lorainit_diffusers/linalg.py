"""Decompositions, chosen by size: exact where that is cheap, block Lanczos where only the leading part is wanted.

An initialisation needs the leading 8 to 128 directions of a matrix that has thousands. It is given as an operator (a
function that multiplies it by a few columns), so products of weights, moments and Cholesky factors are never formed.
:func:`leading_eigenpairs` builds an orthonormal basis of the block Krylov space {X, K X, K^2 X, ...} with full
reorthogonalisation, takes the best eigenpairs that this space holds (Rayleigh-Ritz), and stops when their residuals say
that the wanted subspace is right (Golub & Underwood 1977; Musco & Musco 2015, arXiv:1504.05477). Where the space would
become a large part of the matrix, the matrix is decomposed in full, on CPU in float64.

Everything here is a function of its arguments: random starts are drawn with a fixed seed of their own, and the global
random state is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Up to this width, products in float64 cost no more than the forward passes that feed them.
MAX_FLOAT64_SIZE = 768
# Up to this width a full decomposition in float64 is as fast as any other.
MAX_EXACT_SIZE = 384
# Columns that an operator is applied to at once: fewer leave vector units idle, more converge no faster.
BLOCK_SIZE = 16
# Largest sine of the angle between the subspace found and the true one, as bounded by residual / gap.
ANGLE_TOLERANCE = 3e-4
# Two neighbouring eigenvalues closer than this share of the smaller are not told apart: data do not determine that.
SMALLEST_GAP = 1e-3
# What is left of the trace of an operator is estimated with that many random columns.
TRACE_COLUMNS = 16

Operator = Callable[[Tensor], Tensor]


class Eigen(NamedTuple):
    """Eigenpairs of a symmetric positive semi-definite matrix, in descending order.

    Attributes:
        values: (k,) non-negative eigenvalues.
        vectors: (features, k) orthonormal columns.
    """

    values: Tensor
    vectors: Tensor


class SVD(NamedTuple):
    """The leading singular triplets of a matrix, in descending order: ``left @ diag(values) @ right``.

    Attributes:
        left: (rows, k) orthonormal columns.
        values: (k,) non-negative singular values.
        right: (k, columns) orthonormal rows.
    """

    left: Tensor
    values: Tensor
    right: Tensor


def solve_dtype(size: int, device: torch.device) -> torch.dtype:
    """The precision of products with a matrix: float64 on CPU where it is cheap, float32 elsewhere."""
    return torch.float64 if device.type == "cpu" and size <= MAX_FLOAT64_SIZE else torch.float32


def exact_dtype(device: torch.device) -> torch.dtype:
    """The precision of full decompositions: float64 on CPU; most accelerators are slow in it, or lack it."""
    return torch.float64 if device.type == "cpu" else torch.float32


def eigh_descending(matrix: Tensor) -> Eigen:
    """Eigendecomposition of a symmetric positive semi-definite matrix, in the precision of :func:`exact_dtype`.

    float32 loses the directions whose eigenvalues are below 1e-6 of the largest, and a mean that dwarfs
    the variance makes that many of them.

    Args:
        matrix: (features, features); symmetrised first, so rounding in its accumulation does no harm.

    Returns:
        All eigenpairs; eigenvalues that rounding made negative are zero.
    """
    matrix = matrix.to(exact_dtype(matrix.device))
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return Eigen(values.flip(0).clamp_min(0), vectors.flip(1))


def is_exact(size: int, count: int) -> bool:
    """Whether the leading ``count`` eigenpairs of a matrix of this size are taken from its full decomposition."""
    return size <= MAX_EXACT_SIZE or 6 * (count + BLOCK_SIZE) >= size


class Leading(NamedTuple):
    """The leading eigenpairs of a symmetric positive semi-definite operator, and its trace.

    Attributes:
        values: (k,) non-negative eigenvalues, descending.
        vectors: (size, k) orthonormal columns.
        trace: the sum of all eigenvalues; estimated where the operator was not decomposed in full.
    """

    values: Tensor
    vectors: Tensor
    trace: float


def leading_eigenpairs(
    operator: Operator,
    size: int,
    count: int,
    *,
    like: Tensor,
    start: Tensor | None = None,
    with_trace: bool = False,
) -> Leading:
    """The leading eigenpairs of a symmetric positive semi-definite operator, whatever its spectrum.

    Those of :func:`krylov_eigenpairs`; of the full decomposition where :func:`is_exact` says so, or where the Krylov
    space would have to be as dear. Arguments as there.
    """
    if not is_exact(size, count):
        found = krylov_eigenpairs(operator, size, count, like=like, start=start, with_trace=with_trace)
        if found is not None:
            return found
    dense = operator(torch.eye(size, dtype=like.dtype, device=like.device))
    values, vectors = eigh_descending(dense)
    return Leading(values[:count].to(like), vectors[:, :count].to(like), float(values.sum()))


def krylov_eigenpairs(
    operator: Operator,
    size: int,
    count: int,
    *,
    like: Tensor,
    start: Tensor | None = None,
    with_trace: bool = False,
    max_columns: int | None = None,
) -> Leading | None:
    """The leading eigenpairs of a symmetric positive semi-definite operator, from a block Krylov space.

    The subspace is within a sine of :data:`ANGLE_TOLERANCE` of the true one, where the eigenvalue below it is smaller
    by more than :data:`SMALLEST_GAP` (Davis & Kahan 1970: the sine is at most residual / gap), or as near as the
    rounding of the operator's own products lets it come. Where the two eigenvalues are closer, the subspace is not
    determined; what is found then holds as much of the trace to the same tolerance.

    Args:
        operator: (size, n) columns -> (size, n) products, in the columns' dtype.
        size: of the matrix.
        count: how many eigenpairs, at most ``size``.
        like: a tensor with the dtype and device of the operator's products.
        start: (size, n) columns thought to be near the leading eigenvectors, up to 16; random ones join them.
        with_trace: also estimate the trace (Hutchinson's estimator on what the Krylov space does not hold; its
            standard error is below sqrt(2 / (16 size)) of the trace for a flat spectrum, 1 % at width 1280, and less
            for others). Otherwise it is that of the Krylov space.
        max_columns: how large the space may grow; a third of ``size`` by default, where it costs as much as the full
            decomposition.

    Returns:
        ``None`` where a space of that size is not enough.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(num_columns: int) -> Tensor:
        return torch.randn(size, num_columns, generator=generator).to(like)

    block = draw(BLOCK_SIZE)
    if start is not None:
        # One power step: the nearer a column is to an eigenvector far ahead of the others, the less of their digits
        # its rounding takes.
        block = torch.cat([operator(start[:, :BLOCK_SIZE].to(like)), block], 1)
    space = _KrylovSpace(operator, size, like)
    limit = max_columns or size // 3
    noise = 64 * torch.finfo(like.dtype).eps
    checks: list[tuple[int, float]] = []  # columns, residual / what it may be
    next_check = count + 2 * BLOCK_SIZE
    while True:
        space.grow(block)
        if space.num_columns >= next_check:
            values, vectors, residual = space.leading(count)
            first, last, below = (float(values[index]) for index in (0, count - 1, count))
            allowed = max(ANGLE_TOLERANCE * max(last - below, SMALLEST_GAP * last), torch.finfo(like.dtype).tiny)
            checks.append((space.num_columns, residual / allowed))
            # Rounding sets a floor, at or below this; where it lies shows in a residual that falls no more.
            at_floor = residual <= noise * (first * last) ** 0.5
            if residual <= allowed or (at_floor and len(checks) > 1 and checks[-1][1] > 0.5 * checks[-2][1]):
                trace = space.trace
                if with_trace:
                    trace += _rest_of_trace(operator, space.basis, draw(TRACE_COLUMNS).sign())
                return Leading(values[:count].to(like), _polish(vectors), trace)
            next_check = _next_check(checks)
            if space.num_columns >= limit or (
                len(checks) > 3 and next_check > 1.5 * limit and residual > noise * first
            ):
                return None
            next_check = min(next_check, limit)
        block = space.next_block


class _KrylovSpace:
    """A growing orthonormal basis Q, its image K Q, and Q' K Q."""

    def __init__(self, operator: Operator, size: int, like: Tensor) -> None:
        self._operator = operator
        self._basis = like.new_empty(size, 8 * BLOCK_SIZE)
        self._image = torch.empty_like(self._basis)
        self._inner = torch.zeros(0, 0, dtype=exact_dtype(like.device), device=like.device)
        self.num_columns = 0
        self.next_block = like.new_empty(size, 0)

    @property
    def basis(self) -> Tensor:
        """(size, num_columns) Q."""
        return self._basis[:, : self.num_columns]

    @property
    def trace(self) -> float:
        """tr(Q' K Q)."""
        return float(self._inner.diagonal().sum())

    def grow(self, block: Tensor) -> None:
        """Add the directions of these columns to the space; their image suggests the next ones."""
        block = _orthonormal_beside(self.basis, block)
        product = self._operator(block)
        start, end = self.num_columns, self.num_columns + block.shape[1]
        if end > self._basis.shape[1]:  # twice as much room, so that growing copies every column twice at most
            self._basis = torch.cat([self._basis, torch.empty_like(self._basis)], 1)
            self._image = torch.cat([self._image, torch.empty_like(self._image)], 1)
        self._basis[:, start:end], self._image[:, start:end] = block, product
        self.num_columns = end
        coupling = self.basis.mT @ product
        inner = self._inner.new_zeros(end, end)
        inner[:start, :start] = self._inner
        inner[:, start:], inner[start:, :] = coupling, coupling.mT
        self._inner = inner
        self.next_block = product - self.basis @ coupling

    def leading(self, count: int) -> tuple[Tensor, Tensor, float]:
        """All eigenvalues of Q' K Q; of the first ``count``, the vectors in full and the norm of their residuals."""
        values, rotation = eigh_descending(self._inner)
        wanted = rotation[:, :count].to(self._basis)
        vectors = self.basis @ wanted
        image = self._image[:, : self.num_columns] @ wanted
        # Residuals are orthogonal to Q but for rounding, of which the largest eigenvector would show the most.
        residual = image - self.basis @ (self.basis.mT @ image)
        return values, vectors, float(residual.norm())


def _next_check(checks: list[tuple[int, float]]) -> int:
    """Number of columns at which the residual will be small enough, to go by how it fell so far."""
    columns, excess = checks[-1]
    if len(checks) < 2:
        return columns + 2 * BLOCK_SIZE
    before_columns, before = checks[-2]
    fall = math.log(before / excess) / (columns - before_columns)  # of the logarithm, a column
    needed = math.log(excess) / max(fall, 1e-9)
    # The first steps are the slowest, so what they foretell is not believed in full.
    patience = 4 * BLOCK_SIZE if len(checks) < 4 else math.inf
    return columns + max(BLOCK_SIZE, math.ceil(min(needed, patience)))


def _orthonormal_beside(basis: Tensor, block: Tensor) -> Tensor:
    """Orthonormal columns orthogonal to those of ``basis`` to the last digit, spanning with it what both do.

    A projection that takes most of a column away leaves its rounding, which needs another one ("twice is enough",
    Parlett 1980); a block that the basis holds already is rounding from the start.
    """
    block = torch.linalg.qr(block).Q
    if basis.shape[1] == 0:
        return block
    for _ in range(4):
        projected = block - basis @ (basis.mT @ block)
        block = torch.linalg.qr(projected).Q
        if float(torch.linalg.vector_norm(projected, dim=0).min()) > 0.7:
            break
    return block


def _polish(vectors: Tensor) -> Tensor:
    """The same columns orthonormal to the last digit: one Newton step towards the polar factor."""
    return vectors @ (1.5 * torch.eye(vectors.shape[1], dtype=vectors.dtype, device=vectors.device)) - vectors @ (
        0.5 * (vectors.mT @ vectors)
    )


def _rest_of_trace(operator: Operator, basis: Tensor, signs: Tensor) -> float:
    """tr((I - Q Q') K), estimated: the mean of z' K z over random signs z with their part in Q taken away."""
    signs = signs - basis @ (basis.mT @ signs)
    return float((signs * operator(signs)).sum()) / signs.shape[1]


def krylov_svd(
    operator: Operator,
    transposed: Operator,
    shape: tuple[int, int],
    rank: int,
    *,
    like: Tensor,
    start: Tensor | None = None,
    with_norm: bool = False,
) -> tuple[SVD, float] | None:
    """The leading singular triplets of an operator M, through the leading eigenpairs of M M'.

    Args:
        operator: (columns, n) -> (rows, n), products with M.
        transposed: (rows, n) -> (columns, n), products with M'.
        shape: (rows, columns) of M.
        rank: how many triplets, at most ``min(shape)``.
        like: a tensor with the dtype and device of the products.
        start: (rows, n) columns thought to be near the leading left singular vectors.
        with_norm: also estimate ``||M||_F^2``, see :func:`krylov_eigenpairs`.

    Returns:
        The triplets, and ``||M||_F^2`` (that of the Krylov space, unless asked for); ``None`` where the spectrum is so
        flat, or so steep, that only a full decomposition is right.
    """
    leading = krylov_eigenpairs(
        lambda block: operator(transposed(block)),
        shape[0],
        rank,
        like=like,
        start=start,
        with_trace=with_norm,
        max_columns=min(shape) // 3,
    )
    if leading is None:
        return None
    # M itself and not its square decides the values: they are then right to eps sigma_1 instead of sqrt(eps).
    return _finish(transposed(leading.vectors).mT, leading.vectors), leading.trace


def _finish(image: Tensor, left: Tensor) -> SVD:
    """Triplets of ``left @ image`` for orthonormal columns ``left``: (rows, k) and image = left' M, (k, columns)."""
    dtype = exact_dtype(image.device)
    basis, triangle = torch.linalg.qr(image.mT.to(dtype))
    inner = torch.linalg.svd(triangle.mT, full_matrices=False)
    return SVD(left @ inner.U.to(left), inner.S.to(left), (inner.Vh @ basis.mT).to(left))


def top_svd(matrix: Tensor, rank: int) -> SVD:
    """The leading ``rank`` singular triplets of a matrix; exact up to rounding where it is small or the rank is large.

    Args:
        matrix: (rows, columns).
        rank: how many triplets, at most ``min(matrix.shape)``.

    Returns:
        In float64 where the products are (see :func:`solve_dtype`), else in float32.
    """
    rows, columns = matrix.shape
    if rows > columns:
        left, values, right = top_svd(matrix.mT, rank)
        return SVD(right.mT, values, left.mT)
    if not is_exact(rows, rank):
        matrix = matrix.to(solve_dtype(max(rows, columns), matrix.device))
        found = krylov_svd(
            lambda block: matrix @ block, lambda block: matrix.mT @ block, (rows, columns), rank, like=matrix
        )
        if found is not None:
            return found[0]
    dtype = solve_dtype(max(rows, columns), matrix.device)
    matrix = matrix.to(exact_dtype(matrix.device))
    squared, left = eigh_descending(matrix @ matrix.mT)
    values, left = squared[:rank].sqrt(), left[:, :rank]
    # Orthonormalising instead of dividing by the singular values also completes the basis where they vanish.
    right, triangular = torch.linalg.qr(matrix.mT @ left)
    signs = torch.where(triangular.diagonal() < 0, -1.0, 1.0).to(right)
    return SVD(left.to(dtype), values.to(dtype), (right * signs).mT.to(dtype))


def product_svd(left: Tensor, right: Tensor) -> SVD:
    """The singular value decomposition of a product of thin factors, which is never formed.

    Args:
        left: (rows, k).
        right: (k, columns), of the same dtype.

    Returns:
        All min(rows, k, columns) triplets of ``left @ right``.
    """
    left_basis, left_triangle = torch.linalg.qr(left)
    right_basis, right_triangle = torch.linalg.qr(right.mT)
    inner = torch.linalg.svd(left_triangle @ right_triangle.mT, full_matrices=False)
    return SVD(left_basis @ inner.U, inner.S, inner.Vh @ right_basis.mT)
