"""Optimiser, schedule, length and precision."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any

from lorainit_diffusers.ranges import COUNT, COUNT_OR_NONE, NOT_NEGATIVE, POSITIVE, SHARE_BELOW_ONE
from lorainit_diffusers.training.choices import LR_SCHEDULERS
from lorainit_diffusers.training.options.fields import MayChange, Options, option
from lorainit_diffusers.training.ranges import DECAY, LEARNING_RATE, check_schedule


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions(Options):
    """What one run and a comparison of runs have in common."""

    _argument_group_name = "optimiser"

    optimizer: str = option("adamw", "adamw (the default), sgd or prodigy", choices=("adamw", "sgd", "prodigy"))
    use_8bit_adam: bool = option(False, "AdamW with 8-bit state (bitsandbytes)")
    adam_beta1: Annotated[float, DECAY] = option(0.9, "decay of the mean of the gradients (default 0.9)")
    adam_beta2: Annotated[float, DECAY] = option(0.999, "decay of the mean of their squares (default 0.999)")
    adam_weight_decay: Annotated[float, NOT_NEGATIVE] = option(1e-2, "decoupled weight decay (default 0.01)")
    adam_epsilon: Annotated[float, replace(POSITIVE, remedy="1e-8 is usual")] = option(
        1e-8, "added to the root of the mean square (default 1e-8)"
    )
    prodigy_beta3: Annotated[float | None, DECAY] = option(
        None, "decay of prodigy's step size (default: square root of beta2)"
    )
    prodigy_decouple: bool = option(True, "decoupled weight decay in prodigy (default: on)")
    prodigy_use_bias_correction: bool = option(True, "Adam's bias correction in prodigy (default: on)")
    prodigy_safeguard_warmup: bool = option(True, "prodigy's safeguard for a warm-up (default: on)")
    max_grad_norm: Annotated[float, replace(NOT_NEGATIVE, remedy="0 clips nothing")] = option(
        1.0, "largest norm of the gradients of a step (default 1)"
    )
    lr_scheduler: str = option("constant", "course of the learning rate (default constant)", choices=LR_SCHEDULERS)
    lr_warmup_steps: Annotated[int, COUNT_OR_NONE] = option(0, "steps until the learning rate is reached (default 0)")
    lr_num_cycles: Annotated[int, COUNT] = option(1, "restarts of cosine_with_restarts (default 1)")
    lr_power: Annotated[float, NOT_NEGATIVE] = option(1.0, "power of polynomial (default 1)")
    max_train_steps: Annotated[int, COUNT, MayChange("compared with the step and the schedule instead")] = option(
        1000, "optimiser steps"
    )
    train_batch_size: Annotated[int, COUNT] = option(4, "samples of a process and micro-step")
    mixed_precision: str | None = option(
        None, "precision of the model (default: what accelerate is configured for)", choices=("no", "fp16", "bf16")
    )


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Options):
    """Learning rate, accumulation, averages."""

    _argument_group_name = "training"

    learning_rate: Annotated[float, LEARNING_RATE] = option(1e-4, "learning rate of the LoRA; 0 freezes")
    scale_lr: bool = option(False, "multiply learning rates by processes x accumulation x batch size")
    num_train_epochs: Annotated[int | None, COUNT, MayChange("another way to say --max_train_steps")] = option(
        None, "instead of --max_train_steps: passes over the data"
    )
    gradient_accumulation_steps: Annotated[int, COUNT] = option(1, "batches of one step")
    gradient_checkpointing: Annotated[bool, MayChange("computes the same activations twice")] = option(
        False, "less memory, more time"
    )
    use_dora: bool = option(False, "train magnitude and direction (DoRA, arXiv:2402.09353)")
    use_ema: bool = option(False, "sample and save a moving average of the LoRA weights")
    ema_decay: Annotated[float, replace(SHARE_BELOW_ONE, remedy="such as 0.999")] = option(
        0.999, "its decay, reached as (1 + step) / (10 + step) (default 0.999)"
    )
    allow_tf32: bool = option(False, "TF32 matrix products on Ampere and later GPUs, except in statistics")


@dataclass(frozen=True, kw_only=True)
class ScheduledOptions(OptimizerOptions, TrainingOptions):
    """Both: how long and how fast a run trains."""


def scaled_rates(options: ScheduledOptions, num_processes: int) -> dict[str, Any]:
    """The learning rates under `--scale_lr`, as diffusers' examples scale them, by the names of the options.

    Raises:
        ValueError: When a rate is out of its range then.
    """
    if not options.scale_lr:
        return {}
    factor = options.train_batch_size * options.gradient_accumulation_steps * num_processes
    names = ("learning_rate", "text_encoder_lr", "head_lr")
    return {name: factor * getattr(options, name) for name in names if hasattr(options, name)}


def steps_of_epochs(options: ScheduledOptions, batches_per_epoch: int, num_processes: int) -> dict[str, Any]:
    """`max_train_steps` under `--num_train_epochs`: as many as it takes to see every sample that often.

    Raises:
        ValueError: When the warm-up is longer than that.
    """
    if options.num_train_epochs is None:
        return {}
    batches_per_step = options.gradient_accumulation_steps * num_processes
    steps = options.num_train_epochs * math.ceil(batches_per_epoch / batches_per_step)
    check_schedule(options.lr_scheduler, options.lr_warmup_steps, steps)
    return {"max_train_steps": steps}
