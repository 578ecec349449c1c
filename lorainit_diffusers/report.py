"""What an initialisation did: which layers got which rank and why, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorainit_diffusers.files import write_json

# What `step_zero` says, in words.
STEP_ZERO = {
    "equal": "step 0 is the base model, because B is zero",
    "offset": "step 0 is the base model, because the product that B A starts with is taken off again",
    "moved": "step 0 is not the base model any more: B A starts with a change",
}


@dataclass(frozen=True)
class RankedComponent:
    """A component of a layer at the edge of the rank budget.

    Attributes:
        layer: Its name.
        component: Its number in the layer, 1 for the first: the rank that the layer has with it.
        score: What it is worth; per parameter under a parameter budget.
    """

    layer: str
    component: int
    score: float


@dataclass(frozen=True)
class RankAllocation:
    """What decided the ranks under `variable_rank`.

    Attributes:
        budget: Sum of the ranks, or of the parameters where `per_parameter`.
        per_parameter: Whether components competed by their score per parameter.
        min_rank: That every layer got first.
        max_rank: That no layer gets more than.
        last_kept: The component with the lowest score that got a rank; `None` where nothing competed.
        first_refused: The one with the highest score that got none; `None` where every layer has all it may have.
    """

    budget: int
    per_parameter: bool
    min_rank: int
    max_rank: int
    last_kept: RankedComponent | None
    first_refused: RankedComponent | None

    def sentence(self) -> str:
        """Which score was the last to get a rank, and which the first to get none."""
        worth = "score per parameter" if self.per_parameter else "score"
        parts: list[str] = []
        if self.last_kept is not None:
            kept = self.last_kept
            parts.append(f"the last rank went to {kept.layer}, component {kept.component}, {worth} {kept.score:.3g}")
        if self.first_refused is not None:
            refused = self.first_refused
            parts.append(
                f"the first to get none was {refused.layer}, component {refused.component}, {worth} {refused.score:.3g}"
            )
        return "; ".join(parts) or "nothing competed for a rank"


def ranks_in_words(ranks: Sequence[int]) -> str:
    """One rank, or what they go from and to and their mean."""
    if not ranks:
        return "none"
    low, high = min(ranks), max(ranks)
    mean = f"{sum(ranks) / len(ranks):.1f}".removesuffix(".0")
    return str(low) if low == high else f"{low} to {high} (mean {mean})"


@dataclass(frozen=True)
class LayerReport:
    """One adapted layer.

    Attributes:
        rank: 0 when the layer lost its adapter.
        alpha: Of the adapter; `scaling * rank` (`scaling * sqrt(rank)` with rsLoRA).
        scores: What the leading components are worth, as shares of the layer's total; `None` for methods without.
        captured: The share that the kept components add up to; `None` for methods without scores.
        num_rows: Rows (tokens) seen, or gradients for gradient methods; the smaller number where a reference was
            seen as well; 0 for methods that observe nothing.
        shared_group: The first layer that was fed by the same tensors (itself when alone).
        fallback: Why the layer was initialised by another method, or `None`.
        sketch_columns: Of the sketch that stood for the second moment of its inputs; `None` where that was exact, or
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
        method: Its name, and `options` its hyper-parameters.
        layers: `component.layer` -> report.
        num_passes: Forward passes of the collection, those over reference batches included.
        forward_s: Seconds in the loss itself, statistics not counted.
        statistics_s: Seconds in the statistics.
        solve_s: Seconds in decompositions, rank allocation and factors.
        attach_s: Seconds in which PEFT builds the adapters, as it does for any LoRA; not part of `overhead`.
        statistics_bytes: Of all statistics when the pass was over, on one process; 0 for methods that observe nothing.
        peak_statistics_bytes: The most they took; larger where some were sketched after they had begun.
        memory_budget_bytes: What they could have taken; `None` without a pass.
        statistics_device: Where they were kept; `None` without a pass.
        allocation: What decided the ranks; `None` where all layers were given the same.
        early_stop: Why the pass ended when it did, where it might have ended early; `num_passes` says how many
            batches it used.
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
    allocation: RankAllocation | None = None
    early_stop: str | None = None

    @property
    def overhead(self) -> float | None:
        """(statistics + solve seconds) / bare forward seconds; `None` without a collection pass."""
        return (self.statistics_s + self.solve_s) / self.forward_s if self.forward_s > 0 else None

    @property
    def num_layers_by_rank(self) -> dict[int, int]:
        """Number of layers by rank, ascending."""
        ranks = sorted(layer.rank for layer in self.layers.values())
        return {rank: ranks.count(rank) for rank in dict.fromkeys(ranks)}

    def to_json(self) -> dict[str, Any]:
        """Plain data, derived totals included."""
        fields = asdict(self)
        if self.early_stop is None:  # where nobody asked for it, the file does not speak of it
            del fields["early_stop"]
        return {
            **fields,
            "totals": {
                "num_layers": len(self.layers),
                "sum_of_ranks": sum(layer.rank for layer in self.layers.values()),
                "num_shared_groups": len({layer.shared_group for layer in self.layers.values()}),
                "num_sketched_layers": sum(layer.sketch_columns is not None for layer in self.layers.values()),
                "overhead": self.overhead,
            },
        }

    def save(self, path: str | Path) -> Path:
        """Write `to_json` to a file."""
        path = Path(path)
        write_json(path, self.to_json())
        return path

    def summary(self) -> str:
        """A few lines for the console."""
        ranks = [layer.rank for layer in self.layers.values()]
        if len(self.num_layers_by_rank) > 1:
            counts = f"ranks {ranks_in_words(ranks)}"
        else:
            counts = ", ".join(f"{count} x rank {rank}" for rank, count in self.num_layers_by_rank.items())
        lines = [f"init {self.method}: {len(self.layers)} layers, {counts}; {STEP_ZERO[self.step_zero]}"]
        if self.allocation is not None:
            lines.append(f"ranks by score: {self.allocation.sentence()}")
        captured = {name: layer.captured for name, layer in self.layers.items() if layer.captured is not None}
        if captured:
            least = min(captured, key=lambda name: captured[name])
            lines.append(
                "captured (share of a layer's total score that its kept components hold): "
                f"{sum(captured.values()) / len(captured):.2f} on average, {captured[least]:.2f} at the least ({least})"
            )
        if self.num_passes:
            lines.append(
                f"collection: {self.num_passes} passes, {self.forward_s:.1f} s in the model and "
                f"{self.statistics_s:.2f} s in the statistics; {self.solve_s:.2f} s to solve "
                f"(together {self.overhead:.2f} of the model's time on top)"
            )
        if self.early_stop is not None:
            lines.append(f"early stop: {self.early_stop}")
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
