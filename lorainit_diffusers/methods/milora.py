"""MiLoRA (Wang et al. 2024, arXiv:2406.09044): the minor singular directions of the pre-trained weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorainit_diffusers.linalg import SVD, solve_dtype
from lorainit_diffusers.methods.base import LoraFactors, Observed, Observes, Solution, StepZero
from lorainit_diffusers.methods.declared import Declared
from lorainit_diffusers.methods.pissa import balanced_factors
from lorainit_diffusers.statistics import Statistic


@dataclass(frozen=True)
class MiLoRA(Declared):
    """A and B are the bottom-r singular triplets of W0; the adapter is offset."""

    observes: ClassVar[Observes] = "nothing"
    summary: ClassVar[str] = "The smallest singular directions of the weight, subtracted again from the base."
    source: ClassVar[str] = "arXiv:2406.09044"
    cost: ClassVar[str] = "one full SVD a layer; no data"
    gives_scores: ClassVar[bool] = False

    @property
    def step_zero(self) -> StepZero:
        """The adapter subtracts the initial B A."""
        return "offset"

    def statistic(self, in_features: int, out_features: int, rank: int) -> Statistic | None:
        """Nothing is observed."""
        return None

    def solve(
        self, weight: Tensor, statistic: Observed | None, max_rank: int, *, scaling: float, generator: torch.Generator
    ) -> Solution:
        """No scores: a component is chosen for being small, which is no reason to give its layer rank."""
        # The smallest triplets need the whole decomposition; randomised methods find only the largest.
        matrix = weight.to(solve_dtype(max(weight.shape), weight.device))
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)

        def factors(rank: int) -> LoraFactors:
            return balanced_factors(SVD(left[:, -rank:], values[-rank:], right[-rank:]), rank, scaling)

        return Solution(None, factors)
