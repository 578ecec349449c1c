"""Stable Diffusion 3 and 3.5: a transformer over image and text tokens, two CLIP encoders and T5, rectified flow.

    family = StableDiffusion3Family.from_pretrained("path/or/hub-name")
    batch = {"pixel_values": images, **family.caption_inputs(captions)}
    family.loss(batch, torch.Generator().manual_seed(0)).backward()

The loss is that of diffusers' SD3 examples with `--precondition_outputs 0` (Esser et al. 2024, arXiv:2403.03206); see
`families/flow_matching.py`. Their default compares denoised latents instead, which weighs a sample by sigma squared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedTokenizerBase, T5EncoderModel

from lorainit_diffusers.families.captions import hidden_state
from lorainit_diffusers.families.flow_matching import FlowMatchingFamily

# Which hidden state of CLIP is used when no `clip_skip` moves it further to the front.
HIDDEN_STATE = -2


@dataclass
class StableDiffusion3Family(FlowMatchingFamily):
    """A Stable Diffusion 3 base and its training loss; for the other attributes see `FlowMatchingFamily`.

    The columns of a batch are `input_ids`, `input_ids_2` and, with T5, `input_ids_3`, or `prompt_embeds` and
    `pooled_prompt_embeds`; and the images.

    Attributes:
        tokenizer: Of the first CLIP encoder.
        tokenizer_2: Of the second.
        tokenizer_3: Of T5; None for a base without it.
        text_encoder: First CLIP encoder.
        text_encoder_2: Second CLIP encoder.
        text_encoder_3: T5; None takes zeros for its tokens, as the pipeline does. It is never trained.
        vae: Autoencoder, never trained.
        transformer: The denoiser.
        noise_scheduler: The table of noise levels, with the base's shift.
        max_sequence_length: Tokens of T5; None is as many as CLIP's (77 in the published bases).
        clip_skip: Last CLIP layers to leave out, as the pipeline counts them.
    """

    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer
    tokenizer_3: PreTrainedTokenizerBase | None
    text_encoder: CLIPTextModelWithProjection
    text_encoder_2: CLIPTextModelWithProjection
    text_encoder_3: T5EncoderModel | None
    vae: AutoencoderKL
    transformer: SD3Transformer2DModel
    noise_scheduler: FlowMatchEulerDiscreteScheduler
    _: KW_ONLY
    clip_skip: int | None = None

    NAME: ClassVar[str] = "Stable Diffusion 3"
    PIPELINES: ClassVar[tuple[type[DiffusionPipeline], ...]] = (StableDiffusion3Pipeline,)
    DENOISER: ClassVar[str] = "transformer"
    DENOISER_CLASS: ClassVar[type[nn.Module]] = SD3Transformer2DModel
    TARGETS: ClassVar[tuple[str, ...]] = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    TEXT_ENCODERS: ClassVar[Mapping[str, type[nn.Module]]] = {
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel,
    }
    OPTIONAL_ENCODERS: ClassVar[frozenset[str]] = frozenset({"text_encoder_3"})
    EMBEDS: ClassVar[tuple[str, ...]] = ("prompt_embeds", "pooled_prompt_embeds")
    OPTIONS: ClassVar[tuple[str, ...]] = (*FlowMatchingFamily.OPTIONS, "clip_skip")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_channels(int(self.transformer.config["in_channels"]))
        if self.max_sequence_length is None:
            self.max_sequence_length = int(self.tokenizer.model_max_length)
        self._check_clip_skip(self.clip_skip, HIDDEN_STATE)

    def pipeline(self) -> StableDiffusion3Pipeline:
        """A pipeline around the live modules, for samples, with the base's own flow-matching scheduler.

        Never call `.to(dtype=...)` on it: that would cast the adapters in training.
        """
        pipeline = StableDiffusion3Pipeline(
            transformer=self.transformer,
            scheduler=self._sampling_scheduler(),
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            text_encoder_2=self.text_encoder_2,
            tokenizer_2=self.tokenizer_2,
            text_encoder_3=cast(T5EncoderModel, self.text_encoder_3),
            tokenizer_3=cast(Any, self.tokenizer_3),
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _max_tokens(self, component: str) -> int:
        # the pipeline cuts for both CLIP encoders as the first one's tokenizer says
        return (
            int(self.max_sequence_length or 0) if component == "text_encoder_3" else super()._max_tokens("text_encoder")
        )

    def _encode(self, columns: Mapping[str, Tensor], unskipped: Tensor | None) -> dict[str, Tensor]:
        embeds: list[Tensor] = []
        pooled: list[Tensor] = []
        for encoder, column in ((self.text_encoder, "input_ids"), (self.text_encoder_2, "input_ids_2")):
            output = cast(Any, encoder)(columns[column], output_hidden_states=True)
            embeds.append(hidden_state(output, HIDDEN_STATE, self.clip_skip, unskipped))
            pooled.append(output[0])
        clip = torch.cat(embeds, dim=-1)
        width = int(self.transformer.config["joint_attention_dim"])
        if self.text_encoder_3 is None:
            t5 = clip.new_zeros(len(clip), int(self.max_sequence_length or 0), width)
        else:
            t5 = cast(Any, self.text_encoder_3)(columns["input_ids_3"])[0]
        clip = F.pad(clip, (0, width - clip.shape[-1]))
        return {
            "prompt_embeds": torch.cat([clip, t5.to(clip.dtype)], dim=1),
            "pooled_prompt_embeds": torch.cat(pooled, dim=-1),
        }

    def _predict(
        self, latents: Tensor, timesteps: Tensor, embeds: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> Tensor:
        return self.transformer(
            hidden_states=latents,
            encoder_hidden_states=embeds["prompt_embeds"],
            pooled_projections=embeds["pooled_prompt_embeds"],
            timestep=timesteps,
            return_dict=False,
        )[0]
