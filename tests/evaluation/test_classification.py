"""Confusion matrices, what is read off them, and their pictures."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

from lorainit_diffusers.evaluation.classification import (
    OTHER,
    accuracy,
    class_accuracies,
    confusion_matrix,
    macro_accuracy,
    most_confused,
    plot_accuracy,
    plot_confusion,
)

LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 3])
ANSWERS = torch.tensor([0, 0, 1, OTHER, 0, 0, 3])


def test_counts_and_shares() -> None:
    confusion = confusion_matrix(LABELS, ANSWERS, 4)
    assert confusion.tolist() == [[2, 1, 0, 0, 1], [2, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 1, 0]]
    assert accuracy(confusion) == 3 / 7
    shares = class_accuracies(confusion)
    assert shares[:2] == [0.5, 0.0]
    assert math.isnan(shares[2])  # no examples
    assert shares[3] == 1.0
    assert macro_accuracy(confusion) == 0.5
    assert most_confused(confusion) == [(1, 0, 2), (0, 1, 1)]
    assert most_confused(confusion, limit=1) == [(1, 0, 2)]


def test_what_is_no_class_is_refused() -> None:
    with pytest.raises(ValueError, match="must be as many"):
        confusion_matrix(LABELS, ANSWERS[:3], 4)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\)"):
        confusion_matrix(LABELS, ANSWERS, 3)
    with pytest.raises(ValueError, match="predictions must lie in"):
        confusion_matrix(LABELS, ANSWERS + 3, 4)


@pytest.mark.parametrize("count", [2, 26, 120])
def test_a_confusion_matrix_is_drawn_at_a_size_that_can_be_read(tmp_path, count) -> None:
    labels = torch.arange(3 * count) % count
    answers = torch.where(torch.arange(3 * count) < count, labels, (labels + 1) % count)
    names = [f"class-{index}" for index in range(count)]
    path = plot_confusion(confusion_matrix(labels, answers, count), names, tmp_path / "confusion.png", "title")
    with Image.open(path) as image:
        assert image.height >= min(300, 20 * count)
        assert max(image.size) < 2600


def test_another_label_has_a_column_only_when_it_was_answered(tmp_path) -> None:
    names = ["a", "b", "c", "d"]
    sizes: list[bytes] = []
    for answers in (ANSWERS, ANSWERS.clamp(min=0)):
        path = plot_confusion(confusion_matrix(LABELS, answers, 4), names, tmp_path / "confusion.png")
        sizes.append(path.read_bytes())
    assert sizes[0] != sizes[1]


def test_accuracy_is_drawn_over_the_steps_without_the_stages(tmp_path) -> None:
    lines = [
        {"step": 0, "stage": "base", "accuracy": 0.1},
        {"step": 0, "accuracy": 0.1},
        {"step": 1, "loss": 2.0},
        {"step": 5, "accuracy": 0.5},
    ]
    path = plot_accuracy(lines, tmp_path / "accuracy.png", base=0.1)
    other = plot_accuracy(lines[1:], tmp_path / "same.png", base=0.1)
    assert path.read_bytes() == other.read_bytes()
    assert plot_accuracy([], tmp_path / "empty.png").is_file()
