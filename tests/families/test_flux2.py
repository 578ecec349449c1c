from __future__ import annotations

import json
from dataclasses import replace
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
from lorainit_diffusers.families.flux2 import Flux2Family
from lorainit_diffusers.initialize import initialize

KINDS = ["flux2-dev", "flux2-klein"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: write_base(folder / kind, kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def base(kind: str, bases: dict[str, Path]) -> Path:
    return bases[kind]


@pytest.fixture(scope="module")
def loaded(bases: dict[str, Path]) -> dict[str, FlowMatchingFamily]:
    return {kind: load(bases[kind], kind) for kind in KINDS}


@pytest.fixture
def family(kind: str, loaded: dict[str, FlowMatchingFamily]) -> FlowMatchingFamily:
    """For tests that change nothing in its modules."""
    return loaded[kind]


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_samples_are_the_stock_pipelines(
    kind: str, base: Path, family: FlowMatchingFamily, guidance_scale: float
) -> None:
    stock = load_stock(base, kind)
    options = {"num_inference_steps": 3, "guidance_scale": guidance_scale}
    image = family.sample(["a cat"], [3], resolution=32, **options)[0]
    tokens = {"max_sequence_length": family.max_sequence_length}
    theirs = stock(prompt="a cat", height=32, width=32, generator=seeded(3), **tokens, **options).images[0]
    assert pixel_difference(image, theirs) == 0
    assert pixel_difference(image, family.sample(["y" * 20], [3], resolution=32, **options)[0]) > 0


def test_captions_are_encoded_as_the_pipeline_does(kind: str, base: Path, family: FlowMatchingFamily) -> None:
    prompts = ["a cat", "", "an [IMG] of a very long " + "y" * 20]  # dev leaves the mark out; the last is cut
    expected = load_stock(base, kind).encode_prompt(
        prompts, device="cpu", max_sequence_length=family.max_sequence_length
    )[0]
    columns = family.embed_captions(prompts)
    torch.testing.assert_close(columns["prompt_embeds"], expected)
    lengths = family.caption_lengths(prompts)["text_encoder"]
    mask = family.caption_inputs(prompts)["attention_mask"]
    assert lengths.limit == family.max_sequence_length == mask.shape[1]
    assert [min(count, lengths.limit) for count in lengths.counts] == mask.sum(dim=1).tolist()
    assert lengths.counts[2] > lengths.limit


def test_usual_number_of_tokens(family: FlowMatchingFamily) -> None:
    assert replace(family, max_sequence_length=None).caption_inputs(["a"])["input_ids"].shape == (1, 512)


def test_guidance_is_an_input_of_dev_only(kind: str, family: FlowMatchingFamily) -> None:
    assert isinstance(family, Flux2Family)
    losses: list[torch.Tensor] = []
    for scale in (4.0, 2.0):
        family = replace(family, guidance_scale=scale)
        recorded = Inputs(family.transformer)
        with torch.no_grad():
            losses.append(family.loss(make_batch(family), seeded()))
        guidance = recorded.stop()[0]["guidance"]
        assert guidance is None if kind == "flux2-klein" else guidance.tolist() == [scale] * 3
    assert torch.equal(*losses) == (kind == "flux2-klein")


def test_levels_of_noise_are_shifted_by_the_images_size(family: FlowMatchingFamily) -> None:
    """More tokens, more noise: as sampling has it."""
    medians: list[float] = []
    for side in (16, 32, 64):
        latents = torch.zeros(99, 16, side, side)
        with family.stratified_timesteps(99, seeded()):
            noisy = family._add_noise(latents, latents, family._uniform.draw(99, seeded()))
        medians.append(float(noisy.timesteps.median()))
    assert medians == sorted(medians)
    # the empirical formula at 256 and 4096 tokens, for 50 steps
    assert medians[0] == pytest.approx(1000 * 5.06 / 6.06, abs=2)
    assert medians[2] == pytest.approx(1000 * 7.56 / 8.56, abs=2)
    fixed = replace(family, noise_scheduler=type(family.noise_scheduler)(shift=1.0))
    latents = torch.zeros(1, 16, 4, 4)
    assert torch.equal(fixed._levels(latents).sigmas, fixed.noise_scheduler.sigmas)


def test_the_index_says_which_base_it_is(bases: dict[str, Path], tmp_path: Path) -> None:
    dev, klein = (load(bases[kind], kind) for kind in KINDS)
    assert isinstance(dev, Flux2Family)
    assert isinstance(klein, Flux2Family)
    assert (dev.klein, klein.klein, klein.is_distilled) == (False, True, False)
    assert type(dev.pipeline()).__name__ == "Flux2Pipeline"
    assert klein.resolution_multiple == 4
    distilled = replace(klein, is_distilled=True).pipeline()
    assert distilled.config.is_distilled
    assert dev.example_prompt("a cat") == "prompt='a cat'"
    index = json.loads((bases["flux2-dev"] / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "Gemma2Model"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is a Gemma2Model, not a Mistral3ForConditionalGeneration or Qwen3ForC"):
        Flux2Family.check_base(str(tmp_path))


def test_every_layer_of_the_blocks_loads_on_the_original_base(kind: str, base: Path, tmp_path: Path) -> None:
    family = load(base, kind)
    targets = [
        *family.default_targets("transformer"),
        *("attn.add_q_proj", "attn.to_add_out", "ff.linear_in", "ff.linear_out", "ff_context.linear_in"),
        *("context_embedder", "x_embedder"),
    ]
    report = initialize(
        family, "cntlora", [make_batch(family)], rank=4, target_modules=targets, variable_rank=True, progress=False
    )
    for layer in ("transformer_blocks.1.ff_context.linear_in", "single_transformer_blocks.1.attn.to_out"):
        assert f"transformer.{layer}" in report.layers
    train_one_step(family)
    assert_stock_loader_reproduces(family, base, kind, tmp_path)
