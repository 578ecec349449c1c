"""Moments with a ridge against dense float64 algebra."""

from __future__ import annotations

import pytest
import torch
from core_fixtures import relative_error, rows_with_spectrum, second_moment_of
from torch import Tensor

from lorainit_diffusers.statistics import SecondMoment, SketchedSecondMoment

WIDTH = 24


def moments(kind: str) -> tuple[SecondMoment | SketchedSecondMoment, Tensor]:
    """A statistic, and the dense second moment that it stands for."""
    rows = rows_with_spectrum(200, [0.8**index for index in range(WIDTH)], mean=0.5)
    exact = SecondMoment(WIDTH)
    exact.update(rows)
    if kind == "exact":
        return exact, second_moment_of(rows)
    sketch = exact.sketched(10)
    values, vectors = sketch.eigh(centered=False)
    rest = (sketch.trace(centered=False) - float(values.sum())) / (WIDTH - 10)
    dense = vectors * values @ vectors.mT + rest * (torch.eye(WIDTH) - vectors @ vectors.mT)
    return sketch, dense


@pytest.mark.parametrize("kind", ["exact", "sketched"])
def test_solves_and_whitens_as_the_dense_matrix_does(kind):
    statistic, dense = moments(kind)
    ridged = statistic.ridged(0.1)
    assert ridged.ridge == pytest.approx(0.1 * float(dense.trace()) / WIDTH, rel=1e-6)
    full = dense + ridged.ridge * torch.eye(WIDTH, dtype=torch.float64)
    block = torch.randn(WIDTH, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert relative_error(statistic.times(block), dense @ block) < 1e-6
    for solve in (ridged.solve, ridged.solve_accurately):
        assert relative_error(solve(block), torch.linalg.solve(full, block)) < 1e-6
    identity = torch.eye(WIDTH, dtype=torch.float64)
    whitening = ridged.whiten(identity)
    assert relative_error(whitening @ full @ whitening.mT, identity) < 1e-6
    assert relative_error(ridged.whiten_transposed(identity), whitening.mT) < 1e-9
    assert relative_error(ridged.colour_transposed(ridged.whiten_transposed(block)), block) < 1e-9


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
    block = torch.randn(width, 2, generator=torch.Generator().manual_seed(0))
    assert ridged.solve(block).dtype == torch.float32
    state = {key: value.double() for key, value in statistic.state_dict().items()}
    moment = state["scatter"] / 1600 + torch.outer(state["mean"], state["mean"])
    exact = torch.linalg.solve(moment + ridged.ridge * torch.eye(width, dtype=torch.float64), block.double())
    assert relative_error(ridged.solve_accurately(block), exact) < 1e-5
    assert relative_error(ridged.solve_accurately(block), exact) < 0.1 * relative_error(ridged.solve(block), exact)
