"""Ranges of numeric options, which stand at the fields of the options, and how they are checked and described.

Where other trainers give a number a meaning, it has that meaning: `--max_grad_norm 0` clips nothing (transformers,
sd-scripts), `--snr_gamma 0` weights nothing (sd-scripts), a learning rate of 0 freezes what it is for.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lorainit_diffusers.ranges import COUNT, NOT_NEGATIVE, OF_OPTION, POSITIVE, SEED, SHARE_BELOW_ONE, Range

SIDE = Range(1, 2**16, integer=True)
RANK = Range(1, 2**16, integer=True)
FRACTION = Range(0, 1, above=True, below=True)
DECAY = replace(SHARE_BELOW_ONE, remedy="0.9 to 0.999 is usual")
LEARNING_RATE = replace(NOT_NEGATIVE, remedy="1e-4 is usual for LoRA, and 0 freezes")

# Ranges of numbers that are no fields of a dataclass, by the name of the option: those of the benchmarks.
OPTION_RANGES: dict[str, Range] = {
    "rank": RANK,
    "seed": SEED,
    **dict.fromkeys(("batch_size", "num_batches", "threads", "repeats"), COUNT),
    **dict.fromkeys(("memory_budget_gb", "peft_seconds"), POSITIVE),
    "side": SIDE,
}


def numeric_options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The options of a parser that take numbers, by the name of their value."""
    return {action.dest: action for action in parser._actions if action.type in (int, float)}


def describe_ranges(parser: argparse.ArgumentParser, ranges: Mapping[str, Range]) -> None:
    """Add the range of every numeric option to its help."""
    for name, action in numeric_options(parser).items():
        note = f"[{ranges[name].words}]" if name in ranges else ""
        if action.help != argparse.SUPPRESS and not (action.help or "").endswith(note):
            action.help = f"{action.help or ''} {note}".strip()


def check_options(values: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
    """Check options by name; `None` is one that was not given, and of a list every number is checked.

    Args:
        values: Of the options; those without a range may be anything.
        ranges: By name.

    Raises:
        ValueError: Naming the first one that is out of its range, its value and the remedy.
    """
    for name, value in values.items():
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
