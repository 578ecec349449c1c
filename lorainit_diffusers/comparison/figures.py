"""The pictures of a comparison: curves, learning-rate sweep, rank maps and the grid of samples."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator
from PIL import Image

from lorainit_diffusers.comparison.analysis import Comparison
from lorainit_diffusers.comparison.results import RunCurves, higher_is_better
from lorainit_diffusers.evaluation.metrics import METRICS
from lorainit_diffusers.evaluation.plots import rank_colors, sample_grid

_BASELINE_COLORS = ("#000000", "#8a8a8a", "#b5b5b5")
_COLORS = (
    *("#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf"),
    *("#8c564b", "#e377c2", "#bcbd22", "#003f88", "#7a0045", "#00734d"),
)
# With more initialisations than this, bands in one panel cover one another.
_MAX_BANDS = 5
_MAX_GRID_COLUMNS = 8
_MAX_LAYER_LABELS = 80
_PLACEHOLDER = (222, 222, 222)


def init_colors(comparison: Comparison) -> dict[str, str]:
    """A colour for each initialisation, the same in every figure: black and greys for the baselines."""
    baselines = [init for init in comparison.config["baselines"] if init in comparison.inits]
    others = [init for init in comparison.inits if init not in baselines]
    return {
        **{init: _BASELINE_COLORS[min(i, len(_BASELINE_COLORS) - 1)] for i, init in enumerate(baselines)},
        **{init: _COLORS[i % len(_COLORS)] for i, init in enumerate(others)},
    }


def column_label(column: str) -> str:
    """A column of the results in words, with its encoder."""
    metric, _, encoder = column.partition("@")
    label = METRICS[metric].label
    return f"{label} ({encoder})" if encoder else label


def curves_figure(comparison: Comparison) -> Figure:
    """Primary metric over steps and over seconds, and each initialisation's difference to the first baseline.

    Each at its best learning rate. The differences are paired by seed: they show what the curves are too steep for.
    """
    colors, inits = init_colors(comparison), _drawing_order(comparison)
    compared = (
        [init for init in comparison.inits if init not in comparison.baselines[:1]] if comparison.baselines else []
    )
    num_columns = min(4, max(1, len(compared)))
    num_rows = math.ceil(len(compared) / num_columns)
    heights = [4.9, 2.2 * num_rows + 0.5]
    figure = _figure(11, sum(heights) if compared else heights[0])
    parts: Any = figure.subfigures(2, 1, height_ratios=heights) if compared else [figure]
    timed = all(run.seconds for init in inits for run in comparison.best_runs(init).values())
    axes: Any = np.atleast_1d(parts[0].subplots(1, 2 if timed else 1, sharey=True))
    limits, note = _curve_limits(comparison)
    for axis, by_seconds in zip(axes, (False, True), strict=False):
        for init in inits:
            band = len(inits) <= _MAX_BANDS
            _draw_curve(axis, comparison, init, colors[init], by_seconds=by_seconds, band=band)
        axis.set_xlabel("seconds, initialisation included" if by_seconds else "training step")
        axis.set_ylim(*limits)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel(_axis_label(comparison) + note)
    _legend(parts[0], comparison, colors)
    if compared:
        panels: Any = parts[1].subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False).ravel()
        for axis in panels[len(compared) :]:
            axis.remove()
        for index, (axis, init) in enumerate(zip(panels, compared, strict=False)):
            _draw_difference(axis, comparison, init, colors[init])
            axis.tick_params(labelsize=8, labelbottom=index + num_columns >= len(compared))
        panels[0].set_ylim(*_difference_limits(comparison, compared))
        better = "above" if higher_is_better(comparison.primary) else "below"
        title = (
            f"difference to {comparison.baselines[0]} over training steps, seed by seed ({better} the line is better)"
        )
        parts[1].suptitle(title, fontsize=11)
    return figure


def lr_sweep_figure(comparison: Comparison) -> Figure:
    """Primary metric over the learning rate, early and at the end: how much an untuned learning rate costs."""
    colors = init_colors(comparison)
    steps = [step for step in (comparison.early_step, comparison.last_step) if step is not None]
    figure = _figure(11, 5.2)
    axes: Any = np.atleast_1d(figure.subplots(1, len(steps)))
    for axis, step in zip(axes, steps, strict=True):
        finite: list[tuple[float, float, str]] = []
        diverged: list[tuple[float, str]] = []
        for init in _drawing_order(comparison):
            points: dict[float, tuple[float, float, float]] = {}
            for rate, runs in comparison.grid(init).items():
                scores = [score for run in runs.values() if (score := comparison.score(run, step)) is not None]
                if scores and all(map(math.isfinite, scores)):
                    points[rate] = (float(np.mean(scores)), min(scores), max(scores))
                elif scores:
                    diverged.append((rate, colors[init]))
            means = [mean for mean, _, _ in points.values()]
            finite += [(rate, mean, colors[init]) for rate, mean in zip(points, means, strict=True)]
            # the mean of equal scores may differ from them by rounding
            spread = [
                [max(0.0, mean - low) for mean, low, _ in points.values()],
                [max(0.0, high - mean) for mean, _, high in points.values()],
            ]
            axis.errorbar(
                *(list(points), means),
                yerr=spread,
                **_line_style(comparison, init, colors[init]),
                **{"marker": "o", "markersize": 4, "elinewidth": 0.7, "alpha": 0.9},
            )
        axis.set_xscale("log")
        _label_rates(axis, sorted({rate for init in comparison.inits for rate in comparison.grid(init)}))
        axis.set_title(f"step {step}" + (" (end)" if step == comparison.last_step else " (early)"), fontsize=11)
        axis.set_xlabel("learning rate")
        axis.grid(alpha=0.25)
        # at the worse edge of the panel
        edge, off = (0.03, "v") if higher_is_better(comparison.primary) else (0.97, "^")
        low, high, outside = _sweep_limits(finite, higher_is_better(comparison.primary))
        axis.set_ylim(low, high)
        at_edge = {"transform": axis.get_xaxis_transform(), "linestyle": "none", "markersize": 7}
        marks = [("x", *point) for point in diverged] + [(off, *point) for point in outside]
        for index, (marker, rate, color) in enumerate(marks):
            # beside one another where several have the same rate; rates are apart by a factor
            num_before = sum(other == rate for _, other, _ in marks[:index])
            axis.plot([rate * 0.955**num_before], [edge], marker, color=color, **at_edge)
        notes = [
            text
            for text, some in (("x diverged", diverged), (f"{'▼' if off == 'v' else '▲'} off the scale", outside))
            if some
        ]
        axis.set_title(", ".join(notes), loc="right", fontsize=8)
    axes[0].set_ylabel(_axis_label(comparison))
    _legend(figure, comparison, colors)
    return figure


def ranks_figure(comparison: Comparison) -> Figure | None:
    """Rank of every layer, and what share of the layer's total its components capture where the method scores them.

    Of the first seed at the best learning rate; `None` when no run left an `init_report.json`.
    """
    reports = {init: report for init in comparison.inits if (report := _init_report(comparison, init)) is not None}
    if not reports:
        return None
    layers = list(dict.fromkeys(layer for report in reports.values() for layer in report))
    ranks = _layer_table(reports, layers, "rank")
    scored = {
        init: report for init, report in reports.items() if any(row["captured"] is not None for row in report.values())
    }
    panels = [("rank", reports, ranks)]
    if scored:
        panels.append(("captured share", scored, _layer_table(scored, layers, "captured")))
    widths = [len(shown) for _, shown, _ in panels]
    figure = _figure(3.2 + 0.3 * sum(widths) + 0.9 * len(panels), min(16.0, 2.2 + 0.155 * len(layers)))
    axes: Any = np.atleast_1d(figure.subplots(1, len(panels), sharey=True, width_ratios=widths))
    rank = next(iter(comparison.best_runs(next(iter(reports))).values())).rank
    for axis, (title, shown, table) in zip(axes, panels, strict=True):
        if title == "rank":
            colors, norm = rank_colors(table, rank)
            image = axis.imshow(table, cmap=colors, norm=norm, aspect="auto", interpolation="none")
            if np.nanmin(table) == np.nanmax(table):
                title = f"rank: {np.nanmin(table):.0f} in every layer"
        else:
            image = axis.imshow(table, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="none")
        axis.set_facecolor("#ffffff")  # a layer without a value
        axis.set_title(title, fontsize=10)
        labels = [_wrap(init, 24) for init in shown]
        if title.startswith("rank"):
            labels = [f"{label}  Σ {int(np.nansum(table[:, column]))}" for column, label in enumerate(labels)]
        axis.set_xticks(range(len(shown)), labels, rotation=90, fontsize=8.5)
        axis.set_xticks(np.arange(0.5, len(shown) - 1), minor=True)
        axis.grid(which="minor", axis="x", color="#d0d0d0", linewidth=0.6)
        axis.tick_params(which="minor", bottom=False)
        figure.colorbar(image, ax=axis, shrink=0.5, pad=0.02)
    stride = math.ceil(len(layers) / _MAX_LAYER_LABELS)
    axes[0].set_yticks(range(0, len(layers), stride), _short_layers(layers)[::stride], fontsize=7.5)
    return figure


def samples_image(comparison: Comparison) -> Image.Image | None:
    """The same prompts and seed down the initialisations and along the steps, the base model first.

    Of each initialisation's best learning rate and the first seed that has samples; a grey cell is a sample that is
    missing, as of a run that diverged. `None` when no run left samples.
    """
    strips: dict[str, dict[int, list[Image.Image]]] = {}
    for init in comparison.inits:
        rows = [_strips(comparison, run) for run in comparison.best_runs(init).values()]
        strips[init] = next((row for row in rows if row), {})
    steps = sorted({step for row in strips.values() for step in row})
    if not steps:
        return None
    prompts = _prompts(comparison)
    num_prompts = min(len(images) for row in strips.values() for images in row.values())
    shown = steps if len(steps) <= _MAX_GRID_COLUMNS else [steps[0], *steps[-(_MAX_GRID_COLUMNS - 1) :]]
    num_prompts = max(1, min(num_prompts, _MAX_GRID_COLUMNS // len(shown)))
    texts = [prompts[i] if i < len(prompts) else f"prompt {i + 1}" for i in range(num_prompts)]
    side = next(images[0].width for row in strips.values() for images in row.values())
    blank = Image.new("RGB", (side, side), _PLACEHOLDER)
    grid: dict[str, list[Image.Image]] = {}
    base = next((_split(path) for path in _candidates(comparison, "base.png") if path.is_file()), None)
    if base is not None:
        grid["base"] = [base[prompt] for prompt in range(num_prompts) for _ in shown]
    for init, row in strips.items():
        if row:
            empty = [blank] * num_prompts
            grid[_wrap(init, 24)] = [row.get(step, empty)[prompt] for prompt in range(num_prompts) for step in shown]
    return sample_grid(grid, [f"step {step}: {text}" for text in texts for step in shown])


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _drawing_order(comparison: Comparison) -> list[str]:
    """Baselines last, so that they lie on top of the others."""
    return sorted(comparison.inits, key=lambda init: init in comparison.baselines)


def _line_style(comparison: Comparison, init: str, color: str) -> dict[str, Any]:
    """Colours repeat after twelve initialisations; then the dashes tell them apart."""
    others = [other for other in comparison.inits if other not in comparison.baselines]
    if init in comparison.baselines:
        return {"color": color, "linewidth": 2.4, "linestyle": "-", "zorder": 3}
    style = ("-", "--", ":", "-.")[others.index(init) // len(_COLORS) % 4]
    return {"color": color, "linewidth": 1.4, "linestyle": style, "zorder": 2}


def _axis_label(comparison: Comparison) -> str:
    direction = "higher" if higher_is_better(comparison.primary) else "lower"
    return f"{column_label(comparison.primary)} ({direction} is better)"


def _legend(figure: Any, comparison: Comparison, colors: Mapping[str, str]) -> None:
    rates = comparison.best_learning_rates()
    lines = [Line2D([], [], **_line_style(comparison, init, colors[init])) for init in comparison.inits]
    labels = [f"{_wrap(init, 40)}, best lr {rates[init]:g}" for init in comparison.inits]
    figure.legend(lines, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)


def _sweep_limits(
    points: Sequence[tuple[float, float, str]], higher: bool
) -> tuple[float, float, list[tuple[float, str]]]:
    """Limits that a few bad learning rates do not stretch, and the points (rate, colour) that they leave out."""
    values = [value for _, value, _ in points]
    if not values:
        return 0.0, 1.0, []
    low, high = min(values), max(values)
    quarter, three_quarters = np.quantile(values, [0.25, 0.75])
    if higher:
        low = max(low, high - 3.0 * float(high - quarter)) if high > quarter else low
    else:
        high = min(high, low + 3.0 * float(three_quarters - low)) if three_quarters > low else high
    outside = [(rate, color) for rate, value, color in points if not low <= value <= high]
    pad = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return low - pad, high + pad, outside


def _start(comparison: Comparison) -> float:
    """Mean score at the first evaluated step."""
    first = [run.curves[comparison.primary] for run in comparison.runs]
    values = [value for curve in first if math.isfinite(value := curve[min(curve)])]
    return float(np.mean(values)) if values else math.nan


def _mean_curve(comparison: Comparison, init: str) -> dict[int, list[float]]:
    """Step -> scores of all seeds, up to where one of them diverged."""
    runs = list(comparison.best_runs(init).values())
    steps = sorted(set[int].intersection(*(set(run.curves[comparison.primary]) for run in runs)))
    curve = {step: [run.curves[comparison.primary][step] for run in runs] for step in steps}
    return {step: scores for step, scores in curve.items() if all(map(math.isfinite, scores))}


def _curve_limits(comparison: Comparison) -> tuple[tuple[float, float], str]:
    """Limits that show the differences between the curves, and a note where that leaves the start outside.

    The first tenth of the budget falls so steeply that on its scale all curves are one.
    """
    curves = [_mean_curve(comparison, init) for init in comparison.inits]
    later = _from_step(curves, 0.1 * comparison.last_step)
    low, high = _padded(later)
    start = _start(comparison)
    if not math.isfinite(start) or low <= start <= high:
        return (low, high), ""
    return (low, high), f"\nstart at {start:.4g}, off the scale"


def _from_step(curves: Sequence[Mapping[int, Sequence[float]]], first: float) -> list[float]:
    return [value for curve in curves for step, values in curve.items() if step >= first for value in values]


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - pad, high + pad


def _differences(comparison: Comparison, init: str) -> dict[int, list[float]]:
    """Step -> differences to the first baseline on the shared seeds, up to where a run diverged."""
    ours, theirs = comparison.best_runs(init), comparison.best_runs(comparison.baselines[0])
    pairs = [(ours[s].curves[comparison.primary], theirs[s].curves[comparison.primary]) for s in ours if s in theirs]
    if not pairs:
        return {}
    steps = sorted(set[int].intersection(*(set(a) & set(b) for a, b in pairs)))
    curve = {step: [a[step] - b[step] for a, b in pairs] for step in steps}
    return {step: values for step, values in curve.items() if all(map(math.isfinite, values))}


def _difference_limits(comparison: Comparison, inits: Sequence[str]) -> tuple[float, float]:
    """Limits for what is left after the first fifth, and the line at 0."""
    curves = [_differences(comparison, init) for init in inits]
    return _padded([0.0, *_from_step(curves, 0.2 * comparison.last_step)])


def _draw_difference(axis: Any, comparison: Comparison, init: str, color: str) -> None:
    curve = _differences(comparison, init)
    axis.axhline(0.0, color=_BASELINE_COLORS[0], linewidth=1.6)
    axis.plot(list(curve), [float(np.mean(values)) for values in curve.values()], color=color, linewidth=1.6)
    low, high = [min(values) for values in curve.values()], [max(values) for values in curve.values()]
    axis.fill_between(list(curve), low, high, color=color, alpha=0.2, linewidth=0)
    axis.set_title(_wrap(init, 30), fontsize=9, color=color, fontweight="bold")
    axis.grid(alpha=0.25)
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))


def _draw_curve(axis: Any, comparison: Comparison, init: str, color: str, *, by_seconds: bool, band: bool) -> None:
    curve = _mean_curve(comparison, init)
    if not curve:
        return
    runs = comparison.best_runs(init).values()
    where: list[float] = list(curve)
    if by_seconds:
        where = [float(np.mean([run.seconds.get(step, math.nan) for run in runs])) for step in curve]
    style = _line_style(comparison, init, color)
    axis.plot(where, [float(np.mean(scores)) for scores in curve.values()], **style)
    if band:
        low, high = [min(scores) for scores in curve.values()], [max(scores) for scores in curve.values()]
        axis.fill_between(where, low, high, color=color, alpha=0.18, linewidth=0)


def _label_rates(axis: Any, rates: Sequence[float]) -> None:
    axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())


def _wrap(label: str, width: int) -> str:
    """A long label on several lines, broken after the separators of `name:key=value,key=value` too."""
    if len(label) <= width:
        return label
    return "\n".join(textwrap.wrap(re.sub(r"([:,])", r"\1 ", label), width)).replace(": ", ":").replace(", ", ",")


def _init_report(comparison: Comparison, init: str) -> dict[str, dict[str, Any]] | None:
    """Layer -> its report, of the first seed at the best learning rate that has one."""
    for run in comparison.best_runs(init).values():
        path = comparison.directory / "runs" / run.name / "init_report.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))["layers"]
    return None


def _layer_table(reports: Mapping[str, Mapping[str, Any]], layers: Sequence[str], key: str) -> Any:
    """(layers, inits) with `nan` for what a report does not have."""
    return np.array(
        [
            [
                math.nan if (value := report.get(layer, {}).get(key)) is None else float(value)
                for report in reports.values()
            ]
            for layer in layers
        ]
    )


def _short_layers(names: Sequence[str]) -> list[str]:
    """Names without what is the same in all of them, and with the long words of UNets and transformers cut."""
    parts = [name.split(".") for name in names]
    same = len(list(itertools.takewhile(lambda words: len(set(words)) == 1, zip(*parts, strict=False))))
    short = [".".join(words[same:] if len(names) > 1 else words) for words in parts]
    brief_words = (
        *(("transformer_blocks.", "t"), ("_blocks.", ""), ("mid_block", "mid"), ("attentions.", "a")),
        *(("self_attn.", ""), ("attention.attention.", ""), ("attention.output.dense", "output")),
    )
    for long, brief in brief_words:
        short = [name.replace(long, brief) for name in short]
    return short


def _candidates(comparison: Comparison, name: str) -> list[Path]:
    """Where a file of the base model's samples may lie."""
    runs = sorted({run.name for init in comparison.inits for run in comparison.best_runs(init).values()})
    folders = [comparison.directory, *(comparison.directory / "runs" / run for run in runs)]
    return [path for folder in folders for path in (folder / name, folder / "samples" / name)]


def _prompts(comparison: Comparison) -> list[str]:
    for path in _candidates(comparison, "prompts.json"):
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            return content["prompts"] if isinstance(content, dict) else content
    return []


def _strips(comparison: Comparison, run: RunCurves) -> dict[int, list[Image.Image]]:
    """Step -> images of a run's strips."""
    folder = comparison.directory / "runs" / run.name / "samples"
    return {int(path.stem.partition("-")[2]): _split(path) for path in sorted(folder.glob("step-*.png"))}


def _split(path: str | os.PathLike[str]) -> list[Image.Image]:
    """The square images of a horizontal strip."""
    with Image.open(path) as strip:
        side = strip.height
        return [strip.crop((x, 0, x + side, side)).convert("RGB") for x in range(0, strip.width - side + 1, side)]
