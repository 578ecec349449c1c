"""Reading images: the formats people have, captions, crops, buckets, and the order of batches."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.training_utils import parse_buckets_string
from PIL import Image
from sd_fixtures import write_images
from torch.utils.data import DataLoader

from lorainit_diffusers.methods.cntlora import CNTLoRA
from lorainit_diffusers.training.choices import INTERPOLATIONS
from lorainit_diffusers.training.data.buckets import nearest_bucket, parse_buckets
from lorainit_diffusers.training.data.captioned_images import CaptionedImages, fixed_batches, image_to_tensor
from lorainit_diffusers.training.data.folders import read_image_folder as read_folder
from lorainit_diffusers.training.data.images import ImageRecord, check_images, image_size, load_image
from lorainit_diffusers.training.data.notes import DataNotes
from lorainit_diffusers.training.data.order import BucketOrder, DataOrder
from lorainit_diffusers.training.data.splits import find_image_splits
from lorainit_diffusers.training.data.text_to_image import read_data
from lorainit_diffusers.training.options.checks import build_method
from lorainit_diffusers.training.options.text_to_image import StableDiffusionOptions
from lorainit_diffusers.training.seeds import derive_seed


def read(folder: Path, prompt: str | None = None) -> list[ImageRecord]:
    return read_folder(folder, flag="--train_data_dir", prompt=prompt)


def arguments(**options: Any) -> StableDiffusionOptions:
    """The options that `read_data` looks at, as the scripts' parser leaves them when they are not given."""
    return StableDiffusionOptions(**options)


def loaded(path: Path) -> list[Any]:
    image = load_image(path)
    assert image.mode == "RGB"
    return np.array(image).tolist()


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("RGB", (200, 100, 50), "png", (200, 100, 50)),
        ("RGBA", (200, 100, 50, 0), "png", (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), "webp", (204, 204, 204)),
        ("LA", (0, 0), "png", (255, 255, 255)),
        ("LA", (0, 51), "png", (204, 204, 204)),
        ("L", 77, "png", (77, 77, 77)),
        ("1", 1, "png", (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), "jpg", (254, 0, 0)),
        ("CMYK", (0, 0, 0, 128), "tif", (127, 127, 127)),
        ("YCbCr", (128, 128, 128), "jpg", (128, 128, 128)),
    ],
)
def test_every_mode_becomes_rgb(
    tmp_path: Path, mode: str, colour: int | tuple[int, ...], suffix: str, expected: tuple[int, int, int]
) -> None:
    path = tmp_path / f"image.{suffix}"
    Image.new(mode, (8, 8), colour).save(path, **({"lossless": True, "exact": True} if suffix == "webp" else {}))
    image = load_image(path)
    assert image.mode == "RGB"
    assert np.abs(np.array(image).astype(int) - expected).max() <= 2


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 65535], [32896, 257]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert np.array(load_image(tmp_path / "deep.png"))[..., 0].tolist() == [[0, 255], [128, 1]]


def test_a_dark_sixteen_bit_image_stays_dark_and_turns(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8  # the file is turned clockwise: the left column shows at the bottom
    Image.fromarray(np.array([[0, 255], [128, 129]], dtype=np.uint16)).save(tmp_path / "dark.png", exif=exif)
    assert np.array(load_image(tmp_path / "dark.png"))[..., 0].tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 7.0, 255.0], [0, 7, 255]), ([-1.0, 0, 0], [0] * 3)],
)
def test_float_images_are_scaled_by_the_smallest_usual_white(
    tmp_path: Path, values: list[float], expected: list[int]
) -> None:
    Image.fromarray(np.array([values], dtype=np.float32)).save(tmp_path / "float.tif")
    assert np.array(load_image(tmp_path / "float.tif"))[0, :, 0].tolist() == expected


def test_palettes_keep_colours_and_transparency_lies_over_white(tmp_path: Path) -> None:
    image = Image.new("P", (3, 1), 0)
    image.putpalette([255, 0, 0, 0, 0, 255, 0, 0, 0])
    image.putpixel((1, 0), 1)
    image.putpixel((2, 0), 2)
    image.save(tmp_path / "plain.png")
    assert loaded(tmp_path / "plain.png") == [[[255, 0, 0], [0, 0, 255], [0, 0, 0]]]
    image.save(tmp_path / "hole.png", transparency=0)
    assert loaded(tmp_path / "hole.png") == [[[255, 255, 255], [0, 0, 255], [0, 0, 0]]]
    image.save(tmp_path / "shades.png", transparency=bytes([255, 0, 51]))
    assert loaded(tmp_path / "shades.png") == [[[255, 0, 0], [255, 255, 255], [204, 204, 204]]]


def test_a_transparent_colour_lies_over_white(tmp_path: Path) -> None:
    image = Image.new("RGB", (2, 1), (10, 20, 30))
    image.putpixel((1, 0), (1, 2, 3))
    image.save(tmp_path / "key.png", transparency=(10, 20, 30))
    assert loaded(tmp_path / "key.png") == [[[255, 255, 255], [1, 2, 3]]]


def test_of_an_animation_the_first_frame_counts(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (2, 2), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "moving.png", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "moving.gif") as opened:
        assert opened.n_frames == 3
    for name in ("moving.gif", "moving.png"):
        assert loaded(tmp_path / name) == [[[255, 0, 0]] * 2] * 2


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_all_exif_orientations_are_applied(tmp_path: Path, suffix: str) -> None:
    upright = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10
    transposed = upright.swapaxes(0, 1)
    # EXIF 2.32, tag 0x0112: where the stored row 0 and column 0 are in the upright image
    stored = [upright, upright[:, ::-1], upright[::-1, ::-1], upright[::-1]]
    stored += [transposed, transposed[:, ::-1], transposed[::-1, ::-1], transposed[::-1]]
    # 6 is "row 0 at the right, column 0 on top": turned clockwise to be upright; 8 the other way round
    stored[5], stored[7] = np.rot90(upright, 1), np.rot90(upright, -1)
    for orientation, pixels in enumerate(stored, start=1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.{suffix}"
        options = {"lossless": True} if suffix == "webp" else {}
        Image.fromarray(np.ascontiguousarray(pixels)).save(path, exif=exif, **options)
        assert loaded(path) == upright.tolist(), orientation
        assert image_size(path) == (2, 3), orientation


def test_images_come_from_files_records_and_bytes(tmp_path: Path) -> None:
    Image.new("RGB", (3, 2), (1, 2, 3)).save(tmp_path / "image.png")
    encoded = (tmp_path / "image.png").read_bytes()
    row = ImageRecord(Path("owner/name/train[0]"), "caption", lambda: encoded)
    for source in (tmp_path / "image.png", str(tmp_path / "image.png"), encoded, row):
        assert np.array(load_image(source)).tolist() == [[[1, 2, 3]] * 3] * 2
        assert image_size(source) == (2, 3)
    for half in (encoded[:40], encoded[:20]):
        with pytest.raises(ValueError, match=r"cannot read the image 'owner/name/train\[3\]'"):
            load_image(ImageRecord(Path("owner/name/train[3]"), "caption", lambda half=half: half))
    with pytest.raises(ValueError, match="cannot read the image 'of 10 bytes'"):
        image_size(encoded[:10])


def test_unreadable_images_are_named_before_anything_is_loaded(image_dir: Path) -> None:
    (image_dir / "heldout" / "01.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"cannot read the image '.*01.png' .*; repair or remove it"):
        read_data(arguments(train_data_dir=str(image_dir)))


def test_folders_with_options(image_dir: Path) -> None:
    records, heldout = read_data(arguments(train_data_dir=str(image_dir)))
    assert (len(records), len(heldout)) == (4, 2)
    few, still = read_data(arguments(train_data_dir=str(image_dir), max_train_samples=3, repeats=2))
    assert few == [*records[:3], *records[:3]]
    assert still == heldout
    assert len(read_data(arguments(train_data_dir=str(image_dir), max_train_samples=9))[0]) == 4
    subject, _ = read_data(arguments(instance_data_dir=str(image_dir / "train"), instance_prompt="a sks cat"))
    assert [record.path for record in subject] == [record.path for record in records]
    assert {record.caption for record in subject} == {"a sks cat"}
    with pytest.raises(ValueError, match=r"no column 'image' .*set --image_column"):
        read_data(arguments(train_data_dir=str(image_dir), image_column="image"))
    metadata = image_dir / "train" / "metadata.jsonl"
    rows = [json.loads(line) for line in metadata.read_text(encoding="utf-8").splitlines()]
    renamed = [{"image": row["file_name"], "words": row["text"]} for row in rows]
    metadata.write_text("\n".join(map(json.dumps, renamed)), encoding="utf-8")
    options = {"train_data_dir": str(image_dir / "train"), "image_column": "image", "caption_column": "words"}
    (image_dir / "heldout").rename(image_dir / "elsewhere")
    assert read_data(arguments(**options)) == (records, [])
    with pytest.raises(FileNotFoundError, match=r"--train_data_dir 'nowhere' is not a directory"):
        read_data(arguments(train_data_dir="nowhere"))


def ramp(width: int, height: int) -> Image.Image:
    """Each pixel's red is its column, its green its row."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([columns, rows, np.zeros_like(rows)], axis=-1).astype(np.uint8))


def to_pixels(tensor: torch.Tensor) -> np.ndarray:
    return ((tensor.permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()


def test_crops_and_flips_come_from_the_generator() -> None:
    wide = ramp(64, 16)

    def crop(seed: int, center: bool = False, flip: bool = False) -> tuple[torch.Tensor, tuple[int, int]]:
        generator = torch.Generator().manual_seed(seed)
        return image_to_tensor(wide, (16, 16), center_crop=center, random_flip=flip, generator=generator)

    assert torch.equal(crop(0)[0], crop(0)[0])
    assert len({crop(seed)[1] for seed in range(20)}) > 5
    lefts = {crop(seed)[1][1] for seed in range(800)}
    assert (min(lefts), max(lefts)) == (0, 48)
    centred, corner = crop(0, center=True)
    assert centred.shape == (3, 16, 16)
    assert corner == (0, 24)
    assert np.array_equal(to_pixels(centred), np.array(wide)[:, 24:40])
    flips = [torch.equal(crop(seed, center=True, flip=True)[0], centred) for seed in range(20)]
    assert 0 < sum(flips) < 20


@pytest.mark.parametrize("center", [True, False])
def test_crop_corners_are_places_in_the_resized_and_possibly_mirrored_image(center: bool) -> None:
    tall, size = ramp(20, 50), (30, 10)
    kinds: set[bool] = set()
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        tensor, (top, left) = image_to_tensor(tall, size, center_crop=center, random_flip=True, generator=generator)
        resized = np.array(tall.resize((12, 30), Image.Resampling.LANCZOS))  # covers 10 x 30, keeps the aspect
        mirrored = bool(tensor[0, 0, 0] > tensor[0, 0, -1])
        kinds.add(mirrored)
        whole = resized[:, ::-1] if mirrored else resized
        assert np.array_equal(to_pixels(tensor), whole[top : top + 30, left : left + 10])
    assert kinds == {True, False}


def test_small_images_are_enlarged_to_the_resolution() -> None:
    image = Image.new("RGB", (5, 9), (255, 0, 0))
    tensor, _ = image_to_tensor(image, (32, 32), center_crop=True, random_flip=False, generator=torch.Generator())
    assert tensor.shape == (3, 32, 32)
    assert torch.equal(tensor[0], torch.ones(32, 32))


def test_interpolations_are_pillows(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    names = {"lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "nearest": 0, "hamming": 5}
    assert set(names) == set(INTERPOLATIONS)
    for name, filter_code in names.items():
        images = CaptionedImages([ImageRecord(tmp_path / "noise.png", "")], {}, 8, True, False, interpolation=name)
        expected = np.array(Image.fromarray(pixels).resize((8, 8), filter_code))
        assert np.array_equal(to_pixels(images[0, 0]["pixel_values"]), expected), name


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
    def found(folder: Path) -> tuple[Path, Path | None]:
        splits = find_image_splits(folder, str(folder), DataNotes())
        return splits.train, splits.heldout

    expected = image_dir / "train", image_dir / "heldout"
    assert found(image_dir) == expected
    assert found(image_dir / "train") == expected
    assert found(image_dir / "heldout") == (image_dir / "heldout", None)


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


def write_shapes(folder: Path, shapes: list[tuple[int, int]]) -> list[ImageRecord]:
    """Ramps of the given (height, width)."""
    folder.mkdir(parents=True)
    records: list[ImageRecord] = []
    for index, (height, width) in enumerate(shapes):
        ramp(width, height).save(folder / f"{index:02d}.png")
        records.append(ImageRecord(folder / f"{index:02d}.png", f"image {index}"))
    check_images(records)
    return records


def test_items_have_sizes_columns_and_the_record_of_the_index(tmp_path: Path) -> None:
    records = write_shapes(tmp_path / "images", [(10, 20), (40, 8)])
    columns = {"input_ids": torch.tensor([[1, 2], [3, 4]]), "weights": torch.tensor([0.5, 0.25])}
    images = CaptionedImages(records, columns, 8, center_crop=True, random_flip=False)
    first, second = images[0, 5], images[1, 5]
    assert first["pixel_values"].shape == (3, 8, 8)
    assert first["input_ids"].tolist() == [1, 2]
    assert float(second["weights"]) == 0.25
    sizes = [[item[name].tolist() for item in (first, second)] for name in ("original_sizes", "crop_top_lefts")]
    assert sizes == [[[10, 20], [40, 8]], [[0, 4], [16, 0]]]
    assert first["target_sizes"].tolist() == [8, 8]
    kinds = {first[name].dtype for name in ("original_sizes", "crop_top_lefts", "target_sizes")}
    assert kinds == {torch.int64}
    turned = Image.Exif()
    turned[0x0112] = 6
    ramp(20, 10).save(records[0].path, exif=turned)
    assert images[0, 0]["original_sizes"].tolist() == [20, 10]


def test_buckets_are_parsed_as_by_diffusers() -> None:
    text = " 1024, 1024;768,1344;1344,768"
    assert parse_buckets(text, 1024, 8) == parse_buckets_string(text)
    assert parse_buckets("64,64;64,64;", 64, 8) == [(64, 64)]
    for wrong in ("", ";", "64", "64,64;wide", "64x64", "64,-64", "0,64", "64,64,64", "64,64;;32,32"):
        with pytest.raises(ValueError, match=r"--aspect_ratio_buckets .* is not height,width; give auto"):
            parse_buckets(wrong, 64, 8)
    with pytest.raises(ValueError, match="the sides of 64,100 are not multiples of 8"):
        parse_buckets("64,64;64,100", 64, 8)
    with pytest.raises(ValueError, match="the sides of 100,100 are not multiples of 8"):
        parse_buckets("auto", 100, 8)


@pytest.mark.parametrize(("resolution", "multiple", "step"), [(1024, 8, 64), (512, 8, 64), (768, 8, 64), (64, 4, 8)])
def test_automatic_buckets(resolution: int, multiple: int, step: int) -> None:
    buckets = parse_buckets("auto", resolution, multiple)
    assert (resolution, resolution) in buckets
    assert len(set(buckets)) == len(buckets)
    assert {(width, height) for height, width in buckets} == set(buckets)
    areas = [height * width / resolution**2 for height, width in buckets]
    assert min(areas) > 0.75
    assert max(areas) == 1.0
    assert all(0.5 <= height / width <= 2 and height % step == width % step == 0 for height, width in buckets)
    # every side for which a rectangle fits is there: brute force over all of them
    sides = range(step, 2 * resolution + 1, step)
    fits = [(h, w) for h, w in itertools.product(sides, sides) if h * w <= resolution**2 and max(h, w) <= 2 * min(h, w)]
    for width in {w for _, w in fits}:
        tallest = max(h for h, w in fits if w == width)
        if width >= resolution:
            assert (tallest, width) in buckets
    if resolution == 1024:  # SDXL's own table, arXiv:2307.01952, appendix I
        assert {(1344, 768), (1216, 832), (1152, 896), (1024, 1024), (832, 1216), (704, 1408)} <= set(buckets)


def test_the_nearest_bucket_has_the_nearest_log_aspect() -> None:
    buckets = parse_buckets("auto", 512, 8)
    for size in [(100, 100), (100, 131), (99, 20), (1, 50), (300, 301), (640, 480), (1080, 1920)]:
        ratios = [max(size[0] / size[1] / (h / w), h / w / (size[0] / size[1])) for h, w in buckets]
        assert ratios[nearest_bucket(size, buckets)] == pytest.approx(min(ratios))
    # on a linear scale 1:1 would be nearer to 1:2 than to 2:1
    assert nearest_bucket((145, 100), [(8, 8), (16, 8)]) == 1
    assert nearest_bucket((140, 100), [(8, 8), (16, 8)]) == 0  # the borderline is the root of 2


def test_images_cover_their_bucket_and_keep_their_aspect(tmp_path: Path) -> None:
    records = write_shapes(tmp_path / "images", [(10, 20), (20, 10), (16, 16), (64, 30)])
    images = CaptionedImages(records, {}, 16, True, False, buckets=[(16, 16), (8, 16), (24, 8)])
    assert images.bucket_of_image == [1, 2, 0, 2]
    assert [tuple(images[index, 0]["pixel_values"].shape[1:]) for index in range(4)] == [
        (8, 16),
        (24, 8),
        (16, 16),
        (24, 8),
    ]
    assert [images[index, 0]["target_sizes"].tolist() for index in range(4)] == [[8, 16], [24, 8], [16, 16], [24, 8]]
    # 64 x 30 is resized to 24 x 11 and loses one column on the left and two on the right
    assert images[3, 0]["crop_top_lefts"].tolist() == [0, 1]
    expected = np.array(ramp(30, 64).resize((11, 24), Image.Resampling.LANCZOS))[:, 1:9]
    assert np.array_equal(to_pixels(images[3, 0]["pixel_values"]), expected)


BUCKETS = [0] * 7 + [2] * 2 + [1] * 4


def test_bucket_batches_hold_one_bucket_and_epochs_hold_every_image() -> None:
    order = BucketOrder(BUCKETS, 3, seed=0, batches=range(60))
    assert order.batches_per_epoch == 3 + 1 + 2
    batches = list(order)
    assert len(order) == len(batches) == 60
    for batch in batches:
        assert len(batch) == 3
        assert len({BUCKETS[index] for index, _ in batch}) == 1
    epochs = [batches[start : start + 6] for start in range(0, 60, 6)]
    for epoch in epochs:
        counts = np.bincount([index for batch in epoch for index, _ in batch], minlength=13)
        assert counts.min() >= 1
        assert counts[:7].max() == 2  # 9 places for 7 images
        assert [BUCKETS[batch[0][0]] for batch in epoch].count(0) == 3
    for batch in (batch for epoch in epochs for batch in epoch if BUCKETS[batch[0][0]] != 2):
        assert len({index for index, _ in batch}) == 3  # no image twice in a batch where the bucket has enough
    assert len({tuple(BUCKETS[batch[0][0]] for batch in epoch) for epoch in epochs}) > 3
    assert len({tuple(index for batch in epoch for index, _ in batch) for epoch in epochs}) == 10
    together = {frozenset(index for index, _ in batch) for batch in batches if BUCKETS[batch[0][0]] == 0}
    assert len(together) > 3  # an epoch's 3 batches are composed anew in the next
    assert len({seed for batch in batches for _, seed in batch}) == 180


def test_bucket_batches_resume_anywhere_and_processes_take_turns() -> None:
    whole = list(BucketOrder(BUCKETS, 3, seed=0, batches=range(40)))
    for start in (1, 5, 6, 7, 23):
        assert list(BucketOrder(BUCKETS, 3, seed=0, batches=range(start, 40))) == whole[start:]
    turns = [list(BucketOrder(BUCKETS, 3, seed=0, batches=range(process, 40, 2))) for process in (0, 1)]
    assert [batch for pair in zip(*turns, strict=True) for batch in pair] == whole
    assert list(BucketOrder(BUCKETS, 3, seed=1, batches=range(40))) != whole


def test_batches_of_buckets_collate_the_same_in_workers(tmp_path: Path) -> None:
    records = write_shapes(tmp_path / "images", [(10, 20), (20, 10), (16, 16), (64, 30), (8, 17)])
    columns = {"input_ids": torch.arange(5)[:, None]}
    images = CaptionedImages(records, columns, 16, False, True, buckets=[(16, 16), (8, 16), (24, 8)])
    order = BucketOrder(images.bucket_of_image, 2, 0, range(9))
    loaders = [DataLoader(images, batch_sampler=order, num_workers=workers) for workers in (0, 2)]
    for batch, again in zip(*loaders, strict=True):
        assert {name: rows.tolist() for name, rows in batch.items()} == {n: rows.tolist() for n, rows in again.items()}
        assert [list(batch["pixel_values"].shape[2:])] * 2 == batch["target_sizes"].tolist()
    # validation batches: each image once, whatever its bucket
    fixed = list(fixed_batches(images, 2))
    assert sorted(row for batch in fixed for row in batch["input_ids"].flatten().tolist()) == list(range(5))
    assert [len(batch["input_ids"]) for batch in fixed] == [1, 2, 2]


def test_cached_latents_are_sampled_from_the_posterior(tmp_path: Path) -> None:
    records = read(write_images(tmp_path / "images"))
    images = CaptionedImages(records, {"input_ids": torch.zeros(4, 2)}, 8, center_crop=True, random_flip=False)
    pixels = images[0, 0]["pixel_values"]
    images.cache_latents(lambda batch: (batch, torch.full_like(batch, 0.5)), batch_size=3, progress=False)
    first, again, other = (images[0, seed]["latents"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0.3 < float((first - pixels).std()) < 0.7


def test_cached_buckets_hold_centred_crops_with_their_sizes_and_repeats_are_encoded_once(tmp_path: Path) -> None:
    records = write_shapes(tmp_path / "images", [(10, 20), (20, 10), (16, 16), (64, 30), (8, 17)])
    buckets = [(16, 16), (8, 16), (24, 8)]
    columns = {"input_ids": torch.arange(15)[:, None]}
    images = CaptionedImages(records * 3, columns, 16, center_crop=False, random_flip=True, buckets=buckets)
    centred = CaptionedImages(records * 3, columns, 16, center_crop=True, random_flip=False, buckets=buckets)
    batches: list[tuple[int, ...]] = []

    def encode(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batches.append(tuple(pixels.shape))
        return pixels * 2, torch.zeros_like(pixels)

    images.cache_latents(encode, batch_size=4, progress=False)
    assert sorted(batches) == [(1, 3, 16, 16), (2, 3, 8, 16), (2, 3, 24, 8)]
    for index in range(15):
        item, expected = images[index, 7], centred[index, 7]
        assert torch.equal(item.pop("latents"), expected.pop("pixel_values") * 2)
        assert {name: row.tolist() for name, row in item.items()} == {n: row.tolist() for n, row in expected.items()}
    sizes = [item["original_sizes"].tolist() for item in (images[index, 0] for index in range(5))]
    assert sizes == [[10, 20], [20, 10], [16, 16], [64, 30], [8, 17]]


def test_seeds_differ_in_every_part() -> None:
    assert derive_seed(1, "a", 2) == derive_seed(1, "a", 2)
    assert len({derive_seed(1, 23), derive_seed(12, 3), derive_seed(1, 2, 3), derive_seed(3, 2, 1)}) == 4
    assert 0 <= derive_seed("x") < 2**63


def test_method_options_are_parsed_by_their_type() -> None:
    method = build_method("cntlora", ["ridge=0.5", "gauge=balanced"])
    assert isinstance(method, CNTLoRA)
    assert (method.ridge, method.gauge) == (0.5, "balanced")
