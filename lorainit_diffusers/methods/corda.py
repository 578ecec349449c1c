"""CorDA (Yang et al. 2024, arXiv:2406.05223), instruction-previewed mode: context-oriented decomposition of W0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorainit_diffusers.linalg import SVD, is_exact, krylov_svd, top_svd
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


@dataclass(frozen=True)
class CorDA(Declared):
    """Top-r triplets of SVD(W0 S), with S^-1 multiplied back on the right; the adapter is offset.

    Attributes:
        ridge: added to S before it is inverted, as a multiple of its mean eigenvalue. The authors' code raises a
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
        svd, right, total = self._decomposed(weight.to(inputs.like()), inputs, max_rank)
        scores = svd.values.square() / (total if total > 0 else 1.0)

        def factors(rank: int) -> LoraFactors:
            root = (svd.values[:rank] / scaling).sqrt()
            lora_A = root[:, None] * right[:rank]
            return LoraFactors(lora_A.float().contiguous(), (svd.left[:, :rank] * root).float().contiguous())

        return Solution(scores, factors)

    def _decomposed(self, weight: Tensor, inputs: InputStatistic, max_rank: int) -> tuple[SVD, Tensor, float]:
        """The leading triplets of W0 S, their right vectors times S^-1, and ||W0 S||_F^2."""
        if not is_exact(min(weight.shape), max_rank):
            ridged = inputs.ridged(self.ridge)

            def spread(block: Tensor) -> Tensor:
                return inputs.times(block) + ridged.ridge * block

            # As an operator: the product W0 S itself would cost more than everything else here.
            found = krylov_svd(
                lambda block: weight @ spread(block),
                lambda block: spread(weight.mT @ block),
                (weight.shape[0], weight.shape[1]),
                max_rank,
                like=weight,
                start=weight @ inputs.mean().to(weight)[:, None],  # the mean's output is far ahead of all others
                with_norm=True,
            )
            if found is not None:
                svd, total = found
                return svd, ridged.solve_accurately(svd.right.mT).mT, total
        # In S's eigenbasis the product with S and its inverse are row scalings.
        basis = inputs.eigenbasis(centered=False)
        spectrum = basis.values + self.ridge * one_if_zero(basis.values.mean())
        weighted = basis.project(weight) * spectrum
        svd = top_svd(weighted, max_rank)
        return svd, basis.lift(svd.right / spectrum), float(weighted.square().sum())
