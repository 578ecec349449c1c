"""CorDA (Yang et al. 2024, arXiv:2406.05223), instruction-previewed mode: context-oriented decomposition of W0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorainit_diffusers.linalg import top_svd
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
from lorainit_diffusers.ranges import Range
from lorainit_diffusers.statistics import SecondMoment, Statistic


@dataclass(frozen=True)
class CorDA:
    """Top-r triplets of SVD(W0 S), with S^-1 multiplied back on the right; the base is offset (a frozen twin).

    Attributes:
        ridge: added to S before it is inverted, as a multiple of its mean eigenvalue. The authors' code raises a
            damping of 0.01 until the inverse is accurate; a fixed ridge is reproducible.
    """

    observes: ClassVar[Observes] = "inputs"
    # CorDA inverts the second moment
    RANGES: ClassVar[Mapping[str, Range]] = {"ridge": Range(0, 10**6, above=True)}

    ridge: float = 0.01

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    @property
    def step_zero(self) -> StepZero:
        """A frozen twin adapter subtracts the initial B A."""
        return "offset"

    def statistic(self, in_features: int, out_features: int, rank: int) -> Statistic | None:
        """The exact second moment of the inputs."""
        return SecondMoment(in_features)

    def solve(
        self, weight: Tensor, statistic: Observed | None, max_rank: int, *, scaling: float, generator: torch.Generator
    ) -> Solution:
        """Scores are the shares of ||W0 S||_F^2."""
        basis = input_statistic(statistic).eigenbasis(centered=False)
        values = basis.values
        # In S's eigenbasis the product with S and its inverse are row scalings.
        spectrum = values + self.ridge * one_if_zero(values.mean())
        weighted = basis.project(weight.to(values.dtype)) * spectrum
        svd = top_svd(weighted, max_rank)
        scores = svd.values.square() / one_if_zero(weighted.square().sum())

        def factors(rank: int) -> LoraFactors:
            root = (svd.values[:rank] / scaling).sqrt()
            lora_A = root[:, None] * basis.lift(svd.right[:rank] / spectrum)
            return LoraFactors(lora_A.float(), (svd.left[:, :rank] * root).float())

        return Solution(scores, factors)
