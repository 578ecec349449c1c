"""Gradients and weights that are not finite stop a run before they are used; clipping means what it means elsewhere."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from lorainit_diffusers.families.base import StepRecord
from lorainit_diffusers.training.gradients import LEAST_SCALE, clip_gradients, gradient_error, weight_at_fault
from lorainit_diffusers.training.loop import backward_step

BAD = [math.nan, math.inf, -math.inf]


def with_gradients(*gradients: Sequence[float] | None) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.ones(len(values or [0.0]))) for values in gradients]
    for parameter, values in zip(parameters, gradients, strict=True):
        parameter.grad = None if values is None else torch.tensor(values)
    return parameters


def gradients_of(parameters: Sequence[nn.Parameter]) -> list[list[float] | None]:
    return [None if p.grad is None else p.grad.tolist() for p in parameters]


# ----------------------------------------------------------------------------------------------------------- clipping


def test_gradients_are_scaled_down_together_to_the_norm() -> None:
    parameters = with_gradients([3.0, 0.0], None, [4.0])
    assert clip_gradients(parameters, 1.0) == 5.0
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.6, 0.0]))
    torch.testing.assert_close(parameters[2].grad, torch.tensor([0.8]))


@pytest.mark.parametrize("limit", [0, 0.0, -0.0, 5.01, 1e9])
def test_zero_clips_nothing_and_a_norm_within_the_limit_is_left_alone(limit: float) -> None:
    parameters = with_gradients([3.0, -0.1], None, [4.0])
    before = gradients_of(parameters)
    assert clip_gradients(parameters, limit) == pytest.approx(math.sqrt(25.01))
    assert gradients_of(parameters) == before


@pytest.mark.parametrize("limit", [0.0, 1.0])
@pytest.mark.parametrize("bad", BAD)
def test_gradients_whose_norm_is_not_finite_are_left_as_they_are(bad: float, limit: float) -> None:
    parameters = with_gradients([1.0], [2.0, bad])
    assert not math.isfinite(clip_gradients(parameters, limit))
    assert gradients_of(parameters[:1]) == [[1.0]]
    assert parameters[1].grad is not None
    assert parameters[1].grad[0] == 2.0


def test_a_norm_beyond_float32_is_not_finite_although_every_gradient_is() -> None:
    assert clip_gradients(with_gradients([1e30, 1.0]), 1.0) == math.inf


def test_no_gradients_have_no_norm() -> None:
    assert clip_gradients(with_gradients(None, None), 1.0) == 0.0
    assert clip_gradients([], 1.0) == 0.0


# ------------------------------------------------------------------------------------------------------------- errors


def named(*gradients: Sequence[float] | None) -> tuple[dict[str, nn.Module], list[nn.Parameter]]:
    parameters = with_gradients(*gradients)
    module = nn.Module()
    for index, parameter in enumerate(parameters):
        module.register_parameter(f"weight_{index}", parameter)
    return {"unet": module}, parameters


def error_of(*gradients: Sequence[float] | None, norm: float = math.inf, scale: float | None = None) -> str | None:
    modules, parameters = named(*gradients)
    error = gradient_error(modules, parameters, norm, step=7, loss=0.25, remedy="lower it", scale=scale)
    return None if error is None else str(error)


@pytest.mark.parametrize("bad", BAD)
def test_the_error_names_the_step_the_loss_and_the_parameter(bad: float) -> None:
    message = "the gradient of unet.weight_2 is not finite at step 7, where the loss is 0.25; lower it"
    assert error_of([1.0], None, [0.0, bad], [bad]) == message


def test_where_only_the_norm_is_infinite_the_largest_gradient_is_named() -> None:
    message = error_of([1.0], [-1e30], [1e25])
    assert message is not None
    assert message.startswith("the gradient of unet.weight_1 is the largest of those whose squares exceed float32")


def test_a_scaler_skips_a_step_of_infinities_but_not_forever_and_no_other() -> None:
    assert error_of([math.inf], scale=65536.0) is None
    assert error_of([math.nan], scale=LEAST_SCALE) is None
    assert error_of([math.nan], scale=LEAST_SCALE / 2) is not None
    assert error_of([1e30], scale=65536.0) is not None  # the scaler sees no infinity, and would use it
    assert error_of([1.0], norm=1.0) is None


def test_a_parameter_outside_the_modules_is_named_by_its_place() -> None:
    parameters = with_gradients([1.0], [math.nan])
    error = gradient_error({}, parameters, math.nan, step=1, loss=1.0, remedy="x")
    assert "parameter 1" in str(error)


@pytest.mark.parametrize("bad", BAD)
def test_the_first_weight_that_is_not_finite_is_named(bad: float) -> None:
    modules, parameters = named([1.0], [1.0], [1.0])
    assert weight_at_fault(modules, parameters) is None
    with torch.no_grad():
        parameters[1][0] = bad
        parameters[2][0] = bad
    assert weight_at_fault(modules, parameters) == "unet.weight_1"


# ---------------------------------------------------------------------------------------------------- one step of a run


class Explosive:
    """A family whose loss is 1 and whose gradient is what the batch says."""

    def __init__(self) -> None:
        self.module = nn.Linear(1, 1, bias=False)
        self.step = StepRecord()
        self.adapted, self.heads = {"model": self.module}, {}

    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        weight = self.module.weight.sum()
        weight.register_hook(lambda gradient: gradient * batch)
        return weight - weight.detach() + 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_one_infinite_gradient_with_a_finite_loss_is_stopped(bad: float, accumulation: int, limit: float) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    family = Explosive()
    args = argparse.Namespace(gradient_accumulation_steps=accumulation, seed=0, learning_rate=0.5, max_grad_norm=limit)
    before = family.module.weight.detach().clone()

    def step(*values: float) -> tuple[float, float]:
        batches: Iterator[Any] = iter([torch.tensor(value) for value in values])
        return backward_step(args, cast(Any, family), batches, Accelerator(), [family.module.weight], 4)

    assert step(*[1.0] * accumulation) == (1.0, 1.0)
    with pytest.raises(
        ValueError, match=r"gradient of model\.weight is not finite at step 4, .*loss is 1; lower --l.*0\.5"
    ):
        step(*[1.0] * (accumulation - 1), bad)
    assert torch.equal(family.module.weight.detach(), before)


def test_a_scaler_gets_the_step_to_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator()
    monkeypatch.setattr(accelerator, "scaler", SimpleNamespace(get_scale=lambda: 4.0, scale=lambda loss: loss))
    family = Explosive()
    args = argparse.Namespace(gradient_accumulation_steps=1, seed=0, learning_rate=0.5, max_grad_norm=1.0)
    batches: Iterator[Any] = iter([torch.tensor(math.inf)])
    loss, norm = backward_step(args, cast(Any, family), batches, accelerator, [family.module.weight], 4)
    assert (loss, norm) == (1.0, math.inf)
