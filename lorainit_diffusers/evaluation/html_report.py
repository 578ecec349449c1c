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

from lorainit_diffusers.evaluation.comparison import (
    NUM_RESAMPLES,
    TOLERANCE,
    Comparison,
    Estimate,
    InitSummary,
    Robustness,
    Speed,
    bootstrap,
    chance_of_verdict,
    higher_is_better,
    sd,
)
from lorainit_diffusers.evaluation.comparison_plots import (
    column_label,
    curves_figure,
    lr_sweep_figure,
    ranks_figure,
    samples_image,
)
from lorainit_diffusers.evaluation.document import Block as Block
from lorainit_diffusers.evaluation.document import Bullets, Code, Heading, Picture, Text
from lorainit_diffusers.evaluation.document import Cell as Cell
from lorainit_diffusers.evaluation.document import Table as Table
from lorainit_diffusers.evaluation.document import to_html as to_html
from lorainit_diffusers.evaluation.document import to_markdown as to_markdown
from lorainit_diffusers.evaluation.metrics import METRICS
from lorainit_diffusers.evaluation.plots import save_figure
from lorainit_diffusers.files import announce, replacing, write_text

_BUNDLED_ENCODER = "tiny-clip"
_MAX_NAMES = 8
_DPI = 110
_WAY = f"{100 * (1 - TOLERANCE):.0f} %"
_FIGURES = ("curves.png", "lr_sweep.png", "ranks.png", "grid.png")


def write_report(directory: str | os.PathLike[str]) -> list[Path]:
    """Write `summary.md`, `curves.png`, `lr_sweep.png`, `ranks.png`, `grid.png` and `report.html` from the results.

    The grid of runs may be incomplete; the report then says what is missing. A figure without inputs is left out, and
    an older one removed. The same results give the same files.

    Args:
        directory: what `compare_inits.py` wrote; see `Comparison.load`.

    Returns:
        The files that were written.

    Raises:
        FileNotFoundError: without results.
        ValueError: when the results hold no finished run or cannot be read.
    """
    comparison = Comparison.load(directory)
    if not comparison.inits:
        raise ValueError(f"{comparison.directory / 'results.csv'} has no finished run to report on")
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
        comparison: the results.
        figures: file name -> path of those that exist.
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
                f"the end, too. Fair is the ratio to the baseline's own steps, both to {_WAY} of the improvement that "
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
    blocks += [Heading("How to read this"), Bullets(_how_to_read(comparison, rows))]
    blocks += [Heading("How it was made"), *_provenance_blocks(comparison)]
    return blocks


def headline(comparison: Comparison, rows: Sequence[InitSummary]) -> list[str]:
    """The result in sentences, from the numbers alone: final scores, reservations, speed, untuned learning rates."""
    if not comparison.baselines:
        return ["No baseline has finished a run, so nothing can be compared yet.", *_reservations(comparison, rows)]
    sentences = [" ".join(_final_sentence(baseline, rows) for baseline in comparison.baselines)]
    sentences += _reservations(comparison, rows)
    sentences.append(" ".join(filter(None, (_speed_sentence(baseline, rows) for baseline in comparison.baselines))))
    sentences.append(_untuned_sentence(comparison, rows))
    return list(filter(None, sentences))


def _final_sentence(baseline: str, rows: Sequence[InitSummary]) -> str:
    differences = {row.init: row.differences[baseline] for row in rows if baseline in row.differences}
    verdicts = {init: difference.verdict for init, difference in differences.items()}
    better = [init for init, verdict in verdicts.items() if verdict == "better"]
    worse = [init for init, verdict in verdicts.items() if verdict == "worse"]
    if not verdicts:
        return f"There is nothing to compare {baseline} with."
    if set(verdicts.values()) == {"one seed"}:
        return f"One seed gives no interval, so nothing is said of final scores against {baseline}."
    num_tied = len(verdicts) - len(better) - len(worse)
    parts = [_count(len(worse), "ends worse", "end worse"), _count(num_tied, "is tied", "are tied")]
    seeds = sorted({difference.num_seeds for difference in differences.values()})
    over = f" ({' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} seeds)"
    rest = over + "".join(f"{mark} {part}" for mark, part in zip(";,", filter(None, parts), strict=False))
    if better:
        verb = "ends" if len(better) == 1 else "end"
        return f"{_listed(better)} {verb} better than {baseline}, each at its best learning rate{rest}."
    return f"No initialisation is better than {baseline} at its best learning rate{rest}."


def _speed_sentence(baseline: str, rows: Sequence[InitSummary]) -> str:
    ratios = {
        row.init: ratio
        for row in rows
        if row.init != baseline and baseline in row.speeds and (ratio := row.speeds[baseline].ratio) is not None
        if ratio.num_seeds > 1
    }
    if not ratios:
        return ""
    faster = {init: ratio for init, ratio in ratios.items() if ratio.verdict == "better"}
    way = f"{_WAY} of the improvement that {baseline} ends with"
    if not faster:
        return f"None is faster to {way}."
    best = min(faster, key=lambda init: faster[init].value)
    ratio = _ratio_cell(faster[best], compared=False)
    others = f", the least of {len(faster)} that need fewer" if len(faster) > 1 else ""
    return f"To {way}, {best} needs {ratio.text} {ratio.detail} of {baseline}'s own steps{others}."


def _untuned_sentence(comparison: Comparison, rows: Sequence[InitSummary]) -> str:
    """Of the mean over learning rates, early and late."""
    parts: list[str] = []
    for step in filter(None, (comparison.early_step, comparison.last_step)):
        for baseline in comparison.baselines:
            found = [row.late if step == comparison.last_step else row.early for row in rows]
            verdicts = [r.differences[baseline].verdict for r in found if r and baseline in r.differences]
            if set(verdicts) - {"one seed"}:
                num_better = verdicts.count("better")
                parts.append(f"{num_better} of {len(verdicts)} are better than {baseline} at step {step}")
    if len(comparison.shared_learning_rates) < 2 or not parts:
        return ""
    rates = len(comparison.shared_learning_rates)
    return f"In the mean over the {rates} learning rates, which is what an untuned one gives, {_listed(parts)}."


def _reservations(comparison: Comparison, rows: Sequence[InitSummary]) -> list[str]:
    sentences: list[str] = []
    num_seeds = min(row.num_seeds for row in rows)
    chance = chance_of_verdict(num_seeds)
    if chance is not None:
        sentences.append(
            f"The intervals are over {num_seeds} seeds: between two equal initialisations, chance alone gives a "
            f"verdict other than tied in about {100 * chance:.0f} % of comparisons, and there are {len(rows) - 1} with "
            "each baseline."
        )
    elif num_seeds == 1:
        sentences.append("There is one seed, at least for some: differences of that size may be chance.")
    num_finished = sum(comparison.finished(run) for run in comparison.runs)
    if comparison.missing:
        unfinished = sorted({init for init, _, _ in comparison.missing})
        sentences.append(
            f"The grid is incomplete: {len(comparison.missing)} of {num_finished + len(comparison.missing)} runs are "
            f"missing (of {_listed(unfinished)}). What is said here is of the others."
        )
    if comparison.last_step < comparison.config["max_train_steps"]:
        sentences.append(f"Runs end at step {comparison.last_step} of {comparison.config['max_train_steps']}.")
    edge = [row.init for row in rows if row.learning_rate in _ends(comparison, row.init)]
    if edge:
        which = "each initialisation" if len(edge) == len(rows) else _listed(edge)
        sentences.append(
            f"The best learning rate of {which} lies at the edge of those tried: a better one may lie outside."
        )
    diverged = [run.name for run in comparison.runs if any(map(math.isinf, run.curves[comparison.primary].values()))]
    if diverged:
        sentences.append(f"{len(diverged)} of {num_finished} runs diverged, and count as worst: {_some(diverged)}.")
    return sentences


def _ends(comparison: Comparison, init: str) -> list[float]:
    """The lowest and the highest learning rate that an initialisation was run with."""
    rates = list(comparison.grid(init))
    return [rates[0], rates[-1]]


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
        cells += [_difference_cell(row.differences.get(baseline)) for baseline in baselines]
        for baseline in baselines[:1]:
            speed = row.speeds.get(baseline)
            cells.append(_steps_cell(speed))
            cells.append(_own_ratio_cell(row.init, baseline, speed.ratio if speed else None))
            cells.append(_seconds_cell(speed))
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
            cells = [Cell(init), Cell(f"{speed.num_reached} of {speed.num_seeds}"), _steps_cell(speed)]
            cells.append(_ratio_cell(speed.share_of_budget, compared=False))
            cells.append(_own_ratio_cell(init, baseline, speed.ratio))
            cells.append(_seconds_cell(speed))
            cells.append(_ratio_cell(speed.seconds_share, compared=False))
            cells.append(_own_ratio_cell(init, baseline, speed.seconds_ratio))
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
        header = [f"fastest to {_WAY} of {baseline}'s way", "lr", "steps", f"× {baseline}'s fastest"]
        table: list[list[Cell]] = []
        for init in comparison.inits:
            fastest = comparison.fastest(init, baseline)
            if fastest is not None:
                steps = f"{fastest.steps:.0f}" if math.isfinite(fastest.steps) else "never on some seed"
                cells = [Cell(init), Cell(f"{fastest.learning_rate:g}"), Cell(steps)]
                table.append([*cells, _own_ratio_cell(init, baseline, fastest.ratio)])
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
                    *(Cell(row.init), _mean_cell(robustness.mean)),
                    *(_difference_cell(robustness.differences.get(baseline)) for baseline in comparison.baselines),
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
            cells.append(_mean_cell(bootstrap(values)) if values else Cell("–"))
        table.append(cells)
    blocks: list[Block] = [Table(["initialisation", *arrows], table)]
    for baseline in comparison.baselines:
        rows: list[list[Cell]] = []
        for init in comparison.inits:
            if init != baseline and set(comparison.best_runs(init)) & set(comparison.best_runs(baseline)):
                cells = (_difference_cell(_difference_or_none(comparison, init, baseline, c)) for c in columns)
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
    metric, inits = column_label(comparison.primary), _listed(comparison.inits)
    return [Picture(figures[name], alt.format(metric=metric, inits=inits)), Text(caption)]


def _how_to_read(comparison: Comparison, rows: Sequence[InitSummary]) -> list[str]:
    counts = sorted({row.num_parameters for row in rows})
    equal = f"{counts[0]:,} each" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    num_train, num_validation, examples = _data(comparison)
    heads = sorted({run.num_head_parameters for run in comparison.runs} - {0})
    head = f", and those of the head, which trains in full: {heads[0]:,}" if heads else ""
    crossings = "linear between evaluated steps, seed by seed"
    counted: list[str] = []
    if METRICS[comparison.primary.partition("@")[0]].counted:
        crossings = "linear between the medians of three evaluations in a row, seed by seed"
        counted.append(
            f"The {column_label(comparison.primary)} counts {num_validation} held-out {examples}, the same in every "
            f"run: one of them is {number(1 / num_validation)}. The intervals are over seeds, and say nothing of other "
            f"{examples}."
        )
    return [
        f"Every run trains on the same {num_train} {examples} and is scored on {num_validation} "
        f"held-out ones. Trained parameters: {equal}{head}.",
        *counted,
        "The best learning rate is the best mean over seeds of the primary metric at the last step. It is chosen on "
        "the scores that are shown, for every initialisation alike, so all of them are slightly too good.",
        f"Intervals are paired percentile bootstraps over seeds ({NUM_RESAMPLES:,} resamples of the differences seed "
        "by seed). Better or worse says that the interval excludes no difference, tied that it does not. Of few "
        "seeds the intervals are too narrow, and a list of many comparisons will hold some verdicts by chance.",
        f"Steps to a final score are those to the first crossing, {crossings}. A run "
        "that never gets there makes the mean infinite (never), and the interval of a ratio ends at never.",
        "A run that diverged has an infinitely bad score; in a mean over learning rates it counts as the worst score "
        "that any run had at any step.",
        "Seconds are of one machine and of runs that may have shared it; compare them only with one another.",
    ]


def _data(comparison: Comparison) -> tuple[int, int, str]:
    """Numbers of training and held-out examples, and what they are."""
    config = comparison.config
    if comparison.generates_images:
        return config["num_images"], config["num_heldout_images"], "images"
    return config["num_train"], config["num_validation"], config["examples"]


def _provenance_blocks(comparison: Comparison) -> list[Block]:
    config = comparison.config
    num_train, num_validation, examples = _data(comparison)
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


def _mean_cell(estimate: Estimate) -> Cell:
    interval = f"[{number(estimate.low)}, {number(estimate.high)}]" if estimate.num_seeds > 1 else ""
    return Cell(number(estimate.value), detail=interval)


def _difference_cell(estimate: Estimate | None) -> Cell:
    """A difference with its verdict in words and its interval."""
    if estimate is None:
        return Cell("–")
    interval = f"[{_signed(estimate.low)}, {_signed(estimate.high)}]"
    if math.isinf(estimate.value) or estimate.num_seeds < 2:
        interval = ""
    return Cell(f"{_signed(estimate.value)} {estimate.verdict}", estimate.verdict, interval)


def _ratio_cell(estimate: Estimate | None, *, compared: bool = True) -> Cell:
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


def _own_ratio_cell(init: str, baseline: str, estimate: Estimate | None) -> Cell:
    return Cell("1") if init == baseline else _ratio_cell(estimate)


def _ratio(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "never"


_FASTER = {"better": "faster", "worse": "slower", "tied": "tied", "one seed": "one seed"}


def _steps_cell(speed: Speed | None) -> Cell:
    if speed is None:
        return Cell("–")
    if math.isfinite(speed.steps):
        return Cell(f"{speed.steps:.0f}")
    some = f" on {speed.num_seeds - speed.num_reached} of {speed.num_seeds} seeds" if speed.num_reached else ""
    return Cell(f"never{some}")


def _seconds_cell(speed: Speed | None) -> Cell:
    if speed is None or speed.seconds is None:
        return Cell("–")
    return Cell(f"{speed.seconds:.1f}" if math.isfinite(speed.seconds) else "never")


def _count(number: int, one: str, many: str) -> str:
    return "" if number == 0 else f"{number} {one if number == 1 else many}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_MAX_NAMES]) + (f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else "")


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else ""


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
