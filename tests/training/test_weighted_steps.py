"""One optimiser step is the same whether its samples come in one batch, in micro-batches, or on several processes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from classifier_fixtures import CLASSES, SIDE, random_classifier
from core_fixtures import relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from vlm_fixtures import ask, make_image, write_base

from lorainit_diffusers import adapters
from lorainit_diffusers.evaluation import fixed_noise_loss
from lorainit_diffusers.families.base import ModelFamily, StepRecord, UniformDraws, loss_weight
from lorainit_diffusers.families.classifier import ClassifierFamily, ImagePreparation
from lorainit_diffusers.families.sd import StableDiffusionFamily
from lorainit_diffusers.families.vlm import IGNORED, VisionLanguageFamily
from lorainit_diffusers.initialize import initialize
from lorainit_diffusers.training.loop import backward_step

ANSWERS = ("no", "a green pear and a red apple and fruit", "red apple", "yes yes yes yes yes yes")


class ScalarFamily:
    """w * x, whose loss is the mean of (w * x)^2 over the numbers of a batch; its gradient in w is 2 w * mean(x^2)."""

    def __init__(self) -> None:
        self.module = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.module.weight, 3.0)
        self.step = StepRecord()
        self.drawn: list[int] = []

    @property
    def adapted(self) -> Mapping[str, nn.Module]:
        return {"model": self.module}

    @property
    def heads(self) -> Mapping[str, nn.Module]:
        return {}

    def default_targets(self, component: str) -> list[str]:
        return [component]

    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        self.drawn.append(int(torch.randint(2**31, (1,), generator=generator)))
        return self.module(batch[:, None]).square().mean()

    def stratified_timesteps(self, num_samples: int, generator: torch.Generator) -> AbstractContextManager[None]:
        return nullcontext()


def step_of(
    family: ModelFamily, batches: Sequence[Any], parameters: Sequence[nn.Parameter], accelerator: Accelerator
) -> tuple[float, Tensor]:
    """Loss and gradient of one step over these micro-batches; without clipping to speak of."""
    for parameter in parameters:
        parameter.grad = None
    args = argparse.Namespace(gradient_accumulation_steps=len(batches), seed=0, learning_rate=1e-3, max_grad_norm=1e9)
    loss, _ = backward_step(args, family, iter(batches), accelerator, parameters, 1)
    return loss, torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])


def vlm_samples(family: VisionLanguageFamily) -> list[dict[str, Tensor]]:
    samples = [family.encode(ask("What is this?", answer), [make_image(i)]) for i, answer in enumerate(ANSWERS)]
    assert len({int((sample["labels"] != IGNORED).sum()) for sample in samples}) == len(samples)
    return samples


def nudged(family: ModelFamily) -> list[nn.Parameter]:
    """The parameters of random adapters whose B is not zero."""
    initialize(family, "gaussian", rank=2, progress=False)
    parameters = [p for module in family.adapted.values() for p in adapters.trainable_parameters(module)]
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters[1::2]:
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return parameters


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def test_answers_of_different_lengths_weigh_by_their_tokens(tmp_path: Path, accelerator: Accelerator) -> None:
    family = VisionLanguageFamily.from_pretrained(write_base(tmp_path, "llava"))
    samples, parameters = vlm_samples(family), nudged(family)
    loss, gradient = step_of(family, [family.collate(samples)], parameters, accelerator)
    for split in ([1, 1, 1, 1], [1, 3], [3, 1], [2, 2]):
        parts = [family.collate(part) for part in torch.utils.data.random_split(samples, split)]  # type: ignore[arg-type]
        parts_loss, parts_gradient = step_of(family, parts, parameters, accelerator)
        assert parts_loss == pytest.approx(loss, rel=1e-5)
        assert relative_error(parts_gradient, gradient) < 1e-5, split


def test_a_smaller_last_batch_of_images_weighs_less(accelerator: Accelerator) -> None:
    torch.manual_seed(0)
    model = random_classifier().requires_grad_(False).eval()
    family = ClassifierFamily(model, ImagePreparation(SIDE, SIDE), CLASSES)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (7, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    labels, parameters = torch.arange(7) % 3, nudged(family)
    batches = [{"pixel_values": pixels[part], "labels": labels[part]} for part in (slice(0, 5), slice(5, 7))]
    loss, gradient = step_of(family, [{"pixel_values": pixels, "labels": labels}], parameters, accelerator)
    parts_loss, parts_gradient = step_of(family, batches, parameters, accelerator)
    assert parts_loss == pytest.approx(loss, rel=1e-5)
    assert relative_error(parts_gradient, gradient) < 1e-5


@pytest.mark.parametrize("prior", [False, True])
def test_text_to_image_batches_weigh_by_their_images(
    random_sd: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch, prior: bool
) -> None:
    """With noise and timesteps that belong to the images, whatever batch these are in."""
    family = StableDiffusionFamily.from_pretrained(random_sd)
    count = 6
    generator = torch.Generator().manual_seed(0)
    columns = {
        "latents": torch.randn(count, 4, 8, 8, generator=generator),
        "input_ids": family.tokenize(["a cat", "a dog"] * (count // 2)),
        "noise": torch.randn(count, 4, 8, 8, generator=generator),
        "u": torch.rand(count, generator=generator, dtype=torch.float64),
    }
    if prior:
        columns["is_class"] = torch.arange(count) % 2 == 1
    queue: list[Mapping[str, Tensor]] = []
    monkeypatch.setattr(family, "_noise", lambda shape, generator: queue[0]["noise"])
    monkeypatch.setattr(UniformDraws, "draw", lambda self, number, generator: queue[0]["u"])
    own_loss = family.loss

    def loss(batch: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        queue[:] = [batch]
        return own_loss(batch, generator)

    monkeypatch.setattr(family, "loss", loss)
    parameters = nudged(family)
    parts = [{name: rows[part] for name, rows in columns.items()} for part in (slice(0, 4), slice(4, 6))]
    whole_loss, gradient = step_of(family, [columns], parameters, accelerator)
    parts_loss, parts_gradient = step_of(family, parts, parameters, accelerator)
    assert parts_loss == pytest.approx(whole_loss, rel=1e-5)
    assert relative_error(parts_gradient, gradient) < 1e-5


def test_a_family_without_weights_of_its_own_weighs_by_samples(accelerator: Accelerator) -> None:
    family = ScalarFamily()
    assert isinstance(family, ModelFamily)
    numbers = torch.tensor([1.0, 2.0, 5.0, 7.0, 11.0])
    loss, gradient = step_of(family, [numbers[:1], numbers[1:]], list(family.module.parameters()), accelerator)
    mean = float(numbers.square().mean())
    assert loss == pytest.approx(9 * mean)
    assert float(gradient) == pytest.approx(6 * mean)
    assert len(set(family.drawn)) == 2  # each micro-step draws its own
    assert fixed_noise_loss(family, [numbers[:1], numbers[1:]], 5) == pytest.approx(9 * mean)  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("batch", "weight"),
    [
        (torch.zeros(3, 2), 3),
        (torch.zeros(()), 1),
        ({"name": ["a", "b"], "scale": torch.zeros(()), "x": torch.zeros(4, 1)}, 4),
        ([torch.zeros(5, 1), torch.zeros(5)], 5),
        ({}, 1),
        ("text", 1),
    ],
)
def test_samples_of_a_batch(batch: Any, weight: float) -> None:
    assert loss_weight(ScalarFamily(), batch) == weight


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_that_are_none(accelerator: Accelerator, weight: float) -> None:
    class Weighted(ScalarFamily):
        def loss_weight(self, batch: Tensor) -> float:
            return weight

    family = Weighted()
    with pytest.raises(ValueError, match=r"Weighted\.loss_weight gives .* for a batch; it must be positive"):
        step_of(family, [torch.ones(2)], list(family.module.parameters()), accelerator)
    assert family.drawn == []


def test_equal_weights_give_the_plain_mean_bit_for_bit(accelerator: Accelerator) -> None:
    family = ScalarFamily()
    numbers = torch.rand(9, generator=torch.Generator().manual_seed(0))
    parts = [numbers[:3], numbers[3:6], numbers[6:]]
    loss, gradient = step_of(family, parts, list(family.module.parameters()), accelerator)
    family.module.weight.grad, total = None, torch.zeros(())
    for part in parts:
        share = family.module(part[:, None]).square().mean() / 3
        share.backward()
        total += share.detach()
    assert loss == float(total)
    assert family.module.weight.grad is not None
    assert torch.equal(gradient, family.module.weight.grad.flatten())


def test_the_mean_gradient_of_a_collection_is_that_of_one_batch(tmp_path: Path) -> None:
    factors = {}
    base = write_base(tmp_path, "llava")
    for name in ("one", "several"):
        family = VisionLanguageFamily.from_pretrained(base)
        samples = vlm_samples(family)
        parts = [samples] if name == "one" else [samples[:1], samples[1:]]
        initialize(family, "lora_ga", [family.collate(part) for part in parts], rank=2, progress=False)
        factors[name] = {
            layer: weights.factors.lora_B @ weights.factors.lora_B.mT
            for layer, weights in adapters.adapter_weights(family.model).items()
        }
    for layer, expected in factors["one"].items():
        assert relative_error(factors["several"][layer], expected) < 1e-2, layer


# -------------------------------------------------------------------------------------------------------- two processes


def _step_in_process(process: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(process), "LOCAL_RANK": str(process), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=process, world_size=2, timeout=timedelta(seconds=90)
    )
    try:
        accelerator = Accelerator(cpu=True)
        assert (accelerator.num_processes, accelerator.process_index) == (2, process)
        family = VisionLanguageFamily.from_pretrained(f"{folder}/base")
        samples, parameters = vlm_samples(family), nudged(family)
        own = [family.collate([sample]) for sample in samples[process::2]]
        loss, gradient = step_of(family, own, parameters, accelerator)
        again = VisionLanguageFamily.from_pretrained(f"{folder}/base")
        initialize(again, "lora_ga", own, rank=2, progress=False)
        result = {"loss": torch.tensor(loss), "gradient": gradient}
        for layer, weights in adapters.adapter_weights(again.model).items():
            result[layer] = weights.factors.lora_B @ weights.factors.lora_B.mT
        save_file(result, f"{folder}/{process}.safetensors")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_two_processes_with_answers_of_different_lengths(tmp_path: Path, accelerator: Accelerator) -> None:
    write_base(tmp_path / "base", "llava")
    torch.multiprocessing.spawn(_step_in_process, args=(str(tmp_path),), nprocs=2)
    first, second = (load_file(tmp_path / f"{process}.safetensors") for process in range(2))
    assert all(torch.equal(values, second[name]) for name, values in first.items())
    family = VisionLanguageFamily.from_pretrained(tmp_path / "base")
    samples, parameters = vlm_samples(family), nudged(family)
    loss, gradient = step_of(family, [family.collate(samples)], parameters, accelerator)
    assert float(first["loss"]) == pytest.approx(loss, rel=1e-5)
    assert relative_error(first["gradient"], gradient) < 1e-5
    family = VisionLanguageFamily.from_pretrained(tmp_path / "base")
    initialize(family, "lora_ga", [family.collate(samples)], rank=2, progress=False)
    for layer, weights in adapters.adapter_weights(family.model).items():
        expected = weights.factors.lora_B @ weights.factors.lora_B.mT
        assert relative_error(first[layer], expected) < 1e-2, layer
