"""Captioned images: decoded, cropped and scaled one by one, or as latents that are encoded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from lorainit_diffusers.progress import progress_bar
from lorainit_diffusers.training.data.buckets import nearest_bucket
from lorainit_diffusers.training.data.images import ImageRecord, check_resized, image_size, load_image
from lorainit_diffusers.training.data.masks import load_mask
from lorainit_diffusers.training.seeds import derive_seed


class Draw(NamedTuple):
    """What is drawn for one crop, which an image, its mask and its conditioning image share.

    Attributes:
        place: (2,) float64 in [0, 1): of the left and the upper edge in what is spare there; `None` is the centre.
        mirrored: Whether the crop is mirrored.
    """

    place: Tensor | None
    mirrored: bool


def draw_crop(center_crop: bool, random_flip: bool, generator: torch.Generator) -> Draw:
    """The numbers for one crop; a centred one that is never mirrored draws none."""
    place = None if center_crop else torch.rand(2, generator=generator, dtype=torch.float64)
    return Draw(place, random_flip and torch.rand(1, generator=generator).item() < 0.5)


def cut(
    image: Image.Image, size: tuple[int, int], draw: Draw, interpolation: str
) -> tuple[Image.Image, tuple[int, int]]:
    """Resize to cover `size`, (height, width), and crop; returns what `image_to_tensor` does, as an image."""
    height, width = size
    scale = max(width / image.width, height / image.height)
    covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if covering != image.size:
        image = image.resize(covering, Image.Resampling[interpolation.upper()])
    spare = torch.tensor([covering[0] - width, covering[1] - height])
    if draw.place is None:
        left, top = (spare // 2).tolist()
    else:
        left, top = (draw.place * (spare + 1)).long().tolist()
    image = image.crop((left, top, left + width, top + height))
    if draw.mirrored:
        image, left = ImageOps.mirror(image), covering[0] - (left + width)
    return image, (top, left)


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1.0


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
    cropped, corner = cut(image, size, draw_crop(center_crop, random_flip, generator), interpolation)
    return _to_tensor(cropped), corner


class CaptionedImages(Dataset[dict[str, Tensor]]):
    """Images, what belongs to each, and the sizes that SDXL is conditioned on.

    Its keys are `(index, seed)`: crop, flip and posterior sample are functions of the seed. An item holds:

    - `pixel_values`, (3, height, width) in [-1, 1], or `latents` once they are cached;
    - `loss_mask`, (1, height, width) in [0, 1], where the set has masks: the same crop of the image's mask, or 1
      everywhere; of the latents' size once they are cached;
    - `conditioning_images`, as `pixel_values`, or `conditioning_latents`, where the images have one beside them;
    - the image's row of each of `columns`, such as token ids;
    - `original_sizes`, `crop_top_lefts`, `target_sizes`: int64 (2,), vertical first. The image before it is resized,
      the crop's corner in the resized image, and the crop.

    Args:
        records: The images.
        columns: Tensors with one row an image.
        resolution: Side of the square crops, unless there are buckets.
        center_crop: Crop the centre instead of a random place.
        random_flip: Mirror half of the draws.
        interpolation: One of `INTERPOLATIONS`.
        buckets: (height, width) of the crops: each image has that of the nearest aspect, `bucket_of_image`.
        masked: Whether items have a `loss_mask`; by default where any record has a mask.

    Raises:
        ValueError: For an image that becomes a giant where it is resized to cover its crop.
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
        masked: bool | None = None,
    ) -> None:
        self.records, self.columns = records, columns
        self.masked = any(record.mask is not None for record in records) if masked is None else masked
        self.center_crop, self.random_flip, self.interpolation = center_crop, random_flip, interpolation
        self.buckets = [(resolution, resolution)] if buckets is None else list(buckets)
        self.bucket_of_image = [0] * len(records)
        unique = list(dict.fromkeys(records))
        with ThreadPoolExecutor() as pool:
            sizes = dict(zip(unique, pool.map(image_size, unique), strict=True))
        if len(self.buckets) > 1:
            self.bucket_of_image = [nearest_bucket(sizes[record], self.buckets) for record in records]
        for record, bucket in dict(zip(records, self.bucket_of_image, strict=True)).items():
            check_resized(record, sizes[record], self.buckets[bucket])
            if record.conditioning is not None:
                check_resized(record.conditioning, image_size(record.conditioning), self.buckets[bucket])
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
        record, size = self.records[index], self.buckets[self.bucket_of_image[index]]
        image, draw = load_image(record), draw_crop(center_crop, random_flip, generator)
        cropped, corner = cut(image, size, draw, self.interpolation)
        item = {
            "pixel_values": _to_tensor(cropped),
            "original_sizes": torch.tensor([image.height, image.width]),
            "crop_top_lefts": torch.tensor(corner),
            "target_sizes": torch.tensor(size),
        }
        if self.masked:
            item["loss_mask"] = torch.ones(1, *size) if record.mask is None else _mask(record.mask, size, draw)
        if record.conditioning is not None:
            seen, _ = cut(load_image(record.conditioning), size, draw, self.interpolation)
            item["conditioning_images"] = _to_tensor(seen)
        return item

    def cache_latents(self, encode: Callable[[Tensor], tuple[Tensor, Tensor]], batch_size: int, progress: bool) -> None:
        """Encode the centre of every image once; from then on items hold `latents`, freshly sampled.

        Args:
            encode: Pixels (n, 3, height, width) to the mean and standard deviation of the latents' posterior.
            batch_size: Images that are encoded at once.
            progress: Show a bar.
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
                    if "loss_mask" in batch:  # what the loss would make of it, in less memory
                        batch["loss_mask"] = F.interpolate(batch["loss_mask"], mean.shape[-2:], mode="area")
                    if "conditioning_images" in batch:
                        batch["conditioning_latents"] = encode(batch.pop("conditioning_images"))[0].cpu()
                    parts.append({**batch, "mean": mean.cpu(), "std": std.cpu()})
                    bar.update(len(chosen))
                cache[bucket] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        places = {bucket: {record: row for row, record in enumerate(unique)} for bucket, unique in members.items()}
        self._cache_rows = [
            places[bucket][record] for bucket, record in zip(self.bucket_of_image, self.records, strict=True)
        ]
        self._cache = cache


def _mask(record: ImageRecord, size: tuple[int, int], draw: Draw) -> Tensor:
    """(1, height, width) in [0, 1]: a mask in the crop of its image, bilinear, since other filters overshoot."""
    cropped, _ = cut(load_mask(record), size, draw, "bilinear")
    return torch.from_numpy(np.array(cropped, dtype=np.float32))[None] / 255.0


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
