"""What the Stable Diffusion 1/2/XL families share: a UNet under CLIP text embeddings.

A family adds which text encoders it has, how they make the conditioning, and its pipeline: see `families/sd.py` and
`families/sdxl.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from lorainit_diffusers.families.captions import replace
from lorainit_diffusers.families.ddpm import DenoisingFamily

UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass
class LatentDiffusionFamily(DenoisingFamily):
    """A base with a UNet and its training loss; for the other attributes see `DenoisingFamily`, `TextToImageFamily`.

    Attributes:
        tokenizer: CLIP tokenizer; prompts are padded to its `model_max_length`.
        text_encoder: CLIP text model.
        vae: Autoencoder, used in its own dtype and never trained.
        unet: The denoiser.
        noise_scheduler: Gives `alphas_cumprod`, the number of timesteps and the prediction type.
        clip_skip: Last text encoder layers to leave out, as the pipelines count them; None is their default.
        force_zeros_for_empty_prompt: Whether the pipeline takes zeros for no caption instead of the encoded empty one.
    """

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    noise_scheduler: DDPMScheduler
    _: KW_ONLY
    clip_skip: int | None = None
    force_zeros_for_empty_prompt: bool = False

    DENOISER: ClassVar[str] = "unet"
    DENOISER_CLASS: ClassVar[type[nn.Module]] = UNet2DConditionModel
    TARGETS: ClassVar[tuple[str, ...]] = UNET_TARGETS
    OPTIONS: ClassVar[tuple[str, ...]] = (*DenoisingFamily.OPTIONS, "clip_skip")
    EXPORTS: ClassVar[tuple[str, ...]] = ("diffusers", "kohya")
    # Which hidden state of a text encoder conditions the UNet when no `clip_skip` moves it further to the front.
    HIDDEN_STATE: ClassVar[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_channels(int(self.unet.config["in_channels"]))
        self._check_clip_skip(self.clip_skip, self.HIDDEN_STATE)

    def _layers_left_out(self, component: str) -> int:
        return -1 - self.HIDDEN_STATE + (self.clip_skip or 0)

    def _unet_inputs(
        self, batch: Mapping[str, Tensor], latents: Tensor, embeds: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """The UNet's keyword arguments for this conditioning."""
        return {"encoder_hidden_states": embeds["prompt_embeds"]}

    def _predict(
        self, latents: Tensor, timesteps: Tensor, embeds: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> Tensor:
        inputs = self._unet_inputs(batch, latents, embeds)
        return self.unet(latents, timesteps, return_dict=False, **inputs)[0]

    # ---- captions

    def _drop_captions(self, columns: Mapping[str, Tensor], dropped: Tensor) -> dict[str, Tensor]:
        return dict(columns) if self.force_zeros_for_empty_prompt else super()._drop_captions(columns, dropped)

    def _encode_batch(self, batch: Mapping[str, Tensor], dropped: Tensor | None) -> dict[str, Tensor]:
        embeds = super()._encode_batch(batch, dropped)
        if dropped is None or not self.force_zeros_for_empty_prompt:
            return embeds
        return replace(embeds, dropped, {name: torch.zeros_like(values[:1]) for name, values in embeds.items()})

    def _encode_no_caption(self, count: int) -> dict[str, Tensor]:
        embeds = super()._encode_no_caption(count)
        if self.force_zeros_for_empty_prompt:
            return {name: torch.zeros_like(values) for name, values in embeds.items()}
        return embeds
