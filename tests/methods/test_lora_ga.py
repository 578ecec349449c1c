"""LoRA-GA against the paper's formulas (arXiv:2407.05000) in float64, and by really taking its first step."""

from __future__ import annotations

import pytest
import torch
from core_fixtures import draw_weight, largest_principal_angle, product, relative_error
from torch import Tensor, nn

from lorainit_diffusers import initialize, trainable_parameters
from lorainit_diffusers.methods.lora_ga import LoraGA

SHAPES = [(24, 16), (16, 24), (20, 20)]
RANK = 4


def gradients(shape: tuple[int, int], count: int = 3) -> list[Tensor]:
    return [1e-3 * (draw_weight(*shape, seed=11) + 0.1 * draw_weight(*shape, seed=20 + i)) for i in range(count)]


def oracle(parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(torch.stack([part.double() for part in parts]).mean(0), full_matrices=False)


def scale_factor(scale: str, out_features: int, scaling: float, gamma: float) -> float:
    return {"stable": out_features**0.25 / gamma**0.5, "gd": 1 / scaling, "unit": 1.0}[scale]


def assert_rows(actual: Tensor, expected: Tensor, factor: float) -> None:
    """Rows equal `factor` times the expected unit directions, each up to sign."""
    cosines = (actual.double() * expected).sum(1) / factor
    torch.testing.assert_close(cosines.abs(), torch.ones_like(cosines), atol=1e-5, rtol=0)
    norms = actual.double().norm(dim=1)
    torch.testing.assert_close(norms, torch.full_like(norms, factor), atol=0, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize(("scale", "gamma"), [("stable", 16.0), ("stable", 64.0), ("gd", 16.0), ("unit", 16.0)])
@pytest.mark.parametrize("scaling", [1.0, 0.25])
def test_directions_and_scales_are_the_papers(solve, shape, direction, scale, gamma, scaling):
    parts = gradients(shape)
    options = {"direction": direction, "scale": scale, "gamma": gamma}
    factors = solve("lora_ga", draw_weight(*shape), parts, RANK, scaling=scaling, **options).factors(RANK)
    left, _, right = oracle(parts)
    first, second = torch.arange(RANK), torch.arange(RANK, 2 * RANK)
    for_A, for_B = {
        "ArB2r": (first, second),
        "A2rBr": (second, first),
        "ArBr": (torch.arange(1, 2 * RANK, 2), torch.arange(0, 2 * RANK, 2)),
    }[direction]
    factor = scale_factor(scale, shape[0], scaling, gamma)
    assert_rows(factors.lora_A, right[for_A], factor)
    assert_rows(factors.lora_B.mT, left[:, for_B].mT, factor)


def test_the_default_is_the_papers():
    assert LoraGA() == LoraGA(direction="ArB2r", scale="stable", gamma=4.0)
    assert LoraGA().step_zero == "offset"


@pytest.mark.parametrize("seed", range(4))
def test_random_takes_disjoint_halves_of_the_first_2r(solve, seed):
    shape, parts = (24, 16), gradients((24, 16))
    solution = solve("lora_ga", draw_weight(*shape), parts, RANK, direction="random", scale="unit", seed=seed)
    factors = solution.factors(RANK)
    left, _, right = oracle(parts)
    from_A = (factors.lora_A.double() @ right.mT).abs().argmax(1)
    from_B = (factors.lora_B.mT.double() @ left).abs().argmax(1)
    assert sorted([*from_A.tolist(), *from_B.tolist()]) == list(range(2 * RANK))
    assert_rows(factors.lora_A, right[from_A], 1.0)
    assert_rows(factors.lora_B.mT, left[:, from_B].mT, 1.0)


def test_a_smaller_rank_takes_its_own_2r(solve):
    """After rank allocation B must continue where this rank's A ends, not where the largest rank's would."""
    shape, parts = (24, 16), gradients((24, 16))
    factors = solve("lora_ga", draw_weight(*shape), parts, 6, scale="unit").factors(2)
    left, _, right = oracle(parts)
    assert_rows(factors.lora_A, right[:2], 1.0)
    assert_rows(factors.lora_B.mT, left[:, 2:4].mT, 1.0)


def test_scores_are_shares_of_the_gradients_energy(solve):
    parts = gradients((24, 16))
    scores = solve("lora_ga", draw_weight(24, 16), parts, RANK).scores
    values = oracle(parts)[1]
    torch.testing.assert_close(scores[:RANK].double(), values[:RANK] ** 2 / values.square().sum(), rtol=1e-5, atol=0)


def test_a_rank_without_2r_directions_is_refused():
    with pytest.raises(ValueError, match=r"2 \* rank = 18 exceeds .* 16 .*use rank 8 or less"):
        LoraGA().statistic(16, 24, 9)
    assert LoraGA().statistic(16, 24, 8) is not None


# --- the first step -------------------------------------------------------------------------------------------------


class OneLayer(nn.Module):
    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.linear = nn.Linear(shape[1], shape[0], bias=False)
        self.linear.weight.data.copy_(draw_weight(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def weight_change_of_the_first_step(
    method: LoraGA, shape: tuple[int, int], rank: int, alpha: float, learning_rate: float
) -> tuple[Tensor, Tensor]:
    """(change of the effective weight in one SGD step on A and B, the full gradient at the start)."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, shape[1], generator=generator)
    target = x @ draw_weight(*shape, seed=9).mT
    module = OneLayer(shape)

    def loss_fn(batch: tuple[Tensor, Tensor]) -> Tensor:
        return (module(batch[0]) - batch[1]).square().mean()

    (gradient,) = torch.autograd.grad(loss_fn((x, target)), [module.linear.weight])
    initialize(
        module, method, [(x, target)], loss_fn, rank=rank, alpha=alpha, target_modules=["linear"], progress=False
    )

    def effective_weight() -> Tensor:
        return module(torch.eye(shape[1])).mT.detach().double()

    assert relative_error(effective_weight(), module.linear.get_base_layer().weight.detach()) < 1e-6  # offset
    layer = module.linear
    before = product((layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()))
    optimizer = torch.optim.SGD(trainable_parameters(module), lr=learning_rate)
    loss_fn((x, target)).backward()
    optimizer.step()
    after = product((layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()))
    return alpha / rank * (after - before), gradient.double()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("scale", ["stable", "gd", "unit"])
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
def test_the_first_sgd_step_has_the_cosine_of_the_theory(shape, rank, scale, direction):
    """dW = -lr s^2 (B B' G + G A' A) = -lr s^2 f^2 sum_{i <= 2r} sigma_i u_i v_i': the best rank-2r part of G.

    So the cosine with -G is sqrt(sum_{i <= 2r} sigma_i^2 / sum_i sigma_i^2), for every disjoint choice of directions.
    """
    alpha = 2.0 * rank
    method = LoraGA(direction=direction, scale=scale, gamma=16.0)
    change, gradient = weight_change_of_the_first_step(method, shape, rank, alpha, learning_rate=1e-3)
    left, values, right = torch.linalg.svd(gradient, full_matrices=False)
    cosine = float(-(change * gradient).sum() / change.norm() / gradient.norm())
    expected = float((values[: 2 * rank].square().sum() / values.square().sum()).sqrt())
    assert expected < 0.99  # the theory is put to the test: more than 2r directions matter
    assert cosine == pytest.approx(expected, abs=2e-4)
    # Not only the angle: direction and size of the step.
    factor = scale_factor(scale, shape[0], alpha / rank, 16.0)
    best = left[:, : 2 * rank] * values[: 2 * rank] @ right[: 2 * rank]
    assert relative_error(change, -1e-3 * (alpha / rank * factor) ** 2 * best) < 5e-3


def test_gd_scale_makes_the_first_step_the_full_gradients_best_rank_2r_part():
    change, gradient = weight_change_of_the_first_step(LoraGA(scale="gd"), (24, 16), 8, 12.0, learning_rate=1e-3)
    # 2r = 16 directions are all that a (24, 16) gradient has: the step is full fine-tuning's.
    assert relative_error(change, -1e-3 * gradient) < 5e-3


def test_the_row_space_of_the_change_is_that_of_the_gradient():
    change, gradient = weight_change_of_the_first_step(LoraGA(), (20, 20), 3, 3.0, learning_rate=1e-3)
    rows = torch.linalg.svd(gradient).Vh[:6]
    assert largest_principal_angle(torch.linalg.svd(change).Vh[:6], rows) < 2e-2
