"""LoRA-GA (Wang et al. 2024, arXiv:2407.05000): aligned with the full fine-tuning gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lorainit_diffusers.linalg import top_svd
from lorainit_diffusers.methods.base import LoraFactors, Observed, Observes, Solution, StepZero, check_hyperparameters
from lorainit_diffusers.methods.declared import Declared
from lorainit_diffusers.ranges import Range
from lorainit_diffusers.statistics import GradientMean, Statistic


@dataclass(frozen=True)
class LoraGA(Declared):
    """A and B are disjoint singular directions of the mean gradient; the adapter is offset.

    With `G = U S V'`, the first gradient step on A and B then moves B A along the best rank-2r approximation of G
    (theorem 3.1). No singular value enters either factor, unlike PEFT's `lora_ga`.

    Attributes:
        direction: Which triplets A and B take: `"ArB2r"` A = V[:r], B = U[r:2r] (the paper's equation 6);
            `"A2rBr"` the reverse; `"ArBr"` alternating; `"random"` disjoint random halves of the first 2r.
        scale: `"stable"` both factors times d_out^(1/4) / sqrt(gamma) (theorem 3.2); `"gd"` both divided by the
            scaling alpha / r; `"unit"` as they are.
        gamma: Of `"stable"`; the paper has 16, with which both factors are half as large and learn more slowly here.
    """

    observes: ClassVar[Observes] = "gradients"
    summary: ClassVar[str] = (
        "Directions of the weight's mean gradient in A and, disjoint from them, in B, subtracted again from the base."
    )
    source: ClassVar[str] = "arXiv:2407.05000"
    cost: ClassVar[str] = (
        "one forward and backward pass a batch, one gradient in the size of the weight and its truncated SVD a layer"
    )
    RANGES: ClassVar[Mapping[str, Range]] = {"gamma": Range(0, 10**6, above=True)}

    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r"
    scale: Literal["stable", "gd", "unit"] = "stable"
    gamma: float = 4.0

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    @property
    def step_zero(self) -> StepZero:
        """The adapter subtracts the initial B A."""
        return "offset"

    def largest_rank(self, in_features: int, out_features: int, at_most: int) -> int:
        """Half of the layer's singular directions: A and B have disjoint ones."""
        return min(at_most, min(in_features, out_features) // 2)

    def statistic(self, in_features: int, out_features: int, rank: int) -> Statistic | None:
        """The mean gradient of the weight.

        Raises:
            ValueError: The layer has fewer than 2 * rank singular directions to give to A and B.
        """
        if 2 * rank > min(in_features, out_features):
            raise ValueError(
                f"init 'lora_ga' gives A and B disjoint directions: 2 * rank = {2 * rank} exceeds the smallest "
                f"dimension {min(in_features, out_features)} of the layer; "
                f"use rank {min(in_features, out_features) // 2} or less"
            )
        return GradientMean((out_features, in_features))

    def solve(
        self, weight: Tensor, statistic: Observed | None, max_rank: int, *, scaling: float, generator: torch.Generator
    ) -> Solution:
        """Scores are the shares of ||G||_F^2.

        Raises:
            ValueError: The statistic is not a gradient.
        """
        if not isinstance(statistic, GradientMean):
            raise ValueError(
                "init 'lora_ga' needs the mean gradient; run the collection pass with observes='gradients'"
            )
        gradient = statistic.mean()
        svd = top_svd(gradient, 2 * max_rank)
        total = gradient.to(svd.values.dtype).square().sum()
        out_features = weight.shape[0]
        scores = svd.values[:max_rank].square() / total.clamp_min(torch.finfo(total.dtype).tiny)

        def factors(rank: int) -> LoraFactors:
            if self.direction == "ArB2r":
                for_A, for_B = torch.arange(rank), torch.arange(rank, 2 * rank)
            elif self.direction == "A2rBr":
                for_A, for_B = torch.arange(rank, 2 * rank), torch.arange(rank)
            elif self.direction == "ArBr":
                for_A, for_B = torch.arange(1, 2 * rank, 2), torch.arange(0, 2 * rank, 2)
            else:
                order = torch.randperm(2 * rank, generator=generator)
                for_A, for_B = order[:rank], order[rank:]
            if self.scale == "stable":
                factor = out_features**0.25 / self.gamma**0.5
            else:
                factor = 1.0 / scaling if self.scale == "gd" else 1.0
            lora_A = svd.right[for_A.to(svd.right.device)] * factor
            lora_B = svd.left[:, for_B.to(svd.left.device)] * factor
            return LoraFactors(lora_A.float().contiguous(), lora_B.float().contiguous())

        return Solution(scores, factors)
