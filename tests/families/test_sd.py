from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.training_utils import compute_snr
from sd_fixtures import write_random_sd
from torch import Tensor

from lorainit_diffusers.families import ModelFamily, UniformDraws
from lorainit_diffusers.families.sd import StableDiffusionFamily

PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    for prediction_type in PREDICTION_TYPES:
        torch.manual_seed(0)
        write_random_sd(folder / prediction_type, prediction_type)
    return {prediction_type: folder / prediction_type for prediction_type in PREDICTION_TYPES}


@pytest.fixture
def family(random_sd: Path) -> StableDiffusionFamily:
    return StableDiffusionFamily.from_pretrained(random_sd)


def make_batch(family: StableDiffusionFamily, count: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    pixel_values = torch.rand(count, 3, 32, 32, generator=generator) * 2 - 1
    return {"pixel_values": pixel_values, "input_ids": family.tokenize([f"cat {i}" for i in range(count)])}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reference_loss(
    family: StableDiffusionFamily, batch: dict[str, Tensor], seed: int, snr_gamma: float | None, noise_offset: float
) -> Tensor:
    """The loss of diffusers' train_text_to_image_lora.py, line by line, with the family's order of random draws."""
    generator = seeded(seed)
    posterior = family.vae.encode(batch["pixel_values"]).latent_dist
    latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
    latents = latents * family.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=generator)
    if noise_offset:
        noise += noise_offset * torch.randn((latents.shape[0], latents.shape[1], 1, 1), generator=generator)
    scheduler = family.noise_scheduler
    timesteps = torch.rand(latents.shape[0], generator=generator, dtype=torch.float64)
    timesteps = (timesteps * scheduler.config.num_train_timesteps).long()
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    encoder_hidden_states = family.text_encoder(batch["input_ids"], return_dict=False)[0]
    if scheduler.config.prediction_type == "epsilon":
        target = noise
    elif scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(latents, noise, timesteps)
    else:
        target = latents
    model_pred = family.unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
    if snr_gamma is None:
        return F.mse_loss(model_pred.float(), target.float(), reduction="mean")
    snr = compute_snr(scheduler, timesteps)
    mse_loss_weights = torch.stack([snr, snr_gamma * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
    if scheduler.config.prediction_type == "epsilon":
        mse_loss_weights = mse_loss_weights / snr
    elif scheduler.config.prediction_type == "v_prediction":
        mse_loss_weights = mse_loss_weights / (snr + 1)
    loss = F.mse_loss(model_pred.float(), target.float(), reduction="none")
    loss = loss.mean(dim=list(range(1, len(loss.shape)))) * mse_loss_weights
    return loss.mean()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(("snr_gamma", "noise_offset"), [(None, 0.0), (5.0, 0.0), (1.0, 0.1)])
def test_loss_is_the_one_of_diffusers_examples(
    bases: dict[str, Path], prediction_type: str, snr_gamma: float | None, noise_offset: float
) -> None:
    family = StableDiffusionFamily.from_pretrained(
        bases[prediction_type], snr_gamma=snr_gamma, noise_offset=noise_offset
    )
    batch = make_batch(family)
    with torch.no_grad():
        loss = family.loss(batch, seeded(3))
        expected = reference_loss(family, batch, 3, snr_gamma, noise_offset)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_implements_the_protocol(family: StableDiffusionFamily) -> None:
    assert isinstance(family, ModelFamily)
    assert list(family.adapted) == ["unet"]
    assert family.default_targets("unet") == ["to_q", "to_k", "to_v", "to_out.0"]
    with pytest.raises(ValueError, match="no component 'vae'"):
        family.default_targets("vae")


def test_all_randomness_comes_from_the_generator(family: StableDiffusionFamily) -> None:
    family.noise_offset, family.caption_dropout = 0.1, 0.5
    batch = make_batch(family)
    global_state = torch.get_rng_state()
    with torch.no_grad():
        first, again, other = (family.loss(batch, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), global_state)


def test_cached_latents_give_the_same_kind_of_step(family: StableDiffusionFamily) -> None:
    batch = make_batch(family)
    mean, std = family.encode_images(batch["pixel_values"])
    generator = seeded(0)
    latents = mean + std * torch.randn(mean.shape, generator=generator)
    with torch.no_grad():
        cached = family.loss({"latents": latents, "input_ids": batch["input_ids"]}, generator)
        direct = family.loss(batch, seeded(0))
    torch.testing.assert_close(cached, direct)


def test_base_is_frozen_and_the_text_encoder_carries_gradients_only_on_request(random_sd: Path) -> None:
    for train_text_encoder in (False, True):
        family = StableDiffusionFamily.from_pretrained(random_sd, train_text_encoder=train_text_encoder)
        assert not any(p.requires_grad for m in (family.unet, family.text_encoder, family.vae) for p in m.parameters())
        family.unet.conv_out.weight.requires_grad_()
        embedding = family.text_encoder.get_input_embeddings().weight.requires_grad_()
        family.loss(make_batch(family), seeded()).backward()
        assert family.unet.conv_out.weight.grad is not None
        assert (embedding.grad is not None) == train_text_encoder
        assert set(family.adapted) == ({"unet", "text_encoder"} if train_text_encoder else {"unet"})


def test_stratified_timesteps_cover_every_bin(family: StableDiffusionFamily) -> None:
    batch = make_batch(family, count=4)
    drawn: list[Tensor] = []
    with torch.no_grad(), family.stratified_timesteps(20, seeded(5)):
        for seed in range(5):
            family.loss(batch, seeded(seed))
            assert family.step.timesteps is not None
            drawn.append(family.step.timesteps)
    timesteps = torch.cat(drawn)
    assert sorted((timesteps // 50).tolist()) == list(range(20))
    assert timesteps.tolist() != sorted(timesteps.tolist())


def test_uniform_draws_start_anew_when_used_up() -> None:
    draws = UniformDraws()
    with draws.stratified(4, seeded(0)):
        values = torch.cat([draws.draw(3, seeded(9)) for _ in range(4)])
    for start in (0, 4, 8):
        assert sorted((values[start : start + 4] * 4).long().tolist()) == [0, 1, 2, 3]


def test_uniform_draws_are_plain_again_after_an_error() -> None:
    draws = UniformDraws()
    with pytest.raises(ValueError, match="stop"), draws.stratified(4, seeded(0)):
        raise ValueError("stop")
    assert torch.equal(draws.draw(3, seeded(9)), torch.rand(3, generator=seeded(9), dtype=torch.float64))
    with pytest.raises(ValueError, match="num_samples"), draws.stratified(0, seeded()):
        pass


def test_token_mask_keeps_the_first_end_token(family: StableDiffusionFamily) -> None:
    batch = make_batch(family)
    with torch.no_grad():
        family.loss(batch, seeded())
    mask, end = family.step.token_masks["text_encoder"], family.tokenizer.eos_token_id
    for row, kept in zip(batch["input_ids"].tolist(), mask.tolist(), strict=True):
        first_end = row.index(end)
        assert kept == [position <= first_end for position in range(len(row))]


def test_caption_dropout_uses_the_empty_caption(family: StableDiffusionFamily) -> None:
    batch = make_batch(family)
    empty = {**batch, "input_ids": family.tokenize([""] * 3)}
    with torch.no_grad():
        expected = family.loss(empty, seeded(0))
        assert not torch.equal(family.loss(batch, seeded(0)), expected)
        family.caption_dropout = 1.0
        assert torch.equal(family.loss(batch, seeded(0)), expected)


def test_bfloat16_weights_keep_a_float32_loss_and_vae(random_sd: Path) -> None:
    family = StableDiffusionFamily.from_pretrained(random_sd, weight_dtype=torch.bfloat16)
    assert family.weight_dtype == torch.bfloat16
    assert {p.dtype for p in family.vae.parameters()} == {torch.float32}
    with torch.no_grad():
        loss = family.loss(make_batch(family), seeded())
    assert loss.dtype == torch.float32
    reference = StableDiffusionFamily.from_pretrained(random_sd)
    with torch.no_grad():
        torch.testing.assert_close(loss, reference.loss(make_batch(reference), seeded()), rtol=0.05, atol=0.01)


def test_pipeline_draws_what_the_stock_one_draws(family: StableDiffusionFamily, random_sd: Path) -> None:
    stock = StableDiffusionPipeline.from_pretrained(random_sd, safety_checker=None, requires_safety_checker=False)
    stock.scheduler = DDIMScheduler.from_pretrained(random_sd, subfolder="scheduler")
    stock.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "output_type": "pt"}
    ours = family.pipeline()("a cat", generator=seeded(), **options).images
    theirs = stock("a cat", generator=seeded(), **options).images
    torch.testing.assert_close(ours, theirs)
    assert ours.shape[-1] == family.resolution == 32
    assert family.resolution_multiple == 4


def test_batch_without_its_parts(family: StableDiffusionFamily) -> None:
    with pytest.raises(ValueError, match="a batch needs input_ids"):
        family.loss({"input_ids": family.tokenize(["a"])}, seeded())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"snr_gamma": -1.0}, "snr_gamma must be positive"), ({"caption_dropout": 2.0}, "caption_dropout")],
)
def test_bad_options(random_sd: Path, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StableDiffusionFamily.from_pretrained(random_sd, **options)


def test_missing_and_unsupported_bases(random_sd: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        StableDiffusionFamily.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no model_index\.json"):
        StableDiffusionFamily.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(ValueError, match="is a StableDiffusionXLPipeline"):
        StableDiffusionFamily.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(FileNotFoundError, match="cannot load the base model"):
        StableDiffusionFamily.from_pretrained(tmp_path)
