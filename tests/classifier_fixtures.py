"""Tiny random classifiers of several architectures, and folders of pictures that they can learn to tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    BeitConfig,
    BitImageProcessor,
    CLIPConfig,
    ConvNextConfig,
    ConvNextImageProcessor,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    MobileViTImageProcessor,
    PreTrainedModel,
    ResNetConfig,
    SiglipConfig,
    SwinConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

CLASSES = ("blue", "green", "red")
SIDE = 16
_VIT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": SIDE,
    "patch_size": 8,
}
_TEXT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SWIN: dict[str, Any] = {"image_size": 32, "patch_size": 4, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "vit": (ViTConfig, _VIT),
    "deit": (DeiTConfig, _VIT),
    "beit": (BeitConfig, _VIT),
    "dinov2": (Dinov2Config, _VIT),
    "dinov2 with registers": (Dinov2WithRegistersConfig, _VIT),
    "swin": (SwinConfig, {**_SWIN, "embed_dim": 8}),
    "convnext": (ConvNextConfig, {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}),
    "clip": (CLIPConfig, {"vision_config": _VIT, "text_config": {**_TEXT, **_IDS}}),
    "siglip": (SiglipConfig, {"vision_config": _VIT, "text_config": {**_TEXT, **_IDS}}),
    "resnet": (ResNetConfig, {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}),
}


def random_classifier(kind: str = "vit", labels: Sequence[str] = CLASSES, **options: Any) -> PreTrainedModel:
    """A random model of this architecture, with the weights of a usual initialisation enlarged so that pixels count."""
    configuration, settings = CONFIGS[kind]
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
    config = configuration(**{**settings, **options}, num_labels=len(labels), **names)
    found: Any = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    model: Any = (found[0] if isinstance(found, tuple) else found)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.eval()


def teacher_deit(labels: Sequence[str] = CLASSES) -> PreTrainedModel:
    """A distilled DeiT, which has two output layers."""
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
    return DeiTForImageClassificationWithTeacher(DeiTConfig(**_VIT, **names)).eval()


def square_processor(side: int = SIDE) -> Any:
    """ViT's: pictures are squeezed into a square."""
    return ViTImageProcessor(size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.25] * 3)


def cropping_processor(side: int = SIDE) -> Any:
    """DINOv2's: the shorter side is resized to a little more than the square that is cut out."""
    return BitImageProcessor(
        size={"shortest_edge": side * 8 // 7}, crop_size={"height": side, "width": side}, image_mean=[0.4, 0.5, 0.6]
    )


def margin_processor(side: int = SIDE) -> Any:
    """ConvNeXt's: the same, said otherwise."""
    return ConvNextImageProcessor(size={"shortest_edge": side}, crop_pct=0.875)


def blue_first_processor(side: int = SIDE) -> Any:
    """MobileViT's: it turns the order of the channels."""
    crop = {"height": side, "width": side}
    return MobileViTImageProcessor(size={"shortest_edge": side * 9 // 8}, crop_size=crop, do_flip_channel_order=True)


def write_classifier(folder: Path, kind: str = "vit", labels: Sequence[str] = CLASSES, **options: Any) -> Path:
    """A folder with a random model and its image processor."""
    torch.manual_seed(0)
    random_classifier(kind, labels, **options).save_pretrained(folder)
    square_processor().save_pretrained(folder)
    return folder


def write_backbone(folder: Path) -> Path:
    """A folder with a random DINOv2 without an output layer, as `facebook/dinov2-small` is."""
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**_VIT)).save_pretrained(folder)
    cropping_processor().save_pretrained(folder)
    return folder


def write_plain_vit(folder: Path, **options: Any) -> Path:
    """A random ViT whose labels are `LABEL_0` and so on, and no image processor."""
    ViTForImageClassification(ViTConfig(**{**_VIT, **options})).save_pretrained(folder)
    return folder


def picture(name: str, seed: int, side: int = 20) -> Image.Image:
    """Noise in which the channel of the class is brighter."""
    values = np.random.default_rng(seed).integers(0, 140, size=(side, side + 4, 3))
    values[..., ("red", "green", "blue").index(name) if name in CLASSES else seed % 3] += 100
    return Image.fromarray(values.astype(np.uint8))


def write_class_folder(
    directory: Path, classes: Sequence[str] = CLASSES, train: int = 6, validation: int = 4, split: str = "validation"
) -> Path:
    """A folder per class in `train` and in `split`; in the directory itself when there is no validation."""
    for part, count, start in (("train", train, 0), (split, validation, 1000)):
        for row, name in enumerate(classes):
            folder = directory / part / name if validation else directory / name
            for index in range(count):
                folder.mkdir(parents=True, exist_ok=True)
                picture(name, start + 100 * row + index).save(folder / f"{name}-{index:02d}.png")
    return directory
