from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flow_fixtures import (
    assert_stock_loader_reproduces,
    load,
    load_stock,
    make_batch,
    seeded,
    train_one_step,
    write_base,
)
from flow_references import reference_loss

from lorainit_diffusers.families.flow_matching import FlowMatchingFamily
from lorainit_diffusers.families.wan import WanFamily
from lorainit_diffusers.initialize import initialize


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "wan", "wan")


@pytest.fixture(scope="module")
def family(base: Path) -> FlowMatchingFamily:
    """For tests that change nothing in its modules."""
    return load(base, "wan")


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_samples_are_one_frame_of_the_stock_pipelines(
    family: FlowMatchingFamily, base: Path, guidance_scale: float
) -> None:
    """Drawn with the base's own multistep solver."""
    stock = load_stock(base, "wan")
    prompts, seeds = ["a  cat", "x" * 40], [3, 4]
    images = family.sample(prompts, seeds, resolution=32, num_inference_steps=3, guidance_scale=guidance_scale)
    for prompt, seed, image in zip(prompts, seeds, images, strict=True):
        options = {"max_sequence_length": 24, "num_inference_steps": 3, "guidance_scale": guidance_scale}
        size = {"height": 32, "width": 32, "num_frames": 1}
        frames = stock(prompt, generator=seeded(seed), output_type="np", **size, **options).frames
        assert np.abs(np.asarray(image) / 255 - frames[0, 0]).max() < 1.01 / 255
    assert type(family.pipeline().scheduler).__name__ == "UniPCMultistepScheduler"


def test_captions_are_encoded_as_the_pipeline_does(family: FlowMatchingFamily, base: Path) -> None:
    prompts = [" a  cat ", "", "y" * 40]  # spaces are put in order; the last is cut
    expected = load_stock(base, "wan").encode_prompt(prompts, device="cpu", max_sequence_length=24)
    torch.testing.assert_close(family.embed_captions(prompts)["prompt_embeds"], expected[0])
    torch.testing.assert_close(family._look_up_no_caption()["prompt_embeds"], expected[1][:1])
    assert replace(family, max_sequence_length=None).caption_inputs(["a"])["input_ids"].shape == (1, 512)


def test_clips_are_trained_as_images_are(family: FlowMatchingFamily) -> None:
    clips = torch.rand(3, 3, 5, 32, 32, generator=seeded(1)) * 2 - 1
    batch = {**make_batch(family), "pixel_values": clips}
    mean, _ = family.encode_images(clips)
    assert mean.shape == (3, 4, 2, 8, 8)
    with torch.no_grad():
        loss = family.loss(batch, seeded(3))
        expected = reference_loss(family, "wan", batch, 3)
    torch.testing.assert_close(loss, expected.mean(), rtol=1e-5, atol=1e-6)
    image = family.encode_images(clips[:, :, 0])[0]
    assert image.shape == (3, 4, 1, 8, 8)
    torch.testing.assert_close(image, mean[:, :, :1])  # time is causal


def test_a_base_with_a_timestep_for_each_token(tmp_path: Path, family: FlowMatchingFamily) -> None:
    base = write_base(tmp_path / "base", "wan", expand_timesteps=True)
    expanded = load(base, "wan")
    assert isinstance(expanded, WanFamily)
    assert expanded.expand_timesteps
    assert expanded.pipeline().config["expand_timesteps"]
    batch = make_batch(family)
    with torch.no_grad():
        torch.testing.assert_close(expanded.loss(batch, seeded()), family.loss(batch, seeded()))
    image = expanded.sample(["a cat"], [0], resolution=32, num_inference_steps=2)[0]
    assert image.size == (32, 32)


def test_a_base_with_two_transformers_is_refused(base: Path, tmp_path: Path) -> None:
    index = json.loads((base / "model_index.json").read_text())
    index["transformer_2"] = ["diffusers", "WanTransformer3DModel"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"has two transformers, .* take a base with one, such as Wan 2\.1"):
        WanFamily.check_base(str(tmp_path))


def test_feed_forward_layers_load_on_the_original_base(base: Path, tmp_path: Path) -> None:
    family = load(base, "wan")
    targets = [*family.default_targets("transformer"), "ffn.net.0.proj", "ffn.net.2"]
    initialize(
        family, "cntlora", [make_batch(family)], rank=4, target_modules=targets, variable_rank=True, progress=False
    )
    train_one_step(family)
    assert_stock_loader_reproduces(family, base, "wan", tmp_path)
