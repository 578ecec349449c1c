"""The report of a comparison that a person reads: `report.html` in one file, `summary.md`, and the figures beside them.

What the report says is a list of blocks, which `document` writes as HTML and as Markdown.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lorainit_diffusers.comparison.analysis import Comparison
from lorainit_diffusers.comparison.cells import (
    difference_cell,
    mean_cell,
    number,
    own_ratio_cell,
    ratio_cell,
    seconds_cell,
    steps_cell,
)
from lorainit_diffusers.comparison.estimates import Estimate, bootstrap, sd
from lorainit_diffusers.comparison.figures import (
    column_label,
    curves_figure,
    lr_sweep_figure,
    ranks_figure,
    samples_image,
)
from lorainit_diffusers.comparison.findings import InitSummary, Robustness
from lorainit_diffusers.comparison.results import RESULTS_NAME, higher_is_better
from lorainit_diffusers.comparison.sentences import WAY, data_counts, headline, how_to_read, listed
from lorainit_diffusers.evaluation.document import (
    Block,
    Bullets,
    Cell,
    Code,
    Heading,
    Picture,
    Table,
    Text,
    to_html,
    to_markdown,
)
from lorainit_diffusers.evaluation.plots import save_figure
from lorainit_diffusers.files import announce, replacing, write_text

_BUNDLED_ENCODER = "tiny-clip"
_DPI = 110
_FIGURES = ("curves.png", "lr_sweep.png", "ranks.png", "grid.png")


def write_report(directory: str | os.PathLike[str]) -> list[Path]:
    """Write `summary.md`, `curves.png`, `lr_sweep.png`, `ranks.png`, `grid.png` and `report.html` from the results.

    The grid of runs may be incomplete; the report then says what is missing. A figure without inputs is left out, and
    an older one removed. The same results give the same files.

    Args:
        directory: Of a comparison; see `Comparison.load`.

    Returns:
        The files that were written.

    Raises:
        FileNotFoundError: Without results.
        ValueError: When the results hold no finished run or cannot be read.
    """
    comparison = Comparison.load(directory)
    if not comparison.inits:
        raise ValueError(f"{comparison.directory / RESULTS_NAME} has no finished run to report on")
    figures = _write_figures(comparison)
    blocks = report_blocks(comparison, figures)
    data = Path(comparison.config["dataset"])
    title = f"LoRA initialisations on {data.parent.name if data.stem == 'train' else data.name}"
    summary, report = comparison.directory / "summary.md", comparison.directory / "report.html"
    write_text(summary, to_markdown(title, blocks))
    write_text(report, to_html(title, blocks))
    return [summary, *figures.values(), report]


def result_sentences(directory: str | os.PathLike[str]) -> list[str]:
    """What the report of these results begins with: the result in sentences."""
    comparison = Comparison.load(directory)
    return headline(comparison, comparison.summary())


def report_blocks(comparison: Comparison, figures: dict[str, Path]) -> list[Block]:
    """Everything that the report says.

    Args:
        comparison: The results.
        figures: File name -> path of those that exist.
    """
    rows = comparison.summary()
    better = "higher" if higher_is_better(comparison.primary) else "lower"
    metric = column_label(comparison.primary)
    blocks: list[Block] = [Text(sentence, lead=index == 0) for index, sentence in enumerate(headline(comparison, rows))]
    blocks += [Heading("Summary"), _summary_table(comparison, rows)]
    sign = "Positive" if better == "higher" else "Negative"
    blocks.append(
        Text(
            f"{metric.capitalize()}, {better} is better, at step {comparison.last_step}: mean ± standard deviation "
            f"over seeds, at the best learning rate of each initialisation. {sign} differences are better. In "
            "brackets: 95 % intervals."
        )
    )
    blocks += [Heading("Curves"), *_figure_blocks("curves.png", figures, comparison)]
    if comparison.baselines:
        blocks += [Heading("Speed"), *_speed_blocks(comparison, comparison.primary), *_fastest_blocks(comparison)]
        for column in _similarity_columns(comparison)[:1]:
            blocks += _speed_blocks(comparison, column)
            measured = max(len(run.curves.get(column, {})) for run in comparison.runs)
            note = (
                f"The similarity was measured at {measured} steps; what lies between them is read off straight lines."
            )
            blocks.append(Text(note))
        blocks.append(
            Text(
                "The share of the budget flatters, because a baseline that has converged was at its final score before "
                f"the end, too. Fair is the ratio to the baseline's own steps, both to {WAY} of the improvement that "
                "the baseline ends with. Below 1 is faster. Seconds are those of the initialisation and the training "
                "steps."
            )
        )
    blocks += [Heading("Learning rates"), *_robustness_blocks(comparison, rows)]
    blocks += _figure_blocks("lr_sweep.png", figures, comparison)
    if comparison.generates_images:
        blocks += [Heading("Samples"), *_figure_blocks("grid.png", figures, comparison)]
        blocks += [Heading("Image metrics"), *_image_metric_blocks(comparison)]
    else:
        blocks += [Heading("All metrics"), *_metric_blocks(comparison)]
    blocks += [Heading("Ranks"), *_figure_blocks("ranks.png", figures, comparison)]
    blocks += [Heading("How to read this"), Bullets(how_to_read(comparison, rows))]
    blocks += [Heading("How it was made"), *_provenance_blocks(comparison)]
    return blocks


def _summary_table(comparison: Comparison, rows: Sequence[InitSummary]) -> Table:
    baselines = comparison.baselines
    header = ["initialisation", "best lr", "seeds", "final", "best step's"]
    header += [f"difference to {baseline}" for baseline in baselines]
    header += [column for b in baselines[:1] for column in (f"steps to {b}'s final", "× its steps", "seconds to it")]
    header += ["mean over lrs"] if len(comparison.shared_learning_rates) > 1 else []
    table: list[list[Cell]] = []
    for row in rows:
        final = number(row.final) + (f" ± {number(row.final_sd)}" if math.isfinite(row.final_sd) else "")
        cells = [Cell(row.init), Cell(f"{row.learning_rate:g}"), Cell(str(row.num_seeds)), Cell(final)]
        cells.append(Cell(number(row.best_over_steps)))
        cells += [difference_cell(row.differences.get(baseline)) for baseline in baselines]
        for baseline in baselines[:1]:
            speed = row.speeds.get(baseline)
            cells.append(steps_cell(speed))
            cells.append(own_ratio_cell(row.init, baseline, speed.ratio if speed else None))
            cells.append(seconds_cell(speed))
        if len(comparison.shared_learning_rates) > 1:
            cells.append(Cell(number(row.late.mean.value) if row.late else "–"))
        table.append(cells)
    return Table(header, table)


def _speed_blocks(comparison: Comparison, column: str) -> list[Block]:
    blocks: list[Block] = []
    for baseline in comparison.baselines:
        header = [
            f"to {baseline}'s final {column_label(column)}",
            "seeds that get there",
            "steps",
            "share of the budget",
        ]
        header += [f"× {baseline}'s own steps", "seconds", f"× {baseline}'s seconds to the end", "× its own seconds"]
        table: list[list[Cell]] = []
        for init in comparison.inits:
            speed = comparison.speed(init, baseline, column)
            if speed is None:
                continue
            cells = [Cell(init), Cell(f"{speed.num_reached} of {speed.num_seeds}"), steps_cell(speed)]
            cells.append(ratio_cell(speed.share_of_budget, compared=False))
            cells.append(own_ratio_cell(init, baseline, speed.ratio))
            cells.append(seconds_cell(speed))
            cells.append(ratio_cell(speed.seconds_share, compared=False))
            cells.append(own_ratio_cell(init, baseline, speed.seconds_ratio))
            table.append(cells)
        none = f"{baseline} diverged on every seed, so there is no score to reach."
        blocks.append(Table(header, table) if table else Text(none))
    return blocks


def _fastest_blocks(comparison: Comparison) -> list[Block]:
    """Speed with learning rates chosen for it; nothing where each initialisation has a single one."""
    if all(len(comparison.grid(init)) < 2 for init in comparison.inits):
        return []
    blocks: list[Block] = []
    for baseline in comparison.baselines:
        header = [f"fastest to {WAY} of {baseline}'s way", "lr", "steps", f"× {baseline}'s fastest"]
        table: list[list[Cell]] = []
        for init in comparison.inits:
            fastest = comparison.fastest(init, baseline)
            if fastest is not None:
                steps = f"{fastest.steps:.0f}" if math.isfinite(fastest.steps) else "never on some seed"
                cells = [Cell(init), Cell(f"{fastest.learning_rate:g}"), Cell(steps)]
                table.append([*cells, own_ratio_cell(init, baseline, fastest.ratio)])
        if table:
            blocks.append(Table(header, table))
    note = "Here each learning rate is chosen for speed alone: the best final score often wants a lower one."
    return [*blocks, Text(note)] if blocks else []


def _similarity_columns(comparison: Comparison) -> list[str]:
    """Similarities that were measured at three steps or more: of two there is no crossing to speak of."""
    names = ("paired_similarity", "image_similarity")
    columns = [c for name in names for c in comparison.columns if c.partition("@")[0] == name]
    return [c for c in columns if any(len(run.curves.get(c, {})) > 2 for run in comparison.runs)]


def _robustness_blocks(comparison: Comparison, rows: Sequence[InitSummary]) -> list[Block]:
    rates = comparison.shared_learning_rates
    if len(rates) < 2:
        return [Text("The initialisations share fewer than two learning rates: nothing is said of an untuned one.")]
    grid = ", ".join(f"{rate:g}" for rate in rates)
    blocks: list[Block] = [Text(f"What an untuned learning rate gives: means over {grid}, and the worst of them.")]
    steps = [("early", comparison.early_step), ("late", comparison.last_step)]
    for attribute, step in steps:
        if step is None:
            continue
        table: list[list[Cell]] = []
        for row in rows:
            robustness: Robustness | None = getattr(row, attribute)
            if robustness is None:
                table.append([Cell(row.init), *[Cell("–")] * (3 + len(comparison.baselines))])
                continue
            table.append(
                [
                    *(Cell(row.init), mean_cell(robustness.mean)),
                    *(difference_cell(robustness.differences.get(baseline)) for baseline in comparison.baselines),
                    Cell(number(robustness.worst)),
                    Cell(f"{robustness.num_diverged} of {robustness.num_runs}"),
                ]
            )
        differences = [f"difference to {baseline}" for baseline in comparison.baselines]
        blocks.append(Table([f"at step {step}", "mean over lrs", *differences, "worst lr", "diverged"], table))
    return blocks


def _image_metric_blocks(comparison: Comparison) -> list[Block]:
    columns = [c for c in comparison.columns if any(c in run.curves for run in comparison.runs)]
    if not columns:
        return [Text("No image metrics were measured.")]
    last = {
        column: max(max(run.curves[column]) for run in comparison.runs if column in run.curves) for column in columns
    }
    header = ["initialisation", *(f"{column_label(c)} {'↑' if higher_is_better(c) else '↓'}" for c in columns)]
    table: list[list[Cell]] = []
    start = _start_row(comparison, columns)
    if start:
        table.append(start)
    for init in comparison.inits:
        runs = comparison.best_runs(init).values()
        cells = [Cell(init)]
        for column in columns:
            values = [v for run in runs if (v := run.curves.get(column, {}).get(last[column])) is not None]
            spread = f" ± {number(sd(values))}" if math.isfinite(sd(values)) else ""
            cells.append(Cell(number(float(np.mean(values))) + spread if values else "–"))
        table.append(cells)
    steps = sorted(set(last.values()))
    encoders = sorted({column.partition("@")[2] for column in columns} - {""})
    note = f"At step {' and '.join(map(str, steps))}, mean ± standard deviation over seeds, at the best learning rate."
    if encoders:
        note += f" Encoder: {', '.join(encoders)}."
    if any(_BUNDLED_ENCODER in encoder for encoder in encoders):
        note += (
            f" {_BUNDLED_ENCODER} is the small encoder bundled with this project: its scores are not comparable to "
            "those in the literature, nor to those of any other encoder."
        )
    return [Table(header, table), Text(note)]


def _metric_blocks(comparison: Comparison) -> list[Block]:
    """Every metric at the last step with its interval, and what it differs from the baselines by."""
    columns = [comparison.primary, *(c for c in comparison.columns if any(c in run.curves for run in comparison.runs))]
    arrows = [f"{column_label(c)} {'↑' if higher_is_better(c) else '↓'}" for c in columns]
    table = [row for row in [_start_row(comparison, columns)] if row]
    for init in comparison.inits:
        cells = [Cell(init)]
        for column in columns:
            runs, step = comparison.best_runs(init).values(), comparison.last_step
            values = [score for run in runs if (score := comparison.score(run, step, column)) is not None]
            cells.append(mean_cell(bootstrap(values)) if values else Cell("–"))
        table.append(cells)
    blocks: list[Block] = [Table(["initialisation", *arrows], table)]
    for baseline in comparison.baselines:
        rows: list[list[Cell]] = []
        for init in comparison.inits:
            if init != baseline and set(comparison.best_runs(init)) & set(comparison.best_runs(baseline)):
                cells = (difference_cell(_difference_or_none(comparison, init, baseline, c)) for c in columns)
                rows.append([Cell(init), *cells])
        if rows:
            blocks.append(Table([f"difference to {baseline}", *arrows], rows))
    note = (
        f"At step {comparison.last_step}, means over seeds at the learning rate that is best in "
        f"{column_label(comparison.primary)}. In brackets: 95 % intervals over seeds."
    )
    return [*blocks, Text(note)]


def _difference_or_none(comparison: Comparison, init: str, baseline: str, column: str) -> Estimate | None:
    """`None` where the metric was not measured on a shared seed."""
    try:
        return comparison.difference(init, baseline, column)
    except ValueError:
        return None


def _start_row(comparison: Comparison, columns: Sequence[str]) -> list[Cell]:
    """The base model, which is what a baseline is at step 0."""
    for baseline in comparison.baselines:
        curves = [run.curves for run in comparison.best_runs(baseline).values()]
        means: list[float | None] = []
        for column in columns:
            values = [curve[column][0] for curve in curves if 0 in curve.get(column, {})]
            means.append(float(np.mean(values)) if values else None)
        if any(mean is not None for mean in means):
            label = f"before training (step 0 of {baseline})"
            return [Cell(label), *(Cell("–" if mean is None else number(mean)) for mean in means)]
    return []


_FIGURE_TEXTS = {
    "curves.png": (
        "Over training steps and over seconds, each initialisation at its best learning rate. Lines are means over "
        "seeds; bands go from the lowest to the highest seed. Below: the difference to the first baseline, seed by "
        "seed, on a scale for what is left of it after a fifth of the budget.",
        "Line chart: {metric} of {inits} over training steps and over seconds",
        "There are no curves to draw.",
    ),
    "lr_sweep.png": (
        "Each point is a mean over seeds, bars go from the lowest to the highest seed. A flat curve is a method that "
        "needs no tuning.",
        "Line chart: {metric} of {inits} over the learning rate, early and at the end",
        "There is no learning-rate sweep to draw.",
    ),
    "grid.png": (
        "The same prompts and seed down the initialisations and along the steps, the base model first. Each at its "
        "best learning rate; grey cells have no sample.",
        "Grid of generated images: {inits} down, prompts and steps along",
        "No run has samples.",
    ),
    "ranks.png": (
        "Rank of every layer, of the first seed at the best learning rate; Σ is the sum. Light grey is the nominal "
        "rank, red above it, blue below; one blue where all ranks are equal. Beside it, where the method scores its "
        "components, the share that the kept ones capture.",
        "Heat map: rank of every layer for {inits}",
        "No run has an init_report.json to take ranks from.",
    ),
}


def _figure_blocks(name: str, figures: dict[str, Path], comparison: Comparison) -> list[Block]:
    caption, alt, missing = _FIGURE_TEXTS[name]
    if name not in figures:
        return [Text(missing)]
    metric, inits = column_label(comparison.primary), listed(comparison.inits)
    return [Picture(figures[name], alt.format(metric=metric, inits=inits)), Text(caption)]


def _provenance_blocks(comparison: Comparison) -> list[Block]:
    config = comparison.config
    num_train, num_validation, examples = data_counts(comparison)
    versions = ", ".join(f"{name} {version}" for name, version in config.get("versions", {}).items())
    facts = [
        ("base model", config["base_model"]),
        ("family", config.get("family", "sd")),
        ("data", f"{config['dataset']} ({num_train} {examples}, {num_validation} held out)"),
        ("steps", str(config["max_train_steps"])),
        ("seeds", ", ".join(map(str, config["seeds"]))),
        *([("encoder", config.get("encoder") or "none")] if comparison.generates_images else []),
        ("hardware", config["hardware"]),
        ("versions", versions),
        ("date", config["date"]),
    ]
    return [
        Code(config["command"]),
        Table(["what", "value"], [[Cell(name), Cell(value)] for name, value in facts]),
        Text("Every argument is in config.json, every score in results.csv, every second in timings.csv."),
    ]


def _write_figures(comparison: Comparison) -> dict[str, Path]:
    """Draw what has inputs; file name -> path."""
    written: dict[str, Path] = {}
    drawn = {
        "curves.png": curves_figure(comparison),
        "lr_sweep.png": lr_sweep_figure(comparison),
        "ranks.png": ranks_figure(comparison),
    }
    for name in _FIGURES:
        path = comparison.directory / name
        announce(path)
        path.unlink(missing_ok=True)
        figure = samples_image(comparison) if name == "grid.png" else drawn[name]
        if figure is None:
            continue
        if isinstance(figure, Image.Image):
            with replacing(path) as scratch:
                figure.save(scratch, format="PNG")
        else:
            save_figure(figure, path, dpi=_DPI)
        written[name] = path
    return written
