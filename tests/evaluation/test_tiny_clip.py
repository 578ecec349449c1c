"""The bundled tiny CLIP: loads as stock transformers classes, is small, and recognises concepts it never saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

ROOT = Path(__file__).resolve().parents[2]
MODEL_DIR = ROOT / "assets" / "models" / "tiny-clip"
DATA_DIR = ROOT / "assets" / "data"
STYLES = ("high-contrast", "blobs")


@pytest.fixture(scope="module")
def clip() -> tuple[Any, Any]:
    return CLIPModel.from_pretrained(MODEL_DIR).eval(), CLIPProcessor.from_pretrained(MODEL_DIR)


def pictures(style: str, split: str) -> dict[str, Image.Image]:
    return {path.stem: Image.open(path).convert("RGB") for path in sorted((DATA_DIR / style / split).glob("*.png"))}


@torch.no_grad()
def image_embeds(clip: tuple[Any, Any], images: list[Image.Image]) -> Tensor:
    model, processor = clip
    placeholder = processor(text=["an emoji"], return_tensors="pt")
    return model(**processor(images=images, return_tensors="pt"), **placeholder).image_embeds


@torch.no_grad()
def text_embeds(clip: tuple[Any, Any], texts: list[str]) -> Tensor:
    model, processor = clip
    placeholder = processor(images=Image.new("RGB", (64, 64)), return_tensors="pt")
    return model(**processor(text=texts, padding=True, truncation=True, return_tensors="pt"), **placeholder).text_embeds


def recall(similarity: Tensor, k: int) -> float:
    right = similarity.diagonal().unsqueeze(1)
    return ((similarity > right).sum(1) < k).float().mean().item()


def test_folder_is_small_and_has_no_pickles() -> None:
    files = [path for path in MODEL_DIR.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25 * 2**20
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md"}
    with safe_open(MODEL_DIR / "model.safetensors", "pt") as weights:
        kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    assert kinds == {"F16"}


def test_processor_and_model_agree(clip: tuple[Any, Any]) -> None:
    model, processor = clip
    inputs = processor(images=Image.new("RGB", (128, 96), "white"), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 64, 64)
    assert torch.equal(inputs["pixel_values"], torch.ones(1, 3, 64, 64))  # white, at the model's scale
    assert model.dtype == torch.float32
    assert model.config.projection_dim == 128
    assert processor.tokenizer.model_max_length == model.config.text_config.max_position_embeddings


def test_captions_of_the_sample_data_fit(clip: tuple[Any, Any]) -> None:
    for path in DATA_DIR.glob("*/*/metadata.jsonl"):
        texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
        lengths = [len(ids) for ids in clip[1](text=texts)["input_ids"]]
        assert max(lengths) <= clip[0].config.text_config.max_position_embeddings


@pytest.mark.parametrize("style", STYLES)
def test_held_out_concepts_are_found_by_their_names(clip: tuple[Any, Any], style: str) -> None:
    images = pictures(style, "heldout")
    texts = text_embeds(clip, [f"an emoji of {name.replace('-', ' ')}" for name in images])
    similarity = image_embeds(clip, list(images.values())) @ texts.T
    assert recall(similarity, 1) >= 4 / len(images)  # chance: 1
    assert recall(similarity, 5) >= 12 / len(images)  # chance: 5


def test_concepts_are_found_in_the_other_style(clip: tuple[Any, Any]) -> None:
    every = {style: pictures(style, "train") | pictures(style, "heldout") for style in STYLES}
    names = sorted(every["blobs"].keys() & every["high-contrast"].keys())
    similarity = torch.stack([image_embeds(clip, [every[style][name] for name in names]) for style in STYLES])
    assert len(names) >= 20
    assert recall(similarity[0] @ similarity[1].T, 1) >= 8 / len(names)  # chance: 1
