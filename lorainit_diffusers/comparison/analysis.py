"""What the runs of a comparison say: best learning rates, differences with intervals, speed, robustness.

Everything is computed from `results.csv`, `timings.csv` and `config.json`, which a comparison leaves.

Definitions, for one initialisation and one baseline (`gaussian`, `orthonormal`):

- **best learning rate**: the best mean over seeds of the primary metric at the last step. Of an unfinished grid, only
  the learning rates with the most finished seeds are candidates.
- **difference**: mean over seeds of (initialisation - baseline), each at its own best learning rate.
- **target**: what the baseline, at its best learning rate, has at the last step; one target a seed. Steps to the target
  are those of the first crossing, linear between evaluated steps, and infinite where a run never gets there. Metrics
  that count examples (accuracy, exact match) are noisy: their crossings are read off the median of each evaluation and
  its two neighbours, so that one lucky evaluation is none. The first and the last evaluation stand as they are.
- **share of the budget**: steps to the target / last step. It flatters: a baseline that has converged was at its final
  score long before the end, too.
- **ratio**: steps of the initialisation / steps of the baseline, both to the same, slightly easier target, 98 % of the
  way that the baseline goes from step 0 to the end (`TOLERANCE`). The fair one. The same in seconds is the time of the
  initialisation plus that of the training steps; evaluation is not counted.
- **fastest**: that ratio once more, with learning rates chosen for it: each at the one that reaches the easier
  target in the fewest steps, in the mean over seeds.
- **robustness**: mean over the learning rates that all initialisations share, at a fixed step, and the worst of them.

Intervals are 95 % paired percentile bootstraps over seeds. A difference is called better or worse when its interval
excludes 0, a ratio when it excludes 1; where a seed never reaches the target, the interval ends at infinity. Of few
seeds such intervals are too narrow: see `chance_of_verdict`.

A run that diverged (a score that is missing or not finite) is as bad as can be, not absent: its score is infinitely
bad, and in the mean over learning rates it counts as the worst score that any run had at any step.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lorainit_diffusers.comparison.estimates import (
    Estimate,
    bootstrap,
    difference,
    first_reach,
    mean,
    running_median,
    sd,
)
from lorainit_diffusers.comparison.findings import Fastest, InitSummary, Robustness, Speed
from lorainit_diffusers.comparison.results import RESULTS_NAME, RunCurves, higher_is_better, read_runs
from lorainit_diffusers.evaluation.metrics import METRICS

# Share of the baseline's way that the target of the ratio leaves out.
TOLERANCE = 0.02
EARLY_FRACTION = 0.25


@dataclass(frozen=True)
class Comparison:
    """The results of a comparison.

    Attributes:
        directory: Where they lie.
        config: The content of `config.json`.
        runs: Those with results, in the order of the file.
        columns: Metrics in the results besides the primary one.
    """

    directory: Path
    config: dict[str, Any]
    runs: tuple[RunCurves, ...]
    columns: tuple[str, ...]

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Comparison:
        """Read the results of a finished or interrupted comparison.

        Args:
            directory: With `config.json` and `results.csv`; `timings.csv` may be missing.

        Raises:
            FileNotFoundError: Without one of the two files.
            ValueError: When the results have no rows, lack a column, or hold a metric of unknown direction.
        """
        directory = Path(directory)
        for name in ("config.json", RESULTS_NAME):
            if not (directory / name).is_file():
                raise FileNotFoundError(f"{directory / name} is missing; run train_scripts/compare_inits.py first")
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        runs, columns = read_runs(directory, config["primary_metric"])
        return cls(directory, config, tuple(runs), tuple(columns))

    @property
    def primary(self) -> str:
        """The metric that learning rates are chosen by."""
        return self.config["primary_metric"]

    @property
    def generates_images(self) -> bool:
        """Whether the models draw: whether the runs have samples, and may have been scored by them."""
        return self.config.get("generates_images", True)

    @cached_property
    def last_step(self) -> int:
        """The last evaluated step of any run; a run without it has not finished, unless it diverged."""
        return max(max(run.curves[self.primary]) for run in self.runs)

    @cached_property
    def early_step(self) -> int | None:
        """The step nearest to a quarter of the budget that every run to the end was evaluated at."""
        curves = [run.curves[self.primary] for run in self.runs]
        shared = set[int].intersection(*(set(curve) for curve in curves if self.last_step in curve))
        shared -= {0, self.last_step}
        aim = EARLY_FRACTION * self.last_step
        return min(sorted(shared), key=lambda step: abs(step - aim), default=None)

    @cached_property
    def inits(self) -> list[str]:
        """Labels with at least one finished run, in the order of the configuration."""
        found = dict.fromkeys(run.init for run in self.runs if self.finished(run))
        return [init for init in dict.fromkeys([*self.config["learning_rates"], *found]) if init in found]

    @cached_property
    def baselines(self) -> list[str]:
        """Baselines with results."""
        return [init for init in self.config["baselines"] if init in self.inits]

    @cached_property
    def missing(self) -> list[tuple[str, float, int]]:
        """Cells of the grid without a finished run: (init, learning rate, seed)."""
        done = {(run.init, run.learning_rate, run.seed) for run in self.runs if self.finished(run)}
        grid = [
            (init, float(rate), seed)
            for init, rates in self.config["learning_rates"].items()
            for rate in rates
            for seed in self.config["seeds"]
        ]
        return [cell for cell in grid if cell not in done]

    def finished(self, run: RunCurves) -> bool:
        """Whether a run got to the last step or diverged on the way."""
        return self.score(run, self.last_step) is not None

    def score(self, run: RunCurves, step: int, column: str | None = None) -> float | None:
        """A run's score at a step; infinitely bad after it diverged, `None` where it was not measured."""
        curve = run.curves.get(column or self.primary, {})
        if step not in curve and curve and step > max(curve) and math.isinf(curve[max(curve)]):
            return curve[max(curve)]
        return curve.get(step)

    def grid(self, init: str) -> dict[float, dict[int, RunCurves]]:
        """Finished runs of an initialisation by learning rate, ascending, and seed."""
        runs = [run for run in self.runs if run.init == init and self.finished(run)]
        rates = sorted({run.learning_rate for run in runs})
        return {rate: {run.seed: run for run in runs if run.learning_rate == rate} for rate in rates}

    def best_learning_rates(self) -> dict[str, float]:
        """The best learning rate of each initialisation that has one; of equally good ones the lowest."""
        return dict(self._best)

    @cached_property
    def _best(self) -> dict[str, float]:
        best: dict[str, float] = {}
        for init in self.inits:
            grid = self.grid(init)
            most = max(len(runs) for runs in grid.values())
            costs = {
                rate: [self._cost(self._final(run), self.primary) for run in runs.values()]
                for rate, runs in grid.items()
                if len(runs) == most
            }
            # where every learning rate diverged on some seed, the one that did so least often
            best[init] = min(costs, key=lambda rate: (np.mean(costs[rate]), costs[rate].count(math.inf), rate))
        return best

    def best_runs(self, init: str) -> dict[int, RunCurves]:
        """Finished runs at the best learning rate by seed, ascending."""
        runs = self.grid(init)[self._best[init]]
        return {seed: runs[seed] for seed in sorted(runs)}

    def summary(self) -> list[InitSummary]:
        """Everything about every initialisation, in the order of the configuration."""
        return [self._summary(init) for init in self.inits]

    def difference(self, init: str, baseline: str, column: str | None = None, step: int | None = None) -> Estimate:
        """Mean over shared seeds of (init - baseline) at a step, each at its best learning rate.

        Raises:
            ValueError: When the two share no seed with a score.
        """
        column = column or self.primary
        step = self.last_step if step is None else step
        ours, theirs = self.best_runs(init), self.best_runs(baseline)
        pairs = [
            (a, b)
            for seed in ours
            if seed in theirs
            and (a := self.score(ours[seed], step, column)) is not None
            and (b := self.score(theirs[seed], step, column)) is not None
        ]
        if not pairs:
            raise ValueError(f"{init!r} and {baseline!r} share no seed with a score of {column!r} at step {step}")
        return difference(pairs, higher_is_better(column))

    def speed(self, init: str, baseline: str, column: str | None = None) -> Speed | None:
        """How fast an initialisation gets to what a baseline has at the end, each at its best learning rate.

        Seeds on which the baseline diverged, or that only one of the two has, give no target.

        Args:
            init: Its label.
            baseline: Its label.
            column: The metric; by default the primary one. Its own last measured step is the end then.

        Returns:
            `None` when no seed gives a target.
        """
        column = column or self.primary
        ours, theirs = self.best_runs(init), self.best_runs(baseline)
        reached: list[_Reached] = []
        for seed in ours:
            if seed not in theirs or not (ours[seed].curves.get(column) and theirs[seed].curves.get(column)):
                continue
            curve = self._cost_curve(theirs[seed], column)
            end = max(curve)
            if math.isfinite(curve[end]):
                easier = curve[end] + TOLERANCE * max(0.0, curve[min(curve)] - curve[end])
                reached.append(
                    _Reached(
                        end=(end, theirs[seed].seconds.get(end, math.nan)),
                        ours=self._first_reach(ours[seed], column, curve[end]),
                        ours_easier=self._first_reach(ours[seed], column, easier),
                        theirs_easier=self._first_reach(theirs[seed], column, easier),
                    )
                )
        if not reached:
            return None
        timed = not any(math.isnan(r.end[1] + r.ours[1] + r.ours_easier[1] + r.theirs_easier[1]) for r in reached)

        def ratio(numerators: Iterable[float], denominators: Iterable[float]) -> Estimate | None:
            a, b = list(numerators), list(denominators)
            return bootstrap(a, b, null=1.0) if sum(b) > 0 else None

        def over_end(axis: int) -> Estimate:
            return bootstrap([r.ours[axis] for r in reached], [r.end[axis] for r in reached], null=1.0)

        def over_theirs(axis: int) -> Estimate | None:
            return ratio((r.ours_easier[axis] for r in reached), (r.theirs_easier[axis] for r in reached))

        return Speed(
            steps=mean([r.ours[0] for r in reached]),
            num_reached=sum(math.isfinite(r.ours[0]) for r in reached),
            num_seeds=len(reached),
            share_of_budget=over_end(0),
            ratio=over_theirs(0),
            seconds=mean([r.ours[1] for r in reached]) if timed else None,
            seconds_share=over_end(1) if timed else None,
            seconds_ratio=over_theirs(1) if timed else None,
        )

    def fastest(self, init: str, baseline: str) -> Fastest | None:
        """How fast an initialisation is, and how fast the baseline, when learning rates are chosen for speed alone.

        The learning rate with the best final score is often lower than the one with the fastest start. The target is
        that of `Speed.ratio`: 98 % of the way that the baseline goes at the learning rate with its best final score.

        Returns:
            `None` when no seed gives a target, or no learning rate of one of the two has all of these seeds.
        """
        targets: dict[int, float] = {}
        for seed, run in self.best_runs(baseline).items():
            curve = self._cost_curve(run)
            start, end = curve[min(curve)], curve[max(curve)]
            if math.isfinite(end):
                targets[seed] = end + TOLERANCE * max(0.0, start - end)

        def steps_by_rate(label: str) -> dict[float, list[float]]:
            return {
                rate: [self._first_reach(runs[seed], self.primary, target)[0] for seed, target in targets.items()]
                for rate, runs in self.grid(label).items()
                if targets.keys() <= runs.keys()
            }

        ours, theirs = steps_by_rate(init), steps_by_rate(baseline)
        if not (targets and ours and theirs):
            return None
        rate = min(ours, key=lambda rate: sum(ours[rate]))
        reference = min(theirs.values(), key=sum)
        ratio = bootstrap(ours[rate], reference, null=1.0) if sum(reference) > 0 else None
        return Fastest(rate, mean(ours[rate]), ratio)

    @cached_property
    def shared_learning_rates(self) -> list[float]:
        """Learning rates that the configuration gives to every initialisation with results."""
        grids = [{float(r) for r in self.config["learning_rates"].get(i, self.grid(i))} for i in self.inits]
        return sorted(set[float].intersection(*grids))

    def robustness(self, init: str, step: int) -> Robustness | None:
        """Scores over the shared learning rates at a step; `None` where no seed has all of them."""
        ours = self._means_over_rates(init, step)
        if not ours:
            return None
        higher = higher_is_better(self.primary)
        differences: dict[str, Estimate] = {}
        for baseline in self.baselines:
            theirs = self._means_over_rates(baseline, step)
            pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
            if baseline != init and pairs:
                differences[baseline] = difference(pairs, higher)
        grid = self.grid(init)
        scores = [[self._score_at(grid[rate][seed], step) for seed in ours] for rate in self.shared_learning_rates]
        means = [mean(of_rate) for of_rate in scores]
        return Robustness(
            mean=bootstrap(list(ours.values())),
            worst=min(means) if higher else max(means),
            num_diverged=sum(math.isinf(score) for of_rate in scores for score in of_rate),
            num_runs=len(ours) * len(scores),
            differences=differences,
        )

    def _summary(self, init: str) -> InitSummary:
        runs = self.best_runs(init)
        finals = [self._final(run) for run in runs.values()]
        best = [self._sign(self.primary) * min(self._cost_curve(run).values()) for run in runs.values()]
        others = [baseline for baseline in self.baselines if baseline != init]
        shared = [baseline for baseline in others if set(self.best_runs(baseline)) & set(runs)]
        speeds = {baseline: self.speed(init, baseline) for baseline in self.baselines}
        first = next(iter(runs.values()))
        timed = [run.seconds[0] for run in runs.values() if 0 in run.seconds]
        return InitSummary(
            init=init,
            learning_rate=self._best[init],
            num_seeds=len(runs),
            rank=first.rank,
            num_parameters=first.num_parameters,
            final=mean(finals),
            final_sd=sd(finals),
            best_over_steps=mean(best),
            init_s=mean(timed) if timed else None,
            differences={baseline: self.difference(init, baseline) for baseline in shared},
            speeds={baseline: speed for baseline, speed in speeds.items() if speed is not None},
            early=None if self.early_step is None else self.robustness(init, self.early_step),
            late=self.robustness(init, self.last_step),
        )

    def _sign(self, column: str) -> int:
        return -1 if higher_is_better(column) else 1

    def _cost(self, value: float, column: str) -> float:
        """A score turned so that lower is better."""
        return self._sign(column) * value

    def _cost_curve(self, run: RunCurves, column: str | None = None) -> dict[int, float]:
        column = column or self.primary
        return {step: self._cost(value, column) for step, value in sorted(run.curves[column].items())}

    def _score_at(self, run: RunCurves, step: int) -> float:
        score = self.score(run, step)
        if score is None:
            raise ValueError(f"run {run.name!r} was not evaluated at step {step}")
        return score

    def _final(self, run: RunCurves) -> float:
        return self._score_at(run, self.last_step)

    def _first_reach(self, run: RunCurves, column: str, target: float) -> tuple[float, float]:
        """(steps, seconds) to the target; seconds are `nan` without timings."""
        curve = self._cost_curve(run, column)
        costs = list(curve.values())
        if METRICS[column.partition("@")[0]].counted:
            costs = running_median(costs)
        steps = first_reach(list(curve), costs, target)
        if not all(step in run.seconds for step in curve):
            return steps, math.nan
        return steps, first_reach([run.seconds[step] for step in curve], costs, target)

    def _means_over_rates(self, init: str, step: int) -> dict[int, float]:
        """Mean over the shared learning rates by seed; a diverged run counts as the worst score of the comparison."""
        grid, rates = self.grid(init), self.shared_learning_rates
        if not rates or any(rate not in grid for rate in rates):
            return {}
        means: dict[int, float] = {}
        for seed in sorted(set[int].intersection(*(set(grid[rate]) for rate in rates))):
            scores = [self._score_at(grid[rate][seed], step) for rate in rates]
            means[seed] = mean([self._worst_finite if math.isinf(score) else score for score in scores])
        return means

    @cached_property
    def _worst_finite(self) -> float:
        values = [value for run in self.runs for value in run.curves[self.primary].values() if math.isfinite(value)]
        return min(values, default=math.nan) if higher_is_better(self.primary) else max(values, default=math.nan)


@dataclass(frozen=True)
class _Reached:
    """(steps, seconds) of one seed: the baseline's end, and to the target and the easier target."""

    end: tuple[float, float]
    ours: tuple[float, float]
    ours_easier: tuple[float, float]
    theirs_easier: tuple[float, float]
