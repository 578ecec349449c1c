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
from lorainit_diffusers.families.sana import INSTRUCTION
from lorainit_diffusers.initialize import initialize


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "sana", "sana")


@pytest.fixture(scope="module")
def family(base: Path) -> FlowMatchingFamily:
    """For tests that change nothing in its modules."""
    return load(base, "sana")


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_samples_are_the_stock_pipelines(family: FlowMatchingFamily, base: Path, guidance_scale: float) -> None:
    """Drawn with the base's own multistep solver."""
    stock = load_stock(base, "sana")
    prompts, seeds = ["a Cat ", "x" * 40], [3, 4]
    images = family.sample(prompts, seeds, resolution=32, num_inference_steps=3, guidance_scale=guidance_scale)
    for prompt, seed, image in zip(prompts, seeds, images, strict=True):
        options = {"max_sequence_length": 24, "num_inference_steps": 3, "guidance_scale": guidance_scale}
        size = {"height": 32, "width": 32, "use_resolution_binning": False}
        assert pixel_difference(image, stock(prompt, generator=seeded(seed), **size, **options).images[0]) <= 1
    assert type(family.pipeline().scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert family.pipeline().scheduler.config.flow_shift == 3.0


def test_captions_are_encoded_as_the_pipeline_does(family: FlowMatchingFamily, base: Path) -> None:
    prompts = ["A cat ", "", "y" * 40]  # the last is cut
    instruction = INSTRUCTION.split("\n")
    expected = load_stock(base, "sana").encode_prompt(
        prompts, device="cpu", max_sequence_length=24, complex_human_instruction=instruction
    )
    columns = family.embed_captions(prompts)
    torch.testing.assert_close(columns["prompt_embeds"], expected[0])
    assert torch.equal(columns["prompt_attention_mask"], expected[1])
    empty = family._look_up_no_caption()
    torch.testing.assert_close(empty["prompt_embeds"], expected[2][:1])
    assert torch.equal(empty["prompt_attention_mask"], expected[3][:1])
    assert "Enhanced prompt" in INSTRUCTION


def test_usual_number_of_tokens(family: FlowMatchingFamily) -> None:
    usual = replace(family, max_sequence_length=None)
    assert usual.embed_captions(["a"])["prompt_embeds"].shape[:2] == (1, 300)


def test_shift_is_that_of_the_bases_solver(family: FlowMatchingFamily, tmp_path: Path) -> None:
    sigmas = family.noise_scheduler.sigmas
    assert float(sigmas[500]) == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))
    wrong = write_base(tmp_path / "wrong", "sana", prediction_type="epsilon")
    with pytest.raises(ValueError, match="has the prediction_type 'epsilon': Sana is trained with flow matching"):
        load(wrong, "sana")


def test_latents_have_no_posterior(family: FlowMatchingFamily) -> None:
    mean, std = family.encode_images(make_batch(family)["pixel_values"])
    assert mean.shape == (3, 4, 8, 8)
    assert not std.any()


def test_padding_stays_out_of_the_statistics(base: Path) -> None:
    family = load(base, "sana")
    batch = make_batch(family)
    report = initialize(family, "eva", [batch], rank=2, progress=False)
    rows = {name: layer.num_rows for name, layer in report.layers.items()}
    text = int(family.embed_captions(["cat 0", "a dog", "one long house"])["prompt_attention_mask"].sum())
    assert rows["transformer.transformer_blocks.0.attn2.to_k"] == text < 3 * 24
    assert rows["transformer.transformer_blocks.0.attn2.to_q"] == 3 * 8 * 8
    assert rows["transformer.transformer_blocks.1.attn1.to_v"] == 3 * 8 * 8


def test_output_layers_load_on_the_original_base(base: Path, tmp_path: Path) -> None:
    family = load(base, "sana")
    targets = [*family.default_targets("transformer"), "to_out.0", "caption_projection.linear_1"]
    initialize(
        family, "cntlora", [make_batch(family)], rank=4, target_modules=targets, variable_rank=True, progress=False
    )
    train_one_step(family)
    assert_stock_loader_reproduces(family, base, "sana", tmp_path)
