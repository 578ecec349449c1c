"""Our own: B starts after one step of gradient descent, taken in closed form.

With A fixed and B = 0, the gradient of B is G A' (G: mean gradient of the weight over the collected batches, far less
noisy than that of one training batch). B = -c G A' is where the first step of gradient descent would lead. How long a
step is allowed to be is said in units that mean the same in every layer and model: the fraction by which it changes the
outputs of the layer on the collected inputs, E||s B A x||^2 = step^2 E||W0 x||^2.

`gradient_step` takes A from the gradient, too: its top right singular vectors, so that B A is a multiple of the best
rank-r approximation of -G. `gradient_whitened` looks for them in coordinates in which the inputs are white, and keeps
B = 0: of all A whose hidden activations are white, A = V_r' S_l^(-1/2) with G S_l^(-1/2) = U Sigma V' (S_l: the ridged
second moment) gives B the gradient of the largest norm. K-FAC (Martens & Grosse 2015, arXiv:1503.05671) preconditions
by the same matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    check_hyperparameters,
    kaiming_input_power,
    one_if_zero,
    zeros_of_output,
)
from lorainit_diffusers.ranges import Range
from lorainit_diffusers.statistics import GradientMean, InputsAndGradient, SecondMoment


@dataclass(frozen=True)
class GradientStep:
    """A from the data, B after one gradient step.

    Attributes:
        directions: what A's rows span. ``"inputs"``: the top-r eigenvectors of the centred covariance (EVA);
            ``"gradient"``: the top-r right singular vectors of G; ``"whitened_gradient"``: see the module's docstring.
        step: relative change of the layer's outputs at step 0; 0 keeps B = 0.
        scale: of A. ``"unit"``: ||A||_F = sqrt(rank); ``"matched"``: E||A x||^2 as PEFT's Kaiming initialisation has.
        ridge: added to S for the whitening, as a multiple of its mean eigenvalue.
    """

    observes: ClassVar[Observes] = "inputs and gradients"
    # a step of 0 starts from the base model; without a ridge, directions without data would be blown up
    RANGES: ClassVar[Mapping[str, Range]] = {"step": Range(0, 100), "ridge": Range(0, 10**6, above=True)}

    directions: Literal["inputs", "gradient", "whitened_gradient"] = "gradient"
    step: float = 0.08
    scale: Literal["unit", "matched"] = "unit"
    ridge: float = 0.1

    def __post_init__(self) -> None:
        check_hyperparameters(self)

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
        """Scores are the shares that the directions have of the variance, of ||G||_F^2 or of ||G S_l^(-1/2)||_F^2.

        Raises:
            ValueError: the statistic is not one of inputs and gradient.
        """
        if not isinstance(statistic, InputsAndGradient):
            raise ValueError(
                "this init needs inputs and gradients; run the collection pass with observes='inputs and gradients'"
            )
        inputs = statistic.inputs
        eigenbasis = inputs.eigenbasis(centered=False)
        values = eigenbasis.values
        gradient = statistic.gradient.mean().to(values)
        if self.directions == "inputs":
            centred = inputs.eigenbasis(centered=True)
            basis, worth, total = centred.vectors[:, :max_rank].mT, centred.values[:max_rank], centred.values.sum()
        else:
            ridged = values + self.ridge * one_if_zero(values.mean())
            root = ridged.sqrt() if self.directions == "whitened_gradient" else torch.ones_like(ridged)
            in_eigenbasis = eigenbasis.project(gradient) / root
            svd = top_svd(in_eigenbasis, max_rank)
            basis = eigenbasis.lift(svd.right / root)
            worth, total = svd.values.square(), in_eigenbasis.square().sum()
        scores = worth / total.clamp_min(torch.finfo(total.dtype).tiny)

        def output_norm(matrix: Tensor) -> Tensor:
            """sqrt(E||matrix x||^2) over the collected rows."""
            return (eigenbasis.project(matrix) * values.clamp_min(0).sqrt()).norm()

        base_norm = output_norm(weight.to(values)) if self.step else None
        kaiming_power = kaiming_input_power(inputs.trace(centered=False), weight.shape[1])
        zeros = zeros_of_output(weight)

        def factors(rank: int) -> LoraFactors:
            lora_A = basis[:rank]
            hidden = output_norm(lora_A)
            if self.scale == "matched" and float(hidden) > 0:
                lora_A = lora_A * ((rank * kaiming_power) ** 0.5 / hidden)
            else:
                lora_A = lora_A * (rank**0.5 / lora_A.norm())
            lora_B = zeros(rank).to(lora_A)
            if base_norm is not None:
                lora_B = -gradient @ lora_A.mT
                length = self.step * base_norm / scaling
                lora_B = lora_B * (length / one_if_zero(output_norm(lora_B @ lora_A)))
            return LoraFactors(lora_A.float().contiguous(), lora_B.float().contiguous())

        return Solution(scores, factors)


@dataclass(frozen=True)
class GradientWhitened(GradientStep):
    """A = the leading directions of the whitened gradient, B = 0; attributes as in :class:`GradientStep`."""

    directions: Literal["inputs", "gradient", "whitened_gradient"] = "whitened_gradient"
    step: float = 0.0
    scale: Literal["unit", "matched"] = "matched"
