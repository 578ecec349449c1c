"""Train a LoRA on an image classifier with a choice of initialisation; its output layer is trained in full.

    accelerate launch train_scripts/train_classifier_lora.py --init cntlora

adapts the bundled ViT to a style of drawing that it has never seen. With images of your own, a folder for each class:

    accelerate launch train_scripts/train_classifier_lora.py --init cntlora --mixed_precision bf16 \
        --pretrained_model_name_or_path facebook/dinov2-small --train_data_dir my_images

and with a dataset of the hub, five images of each class:

    accelerate launch train_scripts/train_classifier_lora.py --init cntlora --dataset_name ethz/food101 --shots 5 \
        --pretrained_model_name_or_path facebook/dinov2-small

The options on the data are in `common_classify.py`, the others in `common_options.py`, the run in `common_tasks.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from common_classify_options import add_classification_arguments, check_classification_arguments
from common_task_options import make_task_parser, resolve_task_options

from lorainit_diffusers.training.bundled import BUNDLED_BASES
from lorainit_diffusers.training.cli_parser import run_script
from lorainit_diffusers.training.defaults import parse_with_defaults


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    return make_task_parser(
        __doc__,
        BUNDLED_BASES["classifier"],
        add_classification_arguments,
        "classifier",
    )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, checked as far as that needs no model.

    Raises:
        ValueError: naming the option, its value and the remedy.
    """
    args = parse_with_defaults(make_parser(), argv, "classifier")
    resolve_task_options(args, "classifier-lora")
    check_classification_arguments(args)
    return args


if __name__ == "__main__":
    run_script(parse_args)  # a mistake in the options is answered before the imports below, which take seconds

import torch
from common_classify import ClassificationTask
from common_tasks import train_task


def main(argv: Sequence[str] | None = None) -> Path:
    """Train one LoRA and return the directory that it was written to."""
    args = parse_args(argv)
    usage: list[str] = []  # what the model card says depends on the head, which is known once the base is loaded

    def make_task(device: torch.device, dtype: torch.dtype) -> ClassificationTask:
        task = ClassificationTask(args, device, dtype)
        usage[:] = task.usage
        return task

    return train_task(args, make_task, name="train_classifier_lora", tags=["image-classification"], usage=usage)


if __name__ == "__main__":
    run_script(main)
