from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flow_fixtures import (
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
    return write_base(tmp_path_factory.mktemp("base") / "qwen_image", "qwen_image")


@pytest.fixture(scope="module")
def family(base: Path) -> FlowMatchingFamily:
    """For tests that change nothing in its modules."""
    return load(base, "qwen_image")


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_samples_are_the_stock_pipelines(family: FlowMatchingFamily, base: Path, guidance_scale: float) -> None:
    stock = load_stock(base, "qwen_image")
    images = family.sample(
        ["a cat", "x" * 90], [3, 4], resolution=32, num_inference_steps=3, guidance_scale=guidance_scale
    )
    for prompt, seed, image in zip(["a cat", "x" * 90], [3, 4], images, strict=True):
        theirs = stock(
            prompt,
            negative_prompt="",
            true_cfg_scale=guidance_scale,
            max_sequence_length=256,
            height=32,
            width=32,
            num_inference_steps=3,
            generator=seeded(seed),
        ).images[0]
        assert pixel_difference(image, theirs) <= 1  # prompts of several lengths are padded beside each other


def test_captions_are_encoded_as_the_pipeline_does(family: FlowMatchingFamily, base: Path) -> None:
    prompts = ["a cat", "", "y" * 120]  # the last is cut
    expected, mask = load_stock(base, "qwen_image").encode_prompt(prompts, device="cpu", max_sequence_length=256)
    columns = family.embed_captions(prompts)
    assert columns["prompt_embeds"].shape[1] == 256
    if mask is None:
        mask = torch.ones(expected.shape[:2])
    longest = expected.shape[1]
    torch.testing.assert_close(columns["prompt_embeds"][:, :longest], expected)
    assert torch.equal(columns["prompt_embeds_mask"][:, :longest].float(), mask.float())
    assert not columns["prompt_embeds"][:, longest:].any()


def test_usual_number_of_tokens(family: FlowMatchingFamily) -> None:
    assert replace(family, max_sequence_length=None).caption_inputs(["a"])["input_ids"].shape == (1, 512 + 34)
    with pytest.raises(ValueError, match="max_sequence_length 1025 is too large: the pipeline takes at most 1024"):
        replace(family, max_sequence_length=1025)


def test_padding_stays_out_of_the_statistics(base: Path) -> None:
    family = load(base, "qwen_image")
    batch = make_batch(family)
    targets = ["attn.to_v", "attn.add_v_proj", "attn.to_add_out", "txt_mlp.net.2", "img_mlp.net.2", "txt_in"]
    report = initialize(family, "eva", [batch], rank=2, target_modules=targets, progress=False)
    rows = {name: layer.num_rows for name, layer in report.layers.items()}
    text = int(batch["attention_mask"][:, 34:].sum())
    assert text < batch["attention_mask"][:, 34:].numel()
    assert {rows[f"transformer.transformer_blocks.0.{layer}"] for layer in targets[1:4]} == {text}
    assert rows["transformer.txt_in"] == text
    assert rows["transformer.transformer_blocks.1.img_mlp.net.2"] == 3 * 8 * 8


def test_feed_forward_layers_load_on_the_original_base(base: Path, tmp_path: Path) -> None:
    family = load(base, "qwen_image")
    targets = [*family.default_targets("transformer"), "attn.add_q_proj", "img_mlp.net.2", "img_mod.1", "img_in"]
    initialize(
        family, "cntlora", [make_batch(family)], rank=4, target_modules=targets, variable_rank=True, progress=False
    )
    train_one_step(family)
    assert_stock_loader_reproduces(family, base, "qwen_image", tmp_path)
