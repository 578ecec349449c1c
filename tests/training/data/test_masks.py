"""Masks and conditioning images: found, checked, and cropped as the image that they lie beside."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lorainit_diffusers.families import family_class
from lorainit_diffusers.training.data.captioned_images import CaptionedImages, fixed_batches
from lorainit_diffusers.training.data.files import list_folder
from lorainit_diffusers.training.data.images import ImageRecord
from lorainit_diffusers.training.data.masks import load_mask
from lorainit_diffusers.training.data.notes import DataNotes
from lorainit_diffusers.training.data.order import DataOrder
from lorainit_diffusers.training.data.prior_preservation import pair_batches
from lorainit_diffusers.training.data.text_to_image import read_data
from lorainit_diffusers.training.options.checks import check_family_options
from lorainit_diffusers.training.options.text_to_image import StableDiffusionOptions, check_data_source
from lorainit_diffusers.training.resume import data_differences, data_identity


def coded(width: int, height: int) -> np.ndarray:
    """(height, width, 3): red is the column, green the row, blue their exclusive or."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([columns, rows, columns ^ rows], axis=-1).astype(np.uint8)


def write_pair(folder: Path, name: str, *, size: tuple[int, int] = (24, 16), caption: str = "a cat") -> np.ndarray:
    """An image, its caption and its mask, which has the same numbers as the image's blue channel, brighter."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = coded(*size)
    Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / f"{name}.txt").write_text(caption, encoding="utf-8")
    Image.fromarray(pixels[..., 2] + np.uint8(100)).save(folder / f"{name}-masklabel.png")
    return pixels


def write_metadata(folder: Path, rows: list[dict[str, Any]], suffix: str = "jsonl") -> None:
    if suffix == "jsonl":
        text = "\n".join(map(json.dumps, rows))
    else:
        names = list(rows[0])
        text = "\n".join([",".join(names), *(",".join(row[name] or "" for name in names) for row in rows)])
    (folder / f"metadata.{suffix}").write_text(text, encoding="utf-8")


def read(folder: Path, notes: DataNotes | None = None, **options: Any) -> list[ImageRecord]:
    return read_data(StableDiffusionOptions(train_data_dir=str(folder), **options), notes)[0]


def names(records: list[ImageRecord], kind: str = "mask") -> dict[str, str | None]:
    found = {record.path.name: record.beside.get(kind) for record in records}
    return {name: None if part is None else part.path.name for name, part in found.items()}


# ---- found


def test_masks_by_name(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_pair(tmp_path, name)
    (tmp_path / "b-masklabel.png").rename(tmp_path / "b-MaskLabel.PNG")
    write_pair(tmp_path, "c")
    (tmp_path / "c-masklabel.png").rename(tmp_path / "other-masklabel.png")
    notes = DataNotes()
    records = read(tmp_path, notes)
    assert names(records) == {"a.png": "a-masklabel.png", "b.png": "b-MaskLabel.PNG", "c.png": None}
    assert notes.left_out["masks that no image uses"] == ["other-masklabel.png"]
    (warning,) = notes.warnings
    assert "1 of 3 images have no mask and count whole" in warning
    assert warning.endswith("c.png")
    assert len(list_folder(tmp_path).images) == 3
    # of one subject, too
    subject = StableDiffusionOptions(instance_data_dir=str(tmp_path), instance_prompt="a sks cat")
    assert names(read_data(subject)[0]) == names(records)
    # images that differ in the suffix alone share captions and masks
    Image.fromarray(coded(24, 16)).save(tmp_path / "a.bmp")
    assert names(read(tmp_path))["a.bmp"] == "a-masklabel.png"
    Image.new("L", (24, 16), 255).save(tmp_path / "a-masklabel.bmp")
    with pytest.raises(ValueError, match=r"a-masklabel.bmp and a-masklabel.png are masks of one image; keep one"):
        read(tmp_path)


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_columns_of_metadata(tmp_path: Path, suffix: str) -> None:
    for name in ("a", "b"):
        write_pair(tmp_path, name)
    (tmp_path / "beside").mkdir()
    for name in ("a", "b"):
        Image.new("L", (24, 16), 200).save(tmp_path / "beside" / f"mask_{name}.png")
    rows: list[dict[str, Any]] = [
        {"file_name": "a.png", "text": "red", "hole": "beside\\mask_a.png", "source": "./b.png"},
        {"file_name": "b.png", "text": "blue", "hole": None, "source": "beside/mask_b.png"},
    ]
    write_metadata(tmp_path, rows, suffix)
    notes = DataNotes()
    records = read(tmp_path, notes, mask_column="hole", conditioning_image_column="source")
    # what a row names as the mask or the conditioning image is trained on only where it has a caption of its own
    assert names(records) == {"a.png": "mask_a.png", "b.png": None}
    assert names(records, "conditioning image") == {"a.png": "b.png", "b.png": "mask_b.png"}
    assert notes.left_out["masks that no image uses"] == ["a-masklabel.png", "b-masklabel.png"]
    # without the option, other images are images
    with pytest.raises(ValueError, match=r"2 of 4 images have no caption: beside/mask_a.png, beside/mask_b.png"):
        read(tmp_path)


def test_columns_that_cannot_be_used(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_pair(tmp_path / "data", name)
    folder = tmp_path / "data"
    with pytest.raises(ValueError, match=r"--mask_column 'hole': .* has no metadata.jsonl"):
        read(folder, mask_column="hole")
    (tmp_path / "elsewhere.png").write_bytes((folder / "a.png").read_bytes())
    for value, error, message in (
        ("c.png", FileNotFoundError, r"metadata.jsonl', line 1: 'c.png' in 'hole' does not exist; add the file"),
        ("../elsewhere.png", ValueError, r"line 1: '../elsewhere.png' in 'hole' lies outside of"),
        (3, ValueError, r"line 1: the image in 'hole' is 3; give the name of a file"),
        ("a.txt", ValueError, r"cannot read the image '.*a.txt'"),
    ):
        rows = [{"file_name": f"{name}.png", "text": "red", "hole": value} for name in ("a", "b")]
        write_metadata(folder, rows)
        for column in ("mask_column", "conditioning_image_column"):
            with pytest.raises(error, match=message):
                read(folder, None, **{column: "hole"})
    write_metadata(folder, [{"file_name": f"{name}.png", "text": "red", "hole": None} for name in ("a", "b")])
    with pytest.raises(ValueError, match=r"has no column 'gap' \(it has file_name, hole, text\); set --mask_column"):
        read(folder, mask_column="gap")
    rows = [{"file_name": "a.png", "text": "red", "hole": f"{name}-masklabel.png"} for name in ("a", "b")]
    write_metadata(folder, [*rows, {"file_name": "b.png", "text": "red"}])
    with pytest.raises(ValueError, match=r"line 2: a.png has b-masklabel.png beside it here and another file in .*lin"):
        read(folder, mask_column="hole")
    write_metadata(folder, [{"file_name": "a-masklabel.png", "text": "red"}])
    with pytest.raises(ValueError, match=r"'a-masklabel.png' has the name of a mask, which is never trained on"):
        read(folder)
    for column in ("mask_column", "conditioning_image_column"):
        given: dict[str, Any] = {"instance_data_dir": str(folder), "instance_prompt": "a", column: "hole"}
        options = StableDiffusionOptions(**given)
        with pytest.raises(ValueError, match=rf"--{column} hole is a column of metadata, which --instance_data_dir"):
            check_data_source(options)


def test_columns_of_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")

    def encoded(pixels: np.ndarray) -> dict[str, Any]:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    pixels = coded(8, 6)
    columns: dict[str, list[Any]] = {
        "image": [encoded(pixels)] * 3,
        "text": ["red", "green", "blue"],
        "hole": [encoded(pixels[..., 2] + np.uint8(1)), None, encoded(pixels[..., 0])],
        "source": [encoded(pixels)] * 3,
        "number": [1, 2, 3],
    }
    rows = datasets.Dataset.from_dict(columns)
    for name in ("image", "hole", "source"):
        rows = rows.cast_column(name, datasets.Image())
    (tmp_path / "set").mkdir()
    rows.to_parquet(str(tmp_path / "set" / "train-00000-of-00001.parquet"))
    given: dict[str, Any] = {"dataset_name": str(tmp_path / "set"), "cache_dir": str(tmp_path / "cache")}

    def load(**options: Any) -> list[ImageRecord]:
        return read_data(StableDiffusionOptions(**given, **options))[0]

    assert [record.beside for record in load()] == [{}] * 3
    records = load(mask_column="hole", conditioning_image_column="source")
    assert names(records) == {"train[0]": "train[0] (mask)", "train[1]": None, "train[2]": "train[2] (mask)"}
    assert records[2].mask is not None
    assert np.array_equal(np.array(load_mask(records[2].mask)), pixels[..., 0])
    with pytest.raises(ValueError, match=r"the column 'number' holds no images but .*; set --mask_column"):
        load(mask_column="number")
    with pytest.raises(ValueError, match=r"has no column 'gap' .*; set --conditioning_image_column"):
        load(conditioning_image_column="gap")
    with pytest.raises(
        ValueError, match=r"1 of 3 images have no conditioning image, the others have one: .*train\[1\]"
    ):
        load(conditioning_image_column="hole")


def test_masks_that_cannot_be_used(tmp_path: Path) -> None:
    write_pair(tmp_path, "a")
    mask = tmp_path / "a-masklabel.png"
    Image.new("L", (16, 24), 255).save(mask)
    with pytest.raises(ValueError, match=r"a-masklabel.png' has 16 x 24 pixels, its image '.*a.png' 24 x 16; save it"):
        read(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned, it fits
    Image.new("L", (16, 24), 255).save(mask, exif=exif)
    assert names(read(tmp_path)) == {"a.png": "a-masklabel.png"}
    Image.new("RGB", (24, 16)).save(mask)
    with pytest.raises(ValueError, match=r"a-masklabel.png' is all black, so that nothing of '.*a.png' counts"):
        read(tmp_path)
    mask.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot read the image '.*a-masklabel.png'"):
        read(tmp_path)


def test_families_without_conditioning_refuse_its_column() -> None:
    options = StableDiffusionOptions(conditioning_image_column="source")
    for name in ("sd", "sd3", "sana"):
        with pytest.raises(ValueError, match=r"--conditioning_image_column source: .* sees no image beside the noise"):
            check_family_options(options, family_class(name))
    for name in ("flux", "flux2"):
        check_family_options(options, family_class(name))


# ---- cropped


def records_of(folder: Path, sizes: list[tuple[int, int]]) -> list[ImageRecord]:
    """Images of (width, height), whose masks are their blue channels and whose conditioning images are negatives."""
    found: list[ImageRecord] = []
    for number, size in enumerate(sizes):
        pixels = write_pair(folder, f"{number}", size=size)
        Image.fromarray(255 - pixels).save(folder / f"{number}-negative.png")
        mask = ImageRecord(folder / f"{number}-masklabel.png", "")
        beside = ImageRecord(folder / f"{number}-negative.png", "")
        found.append(ImageRecord(folder / f"{number}.png", f"{number}", mask=mask, conditioning=beside))
    return found


def plain(records: list[ImageRecord]) -> list[ImageRecord]:
    return [ImageRecord(record.path, record.caption) for record in records]


def test_masks_and_conditioning_images_are_cropped_as_their_image(tmp_path: Path) -> None:
    """To the pixel: the shorter side is that of the crop, so that nothing is resized."""
    records = records_of(tmp_path, [(40, 16), (16, 30)])
    images = CaptionedImages(records, {}, 16, False, True)
    places: set[tuple[int, ...]] = set()
    for seed in range(60):
        for index in (0, 1):
            item = images[index, seed]
            pixels = ((item["pixel_values"] + 1) * 127.5).round().long()
            assert torch.equal((item["loss_mask"][0] * 255).round().long(), pixels[2] + 100)
            assert torch.equal(((item["conditioning_images"] + 1) * 127.5).round().long(), 255 - pixels)
            places.add((index, *item["crop_top_lefts"].tolist(), int(pixels[0, 0, 0] > pixels[0, 0, -1])))
            # the image is what it is without them, and the generator is left where it would be
            alone = CaptionedImages(plain(records), {}, 16, False, True)[index, seed]
            assert set(item) - set(alone) == {"loss_mask", "conditioning_images"}
            assert all(torch.equal(item[name], row) for name, row in alone.items())
    assert len(places) > 40


def test_masks_are_resized_with_their_image_and_follow_its_bucket(tmp_path: Path) -> None:
    records = records_of(tmp_path, [(40, 16), (32, 32), (16, 40)])
    images = CaptionedImages(records, {}, 16, True, False, buckets=[(8, 16), (16, 16), (16, 8)])
    assert images.bucket_of_image == [0, 1, 2]
    assert [tuple(images[index, 0]["loss_mask"].shape) for index in range(3)] == [(1, 8, 16), (1, 16, 16), (1, 16, 8)]
    # 40 x 16 covers 16 x 8 as 20 x 8, of which the middle 16 columns stay
    expected = Image.fromarray(coded(40, 16)[..., 2] + np.uint8(100)).resize((20, 8), Image.Resampling.BILINEAR)
    assert np.array_equal((images[0, 0]["loss_mask"][0] * 255).round().numpy(), np.array(expected)[:, 2:18])


def test_images_without_a_mask_count_whole(tmp_path: Path) -> None:
    records = records_of(tmp_path, [(16, 16), (16, 16)])
    mixed = CaptionedImages([records[0], *plain(records[1:])], {}, 16, True, False)
    assert torch.equal(mixed[1, 0]["loss_mask"], torch.ones(1, 16, 16))
    assert "loss_mask" not in CaptionedImages(plain(records), {}, 16, True, False)[0, 0]
    # and so does every image of the class
    classes = CaptionedImages(plain(records), {}, 16, True, False, masked=True)
    loaders = [DataLoader(some, batch_sampler=DataOrder(2, 2, 0, range(1))) for some in (mixed, classes)]
    masked = CaptionedImages([ImageRecord(r.path, "", mask=r.mask) for r in records], {}, 16, True, False)
    loaders[0] = DataLoader(masked, batch_sampler=DataOrder(2, 2, 0, range(1)))
    (batch,) = pair_batches(*loaders)
    assert batch["loss_mask"].shape == (4, 1, 16, 16)
    assert torch.equal(batch["loss_mask"][batch["is_class"]], torch.ones(2, 1, 16, 16))


def test_cached_latents_keep_the_mask_in_their_size(tmp_path: Path) -> None:
    records = records_of(tmp_path, [(40, 16), (32, 32), (16, 40), (8, 4)])
    buckets = [(8, 16), (16, 16), (16, 8)]
    images = CaptionedImages(records * 2, {}, 16, False, True, buckets=buckets)
    centred = CaptionedImages(records * 2, {}, 16, True, False, buckets=buckets)

    def encode(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents = torch.nn.functional.avg_pool2d(pixels, 4)
        return latents, torch.ones_like(latents)

    images.cache_latents(encode, batch_size=2, progress=False)
    for index in range(8):
        item, expected = images[index, 3], centred[index, 3]
        height, width = expected["loss_mask"].shape[-2:]
        places = expected["loss_mask"].reshape(1, height // 4, 4, width // 4, 4).mean(dim=(2, 4))
        torch.testing.assert_close(item["loss_mask"], places)
        torch.testing.assert_close(item["conditioning_latents"], encode(expected["conditioning_images"])[0])
        assert not {"conditioning_images", "pixel_values"} & set(item)
    assert sum(len(batch["loss_mask"]) for batch in fixed_batches(images)) == 8


# ---- resumed


def test_what_lies_beside_belongs_to_the_identity_of_the_data(tmp_path: Path) -> None:
    records = records_of(tmp_path, [(16, 16), (16, 16)])
    before, without = data_identity(records), data_identity(plain(records))
    assert data_differences(before, data_identity(records)) == []
    assert all(len(sample) == 3 for sample in without["samples"])  # as older checkpoints have it
    assert data_differences(json.loads(json.dumps(before)), without)[0] == "the mask of '0.png' has changed"
    Image.new("L", (16, 16), 7).save(tmp_path / "1-masklabel.png")
    Image.new("L", (16, 16), 7).save(tmp_path / "0-negative.png")
    assert data_differences(data_identity(records), before) == [
        "the conditioning image of '0.png' has changed",
        "the mask of '1.png' has changed",
    ]
