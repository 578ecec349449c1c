"""Sana: a transformer with linear attention on strongly compressed latents, Gemma 2 as text encoder, rectified flow.

    family = SanaFamily.from_pretrained("path/or/hub-name", weight_dtype=torch.bfloat16)
    batch = {"pixel_values": images, **family.caption_inputs(captions)}
    family.loss(batch, torch.Generator().manual_seed(0)).backward()

The autoencoder (DC-AE) has no posterior: its latents are what they are. The published bases are sampled with a
DPMSolverMultistepScheduler, whose `flow_shift` shifts the levels of noise in training, too. diffusers' example (0.42)
reads that scheduler as one of another class, which does not know the name, and takes them unshifted.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from diffusers import (
    AutoencoderDC,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from torch import Tensor, nn
from transformers import Gemma2Model, PreTrainedTokenizerBase

from lorainit_diffusers.families.captions import replace
from lorainit_diffusers.families.flow_matching import FlowMatchingFamily

MAX_SEQUENCE_LENGTH = 300
# What the pipeline writes before every prompt, but not before the empty one that stands for no caption.
INSTRUCTION = "\n".join(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)
# The layers that see the text, of which all but the longest captions have padding.
TEXT_LAYERS = ("attn2.to_k", "attn2.to_v", "caption_projection.linear_1", "caption_projection.linear_2")


@dataclass
class SanaFamily(FlowMatchingFamily):
    """A Sana base and its training loss; for the other attributes see `FlowMatchingFamily`.

    The columns of a batch are `input_ids` and `attention_mask`, or `prompt_embeds` and `prompt_attention_mask`; and the
    images.

    Attributes:
        tokenizer: Of Gemma.
        text_encoder: Gemma 2, of which the last hidden state is used; never trained.
        vae: Autoencoder, never trained.
        transformer: The denoiser.
        noise_scheduler: The table of noise levels, with the base's shift.
        max_sequence_length: Tokens of a caption that the transformer gets; None is 300, as in the pipeline.
    """

    tokenizer: PreTrainedTokenizerBase
    text_encoder: Gemma2Model
    vae: AutoencoderDC  # pyright: ignore[reportIncompatibleVariableOverride]
    transformer: SanaTransformer2DModel
    noise_scheduler: FlowMatchEulerDiscreteScheduler

    NAME: ClassVar[str] = "Sana"
    PIPELINES: ClassVar[tuple[type[DiffusionPipeline], ...]] = (SanaPipeline,)
    DENOISER: ClassVar[str] = "transformer"
    DENOISER_CLASS: ClassVar[type[nn.Module]] = SanaTransformer2DModel
    TARGETS: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v")
    VAE_CLASS: ClassVar[Any] = AutoencoderDC
    TEXT_ENCODERS: ClassVar[Mapping[str, type[nn.Module]]] = {"text_encoder": Gemma2Model}
    MASKED_ENCODERS: ClassVar[frozenset[str]] = frozenset({"text_encoder"})
    EMBEDS: ClassVar[tuple[str, ...]] = ("prompt_embeds", "prompt_attention_mask")
    WEIGHTING_SCHEME: ClassVar[str] = "none"
    SAMPLERS: ClassVar[tuple[str, ...]] = ("DPMSolverMultistepScheduler",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_channels(int(self.transformer.config["in_channels"]))
        if self.max_sequence_length is None:
            self.max_sequence_length = MAX_SEQUENCE_LENGTH
        self.tokenizer.padding_side = "right"  # as the pipeline does it, whatever the tokenizer's files say
        # two of them are the start and the end, which every text has
        self._num_instruction_tokens = len(self.tokenizer.encode(INSTRUCTION)) - 2

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent."""
        return 2 ** (len(cast(Any, self.vae.config)["encoder_block_out_channels"]) - 1)

    def pipeline(self) -> SanaPipeline:
        """A pipeline around the live modules, for samples, with the base's own scheduler.

        Never call `.to(dtype=...)` on it: that would cast the adapters in training.
        """
        pipeline = SanaPipeline(
            tokenizer=cast(Any, self.tokenizer),
            text_encoder=cast(Any, self.text_encoder),
            vae=self.vae,
            transformer=self.transformer,
            scheduler=self._sampling_scheduler(),
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    # ---- captions

    def _tokenized_texts(self, captions: Sequence[str]) -> list[str]:
        return [INSTRUCTION + caption.lower().strip() for caption in captions]

    def _max_tokens(self, component: str) -> int:
        return self._num_instruction_tokens + int(self.max_sequence_length or 0)

    def _hidden_state(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mask = columns["attention_mask"]
        hidden = cast(Any, self.text_encoder)(columns["input_ids"], attention_mask=mask)[0]
        return {"prompt_embeds": hidden, "prompt_attention_mask": mask}

    def _encode(self, columns: Mapping[str, Tensor], unskipped: Tensor | None) -> dict[str, Tensor]:
        # the first token and the last ones: the caption has read the instruction, which is left out
        last = int(self.max_sequence_length or 0) - 1
        embeds = {
            name: torch.cat([values[:, :1], values[:, values.shape[1] - last :]], dim=1)
            for name, values in self._hidden_state(columns).items()
        }
        return embeds if unskipped is None else replace(embeds, unskipped, self._encode_no_caption(1))

    def _drop_captions(self, columns: Mapping[str, Tensor], dropped: Tensor) -> dict[str, Tensor]:
        return dict(columns)  # no caption has another length: `_encode` puts it in

    def _encode_no_caption(self, count: int) -> dict[str, Tensor]:
        tokens = self.tokenizer(
            [""] * count,
            padding="max_length",
            truncation=True,
            max_length=int(self.max_sequence_length or 0),
            return_tensors="pt",
        )
        return self._hidden_state(self._to_device({name: tokens[name] for name in self.caption_columns}))

    # ---- latents: no posterior

    def _posterior(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        latents = cast(Any, self.vae).encode(pixel_values).latent
        return latents, torch.zeros_like(latents)

    # ---- the denoiser

    def _predict(
        self, latents: Tensor, timesteps: Tensor, embeds: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> Tensor:
        mask = embeds["prompt_attention_mask"]
        self.step.token_masks[self.DENOISER] = mask.bool()
        self.step.masked_layers[self.DENOISER] = TEXT_LAYERS
        prediction = self.transformer(
            hidden_states=latents,
            encoder_hidden_states=embeds["prompt_embeds"],
            encoder_attention_mask=mask,
            timestep=timesteps * self.transformer.config["timestep_scale"],
            return_dict=False,
        )[0]
        return prediction[:, : latents.shape[1]]  # some have learnt a variance, too

    def _sampling_inputs(
        self, embeds: Mapping[str, Tensor], no_caption: Mapping[str, Tensor], guidance_scale: float
    ) -> dict[str, Any]:
        inputs = super()._sampling_inputs(embeds, no_caption, guidance_scale)
        return {**inputs, "negative_prompt": None, "use_resolution_binning": False}
