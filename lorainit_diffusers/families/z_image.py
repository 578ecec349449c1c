"""Z-Image: a transformer over one sequence of image and text tokens, Qwen 3 as text encoder, rectified flow.

    family = ZImageFamily.from_pretrained("path/or/hub-name", weight_dtype=torch.bfloat16)
    batch = {"pixel_values": images, **family.caption_inputs(captions)}
    family.loss(batch, torch.Generator().manual_seed(0)).backward()

Its time runs from noise (0) to data (1), and it predicts data - noise; `ZImageFamily._predict` turns both around, so
that the step is that of `families/flow_matching.py`. The published bases shift the levels of noise by a fixed factor;
one that shifts them by the image's size is trained with them shifted, as the pipeline has them, where diffusers'
example (0.42) would take them unshifted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen3ForCausalLM, Qwen3Model

from lorainit_diffusers.families.flow_matching import FlowMatchingFamily

# Latents per side of the patches that a token is made of; the transformer can do others, the pipeline asks for these.
PATCH_SIZE = 2
MAX_SEQUENCE_LENGTH = 512
# The transformer fills each sequence up to a multiple of so many tokens, with one that it has learnt.
TOKEN_MULTIPLE = 32


@dataclass
class ZImageFamily(FlowMatchingFamily):
    """A Z-Image base and its training loss; for the other attributes see `FlowMatchingFamily`.

    The columns of a batch are `input_ids` and `attention_mask`, or `prompt_embeds` and `prompt_attention_mask`; and the
    images.

    Attributes:
        tokenizer: Of Qwen, with its chat template.
        text_encoder: Qwen 3, of which the last hidden state but one is used; never trained.
        vae: Autoencoder, never trained.
        transformer: The denoiser.
        noise_scheduler: The table of noise levels, with the base's shift.
        max_sequence_length: Tokens of Qwen, its template included; None is 512, as in the pipeline.
    """

    tokenizer: PreTrainedTokenizerBase
    text_encoder: PreTrainedModel
    vae: AutoencoderKL
    transformer: ZImageTransformer2DModel
    noise_scheduler: FlowMatchEulerDiscreteScheduler

    NAME: ClassVar[str] = "Z-Image"
    PIPELINES: ClassVar[tuple[type[DiffusionPipeline], ...]] = (ZImagePipeline,)
    DENOISER: ClassVar[str] = "transformer"
    DENOISER_CLASS: ClassVar[type[nn.Module]] = ZImageTransformer2DModel
    TARGETS: ClassVar[tuple[str, ...]] = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
    TEXT_ENCODERS: ClassVar[Mapping[str, type[nn.Module]]] = {"text_encoder": PreTrainedModel}
    ENCODER_CLASSES: ClassVar[Mapping[str, tuple[type[nn.Module], ...]]] = {
        "text_encoder": (Qwen3Model, Qwen3ForCausalLM)
    }
    MASKED_ENCODERS: ClassVar[frozenset[str]] = frozenset({"text_encoder"})
    EMBEDS: ClassVar[tuple[str, ...]] = ("prompt_embeds", "prompt_attention_mask")
    WEIGHTING_SCHEME: ClassVar[str] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_channels(int(self.transformer.config["in_channels"]))
        if self.max_sequence_length is None:
            self.max_sequence_length = MAX_SEQUENCE_LENGTH
        names = [name for name, _ in self.transformer.named_modules()]
        self._text_layers = tuple(name for name in names if name.startswith("context_refiner."))
        self._joint_layers = tuple(name for name in names if name.startswith("layers."))

    @property
    def resolution(self) -> int:
        """1024 pixels: the transformer's configuration names no size."""
        return 1024

    @property
    def resolution_multiple(self) -> int:
        """Image sides must be a multiple of it: pixels per latent, times latents per patch."""
        return self.vae_scale_factor * PATCH_SIZE

    def pipeline(self) -> ZImagePipeline:
        """A pipeline around the live modules, for samples, with the base's own flow-matching scheduler.

        Never call `.to(dtype=...)` on it: that would cast the adapters in training.
        """
        pipeline = ZImagePipeline(
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
        template: Any = self.tokenizer.apply_chat_template
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
        return [template([{"role": "user", "content": caption}], **options) for caption in captions]

    def _max_tokens(self, component: str) -> int:
        return int(self.max_sequence_length or 0)

    def _encode(self, columns: Mapping[str, Tensor], unskipped: Tensor | None) -> dict[str, Tensor]:
        mask = columns["attention_mask"]
        # without the head that makes words of them
        encoder = cast(Any, self.text_encoder).base_model
        output = encoder(columns["input_ids"], attention_mask=mask.bool(), output_hidden_states=True, use_cache=False)
        return {"prompt_embeds": output.hidden_states[-2], "prompt_attention_mask": mask}

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
        texts = _texts(embeds)
        self._record_padding(latents, [len(text) for text in texts])
        predictions = self.transformer(
            x=list(latents.unsqueeze(2).unbind()),  # clips of one frame
            t=1 - timesteps / int(self.noise_scheduler.config["num_train_timesteps"]),
            cap_feats=texts,
            return_dict=False,
        )[0]
        return -torch.stack(list(predictions)).squeeze(2)

    def _record_padding(self, latents: Tensor, lengths: Sequence[int]) -> None:
        """Which tokens stand only beside the longer captions of the batch.

        Those that fill a sequence up to the multiple are learnt, and all others attend to them: they are no padding.
        """
        image = _filled((latents.shape[-2] // PATCH_SIZE) * (latents.shape[-1] // PATCH_SIZE))
        text = torch.tensor([_filled(length) for length in lengths], device=latents.device)[:, None]
        places = torch.arange(image + int(text.max()), device=latents.device)
        self.step.layer_masks[self.DENOISER] = [
            (self._text_layers, places[: int(text.max())] < text),
            (self._joint_layers, places < image + text),
        ]

    def _sampling_inputs(
        self, embeds: Mapping[str, Tensor], no_caption: Mapping[str, Tensor], guidance_scale: float
    ) -> dict[str, Any]:
        prompts = {"prompt_embeds": _texts(embeds), "negative_prompt_embeds": _texts(no_caption)}
        return {**prompts, "guidance_scale": guidance_scale}


def _texts(embeds: Mapping[str, Tensor]) -> list[Tensor]:
    """(tokens, width) of each caption, without padding."""
    masks = embeds["prompt_attention_mask"].bool()
    return [text[mask] for text, mask in zip(embeds["prompt_embeds"], masks, strict=True)]


def _filled(length: int) -> int:
    return length + -length % TOKEN_MULTIPLE
