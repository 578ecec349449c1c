"""Layers too wide for a full decomposition: every method against its formula in float64."""

from __future__ import annotations

import pytest
import torch
from core_fixtures import best_rank, draw_weight, product, relative_error, rows_with_spectrum
from torch import Tensor

from lorainit_diffusers.linalg import is_exact
from lorainit_diffusers.methods import cntlora

RANK = 6
# The last one's moment is kept in float64, and products with its weight are in float32.
SHAPES = [(480, 480), (420, 640), (640, 420), (800, 400)]
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)


def inputs(width: int, mean: float) -> Tensor:
    return rows_with_spectrum(1000, [0.96**index for index in range(width)], mean=mean)


def ridged(rows: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """S and S plus the ridge, float64."""
    moment = rows.double().mT @ rows.double() / len(rows)
    return moment, moment + ridge * moment.trace() / len(moment) * torch.eye(len(moment), dtype=torch.float64)


@EVERY_SHAPE
@pytest.mark.parametrize("mean", [0.0, 5.0])
@pytest.mark.parametrize("truncation", ["activation", "weight"])
def test_cntlora_is_its_closed_form(solve, monkeypatch, shape, mean, truncation):
    assert not is_exact(min(shape), RANK)
    monkeypatch.setattr(cntlora.CNTLoRA, "_solve_in_eigenbasis", None)  # it must not be needed here
    weight, rows = draw_weight(*shape), inputs(shape[1], mean)
    moment, full = ridged(rows, 0.1)
    identity = torch.eye(shape[1], dtype=torch.float64)
    factor = torch.linalg.cholesky(full) if truncation == "activation" else identity
    change = -weight.double() @ moment @ torch.linalg.inv(full) @ factor
    left, singular, right = torch.linalg.svd(change, full_matrices=False)
    energy = singular.square()
    for gauge in ("whitened", "activation", "balanced"):
        solution = solve("cntlora", weight, rows, RANK, scaling=0.5, gauge=gauge, truncation=truncation)
        torch.testing.assert_close(solution.scores.double(), energy[:RANK] / energy.sum(), rtol=0.05, atol=0)
        for rank in (3, RANK):
            factors = solution.factors(rank)
            wanted = left[:, :rank] * singular[:rank] @ right[:rank] @ torch.linalg.inv(factor)
            assert relative_error(product(factors, 0.5), wanted) < 1e-3
            lora_A, lora_B = factors.lora_A.double(), factors.lora_B.double()
            assert float(lora_A.norm() / lora_B.norm()) == pytest.approx(1.0, rel=1e-4)
            # hidden activations: uncorrelated in the metric of the gauge, of equal variance when whitened
            hidden = lora_A @ (identity if gauge == "balanced" else full) @ lora_A.mT
            variances = hidden.diagonal()
            assert float((hidden - torch.diag(variances)).norm() / hidden.norm()) < 1e-3
            if gauge == "whitened":
                assert float(variances.max() / variances.min()) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("num_rows", [20, 120, 230])
@pytest.mark.parametrize("shape", [(480, 480), (300, 640), (1100, 480)], ids=str)
@pytest.mark.parametrize("name", ["cntlora", "corda", "eva"])
def test_of_few_rows_nothing_is_lost(solve, name, shape, num_rows):
    """Fewer than half as many rows as features: they are kept as rows, and the moment is singular."""
    weight, rows = draw_weight(*shape), inputs(shape[1], 3.0)[:num_rows]
    moment, full = ridged(rows, 0.01 if name == "corda" else 0.1)
    factors = solve(name, weight, rows, RANK).factors(RANK)
    if name == "eva":
        centred = rows.double() - rows.double().mean(0)
        wanted = torch.linalg.eigh(centred.mT @ centred).eigenvectors[:, -RANK:]
        found = factors.lora_A.double()
        assert relative_error(found.mT @ found, wanted @ wanted.mT) < 1e-3
    elif name == "corda":
        wanted = best_rank(weight.double() @ full, RANK) @ torch.linalg.inv(full)
        assert relative_error(product(factors), wanted) < 1e-3
    else:
        factor = torch.linalg.cholesky(full)
        change = -weight.double() @ moment @ torch.linalg.inv(full)
        wanted = best_rank(change @ factor, RANK) @ torch.linalg.inv(factor)
        assert relative_error(product(factors), wanted) < 1e-3


@pytest.mark.parametrize("name", ["cntlora", "corda"])
def test_a_weight_of_less_than_the_rank_falls_back_to_the_eigenbasis(solve, name):
    weight = draw_weight(480, 3) @ draw_weight(3, 480, seed=1)
    factors = solve(name, weight, inputs(480, 1.0), RANK).factors(RANK)
    moment, full = ridged(inputs(480, 1.0), 0.01 if name == "corda" else 0.1)
    wanted = weight.double() if name == "corda" else -weight.double() @ moment @ torch.linalg.inv(full)
    assert relative_error(product(factors), wanted) < 1e-3


def test_cntlora_takes_the_eigenbasis_where_the_spectrum_is_too_flat(solve):
    weight, rows = draw_weight(480, 480), torch.randn(4000, 480, generator=torch.Generator().manual_seed(0))
    moment, full = ridged(rows, 0.1)
    factor = torch.linalg.cholesky(full)
    change = -weight.double() @ moment @ torch.linalg.inv(full)
    wanted = best_rank(change @ factor, RANK) @ torch.linalg.inv(factor)
    assert relative_error(product(solve("cntlora", weight, rows, RANK).factors(RANK)), wanted) < 1e-3


@EVERY_SHAPE
@pytest.mark.parametrize("mean", [0.0, 5.0])
def test_corda_is_its_formula(solve, shape, mean):
    weight, rows = draw_weight(*shape), inputs(shape[1], mean)
    solution = solve("corda", weight, rows, RANK)
    _, full = ridged(rows, 0.01)
    wanted = best_rank(weight.double() @ full, RANK) @ torch.linalg.inv(full)
    assert relative_error(product(solution.factors(RANK)), wanted) < 1e-3
    energy = torch.linalg.svdvals(weight.double() @ full).square()
    torch.testing.assert_close(solution.scores.double(), energy[:RANK] / energy.sum(), rtol=0.05, atol=0)


@EVERY_SHAPE
@pytest.mark.parametrize("directions", ["inputs", "gradient", "whitened_gradient"])
def test_gradient_step_is_its_formula(solve, shape, directions):
    weight, rows, gradient = draw_weight(*shape), inputs(shape[1], 0.5), draw_weight(*shape, seed=5)
    # a gradient is much steeper than random numbers
    left, values, right = torch.linalg.svd(gradient, full_matrices=False)
    gradient = left * (values[0] * 0.9 ** torch.arange(len(values))) @ right
    solution = solve("gradient_step", weight, (rows, [gradient]), RANK, scaling=0.5, directions=directions, step=0.1)
    lora_A, lora_B = (factor.double() for factor in solution.factors(RANK))
    moment, full = ridged(rows, 0.1)
    if directions == "inputs":
        centred = rows.double() - rows.double().mean(0)
        wanted = torch.linalg.eigh(centred.mT @ centred).eigenvectors[:, -RANK:].mT
    elif directions == "gradient":
        wanted = torch.linalg.svd(gradient.double()).Vh[:RANK]
    else:
        whitening = torch.linalg.inv(torch.linalg.cholesky(full)).mT
        wanted = torch.linalg.svd(gradient.double() @ whitening).Vh[:RANK] @ whitening.mT
    rows_found, rows_wanted = (torch.linalg.qr(matrix.mT).Q for matrix in (lora_A, wanted))
    assert relative_error(rows_found @ rows_found.mT, rows_wanted @ rows_wanted.mT) < 1e-3
    descent = -gradient.double() @ lora_A.mT
    assert relative_error(lora_B / lora_B.norm(), descent / descent.norm()) < 1e-5

    def output_norm(matrix: Tensor) -> float:
        return float((matrix @ moment * matrix).sum().sqrt())

    assert 0.5 * output_norm(lora_B @ lora_A) / output_norm(weight.double()) == pytest.approx(0.1, rel=1e-4)
