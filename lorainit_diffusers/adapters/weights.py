"""What an adapter is, in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mode

from torch import Tensor

from lorainit_diffusers.methods.base import LoraFactors


@dataclass(frozen=True)
class AdapterWeights:
    """Everything that one adapted layer adds to its base layer.

    Attributes:
        factors: Trainable A (rank, in_features) and B (out_features, rank).
        scaling: The layer adds `scaling * B A`.
        offset: Initial factors whose `scaling * B0 A0` the adapter subtracts; `None` without an offset.
        magnitude: (out_features,) DoRA's trainable row norms; `None` without DoRA, and in `attach` for those of
            the base weight.
        bias: (out_features,) trainable bias of B (PEFT's `lora_bias`), of which the layer adds `scaling` times;
            `None` without one, and in `attach` for zero.
    """

    factors: LoraFactors
    scaling: float
    offset: LoraFactors | None = None
    magnitude: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class ExistingAdapter:
    """The configuration of an adapter that a module already carries.

    Attributes:
        ranks: By layer name.
        scalings: Alpha / rank, or alpha / sqrt(rank), by layer name.
        use_rslora: Whether it is the latter.
        use_dora: Whether it decomposes the weight (DoRA).
    """

    ranks: Mapping[str, int]
    scalings: Mapping[str, float]
    use_rslora: bool
    use_dora: bool

    @property
    def rank(self) -> int:
        """Of most layers."""
        return mode(self.ranks.values())

    @property
    def scaling(self) -> float:
        """Of most layers."""
        return mode(self.scalings.values())
