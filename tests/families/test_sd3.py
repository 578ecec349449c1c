from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flow_fixtures import (
    NO_T5,
    Inputs,
    assert_stock_loader_reproduces,
    load_stock,
    make_batch,
    pixel_difference,
    seeded,
    train_one_step,
    write_base,
)

from lorainit_diffusers.families.sd3 import StableDiffusion3Family
from lorainit_diffusers.initialize import initialize
from lorainit_diffusers.methods import METHODS

LONG_PROMPT = "a very long prompt about a cat on a roof"  # tokens are letters: more than 12 and than 20
LAST_QUERY = "transformer.transformer_blocks.2.attn.add_q_proj"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """With and without T5."""
    folder = tmp_path_factory.mktemp("bases")
    return {t5: write_base(folder / f"t5-{t5}", "sd3", t5=t5) for t5 in (True, False)}


@pytest.fixture(params=[True, False], ids=["t5", "no-t5"])
def t5(request: pytest.FixtureRequest) -> bool:
    return request.param


def load(base: Path, **options: Any) -> StableDiffusion3Family:
    return StableDiffusion3Family.from_pretrained(base, **options)


def load_stock_sd3(bases: dict[bool, Path], t5: bool) -> Any:
    return load_stock(bases[t5], "sd3", **({} if t5 else NO_T5))


@pytest.mark.parametrize(("max_sequence_length", "clip_skip"), [(None, None), (20, 1)])
def test_samples_are_the_stock_pipelines(
    bases: dict[bool, Path], t5: bool, max_sequence_length: int | None, clip_skip: int | None
) -> None:
    family = load(bases[t5], max_sequence_length=max_sequence_length, clip_skip=clip_skip)
    stock = load_stock_sd3(bases, t5)
    prompts = ["a cat", LONG_PROMPT]
    options = {"num_inference_steps": 3, "guidance_scale": 3.0}
    encoding = {"clip_skip": clip_skip, "max_sequence_length": max_sequence_length or 12}
    images = family.sample(prompts, [3, 4], **options)
    for prompt, seed, image in zip(prompts, [3, 4], images, strict=True):
        alone = family.sample([prompt], [seed], **options)[0]
        assert pixel_difference(alone, stock(prompt, generator=seeded(seed), **encoding, **options).images[0]) == 0
        assert pixel_difference(alone, image) <= 1  # larger batches round otherwise
    assert pixel_difference(*images) > 1
    assert images[0].size == (family.resolution, family.resolution) == (32, 32)
    assert family.resolution_multiple == 8


@pytest.mark.parametrize("clip_skip", [None, 0, 1])
def test_captions_are_encoded_as_the_pipeline_does(bases: dict[bool, Path], t5: bool, clip_skip: int | None) -> None:
    family = load(bases[t5], clip_skip=clip_skip, max_sequence_length=20)
    prompts = ["a cat", LONG_PROMPT]
    encoded, negative, pooled, negative_pooled = load_stock_sd3(bases, t5).encode_prompt(
        prompts, None, None, device="cpu", clip_skip=clip_skip, max_sequence_length=20
    )
    columns = family.embed_captions(prompts)
    torch.testing.assert_close(columns["prompt_embeds"], encoded)
    torch.testing.assert_close(columns["pooled_prompt_embeds"], pooled)
    empty = family._look_up_no_caption()
    torch.testing.assert_close(empty["prompt_embeds"], negative[:1])
    torch.testing.assert_close(empty["pooled_prompt_embeds"], negative_pooled[:1])


def test_base_without_t5(bases: dict[bool, Path]) -> None:
    family = load(bases[False])
    assert family.text_encoder_3 is None
    assert family.caption_columns == ["input_ids", "input_ids_2"]
    recorded = Inputs(family.transformer)
    with torch.no_grad():
        family.loss(make_batch(family), seeded())
    tokens = recorded.stop()[0]["encoder_hidden_states"]
    assert tokens.shape == (3, 12 + 12, 48)
    assert not tokens[:, 12:].any()
    assert tokens[:, :12, :40].any()
    assert load(bases[True]).caption_columns == ["input_ids", "input_ids_2", "input_ids_3"]


@pytest.mark.parametrize("clip_skip", [-1, 2])
def test_clip_skip_out_of_range(bases: dict[bool, Path], clip_skip: int) -> None:
    with pytest.raises(ValueError, match=f"clip_skip {clip_skip} is not between 0 and 1 for the text_encoder"):
        load(bases[True], clip_skip=clip_skip)


@pytest.mark.parametrize("method", METHODS)
def test_layer_whose_output_is_dropped(bases: dict[bool, Path], method: str) -> None:
    """The last block's text queries make an output that nothing uses: their gradient is zero, not missing."""
    family = load(bases[False])
    batch = make_batch(family)
    report = initialize(
        family, method, [batch], rank=4, target_modules=["attn.add_q_proj", "attn.to_add_out"], progress=False
    )
    assert LAST_QUERY in report.layers
    assert LAST_QUERY.replace("add_q_proj", "to_add_out") not in report.layers
    parameters = {name: p for name, p in family.transformer.named_parameters() if p.requires_grad}
    assert all(bool(p.isfinite().all()) for p in parameters.values())
    family.loss(batch, seeded()).backward()
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        last = LAST_QUERY.removeprefix("transformer.") in name
        if last or "lora_B" in name:  # A has none where B starts at zero
            assert bool(parameter.grad.any()) != last


def test_text_encoders_and_every_kind_of_layer_load_on_the_original_base(
    bases: dict[bool, Path], t5: bool, tmp_path: Path
) -> None:
    family = load(bases[t5], train_text_encoder=True)
    targets = {
        "transformer": [
            *("attn.to_q", "attn.to_out.0", "attn.add_q_proj", "attn.to_add_out", "attn2.to_k", "attn2.to_out.0"),
            *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "norm1.linear", "norm1_context.linear"),
            *("proj_out", "context_embedder", "timestep_embedder.linear_1"),
        ]
    }
    batches = [make_batch(family), make_batch(family, ["a hat", "the sun"])]
    for component in ("text_encoder", "text_encoder_2"):
        targets[component] = family.default_targets(component)
    report = initialize(
        family, "eva", batches, rank=4, target_modules=targets, variable_rank=True, min_rank=1, progress=False
    )
    for component in family.adapted:
        ranks = {layer.rank for name, layer in report.layers.items() if name.split(".")[0] == component}
        assert len(ranks) > 1
    train_one_step(family)
    assert_stock_loader_reproduces(family, bases[t5], "sd3", tmp_path)
