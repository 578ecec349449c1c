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
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lorainit_diffusers.linalg import operator_svd, times, top_svd, transposed_times
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
from lorainit_diffusers.methods.declared import Declared, Signal
from lorainit_diffusers.ranges import Range
from lorainit_diffusers.statistics import GradientMean, InputsAndGradient, InputStatistic, SecondMoment


@dataclass(frozen=True)
class GradientStep(Declared):
    """A from the data, B after one gradient step.

    Attributes:
        directions: What A's rows span. `"inputs"`: the top-r eigenvectors of the centred covariance (EVA);
            `"gradient"`: the top-r right singular vectors of G; `"whitened_gradient"`: see the module's docstring.
        step: Relative change of the layer's outputs at step 0; 0 keeps B = 0.
        scale: Of A. `"unit"`: ||A||_F = sqrt(rank); `"matched"`: E||A x||^2 as PEFT's Kaiming initialisation has.
        ridge: Added to S for the whitening, as a multiple of its mean eigenvalue.
    """

    observes: ClassVar[Observes] = "inputs and gradients"
    summary: ClassVar[str] = "A along the weight's mean gradient, B after one step of gradient descent."
    source: ClassVar[str] = "our own; up to one scalar a layer it is arXiv:2502.01235's (LoRA-One)"
    cost: ClassVar[str] = (
        "one forward and backward pass a batch, a second moment for each group of layers with the same input, one "
        "gradient in the size of the weight and its truncated SVD a layer"
    )
    zero_delta: ClassVar[Mapping[str, Any]] = {"step": 0}
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

    @property
    def learns_from(self) -> frozenset[Signal]:
        """From what varies in the inputs where these give the directions, else from inputs and gradient."""
        return frozenset({"variation"}) if self.directions == "inputs" else frozenset({"inputs", "gradient"})

    def statistic(self, in_features: int, out_features: int, rank: int) -> Observed | None:
        """The exact second moment of the inputs and the mean gradient of the weight."""
        return InputsAndGradient(SecondMoment(in_features), GradientMean((out_features, in_features)))

    def solve(
        self, weight: Tensor, statistic: Observed | None, max_rank: int, *, scaling: float, generator: torch.Generator
    ) -> Solution:
        """Scores are the shares that the directions have of the variance, of ||G||_F^2 or of ||G S_l^(-1/2)||_F^2.

        Raises:
            ValueError: The statistic is not one of inputs and gradient.
        """
        if not isinstance(statistic, InputsAndGradient):
            raise ValueError(
                "this init needs inputs and gradients; run the collection pass with observes='inputs and gradients'"
            )
        inputs = statistic.inputs
        gradient = statistic.gradient.mean()
        if self.directions == "inputs":
            worth, vectors = inputs.leading(max_rank, centered=True)
            basis, total = vectors.mT, inputs.trace(centered=True)
        elif self.directions == "gradient":
            svd = top_svd(gradient, max_rank)
            basis, worth, total = svd.right, svd.values.square(), float(gradient.double().square().sum())
        else:
            basis, worth, total = self._whitened(gradient, inputs, max_rank)
        scores = worth / max(total, torch.finfo(worth.dtype).tiny)

        basis_moment = basis @ inputs.times(basis.mT)  # E[h h'] of the hidden activations h = basis x
        base_norm = max(inputs.output_power(weight), 0.0) ** 0.5 if self.step else None
        kaiming_power = kaiming_input_power(inputs.trace(centered=False), weight.shape[1])
        zeros = zeros_of_output(weight)
        descent = None if base_norm is None else -times(gradient, basis.mT)  # (out_features, max_rank)

        def factors(rank: int) -> LoraFactors:
            lora_A = basis[:rank]
            moment = basis_moment[:rank, :rank]
            hidden = moment.diagonal().sum().clamp_min(0).sqrt()
            if self.scale == "matched" and float(hidden) > 0:
                length = (rank * kaiming_power) ** 0.5 / hidden
            else:
                length = rank**0.5 / lora_A.norm()
            lora_B = zeros(rank).to(lora_A)
            if base_norm is not None and descent is not None:
                lora_B = descent[:, :rank]
                # E||B A x||^2 = tr(B E[h h'] B') with h = A x
                change = ((lora_B @ moment) * lora_B).sum().clamp_min(0).sqrt() * length
                lora_B = lora_B * (self.step * base_norm / scaling / one_if_zero(change))
            return LoraFactors((lora_A * length).float().contiguous(), lora_B.float().contiguous())

        return Solution(scores, factors)

    def _whitened(self, gradient: Tensor, inputs: InputStatistic, max_rank: int) -> tuple[Tensor, Tensor, float]:
        """A's rows V' S_l^(-1/2), squared singular values and squared norm of G S_l^(-1/2) = U Sigma V'."""
        ridged = inputs.ridged(self.ridge)
        svd, total = operator_svd(
            lambda block: times(gradient, ridged.whiten_transposed(block)),
            lambda block: ridged.whiten(transposed_times(gradient, block)),
            (gradient.shape[0], gradient.shape[1]),
            max_rank,
            device=gradient.device,
            with_norm=True,
            delicate=True,
        )
        return ridged.whiten_transposed(svd.right.mT).mT, svd.values.square(), total


@dataclass(frozen=True)
class GradientWhitened(GradientStep):
    """A = the leading directions of the whitened gradient, B = 0; attributes as in `GradientStep`."""

    summary: ClassVar[str] = "A along the weight's mean gradient where the inputs are white, B = 0."
    source: ClassVar[str] = "our own; it preconditions by the matrix of K-FAC, arXiv:1503.05671"
    cost: ClassVar[str] = (
        "one forward and backward pass a batch, a second moment for each group of layers with the same input, one "
        "gradient in the size of the weight, its truncated SVD and a solve a layer"
    )

    directions: Literal["inputs", "gradient", "whitened_gradient"] = "whitened_gradient"
    step: float = 0.0
    scale: Literal["unit", "matched"] = "matched"
