"""When a collection pass has seen enough: the directions that it is for no longer turn as more batches come.

At 2, 4, 8, 16, ... batches the method solves a few layers with what was gathered so far. Between k and 2k batches, the
first half of the data is held against all of it. With independent batches, an estimate from k of them is off by
e / sqrt(k) to first order, and what two halves of 2k batches differ by, sqrt(2) e / sqrt(k), is twice what the first
half and the whole differ by. So the sine between them is about the error that is left after 2k batches, and that is
what the limit is for. Directions that no amount of such data determines (a flat spectrum) never settle; the cap on the
batches ends such a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lorainit_diffusers import adapters
from lorainit_diffusers.methods.base import Initializer, Observed
from lorainit_diffusers.methods.declared import fewest_rows
from lorainit_diffusers.methods.guard import why_nothing_to_learn
from lorainit_diffusers.statistics import full_float32

# Layers that are looked at; more say little that these do not, and each costs a solve at every doubling.
MAX_WATCHED = 8
# The smallest number of batches that a pass may end after.
FEWEST_BATCHES = 4

# (layer, what was observed of it) -> (rank, in_features) its directions; `None` while its rows are too few.
Directions = Callable[[str, Observed], Tensor | None]


def spread_out(names: Sequence[str], count: int = MAX_WATCHED) -> list[str]:
    """That many of these, evenly spaced: the first and the last blocks of a model, and some between them."""
    if len(names) <= count:
        return list(names)
    return [names[round(index * (len(names) - 1) / (count - 1))] for index in range(count)]


def root_mean_sine(first: Tensor, second: Tensor) -> float:
    """How far two (rank, features) sets of rows span different spaces: 0 the same, 1 orthogonal.

    The root mean square of the sines of the principal angles between the spans.
    """
    bases = [torch.linalg.qr(rows.double().mT).Q for rows in (first, second)]
    rank = bases[0].shape[1]
    return max(0.0, 1 - float((bases[0].mT @ bases[1]).square().sum()) / rank) ** 0.5


class EarlyStop:
    """Watches the directions of a few layers while batches come in.

    Args:
        limit: Of the root mean sine between the directions at half of the batches and at all of them.
        layers: To watch, by name.
        directions: What the method makes of what was observed of a layer.

    Attributes:
        reason: One sentence on why the pass ended, or did not end earlier; `None` before the first comparison.
    """

    def __init__(self, limit: float, layers: Sequence[str], directions: Directions) -> None:
        self._limit, self._layers, self._directions = limit, spread_out(layers), directions
        self._before: dict[str, Tensor | None] = {}
        self.reason: str | None = None

    def is_due(self, num_batches: int) -> bool:
        """Whether the directions are looked at after this many batches: at powers of two, from half of the fewest."""
        return num_batches >= FEWEST_BATCHES // 2 and num_batches & (num_batches - 1) == 0

    def is_over(self, num_batches: int, observed: Callable[[str], Observed | None]) -> bool:
        """Whether the pass has seen enough after this many batches.

        Args:
            num_batches: Seen so far.
            observed: Layer -> what was observed of it so far.
        """
        if not self.is_due(num_batches):
            return False
        now: dict[str, Tensor | None] = {}
        for name in self._layers:
            statistic = observed(name)
            if statistic is not None:  # a layer that the loss has not reached yet says nothing
                now[name] = self._directions(name, statistic)
        before, self._before = self._before, now
        sines: dict[str, float] = {}
        for name, directions in now.items():
            earlier = before.get(name)
            if directions is None or earlier is None:
                return False
            sines[name] = root_mean_sine(earlier, directions)
        if not sines:
            return False
        widest = max(sines, key=lambda name: sines[name])
        settled = sines[widest] <= self._limit
        self.reason = (
            f"{'' if settled else 'not '}settled after {num_batches} batches: between the first {num_batches // 2} and "
            f"all of them, the directions of {len(sines)} layers turned by a sine of at most {sines[widest]:.2g} "
            f"(layer {widest!r}), where {self._limit:g} is the limit"
        )
        return settled


def directions_of(method: Initializer, layers: Mapping[str, nn.Linear], ranks: Mapping[str, int]) -> Directions:
    """The rows of A that a method gives a layer: whatever else it computes, they are what it has learned from the data.

    Args:
        method: The initialisation.
        layers: By name.
        ranks: Layer -> rank.
    """

    def solve(name: str, observed: Observed) -> Tensor | None:
        layer, rank = layers[name], ranks[name]
        if observed.num_rows < fewest_rows(method, rank):
            return None
        if why_nothing_to_learn(method, observed) is not None:  # which more of the same does not change
            return torch.eye(rank, layer.in_features)
        weight = adapters.base_weight(layer)
        generator = torch.Generator().manual_seed(0)
        with full_float32(weight.device):
            return method.solve(weight, observed, rank, scaling=1.0, generator=generator).factors(rank).lora_A

    return solve
