"""Stable Diffusion 1.x and 2.x: UNet with cross-attention on CLIP text embeddings, latents of a KL autoencoder.

    family = StableDiffusionFamily.from_pretrained("path/or/hub-name")
    batch = {"pixel_values": images, "input_ids": family.tokenize(captions)}
    family.loss(batch, torch.Generator().manual_seed(0)).backward()

The loss is that of diffusers' text-to-image and DreamBooth examples, for the three prediction types.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from lorainit_diffusers.families.base import StepRecord, UniformDraws

UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass
class StableDiffusionFamily:
    """A Stable Diffusion base and its training loss.

    Attributes:
        tokenizer: CLIP tokenizer; prompts are padded to its `model_max_length`.
        text_encoder: CLIP text model; frozen unless `train_text_encoder`.
        vae: autoencoder, always in float32 and never trained.
        unet: the denoiser, in the weight dtype.
        noise_scheduler: gives `alphas_cumprod`, the number of timesteps and the prediction type.
        train_text_encoder: whether the text encoder gets LoRA too.
        snr_gamma: gamma of min-SNR weighting (Hang et al. 2023, arXiv:2303.09556); None is the plain mean square.
        noise_offset: strength of a per-channel constant added to the noise (0 is off).
        caption_dropout: probability that a sample's caption is replaced by the empty one.
        step: what the latest `loss` drew.
    """

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    noise_scheduler: DDPMScheduler
    train_text_encoder: bool = False
    snr_gamma: float | None = None
    noise_offset: float = 0.0
    caption_dropout: float = 0.0
    step: StepRecord = field(default_factory=StepRecord)

    def __post_init__(self) -> None:
        prediction_type = str(self.noise_scheduler.config["prediction_type"])
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction type {prediction_type!r} is not one of {', '.join(PREDICTION_TYPES)}")
        if self.snr_gamma is not None and self.snr_gamma <= 0:
            raise ValueError(f"snr_gamma must be positive, got {self.snr_gamma}; leave it out for the plain loss")
        if not 0.0 <= self.caption_dropout <= 1.0:
            raise ValueError(f"caption_dropout is a probability, got {self.caption_dropout}")
        channels, latent_channels = self.unet.config["in_channels"], self.vae.config["latent_channels"]
        if channels != latent_channels:
            raise ValueError(
                f"the UNet takes {channels} channels but the VAE makes {latent_channels}: an inpainting or "
                "image-conditioned base is not supported, take a text-to-image one"
            )
        self._uniform = UniformDraws()
        self._empty_ids: Tensor | None = None
        for module in (self.unet, self.text_encoder, self.vae):
            cast(nn.Module, module).requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        variant: str | None = None,
        weight_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        train_text_encoder: bool = False,
        snr_gamma: float | None = None,
        noise_offset: float = 0.0,
        caption_dropout: float = 0.0,
    ) -> StableDiffusionFamily:
        """Load a base from a local folder or a hub name; only safetensors weights are read.

        Args:
            path: folder in the diffusers layout, or the name of a hub repository.
            revision: hub revision.
            variant: weight variant in the file names, such as `fp16`.
            weight_dtype: dtype of the UNet and the text encoder (float32 unless training in mixed precision).
            device: where the modules go.
            train_text_encoder: see the class, as for the remaining arguments.
            snr_gamma: see the class.
            noise_offset: see the class.
            caption_dropout: see the class.

        Raises:
            FileNotFoundError: when there is no such base, or it has no safetensors weights.
            ValueError: when the base is of another family.
        """
        name = os.fspath(path)
        check_base(name)
        options: dict[str, Any] = {"revision": revision, "use_safetensors": True}
        weights: dict[str, Any] = {**options, "variant": variant, "torch_dtype": weight_dtype}
        # transformers has renamed `torch_dtype` to `dtype`; both are understood by the versions supported, so the text
        # encoder is loaded as it is and cast below.
        text_weights: dict[str, Any] = {**options, "variant": variant}
        any_revision: dict[str, Any] = {"revision": revision}
        try:
            noise_scheduler = DDPMScheduler.from_pretrained(name, subfolder="scheduler", revision=revision)
            tokenizer = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer", **any_revision)
            text_encoder = CLIPTextModel.from_pretrained(name, subfolder="text_encoder", **text_weights)
            unet = UNet2DConditionModel.from_pretrained(name, subfolder="unet", **weights)
            vae = AutoencoderKL.from_pretrained(
                name, subfolder="vae", **{**weights, "torch_dtype": torch.float32}
            )  # half-precision VAEs overflow to black images
        except OSError as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise FileNotFoundError(
                f"cannot load the base model {name!r}: {reason} (give a folder in the diffusers layout with "
                "safetensors weights, or a hub name)"
            ) from error
        cast(nn.Module, text_encoder).to(device=device, dtype=weight_dtype)
        cast(nn.Module, unet).to(device)
        cast(nn.Module, vae).to(device)
        return cls(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            unet=unet,
            noise_scheduler=cast(DDPMScheduler, noise_scheduler),
            train_text_encoder=train_text_encoder,
            snr_gamma=snr_gamma,
            noise_offset=noise_offset,
            caption_dropout=caption_dropout,
        )

    @property
    def adapted(self) -> Mapping[str, nn.Module]:
        """The UNet, and the text encoder when it is trained."""
        modules: dict[str, nn.Module] = {"unet": self.unet}
        if self.train_text_encoder:
            modules["text_encoder"] = cast(nn.Module, self.text_encoder)
        return modules

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype of the UNet's frozen weights."""
        return self.unet.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the UNet."""
        return self.unet.conv_in.weight.device

    @property
    def resolution(self) -> int:
        """The image side in pixels that the UNet was trained at."""
        sample_size = self.unet.config["sample_size"]
        side = sample_size if isinstance(sample_size, int) else min(sample_size)
        return side * self.resolution_multiple

    @property
    def resolution_multiple(self) -> int:
        """Pixels per latent: image sides must be a multiple of it."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    def default_targets(self, component: str) -> list[str]:
        """Attention projections: `to_q to_k to_v to_out.0` (UNet), `q_proj k_proj v_proj out_proj` (text encoder).

        Raises:
            ValueError: for a component that this family does not adapt.
        """
        if component == "unet":
            return list(UNET_TARGETS)
        if component == "text_encoder":
            return list(TEXT_ENCODER_TARGETS)
        raise ValueError(f"Stable Diffusion has no component {component!r}; it has unet and text_encoder")

    def stratified_timesteps(self, num_samples: int, generator: torch.Generator) -> AbstractContextManager[None]:
        """Inside it, `loss` draws each of `num_samples` timesteps from its own quantile bin, in random order."""
        return self._uniform.stratified(num_samples, generator)

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Token ids (captions, tokens), padded and cut to the tokenizer's length as the pipeline does."""
        encoded = self.tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        )
        return cast(Tensor, encoded["input_ids"])

    @torch.no_grad()
    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the images' latents, scaled as the UNet sees them.

        Args:
            pixel_values: (batch, 3, height, width) in [-1, 1].

        Returns:
            Two (batch, channels, height / 8, width / 8) float32 tensors on the family's device.
        """
        with torch.autocast(self.device.type, enabled=False):
            posterior = self.vae.encode(pixel_values.to(self.device, torch.float32)).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
        factor = float(self.vae.config["scaling_factor"])
        return posterior.mean * factor, posterior.std * factor

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        """The denoising loss of diffusers' examples: a scalar, float32.

        Args:
            batch: `input_ids` (batch, tokens), and either `pixel_values` (batch, 3, height, width) in [-1, 1] or
                `latents` (batch, channels, height / 8, width / 8), already scaled.
            generator: CPU generator from which the posterior sample, the noise, the timesteps and the caption dropout
                are drawn, in this order.

        Raises:
            ValueError: when the batch lacks one of its parts.
        """
        if "input_ids" not in batch or not ("latents" in batch or "pixel_values" in batch):
            raise ValueError(
                f"a batch needs input_ids and pixel_values or latents, got {', '.join(batch) or 'nothing'}"
            )
        scheduler = self.noise_scheduler
        if "latents" in batch:
            latents = batch["latents"].to(self.device, torch.float32)
        else:
            mean, std = self.encode_images(batch["pixel_values"])
            latents = mean + std * self._randn(mean.shape, generator)
        noise = self._randn(latents.shape, generator)
        if self.noise_offset:
            noise = noise + self.noise_offset * self._randn((*latents.shape[:2], 1, 1), generator)
        num_timesteps = int(scheduler.config["num_train_timesteps"])
        timesteps = (self._uniform.draw(len(latents), generator) * num_timesteps).long().to(self.device)
        noisy_latents = scheduler.add_noise(latents, noise, cast(torch.IntTensor, timesteps))

        input_ids = self._drop_captions(batch["input_ids"], generator).to(self.device)
        self.step = StepRecord(timesteps=timesteps, token_masks={"text_encoder": self.token_mask(input_ids)})

        dtype = self.weight_dtype
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype in (torch.float16, torch.bfloat16)):
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.train_text_encoder):
                prompt_embeds = self.text_encoder(input_ids)[0].to(dtype)
            prediction = self.unet(noisy_latents.to(dtype), timesteps, prompt_embeds, return_dict=False)[0].float()

        prediction_type = scheduler.config["prediction_type"]
        if prediction_type == "epsilon":
            target = noise
        elif prediction_type == "v_prediction":
            target = scheduler.get_velocity(latents, noise, cast(torch.IntTensor, timesteps))
        else:
            target = latents
        squared = F.mse_loss(prediction, target.float(), reduction="none").mean(dim=(1, 2, 3))
        if self.snr_gamma is None:
            return squared.mean()
        return (squared * self._min_snr_weights(timesteps, self.snr_gamma)).mean()

    def token_mask(self, input_ids: Tensor) -> Tensor:
        """Which tokens are not padding: boolean (batch, tokens), True up to and including the first end token.

        CLIP pads with its end token, so the padding cannot be told from the ids alone.
        """
        is_end = torch.eq(input_ids, cast(int, self.tokenizer.eos_token_id))
        return is_end.cumsum(dim=1) - is_end.long() == 0

    def pipeline(self) -> StableDiffusionPipeline:
        """A pipeline around the live modules, for samples.

        Never call `.to(dtype=...)` on it: that would cast the adapters in training. It samples with DDIM on the base's
        own noise schedule and has no safety checker.
        """
        pipeline = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=cast(Any, DDIMScheduler.from_config(self.noise_scheduler.config)),
            safety_checker=cast(Any, None),
            feature_extractor=cast(Any, None),
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        resolution: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 7.5,
    ) -> list[Image.Image]:
        """Draw one image a prompt, each from its own seed, with the weights as they are now.

        Puts no module into evaluation mode: the caller does. The latents are decoded in float32, whatever the dtype of
        the UNet.

        Args:
            prompts: the prompts.
            seeds: one seed for each.
            resolution: side of the images in pixels; the base's own by default.
            num_inference_steps: DDIM steps.
            guidance_scale: classifier-free guidance.
        """
        pipeline = self.pipeline()
        side = resolution or self.resolution
        result = pipeline(
            list(prompts),
            height=side,
            width=side,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
        )
        latents = cast(Tensor, cast(Any, result).images).float() / float(self.vae.config["scaling_factor"])
        decoded = cast(Tensor, self.vae.decode(cast(Any, latents), return_dict=False)[0])
        pixels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(image) for image in pixels]

    def _randn(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return torch.randn(tuple(shape), generator=generator).to(self.device)

    def _drop_captions(self, input_ids: Tensor, generator: torch.Generator) -> Tensor:
        if not self.caption_dropout:
            return input_ids
        if self._empty_ids is None:
            self._empty_ids = self.tokenize([""])
        drop = torch.rand(len(input_ids), generator=generator) < self.caption_dropout
        return torch.where(drop[:, None].to(input_ids.device), self._empty_ids.to(input_ids.device), input_ids)

    def _min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Min-SNR weights: min(snr, gamma) for the clean sample, divided by snr (epsilon) or snr + 1 (v)."""
        alphas_cumprod = self.noise_scheduler.alphas_cumprod.to(self.device)[timesteps].float()
        snr = alphas_cumprod / (1.0 - alphas_cumprod)
        prediction_type = self.noise_scheduler.config["prediction_type"]
        if prediction_type == "epsilon":
            return (gamma / snr).clamp(max=1.0)
        if prediction_type == "v_prediction":
            return snr.clamp(max=gamma) / (snr + 1.0)
        return snr.clamp(max=gamma)


def check_base(name: str) -> None:
    """See that a base given as a local folder exists and is a Stable Diffusion text-to-image pipeline.

    A name that can only be a hub repository is left to the loader.

    Raises:
        FileNotFoundError: when the folder is missing or is not in the diffusers layout.
        ValueError: when it holds another kind of pipeline.
    """
    folder = Path(name)
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1 or "\\" in name:
            raise FileNotFoundError(
                f"base model {name!r} is not a folder; give a folder in the diffusers layout or a hub name (owner/name)"
            )
        return
    index = folder / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(
            f"base model folder {name!r} has no model_index.json; "
            "convert single-file checkpoints to the diffusers layout"
        )
    pipeline_class = str(json.loads(index.read_text(encoding="utf-8")).get("_class_name"))
    if pipeline_class != "StableDiffusionPipeline":
        raise ValueError(
            f"base model {name!r} is a {pipeline_class}; this family takes a StableDiffusionPipeline (1.x or 2.x)"
        )
