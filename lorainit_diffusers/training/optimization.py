"""The trained weights: their optimiser, schedule and moving average, and the checkpoints of all of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from lorainit_diffusers import adapters
from lorainit_diffusers.families.base import ModelFamily
from lorainit_diffusers.training import checkpoints
from lorainit_diffusers.training.gradients import DivergedError, weight_at_fault
from lorainit_diffusers.training.options.fields import values_of
from lorainit_diffusers.training.options.initialisation import HeadOptions, TextEncoderRateOptions
from lorainit_diffusers.training.options.optimisation import OptimizerOptions, TrainingOptions
from lorainit_diffusers.training.run import Run


def make_optimizer(options: OptimizerOptions, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimiser that `--optimizer` names, over parameter groups that carry their learning rates."""
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups)
    betas = (options.adam_beta1, options.adam_beta2)
    if options.optimizer == "prodigy":
        return importlib.import_module("prodigyopt").Prodigy(
            groups,
            betas=betas,
            beta3=options.prodigy_beta3,
            weight_decay=options.adam_weight_decay,
            eps=options.adam_epsilon,
            decouple=options.prodigy_decouple,
            use_bias_correction=options.prodigy_use_bias_correction,
            safeguard_warmup=options.prodigy_safeguard_warmup,
        )
    adamw = importlib.import_module("bitsandbytes").optim.AdamW8bit if options.use_8bit_adam else torch.optim.AdamW
    return adamw(groups, betas=betas, weight_decay=options.adam_weight_decay, eps=options.adam_epsilon)


class WeightAverage:
    """An exponential moving average of the trained weights (`--use_ema`), or nothing at all."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float | None) -> None:
        self.parameters = parameters
        self.average = EMAModel(parameters, decay=decay) if decay is not None else None

    def update(self) -> None:
        """Follow one optimiser step."""
        if self.average is not None:
            self.average.step(self.parameters)

    @contextmanager
    def applied(self) -> Generator[None, None, None]:
        """The model has the averaged weights inside the block."""
        if self.average is None:
            yield
            return
        self.average.store(self.parameters)
        self.average.copy_to(self.parameters)
        try:
            yield
        finally:
            self.average.restore(self.parameters)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it."""
        if self.average is None:
            return {}
        return {f"ema.{index}": value for index, value in enumerate(self.average.shadow_params)}

    def load(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Inverse of `state`, after `step` updates: as many as the schedule has steps."""
        if self.average is not None:
            for index, value in enumerate(self.average.shadow_params):
                value.copy_(tensors[f"ema.{index}"])
            self.average.optimization_step = step


def parameter_groups(options: TrainingOptions, family: ModelFamily) -> list[dict[str, Any]]:
    """What is trained and how fast: the adapters, those of text encoders at their own rate, and the heads at theirs."""
    text_rate = options.text_encoder_lr if isinstance(options, TextEncoderRateOptions) else options.learning_rate
    groups: list[dict[str, Any]] = [
        {
            "params": adapters.trainable_parameters(module),
            "lr": text_rate if name.startswith("text_encoder") else options.learning_rate,
        }
        for name, module in family.adapted.items()
    ]
    if family.heads:
        heads = [parameter for head in family.heads.values() for parameter in head.parameters()]
        groups.append(
            {"params": heads, "lr": options.head_lr if isinstance(options, HeadOptions) else options.learning_rate}
        )
    return groups


class Stepper:
    """An optimiser with its schedule, over weights that are trained: what one step moves.

    Args:
        options: Of optimiser and schedule.
        groups: Of parameters, with their learning rates.
        family: That they are in.
        accelerator: Of the processes that train together.
        parameters: The same parameters, in the order that clipping adds their norms in; that of the groups by default.

    Attributes:
        parameters: The trained weights.
        optimizer: Prepared by the accelerator.
        lr_scheduler: Stepped once an optimiser step, so it needs no correction for processes and accumulation.
    """

    def __init__(
        self,
        options: OptimizerOptions,
        groups: list[dict[str, Any]],
        family: ModelFamily,
        accelerator: Accelerator,
        parameters: Sequence[nn.Parameter] | None = None,
    ) -> None:
        self.family = family
        grouped: list[nn.Parameter] = [parameter for group in groups for parameter in group["params"]]
        self.parameters = grouped if parameters is None else list(parameters)
        self.optimizer: Any = accelerator.prepare_optimizer(make_optimizer(options, groups))
        self.lr_scheduler = get_scheduler(
            options.lr_scheduler,
            self.optimizer.optimizer,
            num_warmup_steps=options.lr_warmup_steps,
            num_training_steps=options.max_train_steps,
            num_cycles=options.lr_num_cycles,
            power=options.lr_power,
        )

    def step(self) -> bool:
        """Use the gradients, and clear them; whether the scaler let them be used: or else nothing moves.

        Raises:
            DivergedError: When a weight is not finite afterwards; names it.
        """
        self.optimizer.step()
        used = not self.optimizer.step_was_skipped
        self.optimizer.zero_grad()
        if not used:
            return False
        name = weight_at_fault(self.family.adapted, self.parameters)
        if name is not None:
            rates = ", ".join(f"{group['lr']:g}" for group in self.optimizer.param_groups)
            raise DivergedError(
                f"the weight {name} is not finite after a step with the learning rate {rates}; lower it"
            )
        self.lr_scheduler.step()
        return True


class Optimization:
    """What moves the trained weights, and what a checkpoint keeps of a run.

    Attributes:
        parameters: The trained weights.
        optimizer: Prepared by the accelerator.
        lr_scheduler: Stepped once an optimiser step, so it needs no correction for processes and accumulation.
        average: The moving average of the weights.
    """

    def __init__(self, run: Run[Any], family: ModelFamily) -> None:
        options, accelerator, state = run.options, run.accelerator, run.state
        self.run, self.family, self.accelerator = run, family, accelerator
        self._stepper = Stepper(options, parameter_groups(options, family), family, accelerator)
        self.parameters = self._stepper.parameters
        self.optimizer, self.lr_scheduler = self._stepper.optimizer, self._stepper.lr_scheduler
        self.average = WeightAverage(self.parameters, options.ema_decay if options.use_ema else None)
        if state is not None:
            state.restore(self.optimizer.optimizer, self.lr_scheduler)
            # a step that the scaler skipped moved neither
            self.average.load(state.tensors, int(self.lr_scheduler.last_epoch))
            if accelerator.scaler is not None and state.extra["scaler"] is not None:
                accelerator.scaler.load_state_dict(state.extra["scaler"])

    def step(self) -> bool:
        """Use the gradients, and clear them; whether the scaler let them be used: or else nothing moves.

        Raises:
            DivergedError: When a weight is not finite afterwards; names it.
        """
        if not self._stepper.step():
            return False
        self.average.update()
        return True

    def save(self, step: int, init_report: Mapping[str, Any], write_more: Callable[[Path], None] | None = None) -> None:
        """Write a checkpoint, the oldest making room before it; one always stays, whenever the run is killed.

        `write_more` writes further files into the checkpoint's folder, with the averaged weights in the model where
        there are any.

        Raises:
            ValueError: When something is not finite; the last checkpoint is then as it was.
        """

        def write_averaged(folder: Path) -> None:
            if write_more is not None:
                with self.average.applied():
                    write_more(folder)

        output_dir, limit = self.run.output_dir, self.run.options.checkpoints_total_limit
        if limit is not None:
            checkpoints.prune_checkpoints(output_dir, max(limit - 1, 1), step=step)
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None
        checkpoints.save_training_state(
            output_dir / f"checkpoint-{step}",
            tensors={
                **adapters.adapter_state_dict(self.family.adapted),
                **head_state_dict(self.family.heads),
                **self.average.state(),
            },
            optimizer=self.optimizer.optimizer,
            lr_scheduler=self.lr_scheduler,
            step=step,
            extra={
                **{"arguments": values_of(self.run.options), "identity": dict(self.run.identity)},
                **{"init_report": dict(init_report), "scaler": scaler},
            },
            write_more=write_averaged,
        )
        if limit is not None:
            checkpoints.prune_checkpoints(output_dir, limit, step=step)


def head_state_dict(heads: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The modules that are trained in full, for a checkpoint: `head.{component}.{name}.{parameter}`, on the CPU."""
    return {
        f"head.{name}.{key}": value.detach().cpu().clone()
        for name, head in heads.items()
        for key, value in head.state_dict().items()
    }


def load_heads(heads: Mapping[str, nn.Module], state: Mapping[str, Tensor]) -> None:
    """Inverse of `head_state_dict`; the heads are trainable afterwards."""
    for name, head in heads.items():
        prefix = f"head.{name}."
        head.load_state_dict({key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)})
        head.requires_grad_(True)
