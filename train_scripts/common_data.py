"""Captioned images for the training scripts: checking a folder, decoding, cropping, the order of batches."""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import derive_seed, seeded_generator
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from tqdm.auto import tqdm

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")


@dataclass(frozen=True)
class ImageRecord:
    """One image file and its caption."""

    path: Path
    caption: str


def read_image_folder(
    directory: str | os.PathLike[str],
    *,
    flag: str,
    prompt: str | None = None,
    image_column: str = "file_name",
    caption_column: str = "text",
) -> list[ImageRecord]:
    """List the captioned images of a folder, and see that each can be decoded.

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
        ValueError: when there are no images, an image is unreadable, or captions are missing.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"{flag} {str(directory)!r} is not a directory; give a folder of images")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not paths:
        raise ValueError(f"{flag} {str(directory)!r} has no images in it ({' '.join(IMAGE_SUFFIXES)})")
    if prompt is not None:
        records = [ImageRecord(path, prompt) for path in paths]
    else:
        captions = _read_captions(folder, paths, image_column, caption_column)
        missing = [path.relative_to(folder).as_posix() for path in paths if not captions.get(path, "").strip()]
        if missing:
            raise ValueError(
                f"{flag} {str(directory)!r}: {len(missing)} of {len(paths)} images have no caption: "
                f"{_some(missing)}; add them to metadata.jsonl (columns {image_column}, {caption_column}) or put "
                "a .txt file beside each, or use --instance_data_dir with --instance_prompt"
            )
        records = [ImageRecord(path, captions[path].strip()) for path in paths]
    with ThreadPoolExecutor() as pool:
        checks = pool.map(lambda record: load_image(record.path).size, records)
        for _ in tqdm(checks, total=len(records), desc="reading images", disable=len(records) < 1000):
            pass
    return records


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


def read_data(args: argparse.Namespace) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """Training and held-out images; the latter only where the folder has a `heldout` split."""
    if args.instance_data_dir is not None:
        flag, directory = "--instance_data_dir", args.instance_data_dir
    else:
        flag, directory = "--train_data_dir", args.train_data_dir
    folder, heldout = find_splits(directory)
    options = {"image_column": args.image_column, "caption_column": args.caption_column}
    records = read_image_folder(folder, flag=flag, prompt=args.instance_prompt, **options)
    if heldout is None:
        return records, []
    return records, read_image_folder(heldout, flag=flag, prompt=args.instance_prompt, **options)


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Decode an image to RGB: turned as its EXIF data says, transparency over white, 16 bits brought to 8.

    Raises:
        ValueError: when the file cannot be decoded; the message names it.
    """
    try:
        with Image.open(path) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
        if image.mode.startswith(("I", "F")):
            # Pillow clips these to 255 instead of scaling them
            values = np.asarray(image, dtype=np.float64)
            top = 65535.0 if values.max(initial=0.0) > 255.0 else 255.0
            image = Image.fromarray((values.clip(0.0, top) * (255.0 / top)).round().astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the image {str(path)!r} ({error}); repair or remove it") from error


def image_to_tensor(
    image: Image.Image, resolution: int, *, center_crop: bool, random_flip: bool, generator: torch.Generator
) -> Tensor:
    """Resize the shorter side, crop a square and scale to [-1, 1]: (3, resolution, resolution) float32."""
    scale = resolution / min(image.size)
    size = (max(resolution, round(image.width * scale)), max(resolution, round(image.height * scale)))
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    spare = torch.tensor([size[0] - resolution, size[1] - resolution])
    if center_crop:
        left, top = (spare // 2).tolist()
    else:
        left, top = (torch.rand(2, generator=generator, dtype=torch.float64) * (spare + 1)).long().tolist()
    image = image.crop((left, top, left + resolution, top + resolution))
    if random_flip and torch.rand(1, generator=generator).item() < 0.5:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1.0


class CaptionedImages(Dataset[dict[str, Tensor]]):
    """Images and token ids. Its keys are `(index, seed)`: crop, flip and posterior sample are functions of the seed."""

    def __init__(
        self, records: Sequence[ImageRecord], input_ids: Tensor, resolution: int, center_crop: bool, random_flip: bool
    ) -> None:
        self.records, self.input_ids, self.resolution = records, input_ids, resolution
        self.center_crop, self.random_flip = center_crop, random_flip
        self.posterior: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.records)

    def pixel_values(self, index: int, generator: torch.Generator) -> Tensor:
        """One image as `image_to_tensor` has it."""
        image = load_image(self.records[index].path)
        return image_to_tensor(
            image, self.resolution, center_crop=self.center_crop, random_flip=self.random_flip, generator=generator
        )

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        index, seed = key
        generator = torch.Generator().manual_seed(seed)
        if self.posterior is None:
            return {"pixel_values": self.pixel_values(index, generator), "input_ids": self.input_ids[index]}
        mean, std = self.posterior[0][index], self.posterior[1][index]
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        return {"latents": latents, "input_ids": self.input_ids[index]}

    def cache_latents(self, encode: Callable[[Tensor], tuple[Tensor, Tensor]], batch_size: int, progress: bool) -> None:
        """Encode every image once; from then on items hold `latents`, freshly sampled from the cached posterior."""
        generator = torch.Generator().manual_seed(0)
        starts = range(0, len(self), batch_size)
        encoded: list[tuple[Tensor, Tensor]] = []
        for start in tqdm(starts, desc="caching latents", disable=not progress):
            indices = range(start, min(start + batch_size, len(self)))
            mean, std = encode(torch.stack([self.pixel_values(index, generator) for index in indices]))
            encoded.append((mean.cpu(), std.cpu()))
        self.posterior = torch.cat([mean for mean, _ in encoded]), torch.cat([std for _, std in encoded])


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


def fixed_batches(images: CaptionedImages, batch_size: int = 4) -> Iterator[dict[str, Tensor]]:
    """The images in order, in batches that are the same in every call and whatever the training batch size is."""
    for start in range(0, len(images), batch_size):
        indices = range(start, min(start + batch_size, len(images)))
        yield default_collate([images[index, derive_seed("validation", index)] for index in indices])


def _some(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
