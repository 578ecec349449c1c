"""A training loop written from the documentation alone, which the scripts' loops are held against.

What it takes from the project is `family.loss`, which says what one training step is. Seeds, the order of the data, the
mean over micro-steps and processes, clipping, the schedule, the moving average: all of it stands here a second time, so
that a loop that is wrong twice (interrupted and uninterrupted, in one process and in two) is still found out.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from vlm_fixtures import ask, make_image, write_lines

Weights = dict[str, Tensor]


def seed_of(*parts: int | str) -> int:
    """The first 63 of the 64 bits of BLAKE2b over the parts, joined by slashes."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seeded(*parts: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*parts))


def data_order(num_samples: int, batch_size: int, seed: int, batch: int) -> list[tuple[int, int]]:
    """Index and seed of every sample of one batch: each epoch is a permutation, and batches run over its end."""
    keys: list[tuple[int, int]] = []
    for position in range(batch * batch_size, (batch + 1) * batch_size):
        epoch, place = divmod(position, num_samples)
        order = torch.randperm(num_samples, generator=seeded(seed, "order", epoch)).tolist()
        keys.append((order[place], seed_of(seed, "image", position)))
    return keys


def schedule(kind: str, step: int, *, warmup: int, steps: int) -> float:
    """The learning rate of optimiser step `step` (the first is 1), as a multiple of the one that was asked for."""
    done = step - 1
    if kind != "constant" and done < warmup:
        return done / warmup
    progress = (done - warmup) / max(1, steps - warmup)
    factors = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return factors[kind]


@dataclass
class Plan:
    """How the loop goes; names and meanings are those of the scripts' options."""

    learning_rate: float
    steps: int = 10
    seed: int = 0
    accumulation: int = 1
    processes: int = 1
    schedule: str = "constant"
    warmup: int = 0
    max_grad_norm: float = 1.0
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    ema_decay: float | None = None
    other_rates: Mapping[str, float] = field(default_factory=dict[str, float])  # by a part of the names
    skipped: frozenset[int] = frozenset()  # steps that a scaler of gradients leaves out


@dataclass
class Trace:
    """What the loop did.

    Attributes:
        losses, rates, norms: one number an optimiser step, as `metrics.jsonl` has them.
        weights: the trained weights after every step; `weights[0]` is the start.
        averages: the moving average after every step; empty without one.
    """

    losses: list[float]
    rates: list[float]
    norms: list[float]
    weights: list[Weights]
    averages: list[Weights]


def plain_loop(
    family: Any,
    parameters: Mapping[str, nn.Parameter],
    batch: Callable[[int], Mapping[str, Any]],
    plan: Plan,
    *,
    size_of: Callable[[Mapping[str, Any]], float] = lambda batch: 1.0,
) -> Trace:
    """Train `parameters` with `family.loss` on the batches of these numbers.

    Args:
        family: gives the loss.
        parameters: what is trained, by name.
        batch: number -> batch; micro-step m of step s in process p takes number ((s - 1) * micro-steps + m) * processes
            + p.
        plan: how.
        size_of: what a batch counts in the mean over the batches of one step: the tokens of its answers, or 1.
    """
    groups = [{"params": [p], "lr": 0.0, "rate": _rate_of(name, plan)} for name, p in parameters.items()]
    optimizer = torch.optim.AdamW(groups, betas=plan.betas, eps=plan.epsilon, weight_decay=plan.weight_decay)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    average = {name: value.clone() for name, value in start.items()}
    trace = Trace([], [], [], [start], [average])
    for step in range(1, plan.steps + 1):
        turns = [(micro, process) for micro in range(plan.accumulation) for process in range(plan.processes)]
        first = (step - 1) * len(turns)
        batches = [batch(first + turn) for turn in range(len(turns))]
        total = sum(map(size_of, batches))
        optimizer.zero_grad()
        mean = 0.0
        for turn, (micro, process) in enumerate(turns):
            parts = (plan.seed, "step", step, micro, process)
            torch.manual_seed(seed_of(*parts))
            loss = family.loss(batches[turn], seeded(*parts)) * (size_of(batches[turn]) / total)
            loss.backward()
            mean += float(loss.detach())
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters.values() if p.grad is not None))
        if norm > plan.max_grad_norm:
            for parameter in parameters.values():
                if parameter.grad is not None:
                    parameter.grad *= plan.max_grad_norm / norm
        used = step - sum(skipped < step for skipped in plan.skipped)  # this step, of those that are used
        factor = schedule(plan.schedule, used, warmup=plan.warmup, steps=plan.steps)
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * factor
        if step not in plan.skipped:
            optimizer.step()
        now = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        trace.losses.append(mean)
        trace.rates.append(plan.learning_rate * factor)
        trace.norms.append(norm)
        trace.weights.append(now)
        if plan.ema_decay is not None:
            # the first update takes the weights as they are; the k-th after it has a decay of (1 + k) / (10 + k)
            decay = min(plan.ema_decay, used / (9 + used)) if used > 1 else 0.0
            decay = 1.0 if step in plan.skipped else decay
            average = {name: decay * average[name] + (1 - decay) * value for name, value in now.items()}
            trace.averages.append(average)
    return trace


def folder_batches(
    family: Any, folder: Path, batch_size: int, seed: int, prompt: str | None = None
) -> Callable[[int], dict[str, Tensor]]:
    """Number -> batch of the images of a folder, which have the resolution that is trained.

    Args:
        family: tokenizes the captions.
        folder: images and `metadata.jsonl`.
        batch_size: of a micro-step of one process.
        seed: of the order.
        prompt: instead of the captions.
    """
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    images = [np.asarray(Image.open(folder / line["file_name"]), dtype=np.float32) for line in lines]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1.0

    def batch(number: int) -> dict[str, Tensor]:
        chosen = [index for index, _ in data_order(len(lines), batch_size, seed, number)]
        captions = family.caption_inputs([prompt or lines[index]["text"] for index in chosen])
        return {"pixel_values": pixels[chosen], **captions}

    return batch


ANSWERS = ("no", "a red apple and a green pear", "pear", "yes it is", "this is a fruit", "red")
QUESTION = "What is this?"


def write_answers(folder: Path) -> Path:
    """`train.jsonl` with answers of different lengths and a `validation.jsonl` beside it; returns the former."""
    folder.mkdir(parents=True)
    lines = [{"image": f"{i}.png", "question": QUESTION, "answer": answer} for i, answer in enumerate(ANSWERS)]
    for index in range(len(lines) + 1):
        make_image(index).save(folder / f"{index}.png")
    write_lines(folder / "validation.jsonl", [{**lines[0], "image": f"{len(lines)}.png"}])
    return write_lines(folder / "train.jsonl", lines)


def answer_batches(family: Any, batch_size: int, seed: int) -> Callable[[int], dict[str, Tensor]]:
    """Number -> batch of what `write_answers` wrote."""

    def batch(number: int) -> dict[str, Tensor]:
        chosen = [index for index, _ in data_order(len(ANSWERS), batch_size, seed, number)]
        return family.collate([family.encode(ask(QUESTION, ANSWERS[i]), [make_image(i)]) for i in chosen])

    return batch


def num_answer_tokens(batch: Mapping[str, Any]) -> float:
    """What the loss of a vision-language model is the mean over."""
    return float((batch["labels"] != -100).sum())


def _rate_of(name: str, plan: Plan) -> float:
    return next((rate for part, rate in plan.other_rates.items() if part in name), plan.learning_rate)


def add_lora(
    modules: Mapping[str, nn.Module], start: Mapping[str, Tensor], *, alpha: float, dropout: float = 0.0
) -> dict[str, nn.Parameter]:
    """PEFT's own LoRA on the layers that `start` names, with these factors; the trained weights by name.

    `start` has `{component}.{layer}.lora_A` and `.lora_B`; other names in it are passed over. All else is frozen.
    """
    trained: dict[str, nn.Parameter] = {}
    for component, module in modules.items():
        prefix = f"{component}."
        factors = {
            name.removeprefix(prefix): value
            for name, value in start.items()
            if name.startswith(prefix) and name.endswith((".lora_A", ".lora_B"))
        }
        layers = sorted({name.rpartition(".")[0] for name in factors})
        rank = min(factors[f"{layers[0]}.lora_A"].shape)
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=layers)  # pyright: ignore
        inject_adapter_in_model(config, module)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(".lora_" in name)
            if ".lora_" in name:
                own = name.replace(".default.weight", "")
                parameter.data.copy_(factors[own])
                trained[prefix + own] = parameter
        module.train()
    return trained


@dataclass
class Call:
    """One call of `family.loss`: whether it was a training step, what it was given, drew and gave."""

    training: bool
    batch: dict[str, Any]
    loss: float
    timesteps: Tensor | None
    weights: Weights


class Recorder:
    """Notes every call of a family's `loss`, with the adapters' weights at that moment.

    Attributes:
        calls: of `loss`, in order.
        drawn_with: the adapters' weights at every call of `sample`, in order; empty where there are no adapters yet.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, family_class: type[Any]) -> None:
        self.calls: list[Call] = []
        self.drawn_with: list[Weights] = []
        original = family_class.loss
        original_sample = getattr(family_class, "sample", None)

        def loss(family: Any, batch: Mapping[str, Any], generator: torch.Generator) -> Tensor:
            weights = adapters_of(family.adapted)
            for name, head in family.heads.items():
                weights |= {f"{name}.{key}": value.detach().clone() for key, value in head.state_dict().items()}
            value = original(family, batch, generator)
            training = torch.is_grad_enabled()
            self.calls.append(Call(training, dict(batch), float(value.detach()), family.step.timesteps, weights))
            return value

        def sample(family: Any, *args: Any, **options: Any) -> Any:
            self.drawn_with.append(adapters_of(family.adapted))
            assert original_sample is not None
            return original_sample(family, *args, **options)

        monkeypatch.setattr(family_class, "loss", loss)
        if original_sample is not None:
            monkeypatch.setattr(family_class, "sample", sample)

    @property
    def start(self) -> Weights:
        """The weights that the first training step found."""
        return next(call.weights for call in self.calls if call.training and call.weights)

    @property
    def validations(self) -> list[Call]:
        """Calls without gradients after the adapters were there: those of validations."""
        return [call for call in self.calls if not call.training and call.weights]


def adapters_of(modules: Mapping[str, nn.Module]) -> Weights:
    """`{component}.{layer}.lora_A` and `.lora_B` of every adapter that is there, as they are now."""
    return {
        f"{component}.{name}".replace(".default.weight", ""): parameter.detach().clone()
        for component, module in modules.items()
        for name, parameter in module.named_parameters()
        if name.endswith((".lora_A.default.weight", ".lora_B.default.weight"))
    }


def assert_same(ours: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-6) -> None:
    """Weights by name are the same numbers, and have moved far enough for that to mean something."""
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=0.0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


def exported(weights: Mapping[str, Tensor], scaling: float) -> Weights:
    """What a file of this LoRA holds: the scaling is folded into B."""
    return {
        f"{name}.weight": value * scaling if name.endswith("lora_B") else value
        for name, value in weights.items()
        if name.endswith(("lora_A", "lora_B"))
    }


def adapter_file(directory: Path) -> dict[str, Tensor]:
    """PEFT's file, without what PEFT puts before the names."""
    tensors = load_file(directory / "adapter_model.safetensors")
    return {name.replace("base_model.model.", "model."): value for name, value in tensors.items()}


def without_endings(weights: Mapping[str, Tensor]) -> Weights:
    """The factors in a file by the names that `add_lora` takes; of a file whose scaling is 1."""
    return {name.removesuffix(".weight"): value for name, value in weights.items()}


def column(lines: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """One number of every training step's line."""
    return [line[name] for line in lines if "loss" in line]
