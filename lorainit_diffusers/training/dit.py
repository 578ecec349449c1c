"""Train a LoRA on a diffusion transformer with a choice of initialisation: SD3, Flux, PixArt, DiT, Lumina 2 ...

    accelerate launch train_scripts/train_dit_lora.py --init cntlora

trains on the bundled base (a small Stable Diffusion 3) and a bundled style set. With your own:

    accelerate launch train_scripts/train_dit_lora.py --family flux --init eva --mixed_precision bf16 \
        --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev --quantization nf4 --train_data_dir my_images \
        --resolution 512 --pre_compute_text_embeddings --cache_latents --gradient_checkpointing

The options are in `training/options/text_to_image.py`, the run from top to bottom in `training/train.py`; what one
training step is says the file of the family in `lorainit_diffusers/families`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorainit_diffusers.training.cli import run_script
from lorainit_diffusers.training.options.family import settled_family
from lorainit_diffusers.training.options.fields import given
from lorainit_diffusers.training.options.parser import parse_options
from lorainit_diffusers.training.options.text_to_image import TransformerOptions, resolve_text_to_image

# What model cards are tagged with, where it is not the family's short name.
_TAGS = {"sd3": "stable-diffusion-3", "qwen_image": "qwen-image", "z_image": "z-image"}


def parse_args(argv: Sequence[str] | None = None) -> TransformerOptions:
    """The options, checked as far as that needs no model.

    Raises:
        ValueError: Naming the option, its value and the remedy.
    """
    options = parse_options(TransformerOptions, argv, __doc__, family=_family)
    # what is found is kept: the files of a run say what its base is
    return resolve_text_to_image(replace(options, family=options.family_name))


def _family(values: Mapping[str, Any]) -> str:
    """The short name of the base's family."""
    return settled_family(values["family"], given(values["pretrained_model_name_or_path"]), values["revision"])


def main(argv: Sequence[str] | None = None) -> Path:
    """Train one LoRA and return the directory that it was written to."""
    options = parse_args(argv)  # a mistake in the options is answered before the imports below, which take seconds
    from lorainit_diffusers.families import family_class
    from lorainit_diffusers.training.text_to_image import train_lora

    name = options.family_name
    return train_lora(options, family_class(name), name="train_dit_lora", tag=_TAGS.get(name, name))


if __name__ == "__main__":
    run_script(main)
