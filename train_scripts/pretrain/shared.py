"""What all recipes of the tiny models share: processes, batches, training with checkpoints, files of a model."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import emoji_pictures as emoji
import torch
import torch.distributed as dist
from recipe_options import RecipeOptions
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from lorainit_diffusers.files import filling, save_tensors
from lorainit_diffusers.training.output_dir import RunDirectory, Wish, claim_directory

Model = Any  # models, schedulers and pipelines: their libraries annotate them too narrowly to check calls
IMAGE_SIZE = 64
MAX_TOKENS = 16


def start_process(seed: int) -> tuple[torch.device, int, int]:
    """Joins the processes that torchrun started, if it did; returns (device, rank, number of processes)."""
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        torch.set_num_threads(1)
    torch.manual_seed(seed)
    return device, rank, world_size


def rank_and_count() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait_for_all() -> None:
    """Returns when every process has got here."""
    if dist.is_initialized():
        dist.barrier()


def leave_processes() -> None:
    """Ends what `start_process` began."""
    if dist.is_initialized():
        dist.destroy_process_group()


def tokenize(tokenizer: Model, texts: list[str]) -> Tensor:
    """Token ids `(len(texts), MAX_TOKENS)`."""
    batch = tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    return batch["input_ids"]


def batch_indices(step: int, batch_size: int, num_images: int, seed: int) -> Tensor:
    """Indices of the batch of a step: each epoch is a permutation that depends on nothing but seed and epoch."""
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    indices = torch.empty_like(positions)
    for epoch in positions.div(num_images, rounding_mode="floor").unique().tolist():
        order = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        inside = positions.div(num_images, rounding_mode="floor") == epoch
        indices[inside] = order[positions[inside] % num_images]
    return indices


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, float]) -> None:
    """Write tensors and counters in one file, so that a kill leaves the old checkpoint or the new one."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_tensors(tensors, path, {"state": json.dumps(state)})


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Read what `save_checkpoint` wrote."""
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["state"])  # noqa: SIM118


@dataclass(frozen=True)
class Budget:
    """How long a training is: until the first of its limits; 0 is none.

    Attributes:
        minutes: Of wall time.
        steps: Of the optimiser.
    """

    minutes: float
    steps: int

    def progress(self, step: int, elapsed_s: float) -> float:
        """The share of the budget that is used up."""
        max_s = 60 * self.minutes
        return max(step / self.steps if self.steps else 0.0, elapsed_s / max_s if max_s else 0.0)


@dataclass(frozen=True)
class Phase:
    """One training of a recipe.

    Attributes:
        name: Of the phase, of its folder and of its log; the options of its budget begin with it.
        budget: How long it is.
        lr: Learning rate after the warm-up.
        final_lr: Learning rate at the end.
    """

    name: str
    budget: Budget
    lr: float
    final_lr: float

    def rate(self, step: int, progress: float) -> float:
        """The learning rate of a step: linear warm-up, constant, and half a cosine after 40 % of the budget."""
        warmup = min(1.0, (step + 1) / 200)
        decay = 0.5 + 0.5 * math.cos(math.pi * max(0.0, (progress - 0.4) / 0.6))
        return warmup * (self.final_lr + (self.lr - self.final_lr) * decay)


class Progress(NamedTuple):
    """Where a training is.

    Attributes:
        step: Steps done.
        elapsed_s: Wall time spent, over all its runs.
        loss: Running mean.
    """

    step: int = 0
    elapsed_s: float = 0.0
    loss: float = float("nan")


class Weights:
    """The parameters that a phase trains, their averages and their optimiser, as a checkpoint holds them."""

    def __init__(self, module: nn.Module, lr: float) -> None:
        self.named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.parameters = list(self.named.values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.ema = {name: p.detach().clone() for name, p in self.named.items()}

    def restore(self, path: Path, device: torch.device) -> Progress:
        """Take everything from a checkpoint, where there is one; where the training is."""
        if not path.exists():
            return Progress()
        tensors, state = load_checkpoint(path)
        for name, p in self.named.items():
            p.data.copy_(tensors[f"model.{name}"])
            self.ema[name].copy_(tensors[f"ema.{name}"])
            moments = {key: tensors[f"{key}.{name}"].to(device) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {"step": torch.tensor(float(state["step"]), device=device), **moments}
        return Progress(int(state["step"]), state["elapsed_s"], state["loss"])

    def save(self, path: Path, progress: Progress, num_processes: int) -> None:
        """Write a checkpoint."""
        tensors = {f"model.{name}": p for name, p in self.named.items()} | {f"ema.{k}": v for k, v in self.ema.items()}
        for key in ("exp_avg", "exp_avg_sq"):
            tensors |= {f"{key}.{name}": self.optimizer.state[p][key] for name, p in self.named.items()}
        save_checkpoint(path, tensors, {**progress._asdict(), "num_processes": num_processes})

    def step(self, lr: float, world_size: int) -> None:
        """One step along the gradients, which are averaged over the processes and then gone."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if world_size > 1:
            average_gradients(self.parameters, world_size)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def update_averages(ema: Mapping[str, Tensor], named: Mapping[str, nn.Parameter], step: int, ema_decay: float) -> None:
    """Move averages towards the parameters of a step, faster in the first ones."""
    decay = min(ema_decay, step / (step + 10))
    for name, p in named.items():
        ema[name].lerp_(p, 1 - decay)


def running_loss(running: float, value: float, phase: str, step: int) -> float:
    """The running mean of the losses with one more of them.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    if not math.isfinite(value):
        raise FloatingPointError(f"{phase}: loss is {value} at step {step}; lower the learning rate")
    return value if math.isnan(running) else 0.95 * running + 0.05 * value


def train(
    phase: Phase,
    module: nn.Module,
    loss_fn: Callable[[int, torch.Generator], Tensor],
    options: RecipeOptions,
    device: torch.device,
    on_checkpoint: Callable[[dict[str, Tensor], int], None] | None = None,
) -> dict[str, Tensor]:
    """Trains the parameters that require a gradient until the phase's budget is used up; resumes by itself.

    Noise and batches are functions of (seed, step, rank), so a resumed run repeats what an uninterrupted one does.

    Returns:
        The averaged (EMA) parameters by name.

    Raises:
        ValueError: The phase has neither a step nor a time budget.
        FloatingPointError: The loss is not finite.
    """
    rank, world_size = rank_and_count()
    name, budget = phase.name, phase.budget
    if not (budget.steps or budget.minutes):
        raise ValueError(f"--{name}_minutes and --{name}_steps are both 0, it would never end; set one")
    weights = Weights(module, phase.lr)
    path = options.work_dir / name / "checkpoint.safetensors"
    step, elapsed_s, running = weights.restore(path, device)
    bar = tqdm(desc=name, initial=step, total=budget.steps or None, disable=rank != 0, mininterval=10)
    last = last_checkpoint = time.monotonic()
    while True:
        elapsed_s, last = elapsed_s + time.monotonic() - last, time.monotonic()
        progress, due = _decide(budget.progress(step, elapsed_s), last - last_checkpoint > options.checkpoint_s, device)
        if step and (due or progress >= 1):
            if rank == 0:
                weights.save(path, Progress(step, elapsed_s, running), world_size)
                if on_checkpoint is not None:
                    on_checkpoint(weights.ema, step)
            last_checkpoint = time.monotonic()
        if progress >= 1:
            break
        generator = torch.Generator(device).manual_seed((options.seed * 1_000_003 + step) * 64 + rank)
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            loss = loss_fn(step, generator)
        cast(Any, loss).backward()
        weights.step(phase.rate(step, progress), world_size)
        step += 1
        update_averages(weights.ema, weights.named, step, options.ema_decay)
        if rank == 0 and step % 10 == 0:
            running = running_loss(running, loss.item(), name, step)
            bar.set_postfix(loss=f"{running:.4f}")
            if step % 50 == 0:
                line = {"step": step, "elapsed_s": round(elapsed_s, 1), "loss": running}
                with (options.work_dir / f"{name}.jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps(line) + "\n")
        bar.update()
    return weights.ema


def _decide(progress: float, due: bool, device: torch.device) -> tuple[float, bool]:
    """How far the training is and whether a checkpoint is due, as rank 0 says: the ranks' clocks differ."""
    if not dist.is_initialized():
        return progress, due
    decision = torch.tensor([progress, float(due)], device=device)
    dist.broadcast(decision, 0)
    return decision[0].item(), bool(decision[1] > 0)


def average_gradients(parameters: list[nn.Parameter], world_size: int) -> None:
    """Replaces each rank's gradients by their mean, in one message."""
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([grad.flatten() for grad in grads]).div_(world_size)
    dist.all_reduce(flat)
    for p, chunk in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = chunk.view_as(p)


def load_ema(module: nn.Module, ema: dict[str, Tensor]) -> None:
    """Copies averaged parameters into a module."""
    for name, p in module.named_parameters():
        if name in ema:
            p.data.copy_(ema[name])


def waves(side: int, width: int) -> Tensor:
    """Sines and cosines of row and column of a `side` x `side` grid, `(side**2, width)`: positions to start from."""
    frequencies = 100 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side).view(-1, 1) * frequencies
    half = torch.cat([angles.sin(), angles.cos()], 1)
    rows = half.unsqueeze(1).expand(side, side, -1)
    return torch.cat([rows, rows.transpose(0, 1)], 2).reshape(side**2, width)


def load_styles(options: RecipeOptions) -> tuple[dict[str, Tensor], dict[str, list[str]], dict[str, str]]:
    """The pictures of `render_styles`, rendered if need be: images and names by style, subgroups by name."""
    path = options.work_dir / "styles.safetensors"
    if "data" in options.phases and not path.exists() and rank_and_count()[0] == 0:
        emoji.render_styles(path, options.cache_dir, IMAGE_SIZE)
    wait_for_all()
    data = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return load_file(path), data["names"], data["subgroups"]


def load_trained(options: RecipeOptions, phase: str, module: nn.Module) -> None:
    """Copies the averaged parameters of a phase's checkpoint into a module.

    Raises:
        FileNotFoundError: The phase has not run.
    """
    checkpoint = options.work_dir / phase / "checkpoint.safetensors"
    if not checkpoint.exists():
        raise FileNotFoundError(f"{checkpoint} is missing; run the phase `{phase}` first")
    tensors, _ = load_checkpoint(checkpoint)
    load_ema(module, {name.removeprefix("ema."): value for name, value in tensors.items() if name.startswith("ema.")})


def claim_model_dir(options: RecipeOptions, script: str) -> RunDirectory | None:
    """The directory that a recipe's model goes to, in the process that exports it; nobody's files are replaced.

    The caller is decorated with `output_dir.owning`, and calls `begin` before it writes.

    Raises:
        ValueError: When the directory holds files that no run of this recipe wrote.
    """
    if "export" not in options.phases or rank_and_count()[0] != 0:
        return None
    return claim_directory(Wish(options.output_dir, script, goes_on=True))


def save_half(model: Model, directory: Path, save_rest: Callable[[Path], None]) -> None:
    """Writes a model of transformers over `directory`, in half precision, with what `save_rest` writes beside it."""
    with filling(directory) as scratch:
        _save_half(model, scratch)
        save_rest(scratch)


def _save_half(model: Model, scratch: Path) -> None:
    model.half().save_pretrained(scratch)
    config_path = scratch / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    for part in (config, *(config[name] for name in ("text_config", "vision_config") if name in config)):
        part["dtype"] = "float32"  # transformers 5 loads in the type that the config names
        part.pop("_name_or_path", None)  # a path of one machine
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def rename_weights(path: Path, pattern: str, replacement: str) -> None:
    """Give the tensors of a file the names that they have in published checkpoints, which transformers 4 needs.

    transformers 5 writes some without a prefix that it understands with and without; 4 would leave out what they hold,
    and fill the model with random numbers instead.
    """
    state = {re.sub(pattern, replacement, name): tensor for name, tensor in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})
