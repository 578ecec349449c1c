"""PixArt and DiT: transformers that undo the noise of a DDPM schedule, under T5's captions or under class labels.

    family = PixArtFamily.from_pretrained("path/or/hub-name")
    batch = {"pixel_values": images, **family.caption_inputs(captions)}
    family.loss(batch, torch.Generator().manual_seed(0)).backward()

Both predict a variance beside the noise (Nichol & Dhariwal 2021, arXiv:2102.09672). As in the pipelines, which drop it,
only the noise counts here, so the loss is that of diffusers' examples; see `families/ddpm.py`. Their pipelines have no
`load_lora_weights`: a LoRA is saved as a PEFT adapter, which `lorainit_diffusers.load_lora` and PEFT itself load.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, cast

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from diffusers.models.embeddings import LabelEmbedding
from diffusers.utils.import_utils import is_bs4_available, is_ftfy_available
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from lorainit_diffusers.families.ddpm import DenoisingFamily

# Tokens that each pipeline pads and cuts captions to.
MAX_SEQUENCE_LENGTH = {PixArtAlphaPipeline: 120, PixArtSigmaPipeline: 300}
# The layers that see the caption's tokens, by the endings of their names.
TEXT_LAYERS = ("attn2.to_k", "attn2.to_v", "caption_projection.linear_1", "caption_projection.linear_2")


@dataclass
class PixArtFamily(DenoisingFamily):
    """A PixArt-alpha or PixArt-Sigma base and its training loss; for the other attributes see `DenoisingFamily`.

    The columns of a batch are `input_ids` and `attention_mask`, or `prompt_embeds` and `prompt_attention_mask`; and the
    images. Captions are put into lower case and cleaned as the pipelines do it.

    Attributes:
        tokenizer: Of T5.
        text_encoder: T5; never trained.
        vae: Autoencoder, never trained.
        transformer: The denoiser. Where it takes them (PixArt-alpha at 1024 pixels), it is told the image's size in
            pixels and its height over its width.
        noise_scheduler: Gives `alphas_cumprod`, the number of timesteps and the prediction type.
        max_sequence_length: Tokens of a caption; None is 120 for PixArt-alpha and 300 for Sigma, as in the pipelines.
        pipeline_class: `PixArtAlphaPipeline` or `PixArtSigmaPipeline`, whichever the base is for.
    """

    tokenizer: PreTrainedTokenizerBase
    text_encoder: T5EncoderModel
    vae: AutoencoderKL
    transformer: PixArtTransformer2DModel
    noise_scheduler: DDPMScheduler
    _: KW_ONLY
    max_sequence_length: int | None = None
    pipeline_class: type[PixArtAlphaPipeline] | type[PixArtSigmaPipeline] = PixArtAlphaPipeline

    NAME: ClassVar[str] = "PixArt"
    PIPELINES: ClassVar[tuple[type[DiffusionPipeline], ...]] = (PixArtAlphaPipeline, PixArtSigmaPipeline)
    DENOISER: ClassVar[str] = "transformer"
    DENOISER_CLASS: ClassVar[type[nn.Module]] = PixArtTransformer2DModel
    FORMER_NAMES: ClassVar[tuple[str, ...]] = ("Transformer2DModel",)
    TARGETS: ClassVar[tuple[str, ...]] = (
        *("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
        *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
        *("ff.net.0.proj", "ff.net.2"),
    )
    TEXT_ENCODERS: ClassVar[Mapping[str, type[nn.Module]]] = {"text_encoder": T5EncoderModel}
    MASKED_ENCODERS: ClassVar[frozenset[str]] = frozenset({"text_encoder"})
    EMBEDS: ClassVar[tuple[str, ...]] = ("prompt_embeds", "prompt_attention_mask")
    OPTIONS: ClassVar[tuple[str, ...]] = (*DenoisingFamily.OPTIONS, "max_sequence_length")
    EXPORTS: ClassVar[tuple[str, ...]] = ("peft",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_channels(int(self.transformer.config["in_channels"]))
        if self.max_sequence_length is None:
            self.max_sequence_length = MAX_SEQUENCE_LENGTH[self.pipeline_class]

    @classmethod
    def _from_index(cls, index: Mapping[str, Any]) -> dict[str, Any]:
        is_sigma = index["_class_name"] == PixArtSigmaPipeline.__name__
        return {"pipeline_class": PixArtSigmaPipeline if is_sigma else PixArtAlphaPipeline}

    def pipeline(self) -> PixArtAlphaPipeline | PixArtSigmaPipeline:
        """A pipeline around the live modules, for samples, with DDIM on the base's schedule.

        Never call `.to(dtype=...)` on it: that would cast the adapters in training.
        """
        pipeline = self.pipeline_class(
            tokenizer=cast(Any, self.tokenizer),
            text_encoder=self.text_encoder,
            vae=self.vae,
            transformer=self.transformer,
            scheduler=self._ddim_scheduler(),
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _tokenized_texts(self, captions: Sequence[str]) -> list[str]:
        # the pipeline cleans as thoroughly as the packages that are there allow, and warns where we do not
        thoroughly = is_bs4_available() and is_ftfy_available()
        return cast(Any, self.pipeline())._text_preprocessing(list(captions), clean_caption=thoroughly)

    def _max_tokens(self, component: str) -> int:
        return int(self.max_sequence_length or 0)

    def _encode(self, columns: Mapping[str, Tensor], unskipped: Tensor | None) -> dict[str, Tensor]:
        mask = columns["attention_mask"]
        embeds = cast(Any, self.text_encoder)(columns["input_ids"], attention_mask=mask)[0]
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def _predict(
        self, latents: Tensor, timesteps: Tensor, embeds: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> Tensor:
        mask = embeds["prompt_attention_mask"]
        self.step.token_masks[self.DENOISER] = mask.bool()
        self.step.masked_layers[self.DENOISER] = TEXT_LAYERS
        size: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.transformer.use_additional_conditions:
            height, width = (side * self.vae_scale_factor for side in latents.shape[-2:])
            size = {
                "resolution": latents.new_tensor([height, width]).repeat(len(latents), 1),
                "aspect_ratio": latents.new_tensor([height / width]).repeat(len(latents), 1),
            }
        prediction = self.transformer(
            latents,
            encoder_hidden_states=embeds["prompt_embeds"],
            encoder_attention_mask=mask,
            timestep=cast(Any, timesteps),
            added_cond_kwargs=cast(Any, size),
            return_dict=False,
        )[0]
        return prediction[:, : latents.shape[1]]  # the noise without its variance

    def _sampling_inputs(
        self, embeds: Mapping[str, Tensor], no_caption: Mapping[str, Tensor], guidance_scale: float
    ) -> dict[str, Any]:
        inputs = super()._sampling_inputs(embeds, no_caption, guidance_scale)
        # the size is meant as it is said, and no caption is given by its embeddings instead of as a string
        return {**inputs, "negative_prompt": None, "use_resolution_binning": False}


@dataclass
class DiTFamily(DenoisingFamily):
    """A class-conditional DiT base and its training loss; for the other attributes see `DenoisingFamily`.

    A caption is the name of one of the base's classes, or its number; the empty one is no class. The columns of a batch
    are `class_labels`, (batch,) int64, and the images, which are square.

    The paper trains with a class dropout of 0.1 (Peebles & Xie 2023, arXiv:2212.09748), for guidance without a
    classifier: that is `caption_dropout` here. diffusers' transformer draws a dropout of its own in training mode, from
    the global generator and for each block another one; the family switches it off.

    Attributes:
        vae: Autoencoder, never trained.
        transformer: The denoiser.
        noise_scheduler: Gives `alphas_cumprod`, the number of timesteps and the prediction type.
        id2label: Names of the classes, by number; synonyms are separated by commas.
    """

    vae: AutoencoderKL
    transformer: DiTTransformer2DModel
    noise_scheduler: DDPMScheduler
    _: KW_ONLY
    id2label: Mapping[int, str] = field(default_factory=dict[int, str])

    NAME: ClassVar[str] = "DiT"
    PIPELINES: ClassVar[tuple[type[DiffusionPipeline], ...]] = (DiTPipeline,)
    DENOISER: ClassVar[str] = "transformer"
    DENOISER_CLASS: ClassVar[type[nn.Module]] = DiTTransformer2DModel
    FORMER_NAMES: ClassVar[tuple[str, ...]] = ("Transformer2DModel",)
    TARGETS: ClassVar[tuple[str, ...]] = (
        *("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
        *("ff.net.0.proj", "ff.net.2"),
    )
    TEXT_ENCODERS: ClassVar[Mapping[str, type[nn.Module]]] = {}
    EMBEDS: ClassVar[tuple[str, ...]] = ("class_labels",)
    EXPORTS: ClassVar[tuple[str, ...]] = ("peft",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_channels(int(self.transformer.config["in_channels"]))
        for module in self.transformer.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0
        # as the pipeline reads them: the last of two classes that share a name has it
        self._numbers = {
            name.strip(): int(number) for number, names in self.id2label.items() for name in (names, *names.split(","))
        }

    @classmethod
    def _from_index(cls, index: Mapping[str, Any]) -> dict[str, Any]:
        return {"id2label": {int(number): names for number, names in (index.get("id2label") or {}).items()}}

    def pipeline(self) -> DiTPipeline:
        """A pipeline around the live modules, with DDIM on the base's schedule.

        It decodes in the transformer's dtype: where that is not the VAE's, take `sample`. Never call `.to(dtype=...)`
        on it: that would cast the adapters in training.
        """
        pipeline = DiTPipeline(
            transformer=self.transformer,
            vae=self.vae,
            scheduler=self._ddim_scheduler(),
            id2label=dict(self.id2label),
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @property
    def caption_columns(self) -> list[str]:
        """The class labels: there is nothing to encode."""
        return list(self.EMBEDS)

    @property
    def no_class(self) -> int:
        """The label that stands for no class; those of the classes are below it."""
        return int(self.transformer.config["num_embeds_ada_norm"])

    def caption_inputs(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The column `class_labels`, (captions,) int64.

        Raises:
            ValueError: For a caption that is neither a class of the base nor the number of one.
        """
        return {"class_labels": torch.tensor([self._label(caption) for caption in captions], dtype=torch.int64)}

    def _label(self, caption: str) -> int:
        name = caption.strip()
        if not name:
            return self.no_class
        if name in self._numbers:
            return self._numbers[name]
        if name.isdecimal() and int(name) < self.no_class:
            return int(name)
        close = difflib.get_close_matches(name, self._numbers, n=3, cutoff=0.5)
        closest = f"the closest are {', '.join(map(repr, close))}; " if close else ""
        raise ValueError(
            f"{caption!r} is no class of this base: {closest}"
            f"give a name of id2label in its model_index.json, or a number from 0 to {self.no_class - 1}"
        )

    def example_prompt(self, prompt: str | None) -> str:
        """Source code of the pipeline's first argument: the list of one class label."""
        return repr([self._label(prompt) if prompt else 0])

    def release_text_encoders(self, prompts: Iterable[str]) -> None:
        """See that the prompts are classes: there is no text encoder to let go of.

        Raises:
            ValueError: For one that is none.
        """
        self.caption_inputs(list(prompts))

    def _encode(self, columns: Mapping[str, Tensor], unskipped: Tensor | None) -> dict[str, Tensor]:
        return dict(columns)

    def _predict(
        self, latents: Tensor, timesteps: Tensor, embeds: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> Tensor:
        height, width = (side * self.vae_scale_factor for side in latents.shape[-2:])
        if height != width:
            raise ValueError(
                f"DiT takes square images, got {height}x{width} pixels; crop them, without buckets of sizes"
            )
        prediction = self.transformer(
            latents,
            timestep=cast(Any, timesteps),
            class_labels=cast(Any, embeds["class_labels"]),
            return_dict=False,
        )[0]
        return prediction[:, : latents.shape[1]]  # the noise without its variance

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        resolution: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 4.0,
    ) -> list[Image.Image]:
        """Draw one image a class, each from its own seed, with the weights as they are now.

        The images are those of `DiTPipeline`, whose loop this is: it decodes in the transformer's dtype, whatever the
        VAE's, knows one size, and takes 1000 for no class in every base.

        Args:
            prompts: Names or numbers of classes.
            seeds: One seed for each.
            resolution: Side of the images in pixels; the base's own by default.
            num_inference_steps: Steps of the sampler.
            guidance_scale: Classifier-free guidance; none up to 1.

        Raises:
            ValueError: For a prompt that is no class.
        """
        side = (resolution or self.resolution) // self.vae_scale_factor
        labels = self.caption_inputs(prompts)["class_labels"].to(self.device)
        guided = guidance_scale > 1
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, self.no_class)])
        scheduler = self._ddim_scheduler()
        scheduler.set_timesteps(num_inference_steps)
        latents = randn_tensor(
            (len(prompts), int(self.transformer.config["in_channels"]), side, side),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            device=self.device,
            dtype=self.weight_dtype,
        )
        for timestep in scheduler.timesteps:
            model_input = torch.cat([latents, latents]) if guided else latents
            timesteps = timestep.to(self.device).expand(len(model_input))
            noise = self._predict(model_input, timesteps, {"class_labels": labels}, {})
            if guided:
                conditional, unconditional = noise.chunk(2)
                noise = unconditional + guidance_scale * (conditional - unconditional)
            latents = scheduler.step(noise, timestep, latents).prev_sample
        with self._on_device(self.vae):
            return self._decode(latents)
