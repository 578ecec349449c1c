"""Our own: the directions that carry the gradient, in coordinates in which the layer's inputs are white.

With B = 0, the first gradient of B is G A' (G: mean gradient of the weight). Of all A whose hidden activations A x are
white, the one that gives this gradient the largest norm is A = V_r' S_l^(-1/2), with G S_l^(-1/2) = U Sigma V' and S_l
the ridged second moment of the inputs. The first update of B then acts in the steepest directions, and none of them
learns faster because its inputs are larger. K-FAC (Martens & Grosse 2015, arXiv:1503.05671) preconditions by the same
matrix; LoRA-GA takes the directions of G alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lorainit_diffusers.linalg import top_svd
from lorainit_diffusers.methods.base import (
    LoraFactors,
    Observed,
    Observes,
    Solution,
    StepZero,
    check_choices,
    kaiming_input_power,
    one_if_zero,
    zeros_like_output,
)
from lorainit_diffusers.statistics import GradientMean, InputsAndGradient, SecondMoment


@dataclass(frozen=True)
class GradientWhitened:
    """A = the top-r right singular vectors of the whitened gradient; B = 0, or one gradient step.

    Attributes:
        ridge: added to the second moment S, as a multiple of its mean eigenvalue.
        whiten: False leaves S out: the top-r right singular vectors of G itself.
        scale: of A. ``"matched"``: E||A x||^2 as PEFT's Kaiming initialisation has it; ``"unit"``: ||A||_F =
            sqrt(rank).
        step: 0 keeps B = 0. Otherwise B = -c G A', one step of gradient descent on B, of the length c that changes the
            outputs of the layer on the collected inputs by this fraction: E||s B A x||^2 = step^2 E||W0 x||^2.
    """

    observes: ClassVar[Observes] = "inputs and gradients"

    ridge: float = 0.1
    whiten: bool = True
    scale: Literal["matched", "unit"] = "matched"
    step: float = 0.0

    def __post_init__(self) -> None:
        check_choices(self)
        if self.ridge <= 0:
            raise ValueError(f"ridge is {self.ridge}; it must be positive, or directions without data are blown up")
        if self.step < 0:
            raise ValueError(f"step is {self.step}; it must not be negative: 0 starts from the base model")

    @property
    def step_zero(self) -> StepZero:
        """Without a step, B A = 0; with one, the model starts after it."""
        return "moved" if self.step else "equal"

    def statistic(self, in_features: int, out_features: int, rank: int) -> Observed | None:
        """The exact second moment of the inputs and the mean gradient of the weight."""
        return InputsAndGradient(SecondMoment(in_features), GradientMean((out_features, in_features)))

    def solve(
        self, weight: Tensor, statistic: Observed | None, max_rank: int, *, scaling: float, generator: torch.Generator
    ) -> Solution:
        """Scores are the shares of ||G S_l^(-1/2)||_F^2 (without whitening: of ||G||_F^2).

        Raises:
            ValueError: the statistic is not one of inputs and gradient.
        """
        if not isinstance(statistic, InputsAndGradient):
            raise ValueError(
                "init 'gradient_whitened' needs inputs and gradients; run the collection pass with "
                "observes='inputs and gradients'"
            )
        values, vectors = statistic.inputs.eigh(centered=False)
        ridged = values + self.ridge * one_if_zero(values.mean())
        root = ridged.sqrt() if self.whiten else torch.ones_like(ridged)
        gradient = statistic.gradient.mean().to(vectors) @ vectors  # columns in the eigenbasis of S
        svd = top_svd(gradient / root, max_rank)
        total = (gradient / root).square().sum()
        scores = svd.values.square() / total.clamp_min(torch.finfo(total.dtype).tiny)

        def factors(rank: int) -> LoraFactors:
            lora_A = svd.right[:rank] / root
            power = (lora_A.square() * values).sum()
            wanted = rank * kaiming_input_power(statistic.inputs.trace(centered=False), weight.shape[1])
            if self.scale == "unit" or float(power) == 0:
                lora_A = lora_A * (rank**0.5 / lora_A.norm())
            else:
                lora_A = lora_A * (wanted / power).sqrt()
            lora_B = -gradient @ lora_A.mT if self.step else zeros_like_output(weight, rank).to(lora_A)
            change = scaling * (lora_B @ lora_A * values.sqrt()).norm()
            output = (weight.to(vectors) @ vectors * values.sqrt()).norm()
            lora_B = lora_B * (self.step * output / one_if_zero(change))
            return LoraFactors((lora_A @ vectors.mT).float().contiguous(), lora_B.float().contiguous())

        return Solution(scores, factors)
