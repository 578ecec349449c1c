from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from lorainit_diffusers.evaluation import plot_loss, sample_grid, smooth


def test_smooth_keeps_a_constant_and_lags_a_step() -> None:
    assert smooth([2.0] * 5) == pytest.approx([2.0] * 5)
    curve = smooth([0.0] * 50 + [1.0] * 50, weight=0.9)
    assert curve[49] == 0.0
    assert pytest.approx(curve[50], abs=0.01) == 0.1
    assert curve[-1] > 0.99
    assert smooth([]) == []


def test_plot_loss_writes_a_picture(tmp_path: Path) -> None:
    metrics: list[dict[str, float]] = [{"step": step, "loss": 1.0 / step, "lr": 1e-3} for step in range(1, 30)]
    metrics += [{"step": step, "validation_loss": 1.0} for step in (0, 10, 20)]
    with Image.open(plot_loss(metrics, tmp_path / "loss.png", "cntlora")) as image:
        assert image.width > 300
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 10
    assert plot_loss([], tmp_path / "empty.png").is_file()


def test_sample_grid_puts_every_image_into_its_cell() -> None:
    rows = {
        "base": [Image.new("RGB", (64, 64), (255, 0, 0)), Image.new("RGB", (64, 64), (0, 255, 0))],
        "step 200": [Image.new("RGB", (64, 64), (0, 0, 255)), Image.new("L", (64, 32), 0)],
    }
    grid = sample_grid(rows, ["a cat", "a very long prompt that needs several lines to be shown in full"])
    assert grid.width >= 2 * 128
    assert grid.height >= 2 * 128
    right, bottom = grid.width - 6 - 64, grid.height - 6 - 64
    assert grid.getpixel((right, bottom)) == (0, 0, 0)
    assert grid.getpixel((right, bottom - 60)) == (255, 255, 255)
    assert grid.getpixel((right - 134, bottom)) == (0, 0, 255)
    assert grid.getpixel((right - 134, bottom - 134)) == (255, 0, 0)
    assert grid.getpixel((right, bottom - 134)) == (0, 255, 0)


def test_sample_grid_refuses_ragged_rows() -> None:
    image = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="row 'end' has 1 images for 2 columns"):
        sample_grid({"base": [image, image], "end": [image]}, ["a", "b"])
    with pytest.raises(ValueError, match="at least one row"):
        sample_grid({}, ["a"])
