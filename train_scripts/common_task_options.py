"""The command line of the scripts that train a LoRA on a task: classifiers and vision-language models."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from common_options import (
    add_base_arguments,
    add_init_arguments,
    add_lora_arguments,
    add_run_arguments,
    add_training_arguments,
    settle_output_dir,
    validate_adapter_arguments,
    validate_run_arguments,
)

from lorainit_diffusers.training.cli_parser import ScriptParser


def make_task_parser(
    description: str | None,
    default_base: str,
    add_data_arguments: Callable[[argparse.ArgumentParser], None],
    family: str,
) -> ScriptParser:
    """All options of a script that trains one LoRA on a task, with the defaults of tiny bases of the family."""
    parser = ScriptParser(description)
    add_init_arguments(parser)
    add = add_base_arguments(parser, default_base)
    add("--cache_dir", help="where downloads are kept (default: Hugging Face's own)")
    add_lora_arguments(parser, text_encoders=False)
    add_data_arguments(parser)
    add_training_arguments(parser, [family], second_lr="head_lr")
    add_run_arguments(parser, [family])
    return parser


def resolve_task_options(args: argparse.Namespace, script: str) -> None:
    """Fill in the options whose default depends on others, then find what cannot work before anything is loaded.

    Raises:
        ValueError: naming the option, its value and the remedy.
    """
    args.init_batch_size = args.train_batch_size if args.init_batch_size is None else args.init_batch_size
    args.init_seed = args.seed if args.init_seed is None else args.init_seed
    args.lora_alpha = float(args.rank) if args.lora_alpha is None else args.lora_alpha
    args.head_lr = args.learning_rate if args.head_lr is None else args.head_lr
    settle_output_dir(args, script)
    validate_adapter_arguments(args)
    validate_run_arguments(args)
