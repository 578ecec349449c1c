"""Train a LoRA on Stable Diffusion 1.x/2.x with a choice of initialisation: text-to-image or DreamBooth.

    accelerate launch train_scripts/train_sd_lora.py --init cntlora

trains on the bundled base and a bundled style set. With your own:

    accelerate launch train_scripts/train_sd_lora.py --init cntlora --mixed_precision fp16 \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --train_data_dir my_images

The options are in `training/options/text_to_image.py`, the run from top to bottom in `training/train.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorainit_diffusers.training.cli import run_script
from lorainit_diffusers.training.options.parser import parse_options
from lorainit_diffusers.training.options.text_to_image import StableDiffusionOptions, resolve_text_to_image


def parse_args(argv: Sequence[str] | None = None) -> StableDiffusionOptions:
    """The options, checked as far as that needs no model.

    Raises:
        ValueError: Naming the option, its value and the remedy.
    """
    return resolve_text_to_image(parse_options(StableDiffusionOptions, argv, __doc__))


def main(argv: Sequence[str] | None = None) -> Path:
    """Train one LoRA and return the directory that it was written to."""
    options = parse_args(argv)  # a mistake in the options is answered before the imports below, which take seconds
    from lorainit_diffusers.families import family_class
    from lorainit_diffusers.training.text_to_image import train_lora

    return train_lora(options, family_class("sd"), name="train_sd_lora", tag="stable-diffusion")


if __name__ == "__main__":
    run_script(main)
