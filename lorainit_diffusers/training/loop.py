"""The loop over the steps: gradients of all processes, one optimiser step, validations and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lorainit_diffusers.families.base import ModelFamily, loss_weight
from lorainit_diffusers.progress import progress_bar
from lorainit_diffusers.training import checkpoints
from lorainit_diffusers.training.gradients import DivergedError, clip_gradients, gradient_error
from lorainit_diffusers.training.log import RunLog
from lorainit_diffusers.training.optimization import Optimization
from lorainit_diffusers.training.run import Run
from lorainit_diffusers.training.seeds import derive_seed, seeded_generator
from lorainit_diffusers.training.signals import StoppedError, StopRequest
from lorainit_diffusers.training.weighting import micro_batch_shares


class StepOptions(Protocol):
    """What one step depends on beside the model and the batch; the options of every script have it."""

    @property
    def gradient_accumulation_steps(self) -> int:
        """Batches of one step."""
        ...

    @property
    def seed(self) -> int:
        """Of every draw."""
        ...

    @property
    def learning_rate(self) -> float:
        """For messages."""
        ...

    @property
    def max_grad_norm(self) -> float:
        """Largest norm of the gradients; 0 clips nothing."""
        ...


def average_gradients(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    """Mean of the gradients over the processes, in one flat all-reduce.

    A LoRA's gradients are small, so this takes the place of wrapping the modules: collection, training and sampling
    then run on the same plain modules.
    """
    if accelerator.num_processes == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, gradient in zip(parameters, cast(Tensor, flat).split(sizes), strict=True):
        parameter.grad = gradient.view_as(parameter).clone()


def backward_step(
    options: StepOptions,
    family: ModelFamily,
    batches: Iterator[Any],
    accelerator: Accelerator,
    parameters: Sequence[nn.Parameter],
    step: int,
) -> tuple[float, float]:
    """The gradients of one optimiser step, clipped: (mean loss, gradient norm).

    Loss and gradients are those of all micro-batches of all processes in one batch: each counts as much as its own loss
    is a mean over. Every random draw comes from (seed, step, micro-step, process), so a resumed run needs the step
    number only.

    Returns:
        The mean loss, and the norm of the gradients before they are clipped. It is not finite only where a scaler of
        gradients (float16) will skip the step.

    Raises:
        DivergedError: When the loss or a gradient is no longer finite; nothing has been changed then.
    """
    micro_batches = [next(batches) for _ in range(options.gradient_accumulation_steps)]
    shares = micro_batch_shares([loss_weight(family, batch) for batch in micro_batches], accelerator)
    total = torch.zeros((), device=accelerator.device)
    for micro, batch in enumerate(micro_batches):
        parts = (options.seed, "step", step, micro, accelerator.process_index)
        torch.manual_seed(derive_seed(*parts))  # for the dropout of the adapters
        loss = family.loss(batch, seeded_generator(*parts))
        loss = loss / len(micro_batches) if shares is None else loss * shares[micro]
        accelerator.backward(loss)
        total += loss.detach()
    mean_loss = float(cast(Tensor, accelerator.reduce(total, "mean")))
    if not np.isfinite(mean_loss):
        raise DivergedError(f"the loss is {mean_loss} at step {step}; lower --learning_rate {options.learning_rate}")
    average_gradients(accelerator, parameters)
    accelerator.unscale_gradients()
    norm = clip_gradients(parameters, options.max_grad_norm)
    error = gradient_error(
        family.adapted,
        parameters,
        norm,
        step=step,
        loss=mean_loss,
        remedy=f"lower --learning_rate {options.learning_rate}",
        scale=accelerator.scaler.get_scale() if accelerator.scaler is not None else None,
    )
    if error is not None:
        raise error
    return mean_loss, norm


class Moves(Protocol):
    """What a step moves the trained weights with."""

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """The trained weights."""
        ...

    @property
    def lr_scheduler(self) -> Any:
        """Of the learning rates."""
        ...

    def step(self) -> bool:
        """Use the gradients, and clear them; whether they were used."""
        ...


@dataclass(frozen=True)
class StepOutcome:
    """What one step of a training was.

    Attributes:
        loss: Mean over its samples.
        grad_norm: Of the gradients before they were clipped; not finite only where the step was skipped.
        learning_rate: Of the first group of weights.
        used: Whether the weights were moved: a scaler of gradients (float16) may skip a step.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    used: bool


def take_step(
    options: StepOptions,
    family: ModelFamily,
    batches: Iterator[Any],
    accelerator: Accelerator,
    moves: Moves,
    step: int,
) -> StepOutcome:
    """One step of a training or of a comparison's run: gradients, and what moves the weights.

    Args:
        options: Of the step.
        family: The base.
        batches: The next ones are those of this step.
        accelerator: Of the processes that train together.
        moves: The trained weights with their optimiser.
        step: Its number, from 1 on.

    Raises:
        DivergedError: When the loss, a gradient or a weight is no longer finite.
    """
    loss, grad_norm = backward_step(options, family, batches, accelerator, moves.parameters, step)
    learning_rate = float(moves.lr_scheduler.get_last_lr()[0])
    return StepOutcome(loss, grad_norm, learning_rate, used=moves.step())


@contextmanager
def last_good_named(output_dir: str | Path) -> Generator[None, None, None]:
    """Add to an error inside the block which checkpoint the run can go on from.

    Raises:
        ValueError: The one from inside.
    """
    try:
        yield
    except ValueError as error:
        try:
            last = checkpoints.find_checkpoint(output_dir, "latest").name
        except (ValueError, FileNotFoundError):
            raise error from None
        last = f"the last good state is {last} (--resume_from_checkpoint latest)"
        raise ValueError(f"{error}; {last}") from error


def train_steps(
    run: Run[Any],
    family: ModelFamily,
    batches: Iterator[Any],
    optimization: Optimization,
    log: RunLog,
    *,
    validate: Callable[[int], None],
    save: Callable[[int], None],
) -> None:
    """The training loop: every step that is left, with its line in the log, validations and checkpoints.

    A signal that asks the run to stop (`signals`) is heard at the end of a step, in all processes at the same one.

    Args:
        run: The run.
        family: The base.
        batches: Of this process, those of the first step that is left at the front.
        optimization: Of the trained weights.
        log: Gets a line a step.
        validate: Called with the number of a step, with the averaged weights in the model where there are any.
        save: Called in the main process with the number of a step, to write a checkpoint.

    Raises:
        StoppedError: After a signal, when the checkpoint is written.
    """
    options, last = run.options, run.options.max_train_steps
    for module in family.adapted.values():
        module.train()
    progress = progress_bar(desc="training", initial=run.first_step, total=last, shown=run.is_main)
    with StopRequest() as request:
        for step in range(run.first_step + 1, last + 1):
            step_started = time.perf_counter()
            with last_good_named(run.output_dir):
                done = take_step(options, family, batches, run.accelerator, optimization, step)
            step_s = round(time.perf_counter() - step_started, 4)
            # a norm that is not finite is no number of JSON
            of_gradients = {"grad_norm": done.grad_norm} if done.used else {"skipped": True}
            log.write({"step": step, "loss": done.loss, "lr": done.learning_rate, **of_gradients, "step_s": step_s})
            progress.set_postfix(loss=f"{done.loss:.3f}", refresh=False)
            progress.update()
            if step % options.validation_steps == 0 or step == last:
                with optimization.average.applied():
                    validate(step)
            saved = step % options.checkpointing_steps == 0
            if saved and run.is_main:
                save(step)
            if number := request.heard(run.accelerator):
                if run.is_main and not saved:
                    save(step)
                progress.close()
                run.accelerator.wait_for_everyone()
                run.accelerator.end_training()
                raise StoppedError(number, step=step, steps=last)
    progress.close()
    run.accelerator.wait_for_everyone()


def enable_gradient_checkpointing(family: ModelFamily) -> None:
    """Recompute activations in the backward pass, in every module that is trained."""
    for module in family.adapted.values():
        if hasattr(module, "enable_gradient_checkpointing"):  # diffusers' models
            cast(Any, module).enable_gradient_checkpointing()
        else:
            # the reentrant kind, transformers 4's default, needs inputs that require gradients: embeddings are frozen
            cast(Any, module).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
