"""Gaussian A, zero B: the default of diffusers' training scripts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorainit_diffusers.methods.base import LoraFactors, Observed, Observes, Solution, StepZero, zeros_of_output
from lorainit_diffusers.methods.declared import Declared
from lorainit_diffusers.statistics import Statistic


@dataclass(frozen=True)
class Gaussian(Declared):
    """A from N(0, 1 / rank^2), B = 0, as PEFT's `init_lora_weights="gaussian"`."""

    observes: ClassVar[Observes] = "nothing"
    summary: ClassVar[str] = "A from a normal distribution as diffusers' scripts draw it, B = 0."
    source: ClassVar[str] = "diffusers' default"
    cost: ClassVar[str] = "nothing: random numbers only"
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
            lora_A = torch.randn(rank, in_features, generator=generator) / rank
            return LoraFactors(lora_A.to(device), zeros(rank))

        return Solution(None, factors)
