"""The task of a classifier: its images in memory, their batches, and the evaluation."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lorainit_diffusers import adapters
from lorainit_diffusers.evaluation.classification import OTHER, accuracy, confusion_matrix, macro_accuracy
from lorainit_diffusers.families.base import ModelFamily, evaluating
from lorainit_diffusers.families.classifier import COMPONENT, ClassifierFamily, ImagePreparation
from lorainit_diffusers.progress import progress_bar
from lorainit_diffusers.training.banner import Line, class_lines, count_line, size_lines
from lorainit_diffusers.training.classification.data import ClassData, check_classes, load_pixels, read_classes
from lorainit_diffusers.training.classification.options import (
    ClassTaskOptions,
    make_augmentation,
    resolve_classification,
)
from lorainit_diffusers.training.classification.report import ClassPages
from lorainit_diffusers.training.data.images import ImageRecord
from lorainit_diffusers.training.data.notes import print_once
from lorainit_diffusers.training.data.order import DataOrder
from lorainit_diffusers.training.options.checks import TrainOptions
from lorainit_diffusers.training.run_banner import data_source, header_sizes
from lorainit_diffusers.training.start import lora_targets

# Images at once where nothing is kept for a backward pass.
EVALUATION_BATCH_SIZE = 64


class ClassificationTask:
    """A classifier with its images, which are decoded once and kept as bytes.

    Attributes:
        primary_metric: Name of what curves and comparisons are about; more is better.
        family: The base: `family.adapted`, `family.heads`, `family.loss`.
        classifier: The same, with what only classifiers have.
        targets: Layers that get an adapter, by component.
        data: What the images are.
        num_train: Training images.
        num_validation: Validation images.
    """

    primary_metric = "accuracy"

    def __init__(
        self, options: ClassTaskOptions, device: torch.device, dtype: torch.dtype, data: ClassData | None = None
    ) -> None:
        options = resolve_classification(options)
        self.device, self.dtype = device, dtype
        self.data = read_classes(options) if data is None else check_classes(data)
        self.preparation = ImagePreparation.from_pretrained(
            options.pretrained_model_name_or_path,
            resolution=options.resolution,
            revision=options.revision,
            cache_dir=options.cache_dir,
        )
        index = {name: number for number, name in enumerate(self.data.class_names)}
        self.train_images = load_pixels(self.data.train, self.preparation)
        self.validation_images = load_pixels(self.data.validation, self.preparation)
        self._warn_of_copies()
        self.train_labels = torch.tensor([index[record.caption] for record in self.data.train])
        self.validation_labels = torch.tensor([index[record.caption] for record in self.data.validation])
        self.num_train, self.num_validation = len(self.data.train), len(self.data.validation)
        self._load(options)

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

    def anew(self, options: ClassTaskOptions) -> ClassificationTask:
        """The same images with a base that nothing has been done to, for other options on the base and its training."""
        task = copy.copy(self)
        task._load(options)
        return task

    def _load(self, options: ClassTaskOptions) -> None:
        self.options = options
        self._probabilities: Tensor | None = None
        self.classifier = ClassifierFamily.from_pretrained(
            options.pretrained_model_name_or_path,
            class_names=self.data.class_names,
            head=cast(Literal["auto", "new", "keep"], options.head),
            head_seed=options.data_seed,
            preparation=self.preparation,
            revision=options.revision,
            cache_dir=options.cache_dir,
            weight_dtype=self.dtype,
            device=self.device,
            augmentation=make_augmentation(options),
            label_smoothing=options.label_smoothing,
            mixup_alpha=options.mixup_alpha,
        )
        self.family: ModelFamily = self.classifier
        self.targets = lora_targets(options, self.family, COMPONENT)
        self._check_targets()

    def _check_targets(self) -> None:
        """See that adapters are for linear layers, and none for the head.

        Raises:
            ValueError: Naming the layer.
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
            count_line({name: len(records) for name, records in parts.items()}, data_source(self.options)),
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
        with evaluating(self.family):
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
            ValueError: When nothing has been evaluated.
        """
        if self._probabilities is None:
            raise ValueError("there is no evaluation to write: call evaluate first")
        self._pages(output_dir).write_answers(name, self._probabilities, self._answers())

    def write_report(self, output_dir: Path, lines: Sequence[Mapping[str, Any]], options: TrainOptions) -> None:
        """Write `report.html`, one file with its pictures in it, and the pictures beside it."""
        title = f"{options.init} on {Path(self.options.train_data_dir or str(self.options.dataset_name)).name}"
        self._pages(output_dir).write_report(title, lines)

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
        base, lines = self.options.pretrained_model_name_or_path, ["from peft import PeftModel"]
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

    def _pages(self, output_dir: Path) -> ClassPages:
        return ClassPages(output_dir, self.data, self.validation_labels, self.validation_images, self.classifier)
