"""What an initialisation did: which layers got which rank and why, and what it cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorainit_diffusers.files import write_json


@dataclass(frozen=True)
class LayerReport:
    """One adapted layer.

    Attributes:
        rank: 0 when the layer lost its adapter.
        alpha: of the adapter; ``scaling * rank`` (``scaling * sqrt(rank)`` with rsLoRA).
        scores: what the leading components are worth, as shares of the layer's total; ``None`` for methods without.
        captured: the share that the kept components add up to; ``None`` for methods without scores.
        num_rows: rows (tokens) seen, or gradients for gradient methods; the smaller number where a reference was
            seen as well; 0 for methods that observe nothing.
        shared_group: the first layer that was fed by the same tensors (itself when alone).
        fallback: why the layer was initialised by another method, or ``None``.
        sketch_columns: of the sketch that stood for the second moment of its inputs; ``None`` where that was exact, or
            not needed.
    """

    rank: int
    alpha: float
    scores: list[float] | None
    captured: float | None
    num_rows: int
    shared_group: str
    fallback: str | None = None
    sketch_columns: int | None = None


@dataclass(frozen=True)
class InitReport:
    """The result of one initialisation.

    Attributes:
        method: its name, and ``options`` its hyper-parameters.
        layers: ``component.layer`` -> report.
        num_passes: forward passes of the collection, those over reference batches included.
        forward_s: seconds in the loss itself, statistics not counted.
        statistics_s: seconds in the statistics.
        solve_s: seconds in decompositions, rank allocation and factors.
        attach_s: seconds in which PEFT builds the adapters, as it does for any LoRA; not part of ``overhead``.
        statistics_bytes: of all statistics when the pass was over, on one process; 0 for methods that observe nothing.
        peak_statistics_bytes: the most they took; larger where some were sketched after they had begun.
        memory_budget_bytes: what they could have taken; ``None`` without a pass.
        statistics_device: where they were kept; ``None`` without a pass.
    """

    method: str
    options: dict[str, Any]
    step_zero: str
    layers: dict[str, LayerReport]
    num_passes: int
    forward_s: float
    statistics_s: float
    solve_s: float
    attach_s: float
    statistics_bytes: int = 0
    peak_statistics_bytes: int = 0
    memory_budget_bytes: int | None = None
    statistics_device: str | None = None

    @property
    def overhead(self) -> float | None:
        """(statistics + solve seconds) / bare forward seconds; ``None`` without a collection pass."""
        return (self.statistics_s + self.solve_s) / self.forward_s if self.forward_s > 0 else None

    @property
    def num_layers_by_rank(self) -> dict[int, int]:
        """Number of layers by rank, ascending."""
        ranks = sorted(layer.rank for layer in self.layers.values())
        return {rank: ranks.count(rank) for rank in dict.fromkeys(ranks)}

    def to_json(self) -> dict[str, Any]:
        """Plain data, derived totals included."""
        return {
            **asdict(self),
            "totals": {
                "num_layers": len(self.layers),
                "sum_of_ranks": sum(layer.rank for layer in self.layers.values()),
                "num_shared_groups": len({layer.shared_group for layer in self.layers.values()}),
                "num_sketched_layers": sum(layer.sketch_columns is not None for layer in self.layers.values()),
                "overhead": self.overhead,
            },
        }

    def save(self, path: str | Path) -> Path:
        """Write :meth:`to_json` to a file."""
        path = Path(path)
        write_json(path, self.to_json())
        return path

    def summary(self) -> str:
        """A few lines for the console."""
        ranks = ", ".join(f"{count} x rank {rank}" for rank, count in self.num_layers_by_rank.items())
        lines = [f"init {self.method} (step 0: {self.step_zero}): {len(self.layers)} layers, {ranks}"]
        captured = [layer.captured for layer in self.layers.values() if layer.captured is not None]
        if captured:
            lines.append(f"captured share: mean {sum(captured) / len(captured):.2f}, lowest {min(captured):.2f}")
        if self.num_passes:
            lines.append(
                f"{self.num_passes} passes: forward {self.forward_s:.1f} s, statistics {self.statistics_s:.2f} s, "
                f"solve {self.solve_s:.2f} s (overhead {self.overhead:.2f})"
            )
        sketched = [layer.sketch_columns for layer in self.layers.values() if layer.sketch_columns is not None]
        if sketched:
            lines.append(
                f"{len(sketched)} layers sketched in up to {max(sketched)} columns: statistics took "
                f"{self.peak_statistics_bytes / 1e9:.2f} GB of {(self.memory_budget_bytes or 0) / 1e9:.2f} GB "
                f"on {self.statistics_device}"
            )
        fallbacks = [f"{name}: {layer.fallback}" for name, layer in self.layers.items() if layer.fallback]
        if fallbacks:
            lines.append(f"{len(fallbacks)} layers fell back, first {fallbacks[0]}")
        return "\n".join(lines)
