from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from flow_fixtures import (
    Inputs,
    assert_stock_loader_reproduces,
    load,
    load_stock,
    make_batch,
    pixel_difference,
    seeded,
    train_one_step,
    write_base,
)

from lorainit_diffusers.families.flow_matching import FlowMatchingFamily
from lorainit_diffusers.initialize import initialize


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "z_image", "z_image")


@pytest.fixture(scope="module")
def family(base: Path) -> FlowMatchingFamily:
    """For tests that change nothing in its modules."""
    return load(base, "z_image")


@pytest.mark.parametrize("guidance_scale", [0.0, 4.0])
def test_samples_are_the_stock_pipelines(family: FlowMatchingFamily, base: Path, guidance_scale: float) -> None:
    stock = load_stock(base, "z_image")
    prompts, seeds = ["a cat", "x" * 60], [3, 4]
    images = family.sample(prompts, seeds, resolution=32, num_inference_steps=3, guidance_scale=guidance_scale)
    for prompt, seed, image in zip(prompts, seeds, images, strict=True):
        options = {"max_sequence_length": 48, "num_inference_steps": 3, "guidance_scale": guidance_scale}
        theirs = stock(prompt, height=32, width=32, generator=seeded(seed), **options).images[0]
        assert pixel_difference(image, theirs) <= 1  # prompts of several lengths are padded beside each other


@pytest.mark.parametrize("causal", [False, True])
def test_captions_are_encoded_as_the_pipeline_does(causal: bool, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "z_image", causal=causal)
    family = load(base, "z_image")
    prompts = ["a cat", "", "y" * 70]  # the last is cut
    expected = load_stock(base, "z_image").encode_prompt(list(prompts), device="cpu", max_sequence_length=48)[0]
    columns = family.embed_captions(prompts)
    for row, mask, theirs in zip(columns["prompt_embeds"], columns["prompt_attention_mask"], expected, strict=True):
        torch.testing.assert_close(row[mask.bool()], theirs)
    assert columns["prompt_embeds"].shape[:2] == (3, 48)


def test_time_runs_from_noise_to_data(family: FlowMatchingFamily) -> None:
    recorded = Inputs(family.denoiser)
    with torch.no_grad():
        family.loss(make_batch(family), seeded())
    assert family.step.timesteps is not None
    torch.testing.assert_close(recorded.stop()[0]["t"], 1 - family.step.timesteps / 1000)


def test_levels_of_a_base_that_shifts_by_size(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "z_image", use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    family = load(base, "z_image")
    latents = torch.zeros(1, 4, 64, 64)  # 1024 tokens
    shift = math.exp(0.5 + 0.65 * (1024 - 256) / (4096 - 256))
    table = torch.arange(1000, 0, -1) / 1000
    torch.testing.assert_close(family._levels(latents).sigmas, shift * table / (1 + (shift - 1) * table))


def test_padding_stays_out_of_the_statistics(base: Path) -> None:
    family = load(base, "z_image")
    batch = make_batch(family, ["a", "x" * 40])  # filled up to 32 and to 64
    report = initialize(family, "eva", [batch], rank=2, progress=False)
    rows = {name: layer.num_rows for name, layer in report.layers.items()}
    image = 32  # 16 tokens, filled up
    assert rows["transformer.noise_refiner.0.attention.to_v"] == 2 * image
    assert rows["transformer.context_refiner.0.attention.to_v"] == 32 + 64
    assert rows["transformer.layers.1.attention.to_v"] == 2 * image + 32 + 64


def test_feed_forward_layers_load_on_the_original_base(base: Path, tmp_path: Path) -> None:
    family = load(base, "z_image")
    targets = [
        *family.default_targets("transformer"),
        "feed_forward.w1",
        "feed_forward.w2",
        "layers.1.adaLN_modulation.0",
    ]
    initialize(
        family, "cntlora", [make_batch(family)], rank=4, target_modules=targets, variable_rank=True, progress=False
    )
    train_one_step(family)
    assert_stock_loader_reproduces(family, base, "z_image", tmp_path)
