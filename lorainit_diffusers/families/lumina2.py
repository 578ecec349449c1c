"""Lumina-Image 2.0: a transformer over one sequence of text and image tokens, Gemma 2 as text encoder, rectified flow.

    family = Lumina2Family.from_pretrained("path/or/hub-name", weight_dtype=torch.bfloat16)
    batch = {"pixel_values": images, **family.caption_inputs(captions)}
    family.loss(batch, torch.Generator().manual_seed(0)).backward()

Its time runs from noise (0) to data (1), and it predicts data - noise; `Lumina2Family._predict` turns both around, so
that the step is that of `families/flow_matching.py`. The noise levels are therefore shifted as the pipeline shifts
them, towards noise. diffusers' example (0.42) takes the same table for the share of data instead, which shifts them
towards data; without a shift, the two are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
)
from torch import Tensor, nn
from transformers import Gemma2Model, PreTrainedTokenizerBase

from lorainit_diffusers.families.flow_matching import FlowMatchingFamily

MAX_SEQUENCE_LENGTH = 256
# What the pipeline puts before every prompt, but not before the empty one that stands for no caption.
PROMPT_PREFIX = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts. <Prompt Start> "
)


@dataclass
class Lumina2Family(FlowMatchingFamily):
    """A Lumina-Image 2.0 base and its training loss; for the other attributes see `FlowMatchingFamily`.

    The columns of a batch are `input_ids` and `attention_mask`, or `prompt_embeds` and `prompt_attention_mask`; and the
    images.

    Attributes:
        tokenizer: Of Gemma.
        text_encoder: Gemma 2, of which the last hidden state but one is used; never trained.
        vae: Autoencoder, never trained.
        transformer: The denoiser.
        noise_scheduler: The table of noise levels, with the base's shift.
        max_sequence_length: Tokens of Gemma, the system prompt included; None is 256, as in the pipeline.
    """

    tokenizer: PreTrainedTokenizerBase
    text_encoder: Gemma2Model
    vae: AutoencoderKL
    transformer: Lumina2Transformer2DModel
    noise_scheduler: FlowMatchEulerDiscreteScheduler

    NAME: ClassVar[str] = "Lumina 2"
    PIPELINES: ClassVar[tuple[type[DiffusionPipeline], ...]] = (Lumina2Pipeline,)
    DENOISER: ClassVar[str] = "transformer"
    DENOISER_CLASS: ClassVar[type[nn.Module]] = Lumina2Transformer2DModel
    TARGETS: ClassVar[tuple[str, ...]] = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
    TEXT_ENCODERS: ClassVar[Mapping[str, type[nn.Module]]] = {"text_encoder": Gemma2Model}
    MASKED_ENCODERS: ClassVar[frozenset[str]] = frozenset({"text_encoder"})
    EMBEDS: ClassVar[tuple[str, ...]] = ("prompt_embeds", "prompt_attention_mask")
    WEIGHTING_SCHEME: ClassVar[str] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_channels(int(self.transformer.config["in_channels"]))
        if self.max_sequence_length is None:
            self.max_sequence_length = MAX_SEQUENCE_LENGTH
        num_positions = int(self.transformer.config["axes_lens"][0])
        if self.max_sequence_length >= num_positions:  # the image's tokens take the position after the text
            raise ValueError(
                f"max_sequence_length {self.max_sequence_length} is too large: the transformer has {num_positions} "
                f"positions, of which the text can take {num_positions - 1}"
            )
        names = (name for name, _ in self.transformer.named_modules())
        self._text_layers = tuple(name for name in names if name.startswith("context_refiner."))
        self.tokenizer.padding_side = "right"  # as the pipeline does it, whatever the tokenizer's files say

    def pipeline(self) -> Lumina2Pipeline:
        """A pipeline around the live modules, for samples, with the base's own flow-matching scheduler.

        Never call `.to(dtype=...)` on it: that would cast the adapters in training.
        """
        pipeline = Lumina2Pipeline(
            transformer=self.transformer,
            scheduler=self._sampling_scheduler(),
            vae=self.vae,
            text_encoder=cast(Any, self.text_encoder),
            tokenizer=cast(Any, self.tokenizer),
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _tokenized_texts(self, captions: Sequence[str]) -> list[str]:
        # the system prompt is put before each caption here, and nowhere else
        return [PROMPT_PREFIX + caption for caption in captions]

    def _max_tokens(self, component: str) -> int:
        return int(self.max_sequence_length or 0)

    def _no_caption_inputs(self, count: int) -> dict[str, Tensor]:
        return self._tokenize([""] * count)

    def _encode(self, columns: Mapping[str, Tensor], unskipped: Tensor | None) -> dict[str, Tensor]:
        mask = columns["attention_mask"]
        output = cast(Any, self.text_encoder)(columns["input_ids"], attention_mask=mask, output_hidden_states=True)
        return {"prompt_embeds": output.hidden_states[-2], "prompt_attention_mask": mask}

    def _predict(
        self, latents: Tensor, timesteps: Tensor, embeds: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> Tensor:
        mask = embeds["prompt_attention_mask"]
        # The image's tokens, of which there may be as many, join the text's after these blocks, without its padding.
        self.step.token_masks[self.DENOISER] = mask.bool()
        self.step.masked_layers[self.DENOISER] = self._text_layers
        return -self.transformer(
            hidden_states=latents,
            timestep=1 - timesteps / int(self.noise_scheduler.config["num_train_timesteps"]),
            encoder_hidden_states=embeds["prompt_embeds"],
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]
