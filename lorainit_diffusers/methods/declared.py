"""What a method says of itself beside its mathematics, so that nobody has to try it out.

The methods of this package inherit `Declared` and say what differs from it. One that a program adds to
`METHODS` need not: the functions here take it at its word where it says something, and otherwise go by what every
`Initializer` has.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal, cast

from lorainit_diffusers.methods.base import Initializer, Observed, Observes
from lorainit_diffusers.statistics import InputsAndReference

# What a layer's factors are computed from: its inputs, only what varies in them, its weight's gradient.
Signal = Literal["inputs", "variation", "gradient"]
_NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})
_SIGNALS: Mapping[Observes, frozenset[Signal]] = {
    "nothing": frozenset(),
    "inputs": frozenset({"inputs"}),
    "gradients": frozenset({"gradient"}),
    "inputs and gradients": frozenset({"inputs", "gradient"}),
}


class Declared:
    """Inherited by the methods of this package; the values are those of a random initialisation with scores.

    Attributes:
        summary: What it does, in one sentence.
        source: The paper as `arXiv:NUMBER`, or whose idea it is.
        cost: What it takes beside training, in one line.
        gives_scores: Whether its solutions rank their components, which variable ranks need.
        zero_delta: Options with which it starts at the base model without an offset, where it can and by default does
            not.
        with_reference: Options with which it compares the data with samples of the pre-training distribution.
    """

    summary: ClassVar[str] = ""
    source: ClassVar[str] = ""
    cost: ClassVar[str] = ""
    gives_scores: ClassVar[bool] = True
    zero_delta: ClassVar[Mapping[str, Any]] = _NO_OPTIONS
    with_reference: ClassVar[Mapping[str, Any]] = _NO_OPTIONS

    @property
    def needs_reference(self) -> bool:
        """Whether it compares the data with reference batches: its statistic is then an `InputsAndReference`."""
        return False

    @property
    def learns_from(self) -> frozenset[Signal]:
        """What says nothing about a layer where it vanishes. Default: all that the method observes."""
        return _SIGNALS[cast("Initializer", self).observes]

    def fewest_rows(self, rank: int) -> int:
        """How many rows of inputs a layer must see for this rank. Default: the rank, where inputs are observed."""
        return _fewest_rows(cast("Initializer", self).observes, rank)

    def largest_rank(self, in_features: int, out_features: int, at_most: int) -> int:
        """The largest rank that the method can give a layer of this shape.

        Args:
            in_features: Of the layer.
            out_features: Of the layer.
            at_most: What is asked for; not above the smaller of the two.

        Returns:
            `at_most` or less; 0 where there is none, and `statistic` then says why.
        """
        return at_most


def gives_scores(method: Initializer) -> bool:
    """Whether a method's solutions rank their components; one that does not say is believed to."""
    return bool(getattr(method, "gives_scores", Declared.gives_scores))


def needs_reference(method: Initializer, statistic: Observed | None = None) -> bool:
    """Whether a method compares the data with reference batches.

    Args:
        method: Any.
        statistic: That it made for a layer, by which one that does not say is known.
    """
    said = getattr(method, "needs_reference", None)
    return isinstance(statistic, InputsAndReference) if said is None else bool(said)


def learns_from(method: Initializer) -> frozenset[Signal]:
    """What says nothing about a layer where it vanishes; all that is observed, where a method does not say."""
    said = getattr(method, "learns_from", None)
    return _SIGNALS[method.observes] if said is None else said


def fewest_rows(method: Initializer, rank: int) -> int:
    """How many rows of inputs a layer must see for this rank."""
    said = getattr(method, "fewest_rows", None)
    return _fewest_rows(method.observes, rank) if said is None else said(rank)


def _fewest_rows(observes: Observes, rank: int) -> int:
    return rank if observes.startswith("inputs") else 0


def largest_rank(method: Initializer, in_features: int, out_features: int, at_most: int) -> int:
    """The largest rank up to `at_most` that a method can give a layer; 0 where there is none.

    One that does not say refuses in `statistic` the ranks that it cannot give.
    """
    said = getattr(method, "largest_rank", None)
    if said is not None:
        return said(in_features, out_features, at_most)
    for rank in range(at_most, 0, -1):
        try:
            method.statistic(in_features, out_features, rank)
        except ValueError:
            continue
        return rank
    return 0


def zero_delta_options(method: Initializer | type[Initializer]) -> Mapping[str, Any]:
    """Options with which a method that starts elsewhere starts at the base model, without an offset; none known: {}."""
    return getattr(method, "zero_delta", Declared.zero_delta)


def reference_options(method: Initializer | type[Initializer]) -> Mapping[str, Any]:
    """Options with which a method compares the data with samples of the pre-training distribution; none known: {}."""
    return getattr(method, "with_reference", Declared.with_reference)
