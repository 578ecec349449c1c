"""The questions of a run: of files, or of a dataset, and which of them are held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from lorainit_diffusers.training.data.grouping import content_keys, hold_out
from lorainit_diffusers.training.data.images import DatasetImage, ImageRecord, limited, load_image
from lorainit_diffusers.training.data.named_datasets import cast_images, load_splits
from lorainit_diffusers.training.data.notes import print_once
from lorainit_diffusers.training.data.splits import validation_split
from lorainit_diffusers.training.questions.conversations import QuestionRecord, read_questions, read_record, text_of
from lorainit_diffusers.training.questions.options import QuestionDataOptions

VALIDATION_FRACTION = 0.1


def read_question_data(options: QuestionDataOptions) -> tuple[list[QuestionRecord], list[QuestionRecord]]:
    """Training and validation questions of the options' files or dataset; every image has been decoded once.

    Raises:
        FileNotFoundError: When a file or an image does not exist.
        ValueError: When a line cannot be understood or an image cannot be read; naming file and line.
    """
    columns = {"image": options.image_column, "question": options.question_column, "answer": options.answer_column}
    validation: list[QuestionRecord] = []
    if options.dataset_name is not None:
        records, validation = read_question_dataset(options, options.dataset_name, columns)
    else:
        read = partial(
            read_questions,
            image_dir=options.image_dir,
            columns=columns,
            system_prompt=options.system_prompt,
            allow_outside=options.allow_images_outside,
        )
        records = read(str(options.train_data_file), flag="--train_data_file")
        if options.validation_data_file is not None:
            validation = read(options.validation_data_file, flag="--validation_data_file")
    records, validation = (
        [replace(record, images=tuple(limited(record.images, options.max_image_pixels))) for record in part]
        for part in (records, validation)
    )
    if not validation or options.validation_fraction is not None:
        records, validation = hold_out_questions(records, options.validation_fraction or VALIDATION_FRACTION)
        return records[: options.max_train_samples], validation[: options.max_validation_samples]
    records, validation = records[: options.max_train_samples], validation[: options.max_validation_samples]
    _warn_of_shared_images(records, validation)
    return records, validation


def read_question_dataset(
    options: QuestionDataOptions, dataset: str, columns: Mapping[str, str]
) -> tuple[list[QuestionRecord], list[QuestionRecord]]:
    """Training and validation rows of a dataset of the `datasets` library; images stay encoded where they are."""
    flag = f"--dataset_name {dataset!r}"
    datasets, splits = load_splits(dataset, options.dataset_config_name, options.cache_dir)

    def read_split(split: str, limit: int | None) -> list[QuestionRecord]:
        rows = splits[split] if limit is None else splits[split].select(range(min(limit, len(splits[split]))))
        image_columns = [name for name in (columns["image"], "images") if name in rows.column_names]
        if not image_columns:
            raise ValueError(
                f"{flag}, split {split}, has no column {columns['image']!r} (it has {', '.join(rows.column_names)}); "
                "set --image_column"
            )
        for name in image_columns:
            kind = datasets.Image(decode=False)
            rows = cast_images(rows, name, kind if _is_single(rows.features[name]) else [kind], flag)
        texts = rows.remove_columns(image_columns)
        images = [rows.select_columns([name]) for name in image_columns]
        records: list[QuestionRecord] = []
        for index, row in enumerate(texts):
            line = {name: value for name, value in row.items() if value is not None}
            found: list[DatasetImage] = []
            for name, column in zip(image_columns, images, strict=True):
                if _is_single(column.features[name]):
                    found.append(DatasetImage(column, name, index))
                else:
                    found += [_ListedImage(column, name, index, place) for place in range(len(column[index][name]))]

            labels = {id(image): f" image {number}" if len(found) > 1 else "" for number, image in enumerate(found, 1)}

            def find_image(image: Any, where: str, labels: Mapping[int, str] = labels) -> ImageRecord:
                return ImageRecord(Path(f"{where}{labels[id(image)]}"), "", image)

            where = f"{dataset}/{split}[{index}]"
            records.append(
                read_record({**line, columns["image"]: found}, where, find_image, columns, options.system_prompt)
            )
        if not records:
            raise ValueError(f"{flag}, split {split}, has no rows; give a dataset that has some")
        return records

    heldout = validation_split(list(splits), classes=False)
    use_split = heldout is not None and options.validation_fraction is None
    validation = read_split(cast(str, heldout), options.max_validation_samples) if use_split else []
    return read_split("train", options.max_train_samples if validation else None), validation


@dataclass(frozen=True)
class _ListedImage(DatasetImage):
    """One image of a row that has several."""

    place: int = 0

    def __call__(self) -> bytes:
        encoded = self.dataset[self.row][self.column][self.place]
        if encoded is None or encoded["bytes"] is None:
            raise ValueError(f"column {self.column!r}, image {self.place + 1} is empty")
        return encoded["bytes"]


def _is_single(feature: Any) -> bool:
    """Whether a column of a dataset holds one image a row, not a list of them."""
    return not isinstance(feature, (list, tuple)) and type(feature).__name__ not in ("Sequence", "List", "LargeList")


def hold_out_questions(
    records: Sequence[QuestionRecord], fraction: float
) -> tuple[list[QuestionRecord], list[QuestionRecord]]:
    """A part of the images, with all of their questions, for validation; the same whatever the run's seed is.

    Questions that have images on both sides are on neither, which is said. Of questions without images it is those of
    the same wording that stay together.

    Raises:
        ValueError: When none can be held out, or an image cannot be read.
    """
    samples = _contents(records)
    try:
        found = hold_out(samples, fraction)
    except ValueError as error:
        if len(set(samples[0]).union(*samples)) == 1:
            raise ValueError(
                "no question can be held out: all are about one image; give more images, or --validation_data_file"
            ) from error
        raise ValueError(
            "no question can be held out: they share their images in such a way that each would be trained on, too; "
            "give questions about other images as --validation_data_file"
        ) from error
    if found.neither:
        print_once(
            f"left out {len(found.neither)} of {len(records)} questions (such as {records[found.neither[0]].where}): "
            "they have images that are trained on beside images that are held out; --validation_data_file leaves out "
            "none"
        )
    return [records[index] for index in found.train], [records[index] for index in found.validation]


def _contents(records: Sequence[QuestionRecord]) -> list[frozenset[str]]:
    """What each question is about: its images by their pixels, or its text where it has none.

    Every image is decoded once.

    Raises:
        ValueError: Naming an image that cannot be read.
    """
    images = list(dict.fromkeys(image for record in records for image in record.images))
    keys = dict(zip(images, content_keys(images, load_image), strict=True))
    return [
        frozenset(keys[image] for image in record.images)
        or frozenset(["\n".join(text_of(message) for message in record.messages[:-1])])
        for record in records
    ]


def _warn_of_shared_images(records: Sequence[QuestionRecord], validation: Sequence[QuestionRecord]) -> None:
    """Say how many validation questions are about images that are trained on; every image is decoded once."""
    contents = _contents([*records, *validation])
    known = frozenset[str]().union(*contents[: len(records)])
    shared = [r for r, keys in zip(validation, contents[len(records) :], strict=True) if keys & known]
    if shared:
        print_once(
            f"warning: {len(shared)} of {len(validation)} validation questions are about images that are trained on "
            f"(such as {shared[0].where}), so the scores are not those on new images; take them out of one part, or "
            "set --validation_fraction"
        )
