"""Train a LoRA on Stable Diffusion 1.x/2.x with a choice of initialisation: text-to-image or DreamBooth.

    accelerate launch train_scripts/train_sd_lora.py --init cntlora

trains on the bundled base and a bundled style set. With your own:

    accelerate launch train_scripts/train_sd_lora.py --init cntlora --mixed_precision fp16 \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --train_data_dir my_images

The options are in `common_options.py`, the training loop in `common_train.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from common_options import make_training_parser, resolve_defaults, validate_arguments

from lorainit_diffusers.training.bundled import BUNDLED_BASES, BUNDLED_DATA
from lorainit_diffusers.training.cli_parser import run_script
from lorainit_diffusers.training.defaults import parse_with_defaults


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    return make_training_parser(__doc__, default_base=BUNDLED_BASES["sd"])


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, checked as far as that needs no model.

    Raises:
        ValueError: naming the option, its value and the remedy.
    """
    args = parse_with_defaults(make_parser(), argv, "sd")
    resolve_defaults(args, "sd-lora", BUNDLED_DATA)
    validate_arguments(args)
    return args


if __name__ == "__main__":
    run_script(parse_args)  # a mistake in the options is answered before the imports below, which take seconds

from common_train import train_lora

from lorainit_diffusers.families.sd import StableDiffusionFamily


def main(argv: Sequence[str] | None = None) -> Path:
    """Train one LoRA and return the directory that it was written to."""
    return train_lora(parse_args(argv), StableDiffusionFamily, name="train_sd_lora", tag="stable-diffusion")


if __name__ == "__main__":
    run_script(main)
