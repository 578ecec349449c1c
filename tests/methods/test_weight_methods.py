"""Weight-only and random methods, and CorDA, against float64 SVDs, PEFT's own and the stated distributions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from core_fixtures import best_rank, draw_weight, product, relative_error, ridged, rows_with_spectrum
from peft import LoraConfig, get_peft_model
from torch import nn

SHAPES = [(24, 16), (16, 24), (20, 20)]
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES)
EVERY_SCALING = pytest.mark.parametrize("scaling", [1.0, 0.25, 2.0])


@EVERY_SHAPE
@EVERY_SCALING
def test_pissa_is_the_best_rank_r_approximation_split_evenly(solve, shape, scaling):
    weight = draw_weight(*shape)
    solution = solve("pissa", weight, max_rank=6, scaling=scaling)
    for rank in (1, 4, 6):
        factors = solution.factors(rank)
        assert relative_error(product(factors, scaling), best_rank(weight, rank)) < 1e-6
        values = torch.linalg.svdvals(weight.double())[:rank] / scaling
        for gram in (factors.lora_A @ factors.lora_A.mT, factors.lora_B.mT @ factors.lora_B):
            torch.testing.assert_close(gram.double(), torch.diag(values), atol=1e-6, rtol=1e-5)
    values = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(solution.scores.numpy()[:6], values[:6] ** 2 / (values**2).sum(), rtol=1e-6)


@EVERY_SHAPE
@EVERY_SCALING
def test_milora_is_the_bottom_of_the_spectrum(solve, shape, scaling):
    weight = draw_weight(*shape)
    factors = solve("milora", weight, max_rank=6, scaling=scaling).factors(4)
    size = min(shape)
    expected = weight.double() - best_rank(weight, size - 4)
    assert relative_error(product(factors, scaling), expected) < 1e-5
    values = torch.linalg.svdvals(weight.double())[-4:] / scaling
    for gram in (factors.lora_A @ factors.lora_A.mT, factors.lora_B.mT @ factors.lora_B):
        torch.testing.assert_close(torch.linalg.svdvals(gram.double()), values, atol=1e-6, rtol=1e-5)


@EVERY_SHAPE
def test_olora_is_the_qr_factorisation(solve, shape):
    weight = draw_weight(*shape)
    factors = solve("olora", weight, max_rank=6, scaling=0.5).factors(4)
    basis = np.linalg.qr(weight.double().numpy())[0][:, :4]
    expected = torch.from_numpy(basis @ basis.T) @ weight.double()
    assert relative_error(product(factors), expected) < 1e-6
    torch.testing.assert_close(factors.lora_B.mT @ factors.lora_B, torch.eye(4), atol=1e-6, rtol=0)
    assert float(factors.lora_A[:, :4].tril(-1).abs().max()) == 0.0  # the head of R


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_what_is_taken_from_the_base_is_what_peft_takes(solve, name):
    weight = draw_weight(24, 16)
    base = nn.Sequential(nn.Linear(16, 24, bias=False))
    base[0].weight.data.copy_(weight)
    # alpha != r: PEFT folds or does not fold the scaling, and so must we
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=name)
    theirs = get_peft_model(base, config).base_model.model[0]
    ours = solve(name, weight, scaling=1.5).factors(4)
    taken = weight - theirs.get_base_layer().weight.detach()
    assert relative_error(product(ours, 1.5), taken) < 1e-5
    their_product = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    assert relative_error(product(ours), their_product.detach()) < 1e-5


@EVERY_SHAPE
@EVERY_SCALING
@pytest.mark.parametrize("ridge", [0.01, 0.3])
def test_corda_is_the_context_oriented_decomposition(solve, shape, scaling, ridge):
    weight = draw_weight(*shape)
    rows = rows_with_spectrum(300, [0.8**index for index in range(shape[1])], mean=0.4)
    solution = solve("corda", weight, rows, max_rank=6, scaling=scaling, ridge=ridge)
    moment = ridged(rows, ridge)
    for rank in (2, 5):
        factors = solution.factors(rank)
        expected = best_rank(weight.double() @ moment, rank) @ torch.linalg.inv(moment)
        assert relative_error(product(factors, scaling), expected) < 1e-5
        # B = U sqrt(S): its Gram matrix is the diagonal of the singular values.
        values = torch.linalg.svdvals(weight.double() @ moment)[:rank] / scaling
        torch.testing.assert_close(
            factors.lora_B.double().mT @ factors.lora_B.double(), torch.diag(values), atol=1e-5, rtol=1e-4
        )
    values = torch.linalg.svdvals(weight.double() @ moment)
    torch.testing.assert_close(solution.scores[:6], values[:6] ** 2 / values.square().sum(), atol=1e-7, rtol=1e-5)


def test_corda_with_a_large_ridge_is_pissa_and_with_a_small_one_is_not(solve):
    weight, rows = draw_weight(24, 16), rows_with_spectrum(300, [0.6**index for index in range(16)])
    pissa = product(solve("pissa", weight).factors(4))
    assert relative_error(product(solve("corda", weight, rows, ridge=1e6).factors(4)), pissa) < 1e-4
    assert relative_error(product(solve("corda", weight, rows).factors(4)), pissa) > 0.1


def draws(solve, name: str, shape: tuple[int, int], rank: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    factors = [solve(name, torch.zeros(shape), max_rank=rank, seed=seed).factors(rank) for seed in range(count)]
    return torch.stack([f.lora_A for f in factors]), torch.stack([f.lora_B for f in factors])


@pytest.mark.parametrize("rank", [2, 8])
def test_gaussian_has_deviation_one_over_rank(solve, rank):
    lora_A, lora_B = draws(solve, "gaussian", (40, 64), rank, 100)
    assert float(lora_A.std()) == pytest.approx(1 / rank, rel=0.02)
    assert abs(float(lora_A.mean())) < 0.02 / rank
    assert float((lora_A * rank).pow(4).mean()) == pytest.approx(3.0, rel=0.1)  # a normal's kurtosis
    assert float(lora_B.abs().max()) == 0.0


def test_kaiming_is_pefts_default(solve):
    lora_A, lora_B = draws(solve, "kaiming", (40, 48), 8, 100)
    reference = torch.empty(100 * 8, 48)
    torch.nn.init.kaiming_uniform_(reference, a=5**0.5, generator=torch.Generator().manual_seed(0))
    bound = 48**-0.5  # uniform in +-1/sqrt(in_features)
    assert float(lora_A.abs().max()) <= bound
    assert float(lora_A.abs().max()) > 0.999 * bound
    assert float(lora_A.std()) == pytest.approx(float(reference.std()), rel=0.02)
    assert float(lora_A.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    assert float(lora_B.abs().max()) == 0.0


def test_orthonormal_has_orthonormal_rows_in_uniform_directions(solve):
    lora_A, lora_B = draws(solve, "orthonormal", (40, 24), 6, 400)
    torch.testing.assert_close(lora_A @ lora_A.mT, torch.eye(6).expand(400, 6, 6), atol=1e-5, rtol=0)
    # A uniform subspace: the mean projector is r/d times the identity.
    projector = (lora_A.mT @ lora_A).mean(0)
    assert float((projector - 6 / 24 * torch.eye(24)).abs().max()) < 0.06
    assert float(lora_A.mean(0).abs().max()) < 0.06
    assert float(lora_B.abs().max()) == 0.0


def test_orthogonal_has_two_non_zero_factors_whose_product_is_zero(solve):
    lora_A, lora_B = draws(solve, "orthogonal", (40, 24), 6, 200)
    assert float((lora_B @ lora_A).abs().max()) < 1e-6
    for factor in (lora_A[0], lora_B[0]):
        assert int(torch.linalg.matrix_rank(factor, rtol=1e-4)) == 3  # each lives in half of the rank's space
    # Entries of N(0, 1)/10 in r/2 of r orthonormal directions.
    assert float(lora_A.square().sum((1, 2)).mean()) == pytest.approx(24 * 3 / 100, rel=0.05)
    assert float(lora_B.square().sum((1, 2)).mean()) == pytest.approx(40 * 3 / 100, rel=0.05)


def test_orthogonal_matches_pefts_in_distribution(solve):
    config = LoraConfig(r=6, target_modules=["0"], init_lora_weights="orthogonal")
    norms = []
    for seed in range(40):
        torch.manual_seed(seed)
        layer = get_peft_model(nn.Sequential(nn.Linear(24, 40, bias=False)), config).base_model.model[0]
        lora_A, lora_B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        assert float((lora_B @ lora_A).abs().max()) < 1e-6
        norms.append([float(lora_A.norm()), float(lora_B.norm())])
    ours_A, ours_B = draws(solve, "orthogonal", (40, 24), 6, 40)
    theirs = np.mean(norms, axis=0)
    ours = [float(ours_A.norm(dim=(1, 2)).mean()), float(ours_B.norm(dim=(1, 2)).mean())]
    np.testing.assert_allclose(ours, theirs, rtol=0.1)


def test_orthogonal_needs_an_even_rank(solve):
    with pytest.raises(ValueError, match="rank 3"):
        solve("orthogonal", torch.zeros(8, 8), max_rank=3)
