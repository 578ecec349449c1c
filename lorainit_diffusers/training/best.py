"""The best step of a run by what was measured on its validation data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def best_line(lines: Sequence[Mapping[str, Any]], metric: str, *, larger_is_better: bool) -> Mapping[str, Any] | None:
    """The line of a log with the best validation value; the earliest of several, and `None` where there is none.

    Step 0 takes part: where it is the best, training has improved nothing, which a reader wants to know. The thorough
    evaluations of a stage (`"stage"`) do not: one of them is of the base, without a LoRA.

    Args:
        lines: those of `metrics.jsonl`, in order.
        metric: key of the value, such as `validation_loss`; values that are not finite count as missing.
        larger_is_better: direction of the metric.
    """
    best: Mapping[str, Any] | None = None
    for line in lines:
        if "stage" in line or metric not in line or not math.isfinite(line[metric]):
            continue
        if best is None or is_better(line[metric], best[metric], larger_is_better=larger_is_better):
            best = line
    return best


def is_better(value: float, than: float, *, larger_is_better: bool) -> bool:
    """Whether a finite value beats another; an equal one does not, nor does one that is not finite."""
    if not math.isfinite(value):
        return False
    return value > than if larger_is_better else value < than
