"""Images and their classes: a folder for each class, or a dataset with labels."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorainit_diffusers.families.classifier import ImagePreparation
from lorainit_diffusers.progress import progress_bar
from lorainit_diffusers.training.classification.options import (
    DEFAULT_VALIDATION_FRACTION,
    LABEL_COLUMNS,
    ClassDataOptions,
)
from lorainit_diffusers.training.data.files import child_folders, list_folder
from lorainit_diffusers.training.data.grouping import content_keys, hold_out_of_classes, picture_key
from lorainit_diffusers.training.data.images import (
    DatasetImage,
    ImageRecord,
    check_resized,
    decoding,
    limited,
    load_image,
)
from lorainit_diffusers.training.data.named_datasets import encoded_images, load_splits
from lorainit_diffusers.training.data.notes import DataNotes, some
from lorainit_diffusers.training.data.prior_preservation import list_images
from lorainit_diffusers.training.data.splits import find_class_splits, validation_split
from lorainit_diffusers.training.seeds import seeded_generator


@dataclass(frozen=True)
class ClassData:
    """Images with the names of their classes as captions.

    Attributes:
        train: Training images.
        validation: Images to validate on.
        class_names: Sorted or in the dataset's order; each has training images.
        source: Folder or name, for messages.
        notes: What reading left out, and what looks odd.
    """

    train: list[ImageRecord]
    validation: list[ImageRecord]
    class_names: tuple[str, ...]
    source: str
    notes: DataNotes = field(default_factory=DataNotes, compare=False)


def read_classes(options: ClassDataOptions) -> ClassData:
    """The images of the options' folder or dataset; they are decoded only where a part is chosen by their content.

    Raises:
        FileNotFoundError: When a folder does not exist.
        ValueError: When there are fewer than two classes, a class has no training images or too few of them, or the
            validation part has a class that the training part lacks; names it.
    """
    if options.dataset_name is not None:
        data = read_class_dataset(options, options.dataset_name)
    else:
        data = read_class_folder(str(options.train_data_dir))
    limit = options.max_image_pixels
    data = replace(data, train=limited(data.train, limit), validation=limited(data.validation, limit))
    data = check_classes(data)
    if options.validation_fraction is not None or not data.validation:
        fraction = options.validation_fraction or DEFAULT_VALIDATION_FRACTION
        data = split_off_validation(data, fraction, options.data_seed)
    if options.shots is not None:
        data = replace(data, train=few_shots(data, options.shots, options.data_seed))
    if options.max_train_samples is not None:
        data = replace(data, train=_draw(data.train, options.max_train_samples, options.data_seed, "train"))
        data = check_classes(data, remedy="raise --max_train_samples, or use --shots")
    if options.max_validation_samples is not None:
        data = replace(
            data, validation=_draw(data.validation, options.max_validation_samples, options.data_seed, "validation")
        )
    return data


def read_class_folder(directory: str) -> ClassData:
    """A folder per class: in the directory, or in its training folder and its validation or test folder.

    `data/train` finds the validation part beside it, too. `find_class_splits` says what a split is.

    Raises:
        FileNotFoundError: When there is no such directory.
        ValueError: When it has no folders of images, or images lie beside them.
    """
    folder, flag = Path(directory), f"--train_data_dir {directory!r}"
    if not folder.is_dir():
        raise FileNotFoundError(f"{flag} is not a directory; give one that has a folder of images for each class")
    notes = DataNotes()
    splits = find_class_splits(folder, flag, notes)
    list_folder(folder).report(folder, notes)
    names = tuple(path.name for path in class_folders(splits.train) if path not in splits.skip)
    if not names:
        raise ValueError(
            f"{flag} has no class folders in it; put the images of each class into a folder of the class's name, such "
            f"as {splits.train / 'cat' / 'one.png'}"
        )
    train = read_class_images(splits.train, flag, skip=splits.skip)
    validation = [] if splits.heldout is None else read_class_images(splits.heldout, flag)
    absent = sorted(set(names) - {record.caption for record in validation}) if validation else []
    if absent:
        notes.warn(f"{len(absent)} of {len(names)} classes have no validation images ({some(absent)})")
    return ClassData(train, validation, names, flag, notes)


class_folders = child_folders


def read_class_images(folder: Path, flag: str, *, skip: Collection[Path] = ()) -> list[ImageRecord]:
    """The images of a folder of class folders.

    Args:
        folder: The folder.
        flag: Says in messages what the folder belongs to.
        skip: Folders in it that are no classes.

    Raises:
        ValueError: For a class without images.
    """
    records: list[ImageRecord] = []
    for path in class_folders(folder):
        if path in skip:
            continue
        images = list_images(path)
        if not images:
            raise ValueError(f"{flag}: class {path.name!r} has no images in {str(path)!r}; add some or remove it")
        records += [ImageRecord(image, path.name) for image in images]
    return records


def read_class_dataset(options: ClassDataOptions, dataset: str) -> ClassData:
    """A dataset of the `datasets` library, whose images stay encoded where they are.

    Raises:
        ValueError: When the dataset cannot be loaded, or lacks a split, a column or a label.
    """
    flag = f"--dataset_name {dataset!r}"
    datasets, splits = load_splits(dataset, options.dataset_config_name, options.cache_dir)
    columns: list[str] = splits["train"].column_names
    image_column = options.image_column or "image"
    label_column = options.label_column or next((name for name in LABEL_COLUMNS if name in columns), "label")
    for option, column in (("--image_column", image_column), ("--label_column", label_column)):
        if column not in columns:
            raise ValueError(f"{flag} has no column {column!r} (it has {', '.join(columns)}); set {option}")
    feature = splits["train"].features[label_column]
    names: list[str] | None = getattr(feature, "names", None)

    def read(split: str) -> list[ImageRecord]:
        rows = splits[split]
        images = encoded_images(datasets, rows, image_column, flag)
        records: list[ImageRecord] = []
        for row, label in enumerate(rows[label_column]):
            if not _is_class(label, names):
                raise ValueError(
                    f"{flag}: {split}[{row}] has the label {label!r} in the column {label_column!r}, which is no "
                    "class; remove these rows, or set --label_column"
                )
            name = str(label) if names is None else names[label]
            path = Path(dataset) / f"{split}[{row}]"
            records.append(ImageRecord(path, name, DatasetImage(images, image_column, row)))
        return records

    train = read("train")
    if not train:
        raise ValueError(f"{flag}: the split train has no rows; give a dataset that has some")
    validation, notes = validation_split(list(splits), classes=True), DataNotes()
    unused = [f"{split} with {len(splits[split]):,d} rows" for split in splits if split not in ("train", validation)]
    notes.leave_out("splits that are not used", unused)
    used = {record.caption for record in train}
    ordered = [name for name in names if name in used] if names is not None else sorted(used, key=natural_order)
    return ClassData(train, [] if validation is None else read(validation), tuple(ordered), flag, notes)


def _is_class(label: Any, names: Sequence[str] | None) -> bool:
    """Whether a value of the label column is a class: a text, or a whole number that counts where names do."""
    if label is None or isinstance(label, (list, dict, float)) or not str(label).strip():
        return False
    return names is None or label >= 0


def natural_order(name: str) -> tuple[int, str]:
    """Sorts numbers by their size, before texts."""
    return (int(name), "") if name.isdigit() else (1 << 62, name)


def check_classes(data: ClassData, remedy: str = "") -> ClassData:
    """See that there are two classes, and training images of each.

    Raises:
        ValueError: Naming the class.
    """
    if len(data.class_names) < 2:
        only = f"only the class {data.class_names[0]!r}" if data.class_names else "no classes"
        raise ValueError(f"{data.source} has {only}; a classifier needs at least two")
    trained = {record.caption for record in data.train}
    absent = [name for name in data.class_names if name not in trained]
    if absent:
        raise ValueError(
            f"{data.source}: class {absent[0]!r} has no training images; {remedy or 'add some or remove it'}"
        )
    unknown = sorted({record.caption for record in data.validation} - set(data.class_names))
    if unknown:
        raise ValueError(
            f"{data.source}: class {unknown[0]!r} of the validation images has no training images; add some, or remove "
            "it from both"
        )
    return data


def split_off_validation(data: ClassData, fraction: float, seed: int) -> ClassData:
    """Move this share of each class's training images, one at least, to the validation images.

    Copies of a picture, in whatever files, stay on one side. A class of one picture keeps it for training.

    Raises:
        ValueError: When no class has two different images, or an image cannot be read.
    """

    def shuffle(name: str, indices: list[int]) -> list[int]:
        order = torch.randperm(len(indices), generator=seeded_generator(seed, "validation", name)).tolist()
        return [indices[place] for place in order]

    keys = content_keys(data.train, load_image)
    held = hold_out_of_classes(keys, [record.caption for record in data.train], fraction, shuffle)
    if not held:
        raise ValueError(f"{data.source}: no class has two images, so none can be validated on; add images")
    train = [record for index, record in enumerate(data.train) if index not in held]
    return replace(data, train=train, validation=[data.train[index] for index in sorted(held)])


def few_shots(data: ClassData, shots: int, seed: int) -> list[ImageRecord]:
    """So many training images of each class, no two alike. More shots with the same seed include those of fewer.

    Raises:
        ValueError: For a class that has fewer different ones, or an image that cannot be read.
    """
    chosen: list[ImageRecord] = []
    for name in data.class_names:
        members = [record for record in data.train if record.caption == name]
        different: dict[str, ImageRecord] = {}
        for record in _shuffled(members, seed, "shots", name):
            different.setdefault(picture_key(load_image(record)), record)
            if len(different) == shots:
                break
        if len(different) < shots:
            kind = "training images" if len(different) == len(members) else "different training images"
            raise ValueError(f"--shots {shots}: class {name!r} has {len(different)} {kind}; lower it, or add images")
        chosen += different.values()
    return _in_order(chosen, data.train)


def _shuffled(records: Sequence[ImageRecord], seed: int, *parts: str) -> list[ImageRecord]:
    order = torch.randperm(len(records), generator=seeded_generator(seed, *parts)).tolist()
    return [records[index] for index in order]


def _draw(records: Sequence[ImageRecord], count: int, seed: int, purpose: str) -> list[ImageRecord]:
    return _in_order(_shuffled(records, seed, "samples", purpose)[:count], records)


def _in_order(some: Sequence[ImageRecord], everything: Sequence[ImageRecord]) -> list[ImageRecord]:
    chosen = {id(record) for record in some}
    return [record for record in everything if id(record) in chosen]


def load_pixels(records: Sequence[ImageRecord], preparation: ImagePreparation) -> Tensor:
    """The images as the base sees them, before augmentation: (n, 3, resolution, resolution) uint8.

    Raises:
        ValueError: Naming the first one that cannot be read.
    """
    side = preparation.shorter_side

    def crop(record: ImageRecord) -> Tensor:
        with decoding(record):
            image = load_image(record)
            check_resized(record, (image.height, image.width), (side, side))
            return preparation.crop(image)

    with ThreadPoolExecutor() as pool:
        pixels = pool.map(crop, records)
        bar = progress_bar(pixels, total=len(records), desc="reading images", shown=len(records) >= 1000)
        return torch.stack(list(bar))
