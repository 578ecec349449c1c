"""FLUX.1 dev, schnell and Kontext: double-stream and single-stream blocks, CLIP and T5, rectified flow.

    family = FluxFamily.from_pretrained("path/or/hub-name", weight_dtype=torch.bfloat16)
    batch = {"pixel_values": images, **family.caption_inputs(captions)}
    family.loss(batch, torch.Generator().manual_seed(0)).backward()

The loss is that of diffusers' Flux examples; see `families/flow_matching.py`. The guidance is distilled. Kontext sees
an image beside the noise, which a batch holds as `conditioning_images`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, cast

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerBase, T5EncoderModel

from lorainit_diffusers.families.flow_matching import FlowMatchingFamily

# Latents per side of the patches that a token is made of; the transformer's configuration does not say it.
PATCH_SIZE = 2
MAX_SEQUENCE_LENGTH = 512


@dataclass
class FluxFamily(FlowMatchingFamily):
    """A FLUX.1 base (dev, schnell or Kontext) and its training loss; for the other attributes see `FlowMatchingFamily`.

    The columns of a batch are `input_ids` and `input_ids_2`, or `prompt_embeds` and `pooled_prompt_embeds`; and the
    images.

    Attributes:
        tokenizer: Of the CLIP encoder.
        tokenizer_2: Of T5.
        text_encoder: CLIP encoder, of which the pooled output is used.
        text_encoder_2: T5; never trained.
        vae: Autoencoder, never trained.
        transformer: The denoiser.
        noise_scheduler: The table of noise levels; where the base shifts them by the image's size (dev), training takes
            them unshifted, as diffusers' examples do.
        kontext: Whether the base is a Kontext; samples are drawn without an image beside the noise.
        guidance_scale: The guidance that a distilled base (dev) takes as an input while it is trained.
        max_sequence_length: Tokens of T5; None is 512, as in the pipeline.
    """

    tokenizer: CLIPTokenizer
    tokenizer_2: PreTrainedTokenizerBase
    text_encoder: CLIPTextModel
    text_encoder_2: T5EncoderModel
    vae: AutoencoderKL
    transformer: FluxTransformer2DModel
    noise_scheduler: FlowMatchEulerDiscreteScheduler
    _: KW_ONLY
    guidance_scale: float = 3.5
    kontext: bool = False

    NAME: ClassVar[str] = "Flux"
    PIPELINES: ClassVar[tuple[type[DiffusionPipeline], ...]] = (FluxPipeline, FluxKontextPipeline)
    DENOISER: ClassVar[str] = "transformer"
    DENOISER_CLASS: ClassVar[type[nn.Module]] = FluxTransformer2DModel
    TARGETS: ClassVar[tuple[str, ...]] = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    TEXT_ENCODERS: ClassVar[Mapping[str, type[nn.Module]]] = {
        "text_encoder": CLIPTextModel,
        "text_encoder_2": T5EncoderModel,
    }
    EMBEDS: ClassVar[tuple[str, ...]] = ("prompt_embeds", "pooled_prompt_embeds")
    OPTIONS: ClassVar[tuple[str, ...]] = (*FlowMatchingFamily.OPTIONS, "guidance_scale")
    WEIGHTING_SCHEME: ClassVar[str] = "none"
    CONDITIONED: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_channels(int(self.transformer.config["in_channels"]) // PATCH_SIZE**2)
        if self.max_sequence_length is None:
            self.max_sequence_length = MAX_SEQUENCE_LENGTH

    @classmethod
    def _from_index(cls, index: Mapping[str, Any]) -> dict[str, Any]:
        return {**super()._from_index(index), "kontext": index["_class_name"] == FluxKontextPipeline.__name__}

    def example_prompt(self, prompt: str | None) -> str:
        """Source code of the pipeline's prompt, for model cards: the first argument of Kontext's is an image."""
        return "prompt=" * self.kontext + super().example_prompt(prompt)

    @property
    def resolution(self) -> int:
        """1024 pixels: the transformer's configuration names no size."""
        return 1024

    @property
    def resolution_multiple(self) -> int:
        """Image sides must be a multiple of it: pixels per latent, times latents per patch."""
        return self.vae_scale_factor * PATCH_SIZE

    def pipeline(self) -> FluxPipeline | FluxKontextPipeline:
        """A pipeline around the live modules, for samples, with the base's own flow-matching scheduler.

        Never call `.to(dtype=...)` on it: that would cast the adapters in training.
        """
        kind: Any = FluxKontextPipeline if self.kontext else FluxPipeline
        pipeline = kind(
            scheduler=self._sampling_scheduler(),
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            text_encoder_2=self.text_encoder_2,
            tokenizer_2=self.tokenizer_2,
            transformer=self.transformer,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _max_tokens(self, component: str) -> int:
        return int(self.max_sequence_length or 0) if component == "text_encoder_2" else super()._max_tokens(component)

    def _encode(self, columns: Mapping[str, Tensor], unskipped: Tensor | None) -> dict[str, Tensor]:
        return {
            "prompt_embeds": cast(Any, self.text_encoder_2)(columns["input_ids_2"])[0],
            "pooled_prompt_embeds": cast(Any, self.text_encoder)(columns["input_ids"]).pooler_output,
        }

    def _predict(
        self, latents: Tensor, timesteps: Tensor, embeds: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> Tensor:
        pipeline: Any = FluxPipeline
        count, channels, height, width = latents.shape
        prompt_embeds = embeds["prompt_embeds"]
        image_ids = pipeline._prepare_latent_image_ids(
            count, height // PATCH_SIZE, width // PATCH_SIZE, latents.device, latents.dtype
        )
        tokens = pipeline._pack_latents(latents, count, channels, height, width)
        num_tokens = tokens.shape[1]
        if "conditioning_latents" in batch:
            image = batch["conditioning_latents"]
            rows, columns = image.shape[-2:]
            ids = pipeline._prepare_latent_image_ids(
                count, rows // PATCH_SIZE, columns // PATCH_SIZE, latents.device, latents.dtype
            )
            ids[..., 0] = 1  # another image
            tokens = torch.cat([tokens, pipeline._pack_latents(image, count, channels, rows, columns)], dim=1)
            image_ids = torch.cat([image_ids, ids])
        text_ids = prompt_embeds.new_zeros(prompt_embeds.shape[1], 3)
        guidance = None
        if self.transformer.config["guidance_embeds"]:
            guidance = torch.full((count,), self.guidance_scale, device=latents.device)
        prediction = self.transformer(
            hidden_states=tokens,
            encoder_hidden_states=prompt_embeds,
            pooled_projections=embeds["pooled_prompt_embeds"],
            timestep=timesteps / 1000,
            guidance=guidance,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        prediction = prediction[:, :num_tokens]
        return self._sampled_latents(prediction, height * self.vae_scale_factor, width * self.vae_scale_factor)

    def _size_inputs(self, side: int) -> dict[str, int]:
        size = super()._size_inputs(side)
        return {**size, "max_area": side * side} if self.kontext else size  # it would scale them to a megapixel

    def _sampling_inputs(
        self, embeds: Mapping[str, Tensor], no_caption: Mapping[str, Tensor], guidance_scale: float
    ) -> dict[str, Any]:
        return {**embeds, "guidance_scale": guidance_scale}  # distilled: there is no second pass without the caption

    def _sampled_latents(self, output: Tensor, height: int, width: int) -> Tensor:
        return cast(Any, FluxPipeline)._unpack_latents(output, height, width, self.vae_scale_factor)
