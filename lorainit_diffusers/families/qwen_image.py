"""Qwen-Image: a transformer with an image and a text stream, Qwen 2.5 VL as text encoder, rectified flow.

    family = QwenImageFamily.from_pretrained("path/or/hub-name", weight_dtype=torch.bfloat16)
    batch = {"pixel_values": images, **family.caption_inputs(captions)}
    family.loss(batch, torch.Generator().manual_seed(0)).backward()

The VAE is one of videos: an image is a clip of one frame, and its latents are normalised by channel. The levels of
noise are shifted by the image's size and end at the base's lowest, as the pipeline has them; diffusers' example (0.42)
takes them unshifted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

from lorainit_diffusers.families.flow_matching import FlowMatchingFamily

# Latents per side of the patches that a token is made of.
PATCH_SIZE = 2
MAX_SEQUENCE_LENGTH, LONGEST_SEQUENCE = 512, 1024
# What the pipeline writes around every prompt, and how many tokens of its beginning it leaves out afterwards.
PROMPT_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
NUM_TEMPLATE_TOKENS = 34
# The layers that see the text, of which the shorter captions of a batch have padding.
TEXT_LAYERS = (
    *("txt_in", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("txt_mlp.net.0.proj", "txt_mlp.net.2"),
)


@dataclass
class QwenImageFamily(FlowMatchingFamily):
    """A Qwen-Image base and its training loss; for the other attributes see `FlowMatchingFamily`.

    The columns of a batch are `input_ids` and `attention_mask`, or `prompt_embeds` and `prompt_embeds_mask`; and the
    images.

    Attributes:
        tokenizer: Of Qwen.
        text_encoder: Qwen 2.5 VL, of which the last hidden state is used; never trained.
        vae: Autoencoder, never trained.
        transformer: The denoiser.
        noise_scheduler: The table of noise levels, which a base that says so shifts by the image's size.
        max_sequence_length: Tokens of a caption, without the beginning of the pipeline's template; None is 512, as in
            the pipeline.
    """

    tokenizer: PreTrainedTokenizerBase
    text_encoder: Qwen2_5_VLForConditionalGeneration
    vae: AutoencoderKLQwenImage  # pyright: ignore[reportIncompatibleVariableOverride]
    transformer: QwenImageTransformer2DModel
    noise_scheduler: FlowMatchEulerDiscreteScheduler

    NAME: ClassVar[str] = "Qwen-Image"
    PIPELINES: ClassVar[tuple[type[DiffusionPipeline], ...]] = (QwenImagePipeline,)
    DENOISER: ClassVar[str] = "transformer"
    DENOISER_CLASS: ClassVar[type[nn.Module]] = QwenImageTransformer2DModel
    TARGETS: ClassVar[tuple[str, ...]] = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
    VAE_CLASS: ClassVar[Any] = AutoencoderKLQwenImage
    TEXT_ENCODERS: ClassVar[Mapping[str, type[nn.Module]]] = {"text_encoder": Qwen2_5_VLForConditionalGeneration}
    MASKED_ENCODERS: ClassVar[frozenset[str]] = frozenset({"text_encoder"})
    EMBEDS: ClassVar[tuple[str, ...]] = ("prompt_embeds", "prompt_embeds_mask")
    WEIGHTING_SCHEME: ClassVar[str] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_channels(int(self.transformer.config["in_channels"]) // PATCH_SIZE**2)
        if self.max_sequence_length is None:
            self.max_sequence_length = MAX_SEQUENCE_LENGTH
        if self.max_sequence_length > LONGEST_SEQUENCE:
            raise ValueError(
                f"max_sequence_length {self.max_sequence_length} is too large: the pipeline takes at most "
                f"{LONGEST_SEQUENCE} tokens"
            )
        self.tokenizer.padding_side = "right"  # so that the template's tokens are the first ones

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent."""
        return 2 ** len(cast(Any, self.vae.config)["temperal_downsample"])

    @property
    def resolution(self) -> int:
        """1024 pixels: the transformer's configuration names no size."""
        return 1024

    def pipeline(self) -> QwenImagePipeline:
        """A pipeline around the live modules, for samples, with the base's own flow-matching scheduler.

        Never call `.to(dtype=...)` on it: that would cast the adapters in training.
        """
        pipeline = QwenImagePipeline(
            scheduler=self._sampling_scheduler(),
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=cast(Any, self.tokenizer),
            transformer=self.transformer,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    # ---- captions

    def _tokenized_texts(self, captions: Sequence[str]) -> list[str]:
        return [PROMPT_TEMPLATE.format(caption) for caption in captions]

    def _max_tokens(self, component: str) -> int:
        return int(self.max_sequence_length or 0) + NUM_TEMPLATE_TOKENS

    def _tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        # the pipeline cuts what it has encoded, so that no token of an end stands where it cuts
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=LONGEST_SEQUENCE + NUM_TEMPLATE_TOKENS,
            return_tensors="pt",
        )
        kept = self._max_tokens("text_encoder")
        return {name: cast(Tensor, tokens[name])[:, :kept] for name in self.caption_columns}

    def _encode(self, columns: Mapping[str, Tensor], unskipped: Tensor | None) -> dict[str, Tensor]:
        mask = columns["attention_mask"]
        output = cast(Any, self.text_encoder)(
            input_ids=columns["input_ids"],
            attention_mask=mask,
            output_hidden_states=True,
            use_cache=False,
            logits_to_keep=1,  # no word is asked for
        )
        mask = mask[:, NUM_TEMPLATE_TOKENS:]
        hidden = output.hidden_states[-1][:, NUM_TEMPLATE_TOKENS:]
        return {"prompt_embeds": hidden * mask[..., None].to(hidden.dtype), "prompt_embeds_mask": mask}

    # ---- latents: clips of one frame

    @property
    def _latent_channels(self) -> int:
        return int(cast(Any, self.vae.config)["z_dim"])

    def _posterior(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = super()._posterior(pixel_values.unsqueeze(2))
        return mean.squeeze(2), std.squeeze(2)

    @property
    def _latent_shift_and_scale(self) -> tuple[float | Tensor, float | Tensor]:
        config = cast(Any, self.vae.config)
        mean, std = (
            torch.tensor(config[name], device=self.device).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std")
        )
        return mean, 1 / std

    def _decoded(self, latents: Tensor) -> Tensor:
        return super()._decoded(latents.unsqueeze(2)).squeeze(2)

    def _sampled_latents(self, output: Tensor, height: int, width: int) -> Tensor:
        return cast(Any, QwenImagePipeline)._unpack_latents(output, height, width, self.vae_scale_factor).squeeze(2)

    # ---- the denoiser

    def _shift_exponent(self, latents: Tensor) -> float | None:
        config = self.noise_scheduler.config
        return calculate_shift(
            (latents.shape[-2] // PATCH_SIZE) * (latents.shape[-1] // PATCH_SIZE),
            config["base_image_seq_len"],
            config["max_image_seq_len"],
            config["base_shift"],
            config["max_shift"],
        )

    def _predict(
        self, latents: Tensor, timesteps: Tensor, embeds: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> Tensor:
        count, channels, height, width = latents.shape
        text = _without_common_padding(embeds)
        mask: Tensor | None = text["prompt_embeds_mask"].bool()
        self.step.token_masks[self.DENOISER] = mask
        self.step.masked_layers[self.DENOISER] = TEXT_LAYERS
        if bool(mask.all()):  # as the pipeline has it: attention is faster without one
            mask = None
        prediction = self.transformer(
            hidden_states=cast(Any, QwenImagePipeline)._pack_latents(latents, count, channels, height, width),
            timestep=timesteps / 1000,
            encoder_hidden_states=text["prompt_embeds"],
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, height // PATCH_SIZE, width // PATCH_SIZE)]] * count,
            return_dict=False,
        )[0]
        return self._sampled_latents(prediction, height * self.vae_scale_factor, width * self.vae_scale_factor)

    def _sampling_inputs(
        self, embeds: Mapping[str, Tensor], no_caption: Mapping[str, Tensor], guidance_scale: float
    ) -> dict[str, Any]:
        inputs: dict[str, Any] = {**_without_common_padding(embeds), "true_cfg_scale": guidance_scale}
        if guidance_scale > 1:
            inputs |= {f"negative_{name}": values for name, values in _without_common_padding(no_caption).items()}
        return inputs


def _without_common_padding(embeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The conditioning cut to the longest caption of the batch, to which the pipeline pads."""
    longest = int(embeds["prompt_embeds_mask"].sum(dim=1).max())
    return {name: values[:, :longest] for name, values in embeds.items()}
