"""Every family keeps what `ModelFamily` and the text-to-image template promise; a new one is tested by being listed."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from family_fixtures import batches_of, load_family
from torch import Tensor, nn

from lorainit_diffusers import initialize
from lorainit_diffusers.families import FAMILIES, TEXT_TO_IMAGE_FAMILIES, ModelFamily, family_class
from lorainit_diffusers.families.base import EvaluationMode, WeighsBatches, evaluating, loss_weight
from lorainit_diffusers.ranges import STEP_RANGES

# Families whose loss draws nothing where nothing is augmented or dropped.
WITHOUT_NOISE = ("classifier", "vlm")


def class_of(kind: str) -> Any:
    module, name = FAMILIES[kind]
    return getattr(importlib.import_module(f"lorainit_diffusers.families.{module}"), name)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loss_of(family: Any, batch: Mapping[str, Tensor], seed: int = 0) -> Tensor:
    with torch.no_grad():
        return family.loss(batch, seeded(seed))


@pytest.fixture(scope="module", params=FAMILIES)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def family(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A family as it is loaded; tests that change it take `fresh`."""
    return load_family(kind, tmp_path_factory.mktemp(kind) / "base")


@pytest.fixture(scope="module")
def batch(kind: str, family: Any) -> dict[str, Any]:
    return batches_of(kind, family)[1]


@pytest.fixture
def fresh(kind: str, tmp_path: Path) -> Any:
    return load_family(kind, tmp_path / "base")


# ---- any family


def test_it_is_a_model_family_whose_class_says_what_its_attributes_are(kind: str, family: Any) -> None:
    assert isinstance(family, ModelFamily)
    assert type(family) is class_of(kind)
    documented = "".join(inspect.getdoc(parent) or "" for parent in type(family).__mro__)
    for attribute in dataclasses.fields(family):
        assert f"{attribute.name}:" in documented or f"`{attribute.name}`" in documented, attribute.name


def test_a_base_is_frozen_and_evaluates(family: Any) -> None:
    assert family.adapted
    for module in family.adapted.values():
        assert isinstance(module, nn.Module)
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert not any(part.training for part in module.modules())


def test_default_targets_are_linear_layers_of_the_component(family: Any) -> None:
    for component, module in family.adapted.items():
        targets = family.default_targets(component)
        assert targets
        assert len(set(targets)) == len(targets)
        linear = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
        for target in targets:
            assert any(f".{name}".endswith(f".{target}") for name in linear), target
    with pytest.raises(ValueError, match="'nothing'"):
        family.default_targets("nothing")


def test_a_loss_is_a_finite_scalar_of_the_generator_alone(kind: str, family: Any, batch: dict[str, Any]) -> None:
    torch.manual_seed(1)
    first = loss_of(family, batch)
    assert first.shape == ()
    assert first.dtype == torch.float32
    assert math.isfinite(float(first))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(loss_of(family, batch), first)
    assert torch.equal(torch.get_rng_state(), before)  # nothing is drawn from the global generator
    assert torch.equal(loss_of(family, batch, seed=1), first) == (kind in WITHOUT_NOISE)


def test_the_step_is_recorded(kind: str, family: Any, batch: dict[str, Any]) -> None:
    loss_of(family, batch)
    if kind in WITHOUT_NOISE:
        assert family.step.timesteps is None
    else:
        assert family.step.timesteps.shape == (2,)
    for component, mask in family.step.token_masks.items():
        assert component in family.modules if kind in TEXT_TO_IMAGE_FAMILIES else component in family.adapted
        assert mask.dtype == torch.bool
        assert mask.ndim == 2
        assert bool(mask.any(dim=1).all())
    for component, endings in family.step.masked_layers.items():
        names = [name for name, _ in family.adapted[component].named_modules()]
        assert all(any(f".{name}".endswith(f".{ending}") for name in names) for ending in endings)


def test_timesteps_are_stratified_in_the_block_alone(kind: str, family: Any, batch: dict[str, Any]) -> None:
    plain = loss_of(family, batch)
    with family.stratified_timesteps(4, seeded(5)):
        stratified = [loss_of(family, batch) for _ in range(2)]
    assert all(math.isfinite(float(loss)) for loss in stratified)
    assert torch.equal(stratified[0], stratified[1]) == (kind in WITHOUT_NOISE)
    assert torch.equal(loss_of(family, batch), plain)
    if kind not in WITHOUT_NOISE:
        with (
            pytest.raises(ValueError, match="num_samples must be at least 1"),
            family.stratified_timesteps(0, seeded()),
        ):
            pass


def test_a_batch_weighs_what_its_loss_is_the_mean_over(kind: str, family: Any, batch: dict[str, Any]) -> None:
    assert isinstance(family, WeighsBatches)
    samples = {"vlm": int((batch["labels"][:, 1:] != -100).sum()) if kind == "vlm" else 0, "classifier": 3}.get(kind, 2)
    assert loss_weight(family, batch) == samples


def test_an_incomplete_batch_is_refused_in_words(kind: str, family: Any, batch: dict[str, Any]) -> None:
    if kind == "vlm":
        without = {**batch, "labels": torch.full_like(batch["labels"], -100)}
        with pytest.raises(ValueError, match="no answer tokens"):
            loss_of(family, without)
        return
    for part in ("pixel_values", *(["labels"] if kind == "classifier" else family.caption_columns)):
        with pytest.raises(ValueError, match="a batch needs "):
            loss_of(family, {name: values for name, values in batch.items() if name != part})


def test_an_evaluation_leaves_every_mode_as_it_was(kind: str, fresh: Any) -> None:
    assert isinstance(fresh, EvaluationMode) == (kind != "vlm")
    roots = list(fresh.adapted.values())
    roots[0].train()
    next(roots[0].children()).eval()
    before = [module.training for module in roots[0].modules()]
    with evaluating(fresh):
        assert not any(module.training for module in roots[0].modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in roots[0].modules()] == before


def test_adapters_and_heads_alone_are_trained(kind: str, fresh: Any) -> None:
    batches = batches_of(kind, fresh)
    initialize(fresh, "orthonormal", batches, rank=2, progress=False)
    for module in fresh.heads.values():
        module.requires_grad_(True)
    fresh.loss(batches[0], seeded()).backward()
    heads = {id(parameter) for module in fresh.heads.values() for parameter in module.parameters()}
    for component, module in fresh.adapted.items():
        for name, parameter in module.named_parameters():
            assert (parameter.grad is not None) == ("lora_" in name or id(parameter) in heads), f"{component}.{name}"
        assert any(bool(p.grad.any()) for p in module.parameters() if p.grad is not None)
    inside = {id(module) for root in fresh.adapted.values() for module in root.modules()}
    assert all(id(module) in inside for module in fresh.heads.values())


def test_an_unknown_option_is_refused_before_anything_is_loaded(kind: str, tmp_path: Path) -> None:
    extra: dict[str, Any] = {"class_names": ("a", "b")} if kind == "classifier" else {}
    with pytest.raises(TypeError, match="'ofload'"):
        class_of(kind).from_pretrained(tmp_path / "nowhere", ofload=True, **extra)


def test_a_base_that_is_not_there_is_refused(kind: str, tmp_path: Path) -> None:
    extra: dict[str, Any] = {"class_names": ("a", "b")} if kind == "classifier" else {}
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        class_of(kind).from_pretrained(tmp_path / "nowhere", **extra)


# ---- the text-to-image template

of_images = pytest.mark.parametrize("kind", TEXT_TO_IMAGE_FAMILIES, indirect=True, scope="module")


@pytest.fixture(params=TEXT_TO_IMAGE_FAMILIES)
def image_class(request: pytest.FixtureRequest) -> Any:
    return family_class(request.param)


def test_what_a_class_says_of_itself_fits(image_class: Any) -> None:
    fields = {attribute.name: attribute for attribute in dataclasses.fields(image_class)}
    assert isinstance(image_class.NAME, str)
    assert all(issubclass(pipeline, DiffusionPipeline) for pipeline in image_class.PIPELINES)
    assert {image_class.DENOISER, "vae", "noise_scheduler", *image_class.TEXT_ENCODERS} <= set(fields)
    for component in image_class.TEXT_ENCODERS:
        assert component.replace("text_encoder", "tokenizer") in fields
    assert set(image_class.MASKED_ENCODERS) | set(image_class.OPTIONAL_ENCODERS) <= set(image_class.TEXT_ENCODERS)
    assert image_class.TARGETS
    assert image_class.EMBEDS
    assert set(image_class.EXPORTS) <= {"diffusers", "kohya", "peft"}
    # what a script can set is a field with a default; the prediction type is a setting of the noise schedule
    for option in image_class.OPTIONS:
        assert option == "prediction_type" or fields[option].kw_only, option
    numbers = {name for name, field in fields.items() if field.kw_only and field.type in ("float", "float | None")}
    assert numbers <= set(STEP_RANGES)


@of_images
def test_embeddings_stand_for_the_captions_they_were_made_of(kind: str, family: Any, batch: dict[str, Any]) -> None:
    captions = ["2", "1"] if kind == "dit" else ["a cat", "one long house"]
    embeds = family.embed_captions(captions)
    assert list(embeds) == list(family.EMBEDS)
    assert all(len(values) == 2 and values.device.type == "cpu" for values in embeds.values())
    encoded = {"pixel_values": batch["pixel_values"], **embeds}
    torch.testing.assert_close(loss_of(family, encoded), loss_of(family, batch), rtol=1e-5, atol=1e-6)
    mean, std = family.encode_images(batch["pixel_values"])
    assert mean.shape == std.shape
    assert mean.dtype == torch.float32
    assert bool((std >= 0).all())
    latents = {**embeds, "latents": mean}
    assert math.isfinite(float(loss_of(family, latents)))


@of_images
def test_images_are_drawn_by_their_seeds(kind: str, family: Any) -> None:
    side = family.resolution_multiple * max(1, 32 // family.resolution_multiple)
    prompts = ["1", "1"] if kind == "dit" else ["a cat", "a cat"]
    images = family.sample(prompts, [3, 4], resolution=side, num_inference_steps=2)
    assert [image.size for image in images] == [(side, side)] * 2
    again = family.sample(prompts, [3, 3], resolution=side, num_inference_steps=2)
    assert again[0].tobytes() == again[1].tobytes() == images[0].tobytes()
    assert images[0].tobytes() != images[1].tobytes()
