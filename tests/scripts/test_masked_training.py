"""A training on masked images, from the files to the log, against the loss worked out from the base's parts alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_sd_lora
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from reference_loop import data_order, seeded
from script_fixtures import losses, run_main
from sd_fixtures import write_images
from transformers import CLIPTextModel, CLIPTokenizer

SIDE, SEED = 16, 3
OPTIONS: dict[str, Any] = {
    **{"init": "gaussian", "rank": 2, "resolution": SIDE, "seed": SEED, "train_batch_size": 4, "max_train_steps": 1},
    **{"validation_prompt": "x", "validation_inference_steps": 1, "random_flip": True},
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four images and two held-out ones, of the resolution that is trained; masks for three and for one of them."""
    for part, count, masked in (("train", 4, (0, 1, 3)), ("heldout", 2, (1,))):
        write_images(tmp_path / "data" / part, count=count, size=(SIDE, SIDE), seed=count)
        generator = np.random.default_rng(count)
        for index in masked:
            grey = generator.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
            grey[:, : 4 * index] = 0
            Image.fromarray(grey).save(tmp_path / "data" / part / f"{index:02d}-masklabel.png")
    return tmp_path / "data"


def expected_loss(base: Path, folder: Path) -> float:
    """The loss of the first step, before the LoRA has changed anything, on the same noise."""
    parts: dict[str, Any] = {
        name: kind.from_pretrained(base / name)
        for name, kind in (
            ("vae", AutoencoderKL),
            ("unet", UNet2DConditionModel),
            ("text_encoder", CLIPTextModel),
            ("tokenizer", CLIPTokenizer),
        )
    }
    scheduler: Any = DDPMScheduler.from_pretrained(base / "scheduler")
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    pixels, masks, captions = [], [], []
    flips: set[bool] = set()
    for index, seed in data_order(4, 4, SEED, 0):
        generator = torch.Generator().manual_seed(seed)
        torch.rand(2, generator=generator, dtype=torch.float64)  # a crop without anything to spare
        flip = torch.rand(1, generator=generator).item() < 0.5
        flips.add(flip)
        path = folder / lines[index]["file_name"]
        image = np.asarray(Image.open(path), dtype=np.float32) / 127.5 - 1
        beside = path.with_name(f"{path.stem}-masklabel.png")
        mask = np.asarray(Image.open(beside), dtype=np.float32) / 255 if beside.is_file() else np.ones((SIDE, SIDE))
        pixels.append((image[:, ::-1] if flip else image).transpose(2, 0, 1).copy())
        masks.append((mask[:, ::-1] if flip else mask).reshape(4, 4, 4, 4).mean(axis=(1, 3)))
        captions.append(lines[index]["text"])
    assert flips == {True, False}
    generator = seeded(SEED, "step", 1, 0, 0)
    with torch.no_grad():
        posterior = parts["vae"].encode(torch.from_numpy(np.stack(pixels))).latent_dist
        sample = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        latents = sample * parts["vae"].config.scaling_factor
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = (torch.rand(4, generator=generator, dtype=torch.float64) * 1000).long()
        ids = parts["tokenizer"](captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        text = parts["text_encoder"](ids)[0]
        noisy = scheduler.add_noise(latents, noise, timesteps)
        errors = (parts["unet"](noisy, timesteps, text).sample - noise).square().mean(dim=1)
    weights = torch.from_numpy(np.stack(masks)).float()
    return float(((errors * weights).sum(dim=(1, 2)) / weights.sum(dim=(1, 2))).mean())


def test_the_loss_is_the_mean_over_what_counts(random_sd: Path, data: Path, tmp_path: Path) -> None:
    def run(name: str, folder: Path) -> Path:
        given = {"pretrained_model_name_or_path": random_sd, "train_data_dir": folder, "output_dir": tmp_path / name}
        return run_main(train_sd_lora, {**given, **OPTIONS})

    out = run("out", data)
    assert losses(out)[0] == pytest.approx(expected_loss(random_sd, data / "train"), rel=1e-5)
    # a held-out image has its own mask, which the training does not know of
    other = shutil.copytree(data, tmp_path / "other")
    (other / "heldout" / "01-masklabel.png").unlink()
    again = run("again", other)
    assert losses(again) == losses(out)
    assert losses(again, "validation_loss")[0] != pytest.approx(losses(out, "validation_loss")[0], rel=1e-4)
    # and without masks the loss is another one
    for path in (other / "train").glob("*-masklabel.png"):
        path.unlink()
    assert losses(run("plain", other))[0] != pytest.approx(losses(out)[0], rel=1e-4)
