"""PiSSA (Meng et al. 2024, arXiv:2404.02948): the principal singular directions of the pre-trained weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorainit_diffusers.linalg import SVD, top_svd
from lorainit_diffusers.methods.base import LoraFactors, Observed, Observes, Solution, StepZero, one_if_zero
from lorainit_diffusers.methods.declared import Declared
from lorainit_diffusers.statistics import Statistic


def balanced_factors(svd: SVD, rank: int, scaling: float) -> LoraFactors:
    """Factors with `scaling * B A = U S V'` and the square root of S on both sides (PiSSA, equations 2-3)."""
    root = (svd.values[:rank] / scaling).sqrt()
    return LoraFactors((root[:, None] * svd.right[:rank]).float(), (svd.left[:, :rank] * root).float())


@dataclass(frozen=True)
class PiSSA(Declared):
    """A and B are the top-r singular triplets of W0; the base is offset, so that step 0 is the base model.

    The offset is a part of the adapter instead of the paper's changed base weights; the function is the same.
    """

    observes: ClassVar[Observes] = "nothing"
    summary: ClassVar[str] = "The largest singular directions of the weight, subtracted again from the base."
    source: ClassVar[str] = "arXiv:2404.02948"
    cost: ClassVar[str] = "one truncated SVD a layer; no data"

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
        """Scores are the shares of ||W0||_F^2."""
        svd = top_svd(weight, max_rank)
        scores = svd.values.square() / one_if_zero(weight.to(svd.values.dtype).square().sum())
        return Solution(scores, lambda rank: balanced_factors(svd, rank, scaling))
