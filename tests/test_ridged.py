"""Moments with a ridge against dense float64 algebra."""

from __future__ import annotations

import pytest
import torch
from core_fixtures import relative_error, rows_with_spectrum, second_moment_of
from torch import Tensor

from lorainit_diffusers.ridged import CholeskyRidged, FewRowsRidged
from lorainit_diffusers.statistics import SecondMoment, SketchedSecondMoment

WIDTH = 24


def moments(kind: str) -> tuple[SecondMoment | SketchedSecondMoment, Tensor]:
    """A statistic, and the dense second moment that it stands for."""
    num_rows = WIDTH // 3 if kind == "few rows" else 200
    rows = rows_with_spectrum(num_rows, [0.8**index for index in range(WIDTH)], mean=0.5)
    exact = SecondMoment(WIDTH)
    exact.update(rows)
    if kind != "sketched":
        return exact, second_moment_of(rows)
    sketch = exact.sketched(10)
    values, vectors = sketch.eigh(centered=False)
    rest = (sketch.trace(centered=False) - float(values.sum())) / (WIDTH - 10)
    dense = vectors * values @ vectors.mT + rest * (torch.eye(WIDTH) - vectors @ vectors.mT)
    return sketch, dense


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-6)])
@pytest.mark.parametrize("kind", ["exact", "few rows", "sketched"])
def test_products_are_those_of_the_dense_matrix(kind, dtype, tolerance):
    statistic, dense = moments(kind)
    ridged = statistic.ridged(0.1)
    assert isinstance(ridged, FewRowsRidged) == (kind == "few rows")
    assert ridged.ridge == pytest.approx(0.1 * float(dense.trace()) / WIDTH, rel=1e-6)
    full = dense + ridged.ridge * torch.eye(WIDTH, dtype=torch.float64)
    block = torch.randn(WIDTH, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = block.to(dtype)
    assert statistic.times(given).dtype == ridged.shrink(given).dtype == ridged.whiten(given).dtype == dtype
    assert relative_error(statistic.times(given), dense @ block) < tolerance
    assert relative_error(ridged.shrink(given), dense @ torch.linalg.solve(full, block)) < tolerance
    identity = torch.eye(WIDTH, dtype=dtype)
    whitening = ridged.whiten(identity).double()
    assert relative_error(whitening @ full @ whitening.mT, identity) < tolerance
    assert relative_error(ridged.whiten_transposed(identity), whitening.mT) < tolerance
    assert relative_error(ridged.colour_transposed(ridged.whiten_transposed(given)), block) < tolerance
    assert statistic.output_power(block.mT) == pytest.approx(float((block.mT @ dense @ block).trace()), rel=1e-5)


def test_of_few_rows_the_small_matrix_says_it_all():
    statistic, dense = moments("few rows")
    ridged = statistic.ridged(0.1)
    assert isinstance(ridged, FewRowsRidged)
    rows = ridged.rows.double()
    assert relative_error(rows.mT @ rows, dense) < 1e-6
    block = torch.randn(len(rows), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    full = dense + ridged.ridge * torch.eye(WIDTH, dtype=torch.float64)
    assert relative_error(ridged.shrink_rows(block), rows @ torch.linalg.solve(full, rows.mT @ block)) < 1e-6
    small = rows @ rows.mT + ridged.ridge * torch.eye(len(rows), dtype=torch.float64)
    assert relative_error(ridged.solve_rows(block), torch.linalg.solve(small, block)) < 1e-6


@pytest.mark.parametrize("centered", [True, False])
def test_the_leading_pairs_are_the_first_of_all(centered):
    width = 480  # wide enough for a Krylov space
    rows = rows_with_spectrum(900, [0.97**index for index in range(width)], mean=2.0)
    statistic = SecondMoment(width)
    statistic.update(rows)
    expected = statistic.eigh(centered=centered)
    found = statistic.leading(6, centered=centered)
    assert relative_error(found.values, expected.values[:6]) < 1e-6
    kept = found.vectors @ found.vectors.mT
    assert relative_error(kept, expected.vectors[:, :6] @ expected.vectors[:, :6].mT) < 1e-3
    # fewer come from the same computation, more from a new one, and rows that come later are not forgotten
    assert torch.equal(statistic.leading(4, centered=centered).vectors, found.vectors[:, :4])
    assert statistic.leading(9, centered=centered).values.shape == (9,)
    statistic.update(torch.randn(900, width, generator=torch.Generator().manual_seed(5)) * 3)
    assert relative_error(statistic.leading(6, centered=centered).values, found.values) > 0.1


def test_float32_solves_are_refined():
    width = 800  # above the widths that are kept in float64
    rows = rows_with_spectrum(1600, [0.98**index for index in range(width)], mean=1.0)
    statistic = SecondMoment(width)
    statistic.update(rows)
    ridged = statistic.ridged(1e-3)
    assert isinstance(ridged, CholeskyRidged)
    block = torch.randn(width, 2, generator=torch.Generator().manual_seed(0))
    assert ridged.solve(block).dtype == torch.float32
    state = {key: value.double() for key, value in statistic.state_dict().items()}
    moment = state["scatter"] / 1600 + torch.outer(state["mean"], state["mean"])
    exact = torch.linalg.solve(moment + ridged.ridge * torch.eye(width, dtype=torch.float64), block.double())
    assert relative_error(ridged.solve(block.double()), exact) < 1e-5
    assert relative_error(ridged.solve(block.double()), exact) < 0.1 * relative_error(ridged.solve(block), exact)
