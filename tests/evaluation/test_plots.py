from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorainit_diffusers.evaluation import plot_loss, sample_grid, smooth
from lorainit_diffusers.evaluation.plots import VALIDATION_LABEL, block_of, plot_ranks, rank_colors


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


def share_of_white(path: Path) -> float:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    return float((pixels == 255).all(axis=2).mean())


def test_the_best_step_is_marked(tmp_path: Path) -> None:
    metrics = [{"step": step, "validation_loss": loss} for step, loss in ((0, 0.8), (50, 0.5), (100, 0.6))]
    green = (0, 109, 44)
    pictures = [
        plot_loss(metrics, tmp_path / f"{best}.png", "", VALIDATION_LABEL, best).read_bytes() for best in (None, 50, 75)
    ]
    for content, marked in zip(pictures, (False, True, False), strict=True):
        with Image.open(io.BytesIO(content)) as image:
            colors = {color for _, color in image.convert("RGB").getcolors(1 << 20) or []}
        assert (green in colors) is marked


BLOCKS = [f"unet.up_blocks.{block}.attentions.0.transformer_blocks.0" for block in range(4)]


@pytest.mark.parametrize(
    ("layer", "block", "name"),
    [
        (f"{BLOCKS[2]}.attn1.to_q", BLOCKS[2], "attn1.to_q"),
        (f"{BLOCKS[2]}.attn2.to_out.0", BLOCKS[2], "attn2.to_out.0"),
        (f"{BLOCKS[2]}.ff.net.0.proj", BLOCKS[2], "ff.net.0.proj"),
        ("text_encoder.encoder.layers.11.self_attn.q_proj", "text_encoder.encoder.layers.11", "self_attn.q_proj"),
        ("transformer.proj_out", "transformer", "proj_out"),
        ("to_q", "", "to_q"),
    ],
)
def test_layers_are_grouped_by_block(layer: str, block: str, name: str) -> None:
    assert block_of(layer) == (block, name)


def test_a_map_of_ranks_is_never_blank(tmp_path: Path) -> None:
    names = [f"{block}.attn1.{name}" for block in BLOCKS for name in ("to_q", "to_k", "to_v", "to_out.0")]
    uniform = plot_ranks(dict.fromkeys(names, 8), tmp_path / "uniform.png", "8 everywhere", nominal_rank=8)
    different = plot_ranks({name: 3 + index % 11 for index, name in enumerate(names)}, tmp_path / "different.png")
    lost = plot_ranks({name: index % 2 for index, name in enumerate(names)}, tmp_path / "lost.png", nominal_rank=1)
    empty = plot_ranks(dict.fromkeys(names, 0), tmp_path / "zero.png")
    for path in (uniform, different, lost, empty):
        assert share_of_white(path) < 0.75
    with Image.open(uniform) as image:
        counts = {color: count for count, color in image.convert("RGB").getcolors(1 << 20) or [] if min(color) < 220}
        assert max(counts.values()) > 0.2 * image.width * image.height, "one colour fills the cells"
    with pytest.raises(ValueError, match="no layers"):
        plot_ranks({}, tmp_path / "none.png")


def test_ranks_have_colours_by_their_distance_to_the_nominal_one() -> None:
    colors, scale = rank_colors([[4.0, 8.0], [12.0, np.nan]], 8)
    less, equal, more = (colors(scale(rank))[:3] for rank in (4, 8, 12))
    assert less[2] > less[0]
    assert more[0] > more[2]
    assert max(equal) - min(equal) < 0.05
    assert max(equal) < 0.95, "the nominal rank is no white"
