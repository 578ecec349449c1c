"""Numbers of a comparison as cells of its tables: scores, differences, ratios, steps, with verdicts and intervals."""

from __future__ import annotations

import math

from lorainit_diffusers.comparison.estimates import Estimate
from lorainit_diffusers.comparison.findings import Speed
from lorainit_diffusers.evaluation.document import Cell


def number(value: float) -> str:
    """A score for reading: four significant places after the point, a true minus sign, words for infinities."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "diverged"
    return f"{value:.4f}".replace("-", "−") if abs(value) < 100 else f"{value:.4g}".replace("-", "−")


def _signed(value: float) -> str:
    if math.isinf(value):
        return "+∞" if value > 0 else "−∞"
    return ("+" if value > 0 else "") + number(value)


def mean_cell(estimate: Estimate) -> Cell:
    """A mean with its interval."""
    interval = f"[{number(estimate.low)}, {number(estimate.high)}]" if estimate.num_seeds > 1 else ""
    return Cell(number(estimate.value), detail=interval)


def difference_cell(estimate: Estimate | None) -> Cell:
    """A difference with its verdict in words and its interval."""
    if estimate is None:
        return Cell("–")
    interval = f"[{_signed(estimate.low)}, {_signed(estimate.high)}]"
    if math.isinf(estimate.value) or estimate.num_seeds < 2:
        interval = ""
    return Cell(f"{_signed(estimate.value)} {estimate.verdict}", estimate.verdict, interval)


def ratio_cell(estimate: Estimate | None, *, compared: bool = True) -> Cell:
    """A ratio with its verdict in words and its interval."""
    if estimate is None:
        return Cell("–")
    value = "some never" if math.isfinite(estimate.low) and math.isinf(estimate.value) else _ratio(estimate.value)
    interval = f"[{_ratio(estimate.low)}, {_ratio(estimate.high)}]"
    if estimate.num_seeds < 2 or math.isinf(estimate.low):
        interval = ""
    if not compared:
        return Cell(value, detail=interval)
    return Cell(f"{value}{',' if 'never' in value else ''} {_FASTER[estimate.verdict]}", estimate.verdict, interval)


def own_ratio_cell(init: str, baseline: str, estimate: Estimate | None) -> Cell:
    """A ratio to the baseline's own number; that of the baseline itself is 1."""
    return Cell("1") if init == baseline else ratio_cell(estimate)


def _ratio(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "never"


_FASTER = {"better": "faster", "worse": "slower", "tied": "tied", "one seed": "one seed"}


def steps_cell(speed: Speed | None) -> Cell:
    """Steps to the target, or on how many seeds a run never gets there."""
    if speed is None:
        return Cell("–")
    if math.isfinite(speed.steps):
        return Cell(f"{speed.steps:.0f}")
    some = f" on {speed.num_seeds - speed.num_reached} of {speed.num_seeds} seeds" if speed.num_reached else ""
    return Cell(f"never{some}")


def seconds_cell(speed: Speed | None) -> Cell:
    """Seconds to the target."""
    if speed is None or speed.seconds is None:
        return Cell("–")
    return Cell(f"{speed.seconds:.1f}" if math.isfinite(speed.seconds) else "never")
