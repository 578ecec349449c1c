"""The pictures of one run: the loss curve, the ranks of the layers and the labelled grid of samples."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from lorainit_diffusers.files import replacing

# What the legend calls the validation loss of text-to-image runs.
VALIDATION_LABEL = "validation loss (fixed noise, held-out images)"
_BACKGROUND = (255, 255, 255)
_INK = (40, 40, 40)


def save_figure(figure: Figure, path: str | os.PathLike[str], *, dpi: int) -> None:
    """Write a figure in the format that the path's ending names, or as PNG."""
    kind = Path(path).suffix.removeprefix(".") or "png"
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=dpi, format=kind)


def smooth(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """Exponential moving average with the bias correction of Adam, so that the first values are not drawn to zero.

    Args:
        values: A curve, one value a step.
        weight: Share of the past in every step, in [0, 1).

    Returns:
        A curve of the same length.
    """
    smoothed: list[float] = []
    average, correction = 0.0, 1.0
    for value in values:
        average = weight * average + (1.0 - weight) * value
        correction *= weight
        smoothed.append(average / (1.0 - correction))
    return smoothed


def plot_loss(
    metrics: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    title: str = "",
    validation_label: str = VALIDATION_LABEL,
    best_step: int | None = None,
) -> Path:
    """Draw the training loss, raw and smoothed, and the validation loss where there is one.

    Args:
        metrics: The lines of `metrics.jsonl`: each has `step` and `loss` or `validation_loss`.
        path: PNG to write.
        title: Shown above the curves.
        validation_label: What the legend says of the validation loss.
        best_step: The step of the validation that is marked as the best one.

    Returns:
        The path.
    """
    train = [(int(line["step"]), float(line["loss"])) for line in metrics if "loss" in line]
    validation = [(int(line["step"]), float(line["validation_loss"])) for line in metrics if "validation_loss" in line]
    # a Figure of its own, not pyplot: no global state, no display, nothing to close
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = cast(Any, figure.subplots())
    if train:
        steps, losses = [step for step, _ in train], [loss for _, loss in train]
        axes.plot(steps, losses, color="#9ecae1", linewidth=0.8, label="training loss")
        axes.plot(steps, smooth(losses), color="#08519c", linewidth=1.8, label="training loss, smoothed")
    if validation:
        steps, losses = [step for step, _ in validation], [loss for _, loss in validation]
        axes.plot(steps, losses, "o-", color="#d94801", label=validation_label)
        mark_best(axes, validation, best_step)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("loss")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if train or validation:
        axes.legend(frameon=False, fontsize="small")
    save_figure(figure, path, dpi=120)
    return Path(path)


def mark_best(axes: Any, values: Sequence[tuple[int, float]], best_step: int | None) -> None:
    """A star on the best of some values by step, with its number."""
    for step, value in values:
        if step == best_step:
            label = f"best: {value:.4f} at step {step}"
            axes.plot([step], [value], "*", markersize=15, color="#006d2c", zorder=5, label=label)
            axes.axvline(step, color="#006d2c", linewidth=0.8, linestyle=":")


# Lists inside one block, whose numbers tell no blocks apart.
_INSIDE_BLOCKS = frozenset({"net", "to_out"})
# With more cells than this, their numbers cannot be read.
_MAX_NUMBERED_CELLS = 1200


def block_of(layer: str) -> tuple[str, str]:
    """A layer's block, and what it is called in there: `unet.mid_block.attentions.0`, `attn1.to_q`, say."""
    parts = layer.split(".")
    numbered = [
        index for index in range(1, len(parts) - 1) if parts[index].isdigit() and parts[index - 1] not in _INSIDE_BLOCKS
    ]
    cut = numbered[-1] + 1 if numbered else min(1, len(parts) - 1)
    return ".".join(parts[:cut]), ".".join(parts[cut:])


def plot_ranks(
    ranks: Mapping[str, int], path: str | os.PathLike[str], title: str = "", nominal_rank: float | None = None
) -> Path:
    """Draw the rank of every layer, with its number: a row for each block, a column for each layer in there.

    Args:
        ranks: Layer -> rank; 0 for a layer that lost its adapter.
        path: PNG to write.
        title: Shown above.
        nominal_rank: Light grey in the picture, with red above and blue below; by default the mean.

    Returns:
        The path.

    Raises:
        ValueError: Without layers.
    """
    if not ranks:
        raise ValueError("there are no layers to draw the ranks of")
    places = {layer: block_of(layer) for layer in ranks}
    blocks = list(dict.fromkeys(block for block, _ in places.values()))
    names = list(dict.fromkeys(name for _, name in places.values()))
    table = np.full((len(blocks), len(names)), np.nan)
    for layer, (block, name) in places.items():
        table[blocks.index(block), names.index(name)] = ranks[layer]
    widest = max(map(len, blocks))
    figure = Figure(
        figsize=(min(20.0, 1.6 + 0.075 * widest + 0.5 * len(names)), min(24.0, 1.9 + 0.27 * len(blocks))),
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    axes = cast(Any, figure.subplots())
    colors, norm = rank_colors(table, nominal_rank)
    image = axes.imshow(table, cmap=colors, norm=norm, aspect="auto", interpolation="none")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(blocks)), blocks, fontsize=8)
    axes.set_xticks(np.arange(0.5, len(names) - 1), minor=True)
    axes.set_yticks(np.arange(0.5, len(blocks) - 1), minor=True)
    axes.grid(which="minor", color="#ffffff", linewidth=1.2)
    axes.tick_params(which="both", length=0)
    if table.size <= _MAX_NUMBERED_CELLS:
        for (row, column), rank in np.ndenumerate(table):
            if np.isfinite(rank):
                shade = colors(norm(rank))
                ink = "#111111" if 0.3 * shade[0] + 0.59 * shade[1] + 0.11 * shade[2] > 0.5 else "#ffffff"
                axes.text(column, row, f"{rank:.0f}", ha="center", va="center", fontsize=7.5, color=ink)
    axes.set_title(title, fontsize=10)
    if np.nanmin(table) < np.nanmax(table):
        ticks = MaxNLocator(nbins=8, integer=True)
        figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02, label="rank", ticks=ticks)
    save_figure(figure, path, dpi=110)
    return Path(path)


def rank_colors(table: Any, nominal_rank: float | None = None) -> tuple[Any, Any]:
    """Colours of ranks and their scale: light grey at the nominal rank, red above, blue below; one colour for one rank.

    What has no rank is white, which none of them is: a map of equal ranks is not empty.
    """
    values = np.asarray(table, dtype=float)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if low == high:
        return colormaps["Blues"], Normalize(low - 1.0, low + 1.0)
    center = float(np.nanmean(values)) if nominal_rank is None else nominal_rank
    return colormaps["coolwarm"], TwoSlopeNorm(center, min(0.0, low), max(2.0 * center, high))


def sample_grid(
    rows: Mapping[str, Sequence[Image.Image]],
    columns: Sequence[str],
    *,
    cell: int | None = None,
    min_cell: int = 128,
    max_cell: int = 256,
) -> Image.Image:
    """Lay out samples in a grid: one row a stage of the run, one column a prompt.

    Args:
        rows: Images by row label, one for each column.
        columns: Column labels, such as the prompts.
        cell: Side of a cell in pixels; by default the images' own width, brought between `min_cell` and `max_cell`.
        min_cell: Small images are enlarged to this, without smoothing by whole factors.
        max_cell: Large images are reduced to this.

    Raises:
        ValueError: When there is no image, or a row has another number of images than there are columns.
    """
    if not rows or not columns:
        raise ValueError("a sample grid needs at least one row and one column")
    for label, images in rows.items():
        if len(images) != len(columns):
            raise ValueError(f"row {label!r} has {len(images)} images for {len(columns)} columns")
    width = next(iter(rows.values()))[0].width
    side = cell or max(min_cell, min(width, max_cell))
    font = ImageFont.load_default(size=13)
    gap = 6
    captions = ["\n".join(textwrap.wrap(column, max(8, side // 7))) for column in columns]
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = int(max(probe.textbbox((0, 0), label, font=font)[2] for label in rows)) + 2 * gap
    top = int(max(probe.multiline_textbbox((0, 0), caption, font=font)[3] for caption in captions)) + 2 * gap

    grid = Image.new("RGB", (left + len(columns) * (side + gap), top + len(rows) * (side + gap)), _BACKGROUND)
    draw = ImageDraw.Draw(grid)
    for column, caption in enumerate(captions):
        draw.multiline_text((left + column * (side + gap), gap), caption, fill=_INK, font=font)
    for row, (label, images) in enumerate(rows.items()):
        y = top + row * (side + gap)
        draw.text((gap, y + side // 2), label, fill=_INK, font=font, anchor="lm")
        for column, image in enumerate(images):
            grid.paste(_fit(image, side), (left + column * (side + gap), y))
    return grid


def _fit(image: Image.Image, side: int) -> Image.Image:
    """The image in a square cell: whole factors enlarge without smoothing, so that pixels stay what they are."""
    image = image.convert("RGB")
    larger = max(image.size)
    if larger < side and side % larger == 0:
        resampling = Image.Resampling.NEAREST
    else:
        resampling = Image.Resampling.LANCZOS
    size = (max(1, round(image.width * side / larger)), max(1, round(image.height * side / larger)))
    canvas = Image.new("RGB", (side, side), _BACKGROUND)
    canvas.paste(image.resize(size, resampling), ((side - size[0]) // 2, (side - size[1]) // 2))
    return canvas
