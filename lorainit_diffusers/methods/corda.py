"""CorDA (Yang et al. 2024, arXiv:2406.05223), instruction-previewed mode: context-oriented decomposition of W0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorainit_diffusers.linalg import operator_svd, times, top_svd, transposed_times
from lorainit_diffusers.methods.base import (
    LoraFactors,
    Observed,
    Observes,
    Solution,
    StepZero,
    check_hyperparameters,
    input_statistic,
    one_if_zero,
)
from lorainit_diffusers.methods.declared import Declared
from lorainit_diffusers.ranges import Range
from lorainit_diffusers.statistics import InputStatistic, SecondMoment, Statistic

# Below this share of the largest, the squares of singular values of W0 S are rounding.
SMALLEST_SINGULAR_VALUE = 1e-6


@dataclass(frozen=True)
class CorDA(Declared):
    """Top-r triplets of SVD(W0 S), with S^-1 multiplied back on the right; the adapter is offset.

    With W0 S = U Sigma V', what is multiplied back is V' S^-1 = Sigma^-1 U' W0: no inverse is ever needed.

    Attributes:
        ridge: Added to S before it is inverted, as a multiple of its mean eigenvalue. The authors' code raises a
            damping of 0.01 until the inverse is accurate; a fixed ridge is reproducible.
    """

    observes: ClassVar[Observes] = "inputs"
    summary: ClassVar[str] = "The weight's singular directions, weighted by the inputs, subtracted again from the base."
    source: ClassVar[str] = "arXiv:2406.05223"
    cost: ClassVar[str] = (
        "one forward pass a batch, a second moment for each group of layers with the same input, a truncated SVD "
        "and a solve a layer"
    )
    # CorDA inverts the second moment
    RANGES: ClassVar[Mapping[str, Range]] = {"ridge": Range(0, 10**6, above=True)}

    ridge: float = 0.01

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    @property
    def step_zero(self) -> StepZero:
        """The adapter subtracts the initial B A."""
        return "offset"

    def statistic(self, in_features: int, out_features: int, rank: int) -> Statistic | None:
        """The exact second moment of the inputs."""
        return SecondMoment(in_features)

    def solve(
        self, weight: Tensor, statistic: Observed | None, max_rank: int, *, scaling: float, generator: torch.Generator
    ) -> Solution:
        """Scores are the shares of ||W0 S||_F^2."""
        inputs = input_statistic(statistic)
        left, values, right, total = self._decomposed(weight, inputs, max_rank)
        scores = values.square() / (total if total > 0 else 1.0)

        def factors(rank: int) -> LoraFactors:
            root = (values[:rank] / scaling).sqrt()
            lora_A = root[:, None] * right[:rank]
            return LoraFactors(lora_A.float().contiguous(), (left[:, :rank] * root).float().contiguous())

        return Solution(scores, factors)

    def _decomposed(
        self, weight: Tensor, inputs: InputStatistic, max_rank: int
    ) -> tuple[Tensor, Tensor, Tensor, float]:
        """U and Sigma of the leading triplets of W0 S = U Sigma V', V' S^-1, and ||W0 S||_F^2."""
        ridge = self.ridge * (inputs.trace(centered=False) / inputs.features or 1.0)

        def spread(block: Tensor) -> Tensor:
            return inputs.times(block) + ridge * block

        # As an operator: the product W0 S itself would cost more than everything else here.
        (left, values, _), total = operator_svd(
            lambda block: times(weight, spread(block)),
            lambda block: spread(transposed_times(weight, block)),
            (weight.shape[0], weight.shape[1]),
            max_rank,
            device=weight.device,
            start=weight @ inputs.mean().to(weight)[:, None],  # the mean's output is far ahead of all others
            with_norm=True,
        )
        if values[-1] > SMALLEST_SINGULAR_VALUE * values[0]:
            return left, values, transposed_times(weight, left).mT / values[:, None], total
        # In S's eigenbasis the product with S and its inverse are row scalings.
        basis = inputs.eigenbasis(centered=False)
        spectrum = basis.values + self.ridge * one_if_zero(basis.values.mean())
        weighted = basis.project(weight.to(spectrum)) * spectrum
        left, values, right = (part.to(spectrum) for part in top_svd(weighted, max_rank))
        return left, values, basis.lift(right / spectrum), float(weighted.square().sum())
