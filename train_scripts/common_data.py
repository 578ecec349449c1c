"""Captioned images for the training scripts: reading a folder or a hub dataset, decoding, crops, order of batches."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from common import derive_seed, seeded_generator
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from lorainit_diffusers.progress import progress_bar
from lorainit_diffusers.training.choices import INTERPOLATIONS
from lorainit_diffusers.training.data.captions import is_metadata
from lorainit_diffusers.training.data.files import list_folder
from lorainit_diffusers.training.data.folders import read_image_folder
from lorainit_diffusers.training.data.grouping import hold_out_pictures
from lorainit_diffusers.training.data.images import (
    DatasetImage,
    ImageRecord,
    check_images,
    decoded_sizes,
    image_size,
    load_image,
    shared_files,
)
from lorainit_diffusers.training.data.named_datasets import cast_images, encoded_images, load_splits, read_dataset
from lorainit_diffusers.training.data.notes import DataNotes, some
from lorainit_diffusers.training.data.splits import find_image_splits

# The reading itself is the package's; scripts and tests know it by these names.
__all__ = [
    "INTERPOLATIONS",
    "BucketOrder",
    "CaptionedImages",
    "DataNotes",
    "DataOrder",
    "DatasetImage",
    "ImageRecord",
    "caption_columns",
    "cast_images",
    "check_images",
    "choose_prompts",
    "encoded_images",
    "find_splits",
    "fixed_batches",
    "image_size",
    "image_to_tensor",
    "list_images",
    "load_image",
    "load_splits",
    "nearest_bucket",
    "parse_buckets",
    "read_data",
    "read_dataset",
    "read_image_folder",
    "warn_of_shared_files",
]


def list_images(folder: Path) -> list[Path]:
    """The image files of a folder and its subfolders, sorted; none if it is not there."""
    return list(list_folder(folder).images) if folder.is_dir() else []


def find_splits(directory: str | os.PathLike[str]) -> tuple[Path, Path | None]:
    """The training folder and, if there is one, the held-out folder that a data directory means.

    `data/train` and `data/heldout`, in any usual spelling, are found from `data` as well as from `data/train`; any
    other folder is the training set itself.
    """
    splits = find_image_splits(Path(directory), str(directory), DataNotes())
    return splits.train, splits.heldout


def read_data(args: argparse.Namespace, notes: DataNotes | None = None) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """Training and held-out images of the options' folder or dataset; the latter only where it has such a split.

    Every image has been decoded once. `--max_train_samples` keeps the first training images, of which each then counts
    `--repeats` times. `--validation_fraction` holds some of these out, copies of one picture together.

    Args:
        args: the options.
        notes: gets what was left out, what looks odd, and the images' sizes.

    Raises:
        FileNotFoundError: when a folder or file does not exist.
        ValueError: when something else is missing or unreadable; see `read_image_folder` and `read_dataset`.
    """
    notes = DataNotes() if notes is None else notes
    given = {"image_column": args.image_column, "caption_column": args.caption_column}
    columns: dict[str, str] = {option: column for option, column in given.items() if column is not None}
    if args.dataset_name is not None:
        records, heldout = read_dataset(
            args.dataset_name,
            config_name=args.dataset_config_name,
            cache_dir=args.cache_dir,
            prompt=args.instance_prompt,
            max_train_samples=args.max_train_samples,
            notes=notes,
            **columns,
        )
    else:
        flag = "--train_data_dir" if args.instance_data_dir is None else "--instance_data_dir"
        directory = Path(args.train_data_dir if args.instance_data_dir is None else args.instance_data_dir)
        if not directory.is_dir():
            raise FileNotFoundError(f"{flag} {str(directory)!r} is not a directory; give a folder of images")
        check_class_folder_apart(directory, flag, args)
        splits = find_image_splits(directory, f"{flag} {str(directory)!r}", notes)
        read = partial(
            read_image_folder, flag=flag, prompt=args.instance_prompt, notes=notes, root=splits.root, **columns
        )
        parts = [splits.train, *([] if splits.heldout is None else [splits.heldout])]
        if directory not in parts:
            around = list_folder(directory, skip=[*parts, *splits.skip])
            around.report(directory, notes, used=[path for path in around.others if is_metadata(path)])
        records = read(splits.train, skip=splits.skip)[: args.max_train_samples]
        heldout = [] if splits.heldout is None else read(splits.heldout)
    fraction = getattr(args, "validation_fraction", None)  # a comparison holds images out in its own way
    if fraction is not None:
        flag = f"--validation_fraction {fraction}"
        if heldout:
            raise ValueError(f"{flag}: the data have a held-out part of their own; leave it out")
        records, heldout = hold_out_pictures(records, fraction, load_image, flag)
    warn_of_shared_files(records, heldout, "held-out images are also trained on, so that their loss says little", notes)
    sizes = decoded_sizes([*records, *heldout])
    notes.sizes |= {"training": sizes[: len(records)], "held out": sizes[len(records) :]}
    return records * args.repeats, heldout


def warn_of_shared_files(
    first: Sequence[ImageRecord], second: Sequence[ImageRecord], what: str, notes: DataNotes
) -> None:
    """Note images of the second that are the same files as some of the first; `what` says what is wrong with it."""
    shared = shared_files(first, second)
    if shared:
        notes.warn(f"{len(shared):,d} {what}: {some([str(record.path) for record in shared])}")


def check_class_folder_apart(directory: Path, flag: str, args: argparse.Namespace) -> None:
    """See that the images of the class are not in the folder of the subject, nor the other way round.

    Raises:
        ValueError: when they are: class images would be trained on as the subject.
    """
    class_dir = getattr(args, "class_data_dir", None)
    if class_dir is None:
        return
    subject, of_class = directory.resolve(), Path(class_dir).resolve()
    if subject.is_relative_to(of_class) or of_class.is_relative_to(subject):
        raise ValueError(
            f"--class_data_dir {class_dir!r} and {flag} {str(directory)!r} lie within each other, so that images would "
            "be of both; give two folders that do not"
        )


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
        with progress_bar(desc="caching latents", total=total, shown=progress) as bar:
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
