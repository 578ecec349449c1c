"""The pages of a classifier's run: answers image by image, confusion matrices, accuracies by class, the report."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from lorainit_diffusers.evaluation import sample_grid
from lorainit_diffusers.evaluation.classification import (
    OTHER,
    accuracy,
    class_accuracies,
    confusion_matrix,
    most_confused,
    plot_accuracy,
    plot_confusion,
)
from lorainit_diffusers.evaluation.document import Block, Cell, Heading, Picture, Table, Text, to_html
from lorainit_diffusers.families.classifier import ClassifierFamily
from lorainit_diffusers.files import csv_cell, replacing, write_text
from lorainit_diffusers.training.best import best_line
from lorainit_diffusers.training.classification.data import ClassData
from lorainit_diffusers.training.stages import STAGES, stage_label, stages

# Images of the report for each of the most frequent mistakes.
NUM_EXAMPLES = 6


@dataclass(frozen=True)
class ClassPages:
    """What a run of a classifier leaves for a reader.

    Attributes:
        output_dir: Of the run.
        data: The images, for their names.
        labels: (n,) classes of the validation images.
        images: (n, 3, side, side) uint8, the validation images.
        classifier: The base.
    """

    output_dir: Path
    data: ClassData
    labels: Tensor
    images: Tensor
    classifier: ClassifierFamily

    def write_answers(self, name: str, probabilities: Tensor, answers: Tensor) -> None:
        """Write `predictions_<name>.jsonl`, `confusion_<name>.png`, and `per_class.csv` anew.

        Args:
            name: Of the stage.
            probabilities: (n, labels of the model).
            answers: (n,) classes, `OTHER` for a label that is none.
        """
        classes = self.data.class_names
        labels = {output: label for label, output in self.classifier.labels.items()}
        own = probabilities.gather(1, self.classifier.outputs[self.labels][:, None])[:, 0]
        best = probabilities.max(1)
        with (
            replacing(self.output_dir / f"predictions_{name}.jsonl") as scratch,
            scratch.open("w", encoding="utf-8") as file,
        ):
            for row, record in enumerate(self.data.validation):
                line = {
                    "image": record.path.as_posix(),
                    "class": record.caption,
                    "answer": classes[answers[row]] if answers[row] != OTHER else labels[int(best.indices[row])],
                    "probability": round(float(best.values[row]), 6),
                    "class_probability": round(float(own[row]), 6),
                }
                file.write(json.dumps(line) + "\n")
        confusion = confusion_matrix(self.labels, answers, len(classes))
        title = f"{name.replace('-', ' ')}: accuracy {accuracy(confusion):.3f}, rows add up to 1"
        plot_confusion(confusion, classes, self.output_dir / f"confusion_{name}.png", title)
        self._write_per_class()

    def _confusions(self) -> dict[str, Tensor]:
        """Confusion matrices of the stages by what was written, by an earlier part of a resumed run, too."""
        return {
            stage: confusion_matrix(self.labels, answers, len(self.data.class_names))
            for stage in STAGES
            if (answers := self._read_answers(stage)) is not None
        }

    def _read_answers(self, stage: str) -> Tensor | None:
        path = self.output_dir / f"predictions_{stage}.jsonl"
        if not path.is_file():
            return None
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if [Path(line["image"]).name for line in lines] != [record.path.name for record in self.data.validation]:
            return None  # of other data; the same data may lie elsewhere now
        index = {name: number for number, name in enumerate(self.data.class_names)}
        return torch.tensor([index.get(line["answer"], OTHER) for line in lines])

    def _write_per_class(self) -> None:
        confusions = self._confusions()
        shares = [class_accuracies(confusion) for confusion in confusions.values()]
        counts = torch.bincount(self.labels, minlength=len(self.data.class_names)).tolist()
        path = self.output_dir / "per_class.csv"
        with replacing(path) as scratch, scratch.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["class", "images", *(f"accuracy_{stage}" for stage in confusions)])
            for row, name in enumerate(self.data.class_names):
                values = ["" if math.isnan(share[row]) else f"{share[row]:.4f}" for share in shares]
                writer.writerow([csv_cell(name), counts[row], *values])

    def write_report(self, title: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write `report.html`, one file with its pictures in it, and the pictures beside it."""
        by_stage, confusions = stages(lines), self._confusions()
        classes, metric = self.data.class_names, "accuracy"
        values = {stage: float(line[metric]) for stage, line in by_stage.items()}
        named = ", ".join(
            f"{stage_label(self.classifier, s).replace('-', ' ')} {value:.3f}" for s, value in values.items()
        )
        lead = f"Accuracy on {len(self.labels)} validation images of {len(classes)} classes: {named}."
        columns = [key for key in next(iter(by_stage.values()), {}) if key not in ("step", "stage")]
        rows = [
            [Cell(stage_label(self.classifier, stage)), *(Cell(f"{line[key]:.4f}") for key in columns)]
            for stage, line in by_stage.items()
        ]
        base = values.get("base")
        best = best_line(lines, metric, larger_is_better=True)
        best_step = None if best is None else int(best["step"])
        curve = plot_accuracy(lines, self.output_dir / "accuracy.png", name=metric, base=base, best_step=best_step)
        blocks: list[Block] = [
            Text(lead, lead=True),
            Table(["", *(key.replace("_", " ") for key in columns)], rows),
            Text(
                f"Trained on {len(self.data.train)} images. Macro accuracy is the mean over the classes. An answer may "
                "be any of the model's labels."
            ),
            Heading("Accuracy over the steps"),
            Picture(curve, "accuracy over the steps"),
            Heading("Classes"),
            self._class_table(confusions),
        ]
        for stage in ("base", "end"):
            if stage in confusions:
                picture = Picture(self.output_dir / f"confusion_{stage}.png", f"confusion matrix, {stage}")
                blocks += [Heading(f"Confusion matrix, {stage}"), picture]
        if "end" in confusions and (pairs := most_confused(confusions["end"])):
            path = self.output_dir / "mistakes.png"
            answers = cast(Tensor, self._read_answers("end"))
            with replacing(path) as scratch:
                self._draw_mistakes(answers, pairs).save(scratch, format="PNG")
            blocks += [Heading("Most frequent mistakes"), Picture(path, "images of the most frequent mistakes")]
        write_text(self.output_dir / "report.html", to_html(title, blocks))

    def _class_table(self, confusions: Mapping[str, Tensor]) -> Table:
        shares = {stage: class_accuracies(confusion) for stage, confusion in confusions.items()}
        counts = torch.bincount(self.labels, minlength=len(self.data.class_names)).tolist()
        rows: list[list[Cell]] = []
        for row, name in enumerate(self.data.class_names):
            cells = [Cell(name), Cell(str(counts[row]))]
            for stage, values in shares.items():
                change = values[row] - shares["base"][row] if stage == "end" and "base" in shares else 0.0
                verdict = "better" if change > 0 else "worse" if change < 0 else ""
                cells.append(Cell("–" if math.isnan(values[row]) else f"{values[row]:.2f}", verdict))
            rows.append(cells)
        return Table(["class", "images", *(stage.replace("-", " ") for stage in shares)], rows)

    def _draw_mistakes(self, answers: Tensor, pairs: Sequence[tuple[int, int, int]]) -> Image.Image:
        names = self.data.class_names
        side = self.images.shape[-1]
        blank = Image.new("RGB", (side, side), (255, 255, 255))
        rows: dict[str, list[Image.Image]] = {}
        for label, answer, count in pairs:
            chosen = ((self.labels == label) & (answers == answer)).nonzero()[:NUM_EXAMPLES, 0].tolist()
            pictures = [_picture(self.images[index]) for index in chosen]
            rows[f"{names[label]}, called {names[answer]} ({count})"] = pictures + [blank] * (
                NUM_EXAMPLES - len(pictures)
            )
        return sample_grid(rows, [f"example {number}" for number in range(1, NUM_EXAMPLES + 1)], max_cell=160)


def _picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
