from __future__ import annotations

from pathlib import Path
from typing import Any

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

from lorainit_diffusers.families.flux import FluxFamily
from lorainit_diffusers.initialize import initialize

LONG_PROMPT = "a very long prompt about a cat on a roof"
TOKENS = 24  # of T5, which the long prompt exceeds, as it does CLIP's 12


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """With and without the guidance embedding: dev and schnell."""
    folder = tmp_path_factory.mktemp("bases")
    return {
        guidance: write_base(folder / f"guidance-{guidance}", "flux", guidance_embeds=guidance)
        for guidance in (True, False)
    }


def load(base: Path, **options: Any) -> FluxFamily:
    return FluxFamily.from_pretrained(base, **{"max_sequence_length": TOKENS, **options})


@pytest.mark.parametrize("guidance", [True, False], ids=["dev", "schnell"])
def test_samples_are_the_stock_pipelines(bases: dict[bool, Path], guidance: bool) -> None:
    family, stock = load(bases[guidance]), load_stock(bases[guidance], "flux")
    prompts = ["a cat", LONG_PROMPT]
    options = {"num_inference_steps": 3, "guidance_scale": 5.0}
    images = family.sample(prompts, [3, 4], resolution=32, **options)
    for prompt, seed, image in zip(prompts, [3, 4], images, strict=True):
        expected = stock(
            prompt, generator=seeded(seed), height=32, width=32, max_sequence_length=TOKENS, **options
        ).images[0]
        assert pixel_difference(image, expected) == 0
    assert pixel_difference(*images) > 1


def test_captions_are_encoded_as_the_pipeline_does(bases: dict[bool, Path]) -> None:
    family, prompts = load(bases[True]), ["a cat", LONG_PROMPT]
    encoded, pooled, _ = load_stock(bases[True], "flux").encode_prompt(
        prompts, prompts, device="cpu", max_sequence_length=TOKENS
    )
    columns = family.embed_captions(prompts)
    torch.testing.assert_close(columns["prompt_embeds"], encoded)
    torch.testing.assert_close(columns["pooled_prompt_embeds"], pooled)
    default = FluxFamily.from_pretrained(bases[True])
    assert default.caption_inputs(["a cat"])["input_ids_2"].shape == (1, 512)


@pytest.mark.parametrize("guidance", [True, False], ids=["dev", "schnell"])
def test_guidance_is_an_input_of_distilled_bases_only(bases: dict[bool, Path], guidance: bool) -> None:
    family = load(bases[guidance], guidance_scale=2.5)
    recorded = Inputs(family.transformer)
    with torch.no_grad():
        family.loss(make_batch(family), seeded())
    given = recorded.stop()[0]["guidance"]
    assert given is None if not guidance else given.tolist() == [2.5, 2.5, 2.5]


def test_positions_are_those_of_sampling_and_sides_may_differ(bases: dict[bool, Path]) -> None:
    family, stock = load(bases[True]), load_stock(bases[True], "flux")
    batch = {**make_batch(family), "pixel_values": torch.zeros(3, 3, 48, 32)}
    recorded = [Inputs(model.transformer) for model in (family, stock)]
    with torch.no_grad():
        family.loss(batch, seeded())
    stock("a cat", height=48, width=32, num_inference_steps=1, max_sequence_length=TOKENS)
    ours, theirs = (inputs.stop()[0] for inputs in recorded)
    assert ours["hidden_states"].shape == (3, 6 * 4, 16)
    for name in ("img_ids", "txt_ids"):
        assert torch.equal(ours[name], theirs[name])
    assert family.resolution_multiple == 8


def test_fused_projections_and_text_encoder_load_on_the_original_base(bases: dict[bool, Path], tmp_path: Path) -> None:
    family = load(bases[True], train_text_encoder=True)
    targets = {
        "transformer": [
            *("attn.to_q", "attn.add_q_proj", "attn.to_add_out", "ff.net.0.proj", "ff_context.net.2"),
            *("proj_mlp", "proj_out", "norm.linear", "norm1.linear", "x_embedder", "timestep_embedder.linear_2"),
        ],
        "text_encoder": family.default_targets("text_encoder"),
    }
    batches = [make_batch(family), make_batch(family, ["a hat", "the sun"])]
    report = initialize(family, "cntlora", batches, rank=4, target_modules=targets, variable_rank=True, progress=False)
    for name in ("proj_out", "single_transformer_blocks.1.proj_out", "single_transformer_blocks.0.proj_mlp"):
        assert f"transformer.{name}" in report.layers
    assert len({layer.rank for layer in report.layers.values()}) > 2
    train_one_step(family)
    assert_stock_loader_reproduces(family, bases[True], "flux", tmp_path)


def test_layers_left_out_stay_out_on_the_original_base(bases: dict[bool, Path], tmp_path: Path) -> None:
    """`proj_out` is a layer of its own and the ending of others, which carry no adapter here."""
    family = load(bases[True])
    initialize(family, "gaussian", rank=4, target_modules=r"proj_out|single_transformer_blocks\.1\.attn\.to_q")
    train_one_step(family)
    assert_stock_loader_reproduces(family, bases[True], "flux", tmp_path)
