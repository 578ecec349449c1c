"""Stable Diffusion XL: two CLIP text encoders, a pooled embedding, and the image's size and crop as conditioning.

    family = StableDiffusionXLFamily.from_pretrained("path/or/hub-name")
    batch = {"pixel_values": images, **family.caption_inputs(captions)}
    family.loss(batch, torch.Generator().manual_seed(0)).backward()

The loss is that of diffusers' SDXL text-to-image and DreamBooth examples (Podell et al. 2023, arXiv:2307.01952); see
`families/latent_diffusion.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lorainit_diffusers.families.captions import hidden_state
from lorainit_diffusers.families.latent_diffusion import LatentDiffusionFamily


@dataclass
class StableDiffusionXLFamily(LatentDiffusionFamily):
    """A Stable Diffusion XL base and its training loss; for the other attributes see `LatentDiffusionFamily`.

    The columns of a batch are `input_ids` and `input_ids_2`, or `prompt_embeds` and `pooled_prompt_embeds`; the images;
    and optionally what the images were before they were cut, each (batch, 2) in pixels: `original_sizes` (height,
    width), `crop_top_lefts` (top, left) and `target_sizes` (height, width). Without them the images count as whole ones
    of the size that they have.

    Attributes:
        tokenizer_2: Tokenizer of the second text encoder.
        text_encoder_2: CLIP text model whose projection gives the pooled embedding.
        force_zeros_for_empty_prompt: Whether the pipeline takes zeros for no caption instead of the encoded empty one
            (from `model_index.json`; the default of the pipeline is true).
    """

    tokenizer_2: CLIPTokenizer
    text_encoder_2: CLIPTextModelWithProjection
    force_zeros_for_empty_prompt: bool = field(default=True, kw_only=True)

    NAME: ClassVar[str] = "Stable Diffusion XL"
    PIPELINES: ClassVar[tuple[type[DiffusionPipeline], ...]] = (StableDiffusionXLPipeline,)
    TEXT_ENCODERS: ClassVar[Mapping[str, type[nn.Module]]] = {
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    HIDDEN_STATE: ClassVar[int] = -2
    EMBEDS: ClassVar[tuple[str, ...]] = ("prompt_embeds", "pooled_prompt_embeds")

    @classmethod
    def _from_index(cls, index: Mapping[str, Any]) -> dict[str, Any]:
        default = cls.force_zeros_for_empty_prompt
        return {"force_zeros_for_empty_prompt": bool(index.get("force_zeros_for_empty_prompt", default))}

    def pipeline(self) -> StableDiffusionXLPipeline:
        """A pipeline around the live modules, for samples; it adds no watermark.

        Never call `.to(dtype=...)` on it: that would cast the adapters in training. It samples with DDIM on the base's
        own noise schedule, as the other families do, not with the Euler steps of the published bases: it is
        deterministic too, and right for zero-terminal-SNR schedules as well.
        """
        pipeline = StableDiffusionXLPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            text_encoder_2=self.text_encoder_2,
            tokenizer=self.tokenizer,
            tokenizer_2=self.tokenizer_2,
            unet=self.unet,
            scheduler=self._ddim_scheduler(),
            force_zeros_for_empty_prompt=self.force_zeros_for_empty_prompt,
            add_watermarker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _encode(self, columns: Mapping[str, Tensor], unskipped: Tensor | None) -> dict[str, Tensor]:
        embeds: list[Tensor] = []
        pooled = None
        for encoder, ids in zip(self.text_encoders.values(), columns.values(), strict=True):
            output = cast(Any, encoder)(ids, output_hidden_states=True)
            embeds.append(hidden_state(output, self.HIDDEN_STATE, self.clip_skip, unskipped))
            pooled = output[0]  # the second encoder's is its projection of the end token
        return {"prompt_embeds": torch.cat(embeds, dim=-1), "pooled_prompt_embeds": cast(Tensor, pooled)}

    def _layers_left_out(self, component: str) -> int:
        # the pooled embedding comes from the last layer of the second encoder
        return 0 if component == "text_encoder_2" else super()._layers_left_out(component)

    def _unet_inputs(
        self, batch: Mapping[str, Tensor], latents: Tensor, embeds: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        size = torch.tensor([side * self.vae_scale_factor for side in latents.shape[-2:]])
        whole = {"original_sizes": size, "crop_top_lefts": torch.zeros_like(size), "target_sizes": size}
        parts = [batch.get(name, default.expand(len(latents), 2)) for name, default in whole.items()]
        # In the dtype of the embeddings, although half precision rounds large sizes: the pipelines do the same.
        time_ids = torch.cat([part.to(self.device) for part in parts], dim=1).to(self.weight_dtype)
        return {
            "encoder_hidden_states": embeds["prompt_embeds"],
            "added_cond_kwargs": {"text_embeds": embeds["pooled_prompt_embeds"], "time_ids": time_ids},
        }
