"""Two statistics of one layer, for methods that read both."""

from __future__ import annotations

from dataclasses import dataclass

from lorainit_diffusers.statistics.gradient import GradientMean
from lorainit_diffusers.statistics.second_moment import SecondMoment
from lorainit_diffusers.statistics.sketch import SketchedSecondMoment


@dataclass(frozen=True)
class InputsAndGradient:
    """Two statistics of one layer, for methods that need both.

    Attributes:
        inputs: Filled by the forward passes; layers fed by one tensor hold the same object.
        gradient: Filled by the backward passes.
    """

    inputs: SecondMoment | SketchedSecondMoment
    gradient: GradientMean

    @property
    def num_rows(self) -> int:
        """Rows of inputs seen so far."""
        return self.inputs.num_rows


@dataclass(frozen=True)
class InputsAndReference:
    """The inputs of one layer under two distributions, for methods that compare them.

    Attributes:
        inputs: Filled by the fine-tuning batches; layers fed by one tensor hold the same object.
        reference: Filled by batches of the pre-training distribution; shared alike.
    """

    inputs: SecondMoment | SketchedSecondMoment
    reference: SecondMoment | SketchedSecondMoment

    @property
    def num_rows(self) -> int:
        """Rows seen so far of the distribution that has fewer."""
        return min(self.inputs.num_rows, self.reference.num_rows)
