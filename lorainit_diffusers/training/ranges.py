"""The range of every numeric option of the scripts, checked as the command line is read.

Where other trainers give a number a meaning, it has that meaning: `--max_grad_norm 0` clips nothing (transformers,
sd-scripts), `--snr_gamma 0` weights nothing (sd-scripts), a learning rate of 0 freezes what it is for.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from lorainit_diffusers.ranges import (
    COUNT,
    COUNT_OR_NONE,
    NOT_NEGATIVE,
    OF_OPTION,
    POSITIVE,
    SEED,
    SHARE,
    SHARE_BELOW_ONE,
    STEP_RANGES,
    Range,
)

SIDE = Range(1, 2**16, integer=True)
RANK = Range(1, 2**16, integer=True)
FRACTION = Range(0, 1, above=True, below=True)
DECAY = replace(SHARE_BELOW_ONE, remedy="0.9 to 0.999 is usual")
LEARNING_RATE = replace(NOT_NEGATIVE, remedy="1e-4 is usual for LoRA, and 0 freezes")

OPTION_RANGES: dict[str, Range] = {
    **STEP_RANGES,
    # ---- initialisation and adapters
    **dict.fromkeys(("init_num_batches", "init_batch_size"), COUNT),
    "init_seed": SEED,
    "init_memory_budget_gb": replace(POSITIVE, remedy="leave it out for auto"),
    "rank": RANK,
    "ranks": RANK,
    "max_rank": RANK,
    "export_rank": RANK,
    "pad_rank": RANK,
    "rank_budget": COUNT,
    "lora_alpha": replace(POSITIVE, remedy="leave it out for the rank, which is the scale 1"),
    "lora_dropout": SHARE_BELOW_ONE,
    # ---- data
    **dict.fromkeys(("max_train_samples", "max_validation_samples", "repeats", "shots", "num_class_images"), COUNT),
    "validation_fraction": replace(FRACTION, remedy="such as 0.2"),
    "resolution": SIDE,
    "max_image_pixels": COUNT,
    "dataloader_num_workers": Range(0, 1024, integer=True),
    "data_seed": SEED,
    **dict.fromkeys(("max_length", "max_new_tokens", "eval_batch_size", "num_samples"), COUNT),
    # ---- the training step
    "snr_gamma": replace(NOT_NEGATIVE, remedy="5 is usual, and 0 is off"),
    "clip_skip": COUNT,
    "label_smoothing": replace(SHARE_BELOW_ONE, remedy="such as 0.1"),
    "mixup_alpha": replace(NOT_NEGATIVE, remedy="0 is off"),
    "crop_scale": Range(0, 100, above=True),
    "crop_ratio": Range(0, 1, above=True),
    "rotation": Range(0, 360),
    **dict.fromkeys(("color_jitter", "grayscale", "random_erasing"), SHARE),
    # ---- optimiser and schedule
    **dict.fromkeys(("learning_rate", "text_encoder_lr", "head_lr"), LEARNING_RATE),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "prodigy_beta3"), DECAY),
    "adam_weight_decay": NOT_NEGATIVE,
    "adam_epsilon": replace(POSITIVE, remedy="1e-8 is usual"),
    "max_grad_norm": replace(NOT_NEGATIVE, remedy="0 clips nothing"),
    "ema_decay": replace(SHARE_BELOW_ONE, remedy="such as 0.999"),
    "lr_warmup_steps": COUNT_OR_NONE,
    "lr_num_cycles": COUNT,
    "lr_power": NOT_NEGATIVE,
    **dict.fromkeys(("max_train_steps", "train_batch_size", "num_train_epochs", "gradient_accumulation_steps"), COUNT),
    # ---- samples, validation, checkpoints
    **dict.fromkeys(("num_validation_images", "validation_inference_steps", "sample_batch_size"), COUNT),
    "validation_guidance_scale": NOT_NEGATIVE,
    "seed": SEED,
    **dict.fromkeys(
        ("validation_steps", "checkpointing_steps"), replace(COUNT, remedy="more than the steps of the run is never")
    ),
    "checkpoints_total_limit": COUNT,
    # ---- comparisons
    "learning_rates": POSITIVE,
    "seeds": SEED,
    **dict.fromkeys(("eval_steps", "snapshot_steps", "image_steps"), COUNT_OR_NONE),
    "head_lr_ratio": NOT_NEGATIVE,
    **dict.fromkeys(("num_workers", "num_eval_prompts"), COUNT),
    # ---- benchmarks
    **dict.fromkeys(("batch_size", "num_batches", "threads"), COUNT),
    **dict.fromkeys(("num_double", "num_single"), COUNT_OR_NONE),
    **dict.fromkeys(("memory_budget_gb", "peft_seconds"), POSITIVE),
    "side": SIDE,
}


def numeric_options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The options of a parser that take numbers, by the name of their value."""
    return {action.dest: action for action in parser._actions if action.type in (int, float)}


def describe_ranges(parser: argparse.ArgumentParser, ranges: Mapping[str, Range] = OPTION_RANGES) -> None:
    """Add the range of every numeric option to its help."""
    for name, action in numeric_options(parser).items():
        note = f"[{ranges[name].words}]" if name in ranges else ""
        if action.help != argparse.SUPPRESS and not (action.help or "").endswith(note):
            action.help = f"{action.help or ''} {note}".strip()


def check_numbers(values: Mapping[str, Any], parser: argparse.ArgumentParser, ranges: Mapping[str, Range]) -> None:
    """Check the numbers that a parser has read.

    Raises:
        ValueError: Naming the first one that is out of its range, its value and the remedy.
    """
    check_options(values, numeric_options(parser), ranges)


def check_options(
    values: Mapping[str, Any], names: Iterable[str] | None = None, ranges: Mapping[str, Range] = OPTION_RANGES
) -> None:
    """Check options by name; `None` is one that was not given, and of a list every number is checked.

    Args:
        values: Of the options.
        names: Those to check; all that have a range when left out.
        ranges: By name.

    Raises:
        ValueError: Naming the first one that is out of its range, its value and the remedy.
    """
    for name in values if names is None else names:
        value = values.get(name)
        if value is None or name not in ranges:
            continue
        for number in value if isinstance(value, (list, tuple)) else [value]:
            ranges[name].check(f"--{name}", number, OF_OPTION)


def check_schedule(lr_scheduler: str, lr_warmup_steps: int, max_train_steps: int) -> None:
    """See that the warm-up has an effect, and an end within the run.

    Raises:
        ValueError: Naming the options and the remedy.
    """
    if lr_warmup_steps == 0:
        return
    if lr_scheduler == "constant":
        raise ValueError(
            f"--lr_warmup_steps {lr_warmup_steps} has no effect with --lr_scheduler constant; leave it out, or take "
            "constant_with_warmup"
        )
    if lr_warmup_steps > max_train_steps:
        raise ValueError(
            f"--lr_warmup_steps {lr_warmup_steps}: the run ends after {max_train_steps} steps, before the learning "
            "rate is reached; lower it, or raise --max_train_steps"
        )
