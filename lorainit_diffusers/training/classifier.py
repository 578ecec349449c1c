"""Train a LoRA on an image classifier with a choice of initialisation; its output layer is trained in full.

    accelerate launch train_scripts/train_classifier_lora.py --init cntlora

adapts the bundled ViT to a style of drawing that it has never seen. With images of your own, a folder for each class:

    accelerate launch train_scripts/train_classifier_lora.py --init cntlora --mixed_precision bf16 \
        --pretrained_model_name_or_path facebook/dinov2-small --train_data_dir my_images

and with a dataset of the hub, five images of each class:

    accelerate launch train_scripts/train_classifier_lora.py --init cntlora --dataset_name ethz/food101 --shots 5 \
        --pretrained_model_name_or_path facebook/dinov2-small

The options on the data are in `training/classification/options.py`, the run from top to bottom in `training/train.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lorainit_diffusers.training.classification.options import ClassifierTrainingOptions, resolve_classifier_training
from lorainit_diffusers.training.cli import run_script
from lorainit_diffusers.training.options.parser import parse_options


def parse_args(argv: Sequence[str] | None = None) -> ClassifierTrainingOptions:
    """The options, checked as far as that needs no model.

    Raises:
        ValueError: Naming the option, its value and the remedy.
    """
    return resolve_classifier_training(parse_options(ClassifierTrainingOptions, argv, __doc__))


def main(argv: Sequence[str] | None = None) -> Path:
    """Train one LoRA and return the directory that it was written to."""
    options = parse_args(argv)  # a mistake in the options is answered before the imports below, which take seconds
    from lorainit_diffusers.training.classification.task import ClassificationTask
    from lorainit_diffusers.training.task import train_task

    task = partial(ClassificationTask, options)
    return train_task(options, task, name="train_classifier_lora", tags=["image-classification"])


if __name__ == "__main__":
    run_script(main)
