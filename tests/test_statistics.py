"""Streaming statistics against float64 brute force over all rows.

Stated tolerance: the relative Frobenius error of a covariance or a second moment is below 2e-6 whatever the split, the
order and the number of processes (products are float32, sums float64 on a CPU).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from core_fixtures import largest_principal_angle, relative_error, rows_with_spectrum, run_as_processes
from torch import Tensor

from lorainit_diffusers.statistics import (
    GradientMean,
    InputsAndReference,
    SecondMoment,
    SketchedSecondMoment,
    Statistic,
    all_reduce,
    full_float32,
    processes,
)
from lorainit_diffusers.statistics.second_moment import MIN_TRIANGLE_WIDTH

TOLERANCE = 2e-6
FEATURES = 24
DEVIATIONS = [0.75**index for index in range(FEATURES)]
SPLITS = {
    "one batch": [400],
    "even": [100, 100, 100, 100],
    "ragged": [1, 399],
    "ones first": [1, 1, 1, 1, 396],
    "with an empty batch": [150, 0, 250],
    "row by row": [1] * 400,
}
SPLIT_SIZES = pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS.keys())


def oracle(rows: Tensor) -> dict[str, np.ndarray]:
    """Mean, covariance and second moment in float64."""
    array = rows.double().numpy()
    centred = array - array.mean(0)
    return {
        "mean": array.mean(0),
        "covariance": centred.T @ centred / len(array),
        "second_moment": array.T @ array / len(array),
    }


def assert_exact(statistic: SecondMoment, rows: Tensor, tolerance: float = TOLERANCE) -> None:
    expected = oracle(rows)
    assert statistic.num_rows == len(rows)
    assert relative_error(statistic.mean(), torch.from_numpy(expected["mean"])) < tolerance
    assert relative_error(statistic.covariance(), torch.from_numpy(expected["covariance"])) < tolerance
    assert relative_error(statistic.second_moment(), torch.from_numpy(expected["second_moment"])) < tolerance
    assert statistic.trace(centered=True) == pytest.approx(np.trace(expected["covariance"]), rel=tolerance)
    assert statistic.trace(centered=False) == pytest.approx(np.trace(expected["second_moment"]), rel=tolerance)


def moment_of(batches: list[Tensor]) -> SecondMoment:
    statistic = SecondMoment(batches[0].shape[1])
    for batch in batches:
        statistic.update(batch)
    return statistic


@pytest.fixture
def rows() -> Tensor:
    return rows_with_spectrum(400, DEVIATIONS, mean=0.5)


@SPLIT_SIZES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_split_equals_the_batch_result(rows, sizes, dtype):
    rows = rows.to(dtype)
    assert_exact(moment_of(list(rows.split(sizes))), rows)


@pytest.mark.parametrize("seed", range(3))
def test_any_order_equals_the_batch_result(rows, seed):
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    assert_exact(moment_of(list(rows[order].split([37, 200, 163]))), rows)


def test_sorted_rows_do_not_drift(rows):
    """Batches with very different means: the between-batch terms carry most of the covariance."""
    ordered = rows[rows[:, 0].argsort()]
    assert_exact(moment_of(list(ordered.split(20))), rows)


@SPLIT_SIZES
def test_merge_equals_the_batch_result(rows, sizes):
    merged = SecondMoment(FEATURES)
    for part in rows.split(sizes):
        other = SecondMoment(FEATURES)
        other.update(part)
        merged.merge(other)
    assert_exact(merged, rows)


def test_merging_changes_neither_the_other_nor_an_alias(rows):
    first, second = moment_of([rows[:100]]), moment_of([rows[100:]])
    empty = SecondMoment(FEATURES)
    empty.merge(second)
    before = second.covariance().clone()
    empty.update(rows[:100])
    assert torch.equal(second.covariance(), before)
    assert_exact(empty, rows)
    first.merge(second)
    assert torch.equal(second.covariance(), before)
    first.merge(SecondMoment(FEATURES))
    assert_exact(first, rows)


@pytest.mark.parametrize("num_processes", [2, 3, 4])
def test_all_reduce_equals_the_batch_result_on_every_process(rows, num_processes):
    # Unequal shares, and different means on every process.
    parts = rows[rows[:, 1].argsort()].split([17, 90, 200, 93])[: num_processes - 1]
    parts = [*parts, rows[rows[:, 1].argsort()][sum(len(part) for part in parts) :]]
    statistics = [moment_of([part]) for part in parts]
    for statistic in statistics:
        statistic.eigh(centered=True)  # a decomposition cached before the reduction must not survive it
    run_as_processes(num_processes, lambda process, add: all_reduce([statistics[process]], add))
    for statistic in statistics:
        assert_exact(statistic, rows)
        expected = np.linalg.eigvalsh(oracle(rows)["covariance"])[::-1]
        np.testing.assert_allclose(statistic.eigh(centered=True).values[:5].numpy(), expected[:5], rtol=1e-5)
    assert torch.equal(statistics[0].covariance(), statistics[-1].covariance())


def test_a_reduced_statistic_can_go_on(rows):
    statistics = [moment_of([rows[:100]]), moment_of([rows[100:300]])]
    run_as_processes(2, lambda process, add: all_reduce([statistics[process]], add))
    statistics[1].update(rows[300:])
    assert_exact(statistics[1], rows)


def test_update_inside_bf16_autocast_multiplies_in_float32(rows):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (rows @ rows.mT).dtype == torch.bfloat16  # autocast is on here
        statistic = moment_of(list(rows.split(80)))
        sketch = SketchedSecondMoment(FEATURES, FEATURES)
        sketch.update(rows)
        assert (rows @ rows.mT).dtype == torch.bfloat16  # and stays on
    assert_exact(statistic, rows)
    expected = np.linalg.eigvalsh(oracle(rows)["covariance"])[::-1]
    np.testing.assert_allclose(sketch.eigh(centered=True).values[:4].numpy(), expected[:4], rtol=1e-4)


def test_lowered_matmul_precision_is_lifted_and_restored(rows):
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        statistic = moment_of([rows])
        assert torch.get_float32_matmul_precision() == "medium"
        with full_float32(torch.device("cpu")):  # a processor's own products may be exact in any case
            assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(previous)
    assert_exact(statistic, rows)


def test_rows_computed_under_bf16_autocast_are_exact_in_what_they_are(rows):
    layer = torch.nn.Linear(FEATURES, FEATURES)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        computed = layer(rows)
        statistic = moment_of(list(computed.split(111)))
    assert computed.dtype == torch.bfloat16
    assert_exact(statistic, computed)


@pytest.mark.parametrize("make", [SecondMoment, lambda features: SketchedSecondMoment(features, 8)])
def test_float16_rows_of_1e4_do_not_overflow(make):
    rows = (1e4 * torch.randn(200, FEATURES, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)).half()
    assert not torch.isfinite(rows * rows).all()  # in float16 they would
    statistic = make(FEATURES)
    statistic.update(rows[:100])
    statistic.update(rows[100:])
    assert bool(statistic.is_finite)
    expected = oracle(rows)["covariance"]
    assert statistic.trace(centered=True) == pytest.approx(np.trace(expected), rel=1e-5)
    if isinstance(statistic, SecondMoment):
        assert_exact(statistic, rows, tolerance=1e-5)


def test_large_mean_with_small_variance_does_not_cancel():
    """Mean 1e3, deviation 0.1: X'X/n - mean mean' in float32 has an error of the size of the variance."""
    generator = torch.Generator().manual_seed(0)
    rows = 1e3 + 0.1 * torch.randn(2000, 8, generator=generator)
    late = rows.mT @ rows / len(rows) - torch.outer(rows.mean(0), rows.mean(0))
    expected = torch.from_numpy(oracle(rows)["covariance"])
    assert relative_error(late, expected) > 0.1  # the naive way fails on these rows
    assert relative_error(moment_of(list(rows.split(250))).covariance(), expected) < 1e-4
    assert moment_of(list(rows.split(250))).trace(centered=True) == pytest.approx(float(expected.trace()), rel=1e-4)
    sketch = SketchedSecondMoment(8, 8)
    for part in rows.split(250):
        sketch.update(part)
    assert sketch.trace(centered=True) == pytest.approx(float(expected.trace()), rel=1e-4)


def test_update_does_not_change_its_rows_nor_need_their_graph(rows):
    copy = rows.clone()
    rows.requires_grad_(True)
    statistic = moment_of([rows])
    assert torch.equal(rows, copy)
    assert not statistic.covariance().requires_grad


def test_eigh_is_refreshed_by_an_update(rows):
    statistic = moment_of([rows[:50]])
    before = statistic.eigh(centered=True).values.clone()
    statistic.update(rows[50:])
    expected = np.linalg.eigvalsh(oracle(rows)["covariance"])[::-1]
    np.testing.assert_allclose(statistic.eigh(centered=True).values[:5].numpy(), expected[:5], rtol=1e-5)
    assert not torch.allclose(before[:5], statistic.eigh(centered=True).values[:5], rtol=1e-3)


# --- the sketch ---------------------------------------------------------------------------------------------------


@SPLIT_SIZES
def test_the_sketch_too_does_not_depend_on_the_split(rows, sizes):
    whole, parts = SketchedSecondMoment(FEATURES, 10, seed=3), SketchedSecondMoment(FEATURES, 10, seed=3)
    whole.update(rows)
    for part in rows.split(sizes):
        parts.update(part)
    merged = SketchedSecondMoment(FEATURES, 10, seed=3)
    for part in rows.split(sizes):
        other = SketchedSecondMoment(FEATURES, 10, seed=3)
        other.update(part)
        merged.merge(other)
    for statistic in (parts, merged):
        assert statistic.num_rows == 400
        assert relative_error(statistic.state_dict()["sketch"], whole.state_dict()["sketch"]) < TOLERANCE
        assert statistic.trace(centered=True) == pytest.approx(whole.trace(centered=True), rel=TOLERANCE)
        assert relative_error(statistic.mean(), whole.mean()) < TOLERANCE


@pytest.mark.parametrize("num_processes", [2, 4])
def test_sketches_all_reduce_to_the_whole(rows, num_processes):
    whole = SketchedSecondMoment(FEATURES, 10)
    whole.update(rows)
    parts = rows[rows[:, 0].argsort()].tensor_split(num_processes)
    statistics = [SketchedSecondMoment(FEATURES, 10) for _ in parts]
    for statistic, part in zip(statistics, parts, strict=True):
        statistic.update(part)
    run_as_processes(num_processes, lambda process, add: all_reduce([statistics[process]], add))
    for statistic in statistics:
        assert statistic.num_rows == 400
        assert relative_error(statistic.state_dict()["sketch"], whole.state_dict()["sketch"]) < TOLERANCE
        assert statistic.trace(centered=True) == pytest.approx(whole.trace(centered=True), rel=TOLERANCE)


@pytest.mark.parametrize("centered", [True, False])
def test_the_sketch_finds_the_leading_eigenpairs_of_a_decaying_spectrum(centered):
    rows = rows_with_spectrum(3000, [0.6**index for index in range(96)], mean=0.2)
    statistic = SketchedSecondMoment(96, 32)
    for part in rows.split(500):
        statistic.update(part)
    values, vectors = np.linalg.eigh(oracle(rows)["covariance" if centered else "second_moment"])
    values, vectors = values[::-1].copy(), vectors[:, ::-1].copy()
    estimate = statistic.eigh(centered=centered)
    np.testing.assert_allclose(estimate.values[:8].numpy(), values[:8], rtol=1e-3)
    assert largest_principal_angle(estimate.vectors[:, :8].mT, torch.from_numpy(vectors[:, :8]).mT) < 1e-2
    assert statistic.trace(centered=centered) == pytest.approx(values.sum(), rel=1e-5)  # exact, not sketched
    identity = estimate.vectors.mT @ estimate.vectors
    assert float((identity - torch.eye(32, dtype=identity.dtype)).abs().max()) < 1e-8


def test_a_sketch_of_every_column_is_the_exact_moment(rows):
    statistic = SketchedSecondMoment(FEATURES, FEATURES)
    statistic.update(rows)
    values, vectors = statistic.eigh(centered=True)
    expected = torch.from_numpy(oracle(rows)["covariance"])
    assert relative_error(vectors * values @ vectors.mT, expected) < 1e-4


@pytest.mark.parametrize("features", [64, 900])  # float64 and float32 accumulators
@pytest.mark.parametrize("num_rows", [1, 5, 40])
def test_the_sketch_survives_fewer_rows_than_columns(features, num_rows):
    rows = 30 * torch.randn(num_rows, features, generator=torch.Generator().manual_seed(1))
    for seed in range(5):
        statistic = SketchedSecondMoment(features, 48, seed=seed)
        statistic.update(rows)
        statistic.update(rows)
        values, vectors = statistic.eigh(centered=False)
        expected = np.linalg.svd(rows.double().numpy(), compute_uv=False)[: min(num_rows, 48)] ** 2 / num_rows
        assert torch.isfinite(vectors).all()
        np.testing.assert_allclose(values[: len(expected)].numpy(), expected, rtol=1e-3)
        assert float(values[len(expected) :].sum()) < 1e-4 * expected.sum()


def test_constant_rows_give_a_sketch_without_variance():
    statistic = SketchedSecondMoment(12, 4)
    statistic.update(torch.zeros(7, 12))
    values, vectors = statistic.eigh(centered=True)
    assert float(values.abs().sum()) == 0.0
    assert vectors.shape == (12, 4)


def test_sketches_with_different_projections_do_not_merge(rows):
    first, second = SketchedSecondMoment(FEATURES, 8, seed=0), SketchedSecondMoment(FEATURES, 8, seed=1)
    first.update(rows)
    second.update(rows)
    with pytest.raises(ValueError, match="different random projections"):
        first.merge(second)
    with pytest.raises(ValueError, match="different random projections"):
        first.merge(SketchedSecondMoment(FEATURES, 9, seed=0))


@SPLIT_SIZES
@pytest.mark.parametrize("demoted_after", [0, 1, 2])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_an_exact_moment_becomes_the_sketch_that_it_would_have_been(rows, sizes, demoted_after, device):
    whole, statistic = SketchedSecondMoment(FEATURES, 10), SecondMoment(FEATURES)
    whole.update(rows)
    if device is not None:
        statistic.move(torch.device(device))
    for index, part in enumerate(rows.split(sizes)):
        if index == demoted_after:
            statistic = statistic.sketched(10)
        statistic.update(part)
    if isinstance(statistic, SecondMoment):
        statistic = statistic.sketched(10)
    assert statistic.num_rows == 400
    for key, value in whole.state_dict().items():
        assert relative_error(statistic.state_dict()[key], value) < TOLERANCE
    for centered in (True, False):
        assert statistic.trace(centered=centered) == pytest.approx(whole.trace(centered=centered), rel=TOLERANCE)
        assert relative_error(statistic.eigh(centered=centered).values, whole.eigh(centered=centered).values) < 1e-5


def test_float32_moments_become_sketches_too():
    rows = rows_with_spectrum(60, [0.99**index for index in range(800)], mean=0.2)
    statistic, whole = SecondMoment(800), SketchedSecondMoment(800, 20)
    for part in rows.split(20):
        statistic.update(part)
        whole.update(part)
    assert statistic.state_dict()["scatter"].dtype == torch.float32
    assert relative_error(statistic.sketched(20).state_dict()["sketch"], whole.state_dict()["sketch"]) < TOLERANCE


@pytest.mark.parametrize("centered", [True, False])
def test_the_eigenbasis_of_a_sketch_keeps_the_trace_and_spreads_the_rest(centered):
    rows = rows_with_spectrum(500, [0.9**index for index in range(48)], mean=0.2)
    statistic = SketchedSecondMoment(48, 12)
    statistic.update(rows)
    values, vectors = statistic.eigh(centered=centered)
    basis = statistic.eigenbasis(centered=centered)
    assert float(basis.values.sum()) == pytest.approx(statistic.trace(centered=centered), rel=1e-5)
    torch.testing.assert_close(basis.values[:12], values)
    torch.testing.assert_close(basis.vectors, vectors)
    assert len(set(basis.values[12:].tolist())) == 1
    assert 0 < float(basis.values[-1]) < float(values[0])
    complete = SketchedSecondMoment(48, 48)
    complete.update(rows)
    assert relative_error(complete.eigenbasis(centered=centered).values, complete.eigh(centered=centered).values) == 0.0


@SPLIT_SIZES
def test_accumulators_on_a_device_of_their_own_hold_the_same_numbers(rows, sizes):
    statistic, sketch = SecondMoment(FEATURES), SketchedSecondMoment(FEATURES, 10)
    for other in (statistic, sketch):
        other.move(torch.device("cpu"))
        for part in rows.split(sizes):
            other.update(part)
    assert_exact(statistic, rows)
    whole = SketchedSecondMoment(FEATURES, 10)
    whole.update(rows)
    assert relative_error(sketch.state_dict()["sketch"], whole.state_dict()["sketch"]) < TOLERANCE


def test_moving_in_the_middle_of_a_pass_loses_nothing(rows):
    statistic = moment_of(list(rows[:300].split(100)))  # three updates that wait in the float32 buffer
    statistic.move(torch.device("cpu"))
    statistic.update(rows[300:])
    assert_exact(statistic, rows)


@pytest.mark.gpu
@pytest.mark.parametrize("features", [24, 900])
def test_rows_from_the_gpu_accumulate_on_the_cpu(features):
    rows = rows_with_spectrum(400, [0.99**index for index in range(features)], mean=0.3)
    gradient = GradientMean((400, features))
    for statistic in (SecondMoment(features), SketchedSecondMoment(features, 10), gradient):
        statistic.move(torch.device("cpu"))
        expected = type(statistic)(*([features, 10] if isinstance(statistic, SketchedSecondMoment) else [features]))
        if statistic is gradient:
            expected = GradientMean((400, features))
        statistic.update(rows.cuda())
        expected.update(rows)
        for key, value in statistic.state_dict().items():
            assert value.device.type == "cpu"
            assert relative_error(value, expected.state_dict()[key]) < 1e-5
        statistic.move(torch.device("cuda:0"))
        assert all(value.is_cuda for key, value in statistic.state_dict().items() if not key.startswith("num_"))


@pytest.mark.parametrize("num_columns", [0, FEATURES + 1])
def test_a_sketch_needs_a_sensible_number_of_columns(num_columns):
    with pytest.raises(ValueError, match=f"num_columns is {num_columns}"):
        SketchedSecondMoment(FEATURES, num_columns)


# --- all statistics -----------------------------------------------------------------------------------------------

MAKERS = {
    "exact": (lambda: SecondMoment(FEATURES), lambda seed: rows_with_spectrum(60, DEVIATIONS, seed=seed)),
    "sketch": (lambda: SketchedSecondMoment(FEATURES, 8), lambda seed: rows_with_spectrum(60, DEVIATIONS, seed=seed)),
    "gradient": (
        lambda: GradientMean((6, FEATURES)),
        lambda seed: torch.randn(6, FEATURES, generator=torch.Generator().manual_seed(seed)),
    ),
}
EVERY_STATISTIC = pytest.mark.parametrize(("make", "draw"), MAKERS.values(), ids=MAKERS.keys())


@EVERY_STATISTIC
def test_state_dict_round_trip_continues_exactly(make, draw):
    original = make()
    original.update(draw(0))
    state = original.state_dict()
    frozen = {key: value.clone() for key, value in state.items()}
    restored = make()
    restored.load_state_dict(state)
    original.update(draw(1))
    for key, value in state.items():  # a state is a snapshot
        assert torch.equal(value, frozen[key])
    restored.update(draw(1))
    assert restored.num_rows == original.num_rows
    for key, value in original.state_dict().items():
        assert torch.equal(value, restored.state_dict()[key])


@EVERY_STATISTIC
def test_an_empty_statistic_saves_loads_merges_and_says_that_it_is_empty(make, draw):
    empty = make()
    assert empty.num_rows == 0
    assert bool(empty.is_finite)
    assert empty.state_dict() == {}
    with pytest.raises(ValueError, match="empty"):
        empty.mean()
    filled = make()
    filled.update(draw(0))
    filled.load_state_dict(empty.state_dict())
    assert filled.num_rows == 0
    filled.update(draw(0))
    before = filled.mean().clone()
    filled.merge(make())
    assert torch.equal(filled.mean(), before)


@EVERY_STATISTIC
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_one_non_finite_entry_raises_the_flag_and_keeps_it(make, draw, poison):
    statistic = make()
    statistic.update(draw(0))
    assert bool(statistic.is_finite)
    bad = draw(1)
    bad[3, 5] = poison
    statistic.update(bad)
    assert not bool(statistic.is_finite)
    statistic.update(draw(2))
    assert not bool(statistic.is_finite)
    into_empty, into_filled, restored = make(), make(), make()
    into_filled.update(draw(3))
    into_empty.merge(statistic)
    into_filled.merge(statistic)
    restored.load_state_dict(statistic.state_dict())
    for other in (into_empty, into_filled, restored):
        assert not bool(other.is_finite)


@EVERY_STATISTIC
def test_rows_of_the_wrong_shape_are_refused(make, draw):
    with pytest.raises(ValueError, match=r"shape \(60, 7\)"):
        make().update(torch.zeros(60, 7))


def test_rows_need_two_dimensions():
    with pytest.raises(ValueError, match=r"\(2, 3, 24\)"):
        SecondMoment(FEATURES).update(torch.zeros(2, 3, FEATURES))


def test_gradient_mean_is_the_mean_over_batches_in_any_split():
    gradients = torch.randn(9, 6, FEATURES, generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(gradients.double().numpy().mean(0))
    statistic = GradientMean((6, FEATURES))
    for gradient in gradients:
        statistic.update(gradient)
    assert relative_error(statistic.mean(), expected) < 1e-6
    assert statistic.mean().dtype == torch.float32
    parts = [GradientMean((6, FEATURES)) for _ in range(3)]
    for index, gradient in enumerate(gradients):
        parts[0 if index < 1 else 1 if index < 4 else 2].update(gradient)
    parts[0].merge(parts[1])
    parts[0].merge(parts[2])
    assert parts[0].num_rows == 9
    assert relative_error(parts[0].mean(), expected) < 1e-6


def test_weighted_gradients_in_any_split_and_from_disk():
    gradients = torch.randn(4, 6, FEATURES, generator=torch.Generator().manual_seed(0))
    weights = [2.0, 0.5, 7.0, 1.0]
    expected = sum(weight * gradient.double() for weight, gradient in zip(weights, gradients, strict=True)) / 10.5
    parts = [GradientMean((6, FEATURES)) for _ in range(2)]
    for index, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
        parts[index % 2].update(gradient, weight)
    again = GradientMean((6, FEATURES))
    again.load_state_dict(parts[0].state_dict())
    again.merge(parts[1])
    assert relative_error(again.mean(), expected) < 1e-6
    assert again.num_rows == 4
    run_as_processes(2, lambda process, add: all_reduce([parts[process]], add))
    assert all(relative_error(part.mean(), expected) < 1e-6 for part in parts)


@pytest.mark.parametrize("num_processes", [2, 4])
def test_gradients_all_reduce_to_the_mean_of_all(num_processes):
    gradients = torch.randn(9, 6, FEATURES, generator=torch.Generator().manual_seed(0))
    statistics = [GradientMean((6, FEATURES)) for _ in range(num_processes)]
    for index, gradient in enumerate(gradients):
        statistics[max(0, index - 9 + num_processes)].update(gradient)  # the first process has the most
    run_as_processes(num_processes, lambda process, add: all_reduce([statistics[process]], add))
    for statistic in statistics:
        assert statistic.num_rows == 9
        assert relative_error(statistic.mean(), gradients.double().mean(0)) < 1e-6


def test_sixteen_bit_gradients_accumulate_in_float32():
    small, large = torch.full((2, 3), 1e-3, dtype=torch.float16), torch.full((2, 3), 4.0, dtype=torch.float16)
    statistic = GradientMean((2, 3))
    statistic.update(large)
    for _ in range(100):
        statistic.update(small)  # each is below half a float16 step at 4: they would vanish in a float16 sum
    expected = (4.0 + 100 * float(small[0, 0])) / 101
    torch.testing.assert_close(statistic.mean(), torch.full((2, 3), expected), rtol=1e-6, atol=0)


def test_a_pair_of_distributions_has_seen_as_many_rows_as_the_smaller(rows):
    pair = InputsAndReference(SecondMoment(FEATURES), SecondMoment(FEATURES))
    assert pair.num_rows == 0
    pair.inputs.update(rows)
    assert pair.num_rows == 0
    pair.reference.update(rows[:30])
    assert pair.num_rows == 30
    pair.reference.merge(pair.inputs)
    assert pair.num_rows == len(rows)


def test_the_gradient_that_was_passed_may_be_reused_by_the_caller():
    gradient = torch.ones(2, 3)
    statistic = GradientMean((2, 3))
    statistic.update(gradient)
    gradient.zero_()
    assert torch.equal(statistic.mean(), torch.ones(2, 3))


@pytest.mark.parametrize("width", [MIN_TRIANGLE_WIDTH - 1, MIN_TRIANGLE_WIDTH, MIN_TRIANGLE_WIDTH + 37, 800])
def test_a_moment_of_any_width_is_whole_and_symmetric(width):
    """Wide ones are accumulated in their lower triangle; every way to read or move them completes it."""
    rows = torch.randn(90, width, generator=torch.Generator().manual_seed(0)) + 0.5
    expected = np.cov(rows.numpy().T.astype(np.float64), bias=True)

    def filled(parts: list[torch.Tensor]) -> SecondMoment:
        statistic = SecondMoment(width)
        for part in parts:
            statistic.update(part)
        return statistic

    def reloaded(statistic: SecondMoment) -> SecondMoment:
        copy = SecondMoment(width)
        copy.load_state_dict(statistic.state_dict())
        return copy

    read_between = filled([rows[:30]])
    read_between.covariance()
    read_between.update(rows[30:])
    merged = filled([rows[:50]])
    merged.merge(filled([rows[50:]]))
    moved = filled([rows[:40]])
    moved.move(torch.device("cpu"))
    moved.update(rows[40:])
    for statistic in (
        filled([rows]),
        filled(list(rows.split(7))),
        read_between,
        merged,
        moved,
        reloaded(filled([rows])),
    ):
        covariance = statistic.covariance()
        assert torch.equal(covariance, covariance.mT) or statistic in (merged, moved)
        np.testing.assert_allclose(covariance.numpy(), expected, atol=2e-6)


def test_few_rows_are_the_moment_that_their_scatter_is():
    width = 40
    rows = torch.randn(18, width, generator=torch.Generator().manual_seed(0)) * 2 + 3
    for sizes in ([18], [1] * 18, [5, 12, 1]):
        few = moment_of(list(rows.split(sizes)))
        assert_exact(few, rows)
        scatter = SecondMoment(width)
        scatter.load_state_dict(few.state_dict())
        assert scatter.few_rows(centered=True) is None
        for centered, dense in ((True, few.covariance()), (False, few.second_moment())):
            kept = few.few_rows(centered=centered)
            assert kept is not None
            assert len(kept) <= 18 + len(sizes) + (not centered)
            assert relative_error(kept.double().mT @ kept.double(), dense) < TOLERANCE
            values, vectors = few.eigh(centered=centered)
            assert len(values) == (17 if centered else 18)  # those that are not zero
            assert relative_error(vectors * values @ vectors.mT, dense) < TOLERANCE
            assert relative_error(vectors.mT @ vectors, torch.eye(len(values), dtype=torch.float64)) < 1e-6
            basis = few.eigenbasis(centered=centered)
            lifted = basis.lift(torch.eye(width, dtype=torch.float64))
            assert relative_error(lifted.mT * basis.values @ lifted, dense) < TOLERANCE
            leading = few.leading(5, centered=centered)
            assert relative_error(leading.values, scatter.leading(5, centered=centered).values) < TOLERANCE
            # more directions than rows: the rest is orthonormal, and holds nothing
            all_values, all_vectors = few.leading(25, centered=centered)
            assert float(all_values[18:].abs().max()) < 1e-9 * float(all_values[0])
            assert relative_error(all_vectors.mT @ all_vectors, torch.eye(25, dtype=torch.float64)) < 1e-9


def test_rows_become_a_scatter_when_they_are_no_longer_few():
    width = 40
    rows = torch.randn(90, width, generator=torch.Generator().manual_seed(0)) + 3
    statistic, num_few = SecondMoment(width), 0
    for count in range(1, 91):
        statistic.update(rows[count - 1 : count])
        num_few += statistic.few_rows(centered=True) is not None
        if count > 1:
            assert_exact(statistic, rows[:count])
    assert num_few == statistic.max_few == width // 2


def test_few_rows_join_across_processes_and_merge():
    rows = torch.randn(30, 64, generator=torch.Generator().manual_seed(0)) + 1
    parts = [moment_of([rows[:8]]), moment_of([rows[8:30]])]
    joined = moment_of([rows[:8]])
    joined.merge(parts[1])
    assert_exact(joined, rows)
    assert_exact(parts[1], rows[8:30])  # which reading did not change
    assert parts[1].few_rows(centered=True) is not None
    few = [moment_of([rows[:8]]), parts[1]]
    run_as_processes(2, lambda process, add: all_reduce([few[process]], add))
    for statistic in few:
        assert_exact(statistic, rows)
        assert statistic.few_rows(centered=True) is None


def test_many_statistics_are_joined_in_few_sums(monkeypatch):
    """As many sums as precisions and rounds, or as buffers are filled; never one a layer."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(60, 12, generator=generator) + 1 for _ in range(20)]
    gradients = torch.randn(2, 20, 3, 12, generator=generator)

    def filled(process: int) -> list[Statistic]:
        parts: list[Statistic] = []
        for index, own in enumerate(rows):
            moment = SecondMoment(12) if index % 2 else SketchedSecondMoment(12, 6)
            moment.update(own[:25] if process == 0 else own[25:])
            gradient = GradientMean((3, 12))
            gradient.update(gradients[process, index])
            parts += [moment, gradient]
        return parts

    for buffer_bytes, at_most in ((2**20, 8), (2000, 60), (1, 200)):
        monkeypatch.setattr(processes, "BUFFER_BYTES", buffer_bytes)
        joined, calls = [filled(0), filled(1)], [0, 0]

        def work(process: int, add: Callable[[Tensor], None], joined=joined, calls=calls) -> None:
            def counting(tensor: Tensor) -> None:
                calls[process] += 1
                add(tensor)

            all_reduce(joined[process], counting)

        run_as_processes(2, work)
        assert calls[0] == calls[1] <= at_most
        for parts in joined:
            for index, own in enumerate(rows):
                moment, gradient = parts[2 * index], parts[2 * index + 1]
                if isinstance(moment, SecondMoment):
                    assert_exact(moment, own)
                else:
                    whole = SketchedSecondMoment(12, 6)
                    whole.update(own)
                    assert relative_error(moment.state_dict()["sketch"], whole.state_dict()["sketch"]) < TOLERANCE
                assert isinstance(gradient, GradientMean)
                assert relative_error(gradient.mean(), gradients[:, index].mean(0)) < TOLERANCE
