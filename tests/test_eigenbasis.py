"""The completed basis against the dense one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorainit_diffusers.eigenbasis import Eigenbasis
from lorainit_diffusers.linalg import Eigen

FEATURES = 20


def orthonormal(columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(columns)
    return torch.linalg.qr(torch.randn(FEATURES, columns, generator=generator, dtype=torch.float64)).Q


IDENTITY = torch.eye(FEATURES, dtype=torch.float64)
# The first k axes and their negatives are where a reflection without the polar factor would divide by zero.
VECTORS = {
    "random": orthonormal(5),
    "most of the space": orthonormal(15),
    "axes": IDENTITY[:, :5],
    "negative axes": -IDENTITY[:, :5],
    "other axes": IDENTITY[:, 10:15],
    "all": orthonormal(FEATURES),
}


@pytest.mark.parametrize("vectors", VECTORS.values(), ids=VECTORS.keys())
def test_the_basis_is_orthonormal_and_diagonalises_the_matrix(vectors):
    values = torch.arange(vectors.shape[1], 0, -1).double() + 1
    basis = Eigenbasis(Eigen(values, vectors), rest=0.5)
    matrix = vectors * values @ vectors.mT + 0.5 * (IDENTITY - vectors @ vectors.mT)
    columns = basis.project(IDENTITY)  # the basis itself
    torch.testing.assert_close(columns.mT @ columns, IDENTITY)
    torch.testing.assert_close(columns * basis.values @ columns.mT, matrix)
    torch.testing.assert_close(columns[:, : vectors.shape[1]], vectors)
    rows = torch.randn(3, FEATURES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(basis.lift(basis.project(rows)), rows)
    torch.testing.assert_close(basis.lift(rows), rows @ columns.mT)


def test_rounding_cannot_make_the_rest_negative():
    assert float(Eigenbasis(Eigen(torch.ones(5).double(), VECTORS["random"]), rest=-1e-9).values.min()) == 0.0
