"""Wan: a video transformer, UMT5 as text encoder, 3D latents, rectified flow; images are clips of one frame.

    family = WanFamily.from_pretrained("path/or/hub-name", weight_dtype=torch.bfloat16)
    batch = {"pixel_values": images_or_clips, **family.caption_inputs(captions)}
    family.loss(batch, torch.Generator().manual_seed(0)).backward()

A batch holds images, (batch, 3, height, width), or clips, (batch, 3, frames, height, width), of 4 n + 1 frames. The
published bases are sampled with a UniPCMultistepScheduler, whose `flow_shift` shifts the levels of noise in training,
too. Samples are images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, cast

import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from lorainit_diffusers.families.flow_matching import FlowMatchingFamily
from lorainit_diffusers.loading.errors import BrokenModelError

MAX_SEQUENCE_LENGTH = 512
# The pipeline draws images only whose sides are a multiple of it.
SIDE_MULTIPLE = 16


@dataclass
class WanFamily(FlowMatchingFamily):
    """A Wan base for text to video (2.1, or 2.2 with one transformer) and its training loss.

    For the other attributes see `FlowMatchingFamily`. The columns of a batch are `input_ids` and `attention_mask`, or
    `prompt_embeds`; and the images or clips.

    Attributes:
        tokenizer: Of UMT5.
        text_encoder: UMT5; never trained.
        vae: Autoencoder of videos, never trained.
        transformer: The denoiser.
        noise_scheduler: The table of noise levels, with the base's shift.
        expand_timesteps: Whether the base takes a timestep for each token (2.2 TI2V).
        max_sequence_length: Tokens of UMT5; None is 512, as in the pipeline.
    """

    tokenizer: PreTrainedTokenizerBase
    text_encoder: UMT5EncoderModel
    vae: AutoencoderKLWan  # pyright: ignore[reportIncompatibleVariableOverride]
    transformer: WanTransformer3DModel
    noise_scheduler: FlowMatchEulerDiscreteScheduler
    _: KW_ONLY
    expand_timesteps: bool = False

    NAME: ClassVar[str] = "Wan"
    PIPELINES: ClassVar[tuple[type[DiffusionPipeline], ...]] = (WanPipeline,)
    DENOISER: ClassVar[str] = "transformer"
    DENOISER_CLASS: ClassVar[type[nn.Module]] = WanTransformer3DModel
    TARGETS: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    VAE_CLASS: ClassVar[Any] = AutoencoderKLWan
    TEXT_ENCODERS: ClassVar[Mapping[str, type[nn.Module]]] = {"text_encoder": UMT5EncoderModel}
    MASKED_ENCODERS: ClassVar[frozenset[str]] = frozenset({"text_encoder"})
    EMBEDS: ClassVar[tuple[str, ...]] = ("prompt_embeds",)
    WEIGHTING_SCHEME: ClassVar[str] = "none"
    SAMPLERS: ClassVar[tuple[str, ...]] = ("UniPCMultistepScheduler",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_channels(int(self.transformer.config["in_channels"]))
        if self.max_sequence_length is None:
            self.max_sequence_length = MAX_SEQUENCE_LENGTH

    @classmethod
    def check_index_entries(cls, name: str, index: Mapping[str, Any]) -> None:
        """Refuse a base with a second transformer, for the lower levels of noise (Wan 2.2 A14B)."""
        second = index.get("transformer_2")
        if second is not None and list(second) != [None, None]:
            raise BrokenModelError(
                f"base model {name!r} has two transformers, of which each denoises at other levels of noise; take a "
                "base with one, such as Wan 2.1 or Wan 2.2 TI2V"
            )

    @classmethod
    def _from_index(cls, index: Mapping[str, Any]) -> dict[str, Any]:
        return {**super()._from_index(index), "expand_timesteps": bool(index.get("expand_timesteps", False))}

    @property
    def _first_weight(self) -> Tensor:
        # the first of all is a table that diffusers keeps in float32 whatever the others are in
        return self.transformer.patch_embedding.weight

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent."""
        return int(cast(Any, self.vae.config)["scale_factor_spatial"])

    @property
    def resolution(self) -> int:
        """480 pixels, the smaller side of what the pipeline draws: the transformer's configuration names no size."""
        return 480

    @property
    def resolution_multiple(self) -> int:
        """Image sides must be a multiple of it: pixels per latent, times latents per patch."""
        return math.lcm(self.vae_scale_factor * int(self.transformer.config["patch_size"][-1]), SIDE_MULTIPLE)

    def pipeline(self) -> WanPipeline:
        """A pipeline around the live modules, for samples, with the base's own scheduler.

        Never call `.to(dtype=...)` on it: that would cast the adapters in training.
        """
        pipeline = WanPipeline(
            tokenizer=cast(Any, self.tokenizer),
            text_encoder=self.text_encoder,
            vae=self.vae,
            scheduler=self._sampling_scheduler(),
            transformer=self.transformer,
            expand_timesteps=self.expand_timesteps,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    # ---- captions

    def _tokenized_texts(self, captions: Sequence[str]) -> list[str]:
        return [prompt_clean(caption) for caption in captions]

    def _max_tokens(self, component: str) -> int:
        return int(self.max_sequence_length or 0)

    def _encode(self, columns: Mapping[str, Tensor], unskipped: Tensor | None) -> dict[str, Tensor]:
        mask = columns["attention_mask"]
        hidden = cast(Any, self.text_encoder)(columns["input_ids"], mask).last_hidden_state
        # the transformer attends to the padding, too: zeros, as it learnt it
        return {"prompt_embeds": hidden * mask[..., None].to(hidden.dtype)}

    # ---- latents: clips

    @property
    def _latent_channels(self) -> int:
        return int(cast(Any, self.vae.config)["z_dim"])

    def _posterior(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        return super()._posterior(pixel_values if pixel_values.ndim == 5 else pixel_values.unsqueeze(2))

    @property
    def _latent_shift_and_scale(self) -> tuple[float | Tensor, float | Tensor]:
        config = cast(Any, self.vae.config)
        mean, std = (
            torch.tensor(config[name], device=self.device).view(1, -1, 1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        return mean, 1 / std

    def _decoded(self, latents: Tensor) -> Tensor:
        return super()._decoded(latents)[:, :, 0]

    # ---- the denoiser

    def _predict(
        self, latents: Tensor, timesteps: Tensor, embeds: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> Tensor:
        if self.expand_timesteps:
            patch = self.transformer.config["patch_size"]
            sides = zip(latents.shape[-3:], patch, strict=True)
            num_tokens = math.prod(length // int(size) for length, size in sides)
            timesteps = timesteps[:, None].expand(-1, num_tokens)
        return self.transformer(
            hidden_states=latents,
            timestep=cast(Any, timesteps),
            encoder_hidden_states=embeds["prompt_embeds"],
            return_dict=False,
        )[0]

    def _sampling_inputs(
        self, embeds: Mapping[str, Tensor], no_caption: Mapping[str, Tensor], guidance_scale: float
    ) -> dict[str, Any]:
        return {**super()._sampling_inputs(embeds, no_caption, guidance_scale), "num_frames": 1}
