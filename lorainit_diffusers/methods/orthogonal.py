"""PEFT's orthogonal initialisation: both factors random, their product zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorainit_diffusers.methods.base import LoraFactors, Observed, Observes, Solution, StepZero
from lorainit_diffusers.methods.declared import Declared
from lorainit_diffusers.statistics import Statistic


@dataclass(frozen=True)
class Orthogonal(Declared):
    """A and B random in orthogonal halves of an r-dimensional space, so that B A = 0 although neither is zero.

    As PEFT's `init_lora_weights="orthogonal"` (https://datta0.github.io/posts/rethink-lora-init/).
    """

    observes: ClassVar[Observes] = "nothing"
    summary: ClassVar[str] = "A and B random in orthogonal halves, so that B A = 0 although neither is zero."
    source: ClassVar[str] = "PEFT's orthogonal"
    cost: ClassVar[str] = "one QR of a rank x rank matrix a layer"
    gives_scores: ClassVar[bool] = False

    @property
    def step_zero(self) -> StepZero:
        """B A = 0."""
        return "equal"

    def largest_rank(self, in_features: int, out_features: int, at_most: int) -> int:
        """An even one."""
        return at_most - at_most % 2

    def statistic(self, in_features: int, out_features: int, rank: int) -> Statistic | None:
        """Nothing is observed.

        Raises:
            ValueError: The rank is odd.
        """
        if rank % 2:
            raise ValueError(f"init 'orthogonal' splits the rank in halves, so it must be even; got rank {rank}")
        return None

    def solve(
        self, weight: Tensor, statistic: Observed | None, max_rank: int, *, scaling: float, generator: torch.Generator
    ) -> Solution:
        """Draw A and B; there are no scores."""
        (out_features, in_features), device = weight.shape, weight.device

        def factors(rank: int) -> LoraFactors:
            basis = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
            lora_A = (torch.randn(in_features, rank // 2, generator=generator) @ basis[0::2]).mT / 10
            lora_B = torch.randn(out_features, rank // 2, generator=generator) @ basis[1::2] / 10
            return LoraFactors(lora_A.contiguous().to(device), lora_B.to(device))

        return Solution(None, factors)
