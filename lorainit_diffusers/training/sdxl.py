"""Train a LoRA on Stable Diffusion XL with a choice of initialisation: text-to-image or DreamBooth.

    accelerate launch train_scripts/train_sdxl_lora.py --init cntlora --mixed_precision bf16 \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --train_data_dir my_images

The options are in `training/options/text_to_image.py`, the run from top to bottom in `training/train.py`. The VAE runs
in float32 whatever the precision: SDXL overflows to black images in float16.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorainit_diffusers.training.cli import run_script
from lorainit_diffusers.training.options.parser import parse_options
from lorainit_diffusers.training.options.text_to_image import StableDiffusionXLOptions, resolve_text_to_image


def parse_args(argv: Sequence[str] | None = None) -> StableDiffusionXLOptions:
    """The options, checked as far as that needs no model.

    Raises:
        ValueError: Naming the option, its value and the remedy.
    """
    return resolve_text_to_image(parse_options(StableDiffusionXLOptions, argv, __doc__))


def main(argv: Sequence[str] | None = None) -> Path:
    """Train one LoRA and return the directory that it was written to."""
    options = parse_args(argv)  # a mistake in the options is answered before the imports below, which take seconds
    from lorainit_diffusers.families import family_class
    from lorainit_diffusers.training.text_to_image import train_lora

    return train_lora(options, family_class("sdxl"), name="train_sdxl_lora", tag="stable-diffusion-xl")


if __name__ == "__main__":
    run_script(main)
