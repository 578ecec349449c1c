"""Train a LoRA on Stable Diffusion XL with a choice of initialisation: text-to-image or DreamBooth.

    accelerate launch train_scripts/train_sdxl_lora.py --init cntlora --mixed_precision bf16 \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --train_data_dir my_images

The options are in `common_options.py`, the training loop in `common_train.py`. The VAE runs in float32 whatever the
precision: SDXL's overflows to black images in float16.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from common_options import make_training_parser, resolve_defaults, validate_arguments

from lorainit_diffusers.training.cli_parser import run_script
from lorainit_diffusers.training.defaults import parse_with_defaults


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, checked as far as that needs no model.

    Raises:
        ValueError: naming the option, its value and the remedy.
    """
    args = parse_with_defaults(make_training_parser(__doc__, None, ["sdxl"]), argv, "sdxl")
    resolve_defaults(args, "sdxl-lora", default_data=None)
    validate_arguments(args)
    return args


if __name__ == "__main__":
    run_script(parse_args)  # a mistake in the options is answered before the imports below, which take seconds

from common_train import train_lora

from lorainit_diffusers.families.sdxl import StableDiffusionXLFamily


def main(argv: Sequence[str] | None = None) -> Path:
    """Train one LoRA and return the directory that it was written to."""
    return train_lora(parse_args(argv), StableDiffusionXLFamily, name="train_sdxl_lora", tag="stable-diffusion-xl")


if __name__ == "__main__":
    run_script(main)
