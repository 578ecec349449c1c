"""The options of the scripts that train a LoRA on a task with answers that are right or wrong."""

from __future__ import annotations

from dataclasses import dataclass

from lorainit_diffusers.training.options.checks import TrainOptions, check_adapter_options, check_run_options


@dataclass(frozen=True, kw_only=True)
class TaskOptions(TrainOptions):
    """What every script has that trains on a task."""


def check_task(options: TaskOptions) -> None:
    """Find what cannot work before anything is loaded.

    Raises:
        ValueError: Naming the option, its value and the remedy.
    """
    check_adapter_options(options, options, epochs=options.num_train_epochs)
    check_run_options(options)
