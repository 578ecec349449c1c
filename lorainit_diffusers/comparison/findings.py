"""What an analysis finds out about one initialisation; `analysis` has the definitions."""

from __future__ import annotations

from dataclasses import dataclass

from lorainit_diffusers.comparison.estimates import Estimate


@dataclass(frozen=True)
class Speed:
    """How fast an initialisation gets to the final score of a baseline; see the definitions of the module.

    Attributes:
        steps: Mean steps to the target over seeds; infinite when one seed never reaches it.
        num_reached: Seeds that reach the target, of `num_seeds`.
        share_of_budget: Steps to the target / last step.
        ratio: Steps to 98 % of the baseline's way / the baseline's own; `None` where the baseline needs none.
        seconds: Mean seconds to the target; `None` without timings, as the two below.
        seconds_share: Seconds to the target / the baseline's seconds to the end.
        seconds_ratio: As `ratio`.
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
        learning_rate: With the fewest steps in the mean over seeds.
        steps: That mean; infinite when one seed never gets there at any learning rate.
        ratio: Steps / those of the baseline at its own fastest learning rate; `None` where it needs none.
    """

    learning_rate: float
    steps: float
    ratio: Estimate | None


@dataclass(frozen=True)
class Robustness:
    """What an untuned learning rate gives at a fixed step.

    Attributes:
        mean: Over the shared learning rates.
        worst: The worst learning rate's mean over seeds; infinitely bad where a run diverged.
        num_diverged: Runs, of `num_runs`.
        differences: Baseline -> difference of the means.
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
        final: Primary metric at the last step, mean over seeds, with `final_sd` (`nan` for one seed).
        best_over_steps: Mean over seeds of the best score at any step.
        init_s: Mean seconds of the initialisation; `None` without timings.
        differences: Baseline -> difference of the final scores.
        speeds: Baseline -> speed; without baselines that diverged.
        early: Robustness at the early step, `None` where no seed has the whole shared grid; `late`: at the last step.
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
