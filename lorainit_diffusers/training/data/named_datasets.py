"""Datasets of the `datasets` library by name: their splits, their images still encoded, their captions."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from lorainit_diffusers.loading.hub import datasets_without_retries
from lorainit_diffusers.training.data.captions import clean_caption
from lorainit_diffusers.training.data.images import DatasetImage, ImageRecord
from lorainit_diffusers.training.data.notes import DataNotes, some
from lorainit_diffusers.training.data.splits import training_split, validation_split


def load_splits(name: str, config_name: str | None, cache_dir: str | None) -> tuple[Any, Any]:
    """The `datasets` library, and the splits of a dataset by name, of which one is for training.

    Raises:
        ValueError: When the library is missing, the dataset cannot be loaded, or it has no split `train`.
    """
    flag = f"--dataset_name {name!r}"
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(
            f'{flag} needs the package datasets ({error}); pip install "lorainit-diffusers[datasets]"'
        ) from error
    try:
        with datasets_without_retries(name):
            splits = datasets.load_dataset(name, config_name, cache_dir=cache_dir, trust_remote_code=False)
    except Exception as error:  # it raises what its many readers and its HTTP client raise
        raise ValueError(
            f"{flag} cannot be loaded ({type(error).__name__}: {error}); check the name, --dataset_config_name "
            "and the connection to the hub"
        ) from error
    if "train" in splits:
        return datasets, splits
    found = training_split(list(splits))
    if found is None:
        raise ValueError(f"{flag} has no split train (it has {', '.join(splits)}); give a dataset that has one")
    return datasets, {"train": splits[found], **{name: rows for name, rows in splits.items() if name != found}}


def encoded_images(datasets: Any, rows: Any, column: str, flag: str, option: str = "--image_column") -> Any:
    """The images of a split, one a row, as the bytes of their files.

    Raises:
        ValueError: When the column holds something else; `flag` names the dataset.
    """
    return cast_images(rows.select_columns([column]), column, datasets.Image(decode=False), flag, option)


def cast_images(rows: Any, column: str, kind: Any, flag: str, option: str = "--image_column") -> Any:
    """The rows with this column as images of a kind, `datasets.Image` or a list of it.

    Raises:
        ValueError: When the column holds something else; `flag` names the dataset.
    """
    try:
        return rows.cast_column(column, kind)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"{flag}: the column {column!r} holds no images but {rows.features[column]}; set {option}"
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
    notes: DataNotes | None = None,
    mask_column: str | None = None,
    conditioning_image_column: str | None = None,
) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """Training and held-out rows of a dataset of the `datasets` library, whose images stay encoded where they are.

    Held out is the split `heldout`, else `validation` in one of its spellings, if there is one. Of a list of captions
    the first counts.

    Args:
        name: Name on the hub, or a local folder that `datasets.load_dataset` takes.
        config_name: The dataset's configuration.
        cache_dir: Where downloads are kept.
        prompt: Caption for every image; the caption column is then not needed.
        image_column: Column of the images.
        caption_column: Column of the captions.
        max_train_samples: Keep the first so many training rows.
        notes: Gets what was left out.
        mask_column: Column of the masks; an empty place is an image without one.
        conditioning_image_column: Column of the conditioning images.

    Raises:
        ValueError: When `datasets` is missing, or the dataset, a split, a column or a caption.
    """
    flag, notes = f"--dataset_name {name!r}", DataNotes() if notes is None else notes
    datasets, splits = load_splits(name, config_name, cache_dir)
    wanted = {
        "--image_column": image_column,
        "--caption_column": caption_column if prompt is None else None,
        "--mask_column": mask_column,
        "--conditioning_image_column": conditioning_image_column,
    }

    def read_split(split: str, limit: int | None) -> list[ImageRecord]:
        rows = splits[split]
        for option, column in wanted.items():
            if column is not None and column not in rows.column_names:
                columns = ", ".join(rows.column_names)
                raise ValueError(f"{flag}, split {split}, has no column {column!r} (it has {columns}); set {option}")
        rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
        if len(rows) == 0:
            raise ValueError(f"{flag}, split {split}, has no rows; give a dataset that has some")
        images = encoded_images(datasets, rows, image_column, flag)
        texts = _captions(rows, split, prompt, caption_column, flag, notes)
        place = Path(name) / split
        masks, conditioning = (
            _further_images(datasets, rows, wanted[f"--{what}_column"], flag, what, place)
            for what in ("mask", "conditioning_image")
        )
        return [
            ImageRecord(
                Path(f"{place}[{row}]"),
                text,
                DatasetImage(images, image_column, row),
                mask=mask,
                conditioning=conditioning_image,
            )
            for row, (text, mask, conditioning_image) in enumerate(zip(texts, masks, conditioning, strict=True))
        ]

    heldout = validation_split(list(splits), classes=False)
    unused = [f"{split} with {len(splits[split]):,d} rows" for split in splits if split not in ("train", heldout)]
    notes.leave_out("splits that are not used", unused)
    return read_split("train", max_train_samples), [] if heldout is None else read_split(heldout, None)


def _captions(rows: Any, split: str, prompt: str | None, caption_column: str, flag: str, notes: DataNotes) -> list[str]:
    """The captions of a split's rows: the prompt, or a text or the first of a list of texts in the column.

    Raises:
        ValueError: When a row has none.
    """
    captions: list[Any] = [prompt] * len(rows) if prompt is not None else list(rows[caption_column])
    several = [row for row, caption in enumerate(captions) if isinstance(caption, list) and len(caption) > 1]
    names = (f"{split}[{row}]" for row in several)
    notes.leave_out("rows with several captions, of which the first is used", names)
    captions = [(each[0] if each else None) if isinstance(each, list) else each for each in captions]
    texts = [clean_caption(caption) if isinstance(caption, str) else "" for caption in captions]
    missing = [f"{split}[{row}]" for row, text in enumerate(texts) if not text]
    if missing:
        raise ValueError(
            f"{flag}: {len(missing)} of {len(texts)} rows have no text in the column {caption_column!r}: "
            f"{some(missing)}; set --caption_column, remove these rows, or give --instance_prompt"
        )
    return texts


def _further_images(
    datasets: Any, rows: Any, column: str | None, flag: str, what: str, place: Path
) -> list[ImageRecord | None]:
    """The masks or conditioning images of a split's rows; None without a column, and where the place is empty.

    Args:
        datasets: The library.
        rows: Of the split.
        column: Of the images.
        flag: Names the dataset in messages.
        what: The images are, as the option of the column has it.
        place: Of the split, for messages.
    """
    if column is None:
        return [None] * len(rows)
    images = encoded_images(datasets, rows, column, flag, f"--{what}_column")
    is_empty: list[bool] = images.data.column(column).is_null().to_pylist()
    return [
        None if empty else ImageRecord(Path(f"{place}[{row}] ({what})"), "", DatasetImage(images, column, row))
        for row, empty in enumerate(is_empty)
    ]
