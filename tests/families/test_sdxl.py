from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from diffusers.training_utils import compute_snr
from sd_fixtures import write_random_sdxl
from torch import Tensor, nn

from lorainit_diffusers.families import ModelFamily
from lorainit_diffusers.families.sdxl import StableDiffusionXLFamily

PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]
SIZES = {
    "original_sizes": torch.tensor([[64, 48], [33, 97], [32, 32]]),
    "crop_top_lefts": torch.tensor([[3, 0], [0, 20], [0, 0]]),
    "target_sizes": torch.tensor([[32, 32], [32, 32], [24, 40]]),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    for prediction_type in PREDICTION_TYPES:
        torch.manual_seed(0)
        write_random_sdxl(folder / prediction_type, prediction_type)
    return {prediction_type: folder / prediction_type for prediction_type in PREDICTION_TYPES}


@pytest.fixture
def family(random_sdxl: Path) -> StableDiffusionXLFamily:
    return StableDiffusionXLFamily.from_pretrained(random_sdxl)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_batch(family: StableDiffusionXLFamily, count: int = 3) -> dict[str, Tensor]:
    pixel_values = torch.rand(count, 3, 32, 32, generator=seeded(7)) * 2 - 1
    return {"pixel_values": pixel_values, **family.caption_inputs([f"cat {i}" for i in range(count)])}


def load_stock(folder: Path) -> StableDiffusionXLPipeline:
    stock = StableDiffusionXLPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    return stock


def reference_loss(
    family: StableDiffusionXLFamily, batch: dict[str, Tensor], seed: int, snr_gamma: float | None, noise_offset: float
) -> Tensor:
    """The loss of diffusers' train_text_to_image_lora_sdxl.py, line by line, with the family's order of draws."""
    generator = seeded(seed)
    posterior = family.vae.encode(batch["pixel_values"]).latent_dist
    model_input = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
    model_input = model_input * family.vae.config.scaling_factor
    noise = torch.randn(model_input.shape, generator=generator)
    if noise_offset:
        noise += noise_offset * torch.randn((model_input.shape[0], model_input.shape[1], 1, 1), generator=generator)
    noise_scheduler = family.noise_scheduler
    timesteps = torch.rand(model_input.shape[0], generator=generator, dtype=torch.float64)
    timesteps = (timesteps * noise_scheduler.config.num_train_timesteps).long()
    noisy_model_input = noise_scheduler.add_noise(model_input, noise, timesteps)

    def compute_time_ids(original_size: Tensor, crops_coords_top_left: Tensor, target_size: Tensor) -> Tensor:
        add_time_ids = [*original_size.tolist(), *crops_coords_top_left.tolist(), *target_size.tolist()]
        return torch.tensor([add_time_ids], dtype=torch.float32)

    sizes = zip(batch["original_sizes"], batch["crop_top_lefts"], batch["target_sizes"], strict=True)
    add_time_ids = torch.cat([compute_time_ids(*size) for size in sizes])
    prompt_embeds_list = []
    for ids, text_encoder in (
        (batch["input_ids"], family.text_encoder),
        (batch["input_ids_2"], family.text_encoder_2),
    ):
        prompt_embeds = text_encoder(ids, output_hidden_states=True, return_dict=False)
        pooled_prompt_embeds = prompt_embeds[0]
        prompt_embeds_list.append(prompt_embeds[-1][-2])
    prompt_embeds = torch.concat(prompt_embeds_list, dim=-1)
    unet_added_conditions = {"time_ids": add_time_ids, "text_embeds": pooled_prompt_embeds}
    model_pred = family.unet(
        noisy_model_input, timesteps, prompt_embeds, added_cond_kwargs=unet_added_conditions, return_dict=False
    )[0]
    if noise_scheduler.config.prediction_type == "epsilon":
        target = noise
    elif noise_scheduler.config.prediction_type == "v_prediction":
        target = noise_scheduler.get_velocity(model_input, noise, timesteps)
    else:
        target = model_input
    if snr_gamma is None:
        return F.mse_loss(model_pred.float(), target.float(), reduction="mean")
    snr = compute_snr(noise_scheduler, timesteps)
    mse_loss_weights = torch.stack([snr, snr_gamma * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
    if noise_scheduler.config.prediction_type == "epsilon":
        mse_loss_weights = mse_loss_weights / snr
    elif noise_scheduler.config.prediction_type == "v_prediction":
        mse_loss_weights = mse_loss_weights / (snr + 1)
    loss = F.mse_loss(model_pred.float(), target.float(), reduction="none")
    return (loss.mean(dim=list(range(1, len(loss.shape)))) * mse_loss_weights).mean()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(("snr_gamma", "noise_offset"), [(None, 0.0), (5.0, 0.0), (1.0, 0.1)])
def test_loss_is_the_one_of_diffusers_examples(
    bases: dict[str, Path], prediction_type: str, snr_gamma: float | None, noise_offset: float
) -> None:
    family = StableDiffusionXLFamily.from_pretrained(
        bases[prediction_type], snr_gamma=snr_gamma, noise_offset=noise_offset
    )
    batch = {**make_batch(family), **SIZES}
    with torch.no_grad():
        loss = family.loss(batch, seeded(3))
        expected = reference_loss(family, batch, 3, snr_gamma, noise_offset)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_implements_the_protocol(family: StableDiffusionXLFamily) -> None:
    assert isinstance(family, ModelFamily)
    assert list(family.adapted) == ["unet"]
    assert family.default_targets("unet") == ["to_q", "to_k", "to_v", "to_out.0"]
    assert family.default_targets("text_encoder_2") == ["q_proj", "k_proj", "v_proj", "out_proj"]
    assert family.default_targets("text_encoder")[-1] == "layers.1.self_attn.out_proj"  # it has three layers
    with pytest.raises(ValueError, match="no component 'vae'; it has unet and text_encoder and text_encoder_2"):
        family.default_targets("vae")


def test_all_randomness_comes_from_the_generator(family: StableDiffusionXLFamily) -> None:
    family.noise_offset, family.caption_dropout = 0.1, 0.5
    batch = make_batch(family)
    global_state = torch.get_rng_state()
    with torch.no_grad():
        first, again, other = (family.loss(batch, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), global_state)


def test_time_ids_are_the_stock_pipelines(family: StableDiffusionXLFamily, random_sdxl: Path) -> None:
    seen: list[Tensor] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["added_cond_kwargs"]["time_ids"])

    family.unet.register_forward_pre_hook(record, with_kwargs=True)
    stock = load_stock(random_sdxl)
    batch = make_batch(family)
    with torch.no_grad():
        family.loss({**batch, **SIZES}, seeded())
        family.loss(batch, seeded())
        family.loss({**batch, "pixel_values": batch["pixel_values"][:, :, :24]}, seeded())
    rows = zip(*(tuple(map(tuple, SIZES[name].tolist())) for name in SIZES), strict=True)
    given = [stock._get_add_time_ids(*row, dtype=torch.float32, text_encoder_projection_dim=12) for row in rows]
    assert torch.equal(seen[0], torch.cat(given))
    for time_ids, size in ((seen[1], (32, 32)), (seen[2], (24, 32))):
        default = stock._get_add_time_ids(size, (0, 0), size, dtype=torch.float32, text_encoder_projection_dim=12)
        assert torch.equal(time_ids, default.repeat(3, 1))


@pytest.mark.parametrize("name", SIZES)
def test_each_size_changes_the_loss(family: StableDiffusionXLFamily, name: str) -> None:
    batch = make_batch(family)
    with torch.no_grad():
        loss, other = family.loss(batch, seeded()), family.loss({**batch, name: SIZES[name] + 1}, seeded())
    assert not torch.equal(loss, other)


def test_no_caption_is_what_the_pipeline_says(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for force_zeros in (True, False):
        folder = tmp_path / str(force_zeros)
        write_random_sdxl(folder, force_zeros=force_zeros)
        family = StableDiffusionXLFamily.from_pretrained(folder, caption_dropout=1.0)
        assert family.force_zeros_for_empty_prompt == force_zeros
        _, negative, _, negative_pooled = load_stock(folder).encode_prompt("a cat", device="cpu")
        seen: list[dict[str, Any]] = []

        def record(module: nn.Module, args: Any, kwargs: dict[str, Any], seen: list[dict[str, Any]] = seen) -> None:
            seen.append(kwargs)

        family.unet.register_forward_pre_hook(record, with_kwargs=True)
        batch = make_batch(family)
        cached = {"pixel_values": batch["pixel_values"], **family.embed_captions(["a", "b", "c"])}
        with torch.no_grad():
            losses = [family.loss(batch, seeded()), family.loss(cached, seeded())]
        torch.testing.assert_close(losses[0], losses[1])
        for kwargs in seen:
            torch.testing.assert_close(kwargs["encoder_hidden_states"], negative.repeat(3, 1, 1))
            torch.testing.assert_close(kwargs["added_cond_kwargs"]["text_embeds"], negative_pooled.repeat(3, 1))
        assert bool((negative == 0).all()) == force_zeros

    index = json.loads((tmp_path / "False" / "model_index.json").read_text())
    del index["force_zeros_for_empty_prompt"]
    (tmp_path / "False" / "model_index.json").write_text(json.dumps(index))
    assert StableDiffusionXLFamily.from_pretrained(tmp_path / "False").force_zeros_for_empty_prompt


def test_token_masks_of_both_tokenizers(family: StableDiffusionXLFamily) -> None:
    batch = make_batch(family)
    with torch.no_grad():
        family.loss(batch, seeded())
    assert not torch.equal(batch["input_ids"], batch["input_ids_2"])  # they pad with different tokens
    lengths = [len(family.tokenizer(f"cat {i}").input_ids) for i in range(3)]
    for component in ("text_encoder", "text_encoder_2"):
        assert family.step.token_masks[component].sum(dim=1).tolist() == lengths


def test_text_encoders_carry_gradients_only_on_request(random_sdxl: Path) -> None:
    for train_text_encoder in (False, True):
        family = StableDiffusionXLFamily.from_pretrained(random_sdxl, train_text_encoder=train_text_encoder)
        assert not any(p.requires_grad for module in family.modules.values() for p in module.parameters())
        family.unet.conv_out.weight.requires_grad_()
        weights = [encoder.get_input_embeddings().weight for encoder in (family.text_encoder, family.text_encoder_2)]
        weights.append(family.text_encoder_2.text_projection.weight)
        for weight in weights:
            weight.requires_grad_()
        family.loss(make_batch(family), seeded()).backward()
        assert family.unet.conv_out.weight.grad is not None
        for weight in weights:
            assert (weight.grad is not None and bool(weight.grad.any())) == train_text_encoder
        assert len(family.adapted) == (3 if train_text_encoder else 1)


def test_bfloat16_weights_keep_a_float32_loss_and_vae(random_sdxl: Path) -> None:
    family = StableDiffusionXLFamily.from_pretrained(random_sdxl, weight_dtype=torch.bfloat16)
    assert {p.dtype for p in family.vae.parameters()} == {torch.float32}
    assert {module.dtype for name, module in family.modules.items() if name != "vae"} == {torch.bfloat16}
    batch = make_batch(family)
    with torch.no_grad():
        loss = family.loss(batch, seeded())
        reference = StableDiffusionXLFamily.from_pretrained(random_sdxl).loss(batch, seeded())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference, rtol=0.05, atol=0.01)
    assert family.sample(["a cat"], [0], num_inference_steps=1)[0].size == (32, 32)


def test_pipeline_draws_what_the_stock_one_draws(family: StableDiffusionXLFamily, random_sdxl: Path) -> None:
    stock = load_stock(random_sdxl)
    assert isinstance(stock.scheduler, EulerDiscreteScheduler)
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config, clip_sample=False)
    options = {"num_inference_steps": 3, "output_type": "pt"}
    ours = family.pipeline()("a cat", generator=seeded(), **options).images
    theirs = stock("a cat", generator=seeded(), **options).images
    torch.testing.assert_close(ours, theirs)
    assert ours.shape[-1] == family.resolution == 32
    assert family.resolution_multiple == 4


def test_samples_are_close_to_those_of_the_bases_own_scheduler(
    family: StableDiffusionXLFamily, random_sdxl: Path
) -> None:
    """DDIM and Euler discretise one ODE: with many steps they end in the same latents."""
    options = {"num_inference_steps": 100, "output_type": "latent", "guidance_scale": 1.0}
    stock = load_stock(random_sdxl)
    starts = torch.randn(1, 4, 8, 8, generator=seeded())
    ours = family.pipeline()("a cat", latents=starts.clone(), **options).images
    theirs = stock("a cat", latents=starts.clone(), **options).images
    assert F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.99


def test_schedule_is_the_bases(family: StableDiffusionXLFamily, random_sdxl: Path) -> None:
    euler = EulerDiscreteScheduler.from_pretrained(random_sdxl, subfolder="scheduler")
    assert torch.equal(family.noise_scheduler.alphas_cumprod, euler.alphas_cumprod)


def test_check_base(random_sdxl: Path, random_sd: Path, tmp_path: Path) -> None:
    StableDiffusionXLFamily.check_base(str(random_sdxl))
    StableDiffusionXLFamily.check_base("owner/name")
    with pytest.raises(ValueError, match=r"use `family_class\('sd'\)`"):
        StableDiffusionXLFamily.check_base(str(random_sd))
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        StableDiffusionXLFamily.check_base(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"no model_index\.json"):
        StableDiffusionXLFamily.check_base(str(tmp_path))
