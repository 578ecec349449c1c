"""Stable Diffusion 1.x and 2.x: UNet with cross-attention on CLIP text embeddings, latents of a KL autoencoder.

    family = StableDiffusionFamily.from_pretrained("path/or/hub-name")
    batch = {"pixel_values": images, "input_ids": family.tokenize(captions)}
    family.loss(batch, torch.Generator().manual_seed(0)).backward()

The loss is that of diffusers' text-to-image and DreamBooth examples, for the three prediction types; see
`families/text_to_image.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTextModel

from lorainit_diffusers.families.latent_diffusion import LatentDiffusionFamily


@dataclass
class StableDiffusionFamily(LatentDiffusionFamily):
    """A Stable Diffusion base and its training loss.

    The columns of a batch are `input_ids` or `prompt_embeds`, and the images; for the attributes and the loss see
    `LatentDiffusionFamily` and `TextToImageFamily`.
    """

    NAME: ClassVar[str] = "Stable Diffusion"
    PIPELINES: ClassVar[tuple[type[DiffusionPipeline], ...]] = (StableDiffusionPipeline,)
    TEXT_ENCODERS: ClassVar[Mapping[str, type[nn.Module]]] = {"text_encoder": CLIPTextModel}
    HIDDEN_STATE: ClassVar[int] = -1
    EMBEDS: ClassVar[tuple[str, ...]] = ("prompt_embeds",)

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Token ids (captions, tokens), padded and cut to the tokenizer's length as the pipeline does."""
        return self.caption_inputs(captions)["input_ids"]

    def pipeline(self) -> StableDiffusionPipeline:
        """A pipeline around the live modules, for samples; it has no safety checker.

        Never call `.to(dtype=...)` on it: that would cast the adapters in training. It samples with DDIM on the base's
        own noise schedule.
        """
        pipeline = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self._ddim_scheduler(),
            safety_checker=cast(Any, None),
            feature_extractor=cast(Any, None),
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _encode(self, columns: Mapping[str, Tensor], unskipped: Tensor | None) -> dict[str, Tensor]:
        encoder = cast(Any, self.text_encoder)
        if self.clip_skip is None:
            return {"prompt_embeds": encoder(columns["input_ids"])[0]}
        output = encoder(columns["input_ids"], output_hidden_states=True)
        # the hidden states are taken before the final layer norm, which transformers 5 holds one level higher
        layer_norm = getattr(encoder, "text_model", encoder).final_layer_norm
        skipped = layer_norm(output.hidden_states[self.HIDDEN_STATE - self.clip_skip])
        if unskipped is not None:
            skipped = torch.where(unskipped[:, None, None], output[0], skipped)
        return {"prompt_embeds": skipped}
