"""Decompositions, chosen by size: exact where that is cheap, block Lanczos where only the leading part is wanted.

An initialisation needs the leading 8 to 128 directions of a matrix that has thousands. It is given as an operator (a
function that multiplies it by a few columns), so products of weights, moments and Cholesky factors are never formed.
`leading_eigenpairs` builds an orthonormal basis of the block Krylov space {X, K X, K^2 X, ...} with full
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
MAX_EXACT_SIZE = 256
# Columns that an operator is applied to at once: fewer leave vector units idle, more converge no faster.
BLOCK_SIZE = 16
# Largest sine of the angle between the subspace found and the true one, as bounded by residual / gap.
ANGLE_TOLERANCE = 7e-4
# Two neighbouring eigenvalues closer than this share of the smaller are not told apart: data do not determine that.
SMALLEST_GAP = 1e-3
# What is left of the trace of an operator is estimated with that many random columns.
TRACE_COLUMNS = 16
# Residuals below that many units of rounding, of the geometric mean of a value and the largest, may be rounding.
ROUNDING = 4
# Blocks that the float64 space may hold before the full decomposition takes over.
MAX_REFINEMENTS = 8
# Rows of a float32 matrix that are widened to float64 at once.
CHUNK_ROWS = 256

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
    """The leading singular triplets of a matrix, in descending order: `left @ diag(values) @ right`.

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
    """Eigendecomposition of a symmetric positive semi-definite matrix, in the precision of `exact_dtype`.

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


def search_dtypes(device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """In which precisions a Krylov space is searched and refined: float32, and float64 where the device has it."""
    return torch.float32, torch.float64 if device.type in ("cpu", "cuda") else torch.float32


# Thin factors are multiplied from the left, transposed: of a (size, n) block that is tall and thin, BLAS libraries make
# up to twice as much when it is the first factor of the product, and stored by columns.


def times(matrix: Tensor, block: Tensor) -> Tensor:
    """`matrix @ block` in the block's dtype; a float32 matrix is widened a few rows at a time, never as a whole."""
    rows = block.mT.contiguous()
    if matrix.dtype == block.dtype:
        return (rows @ matrix.mT).mT
    return torch.cat([rows @ part.to(rows.dtype).mT for part in matrix.split(CHUNK_ROWS)], 1).mT


def transposed_times(matrix: Tensor, block: Tensor) -> Tensor:
    """`matrix.mT @ block` in the block's dtype, as `times`."""
    if matrix.dtype == block.dtype:
        return (block.mT.contiguous() @ matrix).mT
    product = block.new_zeros(block.shape[1], matrix.shape[1])
    for part, columns in zip(matrix.split(CHUNK_ROWS), block.split(CHUNK_ROWS), strict=True):
        product.addmm_(columns.mT, part.to(block.dtype))
    return product.mT


def is_exact(size: int, count: int) -> bool:
    """Whether the leading `count` eigenpairs of a matrix of this size are taken from its full decomposition."""
    return size <= MAX_EXACT_SIZE or 6 * (count + BLOCK_SIZE) >= size


class Leading(NamedTuple):
    """The leading eigenpairs of a symmetric positive semi-definite operator, and its trace.

    Attributes:
        values: (k,) non-negative eigenvalues, descending.
        vectors: (size, k) orthonormal columns.
        trace: The sum of all eigenvalues; estimated where the operator was not decomposed in full.
    """

    values: Tensor
    vectors: Tensor
    trace: float


def leading_eigenpairs(
    operator: Operator,
    size: int,
    count: int,
    *,
    device: torch.device,
    start: Tensor | None = None,
    with_trace: bool = False,
    max_columns: int | None = None,
    delicate: bool = False,
) -> Leading:
    """The leading eigenpairs of a symmetric positive semi-definite operator, whatever its spectrum.

    Those of `krylov_eigenpairs`; of the full decomposition where `is_exact` says so, or where the Krylov
    space would have to be as dear. Arguments as there.
    """
    if not is_exact(size, count):
        found = krylov_eigenpairs(
            operator,
            size,
            count,
            device=device,
            start=start,
            with_trace=with_trace,
            max_columns=max_columns,
            delicate=delicate,
        )
        if found is not None:
            return found
    return _full(operator, size, count, device)


def _full(operator: Operator, size: int, count: int, device: torch.device) -> Leading:
    values, vectors = eigh_descending(operator(torch.eye(size, dtype=exact_dtype(device), device=device)))
    return Leading(values[:count], vectors[:, :count], float(values.sum()))


def krylov_eigenpairs(
    operator: Operator,
    size: int,
    count: int,
    *,
    device: torch.device,
    start: Tensor | None = None,
    with_trace: bool = False,
    max_columns: int | None = None,
    delicate: bool = False,
) -> Leading | None:
    """The leading eigenpairs of a symmetric positive semi-definite operator, from a block Krylov space.

    The subspace is within a sine of `ANGLE_TOLERANCE` of the true one, where the eigenvalue below it is smaller
    by more than `SMALLEST_GAP` (Davis & Kahan 1970: the sine is at most residual / gap). Where the two are
    closer, the subspace is not determined; what is found then holds as much of the trace to the same tolerance.

    The space is searched in float32, as far as its rounding allows. Where that may not be far enough, and the device
    has a float64, a second space that starts with the vectors found says in float64 how good they are and makes good
    what is missing: one or two products with a few columns, mostly.

    Args:
        operator: (size, n) columns -> (size, n) products, in the columns' dtype.
        size: Of the matrix.
        count: How many eigenpairs, fewer than `size`.
        device: Of the operator's products.
        start: (size, n) columns thought to be near the leading eigenvectors, fewer than 16; random ones join them.
        with_trace: Also estimate the trace (Hutchinson's estimator on what the Krylov space does not hold; its
            standard error is below sqrt(2 / (16 size)) of the trace for a flat spectrum, 1 % at width 1280, and less
            for others). Otherwise it is that of the Krylov space.
        max_columns: How large the space may grow; by default half of `size`, where it costs as much as the full
            decomposition.
        delicate: The operator's products lose more in float32 than those with a matrix do (it solves equations): make
            sure of the result in float64 always.

    Returns:
        In the precision of `search_dtypes`' last; `None` where a space of that size is not enough.
    """
    generator = torch.Generator().manual_seed(0)
    low, high = search_dtypes(device)

    def draw(num_columns: int) -> Tensor:
        return torch.randn(size, num_columns, generator=generator).to(device=device, dtype=low)

    block = draw(BLOCK_SIZE)
    if start is not None:
        # One power step: the nearer a column is to an eigenvector far ahead of the others, the less of their digits
        # its rounding takes.
        block[:, : start.shape[1]] = operator(start.to(block))
    limit = max_columns or size // 2
    space = _KrylovSpace(operator, block)
    searched = space.search(count, limit, first_check=count + 2 * BLOCK_SIZE)
    if searched is None:
        return None
    found, bound = searched
    trace = space.trace
    if with_trace:
        trace += _rest_of_trace(operator, space.basis, draw(TRACE_COLUMNS).sign())
    if high != low and (delicate or bound > 1):
        # With neighbours, which the wanted ones may still have to be told apart from.
        space = _KrylovSpace(operator, found.vectors[:, : count + BLOCK_SIZE].to(high))
        searched = space.search(count, min(limit, MAX_REFINEMENTS * (count + BLOCK_SIZE)), first_check=0)
        if searched is None:
            return None
        found, _ = searched
    return Leading(found.values[:count].to(high), _polish(found.vectors[:, :count].to(high)), trace)


def column_limit(rows: int, columns: int) -> int:
    """How large a space for the left singular vectors of a (rows, columns) matrix may grow.

    Half of the smaller side, where a full decomposition is as fast; of tall matrices up to what their rank needs, since
    a full decomposition would be of the longer side.
    """
    return min(rows, columns) // 2 if rows <= 2 * columns else columns + 2 * BLOCK_SIZE


class _KrylovSpace:
    """A growing orthonormal basis Q, its image K Q, and Q' K Q.

    Args:
        operator: Products with K.
        block: (size, n) columns to start with, in the precision to work in.
    """

    def __init__(self, operator: Operator, block: Tensor) -> None:
        self._operator = operator
        self._rows = block.new_empty(8 * BLOCK_SIZE, len(block))  # Q' and (K Q)': vectors are stored one by one
        self._image_rows = torch.empty_like(self._rows)
        self._inner = block.new_zeros(0, 0, dtype=search_dtypes(block.device)[1])
        self.num_columns = 0
        self._next_block = block

    @property
    def basis(self) -> Tensor:
        """(size, num_columns) Q."""
        return self._rows[: self.num_columns].mT

    @property
    def trace(self) -> float:
        """tr(Q' K Q)."""
        return float(self._inner.diagonal().sum())

    def search(self, count: int, limit: int, first_check: int) -> tuple[Eigen, float] | None:
        """Grow until the first `count` eigenpairs are right, or as right as rounding lets them be.

        Args:
            count: How many are wanted.
            limit: Of the number of columns.
            first_check: At how many columns to look at them for the first time.

        Returns:
            All Ritz pairs (with vectors of the first `count` + 16 only), and a bound of the angle with what rounding
            may add, in units of `ANGLE_TOLERANCE`; `None` where the limit is not enough.
        """
        checks: list[tuple[int, float]] = []  # columns, bound of the angle / what it may be
        next_check = max(first_check, count + 1)
        rounding = ROUNDING * torch.finfo(self._rows.dtype).eps / ANGLE_TOLERANCE
        while True:
            self._grow()
            if self.num_columns < next_check:
                continue
            found, residuals = self._leading(count)
            values, below = found.values[:count], found.values[count]
            # Of each Ritz vector, the part outside the wanted subspace is at most residual / gap.
            gaps = torch.maximum(values - below, SMALLEST_GAP * values).clamp_min(torch.finfo(values.dtype).tiny)
            excess = float((residuals / gaps).norm()) / ANGLE_TOLERANCE
            checks.append((self.num_columns, excess))
            # What rounding makes of it, mostly by values far ahead of the others.
            floor = rounding * float(((values[0] * values).sqrt() / gaps).norm())
            stuck = len(checks) > 1 and excess > 0.5 * checks[-2][1]
            if excess <= 1 or (stuck and excess <= 4 * floor):
                return found, excess + floor
            forecast = _forecast(checks)
            if self.num_columns >= limit or (self.num_columns > limit // 2 and forecast > 2 * limit):
                return None
            next_check = min(forecast, self.num_columns + 3 * BLOCK_SIZE, limit)

    def _grow(self) -> None:
        """Add the directions of the next block to the space; their image suggests those after them."""
        block = _orthonormal_beside(self.basis, self._next_block)
        product = self._operator(block)
        start, end = self.num_columns, self.num_columns + block.shape[1]
        while end > len(self._rows):  # twice as much room, so that growing copies every vector twice at most
            self._rows = torch.cat([self._rows, torch.empty_like(self._rows)])
            self._image_rows = torch.cat([self._image_rows, torch.empty_like(self._image_rows)])
        self._rows[start:end], self._image_rows[start:end] = block.mT, product.mT
        self.num_columns = end
        coupling = self.basis.mT @ product
        inner = self._inner.new_zeros(end, end)
        inner[:start, :start] = self._inner
        inner[:, start:], inner[start:, :] = coupling, coupling.mT
        self._inner = inner
        self._next_block = product - self.basis @ coupling

    def _leading(self, count: int) -> tuple[Eigen, Tensor]:
        """The Ritz pairs, with vectors of the first `count` + 16; the residuals' norms of the first `count`."""
        values, vectors = torch.linalg.eigh((self._inner + self._inner.mT) / 2)
        values, rotation = values.flip(0).clamp_min(0), vectors.flip(1)[:, : count + BLOCK_SIZE].to(self._rows)
        image = self._image_rows[: self.num_columns].mT @ rotation[:, :count]
        # Residuals are orthogonal to Q but for rounding, of which the largest eigenvector would show the most.
        residual = image - self.basis @ (self.basis.mT @ image)
        return Eigen(values, self.basis @ rotation), torch.linalg.vector_norm(residual, dim=0).to(values)


def _forecast(checks: list[tuple[int, float]]) -> int:
    """Number of columns at which the excess will be 1, to go by how it fell so far; it falls faster later, mostly."""
    columns, excess = checks[-1]
    if len(checks) < 2:
        return columns + 2 * BLOCK_SIZE
    before_columns, before = checks[-2]
    fall = math.log(before / excess) / (columns - before_columns)  # of the logarithm, a column
    return columns + max(BLOCK_SIZE, math.ceil(math.log(excess) / max(fall, 1e-3)))


def _orthonormal_beside(basis: Tensor, block: Tensor) -> Tensor:
    """Orthonormal columns orthogonal to those of `basis` to the last digit, spanning with it what both do.

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


def operator_svd(
    operator: Operator,
    transposed: Operator,
    shape: tuple[int, int],
    rank: int,
    *,
    device: torch.device,
    start: Tensor | None = None,
    with_norm: bool = False,
    delicate: bool = False,
) -> tuple[SVD, float]:
    """The leading singular triplets of an operator M, through the leading eigenpairs of M M'.

    Args:
        operator: (columns, n) -> (rows, n), products with M.
        transposed: (rows, n) -> (columns, n), products with M'.
        shape: (rows, columns) of M.
        rank: How many triplets, at most `min(shape)`.
        device: Of the products.
        start: (rows, n) columns thought to be near the leading left singular vectors.
        with_norm: Also estimate `||M||_F^2`, see `krylov_eigenpairs`.
        delicate: As there.

    Returns:
        The triplets, and `||M||_F^2` (that of the Krylov space, unless asked for).
    """
    leading = leading_eigenpairs(
        lambda block: operator(transposed(block)),
        shape[0],
        rank,
        device=device,
        start=start,
        with_trace=with_norm,
        max_columns=column_limit(*shape),
        delicate=delicate,
    )
    # M itself and not its square decides the values: they are then right to eps sigma_1 instead of sqrt(eps).
    return _finish(transposed(leading.vectors).mT, leading.vectors), leading.trace


def _finish(image: Tensor, left: Tensor) -> SVD:
    """Triplets of `left @ image` for orthonormal columns `left`: (rows, k) and image = left' M, (k, columns)."""
    basis, triangle = torch.linalg.qr(image.mT)
    inner = torch.linalg.svd(triangle.mT, full_matrices=False)
    return SVD(left @ inner.U, inner.S, inner.Vh @ basis.mT)


def top_svd(matrix: Tensor, rank: int) -> SVD:
    """The leading `rank` singular triplets of a matrix; exact up to rounding where it is small or the rank is large.

    Args:
        matrix: (rows, columns).
        rank: How many triplets, at most `min(matrix.shape)`.

    Returns:
        In float64 on devices that have it.
    """
    rows, columns = matrix.shape
    if rows > columns:
        left, values, right = top_svd(matrix.mT, rank)
        return SVD(right.mT, values, left.mT)
    if not is_exact(rows, rank):
        low = matrix.to(search_dtypes(matrix.device)[0])
        found = krylov_eigenpairs(
            lambda block: _gram_times(matrix if block.dtype == matrix.dtype else low, block),
            rows,
            rank,
            device=matrix.device,
        )
        if found is not None:
            return _finish(transposed_times(matrix, found.vectors).mT, found.vectors)
    matrix = matrix.to(exact_dtype(matrix.device))
    squared, left = eigh_descending(matrix @ matrix.mT)
    values, left = squared[:rank].sqrt(), left[:, :rank]
    # Orthonormalising instead of dividing by the singular values also completes the basis where they vanish.
    right, triangular = torch.linalg.qr(matrix.mT @ left)
    signs = torch.where(triangular.diagonal() < 0, -1.0, 1.0).to(right)
    return SVD(left, values, (right * signs).mT)


def _gram_times(matrix: Tensor, block: Tensor) -> Tensor:
    return times(matrix, transposed_times(matrix, block))


def product_svd(left: Tensor, right: Tensor) -> SVD:
    """The singular value decomposition of a product of thin factors, which is never formed.

    Args:
        left: (rows, k).
        right: (k, columns), of the same dtype.

    Returns:
        All min(rows, k, columns) triplets of `left @ right`.
    """
    left_basis, left_triangle = torch.linalg.qr(left)
    right_basis, right_triangle = torch.linalg.qr(right.mT)
    inner = torch.linalg.svd(left_triangle @ right_triangle.mT, full_matrices=False)
    return SVD(left_basis @ inner.U, inner.S, inner.Vh @ right_basis.mT)
