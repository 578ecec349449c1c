"""Images of the data: a file or a row of a dataset, decoded to RGB whatever its format is."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from PIL import ExifTags, Image

from lorainit_diffusers.progress import progress_bar
from lorainit_diffusers.training.data.files import PLUGIN_SUFFIXES, image_suffixes

# EXIF's orientation -> how the stored image is turned to be upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Formats whose header does not say the size that decoding gives: Pillow turns TIFF by itself, and of icons it takes
# one.
_SIZED_BY_DECODING = ("TIFF", "ICO", "ICNS")
# Of one image, decoded or resized: a photo of 200 megapixels passes. A file of 20 kB may decode to gigabytes.
MAX_PIXELS = 2**28
_THREADS_PIXELS = 2**26  # that threads decode at the same time; a larger image is decoded alone
_opening = threading.Lock()


class TooManyPixelsError(ValueError):
    """An image is larger than the run's limit."""


@dataclass(frozen=True)
class ImageRecord:
    """One image and its caption: a file, or a row of a dataset that `image` reads.

    Of a row, `path` is a label for messages, such as `owner/name/train[12]`. An image of more than `max_pixels` is
    refused before it is decoded.

    Attributes:
        mask: How much each place of the image counts: white in full, black not at all. `None`: all of it.
        conditioning: An image that the model sees beside the noise.
    """

    path: Path
    caption: str
    image: Callable[[], bytes] | None = field(default=None, repr=False, compare=False)
    max_pixels: int = field(default=MAX_PIXELS, repr=False, compare=False)
    mask: ImageRecord | None = None
    conditioning: ImageRecord | None = None

    @property
    def beside(self) -> dict[str, ImageRecord]:
        """The mask and the conditioning image, those that there are, by what messages call them."""
        parts = {"mask": self.mask, "conditioning image": self.conditioning}
        return {kind: part for kind, part in parts.items() if part is not None}


@dataclass(frozen=True)
class DatasetImage:
    """Reads one row of a dataset whose column `column` has undecoded images, when it is called."""

    dataset: Any
    column: str
    row: int

    def __call__(self) -> bytes:
        """The encoded image.

        Raises:
            ValueError: When the row holds none.
        """
        image = self.dataset[self.row][self.column]
        if image is None or (image["bytes"] is None and not image["path"]):
            raise ValueError(f"column {self.column!r} is empty")
        if image["bytes"] is not None:
            return image["bytes"]
        opened: Any = fsspec.open(image["path"], "rb")  # a file, or one inside a zip archive
        with opened as file:
            return file.read()


def check_images(records: Sequence[ImageRecord]) -> None:
    """See that each image can be decoded.

    Raises:
        ValueError: Naming the first one that cannot.
    """
    decoded_sizes(records)


def decoded_sizes(records: Sequence[ImageRecord]) -> list[tuple[int, int]]:
    """(height, width) of each image, which is decoded for it.

    Raises:
        ValueError: Naming the first one that cannot.
    """

    def decoded_size(record: ImageRecord) -> tuple[int, int]:
        with decoding(record):
            image = load_image(record)
            return image.height, image.width

    with ThreadPoolExecutor() as pool:
        checks = pool.map(decoded_size, records)
        return list(progress_bar(checks, total=len(records), desc="reading images", shown=len(records) >= 1000))


def limited(records: Sequence[ImageRecord], max_pixels: int) -> list[ImageRecord]:
    """The records with the limit of the run, and so what lies beside them."""

    def parts(record: ImageRecord) -> dict[str, ImageRecord | None]:
        beside = {"mask": record.mask, "conditioning": record.conditioning}
        return {name: part and replace(part, max_pixels=max_pixels) for name, part in beside.items()}

    return [replace(record, max_pixels=max_pixels, **parts(record)) for record in records]


def check_resized(record: ImageRecord, size: tuple[int, int], covered: tuple[int, int]) -> None:
    """See that an image does not become a giant where it is resized to cover a crop: a strip of 30,000 x 1 does.

    Args:
        record: The image.
        size: Its height and width.
        covered: Those of the crop.

    Raises:
        TooManyPixelsError: When it does.
    """
    scale = max(covered[0] / size[0], covered[1] / size[1])
    height, width = (round(side * scale) for side in size)
    if height * width > record.max_pixels:
        raise TooManyPixelsError(
            f"the image {str(record.path)!r} of {size[1]} x {size[0]} pixels becomes {width} x {height} where it "
            f"covers {covered[1]} x {covered[0]}, above --max_image_pixels {record.max_pixels}; crop or remove it"
        )


class _Room:
    """How much threads decode at the same time."""

    def __init__(self, pixels: int) -> None:
        self.pixels, self.used, self.changed = pixels, 0, threading.Condition()

    @contextmanager
    def holding(self, pixels: int) -> Generator[None, None, None]:
        """Wait until there is room for an image; one that is larger than all of it waits until it is alone."""
        with self.changed:
            self.changed.wait_for(lambda: self.used == 0 or self.used + pixels <= self.pixels)
            self.used += pixels
        try:
            yield
        finally:
            with self.changed:
                self.used -= pixels
                self.changed.notify_all()


_room = _Room(_THREADS_PIXELS)


@contextmanager
def decoding(source: Any) -> Generator[None, None, None]:
    """Around what a thread of several does with a decoded image: giants are in memory one at a time."""
    try:
        with _open_image(source) as opened:
            pixels = opened.width * opened.height
    except Exception:  # who decodes it says it in words
        pixels = 0
    with _room.holding(pixels):
        yield


def shared_files(first: Sequence[ImageRecord], second: Sequence[ImageRecord]) -> list[ImageRecord]:
    """Those of the second that are files with the same bytes as one of the first; only files of equal size are read."""
    sides = [[record for record in dict.fromkeys(records) if record.image is None] for records in (first, second)]
    lengths = [{record: record.path.stat().st_size for record in records} for records in sides]
    common = set(lengths[0].values()) & set(lengths[1].values())

    def digest(record: ImageRecord) -> bytes:
        return hashlib.blake2b(record.path.read_bytes(), digest_size=16).digest()

    known = {digest(record) for record, length in lengths[0].items() if length in common}
    return [record for record, length in lengths[1].items() if length in common and digest(record) in known]


def load_image(source: ImageRecord | str | os.PathLike[str] | bytes) -> Image.Image:
    """Decode an image to RGB: turned as its EXIF data says, transparency over white, 16 bits brought to 8.

    Of an animation it is the first frame. The source is a record, a file, or an encoded image. A JPEG is decoded in
    full: reducing it on the way (`Image.draft`) gives other pixels than resizing it.

    Raises:
        TooManyPixelsError: When its header says that it is larger than the record's limit, or `MAX_PIXELS`.
        ValueError: When the image cannot be decoded; the message names it.
    """
    try:
        with _open_image(source) as opened:
            opened.load()
            turn = _TURNS.get(_orientation(opened))
            image = opened.copy() if turn is None else opened.transpose(turn)
            sixteen_bits = opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format in ("PNG", "PPM"))
        del opened  # or there are three of them in memory
        if not (image.width and image.height):
            raise ValueError(f"its size is {image.width} x {image.height}")
        if image.mode.startswith(("I", "F")):
            # Pillow clips these to 255 instead of scaling them. Other integers and floats do not say what white is:
            # the smallest usual maximum that holds them all
            values = np.asarray(image, dtype=np.float64)
            if not np.isfinite(values).all():
                raise ValueError("it has values that are not finite")
            peak = values.max(initial=0.0)
            usual = (1.0, 255.0, 65535.0, 4294967295.0)
            white = 65535.0 if sixteen_bits else next((white for white in usual if peak <= white), peak)
            image = Image.fromarray((values.clip(0.0, white) * (255.0 / white)).round().astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except TooManyPixelsError:
        raise
    except Exception as error:  # decoders raise what they like: struct.error, RuntimeError, KeyError, MemoryError ...
        raise _unreadable(source, error) from error


def image_size(source: ImageRecord | str | os.PathLike[str] | bytes) -> tuple[int, int]:
    """Height and width that `load_image` gives, from the image's header where that is enough.

    Raises:
        TooManyPixelsError: When it is larger than the record's limit, or `MAX_PIXELS`.
        ValueError: When the header cannot be read; the message names the image.
    """
    try:
        with _open_image(source) as opened:
            if opened.format in _SIZED_BY_DECODING:
                opened.load()
            turned = _orientation(opened) in (5, 6, 7, 8)
            return (opened.width, opened.height) if turned else (opened.height, opened.width)
    except TooManyPixelsError:
        raise
    except Exception as error:
        raise _unreadable(source, error) from error


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 where it says none; other tags may be broken, as their text matters to nobody here."""
    try:
        value: Any = image.getexif().get(ExifTags.Base.Orientation, 1)
        return int(value[0] if isinstance(value, (tuple, list)) else value)
    except Exception:  # of the many that a broken EXIF block raises: the pixels are fine
        return 1


def _open_image(source: ImageRecord | str | os.PathLike[str] | bytes) -> Image.Image:
    image_suffixes()  # registers the plug-ins that are installed
    limit, label = MAX_PIXELS, source
    if isinstance(source, ImageRecord):
        limit, label = source.max_pixels, source.path
        source = source.path if source.image is None else source.image()
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with _opening:  # Pillow's own limit is one for the whole process, and names neither the file nor a remedy
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = before
    if image.width * image.height > limit:
        size = f"{image.width} x {image.height} pixels"
        image.close()
        named = f"an image of {len(label)} bytes" if isinstance(label, bytes) else f"the image {str(label)!r}"
        raise TooManyPixelsError(
            f"{named} has {size}, above --max_image_pixels {limit}; make it smaller, leave it out, or raise the limit"
        )
    return image


def _unreadable(source: ImageRecord | str | os.PathLike[str] | bytes, error: Exception) -> ValueError:
    label, suffix = f"of {len(source)} bytes" if isinstance(source, bytes) else "", ""
    if not isinstance(source, bytes):
        path = source.path if isinstance(source, ImageRecord) else Path(source)
        label, suffix = str(path), path.suffix.lower()
    remedy = "repair or remove it"
    if suffix in PLUGIN_SUFFIXES and Image.registered_extensions().get(suffix) not in Image.OPEN:
        remedy = f"save it as PNG or JPEG, or install {PLUGIN_SUFFIXES[suffix]}, which reads such images"
    return ValueError(f"cannot read the image {label!r} ({str(error) or type(error).__name__}); {remedy}")
