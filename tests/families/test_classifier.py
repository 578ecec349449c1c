"""The classifier family on tiny random models of several architectures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classifier_fixtures import (
    CLASSES,
    CONFIGS,
    SIDE,
    blue_first_processor,
    cropping_processor,
    margin_processor,
    picture,
    random_classifier,
    square_processor,
    teacher_deit,
    write_backbone,
    write_classifier,
    write_plain_vit,
)
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from lorainit_diffusers import METHODS, adapters_disabled, initialize, trainable_parameters
from lorainit_diffusers.adapters import lora_layers
from lorainit_diffusers.families.augment import Augmentation
from lorainit_diffusers.families.base import ModelFamily
from lorainit_diffusers.families.classifier import (
    ClassifierFamily,
    ImagePreparation,
    head_layers,
    match_labels,
    projections,
)

WITH_LAYERS = [kind for kind in CONFIGS if kind != "resnet"]
PREPARATION = ImagePreparation(SIDE, SIDE)
CHANGES = Augmentation(crop_scale=(0.5, 1.0), flip=0.5, brightness=0.3)


def family_of(kind: str = "vit", **options: Any) -> ClassifierFamily:
    torch.manual_seed(0)
    side = 32 if kind == "swin" else SIDE
    model = random_classifier(kind).requires_grad_(False)
    return ClassifierFamily(model, ImagePreparation(side, side), CLASSES, **options)


def batch_of(count: int = 6, side: int = SIDE, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    return {"pixel_values": images, "labels": torch.arange(count) % len(CLASSES)}


def loss_of(family: ClassifierFamily, batch: dict[str, Tensor], seed: int = 1) -> Tensor:
    return family.loss(batch, torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("vit") / "base")


# ----------------------------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("kind", WITH_LAYERS)
def test_every_architecture_trains_its_projections_and_its_head(kind) -> None:
    family = family_of(kind, augmentation=CHANGES, label_smoothing=0.1, mixup_alpha=0.2)
    assert isinstance(family, ModelFamily)
    batch = batch_of(side=family.preparation.resolution)
    report = initialize(family, "cntlora", [batch], rank=2, progress=False)
    assert {name.removeprefix("model.") for name in report.layers} == set(lora_layers(family.model))
    trained = [*trainable_parameters(family.model), *family.heads["model.classifier"].parameters()]
    assert {id(p) for p in trained} == {id(p) for p in family.model.parameters() if p.requires_grad}
    first = loss_of(family, batch)
    first.backward()
    for parameter in trained:
        assert parameter.grad is not None
        assert parameter.dtype == torch.float32
    optimizer = torch.optim.Adam(trained, lr=0.01)
    for _ in range(5):
        optimizer.step()
        optimizer.zero_grad()
        loss = loss_of(family, batch)
        loss.backward()
    assert loss < first


def test_the_loss_is_a_function_of_the_batch_and_the_generator() -> None:
    family = family_of(augmentation=CHANGES, mixup_alpha=0.4)
    batch = batch_of()
    torch.manual_seed(1)
    first = loss_of(family, batch)
    torch.manual_seed(2)
    assert torch.equal(loss_of(family, batch), first)
    assert not torch.equal(loss_of(family, batch, seed=3), first)
    assert first.shape == ()
    plain = family_of()
    assert torch.equal(loss_of(plain, batch, seed=1), loss_of(plain, batch, seed=2))


def test_the_plain_loss_is_that_of_transformers() -> None:
    family, batch = family_of(), batch_of()
    inputs = (batch["pixel_values"].float() / 255 - 0.5) / 0.5
    expected = family.model(pixel_values=inputs, labels=batch["labels"])
    torch.testing.assert_close(loss_of(family, batch), expected.loss)
    torch.testing.assert_close(family.logits(batch["pixel_values"]), expected.logits)
    as_floats = {**batch, "pixel_values": batch["pixel_values"].float() / 255}
    torch.testing.assert_close(loss_of(family, as_floats), expected.loss)


def test_mixup_and_smoothing_are_in_the_targets() -> None:
    batch = batch_of(2)
    batch["labels"] = torch.tensor([1, 1])
    smoothed = loss_of(family_of(label_smoothing=0.3), batch)
    logs = family_of().logits(batch["pixel_values"]).log_softmax(1)
    torch.testing.assert_close(smoothed, -(0.7 * logs[:, 1] + 0.3 * logs.mean(1)).mean())
    same = {**batch, "pixel_values": batch["pixel_values"][:1].expand(2, -1, -1, -1)}  # mixed with itself
    torch.testing.assert_close(loss_of(family_of(mixup_alpha=1.0), same), loss_of(family_of(), same))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_leaves_the_base_as_it_was(name) -> None:
    family, batch = family_of(augmentation=CHANGES), batch_of()
    before = {key: value.clone() for key, value in family.model.state_dict().items()}
    expected = family.logits(batch["pixel_values"])
    initialize(family, name, [batch], rank=2, progress=False)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in family.model.modules())
    with torch.no_grad(), adapters_disabled(family.adapted):
        assert torch.equal(family.logits(batch["pixel_values"]), expected)
    after = {key.replace(".base_layer.", "."): value for key, value in family.model.state_dict().items()}
    assert all(torch.equal(after[key], value) for key, value in before.items())
    if METHODS[name]().step_zero != "moved":
        with torch.no_grad():
            torch.testing.assert_close(family.logits(batch["pixel_values"]), expected, rtol=1e-4, atol=1e-4)


def test_a_collection_sees_what_training_sees() -> None:
    """Augmentation included: the same generator gives the same statistics, another one others."""
    layers: list[dict[str, Tensor]] = []
    for augmentation, seed in ((CHANGES, 0), (CHANGES, 0), (CHANGES, 1), (Augmentation(), 0), (Augmentation(), 1)):
        family = family_of(augmentation=augmentation)
        initialize(family, "eva", [batch_of()], rank=2, seed=seed, progress=False)
        name, layer = next(iter(lora_layers(family.model).items()))
        layers.append(layer.lora_A["default"].weight.detach().abs())
        assert name.endswith(("query", "q_proj"))
    assert torch.equal(layers[0], layers[1])
    assert not torch.allclose(layers[0], layers[2], atol=1e-4)
    torch.testing.assert_close(layers[3], layers[4], rtol=1e-3, atol=1e-4)
    with family.stratified_timesteps(3, torch.Generator()):
        assert family.step.timesteps is None


def test_half_precision_keeps_adapters_and_head_in_float32(vit) -> None:
    family = ClassifierFamily.from_pretrained(vit, class_names=CLASSES, weight_dtype=torch.bfloat16)
    initialize(family, "cntlora", [batch_of()], rank=2, progress=False)
    dtypes = {p.dtype for p in family.model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}
    assert {p.dtype for p in family.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert family.weight_dtype == torch.bfloat16
    loss = loss_of(family, batch_of())
    loss.backward()
    assert loss.dtype == torch.float32
    full = ClassifierFamily.from_pretrained(vit, class_names=CLASSES)
    torch.testing.assert_close(loss.detach(), loss_of(full, batch_of()), rtol=0.1, atol=0.1)


def test_other_resolutions_are_interpolated(vit) -> None:
    preparation = ImagePreparation.from_pretrained(vit, resolution=24)
    family = ClassifierFamily.from_pretrained(vit, class_names=CLASSES, preparation=preparation)
    assert family.logits(batch_of(side=24)["pixel_values"]).shape == (6, 3)


# ------------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("kind", WITH_LAYERS)
def test_default_targets_are_the_projections(kind) -> None:
    family = family_of(kind)
    targets = family.default_targets("model")
    endings = {name.rpartition(".")[2] for name in targets}
    if kind == "convnext":
        assert endings == {"pwconv1", "pwconv2"}
        assert len(targets) == 4
    else:
        assert len(targets) == 8  # q, k, v and output of two blocks
        assert endings in (
            {"q_proj", "k_proj", "v_proj", "o_proj"},
            {"q_proj", "k_proj", "v_proj", "out_proj"},
            {"query", "key", "value", "dense"},
        )
    assert head_layers(family.model) == ["classifier"]
    assert not set(targets) & {"classifier"}


def test_a_network_without_such_layers_says_what_it_has() -> None:
    with pytest.raises(ValueError, match=r"ResNetForImageClassification has no attention and no pointwise layers"):
        projections(random_classifier("resnet"))

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = random_classifier().config
            self.mix, self.classifier = nn.Linear(4, 4), nn.Linear(4, 3)

    with pytest.raises(ValueError, match=r"name the layers in target_modules: its linear layers end in mix"):
        projections(Mixer())
    with pytest.raises(ValueError, match="has no component 'unet'"):
        family_of().default_targets("unet")


def test_the_head_is_found_where_it_is() -> None:
    assert head_layers(random_classifier("resnet")) == ["classifier.1"]
    teacher = teacher_deit()
    assert head_layers(teacher) == ["cls_classifier", "distillation_classifier"]
    assert list(ClassifierFamily(teacher, PREPARATION, CLASSES).heads) == [
        "model.cls_classifier",
        "model.distillation_classifier",
    ]
    # a layer inside the backbone that is as wide as the labels are many
    siglip = random_classifier("siglip", labels=[str(number) for number in range(32)])
    assert head_layers(siglip) == ["classifier"]
    headless = random_classifier()
    headless.classifier = nn.Identity()
    with pytest.raises(ValueError, match=r"has no linear output layer for its 3 labels"):
        head_layers(headless)


def test_convolutions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"is a Conv2d; only linear layers are supported"):
        initialize(family_of("convnext"), "gaussian", rank=2, target_modules={"model": ["dwconv"]})


# ----------------------------------------------------------------------------------------------------------- the head


def test_auto_keeps_a_head_that_names_the_classes(vit) -> None:
    base = AutoModelForImageClassification.from_pretrained(vit)
    family = ClassifierFamily.from_pretrained(vit, class_names=("Red", "blue"))
    assert not family.has_new_head
    assert family.outputs.tolist() == [2, 0]
    assert torch.equal(family.heads["model.classifier"].weight, base.classifier.weight)
    assert family.logits(batch_of()["pixel_values"]).shape == (6, 3)  # all the base's outputs
    batch = {**batch_of(2), "labels": torch.tensor([0, 1])}
    expected = -family.logits(batch["pixel_values"]).log_softmax(1)[[0, 1], [2, 0]].mean()
    torch.testing.assert_close(loss_of(family, batch), expected)


def test_auto_makes_a_new_head_for_other_classes(vit) -> None:
    names = ("blue", "cat", "dog")
    family, again, other = (
        ClassifierFamily.from_pretrained(vit, class_names=names, head_seed=seed) for seed in (0, 0, 1)
    )
    assert family.has_new_head
    assert family.model.config.id2label == dict(enumerate(names))
    assert family.labels == {"blue": 0, "cat": 1, "dog": 2}
    head = family.heads["model.classifier"]
    assert 0.01 < head.weight.std() < 0.03
    assert not head.bias.any()
    assert torch.equal(head.weight, again.heads["model.classifier"].weight)
    assert not torch.equal(head.weight, other.heads["model.classifier"].weight)
    base = AutoModelForImageClassification.from_pretrained(vit).state_dict()
    state = family.model.state_dict()
    assert all(torch.equal(state[key], base[key]) for key in base if not key.startswith("classifier"))


def test_new_replaces_a_head_of_the_same_classes(vit) -> None:
    family = ClassifierFamily.from_pretrained(vit, class_names=CLASSES, head="new")
    assert family.has_new_head
    assert family.heads["model.classifier"].weight.std() < 0.03


def test_keep_needs_the_classes(vit) -> None:
    assert not ClassifierFamily.from_pretrained(vit, class_names=CLASSES, head="keep").has_new_head
    with pytest.raises(ValueError, match=r"has no label for the classes cat \(it has blue, green, red\); rename"):
        ClassifierFamily.from_pretrained(vit, class_names=("blue", "cat"), head="keep")
    with pytest.raises(ValueError, match="`head` 'old' is none of auto, new, keep"):
        ClassifierFamily.from_pretrained(vit, class_names=CLASSES, head="old")  # type: ignore[arg-type]


def test_a_bare_backbone_gets_a_head(tmp_path) -> None:
    folder = write_backbone(tmp_path / "dinov2")
    family = ClassifierFamily.from_pretrained(folder, class_names=("cat", "dog"))
    assert family.has_new_head
    assert family.logits(batch_of()["pixel_values"]).shape == (6, 2)
    with pytest.raises(ValueError, match=r"names the classes but has no trained head"):
        ClassifierFamily.from_pretrained(folder, class_names=("LABEL_0", "LABEL_1"))


def test_labels_are_matched_loosely_but_not_by_chance() -> None:
    labels = {"tabby cat": 0, "tabby_cat ": 1, "red-apple": 2, "dog": 3, "Dog": 4}
    assert match_labels(["tabby cat", "Red Apple", "Dog", "DOG", "cow"], labels) == [0, 2, 4, None, None]


def test_a_label_of_two_outputs_hides_neither() -> None:
    model = random_classifier()
    model.config.id2label = {0: "crane", 1: "dog", 2: "crane"}
    family = ClassifierFamily(model.requires_grad_(False), PREPARATION, ("crane", "dog"))
    assert family.labels == {"crane": 0, "dog": 1, "crane (2)": 2}
    family.mixup_alpha = 0.2
    assert loss_of(family, {**batch_of(2), "labels": torch.tensor([0, 1])}).isfinite()


# ------------------------------------------------------------------------------------------------------- preparation


@pytest.mark.parametrize("processor", [square_processor, cropping_processor, margin_processor, blue_first_processor])
def test_pictures_become_what_the_image_processor_makes_of_them(tmp_path, vit, processor) -> None:
    (tmp_path / "config.json").write_text((vit / "config.json").read_text("utf-8"), encoding="utf-8")
    stock = processor()
    stock.save_pretrained(tmp_path)
    preparation = ImagePreparation.from_pretrained(tmp_path)
    assert preparation.resolution == SIDE
    image = picture("red", 0, side=40).crop((0, 0, 40, 40))
    ours = preparation.normalize(preparation.crop(image)[None].float() / 255)
    theirs = stock(image, return_tensors="pt")["pixel_values"]
    assert ours.shape == theirs.shape
    # ConvNeXt's processor rounds its margin in another place
    assert float((ours - theirs).abs().mean()) < (0.02 if processor is margin_processor else 1e-3)


def test_wide_pictures_lose_their_sides_and_keep_their_shape() -> None:
    image = picture("red", 0, side=16).resize((64, 32))
    values = np.zeros((32, 64, 3), dtype=np.uint8)
    values[:, 16:48] = 255  # the middle square
    preparation = ImagePreparation(16, 16)
    assert preparation.crop(image).shape == (3, 16, 16)
    assert preparation.crop(Image.fromarray(values)).float().mean() > 250


def test_pictures_must_be_square(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}), encoding="utf-8")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 4}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    with pytest.raises(ValueError, match=r"gives images a size of \{'height': 8, 'width': 4\}; only squares"):
        ImagePreparation.from_pretrained(tmp_path)


def test_the_processor_is_saved_at_the_resolution_of_the_run(tmp_path, vit) -> None:
    for number, processor in enumerate((square_processor, cropping_processor, margin_processor)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text((vit / "config.json").read_text("utf-8"), encoding="utf-8")
        processor().save_pretrained(folder)
        preparation = ImagePreparation.from_pretrained(folder, resolution=28)
        preparation.save(folder)
        assert ImagePreparation.from_pretrained(folder) == preparation
        assert preparation.resolution == 28


# ------------------------------------------------------------------------------------------------------------- errors


def test_bases_that_cannot_be_used_are_named(tmp_path) -> None:
    for path, message in (
        (tmp_path / "nowhere", "is not a folder"),
        ("./nowhere", "is not a folder"),
        (tmp_path, r"has no config\.json"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            ClassifierFamily.from_pretrained(path, class_names=CLASSES)
    bare = write_plain_vit(tmp_path / "bare")
    with pytest.raises(FileNotFoundError, match="image processor of the base model"):
        ClassifierFamily.from_pretrained(bare, class_names=CLASSES)
    gray = write_plain_vit(tmp_path / "gray", num_channels=1)
    square_processor().save_pretrained(gray)
    with pytest.raises(ValueError, match="takes images of 1 channels"):
        ClassifierFamily.from_pretrained(gray, class_names=CLASSES)
    other = write_plain_vit(tmp_path / "other")
    square_processor().save_pretrained(other)
    config = json.loads((other / "config.json").read_text("utf-8"))
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"lacks \d+ weights of its ViTForImageClassification"):
        ClassifierFamily.from_pretrained(other, class_names=CLASSES)
    (other / "config.json").write_text(json.dumps({"model_type": "clip_vision_model"}), encoding="utf-8")
    with pytest.raises(ValueError, match="for which transformers has no image classifier"):
        ClassifierFamily.from_pretrained(other, class_names=CLASSES)


def test_options_that_mean_nothing_are_refused(vit) -> None:
    with pytest.raises(ValueError, match="at least two classes"):
        ClassifierFamily.from_pretrained(vit, class_names=("red",))
    with pytest.raises(ValueError, match="red come more than once"):
        ClassifierFamily.from_pretrained(vit, class_names=("red", "red", "blue"))
    with pytest.raises(ValueError, match="label_smoothing must be"):
        family_of(label_smoothing=1.0)
    with pytest.raises(ValueError, match="mixup_alpha must not be negative"):
        family_of(mixup_alpha=-1.0)
    with pytest.raises(ValueError, match="no label for the classes cat"):
        ClassifierFamily(random_classifier(), PREPARATION, ("red", "cat"))
    with pytest.raises(ValueError, match="a batch needs pixel_values and labels, got labels"):
        loss_of(family_of(), {"labels": torch.zeros(1, dtype=torch.long)})
