"""A training loop with the shape of diffusers' scripts, in a few lines and on a model of a few numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 6


class TinyTransformer2DModel(nn.Module):
    """Two linear layers, the second of which can be checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)
        self.checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        def block(x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

        return checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)


def reset_accelerate() -> None:
    """Forget every accelerator, as a new process has it."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def make_model(seed: int = 3, **config: Any) -> Any:
    """A frozen base with an adapter of rank 2, as scripts add it."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"r": 2, "lora_alpha": 2, "target_modules": ["first", "second"], **config}
    return get_peft_model(TinyTransformer2DModel(), LoraConfig(**options))  # type: ignore[arg-type]


@dataclass
class Loop:
    """One run of the loop.

    Attributes:
        steps: optimiser steps to make; ``accumulation`` micro-steps each.
        prepare_scheduler: or leave it as torch made it.
        prepare_loader: or draw batches from a plain loader.
        use_accumulate: or count every micro-step as a step, whatever the accelerator says.
        during: called in every micro-step after `backward`, with the loop.
        before: called after `prepare`, with the loop.
    """

    steps: int = 6
    accumulation: int = 1
    prepare_scheduler: bool = True
    prepare_loader: bool = True
    use_accumulate: bool = True
    seed: int = 0
    model: Any = None
    during: Callable[[Loop], None] | None = None
    before: Callable[[Loop], None] | None = None
    resume_from: str | None = None
    save_at: dict[int, str] = field(default_factory=dict[int, str])
    # What the run leaves.
    inputs: list[Tensor] = field(default_factory=list[Tensor])
    targets: list[Tensor] = field(default_factory=list[Tensor])
    losses: list[float] = field(default_factory=list[float])
    rates: list[float] = field(default_factory=list[float])
    synced: list[bool] = field(default_factory=list[bool])
    accelerator: Any = None
    optimizer: Any = None
    scheduler: Any = None
    loader: Any = None

    def run(self) -> Loop:
        reset_accelerate()
        self.accelerator = accelerator = Accelerator(cpu=True, gradient_accumulation_steps=self.accumulation)
        model = self.model if self.model is not None else make_model()
        torch.manual_seed(self.seed)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer: Any = torch.optim.AdamW(trained, lr=0.05)
        scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        data = torch.arange(5 * WIDTH, dtype=torch.float32).reshape(5, WIDTH) / 30
        loader: Any = torch.utils.data.DataLoader(data, batch_size=1, shuffle=True)  # type: ignore[arg-type]
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.loader = accelerator.prepare(loader) if self.prepare_loader else loader
        self.scheduler = accelerator.prepare(scheduler) if self.prepare_scheduler else scheduler
        if self.before is not None:
            self.before(self)
        step = 0
        if self.resume_from is not None:
            accelerator.load_state(self.resume_from)
            step = int(self.resume_from.rpartition("-")[2])
        while step < self.steps:
            self.model.train()
            for batch in self.loader:
                step = self._micro_step(batch, step)
                if step >= self.steps:
                    break
        return self

    def _micro_step(self, batch: Tensor, step: int) -> int:
        accelerator = self.accelerator
        noise = torch.randn_like(batch)
        self.inputs.append(batch + noise)
        self.targets.append(noise)
        if self.use_accumulate:
            with accelerator.accumulate(self.model):
                self._train(batch, noise)
        else:
            self._train(batch, noise)
        if accelerator.sync_gradients or not self.use_accumulate:
            step += 1
            if step in self.save_at:
                accelerator.save_state(self.save_at[step])
        return step

    def _train(self, batch: Tensor, noise: Tensor) -> None:
        loss = (self.model(batch + noise) - noise).square().mean()
        self.losses.append(float(loss.detach()))
        self.accelerator.backward(loss)
        if self.during is not None:
            self.during(self)
        if self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.synced.append(self.accelerator.sync_gradients)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.rates.append(self.scheduler.get_last_lr()[0])
