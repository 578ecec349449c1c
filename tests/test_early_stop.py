"""The end of a pass that has seen enough, against principal angles in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from core_fixtures import relative_error, rows_with_spectrum
from torch import Tensor, nn

from lorainit_diffusers import initialize
from lorainit_diffusers.early_stop import EarlyStop, directions_of, root_mean_sine, spread_out
from lorainit_diffusers.methods import METHODS
from lorainit_diffusers.statistics import SecondMoment

WIDTH, RANK, BATCH = 24, 3, 40


def principal_sine(first: np.ndarray, second: np.ndarray) -> float:
    """Root mean square of the sines of the principal angles between the spans of the columns."""
    cosines = np.linalg.svd(np.linalg.qr(first)[0].T @ np.linalg.qr(second)[0], compute_uv=False)
    return float(np.sqrt(np.mean(np.sin(np.arccos(np.clip(cosines, 0, 1))) ** 2)))


def leading_of(rows: np.ndarray) -> np.ndarray:
    centred = rows - rows.mean(0)
    return np.linalg.eigh(centred.T @ centred)[1][:, -RANK:]


def batches_of(decay: float, count: int) -> Tensor:
    return rows_with_spectrum(count * BATCH, [decay**index for index in range(WIDTH)], mean=1.0).reshape(
        count, BATCH, WIDTH
    )


@pytest.mark.parametrize("rank", [1, 4])
def test_the_sine_is_that_of_the_principal_angles(rank):
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(rank, 9, generator=generator)
    second = first + 0.3 * torch.randn(rank, 9, generator=generator)
    assert root_mean_sine(first, second) == pytest.approx(principal_sine(first.numpy().T, second.numpy().T), rel=1e-5)
    mixed = torch.randn(rank, rank, generator=generator) @ first
    assert root_mean_sine(first, mixed) == pytest.approx(0, abs=1e-3)
    assert root_mean_sine(torch.eye(9)[:rank], torch.eye(9)[4 : 4 + rank]) == pytest.approx(1)


def test_layers_are_watched_from_the_first_to_the_last():
    assert spread_out(["a", "b"], 8) == ["a", "b"]
    names = [str(index) for index in range(100)]
    chosen = spread_out(names, 8)
    assert (chosen[0], chosen[-1], len(set(chosen))) == ("0", "99", 8)


@pytest.mark.parametrize("limit", [0.5, 0.2, 0.1, 0.05, 0.001])
def test_the_pass_ends_at_the_first_doubling_that_turns_the_directions_less(limit):
    model = nn.ModuleDict({"layer": nn.Linear(WIDTH, 10)})
    batches = batches_of(0.8, 64)
    report = initialize(
        model,
        "eva",
        batches,
        lambda batch: model["layer"](batch).square().mean(),
        rank=RANK,
        target_modules=["layer"],
        early_stop=limit,
        progress=False,
    )
    rows = batches.double().numpy()
    expected, turned = 64, None
    for count in (4, 8, 16, 32, 64):
        first, whole = (leading_of(rows[:n].reshape(-1, WIDTH)) for n in (count // 2, count))
        turned = principal_sine(first, whole)
        if turned <= limit:
            expected = count
            break
    assert report.num_passes == expected
    assert report.early_stop is not None
    assert f"after {expected} batches" in report.early_stop
    assert f"at most {turned:.2g} " in report.early_stop
    assert report.early_stop.startswith("settled" if turned <= limit else "not settled")
    assert report.early_stop in report.summary()
    assert report.to_json()["early_stop"] == report.early_stop
    found = model["layer"].lora_A["default"].weight.detach().double().numpy().T
    wanted = leading_of(rows[:expected].reshape(-1, WIDTH))
    assert principal_sine(found, wanted) < 1e-4


@pytest.mark.parametrize("name", sorted(name for name, method in METHODS.items() if method.observes != "nothing"))
def test_every_method_that_observes_can_end_early_and_has_then_seen_only_those_batches(name):
    torch.manual_seed(0)
    start = {"layer": nn.Linear(WIDTH, 12), "other": nn.Linear(12, 16)}
    batches = batches_of(0.5, 32)

    def run(num_batches: int, early_stop: float | None) -> tuple[int, Tensor]:
        model = nn.ModuleDict({key: nn.Linear(layer.in_features, layer.out_features) for key, layer in start.items()})
        model.load_state_dict(nn.ModuleDict(start).state_dict())
        report = initialize(
            model,
            name,
            batches[:num_batches],
            lambda batch: (model["other"](model["layer"](batch)) - 1).square().mean(),
            rank=2,
            target_modules=["layer", "other"],
            early_stop=early_stop,
            progress=False,
        )
        assert (report.early_stop is None) == (early_stop is None)
        return report.num_passes, model["other"].lora_A["default"].weight.detach()

    used, stopped = run(32, 0.9)
    assert used < 32
    # Looking at a statistic on the way adds up its parts in another order; nothing else may differ.
    assert relative_error(stopped, run(used, None)[1]) < 1e-4
    assert run(32, None)[0] == 32


def test_a_layer_with_too_few_rows_keeps_the_pass_going_and_one_never_reached_does_not():
    layers = {"few": nn.Linear(WIDTH, 4), "never": nn.Linear(WIDTH, 4)}
    method = METHODS["eva"]()
    stop = EarlyStop(0.9, list(layers), directions_of(method, layers, dict.fromkeys(layers, RANK)))
    statistic = SecondMoment(WIDTH)
    rows = batches_of(0.5, 1)[0]
    observed = {"few": statistic}
    statistic.update(rows[:1])
    assert not stop.is_over(2, observed.get)
    statistic.update(rows[1:30])
    assert not stop.is_over(4, observed.get)  # there is nothing to hold it against
    assert stop.reason is None
    statistic.update(rows[30:])
    assert not stop.is_over(7, observed.get)  # looked at when batches have doubled, and not between
    assert stop.is_over(8, observed.get)


@pytest.mark.parametrize("value", [0.0, -0.1, 1.5, float("nan")])
def test_an_angle_that_is_none_is_refused(value):
    model = nn.ModuleDict({"layer": nn.Linear(WIDTH, 10)})
    with pytest.raises(ValueError, match="early_stop"):
        initialize(model, "eva", [], lambda _: torch.zeros(()), target_modules=["layer"], early_stop=value)
