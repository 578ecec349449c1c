from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flow_fixtures import (
    Inputs,
    assert_stock_loader_reproduces,
    load_stock,
    make_batch,
    pixel_difference,
    seeded,
    train_one_step,
    write_base,
)

from lorainit_diffusers.families.lumina2 import Lumina2Family
from lorainit_diffusers.initialize import initialize

SYSTEM_LETTERS = 164  # of the pipeline's system prompt and its marker, spaces included


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "lumina2", "lumina2")


@pytest.fixture(scope="module")
def family(base: Path) -> Lumina2Family:
    """For tests that change nothing in its modules."""
    return Lumina2Family.from_pretrained(base)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_samples_are_the_stock_pipelines(family: Lumina2Family, base: Path, guidance_scale: float) -> None:
    stock = load_stock(base, "lumina2")
    prompts = ["a cat", "x" * 100]  # the second is cut
    options = {"num_inference_steps": 3, "guidance_scale": guidance_scale}
    images = family.sample(prompts, [3, 4], **options)
    for prompt, seed, image in zip(prompts, [3, 4], images, strict=True):
        alone = family.sample([prompt], [seed], **options)[0]
        assert pixel_difference(alone, stock(prompt, generator=seeded(seed), **options).images[0]) == 0
        assert pixel_difference(alone, image) <= 1  # prompts of several lengths are padded beside each other
    assert pixel_difference(*images) > 1
    assert images[0].size == (family.resolution, family.resolution) == (32, 32)
    assert family.resolution_multiple == 16


@pytest.mark.parametrize("max_sequence_length", [None, 190])
def test_captions_are_encoded_as_the_pipeline_does(
    family: Lumina2Family, base: Path, max_sequence_length: int | None
) -> None:
    family = replace(family, max_sequence_length=max_sequence_length)
    prompts = ["a cat", "", "y" * 100]
    expected = load_stock(base, "lumina2").encode_prompt(
        prompts, device="cpu", max_sequence_length=max_sequence_length or 256
    )
    columns = family.embed_captions(prompts)
    empty = family._look_up_no_caption()
    torch.testing.assert_close(columns["prompt_embeds"], expected[0])
    assert torch.equal(columns["prompt_attention_mask"], expected[1])
    torch.testing.assert_close(empty["prompt_embeds"], expected[2][:1])
    assert torch.equal(empty["prompt_attention_mask"], expected[3][:1])
    # an empty caption has the system prompt, no caption has not: one token, the end
    assert columns["prompt_attention_mask"].sum(dim=1).tolist()[:2] == [SYSTEM_LETTERS + 6, SYSTEM_LETTERS + 1]
    assert int(empty["prompt_attention_mask"].sum()) == 1


def test_tokens_are_padded_on_the_right_whatever_the_tokenizer_says(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    path = tmp_path / "base" / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "padding_side": "left"}))
    columns = Lumina2Family.from_pretrained(tmp_path / "base").caption_inputs(["a cat"])
    assert columns["attention_mask"][0, 0] == 1
    assert columns["attention_mask"][0, -1] == 0


def test_time_runs_from_noise_to_data(family: Lumina2Family) -> None:
    recorded = Inputs(family.transformer)
    with torch.no_grad():
        family.loss(make_batch(family), seeded())
    time = recorded.stop()[0]["timestep"]
    assert family.step.timesteps is not None
    torch.testing.assert_close(time, 1 - family.step.timesteps / 1000)
    assert time.min() >= 0
    # shifted towards noise, as in sampling: half of the uniform draws lie beyond sigma = 6/7
    with family.stratified_timesteps(100, seeded()):
        latents = torch.zeros(100, 4, 4, 4)
        sigmas = family._add_noise(latents, latents, family._uniform.draw(100, seeded())).timesteps / 1000
    assert sigmas.median() == pytest.approx(6 / 7, abs=0.01)


def test_padding_does_not_matter(family: Lumina2Family) -> None:
    short = replace(family, max_sequence_length=190)
    with torch.no_grad():
        losses = [each.loss(make_batch(each), seeded()) for each in (family, short)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


def test_padding_stays_out_of_the_statistics(base: Path) -> None:
    family = Lumina2Family.from_pretrained(base)
    batch = make_batch(family)
    report = initialize(family, "eva", [batch], rank=4, progress=False)
    rows = {name: layer.num_rows for name, layer in report.layers.items()}
    text, image = int(batch["attention_mask"].sum()), 3 * (32 // 16) ** 2
    assert rows["transformer.context_refiner.0.attn.to_v"] == text < batch["attention_mask"].numel()
    assert rows["transformer.noise_refiner.0.attn.to_v"] == image
    longest = int(batch["attention_mask"].sum(dim=1).max())
    assert rows["transformer.layers.0.attn.to_v"] == 3 * longest + image
    # where the image has as many tokens as the text, shapes alone could not tell them apart
    assert family.step.token_mask("transformer", "noise_refiner.0.attn.to_q") is None
    mask = family.step.token_mask("transformer", "context_refiner.0.attn.to_out.0")
    assert mask is not None
    assert torch.equal(mask, batch["attention_mask"].bool())


def test_more_tokens_than_positions(family: Lumina2Family) -> None:
    with pytest.raises(ValueError, match="max_sequence_length 300 is too large: the transformer has 300 positions"):
        replace(family, max_sequence_length=300)
    assert replace(family, max_sequence_length=299).caption_inputs(["a"])["input_ids"].shape == (1, 299)


def test_attention_of_all_blocks_and_feed_forward_layers_load_on_the_original_base(base: Path, tmp_path: Path) -> None:
    family = Lumina2Family.from_pretrained(base)
    targets = [*family.default_targets("transformer"), "linear_1", "linear_2", "linear_3", "norm1.linear"]
    report = initialize(
        family, "cntlora", [make_batch(family)], rank=4, target_modules=targets, variable_rank=True, progress=False
    )
    for block in ("layers.1", "noise_refiner.0", "context_refiner.0"):
        for layer in ("attn.to_q", "attn.to_out.0", "feed_forward.linear_3"):
            assert f"transformer.{block}.{layer}" in report.layers
    train_one_step(family)
    assert_stock_loader_reproduces(family, base, "lumina2", tmp_path)
