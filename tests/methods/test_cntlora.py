"""CNTLoRA: the constraints of its derivation, numerically, in float64 from all rows."""

from __future__ import annotations

import math
from collections.abc import Callable

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
    second_moment_of,
    symmetric_power,
)
from torch import Tensor, nn

from lorainit_diffusers.methods import Solution
from lorainit_diffusers.methods.cntlora import CNTLoRA
from lorainit_diffusers.statistics import InputsAndReference, SecondMoment

IN = 12
SHAPES = [(8, IN), (IN, IN), (20, IN)]
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES)
EVERY_CONSTRAINT = pytest.mark.parametrize("constraint", ["alignment", "decorrelation"])
EVERY_TRUNCATION = pytest.mark.parametrize("truncation", ["activation", "weight"])
GAUGES = ["whitened", "activation", "balanced"]
EVERY_GAUGE = pytest.mark.parametrize("gauge", GAUGES)
RANK = 4


@pytest.fixture
def solve(solve: Callable[..., Solution]) -> Callable[..., Solution]:
    """The folder's, with alignment in the whitened gauge where a test does not say otherwise: defaults may change."""
    return lambda name, *args, **options: solve(
        name, *args, **{"constraint": "alignment", "gauge": "whitened", **options}
    )


def inputs(mean: float = 0.4) -> Tensor:
    return rows_with_spectrum(400, [0.8**index for index in range(IN)], mean=mean)


def full_change(solve, weight: Tensor, rows: Tensor | tuple[Tensor, Tensor], **options) -> Tensor:
    """D itself: B A at full rank."""
    rank = min(weight.shape)
    factors = solve("cntlora", weight, rows, rank, scaling=0.5, **options).factors(rank)
    return product(factors, 0.5)


def expected_change(weight: Tensor, rows: Tensor, constraint: str, ridge: float = 0.1) -> Tensor:
    """D by the formulas of the derivation, with explicit matrix functions."""
    weight, moment = weight.double(), ridged(rows, ridge)
    if constraint == "alignment":
        scale = (moment.trace() / len(moment)).sqrt()
        return weight @ (scale * symmetric_power(moment, -0.5) - torch.eye(len(moment), dtype=torch.float64))
    return -weight @ second_moment_of(rows) @ torch.linalg.inv(moment)


# --- the constraints ------------------------------------------------------------------------------------------------


@EVERY_SHAPE
def test_alignment_gives_the_data_the_output_moment_of_isotropic_inputs(solve, shape):
    weight, rows = draw_weight(*shape), inputs()
    adapted = weight.double() + full_change(solve, weight, rows)
    moment = ridged(rows, 0.1)
    c_squared = moment.trace() / IN
    wanted = c_squared * weight.double() @ weight.double().mT
    assert relative_error(adapted @ moment @ adapted.mT, wanted) < 1e-5
    assert relative_error(weight.double() @ moment @ weight.double().mT, wanted) > 0.3  # the base does not


def test_alignment_without_a_ridge_holds_for_the_rows_themselves(solve):
    weight, rows = draw_weight(8, IN), inputs()
    outputs = rows.double() @ (weight.double() + full_change(solve, weight, rows, ridge=0.0)).mT
    wanted = second_moment_of(rows).trace() / IN * weight.double() @ weight.double().mT
    assert relative_error(outputs.mT @ outputs / len(rows), wanted) < 1e-4


def test_the_alignment_is_the_optimal_transport_map(solve):
    """W0 + D = W0 T with T symmetric positive definite and T S T = c^2 I: there is one such T (Brenier)."""
    weight, rows = draw_weight(IN, IN), inputs()
    transport = torch.linalg.solve(weight.double(), weight.double() + full_change(solve, weight, rows))
    assert relative_error(transport.mT, transport) < 1e-4
    assert float(torch.linalg.eigvalsh((transport + transport.mT) / 2).min()) > 0.1
    moment = ridged(rows, 0.1)
    wanted = moment.trace() / IN * torch.eye(IN, dtype=torch.float64)
    assert relative_error(transport @ moment @ transport.mT, wanted) < 1e-4


def test_the_alignment_displaces_the_inputs_least(solve):
    """Every Q T with orthogonal Q meets the constraint on the inputs; none moves them less than T."""
    weight, rows = draw_weight(IN, IN), inputs()
    transport = torch.linalg.solve(weight.double(), weight.double() + full_change(solve, weight, rows))
    root = symmetric_power(ridged(rows, 0.1), 0.5)
    least = ((transport - torch.eye(IN)) @ root).norm()
    generator = torch.Generator().manual_seed(0)
    for size in (0.01, 0.1, 1.0, 1.0, 1.0):
        skew = torch.randn(IN, IN, generator=generator, dtype=torch.float64) * size
        rotation = torch.linalg.matrix_exp(skew - skew.mT)
        assert ((rotation @ transport - torch.eye(IN)) @ root).norm() > least


@EVERY_CONSTRAINT
@EVERY_SHAPE
@pytest.mark.parametrize("ridge", [0.01, 0.1, 1.0])
def test_the_change_is_the_closed_form(solve, shape, constraint, ridge):
    weight, rows = draw_weight(*shape), inputs()
    change = full_change(solve, weight, rows, constraint=constraint, ridge=ridge)
    assert relative_error(change, expected_change(weight, rows, constraint, ridge)) < 1e-5


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_isotropic_inputs_need_no_alignment(solve, ridge):
    """Rows whose second moment is exactly a multiple of the identity: D = 0."""
    rows = 3.0 * torch.eye(IN).repeat(5, 1)
    weight = draw_weight(8, IN)
    assert float(full_change(solve, weight, rows, ridge=ridge).norm()) < 1e-6 * float(weight.norm())


def test_decorrelation_leaves_less_correlation_the_smaller_the_ridge(solve):
    """(W0 + D) X = W0 X_p with X_p X' = 0: the adapted outputs no longer correlate with the inputs."""
    weight, rows = draw_weight(8, IN), inputs()
    moment = second_moment_of(rows)
    left = []
    for ridge in (1.0, 0.1, 0.01, 1e-3):
        change = full_change(solve, weight, rows, constraint="decorrelation", ridge=ridge)
        left.append(float(((weight.double() + change) @ moment).norm() / (weight.double() @ moment).norm()))
    assert left == sorted(left, reverse=True)
    assert left[0] > 0.1
    assert left[-1] < 2e-3


def test_decorrelation_without_a_ridge_takes_out_the_principal_outputs(solve):
    """lambda -> 0 with activation truncation: D_r = -U U' W0, U the top eigenvectors of W0 S W0'."""
    weight, rows = draw_weight(8, IN), inputs()
    solution = solve("cntlora", weight, rows, RANK, constraint="decorrelation", ridge=0.0)
    change = product(solution.factors(RANK))
    _, vectors = torch.linalg.eigh(weight.double() @ second_moment_of(rows) @ weight.double().mT)
    top = vectors[:, -RANK:]
    assert relative_error(change, -top @ top.mT @ weight.double()) < 1e-4


def test_decorrelation_with_a_large_ridge_takes_the_directions_of_the_weighted_weight(solve):
    """lambda -> infinity: the row space is that of the leading right-singular vectors of W0 S."""
    weight, rows = draw_weight(8, IN), inputs()
    lora_A = solve("cntlora", weight, rows, RANK, constraint="decorrelation", ridge=1e5).factors(RANK).lora_A
    right = torch.linalg.svd(weight.double() @ second_moment_of(rows)).Vh[:RANK]
    assert largest_principal_angle(lora_A, right) < 1e-3


def test_eigenvalues_are_floored(solve):
    """Rows in a subspace and no ridge: directions without data are floored at 1e-4 of the mean, not inverted."""
    rows = inputs()
    basis = torch.linalg.qr(torch.randn(IN, IN, generator=torch.Generator().manual_seed(0))).Q
    rows = (rows @ basis)[:, :5] @ basis[:, :5].mT
    weight = draw_weight(8, IN)
    change = full_change(solve, weight, rows, ridge=0.0)
    moment = second_moment_of(rows)
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(1e-4 * moment.trace() / IN)
    factors = (values.mean() / values).sqrt() - 1
    assert relative_error(change, weight.double() @ (vectors * factors @ vectors.mT)) < 1e-3
    assert float(factors.max()) < 110


# --- measured pre-training inputs -----------------------------------------------------------------------------------


def references(mean: float = -0.2) -> Tensor:
    return rows_with_spectrum(300, [0.9**index for index in range(IN)], mean=mean, seed=1)


def transport_of(moment: Tensor, wanted: Tensor) -> Tensor:
    """The optimal-transport map from N(0, moment) to N(0, wanted)."""
    root, inverse = symmetric_power(moment, 0.5), symmetric_power(moment, -0.5)
    return inverse @ symmetric_power(root @ wanted @ root, 0.5) @ inverse


def floored(rows: Tensor) -> Tensor:
    """X'X/n with its eigenvalues floored at 1e-4 of their mean."""
    values, vectors = torch.linalg.eigh(second_moment_of(rows))
    return vectors * values.clamp_min(1e-4 * values.mean()) @ vectors.mT


def in_a_subspace(rows: Tensor, dimension: int, seed: int = 0) -> Tensor:
    basis = torch.linalg.qr(torch.randn(IN, IN, generator=torch.Generator().manual_seed(seed))).Q[:, :dimension]
    return rows @ basis @ basis.mT


@EVERY_SHAPE
@pytest.mark.parametrize("ridge", [0.01, 0.1, 1.0])
def test_measured_alignment_is_the_closed_form_and_gives_the_data_the_output_moment_of_the_reference(
    solve, shape, ridge
):
    weight, rows, reference = draw_weight(*shape), inputs(), references()
    change = full_change(solve, weight, (rows, reference), pretraining="measured", ridge=ridge)
    moment, wanted = ridged(rows, ridge), ridged(reference, ridge)
    weight = weight.double()
    assert relative_error(weight + change, weight @ transport_of(moment, wanted)) < 1e-5
    outputs = weight @ wanted @ weight.mT
    assert relative_error((weight + change) @ moment @ (weight + change).mT, outputs) < 1e-5
    assert relative_error(weight @ moment @ weight.mT, outputs) > 0.1  # the base does not


def test_the_measured_alignment_is_the_optimal_transport_map(solve):
    """T is symmetric and positive definite: of all maps with T S_l T' = S_pl there is one such (Brenier)."""
    weight = draw_weight(IN, IN)
    change = full_change(solve, weight, (inputs(), references()), pretraining="measured")
    transport = torch.linalg.solve(weight.double(), weight.double() + change)
    assert relative_error(transport.mT, transport) < 1e-4
    assert float(torch.linalg.eigvalsh((transport + transport.mT) / 2).min()) > 0.1


@pytest.mark.parametrize("ridge", [0.0, 0.1])
@pytest.mark.parametrize("dimension", [IN, 5])  # 5: most directions are floored where there is no ridge
def test_a_reference_equal_to_the_inputs_needs_no_alignment(solve, ridge, dimension):
    weight, rows = draw_weight(8, IN), in_a_subspace(inputs(), dimension)
    change = full_change(solve, weight, (rows, rows.flip(0)), pretraining="measured", ridge=ridge)
    assert float(change.norm()) < 1e-4 * float(weight.norm())


@pytest.mark.parametrize("ridge", [0.0, 0.1])
@pytest.mark.parametrize("relative", [1.0, 0.3])
def test_an_isotropic_reference_is_the_isotropic_solution_up_to_its_size(solve, ridge, relative):
    """S_p = c^2 I with c^2 = relative^2 times the mean eigenvalue of S: W0 + D scales along."""
    weight, rows = draw_weight(8, IN), inputs()
    size = relative * (second_moment_of(rows).trace() / IN).sqrt()
    reference = (size * IN**0.5 * torch.eye(IN)).float()  # X'X/n over IN rows: size^2 I
    isotropic = full_change(solve, weight, rows, ridge=ridge)
    measured = full_change(solve, weight, (rows, reference), pretraining="measured", ridge=ridge)
    weight = weight.double()
    assert relative_error(weight + measured, relative * (weight + isotropic)) < 1e-5


@pytest.mark.parametrize(("of_inputs", "of_reference"), [(IN, 5), (5, IN), (5, 7)])
def test_eigenvalues_of_either_moment_are_floored(solve, of_inputs, of_reference):
    weight = draw_weight(8, IN)
    rows, reference = in_a_subspace(inputs(), of_inputs), in_a_subspace(references(), of_reference, seed=1)
    change = full_change(solve, weight, (rows, reference), pretraining="measured", ridge=0.0)
    weight = weight.double()
    assert relative_error(weight + change, weight @ transport_of(floored(rows), floored(reference))) < 1e-3


@EVERY_GAUGE
@pytest.mark.parametrize("scale", ["paper", "matched"])
def test_measured_alignment_is_truncated_and_factored_as_the_isotropic_one_is(solve, gauge, scale):
    weight, rows, reference = draw_weight(20, IN), inputs(), references()
    options = {"pretraining": "measured", "gauge": gauge, "scale": scale}
    transport = transport_of(ridged(rows, 0.1), ridged(reference, 0.1))
    change = weight.double() @ (transport - torch.eye(IN, dtype=torch.float64))
    root = symmetric_power(ridged(rows, 0.1), 0.5)
    solution = solve("cntlora", weight, (rows, reference), RANK, scaling=0.25, **options)
    expected = best_rank(change @ root, RANK) @ torch.linalg.inv(root)
    assert relative_error(product(solution.factors(RANK), 0.25), expected) < 1e-5
    values = torch.linalg.svdvals(change @ root)
    torch.testing.assert_close(solution.scores, values[:RANK] ** 2 / values.square().sum(), atol=1e-6, rtol=1e-4)
    plain = solve("cntlora", weight, (rows, reference), RANK, truncation="weight", **options).factors(RANK)
    assert relative_error(product(plain), best_rank(change, RANK)) < 1e-4
    down = solve("cntlora", weight, (rows, reference), RANK, base="down_only", **options).factors(RANK)
    assert float(down.lora_B.abs().max()) == 0.0
    lora_A = solution.factors(RANK).lora_A
    assert relative_error(down.lora_A, lora_A * (down.lora_A.norm() / lora_A.norm())) < 1e-5


def test_measured_alignment_of_a_large_layer_keeps_its_digits():
    """Above the size of float64 statistics, with a mean direction that holds most of the power."""
    features, generator = 800, torch.Generator().manual_seed(0)
    statistic = CNTLoRA(constraint="alignment", pretraining="measured").statistic(features, 8, 8)
    assert isinstance(statistic, InputsAndReference)
    decay = 0.995 ** torch.arange(features)
    for part, strength in ((statistic.inputs, 4.0), (statistic.reference, 2.0)):
        part.update(torch.randn(1000, features, generator=generator) * decay + strength)
    moments = []
    for part in (statistic.inputs, statistic.reference):
        moment = part.second_moment().double()
        moments.append(moment + 0.1 * moment.diagonal().mean() * torch.eye(features, dtype=torch.float64))
    basis, reference = (part.eigenbasis(centered=False) for part in (statistic.inputs, statistic.reference))
    assert basis.values.dtype == torch.float32
    ridged_root = (basis.values + 0.1 * basis.values.mean()).sqrt()
    method = CNTLoRA(constraint="alignment", pretraining="measured")
    change = method._transported_minus_self(torch.eye(features), ridged_root, basis, reference).double()
    transport = basis.vectors.double() @ change @ basis.vectors.double().mT + torch.eye(features, dtype=torch.float64)
    # The float32 eigenvectors of S alone cost 1e-3; a float32 matrix square root in the middle would cost 4e-2.
    assert relative_error(transport, transport_of(*moments)) < 5e-3


def test_what_is_observed_follows_from_the_pretraining():
    assert isinstance(CNTLoRA(constraint="alignment").statistic(IN, 8, RANK), SecondMoment)
    measured = CNTLoRA(constraint="alignment", pretraining="measured")
    assert isinstance(measured.statistic(IN, 8, RANK), InputsAndReference)
    with pytest.raises(ValueError, match="collection pass over both"):
        measured.solve(draw_weight(8, IN), SecondMoment(IN), RANK, scaling=1.0, generator=torch.Generator())


# --- truncation -----------------------------------------------------------------------------------------------------


@EVERY_CONSTRAINT
@EVERY_SHAPE
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_activation_truncation_is_the_best_in_the_norm_of_the_data(solve, shape, constraint, rank):
    weight, rows = draw_weight(*shape), inputs()
    root = symmetric_power(ridged(rows, 0.1), 0.5)
    change = expected_change(weight, rows, constraint)
    truncated = {
        truncation: product(
            solve("cntlora", weight, rows, 7, constraint=constraint, truncation=truncation).factors(rank)
        )
        for truncation in ("activation", "weight")
    }
    # Eckart-Young, in either norm.
    assert relative_error(truncated["activation"] @ root, best_rank(change @ root, rank)) < 1e-4
    assert relative_error(truncated["weight"], best_rank(change, rank)) < 1e-4

    def error(truncation: str, metric: Tensor) -> float:
        return float(((truncated[truncation] - change) @ metric).norm())

    plain = torch.eye(IN, dtype=torch.float64)
    tail = torch.linalg.svdvals(change @ root)[rank:].square().sum().sqrt()
    assert error("activation", root) == pytest.approx(float(tail), rel=1e-4, abs=1e-6)
    assert error("activation", root) < error("weight", root)
    assert error("weight", plain) < error("activation", plain)


@EVERY_CONSTRAINT
@EVERY_TRUNCATION
def test_scores_are_shares_of_the_truncated_norm(solve, constraint, truncation):
    weight, rows = draw_weight(8, IN), inputs()
    change = expected_change(weight, rows, constraint)
    if truncation == "activation":
        change = change @ symmetric_power(ridged(rows, 0.1), 0.5)
    values = torch.linalg.svdvals(change)
    scores = solve("cntlora", weight, rows, 6, constraint=constraint, truncation=truncation).scores
    torch.testing.assert_close(scores[:6], values[:6] ** 2 / values.square().sum(), atol=1e-6, rtol=1e-4)


# --- gauge and scale ------------------------------------------------------------------------------------------------


@EVERY_CONSTRAINT
@EVERY_TRUNCATION
@pytest.mark.parametrize("scale", ["paper", "matched"])
def test_gauge_and_scale_move_between_the_factors_only(solve, constraint, truncation, scale):
    weight, rows = draw_weight(20, IN), inputs()
    options = {"constraint": constraint, "truncation": truncation}
    reference = product(solve("cntlora", weight, rows, RANK, **options).factors(RANK))
    for gauge in GAUGES:
        factors = solve("cntlora", weight, rows, RANK, gauge=gauge, scale=scale, **options).factors(RANK)
        assert relative_error(product(factors), reference) < 1e-5


@EVERY_CONSTRAINT
@EVERY_TRUNCATION
@pytest.mark.parametrize("rank", [2, 4])
def test_whitened_hidden_activations_are_uncorrelated_with_equal_variance(solve, constraint, truncation, rank):
    weight, rows = draw_weight(8, IN), inputs()
    options = {"constraint": constraint, "truncation": truncation}
    for base in ("offset", "down_only"):
        lora_A = solve("cntlora", weight, rows, RANK, base=base, **options).factors(rank).lora_A.double()
        hidden = lora_A @ ridged(rows, 0.1) @ lora_A.mT
        torch.testing.assert_close(hidden / hidden.diagonal().mean(), torch.eye(rank).double(), atol=1e-4, rtol=0)


def test_whitened_without_a_ridge_whitens_the_rows_themselves(solve):
    weight, rows = draw_weight(8, IN), inputs()
    lora_A = solve("cntlora", weight, rows, RANK, ridge=0.0).factors(RANK).lora_A.double()
    hidden = second_moment_of(rows.double() @ lora_A.mT)
    torch.testing.assert_close(hidden / hidden[0, 0], torch.eye(RANK).double(), atol=1e-4, rtol=0)


@EVERY_TRUNCATION
def test_the_activation_gauge_is_uncorrelated_with_the_singular_values_on_both_sides(solve, truncation):
    weight, rows = draw_weight(8, IN), inputs()
    factors = solve("cntlora", weight, rows, RANK, gauge="activation", truncation=truncation).factors(RANK)
    lora_A, lora_B = factors.lora_A.double(), factors.lora_B.double()
    hidden, columns = lora_A @ ridged(rows, 0.1) @ lora_A.mT, lora_B.mT @ lora_B
    for gram in (hidden, columns):
        assert float((gram - gram.diagonal().diag()).abs().max()) < 1e-4 * float(gram.max())
    ratio = hidden.diagonal() / columns.diagonal()
    torch.testing.assert_close(ratio / ratio[0], torch.ones(RANK).double(), atol=1e-3, rtol=0)


@EVERY_CONSTRAINT
@EVERY_TRUNCATION
def test_balanced_is_the_plain_svd_of_the_truncated_change(solve, constraint, truncation):
    weight, rows = draw_weight(20, IN), inputs()
    options = {"gauge": "balanced", "constraint": constraint, "truncation": truncation}
    factors = solve("cntlora", weight, rows, RANK, **options).factors(RANK)
    values = torch.linalg.svdvals(product(factors))[:RANK]
    for gram in (factors.lora_A @ factors.lora_A.mT, factors.lora_B.mT @ factors.lora_B):
        torch.testing.assert_close(gram.double(), values.diag(), atol=1e-4 * float(values[0]), rtol=1e-3)


@EVERY_GAUGE
def test_paper_scale_gives_both_factors_one_norm(solve, gauge):
    weight, rows = draw_weight(20, IN), inputs()
    factors = solve("cntlora", weight, rows, RANK, gauge=gauge).factors(RANK)
    assert float(factors.lora_A.norm()) == pytest.approx(float(factors.lora_B.norm()), rel=1e-4)
    down = solve("cntlora", weight, rows, RANK, gauge=gauge, base="down_only").factors(RANK)
    assert float(down.lora_A.norm()) == pytest.approx(math.sqrt(RANK), rel=1e-5)


@EVERY_GAUGE
@pytest.mark.parametrize("base", ["offset", "down_only", "active"])
def test_matched_scale_gives_the_hidden_power_of_kaiming(solve, gauge, base):
    weight, rows = draw_weight(20, IN), inputs(mean=0.7)
    options = {"gauge": gauge, "base": base, "scale": "matched"}
    lora_A = solve("cntlora", weight, rows, RANK, scaling=0.5, **options).factors(RANK).lora_A.double()
    power = (rows.double() @ lora_A.mT).square().sum(1).mean()
    kaiming = torch.empty(16000, IN)
    nn.init.kaiming_uniform_(kaiming, a=5**0.5, generator=torch.Generator().manual_seed(0))
    wanted = RANK * (rows.double() @ kaiming.double().mT).square().mean()
    assert float(power) == pytest.approx(float(wanted), rel=0.02)


# --- base -----------------------------------------------------------------------------------------------------------


@EVERY_GAUGE
@pytest.mark.parametrize("scaling", [1.0, 0.25, 3.0])
def test_scaling_times_the_product_is_the_truncated_change(solve, gauge, scaling):
    weight, rows = draw_weight(20, IN), inputs()
    root = symmetric_power(ridged(rows, 0.1), 0.5)
    change = best_rank(expected_change(weight, rows, "alignment") @ root, RANK) @ torch.linalg.inv(root)
    factors = solve("cntlora", weight, rows, RANK, gauge=gauge, scaling=scaling).factors(RANK)
    assert relative_error(product(factors, scaling), change) < 1e-5


@pytest.mark.parametrize("gamma", [0.1, 1.0, -0.5])
@pytest.mark.parametrize("scaling", [1.0, 0.25])
def test_active_starts_at_gamma_times_the_change(solve, gamma, scaling):
    weight, rows = draw_weight(20, IN), inputs()
    offset = product(solve("cntlora", weight, rows, RANK, scaling=scaling).factors(RANK), scaling)
    factors = solve("cntlora", weight, rows, RANK, scaling=scaling, base="active", gamma=gamma).factors(RANK)
    assert relative_error(product(factors, scaling), gamma * offset) < 1e-5


@EVERY_GAUGE
def test_down_only_keeps_the_directions_of_a_and_no_b(solve, gauge):
    weight, rows = draw_weight(20, IN), inputs()
    offset = solve("cntlora", weight, rows, RANK, gauge=gauge).factors(RANK)
    down = solve("cntlora", weight, rows, RANK, gauge=gauge, base="down_only").factors(RANK)
    assert float(down.lora_B.abs().max()) == 0.0
    ratio = down.lora_A.norm() / offset.lora_A.norm()
    assert relative_error(down.lora_A, ratio * offset.lora_A) < 1e-5


def test_the_step_zero_follows_from_the_base():
    assert CNTLoRA().step_zero == "offset"
    assert CNTLoRA(base="down_only").step_zero == "equal"
    assert CNTLoRA(base="active").step_zero == "moved"


def test_the_defaults_are_those_that_the_comparison_chose():
    method = CNTLoRA()
    assert (method.constraint, method.ridge, method.truncation, method.gauge, method.base) == (
        "decorrelation",
        0.1,
        "activation",
        "balanced",
        "offset",
    )


def test_a_smaller_rank_is_a_prefix(solve):
    """One decomposition serves every rank that the allocation may choose."""
    weight, rows = draw_weight(20, IN), inputs()
    wide = solve("cntlora", weight, rows, 8).factors(3)
    narrow = solve("cntlora", weight, rows, 3).factors(3)
    assert relative_error(product(wide), product(narrow)) < 1e-5
