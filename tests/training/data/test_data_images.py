"""Images whose metadata is odd are read all the same; those that cannot be read are named, whatever is raised."""

from __future__ import annotations

import json
import struct
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from lorainit_diffusers.families.image_preparation import ImagePreparation
from lorainit_diffusers.training.classification.data import load_pixels, read_classes
from lorainit_diffusers.training.classification.options import ClassifierTrainingOptions
from lorainit_diffusers.training.data import images
from lorainit_diffusers.training.data.captioned_images import CaptionedImages
from lorainit_diffusers.training.data.images import ImageRecord, decoded_sizes, image_size, load_image
from lorainit_diffusers.training.data.notes import DataNotes
from lorainit_diffusers.training.data.text_to_image import read_data
from lorainit_diffusers.training.options.text_to_image import StableDiffusionOptions
from lorainit_diffusers.training.questions.data import read_question_data
from lorainit_diffusers.training.questions.options import QuestionTrainingOptions

STORED = (np.arange(6 * 4 * 3).reshape(6, 4, 3) * 3).astype(np.uint8)  # 4 wide, 6 high


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """An EXIF block with the orientation 6, turned clockwise to be upright, and tags of any type."""
    tags = sorted(((0x0112, 3, 1, struct.pack("<H", 6)), *entries))
    offset, directory, body = 8 + 2 + 12 * len(tags) + 4, struct.pack("<H", len(tags)), b""
    for tag, kind, count, raw in tags:
        inline = len(raw) <= 4
        where = raw.ljust(4, b"\0") if inline else struct.pack("<I", offset + len(body))
        directory += struct.pack("<HHI", tag, kind, count) + where
        body += b"" if inline else raw
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", 0) + body


ODD = {
    "XResolution as text": (0x011A, 2, 3, b"72\0"),
    "ImageWidth as a rational": (0x0100, 5, 1, struct.pack("<II", 56, 1)),
    "ResolutionUnit as text": (0x0128, 2, 2, b"2\0"),
    "Make as a rational": (0x010F, 5, 1, struct.pack("<II", 1, 1)),
    "Make over zero": (0x010F, 5, 1, struct.pack("<II", 1, 0)),
    "a tag of an unknown type": (0x9999, 77, 1, b"abcd"),
    "text beyond the end": (0x010E, 2, 1 << 20, b"12345"),
    "DateTime as floats": (0x0132, 12, 2, struct.pack("<dd", 1.0, float("nan"))),
    "an IFD that points to itself": (0x8769, 4, 1, struct.pack("<I", 8)),
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("entry", ODD.values(), ids=ODD)
def test_odd_exif_tags_do_not_stop_an_image_and_it_is_turned(
    tmp_path: Path, suffix: str, entry: tuple[int, int, int, bytes]
) -> None:
    path = tmp_path / f"a.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(STORED).save(path, exif=exif(entry), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow says what it makes of the tags
        image = load_image(path)
        assert image_size(path) == (4, 6)
    assert image.size == (6, 4)
    if suffix != "jpg":
        assert np.array_equal(np.asarray(image), np.rot90(STORED, -1))


@pytest.mark.parametrize(
    "block", [b"Exif\0\0", b"Exif\0\0II*\0", b"Exif\0\0nothing", b"Exif\0\0II*\0\xff\xff\xff\x7f", exif()[:20]]
)
def test_broken_exif_blocks_do_not_stop_an_image(tmp_path: Path, block: bytes) -> None:
    Image.fromarray(STORED).save(tmp_path / "a.png", exif=block)
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.png")), STORED)
    assert image_size(tmp_path / "a.png") == (6, 4)


@pytest.mark.parametrize(
    ("kind", "raw", "turned"),
    [
        (2, b"6\0", True),
        (4, struct.pack("<I", 6), True),
        (5, struct.pack("<II", 6, 1), True),
        (2, b"up\0", False),
        (3, b"\x2a\0", False),
    ],
)
def test_orientations_of_other_types(tmp_path: Path, kind: int, raw: bytes, turned: bool) -> None:
    block = exif()
    count = 1 if kind != 2 else len(raw)
    if len(raw) > 4:
        entry, body = struct.pack("<HHII", 0x0112, kind, count, 26), raw
    else:
        entry, body = struct.pack("<HHI", 0x0112, kind, count) + raw.ljust(4, b"\0"), b""
    Image.fromarray(STORED).save(tmp_path / "a.png", exif=block[:16] + entry + bytes(4) + body)
    assert load_image(tmp_path / "a.png").size == ((6, 4) if turned else (4, 6))


@pytest.mark.parametrize(
    "error", [struct.error, KeyError, RuntimeError, MemoryError, RecursionError, AttributeError, OSError]
)
def test_whatever_a_decoder_raises_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    Image.fromarray(STORED).save(tmp_path / "a.png")

    def broken(_: Image.Image) -> None:
        raise error()

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", broken)
    with pytest.raises(
        ValueError, match=rf"cannot read the image '.*a\.png' \({error.__name__}\); repair or remove it"
    ):
        load_image(tmp_path / "a.png")


def test_broken_files_of_every_format_are_named(tmp_path: Path) -> None:
    Image.init()
    tried = 0
    for suffix in (
        "png",
        "jpg",
        "gif",
        "webp",
        "bmp",
        "tif",
        "avif",
        "jp2",
        "ico",
        "tga",
        "ppm",
        "dds",
        "pcx",
        "qoi",
        "icns",
    ):
        kind = Image.registered_extensions().get(f".{suffix}")
        if kind not in Image.SAVE or kind not in Image.OPEN:
            continue
        path = tmp_path / f"a.{suffix}"
        try:
            Image.effect_noise((64, 64), 90).convert("RGB").save(path)
        except (OSError, KeyError, ValueError):
            continue
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match=rf"cannot read the image '.*a\.{suffix}'"):
            load_image(path)
        path.write_bytes(b"")
        with pytest.raises(ValueError, match=rf"cannot read the image '.*a\.{suffix}'"):
            load_image(path)
        tried += 1
    assert tried >= 8


def test_sixteen_bits_of_other_formats_are_scaled_as_those_of_png(tmp_path: Path) -> None:
    (tmp_path / "dark.pgm").write_bytes(b"P5 2 1 65535\n" + struct.pack(">HH", 257, 65535))
    assert np.asarray(load_image(tmp_path / "dark.pgm"))[0, :, 0].tolist() == [1, 255]
    (tmp_path / "darker.pgm").write_bytes(b"P5 2 1 65535\n" + struct.pack(">HH", 0, 255))
    assert np.asarray(load_image(tmp_path / "darker.pgm"))[0, :, 0].tolist() == [0, 1]


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    Image.fromarray(np.array([[np.nan, 1.0]], dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"cannot read the image '.*a\.tif' \(it has values that are not finite\)"):
        load_image(tmp_path / "a.tif")


def test_sizes_are_those_of_the_turned_images(tmp_path: Path) -> None:
    Image.fromarray(STORED).save(tmp_path / "a.png")
    Image.fromarray(STORED).save(tmp_path / "b.png", exif=exif())
    records = [ImageRecord(tmp_path / name, "") for name in ("a.png", "b.png")]
    assert decoded_sizes(records) == [(6, 4), (4, 6)]


# ------------------------------------------------------------------------------------------------------------- giants


def save_giant(path: Path, size: tuple[int, int]) -> Path:
    Image.new("L", size).save(path)
    return path


def test_an_image_above_the_limit_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header is enough: the error names the file, its size and the flag, whoever asks."""
    path = save_giant(tmp_path / "giant.png", (300, 200))
    record = ImageRecord(path, "", max_pixels=59_999)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    for read in (load_image, image_size, lambda record: decoded_sizes([record])):
        with pytest.raises(ValueError, match=r"giant\.png' has 300 x 200 pixels, above --max_image_pixels 59999; make"):
            read(record)
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"an image of \d+ bytes has 300 x 200 pixels, above --max_image_pixels 1000"):
        load_image(path.read_bytes())


def test_an_image_at_the_limit_is_read(tmp_path: Path) -> None:
    path = save_giant(tmp_path / "a.png", (30, 20))
    assert load_image(ImageRecord(path, "", max_pixels=600)).size == (30, 20)


def test_a_photo_of_200_megapixels_passes_and_pillows_limit_stays(tmp_path: Path) -> None:
    """Pillow refuses it in words of its own, and warns from half of that on."""
    path = save_giant(tmp_path / "photo.png", (16_320, 12_240))
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_size(path) == (12_240, 16_320)
    assert before is not None
    assert before == Image.MAX_IMAGE_PIXELS
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path)


def test_giants_are_decoded_one_at_a_time_and_small_ones_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_room", images._Room(1000))
    sizes = [(40, 40)] * 4 + [(20, 20)] * 8
    records = [ImageRecord(save_giant(tmp_path / f"{k}.png", size), "") for k, size in enumerate(sizes)]
    held: list[int] = []
    peaks: list[tuple[int, int]] = []
    lock = threading.Lock()

    def watched(record: ImageRecord) -> Image.Image:
        image = load_image(record)
        with lock:
            held.append(image.width * image.height)
            peaks.append((len(held), sum(held)))
        time.sleep(0.02)
        with lock:
            held.remove(image.width * image.height)
        return image

    monkeypatch.setattr(images, "load_image", watched)
    assert decoded_sizes(records) == [(height, width) for width, height in sizes]
    assert all(count == 1 or pixels <= 1000 for count, pixels in peaks)
    assert max(count for count, _ in peaks) == 2


def test_a_strip_that_becomes_a_giant_is_refused(tmp_path: Path) -> None:
    """30,000 x 1 pixels that cover 512 x 512 are 8 GB."""
    record = ImageRecord(save_giant(tmp_path / "strip.png", (30_000, 1)), "")
    with pytest.raises(
        ValueError,
        match=r"strip\.png' of 30000 x 1 pixels becomes 15360000 x 512 where it covers 512 x 512, above",
    ):
        CaptionedImages([record], {}, 512, True, False)
    preparation = ImagePreparation(resolution=512, shorter_side=512)
    with pytest.raises(ValueError, match=r"becomes 15360000 x 512 .*--max_image_pixels 268435456; crop or"):
        load_pixels([record], preparation)
    assert load_pixels([record], ImagePreparation(resolution=8, shorter_side=8)).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("script", ["sd", "classifier", "vlm"])
def test_every_script_has_the_limit(tmp_path: Path, script: str) -> None:
    """Read from the data that the options name, before a base is loaded."""
    folder = tmp_path / "data"
    for name in ("red", "blue"):
        (folder / name).mkdir(parents=True)
        for k in range(2):
            Image.new("RGB", (30, 20), (k, 0, len(name))).save(folder / name / f"{k}.png")
    Image.new("RGB", (60, 50)).save(folder / "red" / "large.png")
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.png")]
    lines = [{"image": name, "question": "q", "answer": "a"} for name in names]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def read(limit: int) -> object:
        if script == "sd":
            places = {"instance_data_dir": str(folder), "instance_prompt": "x"}
            return read_data(StableDiffusionOptions(**places, max_image_pixels=limit), DataNotes())
        if script == "classifier":
            return read_classes(ClassifierTrainingOptions(train_data_dir=str(folder), max_image_pixels=limit))
        return read_question_data(
            QuestionTrainingOptions(train_data_file=str(folder / "train.jsonl"), max_image_pixels=limit)
        )

    with pytest.raises(ValueError, match=r"large\.png' has 60 x 50 pixels, above --max_image_pixels 2999; make it"):
        read(2999)
    assert read(3000)
