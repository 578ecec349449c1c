"""Decompositions, chosen by size: exact where that is cheap, randomised where it is not.

Everything here is a function of its arguments: the randomised branch draws with a fixed seed of its own and leaves the
global random state alone.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

# Above these sizes an exact float64 decomposition costs more than the forward passes that feed it.
MAX_FLOAT64_SIZE = 768
MAX_EXACT_SVD_SIZE = 512


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
    """The precision of a decomposition: float64 on CPU where it is cheap, float32 elsewhere."""
    return torch.float64 if device.type == "cpu" and size <= MAX_FLOAT64_SIZE else torch.float32


def eigh_descending(matrix: Tensor) -> Eigen:
    """Eigendecomposition of a symmetric positive semi-definite matrix.

    Args:
        matrix: (features, features); symmetrised first, so rounding in its accumulation does no harm.

    Returns:
        All eigenpairs; eigenvalues that rounding made negative are zero.
    """
    matrix = matrix.to(solve_dtype(matrix.shape[0], matrix.device))
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return Eigen(values.flip(0).clamp_min(0), vectors.flip(1))


@contextmanager
def _fixed_seed(device: torch.device) -> Generator[None]:
    """Seed the global generator of this device; its state is restored on exit."""
    cuda = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.random.default_generator.manual_seed(0)
        for index in cuda:
            with torch.cuda.device(index):
                torch.cuda.manual_seed(0)
        yield


def top_svd(matrix: Tensor, rank: int) -> SVD:
    """The leading ``rank`` singular triplets.

    Small matrices go through the eigendecomposition of their Gram matrix in float64 (a few times faster than a full
    SVD, and exact for the leading triplets that a LoRA needs); large ones through randomised subspace iteration
    (Halko et al. 2011, arXiv:0909.4061, algorithm 5.1 as ``torch.svd_lowrank`` implements it).

    Args:
        matrix: (rows, columns).
        rank: how many triplets, at most ``min(matrix.shape)``.
    """
    rows, columns = matrix.shape
    if min(rows, columns) > MAX_EXACT_SVD_SIZE:
        # Oversampling and power iterations: flat spectra, as those of attention weights, need both.
        num_columns = min(2 * rank + 16, min(rows, columns))
        with _fixed_seed(matrix.device):  # svd_lowrank takes no generator
            left, values, right = torch.svd_lowrank(matrix.float(), q=num_columns, niter=8)
        return SVD(left[:, :rank], values[:rank], right[:, :rank].mT)
    matrix = matrix.to(solve_dtype(max(rows, columns), matrix.device))
    if matrix.dtype == torch.float32:  # squaring would cost half of float32's digits
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return SVD(left[:, :rank], values[:rank], right[:rank])
    if rows > columns:
        left, values, right = top_svd(matrix.mT, rank)
        return SVD(right.mT, values, left.mT)
    squared, left = eigh_descending(matrix @ matrix.mT)
    values, left = squared[:rank].sqrt(), left[:, :rank]
    # Orthonormalising instead of dividing by the singular values also completes the basis where they vanish.
    right, triangular = torch.linalg.qr(matrix.mT @ left)
    signs = torch.where(triangular.diagonal() < 0, -1.0, 1.0).to(right)
    return SVD(left, values, (right * signs).mT)


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
