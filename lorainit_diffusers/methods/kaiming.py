"""Kaiming-uniform A, zero B: PEFT's default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorainit_diffusers.methods.base import LoraFactors, Observed, Observes, Solution, StepZero, zeros_of_output
from lorainit_diffusers.methods.declared import Declared
from lorainit_diffusers.statistics import Statistic


@dataclass(frozen=True)
class Kaiming(Declared):
    """A uniform in +-1/sqrt(in_features) (Kaiming with a = sqrt(5)), B = 0, as `init_lora_weights=True` in PEFT."""

    observes: ClassVar[Observes] = "nothing"
    summary: ClassVar[str] = "A uniform as PEFT draws it by default (Kaiming), B = 0."
    source: ClassVar[str] = "PEFT's default"
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
            bound = in_features**-0.5
            lora_A = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
            return LoraFactors(lora_A.to(device), zeros(rank))

        return Solution(None, factors)
