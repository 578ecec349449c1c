"""Random A with orthonormal rows, zero B: the strongest data-free baseline of our first measurements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorainit_diffusers.methods.base import LoraFactors, Observed, Observes, Solution, StepZero, zeros_of_output
from lorainit_diffusers.methods.declared import Declared
from lorainit_diffusers.statistics import Statistic


@dataclass(frozen=True)
class Orthonormal(Declared):
    """A uniform among the matrices with orthonormal rows, B = 0. Not PEFT's `orthogonal`, whose B is not zero."""

    observes: ClassVar[Observes] = "nothing"
    summary: ClassVar[str] = "A random with orthonormal rows, B = 0."
    source: ClassVar[str] = "our control; its draw is arXiv:math-ph/0609050's"
    cost: ClassVar[str] = "one thin QR of a random matrix a layer"
    gives_scores: ClassVar[bool] = False

    @property
    def step_zero(self) -> StepZero:
        """B A = 0."""
        return "equal"

    def statistic(self, in_features: int, out_features: int, rank: int) -> Statistic | None:
        """Nothing is observed."""
        return None

    def solve(
        self, weight: Tensor, statistic: Observed | None, max_rank: int, *, scaling: float, generator: torch.Generator
    ) -> Solution:
        """Draw A; there are no scores."""
        in_features, device, zeros = weight.shape[1], weight.device, zeros_of_output(weight)

        def factors(rank: int) -> LoraFactors:
            gaussian = torch.randn(in_features, rank, generator=generator, dtype=torch.float64)
            basis, triangular = torch.linalg.qr(gaussian)
            # Fixing the signs that QR leaves open makes the draw uniform (Mezzadri 2007, arXiv:math-ph/0609050).
            lora_A = (basis * triangular.diagonal().sign()).mT.float().contiguous()
            return LoraFactors(lora_A.to(device), zeros(rank))

        return Solution(None, factors)
