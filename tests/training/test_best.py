"""The best line of a log: direction, ties, values that are not finite, lines that are no validations."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lorainit_diffusers.training.best import best_line, is_better

LOSSES = [
    {"step": 0, "validation_loss": 0.9},
    {"step": 1, "loss": 0.1, "lr": 1e-3},
    {"step": 50, "validation_loss": 0.5},
    {"step": 100, "validation_loss": 0.7},
]


def test_the_lowest_loss_and_the_highest_accuracy() -> None:
    assert best_line(LOSSES, "validation_loss", larger_is_better=False) == LOSSES[2]
    assert best_line(LOSSES, "validation_loss", larger_is_better=True) == LOSSES[0]


def test_no_validation_no_best() -> None:
    assert best_line([], "validation_loss", larger_is_better=False) is None
    assert best_line(LOSSES, "accuracy", larger_is_better=True) is None


def test_the_earliest_of_equals() -> None:
    lines = [{"step": step, "accuracy": value} for step, value in ((0, 0.2), (10, 0.8), (20, 0.8), (30, 0.5))]
    assert best_line(lines, "accuracy", larger_is_better=True) == lines[1]


@pytest.mark.parametrize("larger_is_better", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_count_as_missing(bad: float, larger_is_better: bool) -> None:
    lines: list[dict[str, Any]] = [
        {"step": 0, "accuracy": bad},
        {"step": 5, "accuracy": 0.3},
        {"step": 9, "accuracy": bad},
    ]
    assert best_line(lines, "accuracy", larger_is_better=larger_is_better) == lines[1]
    assert best_line(lines[:1], "accuracy", larger_is_better=larger_is_better) is None
    assert not is_better(bad, 0.3, larger_is_better=larger_is_better)


def test_evaluations_of_a_stage_are_no_validations() -> None:
    lines: list[dict[str, Any]] = [
        {"step": 0, "stage": "base", "accuracy": 0.95},
        {"step": 0, "accuracy": 0.1},
        {"step": 10, "accuracy": 0.6},
        {"step": 10, "stage": "end", "accuracy": 0.99},
    ]
    assert best_line(lines, "accuracy", larger_is_better=True) == lines[2]
