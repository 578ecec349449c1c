"""Reading images: the formats people have, captions, crops, and the order of batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from common import build_method, derive_seed
from common_data import CaptionedImages, DataOrder, ImageRecord, find_splits, image_to_tensor, load_image
from common_data import read_image_folder as read_folder
from PIL import Image
from sd_fixtures import write_images

from lorainit_diffusers.methods.cntlora import CNTLoRA


def read(folder: Path, prompt: str | None = None) -> list[ImageRecord]:
    return read_folder(folder, flag="--train_data_dir", prompt=prompt)


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("RGB", (200, 100, 50), "png", (200, 100, 50)),
        ("RGBA", (200, 100, 50, 0), "png", (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), "webp", (204, 204, 204)),
        ("LA", (0, 0), "png", (255, 255, 255)),
        ("L", 77, "png", (77, 77, 77)),
        ("1", 1, "png", (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), "jpg", (254, 0, 0)),
        ("P", 3, "png", None),
    ],
)
def test_every_mode_becomes_rgb(
    tmp_path: Path, mode: str, colour: int | tuple[int, ...], suffix: str, expected: tuple[int, int, int] | None
) -> None:
    path = tmp_path / f"image.{suffix}"
    Image.new(mode, (8, 8), colour).save(path, **({"lossless": True, "exact": True} if suffix == "webp" else {}))
    image = load_image(path)
    assert image.mode == "RGB"
    if expected is not None:
        assert np.abs(np.array(image.getpixel((4, 4))) - expected).max() <= 2


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 65535], [32896, 257]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert np.array(load_image(tmp_path / "deep.png"))[..., 0].tolist() == [[0, 255], [128, 1]]


def test_palette_with_transparency_lies_over_white(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 1), 1)
    image.save(tmp_path / "palette.png", transparency=0)
    loaded = load_image(tmp_path / "palette.png")
    assert loaded.getpixel((0, 0)) == (255, 255, 255)
    assert loaded.getpixel((1, 1)) == (0, 0, 255)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("RGB", (20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (10, 20)


def test_crops_and_flips_come_from_the_generator() -> None:
    wide = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (16, 1, 3)))

    def tensor(seed: int, center: bool = False, flip: bool = False) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return image_to_tensor(wide, 16, center_crop=center, random_flip=flip, generator=generator)

    assert tensor(0).shape == (3, 16, 16)
    assert torch.equal(tensor(0), tensor(0))
    assert len({float(tensor(seed)[0, 0, 0]) for seed in range(20)}) > 5
    centred = tensor(0, center=True)
    assert torch.allclose(centred[0, 0], (torch.arange(24, 40) * 4) / 127.5 - 1)
    flips = [torch.equal(tensor(seed, center=True, flip=True), centred) for seed in range(20)]
    assert 0 < sum(flips) < 20
    assert tensor(0).min() >= -1
    assert tensor(0).max() <= 1


def test_small_images_are_enlarged_to_the_resolution() -> None:
    image = Image.new("RGB", (5, 9), (255, 0, 0))
    tensor = image_to_tensor(image, 32, center_crop=True, random_flip=False, generator=torch.Generator())
    assert tensor.shape == (3, 32, 32)
    assert torch.equal(tensor[0], torch.ones(32, 32))


def test_captions_from_csv_text_files_and_prompt(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", count=2)
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match="2 of 2 images have no caption"):
        read(folder)
    assert [record.caption for record in read(folder, prompt="a sks cat")] == ["a sks cat"] * 2
    for name in ("00", "01"):
        (folder / f"{name}.txt").write_text(f"picture {name}\n", encoding="utf-8")
    assert [record.caption for record in read(folder)] == ["picture 00", "picture 01"]
    (folder / "metadata.csv").write_text('file_name,text\n00.png,"a, b"\n01.png,c\n', encoding="utf-8")
    assert [record.caption for record in read(folder)] == ["a, b", "c"]


def test_find_splits(image_dir: Path) -> None:
    expected = image_dir / "train", image_dir / "heldout"
    assert find_splits(image_dir) == expected
    assert find_splits(image_dir / "train") == expected
    assert find_splits(image_dir / "heldout") == (image_dir / "heldout", None)


def test_epochs_are_permutations_and_batches_run_over_their_ends() -> None:
    keys = [key for batch in DataOrder(5, 3, seed=0, batches=range(10)) for key in batch]
    epochs = [[index for index, _ in keys[start : start + 5]] for start in range(0, 30, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert len({seed for _, seed in keys}) == 30


def test_order_resumes_anywhere_and_processes_take_turns() -> None:
    whole = list(DataOrder(5, 3, seed=0, batches=range(10)))
    assert list(DataOrder(5, 3, seed=0, batches=range(4, 10))) == whole[4:]
    turns = [list(DataOrder(5, 3, seed=0, batches=range(process, 10, 2))) for process in (0, 1)]
    assert [batch for pair in zip(*turns, strict=True) for batch in pair] == whole
    assert list(DataOrder(5, 3, seed=1, batches=range(10))) != whole


def test_cached_latents_are_sampled_from_the_posterior(tmp_path: Path) -> None:
    records = read(write_images(tmp_path / "images"))
    images = CaptionedImages(records, torch.zeros(4, 2), 8, center_crop=True, random_flip=False)
    pixels = images[0, 0]["pixel_values"]
    images.cache_latents(lambda batch: (batch, torch.full_like(batch, 0.5)), batch_size=3, progress=False)
    first, again, other = (images[0, seed]["latents"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0.3 < float((first - pixels).std()) < 0.7


def test_seeds_differ_in_every_part() -> None:
    assert derive_seed(1, "a", 2) == derive_seed(1, "a", 2)
    assert len({derive_seed(1, 23), derive_seed(12, 3), derive_seed(1, 2, 3), derive_seed(3, 2, 1)}) == 4
    assert 0 <= derive_seed("x") < 2**63


def test_method_options_are_parsed_by_their_type() -> None:
    method = build_method("cntlora", ["ridge=0.5", "gauge=balanced"])
    assert isinstance(method, CNTLoRA)
    assert (method.ridge, method.gauge) == (0.5, "balanced")
