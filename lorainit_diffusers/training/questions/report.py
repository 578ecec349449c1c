"""The pages of a run on questions: scores by type, curves, and questions with their answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from lorainit_diffusers.evaluation.document import Block, Cell, Heading, Picture, Table, Text, to_html
from lorainit_diffusers.evaluation.plots import mark_best, save_figure
from lorainit_diffusers.files import write_text
from lorainit_diffusers.training.best import best_line


def by_type(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The results of each type of question, where there are several types."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in results:
        groups.setdefault(str(row["type"]) or "other", []).append(row)
    return groups if len(groups) > 1 else {}


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """What `QuestionAnsweringTask.write_results` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_answer_report(
    output_dir: Path,
    title: str,
    sentences: Sequence[str],
    results: Mapping[str, Sequence[Mapping[str, Any]]],
    images: Mapping[int, Sequence[Image.Image]],
) -> Path:
    """Write `report.html`; nothing in it is loaded from anywhere.

    Args:
        output_dir: Has `curves.png`.
        title: Of the page.
        sentences: The first is the result.
        results: Stage -> what was found, question by question.
        images: Of the questions to show, by their index.
    """
    latest = list(results.values())[-1]
    rows = [[Cell("all"), Cell(str(len(latest))), *(_score_cell(found) for found in results.values())]]
    for kind, found in by_type(latest).items():
        cells = [_score_cell(by_type(stage)[kind]) for stage in results.values()]
        rows.append([Cell(kind), Cell(str(len(found))), *cells])
    blocks: list[Block] = [Text(text, lead=index == 0) for index, text in enumerate(sentences)]
    blocks += [
        Heading("Scores"),
        Table(["questions", "number", *(f"{stage}: exact match (F1)" for stage in results)], rows),
        Heading("Curves"),
        Picture(output_dir / "curves.png", "exact match and loss on the validation questions over the steps"),
        Heading("Samples"),
        _samples_table(results, images),
    ]
    path = output_dir / "report.html"
    write_text(path, to_html(title, blocks))
    return path


def _samples_table(
    results: Mapping[str, Sequence[Mapping[str, Any]]], images: Mapping[int, Sequence[Image.Image]]
) -> Table:
    """One row a question: its images, what is asked and the right answer, and what each stage says."""
    latest = list(results.values())[-1]
    rows: list[list[Cell]] = []
    for index, shown in images.items():
        row = latest[index]
        said = [(str(stage[index]["prediction"]), bool(stage[index]["exact_match"])) for stage in results.values()]
        cells = [Cell("", images=tuple(shown)), Cell(str(row["question"])), Cell(" / ".join(row["answers"]))]
        rows.append([*cells, *(Cell(text, "better" if right else "worse") for text, right in said)])
    return Table(["image", "question", "answer", *results], rows)


def plot_scores(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw exact match and loss on the validation questions over the steps."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, 2)
    validations = [line for line in lines if "validation_loss" in line]
    for axis, name, label in zip(
        axes, ("exact_match", "validation_loss"), ("answers that match exactly", "validation loss"), strict=True
    ):
        axis.plot([line["step"] for line in validations], [line[name] for line in validations], "o-", color="#08519c")
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    best = best_line(lines, "exact_match", larger_is_better=True)
    if best is not None:
        mark_best(axes[0], [(line["step"], line["exact_match"]) for line in validations], int(best["step"]))
        axes[0].legend(frameon=False, fontsize="small")
    axes[0].set_ylim(bottom=0)
    save_figure(figure, path, dpi=120)


def _score_cell(rows: Sequence[Mapping[str, Any]]) -> Cell:
    return Cell(f"{100 * mean_score(rows, 'exact_match'):.1f} % ({100 * mean_score(rows, 'token_f1'):.1f} %)")


def mean_score(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """Mean of one of the scores over the rows."""
    return sum(float(row[name]) for row in rows) / len(rows)
