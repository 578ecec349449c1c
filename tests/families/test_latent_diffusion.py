"""What holds for every family of `LatentDiffusionFamily`, on Stable Diffusion and Stable Diffusion XL."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
from diffusers.training_utils import compute_snr
from sd_fixtures import write_random_sd, write_random_sdxl, write_random_vae
from torch import Tensor, nn

from lorainit_diffusers.families.latent_diffusion import LatentDiffusionFamily
from lorainit_diffusers.families.sd import StableDiffusionFamily
from lorainit_diffusers.families.sdxl import StableDiffusionXLFamily
from lorainit_diffusers.initialize import initialize

FAMILIES: dict[str, type[LatentDiffusionFamily]] = {"sd": StableDiffusionFamily, "sdxl": StableDiffusionXLFamily}


@pytest.fixture(params=FAMILIES)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def base(kind: str, random_sd: Path, random_sdxl: Path) -> Path:
    return {"sd": random_sd, "sdxl": random_sdxl}[kind]


def load(base: Path, **options: Any) -> LatentDiffusionFamily:
    index = json.loads((base / "model_index.json").read_text())
    kind = "sdxl" if index["_class_name"] == "StableDiffusionXLPipeline" else "sd"
    return FAMILIES[kind].from_pretrained(base, **options)


def load_stock(base: Path, **options: Any) -> Any:
    if "StableDiffusionPipeline" in (base / "model_index.json").read_text():
        options["safety_checker"] = None
    stock = DiffusionPipeline.from_pretrained(base, **options)
    stock.set_progress_bar_config(disable=True)
    if not hasattr(stock.text_encoder, "text_model"):  # its `clip_skip` asks for what transformers 5 has taken out
        object.__setattr__(stock.text_encoder, "text_model", stock.text_encoder)
    return stock


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_batch(family: LatentDiffusionFamily, captions: list[str] | None = None) -> dict[str, Tensor]:
    captions = captions or ["cat 0", "a dog", "one house"]
    pixel_values = torch.rand(len(captions), 3, 32, 32, generator=seeded(7)) * 2 - 1
    return {"pixel_values": pixel_values, **family.caption_inputs(captions)}


def observed_conditions(family: LatentDiffusionFamily, batch: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """What the UNet of one `loss` is conditioned on."""
    seen: dict[str, Tensor] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["prompt_embeds"] = kwargs["encoder_hidden_states"]
        seen.update(kwargs.get("added_cond_kwargs", {}))

    handle = family.unet.register_forward_pre_hook(record, with_kwargs=True)
    try:
        with torch.no_grad():
            family.loss(batch, seeded(seed))
    finally:
        handle.remove()
    return seen


def stock_embeds(stock: Any, prompt: list[str], clip_skip: int | None) -> dict[str, Tensor]:
    """The stock pipeline's embeddings, with `negative_` ones for no caption."""
    encoded = stock.encode_prompt(
        prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, clip_skip=clip_skip
    )
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    return dict(zip(names, encoded, strict=False))


# ---- captions


@pytest.mark.parametrize("clip_skip", [None, 0, 1])
def test_conditioning_is_the_stock_pipelines(base: Path, clip_skip: int | None) -> None:
    captions = ["cat 0", "a dog"]
    expected = stock_embeds(load_stock(base), captions, clip_skip)
    family = load(base, clip_skip=clip_skip)
    batch = make_batch(family, captions)
    seen = observed_conditions(family, batch)
    torch.testing.assert_close(seen["prompt_embeds"], expected["prompt_embeds"])
    if "text_embeds" in seen:
        torch.testing.assert_close(seen["text_embeds"], expected["pooled_prompt_embeds"])
    cached = family.embed_captions(captions, batch_size=1)
    assert list(cached) == [name for name in expected if not name.startswith("negative")]
    for name, values in cached.items():
        torch.testing.assert_close(values, expected[name])
    if clip_skip == 1:  # the option changes something
        assert not torch.allclose(observed_conditions(load(base), batch)["prompt_embeds"], seen["prompt_embeds"])


@pytest.mark.parametrize("clip_skip", [None, 1])
@pytest.mark.parametrize("cached", [False, True])
def test_caption_dropout_gives_what_the_pipeline_takes_for_no_caption(
    base: Path, clip_skip: int | None, cached: bool
) -> None:
    captions = ["cat 0", "a dog", "one house", "x", "y"]
    expected = stock_embeds(load_stock(base), captions, clip_skip)
    family = load(base, clip_skip=clip_skip, caption_dropout=0.5)
    batch = make_batch(family, captions)
    if cached:
        batch = {"pixel_values": batch["pixel_values"], **family.embed_captions(captions)}
    seen = observed_conditions(family, batch, seed=4)
    generator = seeded(4)
    for _ in range(2):
        torch.randn(5, 4, 8, 8, generator=generator)
    torch.rand(5, generator=generator, dtype=torch.float64)
    dropped = torch.rand(5, generator=generator) < 0.5
    assert 0 < dropped.sum() < 5
    for row, no_caption in enumerate(dropped.tolist()):
        prefix = "negative_" if no_caption else ""
        torch.testing.assert_close(seen["prompt_embeds"][row], expected[f"{prefix}prompt_embeds"][row])
        if "text_embeds" in seen:
            torch.testing.assert_close(seen["text_embeds"][row], expected[f"{prefix}pooled_prompt_embeds"][row])


@pytest.mark.parametrize("rate", [0.0, 0.15, 0.5, 1.0])
def test_captions_are_dropped_at_their_rate(random_sd: Path, rate: float) -> None:
    family = StableDiffusionFamily.from_pretrained(random_sd, caption_dropout=rate)
    seen: list[Tensor] = []
    family.text_encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    count = 800
    batch = {"latents": torch.zeros(count, 4, 2, 2), "input_ids": family.tokenize(["a cat"]).expand(count, -1)}
    with torch.no_grad():
        family.loss(batch, torch.Generator().manual_seed(0))
    dropped = (seen[0] == family.tokenize([""])).all(dim=1).float().mean()
    assert float(dropped) == pytest.approx(rate, abs=4 * (rate * (1 - rate) / count) ** 0.5)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_captions_encoded_once_give_the_same_loss(base: Path, weight_dtype: torch.dtype) -> None:
    family = load(base, weight_dtype=weight_dtype)
    captions = ["cat 0", "a dog", "one house"]
    batch = make_batch(family, captions)
    cached = family.embed_captions(captions)
    assert {values.dtype for values in cached.values()} == {weight_dtype}
    with torch.no_grad():
        expected = family.loss(batch, seeded())
        assert set(family.step.token_masks) == set(family.text_encoders)
        loss = family.loss({"pixel_values": batch["pixel_values"], **cached}, seeded())
    assert family.step.token_masks == {}
    torch.testing.assert_close(loss, expected)


def test_trained_text_encoders_cannot_be_encoded_once(base: Path) -> None:
    with pytest.raises(ValueError, match="captions cannot be encoded once"):
        load(base, train_text_encoder=True).embed_captions(["a"])


# ---- the loss


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_prior_preservation_is_dreambooths(base: Path, snr_gamma: float | None) -> None:
    """diffusers' train_dreambooth_lora(_sdxl).py: instance and class halves of one batch, each with its own mean."""
    family = load(base, snr_gamma=snr_gamma, prior_loss_weight=0.7)
    batch = make_batch(family, ["sks", "sks", "sks", "cat", "cat", "cat"])
    seen: dict[str, Tensor] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen["model_pred"] = output[0]

    handle = family.unet.register_forward_hook(record, with_kwargs=True)
    is_class = torch.tensor([False] * 3 + [True] * 3)
    with torch.no_grad():
        loss = family.loss({**batch, "is_class": is_class}, seeded())
    handle.remove()
    generator = seeded()
    torch.randn(6, 4, 8, 8, generator=generator)
    target = torch.randn(6, 4, 8, 8, generator=generator)
    losses: list[Tensor] = []
    assert family.step.timesteps is not None
    chunks = (tensor.chunk(2) for tensor in (seen["model_pred"], target, family.step.timesteps))
    for model_pred, noise, timesteps in zip(*chunks, strict=True):
        if snr_gamma is None:
            losses.append(F.mse_loss(model_pred, noise, reduction="mean"))
        else:
            snr = compute_snr(family.noise_scheduler, timesteps)
            weights = torch.stack([snr, snr_gamma * torch.ones_like(timesteps)], dim=1).min(dim=1)[0] / snr
            losses.append((F.mse_loss(model_pred, noise, reduction="none").mean(dim=(1, 2, 3)) * weights).mean())
    torch.testing.assert_close(loss, losses[0] + 0.7 * losses[1])

    # a batch that is split otherwise, or has one kind only
    with torch.no_grad():
        plain = family.loss(batch, seeded())
        mixed = family.loss({**batch, "is_class": torch.tensor([True] + 5 * [False])}, seeded())
        no_class = family.loss({**batch, "is_class": torch.zeros(6, dtype=torch.bool)}, seeded())
        only_class = family.loss({**batch, "is_class": torch.ones(6, dtype=torch.bool)}, seeded())
    assert torch.isfinite(mixed)
    assert not torch.isclose(mixed, loss)
    torch.testing.assert_close(no_class, plain)
    torch.testing.assert_close(only_class, 0.7 * plain)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_prediction_type_can_be_overridden(kind: str, base: Path, tmp_path: Path, prediction_type: str) -> None:
    torch.manual_seed(0)
    write = {"sd": write_random_sd, "sdxl": write_random_sdxl}[kind]
    write(tmp_path / "other", prediction_type)
    overridden, expected, plain = load(base, prediction_type=prediction_type), load(tmp_path / "other"), load(base)
    batch = make_batch(plain)
    with torch.no_grad():
        losses = [family.loss(batch, seeded()) for family in (overridden, expected, plain)]
    torch.testing.assert_close(losses[0], losses[1])
    assert not torch.isclose(losses[0], losses[2])
    assert overridden.pipeline().scheduler.config["prediction_type"] == prediction_type
    with pytest.raises(ValueError, match="prediction type 'noise' is not one of"):
        load(base, prediction_type="noise")


def test_batch_without_its_parts(base: Path) -> None:
    family = load(base)
    batch = make_batch(family)
    with pytest.raises(ValueError, match=r"a batch needs input_ids.* or prompt_embeds.*, and pixel_values or latents"):
        family.loss({"pixel_values": batch["pixel_values"]}, seeded())
    del batch["pixel_values"]
    with pytest.raises(ValueError, match="got input_ids"):
        family.loss(batch, seeded())


# ---- modules


def test_modules_of_a_users_own_script_are_taken_as_they_are(base: Path) -> None:
    loaded = load(base)
    parts = {name: getattr(loaded, name) for name in ("tokenizer", "text_encoder", "vae", "unet", "noise_scheduler")}
    more = [getattr(loaded, name) for name in ("tokenizer_2", "text_encoder_2") if hasattr(loaded, name)]
    loaded.unet.conv_out.weight.requires_grad_()
    loaded.unet.train()
    family = type(loaded)(*parts.values(), *more)
    assert family.unet.training
    assert family.unet.conv_out.weight.requires_grad
    batch = make_batch(family)
    family.loss(batch, seeded()).backward()
    assert family.unet.conv_out.weight.grad is not None

    family.unet.eval()
    with torch.no_grad():
        expected = family.loss(batch, seeded())
        family.vae.to(torch.float16)
        loss = family.loss(batch, seeded())
    assert family.encode_images(batch["pixel_values"])[0].dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.01, atol=0.01)
    assert family.sample(["a"], [0], num_inference_steps=1)[0].size == (32, 32)


def test_another_vae(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    write_random_vae(tmp_path / "vae")
    family = load(base, vae_path=tmp_path / "vae", variant=None, weight_dtype=torch.bfloat16)
    other = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert family.vae.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in family.vae.parameters())
    pixel_values = make_batch(family)["pixel_values"]
    with torch.no_grad():
        expected = other.encode(pixel_values).latent_dist.mean * other.config.scaling_factor
    torch.testing.assert_close(family.encode_images(pixel_values)[0], expected)
    assert not torch.allclose(load(base).encode_images(pixel_values)[0], expected)
    with pytest.raises(FileNotFoundError, match=r"cannot load the VAE '.*nowhere'"):
        load(base, vae_path=tmp_path / "nowhere")
    write_random_vae(tmp_path / "wide", latent_channels=8)
    with pytest.raises(ValueError, match="the unet takes 4 channels but the VAE makes 8"):
        load(base, vae_path=tmp_path / "wide")


def test_default_targets_get_gradients_and_start(base: Path) -> None:
    """LoRA-GA needs a gradient in every layer that it adapts: no layer that the UNet never hears of is among them."""
    for clip_skip in (None, 1):
        family = load(base, train_text_encoder=True, clip_skip=clip_skip)
        assert list(family.adapted) == ["unet", *family.text_encoders]
        report = initialize(family, "lora_ga", [make_batch(family)], rank=2, num_batches=1)
        assert report.to_json()["num_passes"] == 1
        for component in family.text_encoders:
            layers = {name for name, _ in family.adapted[component].named_modules() if name.endswith("lora_A.default")}
            used = family._num_layers(component) - family._layers_left_out(component)
            assert len(layers) == 4 * used


@pytest.mark.parametrize("clip_skip", [-1, 5])
def test_clip_skip_out_of_range(base: Path, clip_skip: int) -> None:
    with pytest.raises(ValueError, match=f"clip_skip {clip_skip} is not between 0 and 1 for the text_encoder"):
        load(base, clip_skip=clip_skip)


def test_negative_prior_loss_weight(base: Path) -> None:
    with pytest.raises(ValueError, match="prior_loss_weight must not be negative, got -1"):
        load(base, prior_loss_weight=-1.0)


# ---- samples


@pytest.mark.parametrize("clip_skip", [None, 1])
def test_samples_are_the_stock_pipelines(base: Path, clip_skip: int | None) -> None:
    stock = load_stock(base)
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config, clip_sample=False)
    options = {"num_inference_steps": 3, "guidance_scale": 4.0}
    prompts, seeds = ["a cat", "two"], [3, 4]
    theirs = stock(prompts, generator=[seeded(seed) for seed in seeds], clip_skip=clip_skip, **options).images
    ours = load(base, clip_skip=clip_skip).sample(prompts, seeds, **options)
    for our, their in zip(ours, theirs, strict=True):
        assert our.size == (32, 32)
        assert np.abs(np.asarray(our, dtype=int) - np.asarray(their, dtype=int)).max() <= 1
    assert load(base).sample(["a"], [0], resolution=48, num_inference_steps=1)[0].size == (48, 48)


# ---- offload


def test_offload_moves_modules_only_while_they_are_used(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = load(base)
    batch = make_batch(plain)
    family = load(base, offload=True)
    moves: list[tuple[str, str]] = []
    names = {id(family.vae): "vae", **{id(encoder): name for name, encoder in family.text_encoders.items()}}

    def watch(cls: type[nn.Module]) -> None:
        original = cls.to

        def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
            if id(self) in names:
                moves.append((names[id(self)], "away" if args[0] == "cpu" else "in"))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(cls, "to", to)

    for cls in {type(family.vae), *(type(encoder) for encoder in family.text_encoders.values())}:
        watch(cls)
    encoders = list(family.text_encoders)
    text = [*((name, "in") for name in encoders), *((name, "away") for name in encoders)]
    vae = [("vae", "in"), ("vae", "away")]

    with torch.no_grad():
        assert torch.equal(family.loss(batch, seeded()), plain.loss(batch, seeded()))
    assert moves == vae + text
    moves.clear()
    cached = family.embed_captions(["a", "b", "c"])
    assert moves == text
    moves.clear()
    latents = family.encode_images(batch["pixel_values"])[0]
    assert moves == vae
    moves.clear()
    with torch.no_grad():
        family.loss({"latents": latents, **cached}, seeded())
    assert moves == []
    ours, theirs = (f.sample(["a"], [0], num_inference_steps=2)[0] for f in (family, plain))
    assert moves == text + vae
    assert ours.tobytes() == theirs.tobytes()

    moves.clear()
    with pytest.raises(ValueError, match="stop"), family._on_device(family.vae):
        raise ValueError("stop")
    assert moves == vae

    family = load(base, offload=True, train_text_encoder=True)
    names.clear()
    names.update({id(family.vae): "vae", **{id(encoder): name for name, encoder in family.text_encoders.items()}})
    moves.clear()
    family.loss(batch, seeded())
    assert moves == vae  # trained encoders stay


# ---- bases


def test_bases_of_other_kinds(random_sd: Path, random_sdxl: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a StableDiffusionXLPipeline.*use `family_class\('sdxl'\)` for it"):
        StableDiffusionFamily.from_pretrained(random_sdxl)
    with pytest.raises(ValueError, match=r"is a StableDiffusionPipeline, .*use `family_class\('sd'\)` for it"):
        StableDiffusionXLFamily.from_pretrained(random_sd)
    index = {"_class_name": "StableDiffusionXLInpaintPipeline"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"is a StableDiffusionXLInpaintPipeline.* takes a StableDiffusionXLPipeline"):
        StableDiffusionXLFamily.from_pretrained(tmp_path)


def test_bases_with_another_kind_of_noise(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EDMDPMSolverMultistepScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="samples with EDMDPMSolverMultistepScheduler"):
        load(folder)


def test_base_without_a_part(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(FileNotFoundError, match="cannot load the base model"):
        load(folder)
