"""EVA (Paischer et al. 2024, arXiv:2410.07170): the principal directions of the layer's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lorainit_diffusers.methods.base import (
    LoraFactors,
    Observed,
    Observes,
    Solution,
    StepZero,
    check_hyperparameters,
    input_statistic,
    kaiming_input_power,
    one_if_zero,
    zeros_of_output,
)
from lorainit_diffusers.methods.declared import Declared, Signal
from lorainit_diffusers.ranges import COUNT, Range
from lorainit_diffusers.statistics import SecondMoment, SketchedSecondMoment, Statistic


@dataclass(frozen=True)
class EVA(Declared):
    """A = the top-r eigenvectors of the input covariance, B = 0; ranks by explained-variance ratio.

    Where the authors and PEFT run an incremental SVD until it converges, this reads the eigenvectors off the exact
    covariance of the collected rows (or its Nyström sketch).

    Attributes:
        centered: Subtract the mean. Uncentred, the mean direction dwarfs all others on transformer inputs.
        whiten: Divide A's rows by the square root of: nothing (the paper); the `"singular_value"` of the rows (PEFT's
            `whiten`, made independent of the number of rows); the `"variance_ratio"` (the authors' vision code),
            after which all components of A x have equal variance.
        scale: `"paper"` leaves A as it is; `"matched"` rescales A so that E||A x||^2 over the collected rows is
            what PEFT's Kaiming initialisation would give.
        sketch_columns: Use a Nyström sketch of that many columns instead of the exact covariance.
    """

    observes: ClassVar[Observes] = "inputs"
    summary: ClassVar[str] = "The directions in which the layer's inputs vary most as A, B = 0."
    source: ClassVar[str] = "arXiv:2410.07170"
    cost: ClassVar[str] = (
        "one forward pass a batch, a second moment and its leading eigenvectors for each group of layers with the "
        "same input"
    )
    RANGES: ClassVar[Mapping[str, Range]] = {"sketch_columns": COUNT}

    centered: bool = True
    whiten: Literal["none", "singular_value", "variance_ratio"] = "none"
    scale: Literal["paper", "matched"] = "paper"
    sketch_columns: int | None = None

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    @property
    def step_zero(self) -> StepZero:
        """B A = 0."""
        return "equal"

    @property
    def learns_from(self) -> frozenset[Signal]:
        """Centred, from what varies in the inputs; else from the inputs."""
        return frozenset({"variation" if self.centered else "inputs"})

    def largest_rank(self, in_features: int, out_features: int, at_most: int) -> int:
        """No more than the columns of the sketch."""
        return at_most if self.sketch_columns is None else min(at_most, self.sketch_columns)

    def statistic(self, in_features: int, out_features: int, rank: int) -> Statistic | None:
        """The exact covariance of the inputs, or its sketch.

        Raises:
            ValueError: Fewer sketch columns than the rank.
        """
        if self.sketch_columns is None:
            return SecondMoment(in_features)
        if self.sketch_columns < rank:
            raise ValueError(f"sketch_columns {self.sketch_columns} is smaller than the rank {rank}; use at least that")
        return SketchedSecondMoment(in_features, min(self.sketch_columns, in_features))

    def solve(
        self, weight: Tensor, statistic: Observed | None, max_rank: int, *, scaling: float, generator: torch.Generator
    ) -> Solution:
        """Scores are explained-variance ratios."""
        inputs = input_statistic(statistic)
        values, vectors = inputs.leading(max_rank, centered=self.centered)
        vectors = vectors.clone()  # a view would keep all that the statistic holds
        total = inputs.trace(centered=self.centered)
        ratios = values / total if total > 0 else torch.zeros_like(values)
        mean = inputs.mean()
        kaiming_power = kaiming_input_power(inputs.trace(centered=False), weight.shape[1])
        zeros = zeros_of_output(weight)

        def factors(rank: int) -> LoraFactors:
            lora_A = vectors[:, :rank].mT
            # Directions without variance (fewer rows than rank) must not be blown up by dividing by almost nothing.
            floor = 1e-6 * one_if_zero(ratios[0])
            if self.whiten == "variance_ratio":
                lora_A = lora_A / ratios[:rank, None].clamp_min(floor).sqrt()
            elif self.whiten == "singular_value":
                lora_A = lora_A / (ratios[:rank, None].clamp_min(floor) * (total or 1.0)).pow(0.25)
            if self.scale == "matched":
                power = lora_A.square().sum(1) @ values[:rank]
                if self.centered:
                    power = power + (lora_A @ mean.to(lora_A.dtype)).square().sum()
                if float(power) > 0:
                    lora_A = lora_A * (rank * kaiming_power / power).sqrt()
            return LoraFactors(lora_A.float().contiguous(), zeros(rank))

        return Solution(ratios, factors)
