"""What an analysis finds out about one initialisation; `analysis` has the definitions."""

from __future__ import annotations

from dataclasses import dataclass

from lorainit_diffusers.comparison.estimates import Estimate


@dataclass(frozen=True)
class Speed:
    """How fast an initialisation gets to the final score of a baseline; see the definitions of the module.

    Attributes:
        steps: mean steps to the target over seeds; infinite when one seed never reaches it.
        num_reached: seeds that reach the target, of `num_seeds`.
        share_of_budget: steps to the target / last step.
        ratio: steps to 98 % of the baseline's way / the baseline's own; `None` where the baseline needs none.
        seconds: mean seconds to the target; `None` without timings, as the two below.
        seconds_share: seconds to the target / the baseline's seconds to the end.
        seconds_ratio: as `ratio`.
    """

    steps: float
    num_reached: int
    num_seeds: int
    share_of_budget: Estimate
    ratio: Estimate | None
    seconds: float | None
    seconds_share: Estimate | None
    seconds_ratio: Estimate | None


@dataclass(frozen=True)
class Fastest:
    """Steps to 98 % of a baseline's way at the learning rate that gets there first.

    Attributes:
        learning_rate: with the fewest steps in the mean over seeds.
        steps: that mean; infinite when one seed never gets there at any learning rate.
        ratio: steps / those of the baseline at its own fastest learning rate; `None` where it needs none.
    """

    learning_rate: float
    steps: float
    ratio: Estimate | None


@dataclass(frozen=True)
class Robustness:
    """What an untuned learning rate gives at a fixed step.

    Attributes:
        mean: over the shared learning rates.
        worst: the worst learning rate's mean over seeds; infinitely bad where a run diverged.
        num_diverged: runs, of `num_runs`.
        differences: baseline -> difference of the means.
    """

    mean: Estimate
    worst: float
    num_diverged: int
    num_runs: int
    differences: dict[str, Estimate]


@dataclass(frozen=True)
class InitSummary:
    """One row of the report.

    Attributes:
        final: primary metric at the last step, mean over seeds, with `final_sd` (`nan` for one seed).
        best_over_steps: mean over seeds of the best score at any step.
        init_s: mean seconds of the initialisation; `None` without timings.
        differences: baseline -> difference of the final scores.
        speeds: baseline -> speed; without baselines that diverged.
        early: robustness at the early step, `None` where no seed has the whole shared grid; `late`: at the last step.
    """

    init: str
    learning_rate: float
    num_seeds: int
    rank: int
    num_parameters: int
    final: float
    final_sd: float
    best_over_steps: float
    init_s: float | None
    differences: dict[str, Estimate]
    speeds: dict[str, Speed]
    early: Robustness | None
    late: Robustness | None
