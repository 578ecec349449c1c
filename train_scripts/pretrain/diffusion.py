"""What the recipes of the diffusion bases share: captions and latents of a batch, pipelines, grids of samples."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import emoji_pictures as emoji
import torch
from PIL import Image
from shared import IMAGE_SIZE, Model, batch_indices, rank_and_count, rename_weights, tokenize
from torch import Tensor, nn

from lorainit_diffusers.files import filling

GRID_NAMES = (
    "red-apple",
    "grinning-face",
    "smiling-face-with-heart-eyes",
    "dog-face",
    "penguin",
    "automobile",
    "sunflower",
    "pizza",
    "guitar",
    "house",
)


def caption_tokens(
    tokenizer: Model, records: Sequence[Mapping[str, str]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids of all captions, of all captions without a style, and of the empty one."""
    full = tokenize(tokenizer, [emoji.caption(record["style"], record["name"]) for record in records])
    plain = tokenize(tokenizer, [emoji.caption(None, record["name"]) for record in records])
    return full.to(device), plain.to(device), tokenize(tokenizer, [""]).to(device)


def draw_batch(
    latents: tuple[Tensor, Tensor],
    tokens: tuple[Tensor, Tensor, Tensor],
    step: int,
    batch_size: int,
    seed: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """This process's batch of a step: (clean latents, noise, token ids, levels of noise).

    Captions are 80 % full, 10 % without the style, 10 % empty. The levels, in [0, 1), are one of each stratum: the loss
    of a small batch then varies less.

    Args:
        latents: Posterior means and standard deviations of all images, normalised.
        tokens: As `caption_tokens` gives them.
        step: Number of the step.
        batch_size: Images of one process.
        seed: Of the order of the images.
        generator: Of the latents' device.
    """
    rank, world_size = rank_and_count()
    (mean, std), (full, plain, empty) = latents, tokens
    device = mean.device
    indices = batch_indices(step, batch_size * world_size, len(mean), seed)[rank::world_size].to(device)
    clean = mean[indices] + std[indices] * torch.randn(mean[indices].shape, generator=generator, device=device)
    noise = torch.randn(clean.shape, generator=generator, device=device)
    choice = torch.rand(len(indices), 1, generator=generator, device=device)
    ids = torch.where(choice < 0.1, empty, torch.where(choice < 0.2, plain[indices], full[indices]))
    offsets = torch.rand(len(indices), generator=generator, device=device)
    return clean, noise, ids, (torch.arange(len(indices), device=device) + offsets) / len(indices)


@torch.no_grad()
def encode(vae: Model, pixels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Posterior means and standard deviations of uint8 images."""
    parts = [vae.encode(chunk.to(device).float() / 127.5 - 1).latent_dist for chunk in pixels.split(128)]
    return torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts])


def save_pipeline(pipeline: Model, directory: Path, tokenizer_dir: Path) -> None:
    """Writes the pipeline in half precision, with the tokenizer files of old and new transformers, over `directory`."""
    with filling(directory) as scratch:
        _save_pipeline(pipeline, scratch, tokenizer_dir)


def _save_pipeline(pipeline: Model, scratch: Path, tokenizer_dir: Path) -> None:
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.half()
    pipeline.save_pretrained(scratch)
    for config_path in scratch.glob("*/config.json"):
        config = json.loads(config_path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)  # where a component was read from is a path of one machine
        if config_path.parent.name.startswith("text_encoder"):
            # transformers 5 loads in the type that the config names, diffusers in float32 unless told otherwise:
            # without this, a plain `from_pretrained` would mix the two.
            config["dtype"] = "float32"
            if config["architectures"] == ["CLIPTextModel"]:
                rename_weights(config_path.parent / "model.safetensors", r"^(?!text_model\.)", "text_model.")
        config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for component in ("tokenizer", "tokenizer_2"):
        for name in ("vocab.json", "merges.txt"):
            if (scratch / component).is_dir():
                shutil.copyfile(tokenizer_dir / name, scratch / component / name)
    for path in scratch.glob("*/tokenizer_config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("extra_special_tokens", None)  # a list, which transformers 4 does not know
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    index = scratch / "model_index.json"
    text = index.read_text(encoding="utf-8")
    # transformers 4 has another class for T5's tokenizer without a SentencePiece file
    index.write_text(text.replace('"T5Tokenizer"', '"T5TokenizerFast"'), encoding="utf-8")


@torch.no_grad()
def sample_grid(pipeline: Model, path: Path, names: Sequence[str], num_steps: int, **options: Any) -> None:
    """Writes a grid of samples: one row per style, one column per concept; the pipeline is called with `options`."""
    options = {"num_inference_steps": num_steps, "guidance_scale": 4.0, **options}
    pipeline.set_progress_bar_config(disable=True)
    grid = Image.new("RGB", (IMAGE_SIZE * len(names), IMAGE_SIZE * len(emoji.BASE_STYLES)), "white")
    for row, style in enumerate(emoji.BASE_STYLES):
        generators = [torch.Generator().manual_seed(0) for _ in names]
        prompts = [emoji.caption(style, name) for name in names]
        images = pipeline(prompts, generator=generators, **options).images
        for column, image in enumerate(images):
            grid.paste(image, (IMAGE_SIZE * column, IMAGE_SIZE * row))
    grid.save(path)
