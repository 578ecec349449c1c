"""The gradient's directions in white coordinates, against float64 brute force over all rows."""

from __future__ import annotations

import pytest
import torch
from core_fixtures import (
    best_rank,
    draw_weight,
    largest_principal_angle,
    product,
    relative_error,
    ridged,
    rows_with_spectrum,
    symmetric_power,
)

SHAPE = (24, 16)
RANK = 4
ROWS = rows_with_spectrum(400, [0.7**index for index in range(SHAPE[1])], mean=0.5)
GRADIENTS = [draw_weight(*SHAPE, seed=seed) for seed in (3, 4, 5)]
MEAN_GRADIENT = torch.stack(GRADIENTS).double().mean(0)
WEIGHT = draw_weight(*SHAPE)


def test_a_spans_the_leading_directions_of_the_whitened_gradient(solve):
    factors = solve("gradient_whitened", WEIGHT, (ROWS, GRADIENTS), RANK, ridge=0.2).factors(RANK)
    inverse_root = symmetric_power(ridged(ROWS, 0.2), -0.5)
    expected = torch.linalg.svd(MEAN_GRADIENT @ inverse_root).Vh[:RANK] @ inverse_root
    assert largest_principal_angle(factors.lora_A, expected) < 1e-4
    assert not factors.lora_B.any()


def test_hidden_activations_are_white_under_the_ridged_moment(solve):
    lora_A = solve("gradient_whitened", WEIGHT, (ROWS, GRADIENTS), RANK).factors(RANK).lora_A.double()
    hidden = lora_A @ ridged(ROWS, 0.1) @ lora_A.mT
    assert relative_error(hidden, hidden.diagonal().mean() * torch.eye(RANK, dtype=torch.float64)) < 1e-4


def test_no_white_a_gives_b_a_larger_first_gradient(solve):
    """The property that the method is built on."""
    moment = ridged(ROWS, 0.1)
    lora_A = solve("gradient_whitened", WEIGHT, (ROWS, GRADIENTS), RANK).factors(RANK).lora_A.double()
    variance = float((lora_A @ moment @ lora_A.mT).diagonal().mean())
    own = float((MEAN_GRADIENT @ lora_A.mT).norm())
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        rows = torch.linalg.qr(torch.randn(SHAPE[1], RANK, generator=generator, dtype=torch.float64)).Q.mT
        other = variance**0.5 * rows @ symmetric_power(moment, -0.5)
        assert float((MEAN_GRADIENT @ other.mT).norm()) < own


def test_the_row_space_of_the_gradient(solve):
    lora_A = solve("gradient_step", WEIGHT, (ROWS, GRADIENTS), RANK, directions="gradient").factors(RANK).lora_A
    assert largest_principal_angle(lora_A, torch.linalg.svd(MEAN_GRADIENT).Vh[:RANK]) < 1e-4


def test_matched_scale_is_that_of_kaiming_over_the_rows(solve):
    lora_A = solve("gradient_whitened", WEIGHT, (ROWS, GRADIENTS), RANK).factors(RANK).lora_A.double()
    power = float((ROWS.double() @ lora_A.mT).square().sum(1).mean())
    assert power == pytest.approx(RANK * float(ROWS.double().square().sum(1).mean()) / (3 * SHAPE[1]), rel=1e-4)


def test_unit_scale(solve):
    lora_A = solve("gradient_whitened", WEIGHT, (ROWS, GRADIENTS), RANK, scale="unit").factors(RANK).lora_A
    assert float(lora_A.norm()) == pytest.approx(RANK**0.5, rel=1e-5)


@pytest.mark.parametrize("scale", ["unit", "matched"])
def test_a_of_the_inputs_is_that_of_eva(solve, scale):
    own = solve("gradient_step", WEIGHT, (ROWS, GRADIENTS), RANK, directions="inputs", scale=scale)
    eva = solve("eva", WEIGHT, ROWS, RANK, scale="paper" if scale == "unit" else "matched")
    assert relative_error(own.factors(RANK).lora_A, eva.factors(RANK).lora_A) < 1e-4
    assert relative_error(own.scores, eva.scores[:RANK]) < 1e-4


@pytest.mark.parametrize("directions", ["inputs", "gradient", "whitened_gradient"])
@pytest.mark.parametrize("scaling", [1.0, 0.25])
def test_a_step_descends_by_the_asked_fraction_of_the_outputs(solve, directions, scaling):
    options = {"scaling": scaling, "directions": directions, "step": 0.07}
    factors = solve("gradient_step", WEIGHT, (ROWS, GRADIENTS), RANK, **options).factors(RANK)
    change, rows = product(factors, scaling), ROWS.double()
    ratio = float((rows @ change.mT).norm() / (rows @ WEIGHT.double().mT).norm())
    assert ratio == pytest.approx(0.07, rel=1e-4)
    expected = -MEAN_GRADIENT @ factors.lora_A.double().mT
    assert relative_error(factors.lora_B / factors.lora_B.norm(), expected / expected.norm()) < 1e-4
    assert float((change * MEAN_GRADIENT).sum()) < 0  # to first order, the loss falls


def test_the_whitened_step_is_the_preconditioned_gradient_at_the_best_rank(solve):
    options = {"directions": "whitened_gradient", "step": 0.1}
    change = product(solve("gradient_step", WEIGHT, (ROWS, GRADIENTS), RANK, **options).factors(RANK))
    inverse_root = symmetric_power(ridged(ROWS, 0.1), -0.5)
    expected = -best_rank(MEAN_GRADIENT @ inverse_root, RANK) @ inverse_root
    assert relative_error(change / change.norm(), expected / expected.norm()) < 1e-4


def test_by_default_the_step_is_the_gradient_at_the_best_rank(solve):
    change = product(solve("gradient_step", WEIGHT, (ROWS, GRADIENTS), RANK).factors(RANK))
    expected = -best_rank(MEAN_GRADIENT, RANK)
    assert relative_error(change / change.norm(), expected / expected.norm()) < 1e-4


def test_scores_are_the_shares_of_the_whitened_gradient(solve):
    scores = solve("gradient_whitened", WEIGHT, (ROWS, GRADIENTS), RANK).scores
    values = torch.linalg.svdvals(MEAN_GRADIENT @ symmetric_power(ridged(ROWS, 0.1), -0.5)).square()
    assert relative_error(scores, (values / values.sum())[: len(scores)]) < 1e-4


def test_the_three_kinds_of_directions_differ(solve):
    found = [
        solve("gradient_step", WEIGHT, (ROWS, GRADIENTS), RANK, directions=directions).factors(RANK).lora_A
        for directions in ("inputs", "gradient", "whitened_gradient")
    ]
    for index in range(3):
        assert largest_principal_angle(found[index], found[index - 1]) > 0.1
