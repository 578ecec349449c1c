"""Train a LoRA on a diffusion transformer with a choice of initialisation: SD3, Flux, PixArt, DiT, Lumina 2.

    accelerate launch train_scripts/train_dit_lora.py --init cntlora

trains on the bundled base (a small Stable Diffusion 3) and a bundled style set. With your own:

    accelerate launch train_scripts/train_dit_lora.py --family flux --init eva --mixed_precision bf16 \
        --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev --quantization nf4 --train_data_dir my_images \
        --resolution 512 --pre_compute_text_embeddings --cache_latents --gradient_checkpointing

The options are in `common_options.py`, the training loop in `common_train.py`; what one training step is says the
family's file under `lorainit_diffusers/families`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from common_options import (
    add_flow_arguments,
    has_cuda,
    make_training_parser,
    require_package,
    resolve_defaults,
    validate_arguments,
)

from lorainit_diffusers.training.bundled import BUNDLED_BASES, BUNDLED_DATA
from lorainit_diffusers.training.cli_parser import run_script
from lorainit_diffusers.training.defaults import parse_with_defaults

# What each family's model cards are tagged with.
FAMILIES = {
    "sd3": "stable-diffusion-3",
    "flux": "flux",
    "pixart": "pixart",
    "dit": "dit",
    "lumina2": "lumina2",
    "flux2": "flux2",
    "qwen_image": "qwen-image",
}


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = make_training_parser(__doc__, None, list(FAMILIES))
    add_flow_arguments(parser)
    parser.add_argument("--quantization", choices=("nf4",), help="hold the transformer in 4 bits (bitsandbytes)")
    parser.add_argument("--family", choices=list(FAMILIES), default="sd3", help="what the base is (default sd3)")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, checked as far as that needs no model.

    Raises:
        ValueError: naming the option, its value and the remedy.
    """
    args = parse_with_defaults(make_parser(), argv, lambda args: args.family)
    default_data = None
    if args.pretrained_model_name_or_path is None and args.family in BUNDLED_BASES:
        args.pretrained_model_name_or_path, default_data = BUNDLED_BASES[args.family], BUNDLED_DATA
    resolve_defaults(args, f"{args.family}-lora", default_data)
    validate_arguments(args)
    if args.quantization is not None:
        flag = f"--quantization {args.quantization}"
        require_package("bitsandbytes", flag)
        if not has_cuda():
            raise ValueError(f"{flag} needs a CUDA device: diffusers loads 4-bit models on no other; leave it out")
        if args.export_merged:
            raise ValueError(f"--export_merged adds to weights in full, {flag} packs them: leave one of them out")
    return args


if __name__ == "__main__":
    run_script(parse_args)  # a mistake in the options is answered before the imports below, which take seconds

from common_train import train_lora

from lorainit_diffusers.families import family_class


def main(argv: Sequence[str] | None = None) -> Path:
    """Train one LoRA and return the directory that it was written to."""
    args = parse_args(argv)
    return train_lora(args, family_class(args.family), name="train_dit_lora", tag=FAMILIES[args.family])


if __name__ == "__main__":
    run_script(main)
