"""What the runs of the protocol have found: one file each, the table of all, and the summary."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorainit_diffusers.comparison.estimates import bootstrap
from lorainit_diffusers.comparison.results import RESULTS_NAME, write_table
from lorainit_diffusers.comparison.vtab.data import find_tasks
from lorainit_diffusers.comparison.vtab.options import Setting, VtabOptions
from lorainit_diffusers.evaluation.document import Block, Cell, Heading, Table, Text, to_markdown
from lorainit_diffusers.files import write_json, write_text

COLUMNS: tuple[str, ...] = (
    *("task", "init", "rank", "stage", "learning_rate", "seed", "accuracy", "macro_accuracy", "validation_loss"),
    *("num_trainable_parameters", "init_s", "total_s"),
)
SUMMARY_NAME = "summary.md"


class Results:
    """The finished runs of a directory, one file each, so that a killed process leaves none by half."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "runs"
        self.directory.mkdir(exist_ok=True)

    def get(self, setting: Setting) -> dict[str, Any] | None:
        """The result of a run, if it has finished."""
        path = self.directory / setting.file_name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def add(self, setting: Setting, values: Mapping[str, float]) -> None:
        """Keep the result of a run."""
        write_json(self.directory / setting.file_name, {**setting._asdict(), **values})

    def all(self) -> list[dict[str, Any]]:
        """All results, in order."""
        rows = [json.loads(path.read_text(encoding="utf-8")) for path in self.directory.glob("*.json")]
        return sorted(rows, key=lambda row: [row[name] for name in Setting._fields])


def selection_settings(options: VtabOptions, task: str) -> Iterator[Setting]:
    """The runs that learning rates are chosen by."""
    for init in options.inits:
        for rank in options.ranks:
            for rate in options.learning_rates:
                yield Setting(task, init, rank, "select", rate, options.seeds[0])


def best_rate(options: VtabOptions, results: Results, task: str, init: str, rank: int) -> float | None:
    """The learning rate that is best on the validation images, the lowest of equal ones; None before all have run."""
    scores: dict[float, tuple[float, float]] = {}
    for setting in selection_settings(options, task):
        if (setting.init, setting.rank) == (init, rank):
            result = results.get(setting)
            if result is None:
                return None
            scores[setting.learning_rate] = (-result["accuracy"], result["validation_loss"])
    return min(scores, key=lambda rate: (*scores[rate], rate))


def test_settings(options: VtabOptions, results: Results, task: str) -> Iterator[Setting]:
    """The runs at the chosen learning rates."""
    for init in options.inits:
        for rank in options.ranks:
            rate = best_rate(options, results, task, init, rank)
            if rate is not None:
                yield from (Setting(task, init, rank, "test", rate, seed) for seed in options.seeds)


def write_results(options: VtabOptions, results: Results) -> None:
    """Write `results.csv`, of everything in the directory, and `summary.md`, of what was asked for."""
    directory = Path(options.output_dir)
    write_table(directory / RESULTS_NAME, results.all(), COLUMNS, line_end="\r\n")
    title = "Test accuracy by initialisation and rank"
    write_text(directory / SUMMARY_NAME, to_markdown(title, summary(options, results)))


def summary(options: VtabOptions, results: Results) -> list[Block]:
    """Test accuracy by initialisation and rank, on average and task by task."""
    tasks = list(find_tasks(options))
    scores = {
        (task, init, rank): found
        for task in tasks
        for init in options.inits
        for rank in options.ranks
        if (found := _test_scores(options, results, task, init, rank))
    }
    blocks: list[Block] = [
        Text(
            f"Base {options.pretrained_model_name_or_path}; {options.max_train_steps} steps of "
            f"{options.train_batch_size} images; learning rates {', '.join(f'{r:g}' for r in options.learning_rates)}, "
            "chosen on the validation images for each task, initialisation and rank with seed "
            f"{options.seeds[0]}; {len(options.seeds)} seeds on training and validation images together. Means over "
            "seeds, in percent; in brackets 95 % bootstrap intervals over seeds."
        )
    ]
    planned = len(tasks) * len(options.inits) * len(options.ranks) * len(options.seeds)
    missing = planned - sum(map(len, scores.values()))
    if missing:
        blocks.append(Text(f"{missing} test runs are missing: what is said here is of the others."))
    header = ["initialisation", *(f"rank {rank}" for rank in options.ranks)]
    if len(tasks) > 1:
        rows: list[list[str]] = []
        for init in options.inits:
            of_tasks = ([scores.get((task, init, rank), {}) for task in tasks] for rank in options.ranks)
            rows.append([init, *map(_mean_over_tasks, of_tasks)])
        blocks += [Heading(f"Mean of {len(tasks)} tasks"), _table(header, rows)]
    for task in tasks:
        rows = []
        for init in options.inits:
            places = [(task, init, rank) for rank in options.ranks]
            rows.append([init, *(_cell(options, results, scores.get(place, {}), place) for place in places)])
        blocks += [Heading(task), _table(header, rows)]
    return blocks


def _table(header: list[str], rows: Sequence[Sequence[str]]) -> Table:
    return Table(header, [[Cell(text) for text in row] for row in rows])


def _cell(options: VtabOptions, results: Results, found: Mapping[int, float], place: tuple[str, str, int]) -> str:
    """The scores by seed in one cell, with the learning rate that was chosen."""
    rate = best_rate(options, results, *place)
    return f"{_interval(list(found.values()))}, lr {rate:g}" if found and rate is not None else "–"


def _test_scores(options: VtabOptions, results: Results, task: str, init: str, rank: int) -> dict[int, float]:
    """Test accuracy by seed."""
    rate = best_rate(options, results, task, init, rank)
    if rate is None:
        return {}
    found = {seed: results.get(Setting(task, init, rank, "test", rate, seed)) for seed in options.seeds}
    return {seed: result["accuracy"] for seed, result in found.items() if result is not None}


def _mean_over_tasks(scores: Sequence[Mapping[int, float]]) -> str:
    """Of the seeds that every task has."""
    seeds = set(scores[0]).intersection(*scores[1:])
    return _interval([sum(task[seed] for task in scores) / len(scores) for seed in sorted(seeds)])


def _interval(values: Sequence[float]) -> str:
    if not values:
        return "–"
    estimate = bootstrap([100 * value for value in values])
    bounds = f" [{estimate.low:.1f}, {estimate.high:.1f}]" if len(values) > 1 else ""
    return f"{estimate.value:.1f}{bounds}"
