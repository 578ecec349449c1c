"""What a classifier gets right and wrong: confusion matrix, accuracy by class, and their pictures."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lorainit_diffusers.evaluation.plots import mark_best, save_figure

# What a model with more labels than the data has classes may answer.
OTHER = -1
_MAX_NUMBERED_CLASSES = 40
_MAX_SIDE_INCHES = 22.0


def confusion_matrix(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """Counts of every answer to every class.

    Args:
        labels: (n,) classes.
        predictions: (n,) classes, or `OTHER` for an answer that is none of them.
        num_classes: How many there are.

    Returns:
        (num_classes, num_classes + 1) int64: row of the class, column of the answer; the last is `OTHER`.

    Raises:
        ValueError: When the lengths differ, or a label or prediction lies outside.
    """
    if labels.shape != predictions.shape or labels.ndim != 1:
        raise ValueError(f"labels {tuple(labels.shape)} and predictions {tuple(predictions.shape)} must be as many")
    if labels.numel() and not (int(labels.min()) >= 0 and int(labels.max()) < num_classes):
        raise ValueError(f"labels must lie in [0, {num_classes})")
    if predictions.numel() and not (int(predictions.min()) >= OTHER and int(predictions.max()) < num_classes):
        raise ValueError(f"predictions must lie in [0, {num_classes}), or be {OTHER}")
    columns = torch.where(predictions == OTHER, num_classes, predictions)
    counts = torch.bincount(
        labels.long() * (num_classes + 1) + columns.long(), minlength=num_classes * (num_classes + 1)
    )
    return counts.view(num_classes, num_classes + 1)


def class_accuracies(confusion: Tensor) -> list[float]:
    """Share of each class that is found; NaN for a class without examples."""
    found, counts = confusion.diagonal().double(), confusion.sum(1).double()
    return (found / counts).tolist()


def accuracy(confusion: Tensor) -> float:
    """Share of all examples whose class is found."""
    return int(confusion.diagonal().sum()) / int(confusion.sum())


def macro_accuracy(confusion: Tensor) -> float:
    """Mean over the classes that have examples of the share that is found."""
    shares = [share for share in class_accuracies(confusion) if not math.isnan(share)]
    return sum(shares) / len(shares)


def most_confused(confusion: Tensor, limit: int = 6) -> list[tuple[int, int, int]]:
    """The most frequent mistakes first: (class, answer, count), without answers that are `OTHER`."""
    wrong = confusion[:, :-1].clone()
    wrong.fill_diagonal_(0)
    pairs = [(row, column, int(wrong[row, column])) for row, column in wrong.nonzero().tolist()]
    return sorted(pairs, key=lambda pair: (-pair[2], pair[0], pair[1]))[:limit]


def plot_confusion(
    confusion: Tensor, class_names: Sequence[str], path: str | os.PathLike[str], title: str = ""
) -> Path:
    """Draw a confusion matrix: colours are shares of a row, numbers are counts.

    Args:
        confusion: From `confusion_matrix`.
        class_names: Of rows and columns.
        path: PNG to write.
        title: Shown above.

    Returns:
        The path.
    """
    columns = [*class_names, "another label"] if bool(confusion[:, -1].any()) else list(class_names)
    counts = confusion[:, : len(columns)]
    shares = (counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
    side = min(_MAX_SIDE_INCHES, 2.6 + 0.34 * len(class_names))
    font = max(2.5, min(9.0, 0.4 * 72 * (side - 2.6) / len(class_names)))  # points, of a cell's height
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = cast(Any, figure.subplots())
    drawn = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=font)
    axes.set_yticks(range(len(class_names)), class_names, fontsize=font)
    axes.set_xlabel("answer")
    axes.set_ylabel("class")
    axes.set_title(title)
    if len(class_names) <= _MAX_NUMBERED_CLASSES:
        for row, column in counts.nonzero().tolist():
            color = "white" if shares[row, column] > 0.55 else "#1c1e21"
            text = str(int(counts[row, column]))
            axes.text(column, row, text, ha="center", va="center", fontsize=font * 0.85, color=color)
    bar = figure.colorbar(drawn, ax=axes, fraction=0.04, pad=0.02)
    bar.set_label("share of the class")
    save_figure(figure, path, dpi=110)
    return Path(path)


def plot_accuracy(
    metrics: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    name: str = "accuracy",
    base: float | None = None,
    title: str = "",
    best_step: int | None = None,
) -> Path:
    """Draw a metric over the steps of a run, and the level of the base.

    Args:
        metrics: The lines of `metrics.jsonl`; those with a `stage` are left out.
        path: PNG to write.
        name: Of the metric.
        base: Its value for the base model.
        title: Shown above.
        best_step: The step that is marked as the best one.

    Returns:
        The path.
    """
    points = [(int(line["step"]), float(line[name])) for line in metrics if name in line and "stage" not in line]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = cast(Any, figure.subplots())
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, "o-", color="#08519c", markersize=4, label=name.replace("_", " "))
        mark_best(axes, points, best_step)
    if base is not None:
        axes.axhline(base, color="#737373", linestyle="--", linewidth=1.2, label="base")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(name.replace("_", " "))
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if points or base is not None:
        axes.legend(frameon=False, fontsize="small")
    save_figure(figure, path, dpi=120)
    return Path(path)
