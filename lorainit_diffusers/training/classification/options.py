"""The options of a classifier's training: its data, its head, and what the training step does to the images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, TypeVar

from lorainit_diffusers.ranges import COUNT, NOT_NEGATIVE, SEED, SHARE, SHARE_BELOW_ONE, Range
from lorainit_diffusers.training.bundled import BUNDLED_BASES, BUNDLED_CLASSES, bundled
from lorainit_diffusers.training.choices import names_in
from lorainit_diffusers.training.options.checks import require_package
from lorainit_diffusers.training.options.fields import MayChange, NumValues, Options, Place, given, option
from lorainit_diffusers.training.options.initialisation import HeadOptions, LoraOptions
from lorainit_diffusers.training.options.model import BaseOptions
from lorainit_diffusers.training.options.task import TaskOptions, check_task
from lorainit_diffusers.training.ranges import FRACTION, SIDE

if TYPE_CHECKING:
    from lorainit_diffusers.families.augment import Augmentation

LABEL_COLUMNS = ("label", "labels", "fine_label", "class")
DEFAULT_VALIDATION_FRACTION = 0.2


@dataclass(frozen=True, kw_only=True)
class ClassImageOptions(Options):
    """Where images and classes are."""

    _argument_group_name = "data"

    train_data_dir: Annotated[str | None, Place("training data")] = option(
        None, "a folder per class, or such folders in train/ and in validation/, val/ or test/ (default: a bundled set)"
    )
    dataset_name: Annotated[str | None, Place("training data")] = option(
        None, "hub name or folder of a dataset with an image and a label column"
    )
    dataset_config_name: str | None = option(None, "configuration of that dataset")
    image_column: str | None = option(None, "column of the images (default: image)")
    label_column: str | None = option(None, f"column of the classes (default: the first of {', '.join(LABEL_COLUMNS)})")
    validation_fraction: Annotated[float | None, replace(FRACTION, remedy="such as 0.2")] = option(
        None,
        f"share of each class's training images (default: the data's own part, else {DEFAULT_VALIDATION_FRACTION})",
    )
    shots: Annotated[int | None, COUNT] = option(None, "train on so many images of each class only, drawn at random")
    max_train_samples: Annotated[int | None, COUNT] = option(None, "train on so many images only, drawn at random")
    max_validation_samples: Annotated[int | None, COUNT] = option(
        None, "validate on so many images only, drawn at random"
    )
    data_seed: Annotated[int, SEED] = option(0, "seed of these draws, and of a new head's weights (default 0)")
    max_image_pixels: Annotated[int, COUNT, MayChange("a larger image is refused, not changed")] = option(
        2**28, "an image of more pixels, decoded or resized, is an error (default 2^28: 268 megapixels)"
    )
    resolution: Annotated[int | None, SIDE] = option(
        None, "side of the square that the base sees (default: its image processor's)"
    )


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions(Options):
    """The output layer, and the loss."""

    _argument_group_name = "classifier"

    head: str = option(
        "auto",
        "the base's output layer (keep), which must name the classes, or a new one (default auto: which of them fits)",
        choices=names_in("families/classifier.py", "HEADS"),
    )
    label_smoothing: Annotated[float, replace(SHARE_BELOW_ONE, remedy="such as 0.1")] = option(
        0.0, "share of the target that is spread over all classes (default 0)"
    )
    mixup_alpha: Annotated[float, replace(NOT_NEGATIVE, remedy="0 is off")] = option(
        0.0, "of mixup's Beta distribution (default 0: no mixup)"
    )


@dataclass(frozen=True, kw_only=True)
class AugmentationOptions(Options):
    """What the training step does to the images."""

    _argument_group_name = "augmentation"

    random_flip: bool = option(True, "mirror half of the images (default: on)")
    crop_scale: Annotated[list[float], Range(0, 100, above=True), NumValues(2)] = option(
        [0.6, 1.0],
        "share of the area that a random crop keeps (default 0.6 1; 1 1 crops nothing)",
        metavar=("MIN", "MAX"),
    )
    crop_ratio: Annotated[float, Range(0, 1, above=True)] = option(1.0, "least width over height of a crop (default 1)")
    rotation: Annotated[float, Range(0, 360)] = option(0.0, "largest angle in degrees (default 0)")
    color_jitter: Annotated[float, SHARE] = option(0.0, "spread of brightness, contrast and saturation (default 0)")
    grayscale: Annotated[float, SHARE] = option(0.0, "share of the images that lose their colours (default 0)")
    random_erasing: Annotated[float, SHARE] = option(0.0, "share of the images that lose a rectangle (default 0)")


@dataclass(frozen=True, kw_only=True)
class ClassDataOptions(BaseOptions, ClassImageOptions):
    """A classifier with its images."""


@dataclass(frozen=True, kw_only=True)
class ClassTaskOptions(ClassDataOptions, LoraOptions, ClassifierOptions, AugmentationOptions):
    """All that a task of images and classes reads, in a training and in a comparison."""


@dataclass(frozen=True, kw_only=True)
class ClassifierTrainingOptions(ClassTaskOptions, TaskOptions, HeadOptions):
    """Options of `train_classifier_lora.py`."""

    FAMILIES = ("classifier",)


SomeOptions = TypeVar("SomeOptions", bound=ClassTaskOptions)


def resolve_classifier_training(options: ClassifierTrainingOptions) -> ClassifierTrainingOptions:
    """Fill in what depends on other options, and find what cannot work before anything is loaded.

    Raises:
        ValueError, FileNotFoundError: Naming the option, its value and the remedy.
    """
    if given(options.pretrained_model_name_or_path) is None:
        base = bundled(BUNDLED_BASES["classifier"], "--pretrained_model_name_or_path")
        options = replace(options, pretrained_model_name_or_path=base)
    check_task(options)
    return resolve_classification(options)


def resolve_classification(options: SomeOptions) -> SomeOptions:
    """Fill in the default data, then find what cannot work before anything is read; a second call changes nothing.

    Raises:
        ValueError, FileNotFoundError: Naming the option, its value and the remedy.
    """
    if options.train_data_dir is None and options.dataset_name is None:
        options = replace(options, train_data_dir=bundled(BUNDLED_CLASSES, "--train_data_dir"))
    if options.train_data_dir is not None and options.dataset_name is not None:
        raise ValueError("--train_data_dir and --dataset_name exclude each other: give one of them")
    if options.dataset_name is not None:
        require_package("datasets", "--dataset_name")
    for name in ("dataset_config_name", "image_column", "label_column"):
        if options.dataset_name is None and getattr(options, name) is not None:
            raise ValueError(f"--{name} needs --dataset_name")
    if options.shots is not None and options.max_train_samples is not None:
        raise ValueError("--shots and --max_train_samples exclude each other: give one of them")
    from lorainit_diffusers.families.classifier import check_base  # now that nothing light is wrong

    make_augmentation(options)
    check_base(options.pretrained_model_name_or_path)
    return options


def make_augmentation(options: AugmentationOptions) -> Augmentation:
    """The augmentation that the options ask for.

    Raises:
        ValueError: For a value that is none.
    """
    from lorainit_diffusers.families.augment import Augmentation

    low, high = options.crop_scale
    try:
        return Augmentation(
            crop_scale=(low, high),
            crop_ratio=options.crop_ratio,
            rotation=options.rotation,
            flip=0.5 if options.random_flip else 0.0,
            brightness=options.color_jitter,
            contrast=options.color_jitter,
            saturation=options.color_jitter,
            grayscale=options.grayscale,
            erase=options.random_erasing,
        )
    except ValueError as error:
        raise ValueError(
            f"{error}; see --crop_scale, --crop_ratio, --rotation, --color_jitter, --grayscale, --random_erasing"
        ) from error
