"""The options of a classifier's training: its data, its head, and what the training step does to the images."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from common_options import require_package

from lorainit_diffusers.training.bundled import BUNDLED_CLASSES
from lorainit_diffusers.training.choices import names_in
from lorainit_diffusers.training.ranges import check_options

if TYPE_CHECKING:
    from lorainit_diffusers.families.augment import Augmentation

LABEL_COLUMNS = ("label", "labels", "fine_label", "class")
DEFAULT_VALIDATION_FRACTION = 0.2


def add_classification_arguments(parser: argparse.ArgumentParser) -> None:
    """Where images and classes are, how the head starts, and what the training step does to the images."""
    add = parser.add_argument_group("data").add_argument
    add("--train_data_dir", help="a folder per class, or such folders in train/ and in validation/, val/ or test/")
    add("--dataset_name", help="hub name or folder of a dataset with an image and a label column")
    add("--dataset_config_name", help="configuration of that dataset")
    add("--image_column", help="default: image")
    add("--label_column", help=f"default: the first of {', '.join(LABEL_COLUMNS)}")
    default = f"the data's own part, else {DEFAULT_VALIDATION_FRACTION}"
    add("--validation_fraction", type=float, help=f"share of each class's training images (default: {default})")
    add("--shots", type=int, help="train on so many images of each class only, drawn at random")
    add("--max_train_samples", type=int, help="train on so many images only, drawn at random")
    add("--max_validation_samples", type=int, help="validate on so many images only, drawn at random")
    add("--data_seed", type=int, default=0, help="of these draws, and of a new head's weights")
    add("--resolution", type=int, help="side of the square that the base sees (default: its image processor's)")

    add = parser.add_argument_group("classifier").add_argument
    add(
        "--head",
        choices=names_in("families/classifier.py", "HEADS"),
        default="auto",
        help="the base's output layer, which must name the classes, or a new one",
    )
    add("--label_smoothing", type=float, default=0.0)
    add("--mixup_alpha", type=float, default=0.0, help="of mixup's Beta distribution (default: no mixup)")

    add = parser.add_argument_group("augmentation").add_argument
    yes_or_no = argparse.BooleanOptionalAction
    add("--random_flip", action=yes_or_no, default=True, help="mirror half of the images (default: on)")
    add(
        "--crop_scale",
        type=float,
        nargs=2,
        default=[0.6, 1.0],
        metavar=("MIN", "MAX"),
        help="share of the area that a random crop keeps (default 0.6 1; 1 1 crops nothing)",
    )
    add("--crop_ratio", type=float, default=1.0, help="least width over height of a crop (default 1)")
    add("--rotation", type=float, default=0.0, help="largest angle in degrees")
    add("--color_jitter", type=float, default=0.0, help="spread of brightness, contrast and saturation")
    add("--grayscale", type=float, default=0.0, help="share of the images that lose their colours")
    add("--random_erasing", type=float, default=0.0, help="share of the images that lose a rectangle")


def check_classification_arguments(args: argparse.Namespace) -> None:
    """Fill in the default data, then find what cannot work before anything is read.

    Raises:
        ValueError, FileNotFoundError: naming the option, its value and the remedy.
    """
    if args.train_data_dir is None and args.dataset_name is None:
        args.train_data_dir = str(BUNDLED_CLASSES)
    if args.train_data_dir is not None and args.dataset_name is not None:
        raise ValueError("--train_data_dir and --dataset_name exclude each other: give one of them")
    if args.dataset_name is not None:
        require_package("datasets", "--dataset_name")
    for name in ("dataset_config_name", "image_column", "label_column"):
        if args.dataset_name is None and getattr(args, name) is not None:
            raise ValueError(f"--{name} needs --dataset_name")
    check_options(vars(args))
    if args.shots is not None and args.max_train_samples is not None:
        raise ValueError("--shots and --max_train_samples exclude each other: give one of them")
    from lorainit_diffusers.families.classifier import check_base  # now that nothing light is wrong

    make_augmentation(args)
    check_base(args.pretrained_model_name_or_path)


def make_augmentation(args: argparse.Namespace) -> Augmentation:
    """The augmentation that the options ask for.

    Raises:
        ValueError: for a value that is none.
    """
    from lorainit_diffusers.families.augment import Augmentation

    low, high = args.crop_scale
    try:
        return Augmentation(
            crop_scale=(low, high),
            crop_ratio=args.crop_ratio,
            rotation=args.rotation,
            flip=0.5 if args.random_flip else 0.0,
            brightness=args.color_jitter,
            contrast=args.color_jitter,
            saturation=args.color_jitter,
            grayscale=args.grayscale,
            erase=args.random_erasing,
        )
    except ValueError as error:
        raise ValueError(
            f"{error}; see --crop_scale, --crop_ratio, --rotation, --color_jitter, --grayscale, --random_erasing"
        ) from error
