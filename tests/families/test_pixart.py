from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiTPipeline, PixArtAlphaPipeline, PixArtSigmaPipeline
from diffusers.training_utils import compute_snr
from PIL import Image
from pixart_fixtures import write_random_dit, write_random_pixart
from sd_fixtures import write_random_vae
from torch import Tensor

from lorainit_diffusers import initialize
from lorainit_diffusers.families import ModelFamily, family_class
from lorainit_diffusers.families.pixart import DiTFamily, PixArtFamily
from lorainit_diffusers.families.sd import StableDiffusionFamily
from lorainit_diffusers.hooks import observe_inputs

CAPTIONS = ["A Cat", "a dog on a mat", "xyz"]
CLASSES = ["tench", "10", "tabby, tabby cat"]
PIPELINES = {"alpha": PixArtAlphaPipeline, "sigma": PixArtSigmaPipeline, "alpha-1024": PixArtAlphaPipeline}
LENGTHS = {"alpha": 120, "sigma": 300, "alpha-1024": 120}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PixArt-alpha, Sigma, alpha with the image's size as a condition, and DiT."""
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    write_random_pixart(folder / "alpha")
    write_random_pixart(folder / "sigma", "PixArtSigmaPipeline")
    size_conditions = {"sample_size": 128, "use_additional_conditions": True}
    write_random_pixart(folder / "alpha-1024", num_attention_heads=3, cross_attention_dim=48, **size_conditions)
    write_random_dit(folder / "dit")
    return {name: folder / name for name in (*PIPELINES, "dit")}


def load(bases: dict[str, Path], name: str, **options: Any) -> PixArtFamily | DiTFamily:
    return (DiTFamily if name == "dit" else PixArtFamily).from_pretrained(bases[name], **options)


def make_batch(family: PixArtFamily | DiTFamily, size: tuple[int, int] = (32, 32)) -> dict[str, Tensor]:
    pixel_values = torch.rand(3, 3, *size, generator=seeded(7)) * 2 - 1
    captions = CLASSES if isinstance(family, DiTFamily) else CAPTIONS
    return {"pixel_values": pixel_values, **family.caption_inputs(captions)}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def largest_difference(ours: list[Image.Image], theirs: list[Image.Image]) -> int:
    assert [image.size for image in ours] == [image.size for image in theirs]
    return max(
        int(np.abs(np.asarray(a, dtype=np.int64) - np.asarray(b, dtype=np.int64)).max())
        for a, b in zip(ours, theirs, strict=True)
    )


def reference_loss(
    family: PixArtFamily | DiTFamily, batch: dict[str, Tensor], seed: int, snr_gamma: float | None
) -> Tensor:
    """The step of diffusers' text-to-image examples with PixArt's and DiT's conditioning, line by line."""
    generator = seeded(seed)
    posterior = family.vae.encode(batch["pixel_values"]).latent_dist
    latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
    latents = latents * family.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = (torch.rand(len(latents), generator=generator, dtype=torch.float64) * 1000).long()
    # PixArt and DiT: 1000 steps of a linear schedule from 1e-4 to 0.02
    alphas_cumprod = torch.cumprod(1.0 - torch.linspace(0.0001, 0.02, 1000), dim=0)[timesteps].view(-1, 1, 1, 1)
    noisy_latents = alphas_cumprod.sqrt() * latents + (1 - alphas_cumprod).sqrt() * noise
    if isinstance(family, DiTFamily):
        model_pred = family.transformer(noisy_latents, timesteps, batch["class_labels"]).sample
    else:
        prompt_embeds = family.text_encoder(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
        added_cond_kwargs: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if family.transformer.config.sample_size == 128:
            height, width = batch["pixel_values"].shape[-2:]
            added_cond_kwargs = {
                "resolution": torch.tensor([[float(height), float(width)]] * len(latents)),
                "aspect_ratio": torch.tensor([[height / width]] * len(latents)),
            }
        model_pred = family.transformer(
            noisy_latents,
            encoder_hidden_states=prompt_embeds,
            encoder_attention_mask=batch["attention_mask"],
            timestep=timesteps,
            added_cond_kwargs=added_cond_kwargs,
        ).sample
    model_pred = model_pred.chunk(2, dim=1)[0]
    if snr_gamma is None:
        return F.mse_loss(model_pred, noise)
    snr = compute_snr(family.noise_scheduler, timesteps)
    weights = torch.stack([snr, snr_gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0] / snr
    return (F.mse_loss(model_pred, noise, reduction="none").mean(dim=(1, 2, 3)) * weights).mean()


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
@pytest.mark.parametrize("name", ["alpha", "sigma", "alpha-1024", "dit"])
def test_loss_is_an_independent_retyping_of_it(bases: dict[str, Path], name: str, snr_gamma: float | None) -> None:
    family = load(bases, name, snr_gamma=snr_gamma)
    family.transformer.train()
    batch = make_batch(family, (32, 32) if name == "dit" else (48, 32))
    global_state = torch.get_rng_state()
    with torch.no_grad():
        loss = family.loss(batch, seeded(3))
    assert torch.equal(torch.get_rng_state(), global_state)  # the transformer draws no label dropout of its own
    family.transformer.eval()
    with torch.no_grad():
        torch.testing.assert_close(loss, reference_loss(family, batch, 3, snr_gamma), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
@pytest.mark.parametrize("name", PIPELINES)
def test_pixart_draws_what_the_stock_pipeline_draws(bases: dict[str, Path], name: str, guidance_scale: float) -> None:
    stock = PIPELINES[name].from_pretrained(bases[name])
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config, clip_sample=False)
    stock.set_progress_bar_config(disable=True)
    family = PixArtFamily.from_pretrained(bases[name])
    prompts, options = CAPTIONS[:2], {"num_inference_steps": 3, "guidance_scale": guidance_scale}
    generators = [seeded(4), seeded(5)]
    theirs = stock(prompts, height=32, width=32, use_resolution_binning=False, generator=generators, **options).images
    ours = family.sample(prompts, [4, 5], resolution=32, **options)
    assert largest_difference(ours, theirs) <= 1
    pipeline = family.pipeline()
    assert type(pipeline) is PIPELINES[name]
    live = pipeline(
        prompts, height=32, width=32, use_resolution_binning=False, generator=[seeded(4), seeded(5)], **options
    ).images
    assert largest_difference(live, theirs) <= 1
    family.release_text_encoders(prompts)
    assert largest_difference(family.sample(prompts, [4, 5], resolution=32, **options), theirs) <= 1


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_dit_draws_what_the_stock_pipeline_draws(bases: dict[str, Path], guidance_scale: float) -> None:
    stock = DiTPipeline.from_pretrained(bases["dit"])
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    stock.set_progress_bar_config(disable=True)
    family = DiTFamily.from_pretrained(bases["dit"])
    options = {"num_inference_steps": 3, "guidance_scale": guidance_scale}
    theirs = stock(class_labels=[0, 10, 2], generator=[seeded(4), seeded(5), seeded(6)], **options).images
    assert largest_difference(family.sample(CLASSES, [4, 5, 6], **options), theirs) <= 1
    live = family.pipeline()(class_labels=[0, 10, 2], generator=[seeded(4), seeded(5), seeded(6)], **options).images
    assert largest_difference(live, theirs) <= 1
    family.release_text_encoders(CLASSES)
    assert largest_difference(family.sample(CLASSES, [4, 5, 6], **options), theirs) <= 1
    assert family.sample(["1"], [0], resolution=48, num_inference_steps=1)[0].size == (48, 48)


def test_dit_decodes_in_the_dtype_of_the_vae(bases: dict[str, Path]) -> None:
    family = DiTFamily.from_pretrained(bases["dit"], weight_dtype=torch.bfloat16)
    reference = DiTFamily.from_pretrained(bases["dit"])
    options = {"num_inference_steps": 2, "guidance_scale": 1.5}
    assert family.vae.dtype == torch.float32
    noise = torch.randn(1, 4, 8, 8, generator=seeded(1), dtype=torch.bfloat16)
    assert not torch.equal(noise.float(), torch.randn(1, 4, 8, 8, generator=seeded(1)))  # so seeds differ by dtype
    (image,) = family.sample(["tench"], [1], **options)
    assert image.size == reference.sample(["tench"], [1], **options)[0].size


def test_captions_of_pixart_are_read_as_the_pipeline_reads_them(bases: dict[str, Path]) -> None:
    for name, length in LENGTHS.items():
        family = PixArtFamily.from_pretrained(bases[name])
        columns = family.caption_inputs(["  A Cat ", ""])
        assert columns.keys() == {"input_ids", "attention_mask"}
        assert columns["input_ids"].shape == columns["attention_mask"].shape == (2, length)
        assert torch.equal(columns["input_ids"][:1], family.caption_inputs(["a cat"])["input_ids"])
        embeds, mask, none, none_mask = family.pipeline().encode_prompt(["  A Cat "], max_sequence_length=length)
        ours = family.embed_captions(["  A Cat ", ""])
        torch.testing.assert_close(ours["prompt_embeds"], torch.cat([embeds, none]))
        assert torch.equal(ours["prompt_attention_mask"], torch.cat([mask, none_mask]))
    shorter = PixArtFamily.from_pretrained(bases["sigma"], max_sequence_length=16)
    assert shorter.caption_inputs(CAPTIONS)["input_ids"].shape == (3, 16)
    with pytest.raises(ValueError, match="max_sequence_length must be at least 1"):
        PixArtFamily.from_pretrained(bases["sigma"], max_sequence_length=0)


def test_classes_are_names_or_numbers(bases: dict[str, Path]) -> None:
    family = DiTFamily.from_pretrained(bases["dit"])
    captions = ["tench", "Tinca tinca", "tench, Tinca tinca", " 999 ", "crane", "0", ""]
    assert family.caption_inputs(captions)["class_labels"].tolist() == [0, 0, 0, 999, 3, 0, 1000]
    assert family.caption_inputs(["tench"])["class_labels"].dtype == torch.int64
    assert family.pipeline().get_label_ids(["crane", "Cardigan"]) == [3, 10]
    for unknown, message in {
        "tensh": "'tensh' is no class of this base: the closest are 'tench'",
        "1000": "a number from 0 to 999",
        "cardigan": "'Cardigan'",
        "a photo": "is no class of this base: give a name of id2label",
    }.items():
        with pytest.raises(ValueError, match=message):
            family.caption_inputs([unknown])
        with pytest.raises(ValueError, match="is no class"):
            family.release_text_encoders([unknown])
    assert family.example_prompt("tabby") == "[2]"
    assert family.example_prompt(None) == "[0]"


def test_the_null_class_is_the_transformers_own(tmp_path: Path) -> None:
    write_random_dit(tmp_path, num_embeds_ada_norm=11)
    family = DiTFamily.from_pretrained(tmp_path)
    assert family.caption_inputs(["", "10"])["class_labels"].tolist() == [11, 10]
    assert family.sample(["10"], [0], num_inference_steps=1, guidance_scale=2.0)  # the stock pipeline asks for 1000
    with pytest.raises(ValueError, match="from 0 to 10"):
        family.caption_inputs(["11"])


@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize("name", ["alpha", "dit"])
def test_caption_dropout_is_the_empty_caption(bases: dict[str, Path], name: str, encoded: bool) -> None:
    family = load(bases, name)
    batch = make_batch(family)
    captions = CLASSES if name == "dit" else CAPTIONS
    columns = family.embed_captions if encoded else family.caption_inputs
    images = {"pixel_values": batch["pixel_values"]}
    with torch.no_grad():
        expected = family.loss({**images, **columns([""] * 3)}, seeded(0))
        assert not torch.equal(family.loss({**images, **columns(captions)}, seeded(0)), expected)
        family.caption_dropout = 1.0
        torch.testing.assert_close(family.loss({**images, **columns(captions)}, seeded(0)), expected)


@pytest.mark.parametrize("name", ["alpha", "dit"])
def test_embedded_captions_are_the_tokenized_ones(bases: dict[str, Path], name: str) -> None:
    family = load(bases, name)
    batch = make_batch(family)
    embeds = family.embed_captions(CLASSES if name == "dit" else CAPTIONS, batch_size=2)
    family.release_text_encoders([])
    with torch.no_grad():
        encoded = family.loss({"pixel_values": batch["pixel_values"], **embeds}, seeded(1))
        family = load(bases, name)
        torch.testing.assert_close(encoded, family.loss(batch, seeded(1)))


@pytest.mark.parametrize("name", ["alpha-1024", "dit"])
def test_prior_preservation_and_bfloat16(bases: dict[str, Path], name: str) -> None:
    family = load(bases, name, prior_loss_weight=0.5)
    batch = make_batch(family)
    latents = torch.randn(3, 4, 8, 8, generator=seeded(2))
    batch = {"latents": latents, **{column: batch[column] for column in family.caption_columns}}
    with torch.no_grad():
        mixed = family.loss({**batch, "is_class": torch.tensor([False, True, True])}, seeded(0))
        # the loss of one kind alone is its mean, weighted: the three samples draw as before
        instances = family.loss({**batch, "is_class": torch.tensor([False] * 3)}, seeded(0)) * 3
        per_sample = [family.loss({**batch, "is_class": torch.arange(3) != index}, seeded(0)) for index in range(3)]
        # mixed_i = l_i + 0.5 * (sum - l_i) / 2  =>  l_i = (mixed_i - sum / 4) * 4 / 3
        losses = [(value - instances / 4) * 4 / 3 for value in per_sample]
        torch.testing.assert_close(mixed, losses[0] + 0.5 * (losses[1] + losses[2]) / 2)
        half = load(bases, name, prior_loss_weight=0.5, weight_dtype=torch.bfloat16)
        assert half.weight_dtype == torch.bfloat16
        rounded = half.loss({**batch, "is_class": torch.tensor([False, True, True])}, seeded(0))
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, mixed, rtol=0.05, atol=0.01)


def test_they_are_families(bases: dict[str, Path]) -> None:
    for name, kind in (("pixart", PixArtFamily), ("dit", DiTFamily)):
        assert family_class(name) is kind
        family = load(bases, "alpha" if name == "pixart" else "dit")
        assert isinstance(family, ModelFamily)
        assert list(family.adapted) == ["transformer"]
        assert family.EXPORTS == ("peft",)
        assert family.resolution == 32
        assert family.resolution_multiple == 8
        assert not any(p.requires_grad for module in family.modules.values() for p in module.parameters())
        linear = {n for n, _ in family.transformer.named_modules() if n.endswith(tuple(family.TARGETS))}
        assert {target for target in family.TARGETS if not any(n.endswith(target) for n in linear)} == set()


def test_text_tokens_that_are_padding_are_left_out_and_image_tokens_are_not(bases: dict[str, Path]) -> None:
    family = PixArtFamily.from_pretrained(bases["alpha"], max_sequence_length=16)  # as many as image tokens
    batch = make_batch(family)
    num_real, num_all = int(batch["attention_mask"].sum()), batch["attention_mask"].numel()
    assert num_real < num_all
    expected = {
        "attn1.to_q": num_all,
        "attn2.to_q": num_all,
        "attn2.to_k": num_real,
        "attn2.to_v": num_real,
        "ff.net.2": num_all,
        "caption_projection.linear_1": num_real,
        "caption_projection.linear_2": num_real,
    }
    seen: dict[str, Tensor | None] = {}

    def note(name: str, tensor: Tensor) -> None:
        assert tensor.shape[:-1] == (3, 16)
        seen[name] = family.step.token_mask("transformer", name)

    layers = {n: m for n, m in family.transformer.named_modules() if n.endswith(tuple(expected))}
    with observe_inputs(layers, note), torch.no_grad():
        family.loss(batch, seeded(0))
    for name, mask in seen.items():
        count = next(count for ending, count in expected.items() if name.endswith(ending))
        assert (num_all if mask is None else int(mask.sum())) == count, name
    # a dropped caption's mask is that of the empty one
    family.caption_dropout = 1.0
    with torch.no_grad():
        family.loss(batch, seeded(0))
    mask = family.step.token_mask("transformer", "transformer_blocks.0.attn2.to_k")
    assert mask is not None
    assert mask.sum(dim=1).tolist() == [1, 1, 1]
    family.caption_dropout = 0.0

    report = initialize(family, "eva", [batch], rank=2, target_modules=list(expected), progress=False)
    for name, layer in report.layers.items():
        assert layer.num_rows == next(count for ending, count in expected.items() if name.endswith(ending)), name


def test_padding_does_not_change_the_prediction(bases: dict[str, Path]) -> None:
    family = PixArtFamily.from_pretrained(bases["alpha"])
    batch = {"latents": torch.randn(3, 4, 8, 8, generator=seeded(2)), **family.embed_captions(CAPTIONS)}
    mask = batch["prompt_attention_mask"].bool()
    other = {**batch, "prompt_embeds": torch.where(mask[..., None], batch["prompt_embeds"], 7.0)}
    with torch.no_grad():
        torch.testing.assert_close(family.loss(batch, seeded(0)), family.loss(other, seeded(0)))


def test_bad_bases_and_inputs(bases: dict[str, Path], random_sd: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"is a DiTPipeline, not a PixArtAlphaPipeline or .* use `family_class\(.dit.\)`"
    ):
        PixArtFamily.from_pretrained(bases["dit"])
    with pytest.raises(ValueError, match=r"is a PixArtSigmaPipeline, not a DiTPipeline; .*\(.pixart.\)`"):
        DiTFamily.from_pretrained(bases["sigma"])
    with pytest.raises(ValueError, match=r"use `family_class\('sd'\)` for it"):
        DiTFamily.from_pretrained(random_sd)
    with pytest.raises(ValueError, match=r"use `family_class\(.pixart.\)`"):
        StableDiffusionFamily.from_pretrained(bases["alpha"])
    write_random_vae(tmp_path / "vae", latent_channels=8)
    for name in ("alpha", "dit"):
        with pytest.raises(ValueError, match="takes 4 channels but the VAE makes 8"):
            load(bases, name, vae_path=tmp_path / "vae")
        with pytest.raises(ValueError, match="no text encoder that can be trained"):
            load(bases, name, train_text_encoder=True)
    family = DiTFamily.from_pretrained(bases["dit"])
    with pytest.raises(ValueError, match="square images, got 48x32 pixels"):
        family.loss(make_batch(family, (48, 32)), seeded())
    with pytest.raises(ValueError, match="a batch needs class_labels"):
        family.loss({"pixel_values": torch.zeros(1, 3, 32, 32)}, seeded())
