"""Numbers over seeds: means and ratios with bootstrap intervals and verdicts, and where curves cross a target.

The bootstrap is ours: no library has one that is paired over seeds, takes ratios of sums, gives the same interval for
the same values in every run, and keeps infinite values (of runs that never get there) at their place in the order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

NUM_RESAMPLES = 10_000

# How often the interval of n seeds excludes 0 where there is no difference, from 4,000 draws of n normal differences
# each. Of 2 and 3 seeds the interval is their range, so these two are exact: the chances that all have one sign.
_CHANCE = {2: 0.50, 3: 0.25, 4: 0.20, 5: 0.16, 6: 0.14, 7: 0.12, 8: 0.11, 9: 0.10, 10: 0.10}


@dataclass(frozen=True)
class Estimate:
    """A mean or a ratio over seeds with its bootstrap interval.

    Attributes:
        value: Of all seeds.
        low: Lower end of the 95 % interval; equal to `value` for a single seed.
        high: Upper end.
        num_seeds: The interval is over so few values.
        verdict: `better`, `worse` or `tied` by the interval, `one seed` without one; empty where nothing is compared.
    """

    value: float
    low: float
    high: float
    num_seeds: int
    verdict: str = ""


def first_reach(positions: Sequence[float], costs: Sequence[float], target: float) -> float:
    """Where a curve first is at or below a target, linear between its points; infinite where it never is.

    Args:
        positions: Ascending steps or seconds.
        costs: Lower is better; infinite where the run had diverged.
        target: The cost to reach.
    """
    for index, cost in enumerate(costs):
        if cost > target:
            continue
        before = costs[index - 1] if index else math.inf
        if math.isinf(before):
            return positions[index]
        share = (before - target) / (before - cost)
        return positions[index - 1] + share * (positions[index] - positions[index - 1])
    return math.inf


def running_median(values: Sequence[float]) -> list[float]:
    """Each value's median with its two neighbours; the first and the last stay (Tukey 1977, "3" with copied ends).

    A monotone curve stays as it is, and a single spike goes.
    """
    inner = [sorted(values[index - 1 : index + 2])[1] for index in range(1, len(values) - 1)]
    return [*values[:1], *inner, *values[1:][-1:]]


def bootstrap(
    numerators: Sequence[float],
    denominators: Sequence[float] | None = None,
    *,
    null: float | None = None,
    higher: bool = False,
) -> Estimate:
    """sum(numerators) / sum(denominators) with a paired percentile bootstrap over seeds (Efron 1979).

    10,000 resamples from a fixed seed; the ends are the outer order statistics, which infinite values do not disturb.

    Args:
        numerators: One value a seed.
        denominators: Those of the same seeds; 1 by default, which gives the mean.
        null: What the interval has to exclude for a verdict; by default there is no verdict.
        higher: Whether above `null` is better.

    Raises:
        ValueError: Without values, or with other numbers of them.
    """
    a = np.asarray(numerators, dtype=np.float64)
    b = np.ones_like(a) if denominators is None else np.asarray(denominators, dtype=np.float64)
    if a.size == 0 or a.shape != b.shape:
        raise ValueError(f"{a.size} numerators and {b.size} denominators; a bootstrap needs one each a seed")
    rows = np.random.default_rng(0).integers(a.size, size=(NUM_RESAMPLES, a.size))
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(a.sum() / b.sum())
        upper, lower = a[rows].sum(axis=1), b[rows].sum(axis=1)
        resampled = np.where((upper == 0) & (lower == 0), 1.0, upper / lower)  # neither needs a step: they are equal
    low = float(np.percentile(resampled, 2.5, method="lower"))
    high = float(np.percentile(resampled, 97.5, method="higher"))
    verdict = ""
    if null is not None:
        below, above = ("worse", "better") if higher else ("better", "worse")
        if a.size < 2:
            verdict = "one seed"
        else:
            verdict = below if high < null else above if low > null else "tied"
    return Estimate(value, low, high, a.size, verdict)


def chance_of_verdict(num_seeds: int) -> float | None:
    """How often two equal initialisations get a verdict other than tied; `None` for one seed or more than ten.

    The percentile bootstrap of n values is too narrow for small n: nominally this is 0.05.
    """
    return _CHANCE.get(num_seeds)


def sd(values: Sequence[float]) -> float:
    """Standard deviation with n - 1; `nan` for a single value or infinite ones."""
    finite = all(math.isfinite(value) for value in values)
    return float(np.std(values, ddof=1)) if len(values) > 1 and finite else math.nan


def difference(pairs: Sequence[tuple[float, float]], higher: bool) -> Estimate:
    """Mean of first - second over the pairs of the seeds; `higher` says whether above 0 is better."""
    # both diverged: no difference, where inf - inf is none; nor is the rounding of two means of the same accuracies one
    differences = [0.0 if math.isclose(a, b, rel_tol=1e-9) else a - b for a, b in pairs]
    estimate = bootstrap(differences, null=0.0, higher=higher)
    if math.isinf(estimate.value):
        # a seed diverged: that some resamples do not hold it does not undo that
        return replace(estimate, verdict="better" if (estimate.value > 0) == higher else "worse")
    return estimate


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return float(np.mean(values))
