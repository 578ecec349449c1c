"""How the tests of this folder run a method on one layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from core_fixtures import feed
from torch import Tensor

from lorainit_diffusers.initialize import make_method
from lorainit_diffusers.methods import Solution
from lorainit_diffusers.statistics import InputsAndReference


@pytest.fixture
def fill() -> Callable[[Any, Any], None]:
    """fill(statistic, observed): feed it in batches.

    `observed` are rows of inputs, a list of gradients, a pair of both, or a pair of rows and reference rows.
    """

    def run(statistic: Any, observed: Any) -> None:
        if isinstance(statistic, InputsAndReference):
            feed(statistic.inputs, observed[0])
            feed(statistic.reference, observed[1])
        else:
            feed(statistic, observed)

    return run


@pytest.fixture
def solve(fill: Callable[[Any, Any], None]) -> Callable[..., Solution]:
    """solve(name, weight, observed, max_rank, scaling=, seed=, **options): the method's solution for one layer."""

    def run(
        name: str,
        weight: Tensor,
        observed: Any = None,
        max_rank: int = 4,
        *,
        scaling: float = 1.0,
        seed: int = 0,
        **options: Any,
    ) -> Solution:
        method = make_method(name, options)
        statistic = method.statistic(weight.shape[1], weight.shape[0], max_rank)
        if statistic is not None:
            assert observed is not None
            fill(statistic, observed)
        generator = torch.Generator().manual_seed(seed)
        return method.solve(weight, statistic, max_rank, scaling=scaling, generator=generator)

    return run
