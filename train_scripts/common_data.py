"""Captioned images for the training scripts: reading a folder or a hub dataset, decoding, crops, order of batches."""

from __future__ import annotations

import argparse
import csv
import importlib
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from common import derive_seed, seeded_generator
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from tqdm.auto import tqdm

from lorainit_diffusers.training.choices import INTERPOLATIONS as INTERPOLATIONS

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
HELDOUT_SPLITS = ("heldout", "validation")


@dataclass(frozen=True)
class ImageRecord:
    """One image and its caption: a file, or a row of a dataset that `image` reads.

    Of a row, `path` is a label for messages, such as `owner/name/train[12]`.
    """

    path: Path
    caption: str
    image: Callable[[], bytes] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class DatasetImage:
    """Reads one row of a dataset whose column `column` has undecoded images, when it is called."""

    dataset: Any
    column: str
    row: int

    def __call__(self) -> bytes:
        """The encoded image.

        Raises:
            ValueError: when the row holds none.
        """
        image = self.dataset[self.row][self.column]
        if image is None or (image["bytes"] is None and not image["path"]):
            raise ValueError(f"column {self.column!r} is empty")
        if image["bytes"] is not None:
            return image["bytes"]
        opened: Any = fsspec.open(image["path"], "rb")  # a file, or one inside a zip archive
        with opened as file:
            return file.read()


def read_image_folder(
    directory: str | os.PathLike[str],
    *,
    flag: str,
    prompt: str | None = None,
    image_column: str = "file_name",
    caption_column: str = "text",
) -> list[ImageRecord]:
    """List the captioned images of a folder.

    Captions come from `prompt` (the same for all), else from `metadata.jsonl` or `metadata.csv` (the Hugging Face
    `imagefolder` layout), else from a `.txt` file beside each image.

    Args:
        directory: the folder; images in subfolders count.
        flag: the option that gave the folder, for error messages.
        prompt: caption for every image.
        image_column: metadata column of the file name, relative to the folder.
        caption_column: metadata column of the caption.

    Raises:
        FileNotFoundError: when the folder, or an image that the metadata names, does not exist.
        ValueError: when there are no images, or captions are missing.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"{flag} {str(directory)!r} is not a directory; give a folder of images")
    paths = list_images(folder)
    if not paths:
        raise ValueError(f"{flag} {str(directory)!r} has no images in it ({' '.join(IMAGE_SUFFIXES)})")
    if prompt is not None:
        return [ImageRecord(path, prompt) for path in paths]
    captions = _read_captions(folder, paths, image_column, caption_column)
    missing = [path.relative_to(folder).as_posix() for path in paths if not captions.get(path, "").strip()]
    if missing:
        raise ValueError(
            f"{flag} {str(directory)!r}: {len(missing)} of {len(paths)} images have no caption: "
            f"{_some(missing)}; add them to metadata.jsonl (columns {image_column}, {caption_column}) or put "
            "a .txt file beside each, or use --instance_data_dir with --instance_prompt"
        )
    return [ImageRecord(path, captions[path].strip()) for path in paths]


def list_images(folder: Path) -> list[Path]:
    """The image files of a folder and its subfolders, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def check_images(records: Sequence[ImageRecord]) -> None:
    """See that each image can be decoded.

    Raises:
        ValueError: naming the first one that cannot.
    """
    with ThreadPoolExecutor() as pool:
        checks = pool.map(lambda record: load_image(record).size, records)
        for _ in tqdm(checks, total=len(records), desc="reading images", disable=len(records) < 1000):
            pass


def _read_captions(folder: Path, paths: Sequence[Path], image_column: str, caption_column: str) -> dict[Path, str]:
    metadata = next((folder / name for name in ("metadata.jsonl", "metadata.csv") if (folder / name).is_file()), None)
    if metadata is None:
        texts = {path: path.with_suffix(".txt") for path in paths}
        return {path: text.read_text(encoding="utf-8") for path, text in texts.items() if text.is_file()}
    rows: list[dict[str, Any]] = []
    with metadata.open(encoding="utf-8", newline="") as file:
        if metadata.suffix == ".csv":
            rows = [dict(row) for row in csv.DictReader(file)]
        else:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    rows.append(dict(json.loads(line)))
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{str(metadata)!r}, line {number}: not a JSON object ({error})") from error
    columns = sorted({column for row in rows for column in row})
    for option, column in (("--image_column", image_column), ("--caption_column", caption_column)):
        if column not in columns:
            raise ValueError(
                f"{str(metadata)!r} has no column {column!r} (it has {', '.join(columns) or 'none'}); set {option}"
            )
    captions = {
        folder / str(row[image_column]): str(row.get(caption_column) or "") for row in rows if image_column in row
    }
    absent = [path.relative_to(folder).as_posix() for path in captions if not path.is_file()]
    if absent:
        raise FileNotFoundError(f"{str(metadata)!r} names images that do not exist: {_some(absent)}")
    return captions


def find_splits(directory: str | os.PathLike[str]) -> tuple[Path, Path | None]:
    """The training folder and, if there is one, the held-out folder that a data directory means.

    `data/train` and `data/heldout` are found from `data` as well as from `data/train`; any other folder is the training
    set itself.
    """
    folder = Path(directory)
    if folder.name != "train" and (folder / "train").is_dir():
        folder = folder / "train"
    heldout = folder.parent / "heldout"
    return folder, heldout if folder.name == "train" and heldout.is_dir() else None


def load_splits(name: str, config_name: str | None, cache_dir: str | None) -> tuple[Any, Any]:
    """The `datasets` library, and the splits of a dataset by name, of which one is for training.

    Raises:
        ValueError: when the library is missing, the dataset cannot be loaded, or it has no split `train`.
    """
    flag = f"--dataset_name {name!r}"
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(
            f'{flag} needs the package datasets ({error}); pip install "lorainit-diffusers[datasets]"'
        ) from error
    try:
        splits = datasets.load_dataset(name, config_name, cache_dir=cache_dir)
    except Exception as error:  # it raises what its many readers and its HTTP client raise
        raise ValueError(
            f"{flag} cannot be loaded ({type(error).__name__}: {error}); check the name, --dataset_config_name "
            "and the connection to the hub"
        ) from error
    if "train" not in splits:
        raise ValueError(f"{flag} has no split train (it has {', '.join(splits)}); give a dataset that has one")
    return datasets, splits


def encoded_images(datasets: Any, rows: Any, column: str, flag: str) -> Any:
    """The images of a split, one a row, as the bytes of their files.

    Raises:
        ValueError: when the column holds something else; `flag` names the dataset.
    """
    return cast_images(rows.select_columns([column]), column, datasets.Image(decode=False), flag)


def cast_images(rows: Any, column: str, kind: Any, flag: str) -> Any:
    """The rows with this column as images of a kind, `datasets.Image` or a list of it.

    Raises:
        ValueError: when the column holds something else; `flag` names the dataset.
    """
    try:
        return rows.cast_column(column, kind)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"{flag}: the column {column!r} holds no images but {rows.features[column]}; set --image_column"
        ) from error


def read_dataset(
    name: str,
    *,
    config_name: str | None = None,
    cache_dir: str | None = None,
    prompt: str | None = None,
    image_column: str = "image",
    caption_column: str = "text",
    max_train_samples: int | None = None,
) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """Training and held-out rows of a dataset of the `datasets` library, whose images stay encoded where they are.

    Held out is the split `heldout`, else `validation`, if there is one. Of a list of captions the first counts.

    Args:
        name: name on the hub, or a local folder that `datasets.load_dataset` takes.
        config_name: the dataset's configuration.
        cache_dir: where downloads are kept.
        prompt: caption for every image; the caption column is then not needed.
        image_column: column of the images.
        caption_column: column of the captions.
        max_train_samples: keep the first so many training rows.

    Raises:
        ValueError: when `datasets` is missing, or the dataset, a split, a column or a caption.
    """
    flag = f"--dataset_name {name!r}"
    datasets, splits = load_splits(name, config_name, cache_dir)

    def read_split(split: str, limit: int | None) -> list[ImageRecord]:
        rows = splits[split]
        for option, column in (("--image_column", image_column), ("--caption_column", caption_column)):
            if column not in rows.column_names and (option == "--image_column" or prompt is None):
                columns = ", ".join(rows.column_names)
                raise ValueError(f"{flag}, split {split}, has no column {column!r} (it has {columns}); set {option}")
        rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
        if len(rows) == 0:
            raise ValueError(f"{flag}, split {split}, has no rows; give a dataset that has some")
        images = encoded_images(datasets, rows, image_column, flag)
        captions = [prompt] * len(rows) if prompt is not None else [_first(text) for text in rows[caption_column]]
        texts = [caption.strip() if isinstance(caption, str) else "" for caption in captions]
        missing = [f"{split}[{row}]" for row, text in enumerate(texts) if not text]
        if missing:
            raise ValueError(
                f"{flag}: {len(missing)} of {len(texts)} rows have no text in the column {caption_column!r}: "
                f"{_some(missing)}; set --caption_column, remove these rows, or give --instance_prompt"
            )
        return [
            ImageRecord(Path(name) / f"{split}[{row}]", text, DatasetImage(images, image_column, row))
            for row, text in enumerate(texts)
        ]

    heldout = next((split for split in HELDOUT_SPLITS if split in splits), None)
    return read_split("train", max_train_samples), [] if heldout is None else read_split(heldout, None)


def read_data(args: argparse.Namespace) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """Training and held-out images of the options' folder or dataset; the latter only where it has such a split.

    Every image has been decoded once. `--max_train_samples` keeps the first training images, of which each then counts
    `--repeats` times.

    Raises:
        FileNotFoundError: when a folder or file does not exist.
        ValueError: when something else is missing or unreadable; see `read_image_folder` and `read_dataset`.
    """
    given = {"image_column": args.image_column, "caption_column": args.caption_column}
    columns: dict[str, str] = {option: column for option, column in given.items() if column is not None}
    if args.dataset_name is not None:
        records, heldout = read_dataset(
            args.dataset_name,
            config_name=args.dataset_config_name,
            cache_dir=args.cache_dir,
            prompt=args.instance_prompt,
            max_train_samples=args.max_train_samples,
            **columns,
        )
    else:
        if args.instance_data_dir is not None:
            flag, directory = "--instance_data_dir", args.instance_data_dir
        else:
            flag, directory = "--train_data_dir", args.train_data_dir
        folder, heldout_folder = find_splits(directory)
        records = read_image_folder(folder, flag=flag, prompt=args.instance_prompt, **columns)
        records = records[: args.max_train_samples]
        heldout: list[ImageRecord] = []
        if heldout_folder is not None:
            heldout = read_image_folder(heldout_folder, flag=flag, prompt=args.instance_prompt, **columns)
    check_images([*records, *heldout])
    return records * args.repeats, heldout


def load_image(source: ImageRecord | str | os.PathLike[str] | bytes) -> Image.Image:
    """Decode an image to RGB: turned as its EXIF data says, transparency over white, 16 bits brought to 8.

    Of an animation it is the first frame. The source is a record, a file, or an encoded image.

    Raises:
        ValueError: when the image cannot be decoded; the message names it.
    """
    try:
        with _open_image(source) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
            sixteen_bits = opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format == "PNG")
        if image.mode.startswith(("I", "F")):
            # Pillow clips these to 255 instead of scaling them. Other integers and floats do not say what white is:
            # the smallest usual maximum that holds them all
            values = np.asarray(image, dtype=np.float64)
            peak = values.max(initial=0.0)
            usual = (1.0, 255.0, 65535.0, 4294967295.0)
            white = 65535.0 if sixteen_bits else next((white for white in usual if peak <= white), peak)
            image = Image.fromarray((values.clip(0.0, white) * (255.0 / white)).round().astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        return image.convert("RGB")
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the image {_label(source)!r} ({error}); repair or remove it") from error


def image_size(source: ImageRecord | str | os.PathLike[str] | bytes) -> tuple[int, int]:
    """Height and width that `load_image` gives, from the image's header where that is enough.

    Raises:
        ValueError: when the header cannot be read; the message names the image.
    """
    try:
        with _open_image(source) as opened:
            if opened.format == "TIFF":
                opened.load()  # Pillow turns these by itself; whether their size is turned before varies by version
            turned = opened.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return (opened.width, opened.height) if turned else (opened.height, opened.width)
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the image {_label(source)!r} ({error}); repair or remove it") from error


def _open_image(source: ImageRecord | str | os.PathLike[str] | bytes) -> Image.Image:
    if isinstance(source, ImageRecord):
        source = source.path if source.image is None else source.image()
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _label(source: ImageRecord | str | os.PathLike[str] | bytes) -> str:
    if isinstance(source, bytes):
        return f"of {len(source)} bytes"
    return str(source.path if isinstance(source, ImageRecord) else source)


def image_to_tensor(
    image: Image.Image,
    size: tuple[int, int],
    *,
    center_crop: bool,
    random_flip: bool,
    generator: torch.Generator,
    interpolation: str = "lanczos",
) -> tuple[Tensor, tuple[int, int]]:
    """Resize to cover `size`, crop, and scale to [-1, 1].

    Returns:
        The crop, (3, height, width) float32, and its (top, left) in the resized image. Of a mirrored crop that is its
        place in the mirrored image, as in diffusers' SDXL scripts: the mirrored left is width - (left + crop width).
    """
    height, width = size
    scale = max(width / image.width, height / image.height)
    covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if covering != image.size:
        image = image.resize(covering, Image.Resampling[interpolation.upper()])
    spare = torch.tensor([covering[0] - width, covering[1] - height])
    if center_crop:
        left, top = (spare // 2).tolist()
    else:
        left, top = (torch.rand(2, generator=generator, dtype=torch.float64) * (spare + 1)).long().tolist()
    image = image.crop((left, top, left + width, top + height))
    if random_flip and torch.rand(1, generator=generator).item() < 0.5:
        image, left = ImageOps.mirror(image), covering[0] - (left + width)
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1.0, (top, left)


def parse_buckets(text: str, resolution: int, multiple: int) -> list[tuple[int, int]]:
    """The (height, width) of `--aspect_ratio_buckets`: `"1024,1024;768,1344"`, or `auto`.

    `auto` has the square of side `resolution`, and rectangles of about its area and never more, with aspects from 1:2
    to 2:1. Their sides are multiples of an eighth of the resolution, or of 8 `multiple` (the usual 64) if that is less.

    Args:
        text: what the user gave.
        resolution: side of the square, which is one of the automatic buckets.
        multiple: what the model needs each side to be a multiple of.

    Raises:
        ValueError: when the text is malformed or a side is not a multiple.
    """
    flag = "--aspect_ratio_buckets"
    buckets: list[tuple[int, int]] = []
    if text.strip() == "auto":
        step = multiple * min(8, max(1, resolution // (8 * multiple)))
        buckets.append((resolution, resolution))
        for width in range(step, 2 * resolution + 1, step):
            height = resolution**2 // (width * step) * step
            if max(height, width) <= 2 * min(height, width):
                buckets += [(height, width), (width, height)]
        buckets.sort(key=lambda bucket: bucket[0] / bucket[1])
    else:
        for part in text.strip().strip(";").split(";"):
            match = re.fullmatch(r"\s*([1-9]\d*)\s*,\s*([1-9]\d*)\s*", part)
            if match is None:
                raise ValueError(
                    f"{flag} {text!r}: {part!r} is not height,width; give auto, or pairs such as '1024,1024;768,1344'"
                )
            buckets.append((int(match[1]), int(match[2])))
    for height, width in buckets:
        if height % multiple or width % multiple:
            raise ValueError(f"{flag} {text!r}: the sides of {height},{width} are not multiples of {multiple}")
    return list(dict.fromkeys(buckets))


def nearest_bucket(size: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> int:
    """Index of the bucket whose aspect ratio is nearest to that of `size`, (height, width), on a log scale."""
    aspect = math.log(size[0] / size[1])
    distances = [abs(aspect - math.log(height / width)) for height, width in buckets]
    return distances.index(min(distances))


class CaptionedImages(Dataset[dict[str, Tensor]]):
    """Images, what belongs to each, and the sizes that SDXL is conditioned on.

    Its keys are `(index, seed)`: crop, flip and posterior sample are functions of the seed. An item holds:

    - `pixel_values`, (3, height, width) in [-1, 1], or `latents` once they are cached;
    - the image's row of each of `columns`, such as token ids;
    - `original_sizes`, `crop_top_lefts`, `target_sizes`: int64 (2,), vertical first. The image before it is resized,
      the crop's corner in the resized image, and the crop.

    Args:
        records: the images.
        columns: tensors with one row an image.
        resolution: side of the square crops, unless there are buckets.
        center_crop: crop the centre instead of a random place.
        random_flip: mirror half of the draws.
        interpolation: one of `INTERPOLATIONS`.
        buckets: (height, width) of the crops: each image has that of the nearest aspect, `bucket_of_image`.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        columns: dict[str, Tensor],
        resolution: int,
        center_crop: bool,
        random_flip: bool,
        *,
        interpolation: str = "lanczos",
        buckets: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        self.records, self.columns = records, columns
        self.center_crop, self.random_flip, self.interpolation = center_crop, random_flip, interpolation
        self.buckets = [(resolution, resolution)] if buckets is None else list(buckets)
        self.bucket_of_image = [0] * len(records)
        if len(self.buckets) > 1:
            with ThreadPoolExecutor() as pool:
                sizes = list(pool.map(image_size, records))
            self.bucket_of_image = [nearest_bucket(size, self.buckets) for size in sizes]
        self._cache: dict[int, dict[str, Tensor]] | None = None  # by bucket, one row an image
        self._cache_rows: list[int] = []

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        index, seed = key
        generator = torch.Generator().manual_seed(seed)
        if self._cache is None:
            item = self._crop(index, self.center_crop, self.random_flip, generator)
        else:
            cache = self._cache[self.bucket_of_image[index]]
            item = {name: rows[self._cache_rows[index]] for name, rows in cache.items()}
            mean, std = item.pop("mean"), item.pop("std")
            item["latents"] = mean + std * torch.randn(mean.shape, generator=generator)
        return {**item, **{name: column[index] for name, column in self.columns.items()}}

    def _crop(self, index: int, center_crop: bool, random_flip: bool, generator: torch.Generator) -> dict[str, Tensor]:
        image, size = load_image(self.records[index]), self.buckets[self.bucket_of_image[index]]
        pixel_values, corner = image_to_tensor(
            image,
            size,
            center_crop=center_crop,
            random_flip=random_flip,
            generator=generator,
            interpolation=self.interpolation,
        )
        return {
            "pixel_values": pixel_values,
            "original_sizes": torch.tensor([image.height, image.width]),
            "crop_top_lefts": torch.tensor(corner),
            "target_sizes": torch.tensor(size),
        }

    def cache_latents(self, encode: Callable[[Tensor], tuple[Tensor, Tensor]], batch_size: int, progress: bool) -> None:
        """Encode the centre of every image once; from then on items hold `latents`, freshly sampled.

        Args:
            encode: pixels (n, 3, height, width) to the mean and standard deviation of the latents' posterior.
            batch_size: images that are encoded at once.
            progress: show a bar.
        """
        generator = torch.Generator()  # a centred crop draws nothing
        members: dict[int, dict[ImageRecord, int]] = {}  # by bucket: a repeated image is encoded once
        for index, bucket in enumerate(self.bucket_of_image):
            members.setdefault(bucket, {}).setdefault(self.records[index], index)
        cache: dict[int, dict[str, Tensor]] = {}
        total = sum(len(unique) for unique in members.values())
        with tqdm(desc="caching latents", total=total, disable=not progress) as bar:
            for bucket, unique in members.items():
                indices, parts = list(unique.values()), list[dict[str, Tensor]]()
                for start in range(0, len(indices), batch_size):
                    chosen = indices[start : start + batch_size]
                    batch = default_collate([self._crop(index, True, False, generator) for index in chosen])
                    mean, std = encode(batch.pop("pixel_values"))
                    parts.append({**batch, "mean": mean.cpu(), "std": std.cpu()})
                    bar.update(len(chosen))
                cache[bucket] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        places = {bucket: {record: row for row, record in enumerate(unique)} for bucket, unique in members.items()}
        self._cache_rows = [
            places[bucket][record] for bucket, record in zip(self.bucket_of_image, self.records, strict=True)
        ]
        self._cache = cache


class DataOrder:
    """Batches of `(index, seed)`: each epoch is a permutation of the images, drawn from (seed, epoch).

    Batch k is a function of (seed, k) alone, so a run resumes at any batch, and processes take turns: of n processes,
    the i-th takes batches i, i + n, i + 2 n, ... Batches run over epoch ends: a small set may have large batches.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, batches: range) -> None:
        self.num_images, self.batch_size, self.seed, self.batches = num_images, batch_size, seed, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, []
        for batch in self.batches:
            keys: list[tuple[int, int]] = []
            for position in range(batch * self.batch_size, (batch + 1) * self.batch_size):
                if position // self.num_images != epoch:
                    epoch = position // self.num_images
                    generator = seeded_generator(self.seed, "order", epoch)
                    order = torch.randperm(self.num_images, generator=generator).tolist()
                keys.append((order[position % self.num_images], derive_seed(self.seed, "image", position)))
            yield keys


class BucketOrder:
    """Batches of `(index, seed)` whose images share a bucket; otherwise as `DataOrder`.

    An epoch is a random order of the batches of all buckets. Within it every image comes at least once: where a
    bucket's images do not fill its last batch, the first ones of its permutation come again. Batch k is a function of
    (seed, k) alone.
    """

    def __init__(self, bucket_of_image: Sequence[int], batch_size: int, seed: int, batches: range) -> None:
        self.batch_size, self.seed, self.batches = batch_size, seed, batches
        self.members: dict[int, list[int]] = {}
        for index, bucket in enumerate(bucket_of_image):
            self.members.setdefault(bucket, []).append(index)
        self.batches_per_epoch = sum(-(-len(images) // batch_size) for images in self.members.values())

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, []
        for batch in self.batches:
            if batch // self.batches_per_epoch != epoch:
                epoch = batch // self.batches_per_epoch
                order = self._epoch(epoch)
            indices = order[batch % self.batches_per_epoch]
            yield [
                (index, derive_seed(self.seed, "image", batch * self.batch_size + place))
                for place, index in enumerate(indices)
            ]

    def _epoch(self, epoch: int) -> list[list[int]]:
        batches: list[list[int]] = []
        for bucket, images in self.members.items():
            permutation = torch.randperm(len(images), generator=seeded_generator(self.seed, "order", epoch, bucket))
            shuffled = [images[place] for place in permutation.tolist()]
            batches += [
                [shuffled[place % len(images)] for place in range(start, start + self.batch_size)]
                for start in range(0, len(images), self.batch_size)
            ]
        order = torch.randperm(len(batches), generator=seeded_generator(self.seed, "batches", epoch))
        return [batches[place] for place in order.tolist()]


def choose_prompts(
    args: argparse.Namespace, records: Sequence[ImageRecord], heldout: Sequence[ImageRecord]
) -> dict[str, str]:
    """Column label -> prompt: the user's, or three of the training and three of the held-out captions."""
    prompts: dict[str, str] = {}
    if args.validation_prompt:
        prompts = {prompt: prompt for prompt in args.validation_prompt}
    elif args.instance_prompt is not None:
        prompts = {args.instance_prompt: args.instance_prompt}
    else:
        for kind, some in (("trained", records), ("held out", heldout)):
            captions = list(dict.fromkeys(record.caption for record in some))
            for caption in captions[:: max(1, -(-len(captions) // 3))]:
                prompts[f"{kind}: {caption}"] = caption
    if args.num_validation_images == 1:
        return prompts
    copies = range(1, args.num_validation_images + 1)
    return {f"{label} ({copy})": prompt for label, prompt in prompts.items() for copy in copies}


def caption_columns(
    records: Sequence[ImageRecord], encode: Callable[[list[str]], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """What `encode` makes of the captions, one row an image; each is encoded once, however many images have it."""
    captions = list(dict.fromkeys(record.caption for record in records))  # DreamBooth has one for all
    row_of = {caption: row for row, caption in enumerate(captions)}
    rows = torch.tensor([row_of[record.caption] for record in records])
    return {name: column[rows] for name, column in encode(captions).items()}


def fixed_batches(images: CaptionedImages, batch_size: int = 4) -> Iterator[dict[str, Tensor]]:
    """The images in order, in batches that are the same in every call and whatever the training batch size is.

    A batch holds one bucket: where there are several, their images come bucket by bucket.
    """
    indices = sorted(range(len(images)), key=images.bucket_of_image.__getitem__)
    for _, group in groupby(indices, key=images.bucket_of_image.__getitem__):
        members = list(group)
        for start in range(0, len(members), batch_size):
            chosen = members[start : start + batch_size]
            yield default_collate([images[index, derive_seed("validation", index)] for index in chosen])


def _first(captions: Any) -> Any:
    """The first of several captions; a single one as it is."""
    return next(iter(captions), None) if isinstance(captions, (list, tuple)) else captions


def _some(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
