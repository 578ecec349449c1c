"""The grid of a comparison: initialisations x learning rates x seeds, and the results of its runs in tables."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorainit_diffusers.comparison.options import ComparisonOptions
from lorainit_diffusers.comparison.results import RESULTS_NAME, TIMINGS_NAME, write_table
from lorainit_diffusers.methods import Initializer
from lorainit_diffusers.methods.declared import gives_scores, needs_reference
from lorainit_diffusers.ranges import COUNT, NOT_NEGATIVE
from lorainit_diffusers.training.options.checks import build_method

RUNS_NAME = "runs"
# Of a run: its whole result, the scores of its samples, and the evaluations as they come.
RESULT_NAME = "result.json"
SCORES_NAME = "scores.json"
PROGRESS_NAME = "progress.jsonl"

_KINDS: dict[str, Callable[[str], Any]] = {
    "variable_rank": lambda value: {"true": True, "false": False}[value.lower()],
    "init_num_batches": int,
    "a_lr_ratio": float,
}
_RANGES = {"init_num_batches": COUNT, "a_lr_ratio": NOT_NEGATIVE}


@dataclass(frozen=True)
class Init:
    """One column of the comparison: a method with its hyper-parameters, and what else sets its runs apart.

    Attributes:
        label: As on the command line.
        name: Of the method.
        method: The configured method.
        variable_rank: Ranks by score under the budget.
        init_num_batches: Batches of the collection pass.
        a_lr_ratio: Learning rate of A divided by that of B (0 freezes A; LoRA+, arXiv:2402.12354, has it below 1).
    """

    label: str
    name: str
    method: Initializer
    variable_rank: bool = False
    init_num_batches: int | None = None
    a_lr_ratio: float = 1.0

    @classmethod
    def parse(cls, label: str) -> Init:
        """Read `name` or `name:key=value,key=value`.

        Raises:
            ValueError: For an unknown name, key or value.
        """
        name, _, text = label.partition(":")
        of_run: dict[str, Any] = {}
        of_method: list[str] = []
        for option in filter(None, text.split(",")):
            key, _, value = option.partition("=")
            if key not in _KINDS:
                of_method.append(option)
                continue
            try:
                of_run[key] = _KINDS[key](value)
            except (ValueError, KeyError):
                raise ValueError(f"--inits {label!r}: {value!r} is not a value of {key}") from None
        try:
            init = cls(label, name, build_method(name, of_method), **of_run)
        except ValueError as error:
            raise ValueError(f"--inits {label!r}: {error}; options of the run are {', '.join(_KINDS)}") from None
        for key, allowed in _RANGES.items():
            if key in of_run:
                allowed.check(f"--inits {label!r}: {key}", of_run[key], "{name}={value} {reason}")
        if init.variable_rank and not gives_scores(init.method):
            raise ValueError(f"--inits {label!r}: {name} gives no scores to allocate ranks by; drop variable_rank")
        if needs_reference(init.method):
            raise ValueError(f"--inits {label!r}: pretraining=measured needs class images, which a comparison has not")
        return init


@dataclass(frozen=True)
class PlannedRun:
    """One cell of the grid."""

    init: Init
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder and in the results."""
        label = re.sub(r"[^\w.=+-]+", "-", self.init.label)
        return f"{label}-lr{self.learning_rate:g}-seed{self.seed}"


@dataclass(frozen=True)
class Grid:
    """All runs of a comparison, and where they write.

    Attributes:
        directory: Of the comparison.
        options: Its options.
        runs: In the order of the results.
    """

    directory: Path
    options: ComparisonOptions
    runs: tuple[PlannedRun, ...]

    @classmethod
    def of(cls, options: ComparisonOptions, directory: Path) -> Grid:
        """The grid that the options ask for.

        Raises:
            ValueError: Naming the initialisation that there is not, or cannot be compared.
        """
        inits = [Init.parse(label) for label in options.inits]
        runs = [PlannedRun(i, lr, seed) for i in inits for seed in options.seeds for lr in options.learning_rates]
        return cls(directory, options, tuple(runs))

    def folder(self, run: PlannedRun) -> Path:
        """Where a run writes."""
        return self.directory / RUNS_NAME / run.name


@dataclass(frozen=True)
class Part:
    """The share of the grid that one process works on: each `count`-th piece from `index` on."""

    index: int = 0
    count: int = 1

    @property
    def places(self) -> slice:
        """Of this part's pieces in a list of all."""
        return slice(self.index, None, self.count)


def write_results(grid: Grid) -> None:
    """Write `results.csv`, which is a function of the options alone, and the measured seconds in `timings.csv`."""
    rows: list[dict[str, Any]] = []
    timings: list[dict[str, Any]] = []
    scored_columns: dict[str, None] = {}
    for run in grid.runs:
        result = json.loads((grid.folder(run) / RESULT_NAME).read_text(encoding="utf-8"))
        scores = _scores(grid, run)
        numbers = {name: result[name] for name in ("num_parameters", "num_head_parameters") if name in result}
        for line in result["rows"]:
            scored = scores.get(str(line["step"]), {})
            scored_columns |= dict.fromkeys(scored)
            of_run = {"run": run.name, "init": run.init.label, "learning_rate": run.learning_rate, "seed": run.seed}
            measured = {name: value for name, value in line.items() if name != "train_s"}
            rows.append({**of_run, "rank": result["rank"], **numbers, **measured, **scored})
            seconds = {"init_s": round(result["init_s"], 3), "train_s": round(line["train_s"], 3)}
            timings.append({"run": run.name, "step": line["step"], **seconds})
    columns = dict.fromkeys(name for row in rows for name in row if name not in scored_columns)
    write_table(grid.directory / RESULTS_NAME, rows, [*columns, *scored_columns])
    write_table(grid.directory / TIMINGS_NAME, timings, ["run", "step", "init_s", "train_s"])


def _scores(grid: Grid, run: PlannedRun) -> dict[str, dict[str, float]]:
    """Step -> scores of the samples of a run; nothing where it has none."""
    path = grid.folder(run) / SCORES_NAME
    return json.loads(path.read_text(encoding="utf-8")) if grid.options.draws_images and path.exists() else {}


def count_files(paths: Sequence[Path]) -> int:
    """How many of these files there are: of the results of runs, those that are finished."""
    return sum(path.exists() for path in paths)
