"""Give a training loop back what a collection pass took from it: batches, their order and random numbers.

The pass draws its batches from the loop's own data loader. When it is over, the loader starts its epoch again, with the
random state of its first start: the loop gets as many batches as it counted on, and the same ones, with the same noise,
as without the pass.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch


class RandomState:
    """The state of every random generator that a training script draws from."""

    def __init__(self, loaders: list[Any]) -> None:
        self._python = random.getstate()
        self._numpy: Any = np.random.get_state()  # noqa: NPY002
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
        generators = {id(g): g for loader in loaders for g in _generators(loader)}
        self._own = [(generator, generator.get_state()) for generator in generators.values()]

    def restore(self) -> None:
        """Put all of them back."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        for generator, state in self._own:
            generator.set_state(state)


def _generators(loader: Any) -> list[torch.Generator]:
    """The generators that a prepared data loader draws its order from."""
    found: list[torch.Generator] = []
    holders = [loader, getattr(loader, "base_dataloader", None)]
    while holders:
        holder = holders.pop()
        # accelerate nests its batch samplers; a data loader's sampler may be its batch sampler's, too
        names = ("sampler", "batch_sampler", "generator", "synchronized_generator")
        values = [vars(holder).get(name) for name in names] if hasattr(holder, "__dict__") else []
        found += [value for value in values if isinstance(value, torch.Generator)]
        holders += [value for value in values[:2] if value is not None]
    return found


class Pass(Protocol):
    """What a rewinding loader asks of the pass."""

    def entering(self, loader: Any) -> None:
        """An iteration over the loader begins."""

    def drawing(self) -> None:
        """The next batch is about to be drawn: the loop's last step is over."""

    @property
    def running(self) -> bool:
        """Whether losses are being collected."""
        ...

    @property
    def over(self) -> bool:
        """Whether the loop trains by itself from now on."""
        ...


def rewinding(loader: Any, watcher: Pass) -> None:
    """Make a loader that `accelerate` prepared start its epoch again, in place, when the pass is over.

    Until `plain` is called, an iteration that fed the pass goes on, over new epochs if need be, until the pass
    has its losses; then the epoch that the loop asked for follows. Other iterations are what they were.
    """
    kind = type(loader)

    def iterate(self: Any) -> Iterator[Any]:
        if watcher.over:
            yield from kind.__iter__(self)
            return
        watcher.entering(self)
        position = getattr(self, "iteration", None)
        while True:
            inner = kind.__iter__(self)
            fed = False
            for batch in inner:
                yield batch
                fed = watcher.running or fed
                watcher.drawing()
                if watcher.over and fed:
                    break
            else:
                if watcher.running:  # the pass is longer than an epoch
                    continue
                return
            inner.close()  # type: ignore[attr-defined]
            if hasattr(self, "end"):
                self.end()
            if position is not None:
                self.iteration = position
            yield from kind.__iter__(self)
            return

    # accelerate's loaders are told by isinstance, and `__iter__` is looked up on the class
    _set_class(loader, type(kind.__name__, (kind,), {"__iter__": iterate, "__module__": kind.__module__}))


def plain(loader: Any) -> None:
    """Inverse of `rewinding`."""
    _set_class(loader, type(loader).__mro__[1])


def _set_class(loader: Any, kind: type) -> None:
    # accelerate's loaders say that they are of the class of the loader inside, by a property without a setter
    vars(object)["__class__"].__set__(loader, kind)
