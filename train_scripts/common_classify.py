"""Images and their classes for a classifier: options, a folder per class or a hub dataset, evaluation, report."""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from common import evaluating, print_once, seeded_generator
from common_banner import data_source, header_sizes
from common_classify_options import DEFAULT_VALIDATION_FRACTION as DEFAULT_VALIDATION_FRACTION
from common_classify_options import LABEL_COLUMNS, check_classification_arguments, make_augmentation
from common_classify_options import add_classification_arguments as add_classification_arguments
from common_data import (
    DataOrder,
    DatasetImage,
    ImageRecord,
    encoded_images,
    list_images,
    load_image,
    load_splits,
)
from common_run import lora_targets
from common_tasks import STAGES, stage_label, stages
from PIL import Image
from torch import Tensor

from lorainit_diffusers import adapters
from lorainit_diffusers.evaluation import sample_grid
from lorainit_diffusers.evaluation.classification import (
    OTHER,
    accuracy,
    class_accuracies,
    confusion_matrix,
    macro_accuracy,
    most_confused,
    plot_accuracy,
    plot_confusion,
)
from lorainit_diffusers.evaluation.document import Block, Cell, Heading, Picture, Table, Text, to_html
from lorainit_diffusers.families.base import ModelFamily
from lorainit_diffusers.families.classifier import COMPONENT, ClassifierFamily, ImagePreparation
from lorainit_diffusers.files import csv_cell, replacing, write_text
from lorainit_diffusers.progress import progress_bar
from lorainit_diffusers.training.banner import Line, class_lines, count_line, size_lines
from lorainit_diffusers.training.best import best_line
from lorainit_diffusers.training.data.files import child_folders, list_folder
from lorainit_diffusers.training.data.grouping import content_keys, hold_out_of_classes, picture_key
from lorainit_diffusers.training.data.notes import DataNotes, some
from lorainit_diffusers.training.data.splits import find_class_splits, validation_split

# Images at once where nothing is kept for a backward pass.
EVALUATION_BATCH_SIZE = 64
# Images of the report for each of the most frequent mistakes.
NUM_EXAMPLES = 6


# ---------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class ClassData:
    """Images with the names of their classes as captions.

    Attributes:
        train: training images.
        validation: images to validate on.
        class_names: sorted or in the dataset's order; each has training images.
        source: folder or name, for messages.
        notes: what reading left out, and what looks odd.
    """

    train: list[ImageRecord]
    validation: list[ImageRecord]
    class_names: tuple[str, ...]
    source: str
    notes: DataNotes = field(default_factory=DataNotes, compare=False)


def read_classes(args: argparse.Namespace) -> ClassData:
    """The images of the options' folder or dataset; they are decoded only where a part is chosen by their content.

    Raises:
        FileNotFoundError: when a folder does not exist.
        ValueError: when there are fewer than two classes, a class has no training images or too few of them, or the
            validation part has a class that the training part lacks; names it.
    """
    if args.dataset_name is not None:
        data = read_class_dataset(args)
    else:
        data = read_class_folder(args.train_data_dir)
    data = check_classes(data)
    if args.validation_fraction is not None or not data.validation:
        fraction = args.validation_fraction or DEFAULT_VALIDATION_FRACTION
        data = split_off_validation(data, fraction, args.data_seed)
    if args.shots is not None:
        data = replace(data, train=few_shots(data, args.shots, args.data_seed))
    if args.max_train_samples is not None:
        data = replace(data, train=_draw(data.train, args.max_train_samples, args.data_seed, "train"))
        data = check_classes(data, remedy="raise --max_train_samples, or use --shots")
    if args.max_validation_samples is not None:
        data = replace(
            data, validation=_draw(data.validation, args.max_validation_samples, args.data_seed, "validation")
        )
    return data


def read_class_folder(directory: str) -> ClassData:
    """A folder per class: in the directory, or in its training folder and its validation or test folder.

    `data/train` finds the validation part beside it, too. `find_class_splits` says what a split is.

    Raises:
        FileNotFoundError: when there is no such directory.
        ValueError: when it has no folders of images, or images lie beside them.
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
        folder: the folder.
        flag: says in messages what the folder belongs to.
        skip: folders in it that are no classes.

    Raises:
        ValueError: for a class without images.
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


def read_class_dataset(args: argparse.Namespace) -> ClassData:
    """A dataset of the `datasets` library, whose images stay encoded where they are.

    Raises:
        ValueError: when the dataset cannot be loaded, or lacks a split, a column or a label.
    """
    flag = f"--dataset_name {args.dataset_name!r}"
    datasets, splits = load_splits(args.dataset_name, args.dataset_config_name, args.cache_dir)
    columns: list[str] = splits["train"].column_names
    image_column = args.image_column or "image"
    label_column = args.label_column or next((name for name in LABEL_COLUMNS if name in columns), "label")
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
            path = Path(args.dataset_name) / f"{split}[{row}]"
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
        ValueError: naming the class.
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
        ValueError: when no class has two different images, or an image cannot be read.
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
        ValueError: for a class that has fewer different ones, or an image that cannot be read.
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
        ValueError: naming the first one that cannot be read.
    """
    with ThreadPoolExecutor() as pool:
        pixels = pool.map(lambda record: preparation.crop(load_image(record)), records)
        bar = progress_bar(pixels, total=len(records), desc="reading images", shown=len(records) >= 1000)
        return torch.stack(list(bar))


# ---------------------------------------------------------------------------------------------------------------- task


class ClassificationTask:
    """A classifier with its images, which are decoded once and kept as bytes.

    Attributes:
        primary_metric: name of what curves and comparisons are about; more is better.
        family: the base: `family.adapted`, `family.heads`, `family.loss`.
        classifier: the same, with what only classifiers have.
        targets: layers that get an adapter, by component.
        data: what the images are.
        num_train: training images.
        num_validation: validation images.
    """

    primary_metric = "accuracy"

    def __init__(
        self, args: argparse.Namespace, device: torch.device, dtype: torch.dtype, data: ClassData | None = None
    ) -> None:
        check_classification_arguments(args)
        self.device, self.dtype = device, dtype
        self.data = read_classes(args) if data is None else check_classes(data)
        self.preparation = ImagePreparation.from_pretrained(
            args.pretrained_model_name_or_path,
            resolution=args.resolution,
            revision=args.revision,
            cache_dir=args.cache_dir,
        )
        index = {name: number for number, name in enumerate(self.data.class_names)}
        self.train_images = load_pixels(self.data.train, self.preparation)
        self.validation_images = load_pixels(self.data.validation, self.preparation)
        self._warn_of_copies()
        self.train_labels = torch.tensor([index[record.caption] for record in self.data.train])
        self.validation_labels = torch.tensor([index[record.caption] for record in self.data.validation])
        self.num_train, self.num_validation = len(self.data.train), len(self.data.validation)
        self._load(args)

    def _warn_of_copies(self) -> None:
        """Say how many validation images are trained on, too, where the data came in two parts."""
        train, validation = (
            [hashlib.blake2b(image.numpy().tobytes()).digest() for image in images]
            for images in (self.train_images, self.validation_images)
        )
        known = set(train)
        pairs = zip(self.data.validation, validation, strict=True)
        copies = [record.path.name for record, key in pairs if key in known]
        if copies:
            print_once(
                f"warning: {len(copies)} of {len(self.data.validation)} validation images are trained on, too (such as "
                f"{copies[0]!r}), so the accuracy is not that on new images; remove them from one part, or set "
                "--validation_fraction"
            )

    def anew(self, args: argparse.Namespace) -> ClassificationTask:
        """The same images with a base that nothing has been done to, for other options on the base and its training."""
        task = copy.copy(self)
        task._load(args)
        return task

    def _load(self, args: argparse.Namespace) -> None:
        self.args = args
        self._probabilities: Tensor | None = None
        self.classifier = ClassifierFamily.from_pretrained(
            args.pretrained_model_name_or_path,
            class_names=self.data.class_names,
            head=args.head,
            head_seed=args.data_seed,
            preparation=self.preparation,
            revision=args.revision,
            cache_dir=args.cache_dir,
            weight_dtype=self.dtype,
            device=self.device,
            augmentation=make_augmentation(args),
            label_smoothing=args.label_smoothing,
            mixup_alpha=args.mixup_alpha,
        )
        self.family: ModelFamily = self.classifier
        self.targets = lora_targets(args, self.family, COMPONENT)
        self._check_targets()

    def _check_targets(self) -> None:
        """See that adapters are for linear layers, and none for the head.

        Raises:
            ValueError: naming the layer.
        """
        for name in adapters.target_layers(self.classifier.model, self.targets[COMPONENT]):
            if f"{COMPONENT}.{name}" in self.family.heads:
                raise ValueError(f"--lora_layers names {name!r}, the head, which is trained in full; leave it out")

    def data_lines(self) -> list[Line]:
        """For the banner: images, classes, sizes, and what was left out."""
        parts = {"training": self.data.train, "validation": self.data.validation}
        labels = {name: [record.caption for record in records] for name, records in parts.items()}
        sizes = header_sizes([*self.data.train, *self.data.validation])
        side = self.preparation.resolution
        return [
            count_line({name: len(records) for name, records in parts.items()}, data_source(self.args)),
            *class_lines(labels, self.data.class_names),
            *size_lines(sizes, [(side, side)] * len(sizes)),
            *self.data.notes.lines(),
        ]

    # ---- training

    def batches(self, seed: int, batch_size: int, numbers: Iterable[int]) -> Iterator[dict[str, Tensor]]:
        """The training batches of these numbers; batch k is a function of (seed, k) alone."""
        for keys in DataOrder(self.num_train, batch_size, seed, cast(range, numbers)):
            chosen = torch.tensor([index for index, _ in keys])
            yield {"pixel_values": self.train_images[chosen], "labels": self.train_labels[chosen]}

    # ---- evaluation

    def validate(self) -> dict[str, float]:
        """Accuracy and cross entropy on the validation images, without augmentation and label smoothing."""
        logits = self._validation_logits()
        correct = logits.argmax(1) == self.classifier.outputs[self.validation_labels]
        return {"accuracy": int(correct.sum()) / self.num_validation, "validation_loss": self._cross_entropy(logits)}

    def evaluate(self) -> dict[str, float]:
        """Accuracy, its mean over the classes, and cross entropy; `write_results` writes the answers.

        An answer may be any label of the model, not only one of the data's classes.
        """
        logits = self._validation_logits()
        self._probabilities = logits.softmax(1)
        confusion = confusion_matrix(self.validation_labels, self._answers(), len(self.data.class_names))
        return {
            "accuracy": accuracy(confusion),
            "macro_accuracy": macro_accuracy(confusion),
            "validation_loss": self._cross_entropy(logits),
        }

    def _validation_logits(self) -> Tensor:
        with evaluating(self.family.adapted.values()):
            chunks = self.validation_images.split(EVALUATION_BATCH_SIZE)
            bar = progress_bar(chunks, desc="validating", leave=False)
            return torch.cat([self.classifier.logits(chunk).cpu() for chunk in bar])

    def _cross_entropy(self, logits: Tensor) -> float:
        return float(F.cross_entropy(logits, self.classifier.outputs[self.validation_labels]))

    def _answers(self) -> Tensor:
        """The latest evaluation's answers: (n,) classes, `OTHER` for a label that is none."""
        assert self._probabilities is not None
        class_of_output = torch.full((self._probabilities.shape[1],), OTHER)
        class_of_output[self.classifier.outputs] = torch.arange(len(self.data.class_names))
        return class_of_output[self._probabilities.argmax(1)]

    # ---- files

    def write_results(self, output_dir: Path, name: str) -> None:
        """Write the latest evaluation: `predictions_<name>.jsonl`, `confusion_<name>.png`, and `per_class.csv` anew.

        Raises:
            ValueError: when nothing has been evaluated.
        """
        if self._probabilities is None:
            raise ValueError("there is no evaluation to write: call evaluate first")
        classes, answers = self.data.class_names, self._answers()
        labels = {output: label for label, output in self.classifier.labels.items()}
        own = self._probabilities.gather(1, self.classifier.outputs[self.validation_labels][:, None])[:, 0]
        best = self._probabilities.max(1)
        with (
            replacing(output_dir / f"predictions_{name}.jsonl") as scratch,
            scratch.open("w", encoding="utf-8") as file,
        ):
            for row, record in enumerate(self.data.validation):
                line = {
                    "image": record.path.as_posix(),
                    "class": record.caption,
                    "answer": classes[answers[row]] if answers[row] != OTHER else labels[int(best.indices[row])],
                    "probability": round(float(best.values[row]), 6),
                    "class_probability": round(float(own[row]), 6),
                }
                file.write(json.dumps(line) + "\n")
        confusion = confusion_matrix(self.validation_labels, answers, len(classes))
        title = f"{name.replace('-', ' ')}: accuracy {accuracy(confusion):.3f}, rows add up to 1"
        plot_confusion(confusion, classes, output_dir / f"confusion_{name}.png", title)
        self._write_per_class(output_dir)

    def _confusions(self, output_dir: Path) -> dict[str, Tensor]:
        """Confusion matrices of the stages by what was written, by an earlier part of a resumed run, too."""
        return {
            stage: confusion_matrix(self.validation_labels, answers, len(self.data.class_names))
            for stage in STAGES
            if (answers := self._read_answers(output_dir, stage)) is not None
        }

    def _read_answers(self, output_dir: Path, stage: str) -> Tensor | None:
        path = output_dir / f"predictions_{stage}.jsonl"
        if not path.is_file():
            return None
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if [Path(line["image"]).name for line in lines] != [record.path.name for record in self.data.validation]:
            return None  # of other data; the same data may lie elsewhere now
        index = {name: number for number, name in enumerate(self.data.class_names)}
        return torch.tensor([index.get(line["answer"], OTHER) for line in lines])

    def _write_per_class(self, output_dir: Path) -> None:
        confusions = self._confusions(output_dir)
        shares = [class_accuracies(confusion) for confusion in confusions.values()]
        counts = torch.bincount(self.validation_labels, minlength=len(self.data.class_names)).tolist()
        path = output_dir / "per_class.csv"
        with replacing(path) as scratch, scratch.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["class", "images", *(f"accuracy_{stage}" for stage in confusions)])
            for row, name in enumerate(self.data.class_names):
                values = ["" if math.isnan(share[row]) else f"{share[row]:.4f}" for share in shares]
                writer.writerow([csv_cell(name), counts[row], *values])

    def write_report(self, output_dir: Path, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write `report.html`, one file with its pictures in it, and the pictures beside it."""
        by_stage, confusions = stages(lines), self._confusions(output_dir)
        classes, metric = self.data.class_names, self.primary_metric
        values = {stage: float(line[metric]) for stage, line in by_stage.items()}
        named = ", ".join(f"{stage_label(self.family, s).replace('-', ' ')} {value:.3f}" for s, value in values.items())
        lead = f"Accuracy on {self.num_validation} validation images of {len(classes)} classes: {named}."
        columns = [key for key in next(iter(by_stage.values()), {}) if key not in ("step", "stage")]
        rows = [
            [Cell(stage_label(self.family, stage)), *(Cell(f"{line[key]:.4f}") for key in columns)]
            for stage, line in by_stage.items()
        ]
        base = values.get("base")
        best = best_line(lines, metric, larger_is_better=True)
        best_step = None if best is None else int(best["step"])
        curve = plot_accuracy(lines, output_dir / "accuracy.png", name=metric, base=base, best_step=best_step)
        blocks: list[Block] = [
            Text(lead, lead=True),
            Table(["", *(key.replace("_", " ") for key in columns)], rows),
            Text(
                f"Trained on {self.num_train} images. Macro accuracy is the mean over the classes. An answer may be "
                "any of the model's labels."
            ),
            Heading("Accuracy over the steps"),
            Picture(curve, "accuracy over the steps"),
            Heading("Classes"),
            self._class_table(confusions),
        ]
        for stage in ("base", "end"):
            if stage in confusions:
                picture = Picture(output_dir / f"confusion_{stage}.png", f"confusion matrix, {stage}")
                blocks += [Heading(f"Confusion matrix, {stage}"), picture]
        if "end" in confusions and (pairs := most_confused(confusions["end"])):
            path = output_dir / "mistakes.png"
            answers = cast(Tensor, self._read_answers(output_dir, "end"))
            with replacing(path) as scratch:
                self._draw_mistakes(answers, pairs).save(scratch, format="PNG")
            blocks += [Heading("Most frequent mistakes"), Picture(path, "images of the most frequent mistakes")]
        title = f"{self.args.init} on {Path(self.args.train_data_dir or self.args.dataset_name).name}"
        write_text(output_dir / "report.html", to_html(title, blocks))

    def _class_table(self, confusions: Mapping[str, Tensor]) -> Table:
        shares = {stage: class_accuracies(confusion) for stage, confusion in confusions.items()}
        counts = torch.bincount(self.validation_labels, minlength=len(self.data.class_names)).tolist()
        rows: list[list[Cell]] = []
        for row, name in enumerate(self.data.class_names):
            cells = [Cell(name), Cell(str(counts[row]))]
            for stage, values in shares.items():
                change = values[row] - shares["base"][row] if stage == "end" and "base" in shares else 0.0
                verdict = "better" if change > 0 else "worse" if change < 0 else ""
                cells.append(Cell("–" if math.isnan(values[row]) else f"{values[row]:.2f}", verdict))
            rows.append(cells)
        return Table(["class", "images", *(stage.replace("-", " ") for stage in shares)], rows)

    def _draw_mistakes(self, answers: Tensor, pairs: Sequence[tuple[int, int, int]]) -> Image.Image:
        names = self.data.class_names
        side = self.preparation.resolution
        blank = Image.new("RGB", (side, side), (255, 255, 255))
        rows: dict[str, list[Image.Image]] = {}
        for label, answer, count in pairs:
            chosen = ((self.validation_labels == label) & (answers == answer)).nonzero()[:NUM_EXAMPLES, 0].tolist()
            pictures = [_picture(self.validation_images[index]) for index in chosen]
            rows[f"{names[label]}, called {names[answer]} ({count})"] = pictures + [blank] * (
                NUM_EXAMPLES - len(pictures)
            )
        return sample_grid(rows, [f"example {number}" for number in range(1, NUM_EXAMPLES + 1)], max_cell=160)

    @property
    def records(self) -> dict[str, Sequence[ImageRecord]]:
        """The images by what messages call them, for the identity of the data."""
        return {"training data": self.data.train, "validation data": self.data.validation}

    def save_processor(self, directory: Path) -> None:
        """Write the image processor beside the weights of a merged model."""
        self.preparation.save(directory)

    @property
    def usage(self) -> list[str]:
        """Python that loads the base as `model`, with the labels that the adapter was trained for."""
        base, lines = self.args.pretrained_model_name_or_path, ["from peft import PeftModel"]
        lines += ["from transformers import AutoModelForImageClassification", ""]
        if not self.classifier.has_new_head:
            return [*lines, f"model = AutoModelForImageClassification.from_pretrained({base!r})"]
        return [
            *lines,
            f"classes = {list(self.data.class_names)!r}",
            "model = AutoModelForImageClassification.from_pretrained(",
            f"    {base!r}, id2label=dict(enumerate(classes)), ignore_mismatched_sizes=True",
            ")",
        ]


def _picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
