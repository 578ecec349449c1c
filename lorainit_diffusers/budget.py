"""How much memory statistics may take, and which of them are sketched so that they do.

An exact second moment needs (features x features) numbers: 38 MB for a layer of width 3072 in float32, 604 MB for one
of width 12288. `MemoryBudget` keeps the exact ones while all statistics together fit. When the next one would
not, the widest width that is still exact is demoted: every moment of at least that width becomes a sketch, the ones
already begun (which loses nothing against a sketch from the start: both are sums over the rows) as well as those to
come. So no narrower layer is sketched before a wider one, and which widths end as sketches depends neither on the order
in which layers run nor on the data: every process of a distributed run decides alike.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import psutil
import torch

from lorainit_diffusers.statistics import SecondMoment, SketchedSecondMoment, Statistic

GB = 1e9
# Share of the free memory that statistics may take by default; the rest is for activations and decompositions.
DEFAULT_SHARE = 0.5
REMEDIES = (
    "raise memory_budget_gb, keep the statistics in the machine's memory "
    "(statistics_device='cpu'), adapt fewer layers (target_modules), or use an init that observes less, such as eva"
)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device now; on the CPU, this process's share where a launcher started several.

    Devices that share the machine's memory, or do not say, are taken as the CPU.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def sketch_columns(rank: int) -> int:
    """Columns of a sketch that has to resolve `rank` directions: `8 * rank + 64`.

    The error of a Nyström sketch falls with the eigenvalues beyond its columns (Tropp et al. 2017, theorem 4.1), so it
    needs a multiple of the rank, and the more the slower the spectrum decays. With this many, the leading 16 directions
    of width 3072 overlap with the exact ones by 0.98 where eigenvalues fall as slowly as 1/i and by 0.999 for i^-1.5
    (benchmarks/real_size.py --model flux-sketch), with three times the rank by 0.83 and 0.96. Memory is no constraint:
    192 columns of width 12288 take 9 MB, its exact moment 604 MB.
    """
    return 8 * rank + 64


def _megabytes(statistic: Statistic, device: torch.device | None) -> str:
    return f"{statistic.num_bytes(device or torch.device('cpu')) / 1e6:.3g} MB"


class MemoryBudget:
    """The policy of one collection, its reference pass included.

    Args:
        num_bytes: What all statistics of one process together may take; `None` for half of what is free when the
            collection starts, on the process that has least.
        num_columns: Of a sketch (`sketch_columns`); a narrower layer is never sketched.
        device: Where accumulators live; `None` for where the rows are.

    Attributes:
        num_bytes: The budget; `None` until `start` has looked.
        device: Of the accumulators; `None` until then.
        used: Bytes of all accumulators, the projections that sketches share included. Copies of one layer's rows and
            the work space of its decomposition, which come and go, are not counted.
        peak: The largest that `used` has been.
        first_sketched_width: Inputs of at least this width are sketched; `None` while all are exact.

    Raises:
        ValueError: A budget that is not positive.
    """

    def __init__(
        self, num_bytes: float | None = None, *, num_columns: int, device: torch.device | str | None = None
    ) -> None:
        if num_bytes is not None and not num_bytes > 0:  # infinite is no limit; `initialize` takes finite ones only
            raise ValueError(
                f"memory_budget_gb is {num_bytes / GB:g}; it must be positive, or left out for half of what is free"
            )
        self.num_bytes = num_bytes
        self.device: torch.device | None = None
        self.used = self.peak = 0
        self.first_sketched_width: int | None = None
        self._num_columns = num_columns
        self._statistics_device = None if device is None else torch.device(device)
        self._tables: list[dict[str, Any]] = []
        # What is counted: by identity, the exact moments by their width, too. Nothing is counted anew for each layer.
        self._held: dict[int, Statistic] = {}
        self._exact: dict[int, dict[int, SecondMoment]] = {}
        self._sketch_sizes: set[tuple[int, int]] = set()

    def start(self, device: torch.device, minimum_over_processes: Callable[[float], float]) -> None:
        """Settle the budget; rows will come from `device`. A second pass keeps what the first has settled."""
        if self.device is not None:
            return
        self.device = self._statistics_device or device
        if self.num_bytes is None:
            self.num_bytes = DEFAULT_SHARE * free_bytes(self.device)
        self.num_bytes = minimum_over_processes(self.num_bytes)

    def watch(self, table: dict[str, Any]) -> None:
        """Count the statistics of this table from now on, and replace those that are demoted in it."""
        if not any(known is table for known in self._tables):
            self._tables.append(table)
            for statistic in table.values():
                self._hold(statistic)

    def admit(self, name: str, statistic: Statistic, table: dict[str, Any]) -> None:
        """Put an empty statistic into the table, as a sketch if need be, after demoting others if need be.

        Raises:
            ValueError: It does not fit, sketched or not (names the layer, its width and what to do).
        """
        if self._statistics_device is not None:
            statistic.move(self._statistics_device)
        self.watch(table)
        table[name] = statistic
        self._hold(statistic)
        self._demote()
        while self.used > self._limit:
            widths = [width for width in self._exact if width > self._num_columns]
            if not widths:
                raise ValueError(
                    f"the statistics need more than the {self._limit / GB:.3g} GB that they may take on {self.device}: "
                    f"layer {name!r} (input width {getattr(statistic, 'features', '?')}, "
                    f"{_megabytes(table[name], self.device)}) does not fit any more, though every width above "
                    f"{self._num_columns} is sketched; {REMEDIES}"
                )
            self.first_sketched_width = max(widths)
            self._demote()
        self.peak = max(self.peak, self.used)

    def admit_gradients(self, table: dict[str, Any]) -> None:
        """Count the (empty) mean gradients of this table, which are never sketched.

        Raises:
            ValueError: They alone do not fit (names the largest).
        """
        assert self.device is not None
        device = self.device
        needed = {name: statistic.num_bytes(device) for name, statistic in table.items()}
        total, largest = sum(needed.values()), max(needed, key=lambda name: needed[name])
        if total > self._limit:
            raise ValueError(
                f"the mean gradients of {len(needed)} layers need {total / GB:.3g} GB, more than the "
                f"{self._limit / GB:.3g} GB that statistics may take on {device} (the largest: layer {largest!r}, "
                f"{_megabytes(table[largest], device)}); {REMEDIES}"
            )
        if self._statistics_device is not None:
            for statistic in table.values():
                statistic.move(self._statistics_device)
        self.watch(table)
        self.peak = max(self.peak, self.used)

    def release(self) -> None:
        """Forget the statistics, so that whoever solves with them can free them one by one."""
        for known in (self._tables, self._held, self._exact):
            known.clear()

    @property
    def _limit(self) -> float:
        return math.inf if self.num_bytes is None else self.num_bytes

    def _hold(self, statistic: Statistic) -> None:
        """Count this statistic, once, however many layers share it."""
        if id(statistic) in self._held:
            return
        self._held[id(statistic)] = statistic
        self.used += statistic.num_bytes(self.device or torch.device("cpu"))
        if isinstance(statistic, SecondMoment):
            self._exact.setdefault(statistic.features, {})[id(statistic)] = statistic
        elif isinstance(statistic, SketchedSecondMoment):
            size = (statistic.features, statistic.num_columns)
            if size not in self._sketch_sizes:  # which share a projection
                self._sketch_sizes.add(size)
                self.used += statistic.projection_bytes

    def _drop(self, moment: SecondMoment) -> None:
        del self._held[id(moment)]
        of_this_width = self._exact[moment.features]
        del of_this_width[id(moment)]
        if not of_this_width:
            del self._exact[moment.features]
        self.used -= moment.num_bytes(self.device or torch.device("cpu"))

    def _demote(self) -> None:
        """Replace what is exact and too wide, one at a time, so that each makes room for the next."""
        limit = self.first_sketched_width
        if limit is None or not any(width >= limit for width in self._exact):
            return
        places: dict[int, list[tuple[dict[str, Any], str]]] = {}
        for table in self._tables:
            for name, statistic in table.items():
                places.setdefault(id(statistic), []).append((table, name))
        for identity, moment_width in [
            (i, width) for width, alike in self._exact.items() if width >= limit for i in alike
        ]:
            moment = self._exact[moment_width][identity]
            sketch = moment.sketched(self._num_columns)
            self._drop(moment)
            self._hold(sketch)
            for table, name in places[identity]:
                table[name] = sketch
