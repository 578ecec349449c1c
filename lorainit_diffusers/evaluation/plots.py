"""The loss curve and the labelled grid of samples of one run."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from lorainit_diffusers.files import replacing

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
        values: a curve, one value a step.
        weight: share of the past in every step, in [0, 1).

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
    validation_label: str = "validation loss (fixed noise, held-out images)",
) -> Path:
    """Draw the training loss, raw and smoothed, and the validation loss where there is one.

    Args:
        metrics: the lines of `metrics.jsonl`: each has `step` and `loss` or `validation_loss`.
        path: PNG to write.
        title: shown above the curves.
        validation_label: what the legend says of the validation loss.

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
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if train or validation:
        axes.legend(frameon=False, fontsize="small")
    save_figure(figure, path, dpi=120)
    return Path(path)


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
        rows: images by row label, one for each column.
        columns: column labels, such as the prompts.
        cell: side of a cell in pixels; by default the images' own width, brought between `min_cell` and `max_cell`.
        min_cell: small images are enlarged to this, without smoothing by whole factors.
        max_cell: large images are reduced to this.

    Raises:
        ValueError: when there is no image, or a row has another number of images than there are columns.
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
