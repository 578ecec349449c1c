"""FLUX.2 dev and klein: double-stream and fused single-stream blocks, a language model as text encoder, rectified flow.

    family = Flux2Family.from_pretrained("path/or/hub-name", weight_dtype=torch.bfloat16)
    batch = {"pixel_values": images, **family.caption_inputs(captions)}
    family.loss(batch, torch.Generator().manual_seed(0)).backward()

A batch may hold an image to see beside the noise, `conditioning_images`. The latents are patches of 2x2, normalised by
the running statistics of the VAE's batch norm. The levels of noise are shifted by the image's size as the pipeline
shifts them, with its usual 50 steps. diffusers' example (0.42) takes them unshifted, and 3.5 for the guidance that dev
takes as an input, where the pipeline has 4.0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, cast

import torch
from diffusers import (
    AutoencoderKLFlux2,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, format_input
from torch import Tensor, nn
from transformers import (
    Mistral3ForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3ForCausalLM,
)

from lorainit_diffusers.families.flow_matching import FlowMatchingFamily

# Latents per side of a patch, whose channels are the transformer's.
PATCH_SIZE = 2
MAX_SEQUENCE_LENGTH = 512
# Steps of the pipeline when nothing is said: its shift of the noise levels depends on them.
NUM_INFERENCE_STEPS = 50
# Hidden states of the text encoder that are put beside each other, of dev and of klein.
DEV_LAYERS, KLEIN_LAYERS = (10, 20, 30), (9, 18, 27)


@dataclass
class Flux2Family(FlowMatchingFamily):
    """A FLUX.2 base (dev or klein) and its training loss; for the other attributes see `FlowMatchingFamily`.

    The columns of a batch are `input_ids` and `attention_mask`, or `prompt_embeds`; and the images.

    Attributes:
        tokenizer: Of the text encoder, with its chat template.
        text_encoder: Mistral 3 (dev) or Qwen 3 (klein), of which three hidden states are used; never trained.
        vae: Autoencoder, never trained.
        transformer: The denoiser.
        noise_scheduler: The table of noise levels, which a base that says so shifts by the image's size.
        klein: Whether the base is a klein: another text encoder, and no guidance as an input.
        is_distilled: Whether a klein is distilled to few steps, for which samples take no guidance.
        guidance_scale: The guidance that dev takes as an input while it is trained.
        max_sequence_length: Tokens of the text encoder, its template included; None is 512, as in the pipelines.
    """

    tokenizer: PreTrainedTokenizerBase
    text_encoder: PreTrainedModel
    vae: AutoencoderKLFlux2  # pyright: ignore[reportIncompatibleVariableOverride]
    transformer: Flux2Transformer2DModel
    noise_scheduler: FlowMatchEulerDiscreteScheduler
    _: KW_ONLY
    klein: bool = False
    is_distilled: bool = False
    guidance_scale: float = 4.0

    NAME: ClassVar[str] = "Flux 2"
    PIPELINES: ClassVar[tuple[type[DiffusionPipeline], ...]] = (Flux2Pipeline, Flux2KleinPipeline)
    DENOISER: ClassVar[str] = "transformer"
    DENOISER_CLASS: ClassVar[type[nn.Module]] = Flux2Transformer2DModel
    TARGETS: ClassVar[tuple[str, ...]] = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        "attn.to_qkv_mlp_proj",
    )
    VAE_CLASS: ClassVar[Any] = AutoencoderKLFlux2
    TEXT_ENCODERS: ClassVar[Mapping[str, type[nn.Module]]] = {"text_encoder": PreTrainedModel}
    ENCODER_CLASSES: ClassVar[Mapping[str, tuple[type[nn.Module], ...]]] = {
        "text_encoder": (Mistral3ForConditionalGeneration, Qwen3ForCausalLM)
    }
    MASKED_ENCODERS: ClassVar[frozenset[str]] = frozenset({"text_encoder"})
    EMBEDS: ClassVar[tuple[str, ...]] = ("prompt_embeds",)
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
        klein = index["_class_name"] == Flux2KleinPipeline.__name__
        distilled = bool(index.get("is_distilled", False))
        return {**super()._from_index(index), "klein": klein, "is_distilled": distilled}

    def default_targets(self, component: str) -> list[str]:
        """The attention of the double blocks, and both layers of the single ones, as in diffusers' example."""
        targets = super().default_targets(component)
        # by their names in full: in a double block, `attn.to_out` is a list and no layer
        singles = range(len(self.transformer.single_transformer_blocks))
        return targets + [f"single_transformer_blocks.{block}.attn.to_out" for block in singles]

    @property
    def resolution(self) -> int:
        """1024 pixels: the transformer's configuration names no size."""
        return 1024

    @property
    def resolution_multiple(self) -> int:
        """Image sides must be a multiple of it: pixels per latent, times latents per patch."""
        return self.vae_scale_factor * PATCH_SIZE

    def example_prompt(self, prompt: str | None) -> str:
        """Source code of the pipeline's prompt, for model cards: its first argument is an image."""
        return f"prompt={super().example_prompt(prompt)}"

    def pipeline(self) -> Flux2Pipeline | Flux2KleinPipeline:
        """A pipeline around the live modules, for samples, with the base's own flow-matching scheduler.

        Never call `.to(dtype=...)` on it: that would cast the adapters in training.
        """
        parts: dict[str, Any] = {
            "scheduler": self._sampling_scheduler(),
            "vae": self.vae,
            "text_encoder": self.text_encoder,
            "tokenizer": self.tokenizer,
            "transformer": self.transformer,
        }
        pipeline = Flux2KleinPipeline(**parts, is_distilled=self.is_distilled) if self.klein else Flux2Pipeline(**parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    # ---- captions

    def _tokenized_texts(self, captions: Sequence[str]) -> list[str]:
        template: Any = self.tokenizer.apply_chat_template
        if self.klein:
            chats = [[{"role": "user", "content": caption}] for caption in captions]
            # no reasoning, though the words that would end it are there
            options: dict[str, Any] = {"add_generation_prompt": True, "enable_thinking": False}
        else:
            chats, options = format_input(list(captions)), {"add_generation_prompt": False}
        return [template(chat, tokenize=False, **options) for chat in chats]

    def _tokenizer_options(self) -> dict[str, Any]:
        return {"add_special_tokens": self.klein}  # dev's template has the start token

    def _max_tokens(self, component: str) -> int:
        return int(self.max_sequence_length or 0)

    def _encode(self, columns: Mapping[str, Tensor], unskipped: Tensor | None) -> dict[str, Tensor]:
        output = cast(Any, self.text_encoder)(
            input_ids=columns["input_ids"],
            attention_mask=columns["attention_mask"],
            output_hidden_states=True,
            use_cache=False,
            logits_to_keep=1,  # no word is asked for
        )
        layers = KLEIN_LAYERS if self.klein else DEV_LAYERS
        return {"prompt_embeds": torch.cat([output.hidden_states[layer] for layer in layers], dim=-1)}

    # ---- latents: patches

    def _posterior(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = super()._posterior(pixel_values)
        return _patches(mean), _patches(std)

    @property
    def _latent_shift_and_scale(self) -> tuple[float | Tensor, float | Tensor]:
        norm = cast(Any, self.vae).bn
        mean, variance = (values.to(self.device).view(1, -1, 1, 1) for values in (norm.running_mean, norm.running_var))
        return mean, 1 / torch.sqrt(variance + float(cast(Any, self.vae.config)["batch_norm_eps"]))

    def _decoded(self, latents: Tensor) -> Tensor:
        return super()._decoded(cast(Any, Flux2Pipeline)._unpatchify_latents(latents))

    def _sampled_latents(self, output: Tensor, height: int, width: int) -> Tensor:
        if self.klein:  # that pipeline gives the VAE's own
            shift, factor = self._latent_shift_and_scale
            return (_patches(output) - shift) * factor
        return _image(output, height // self.resolution_multiple, width // self.resolution_multiple)

    # ---- the denoiser

    def _shift_exponent(self, latents: Tensor) -> float | None:
        return compute_empirical_mu(latents.shape[-2] * latents.shape[-1], NUM_INFERENCE_STEPS)

    def _predict(
        self, latents: Tensor, timesteps: Tensor, embeds: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> Tensor:
        pipeline: Any = Flux2Pipeline
        prompt_embeds = embeds["prompt_embeds"]
        guidance = None
        if not self.klein:
            guidance = torch.full((len(latents),), self.guidance_scale, device=latents.device)
        tokens, image_ids = pipeline._pack_latents(latents), pipeline._prepare_latent_ids(latents[:1])
        num_tokens = tokens.shape[1]
        if "conditioning_latents" in batch:
            image = batch["conditioning_latents"]
            tokens = torch.cat([tokens, pipeline._pack_latents(image)], dim=1)
            image_ids = torch.cat([image_ids, pipeline._prepare_image_ids([image[:1]])], dim=1)
        prediction = self.transformer(
            hidden_states=tokens,
            encoder_hidden_states=prompt_embeds,
            timestep=timesteps / 1000,
            guidance=guidance,
            txt_ids=pipeline._prepare_text_ids(prompt_embeds[:1]).to(latents.device),
            img_ids=image_ids.to(latents.device),
            return_dict=False,
        )[0]
        return _image(prediction[:, :num_tokens], *latents.shape[-2:])

    def _sampling_inputs(
        self, embeds: Mapping[str, Tensor], no_caption: Mapping[str, Tensor], guidance_scale: float
    ) -> dict[str, Any]:
        if self.klein:
            return super()._sampling_inputs(embeds, no_caption, guidance_scale)
        return {**embeds, "guidance_scale": guidance_scale}  # distilled: there is no second pass without the caption


def _patches(latents: Tensor) -> Tensor:
    """(batch, channels, height, width) -> (batch, 4 * channels, height / 2, width / 2)."""
    return cast(Any, Flux2Pipeline)._patchify_latents(latents)


def _image(tokens: Tensor, height: int, width: int) -> Tensor:
    """(batch, height * width, channels) -> (batch, channels, height, width)."""
    return tokens.permute(0, 2, 1).unflatten(2, (height, width))
