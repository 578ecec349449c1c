"""The results of a comparison on disk: `results.csv` has every score of every run, `timings.csv` every second.

Pandas reads and writes them. It is an extra (`eval`), because training needs none of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorainit_diffusers.comparison.extras import require_pandas
from lorainit_diffusers.evaluation.metrics import METRICS
from lorainit_diffusers.files import csv_cell, csv_text, replacing

if TYPE_CHECKING:
    import pandas

RESULTS_NAME = "results.csv"
TIMINGS_NAME = "timings.csv"
_KEYS = ("run", "init", "learning_rate", "seed", "rank", "num_parameters", "step")
# A column where modules are trained in full.
_HEAD_KEY = "num_head_parameters"


@dataclass(frozen=True)
class RunCurves:
    """What one run of the grid has been measured at.

    Attributes:
        name: Of its folder in `runs/`.
        num_parameters: Of the adapters.
        curves: Column of the results -> step -> value, where measured; infinitely bad where the run had diverged.
        seconds: Step -> seconds of initialisation and training up to there; empty without timings.
        num_head_parameters: Of the modules that are trained in full, such as a classifier's head.
    """

    name: str
    init: str
    learning_rate: float
    seed: int
    rank: int
    num_parameters: int
    curves: dict[str, dict[int, float]]
    seconds: dict[int, float]
    num_head_parameters: int = 0


def read_table(path: Path) -> pandas.DataFrame:
    """A CSV file, every cell as its text; an empty cell is an empty text."""
    require_pandas()
    import pandas

    try:
        return pandas.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    except pandas.errors.EmptyDataError:
        return pandas.DataFrame()


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, line_end: str = "\n") -> None:
    """Write a CSV file: texts cannot be taken for formulas, numbers are written so that they are read as they were.

    Args:
        path: Of the file.
        rows: Column -> value; a value that is missing leaves its cell empty.
        columns: In their order; what rows have beside them is left out.
        line_end: Of every line.
    """
    require_pandas()
    import pandas

    cells = [[_cell(row.get(name, "")) for name in columns] for row in rows]
    # as objects: a column of numbers with empty cells would become one of floats
    table = pandas.DataFrame(cells, columns=list(columns), dtype=object)
    with replacing(path) as scratch:
        table.to_csv(scratch, index=False, na_rep="nan", lineterminator=line_end, encoding="utf-8")


def read_runs(directory: Path, primary: str) -> tuple[list[RunCurves], list[str]]:
    """The runs that have a score of the primary metric, in the order of the file, and the other metrics' columns.

    Args:
        directory: With `results.csv`; `timings.csv` may be missing.
        primary: Column of the metric that runs are compared by.

    Raises:
        ValueError: When the results have no rows, lack a column, or hold a metric of unknown direction.
    """
    table = read_table(directory / RESULTS_NAME)
    if table.empty:
        raise ValueError(f"{directory / RESULTS_NAME} has no rows: no run has finished yet")
    for name in (*_KEYS, primary):
        if name not in table.columns:
            raise ValueError(f"{directory / RESULTS_NAME} has no column {name!r}")
    others = [str(name) for name in table.columns if name not in (*_KEYS, _HEAD_KEY, primary)]
    seconds = _read_seconds(directory / TIMINGS_NAME)
    runs: list[RunCurves] = []
    for name, rows in table.groupby("run", sort=False):
        first = rows.iloc[0]
        run = RunCurves(
            *(csv_text(str(name)), csv_text(first["init"]), float(first["learning_rate"]), int(first["seed"])),
            *(int(first["rank"]), int(first["num_parameters"])),
            curves=_curves(rows, primary, others),
            seconds=seconds.get(str(name), {}),
            num_head_parameters=int(first.get(_HEAD_KEY) or 0),
        )
        if run.curves[primary]:
            runs.append(run)
    return runs, others


def higher_is_better(column: str) -> bool:
    """Direction of a column `metric` or `metric@encoder`.

    Raises:
        ValueError: When the metric is not in `METRICS`.
    """
    metric = column.partition("@")[0]
    if metric not in METRICS:
        raise ValueError(f"column {column!r}: add {metric!r} to METRICS, which says whether higher is better")
    return METRICS[metric].higher_is_better


def _read_seconds(path: Path) -> dict[str, dict[int, float]]:
    """Run -> step -> seconds up to there; empty without the file."""
    if not path.is_file():
        return {}
    return {
        str(name): {
            int(step): float(init_s) + float(train_s)
            for step, init_s, train_s in zip(rows["step"], rows["init_s"], rows["train_s"], strict=True)
        }
        for name, rows in read_table(path).groupby("run", sort=False)
    }


def _curves(rows: pandas.DataFrame, primary: str, others: Sequence[str]) -> dict[str, dict[int, float]]:
    """Metric -> step -> value of one run; the primary metric is there even without a value."""
    scored = rows.loc[:, list(others)] != ""
    # a step of image metrics alone has no primary score; any other row without one is of a run that diverged
    measured = {primary: (rows[primary] != "") | ~scored.any(axis=1), **{name: scored[name] for name in others}}
    curves: dict[str, dict[int, float]] = {}
    for name, there in measured.items():
        worst = -math.inf if higher_is_better(name) else math.inf
        steps, values = rows.loc[there, "step"], rows.loc[there, name]
        curve = {int(step): _number(text, worst) for step, text in zip(steps, values, strict=True)}
        if curve or name == primary:
            curves[name] = curve
    return curves


def _number(text: str, worst: float) -> float:
    value = float(text) if text else math.nan
    return value if math.isfinite(value) else worst


def _cell(value: Any) -> Any:
    return csv_cell(value) if isinstance(value, str) else value
