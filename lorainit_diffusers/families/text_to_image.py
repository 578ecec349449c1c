"""What the text-to-image families share: a denoiser of VAE latents under text embeddings, UNet or transformer.

A training step is one template, `TextToImageFamily.loss`: latents, noise, a level of noise, captions, prediction, mean
square. What differs between families is filled in at three places: how noise is added and what the target is
(`_add_noise`: `families/ddpm.py` and `families/flow_matching.py`), how captions become conditioning (`_encode`), and
how the denoiser is called (`_predict`).
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from lorainit_diffusers.families.base import AdaptedModules, EvaluationMode, StepRecord, UniformDraws
from lorainit_diffusers.families.pipelines import CLIP_ENCODERS, SCRIPTS, check_base, load_base
from lorainit_diffusers.families.pretrained import autocast
from lorainit_diffusers.ranges import check_step

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CLIP_ENCODERS", "SCRIPTS", "NoisyLatents", "TextToImageFamily", "hidden_state", "replace", "token_mask"]

TEXT_ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass
class NoisyLatents:
    """One batch as the denoiser sees it, and what it should say.

    Attributes:
        latents: (batch, channels, height, width) with noise.
        timesteps: (batch,) of the noise schedule, as the pipelines count them.
        target: what the denoiser should predict, of the latents' shape.
        weights: (batch,) of the samples' losses; None is 1 for all.
    """

    latents: Tensor
    timesteps: Tensor
    target: Tensor
    weights: Tensor | None = None


class TokenCounts(NamedTuple):
    """How long captions are for a text encoder.

    Attributes:
        counts: tokens of each caption.
        limit: how many tokens the encoder gets; what is beyond is cut.
    """

    counts: list[int]
    limit: int


class _Parts:
    """Attributes that each family declares as fields of its own, in the order of its constructor."""

    vae: AutoencoderKL
    noise_scheduler: Any


@dataclass
class TextToImageFamily(_Parts, EvaluationMode, ABC):
    """A base and its training loss. Its modules are taken as they are; `from_pretrained` freezes what it loads.

    A family adds, as fields: its tokenizers and text encoders, `vae`, the denoiser and `noise_scheduler`.

    Attributes:
        train_text_encoder: whether the CLIP text encoders get LoRA and gradients too.
        caption_dropout: probability that a sample trains without its caption, on what the pipeline takes for none.
        prior_loss_weight: weight of the class images (`is_class`) of DreamBooth's prior preservation (Ruiz et al. 2023,
            arXiv:2208.12242, equation 2).
        offload: keep the VAE and frozen text encoders on the CPU, and on the denoiser's device only while they are
            used.
        step: what the latest `loss` drew.
    """

    _: KW_ONLY
    train_text_encoder: bool = False
    caption_dropout: float = 0.0
    prior_loss_weight: float = 1.0
    offload: bool = False
    step: StepRecord = field(default_factory=StepRecord)

    NAME: ClassVar[str]
    # The pipelines whose bases this family takes; the first is the one that model cards name.
    PIPELINES: ClassVar[tuple[type[DiffusionPipeline], ...]]
    # Field name of the denoiser, which is also its component's name, and its class.
    DENOISER: ClassVar[str]
    DENOISER_CLASS: ClassVar[type[nn.Module]]
    TARGETS: ClassVar[tuple[str, ...]]
    VAE_CLASS: ClassVar[Any] = AutoencoderKL
    # Field name -> class of the text encoders; their tokenizers and token ids have the same suffix. Only those of CLIP
    # are ever trained.
    TEXT_ENCODERS: ClassVar[Mapping[str, type[nn.Module]]]
    # Text encoders that a base may do without.
    OPTIONAL_ENCODERS: ClassVar[frozenset[str]] = frozenset()
    # What the denoiser's class was called when older bases were saved.
    FORMER_NAMES: ClassVar[tuple[str, ...]] = ()
    # Encoders whose attention mask is a column of the batch, too.
    MASKED_ENCODERS: ClassVar[frozenset[str]] = frozenset()
    # Columns of a batch that stand for the captions once they are encoded.
    EMBEDS: ClassVar[tuple[str, ...]]
    # Options of `from_pretrained` beyond the common ones, by the scripts' names.
    OPTIONS: ClassVar[tuple[str, ...]] = ()
    # Formats that a LoRA is saved in: what the pipelines load (`diffusers`), kohya's names (`kohya`), or PEFT's
    # files (`peft`) where they load nothing.
    EXPORTS: ClassVar[tuple[str, ...]] = ("diffusers",)

    def __post_init__(self) -> None:
        check_step(self)
        if self.train_text_encoder and not self.trainable_text_encoders:
            raise ValueError(f"{self.NAME} has no text encoder that can be trained; leave out train_text_encoder")
        self._uniform = UniformDraws()
        self._no_caption: dict[str, Tensor] | None = None
        # what `sample` needs once the text encoders are let go; None before
        self._kept_prompts: dict[str, dict[str, Tensor]] | None = None

    # ---- loading

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        variant: str | None = None,
        vae_path: str | os.PathLike[str] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        weight_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        quantization_config: Any = None,
        train_text_encoder: bool = False,
        caption_dropout: float = 0.0,
        prior_loss_weight: float = 1.0,
        offload: bool = False,
        **options: Any,
    ) -> Self:
        """Load a base from a local folder, a hub name or a single file, frozen; only safetensors weights are read.

        Args:
            path: folder in the diffusers layout, the name of a hub repository, or one `.safetensors` file.
            revision: hub revision of the base.
            variant: weight variant in the base's file names, such as `fp16`.
            vae_path: folder, hub name or single file of another VAE to use with the base.
            cache_dir: where downloads are kept; Hugging Face's own place by default.
            weight_dtype: dtype of the denoiser and the text encoders. The VAE is in float32 whatever it is: SDXL's
                overflows to black images in half precision.
            device: where the modules go; with `offload`, the VAE and frozen text encoders stay on the CPU.
            quantization_config: diffusers' quantisation of the denoiser, such as a `BitsAndBytesConfig` for 4 bits.
            train_text_encoder: see the class, as for the remaining arguments.
            caption_dropout: see the class.
            prior_loss_weight: see the class.
            offload: see the class.
            **options: the family's own attributes, such as `snr_gamma`.

        Raises:
            FileNotFoundError: when there is no such base or VAE, it has no safetensors weights, or the hub cannot be
                reached.
            ValueError: when the base is of another family or broken (weights that are missing, left over, of another
                shape or not finite), or an option is out of its range.
        """
        base = load_base(
            cls,
            os.fspath(path),
            revision=revision,
            variant=variant,
            vae_path=vae_path,
            cache_dir=cache_dir,
            weight_dtype=weight_dtype,
            quantization_config=quantization_config,
        )
        noise_scheduler = cls._load_scheduler(base.scheduler, options)
        for component, module in {cls.DENOISER: base.denoiser, "vae": base.vae, **base.parts}.items():
            if isinstance(module, nn.Module):
                trained = train_text_encoder and isinstance(module, CLIP_ENCODERS)
                offloaded = offload and component != cls.DENOISER and not trained
                cast(nn.Module, module).requires_grad_(False).eval().to("cpu" if offloaded else device)
        return cast(Any, cls)(
            **base.parts,
            **{cls.DENOISER: base.denoiser},
            vae=base.vae,
            noise_scheduler=noise_scheduler,
            train_text_encoder=train_text_encoder,
            caption_dropout=caption_dropout,
            prior_loss_weight=prior_loss_weight,
            offload=offload,
            **cls._from_index(base.index),
            **options,
        )

    @classmethod
    def _from_index(cls, index: Mapping[str, Any]) -> dict[str, Any]:
        """Fields that the base's `model_index.json` decides."""
        return {}

    @classmethod
    @abstractmethod
    def _load_scheduler(cls, config: Mapping[str, Any], options: dict[str, Any]) -> Any:
        """The noise schedule of training, of the base's configuration; may take its own from `options`."""

    @classmethod
    def check_base(cls, name: str) -> None:
        """See that a base given as a local folder or file exists, is whole, and is one of this family.

        A name that can only be a hub repository's is left to the loader.

        Raises:
            FileNotFoundError: when the folder, or a file that it needs, is missing.
            ValueError: when it holds another kind of pipeline (the message says which script is for it), or a file is
                broken.
        """
        check_base(cls, name)

    @classmethod
    @abstractmethod
    def check_scheduler_class(cls, name: str, scheduler: str) -> None:
        """Refuse the scheduler of another kind of noise."""

    # ---- what a family adds

    @abstractmethod
    def pipeline(self) -> DiffusionPipeline:
        """A pipeline around the live modules, for samples.

        Never call `.to(dtype=...)` on it: that would cast the adapters in training.
        """

    @abstractmethod
    def _add_noise(self, latents: Tensor, noise: Tensor, uniform: Tensor) -> NoisyLatents:
        """Noise the latents.

        Args:
            latents: (batch, channels, height, width) float32.
            noise: of the same shape, standard normal.
            uniform: (batch,) float64 in [0, 1) on the CPU, from which the levels of noise follow.
        """

    @abstractmethod
    def _encode(self, columns: Mapping[str, Tensor], unskipped: Tensor | None) -> dict[str, Tensor]:
        """Run the text encoders on the columns of `caption_inputs`, on their device: `EMBEDS` of the captions.

        Args:
            columns: token ids and attention masks.
            unskipped: (batch,) boolean, the samples that train without their caption; None is none.
        """

    @abstractmethod
    def _predict(
        self, latents: Tensor, timesteps: Tensor, embeds: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> Tensor:
        """The denoiser's prediction, of the latents' shape.

        Args:
            latents: noisy, in the weight dtype.
            timesteps: (batch,).
            embeds: `EMBEDS`.
            batch: as `loss` got it.
        """

    def _noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """The noise of a training step."""
        return self._randn(shape, generator)

    def _max_tokens(self, component: str) -> int:
        """How many tokens a caption is padded and cut to for this text encoder."""
        return int(self.tokenizers[component].model_max_length)

    def _layers_left_out(self, component: str) -> int:
        """How many of the last layers of a text encoder have no part in the conditioning."""
        return 0

    def _sampling_inputs(
        self, embeds: Mapping[str, Tensor], no_caption: Mapping[str, Tensor], guidance_scale: float
    ) -> dict[str, Any]:
        """The pipeline's keyword arguments for this conditioning."""
        negative = {f"negative_{name}": values for name, values in no_caption.items()}
        return {**embeds, **negative, "guidance_scale": guidance_scale}

    def _sampled_latents(self, output: Tensor, height: int, width: int) -> Tensor:
        """(batch, channels, height, width) of what the pipeline calls latents; `height` and `width` in pixels."""
        return output

    # ---- what the scripts ask

    @property
    def denoiser(self) -> Any:
        """The UNet or the transformer."""
        return getattr(self, self.DENOISER)

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """The text encoders that the base has and that were not let go, by component name."""
        found = {component: getattr(self, component) for component in self.TEXT_ENCODERS}
        return {component: module for component, module in found.items() if module is not None}

    @property
    def trainable_text_encoders(self) -> dict[str, nn.Module]:
        """Those of them that can get LoRA: CLIP's, whose adapters the pipelines load."""
        return {
            component: module
            for component, module in self.text_encoders.items()
            if self.TEXT_ENCODERS[component] in CLIP_ENCODERS
        }

    @property
    def tokenizers(self) -> dict[str, Any]:
        """The tokenizers, by the component name of their text encoder."""
        found = {name: getattr(self, name.replace("text_encoder", "tokenizer")) for name in self.TEXT_ENCODERS}
        return {component: tokenizer for component, tokenizer in found.items() if tokenizer is not None}

    @property
    def caption_columns(self) -> list[str]:
        """Columns of a batch that hold the captions before they are encoded."""
        columns: list[str] = []
        for component in self.tokenizers:
            suffix = component.removeprefix("text_encoder")
            columns.append(f"input_ids{suffix}")
            if component in self.MASKED_ENCODERS:
                columns.append(f"attention_mask{suffix}")
        return columns

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The denoiser, the VAE and the text encoders, by component name."""
        return {self.DENOISER: self.denoiser, "vae": self.vae, **self.text_encoders}

    @property
    def adapted(self) -> Mapping[str, nn.Module]:
        """The denoiser, and the CLIP text encoders when they are trained."""
        encoders = self.trainable_text_encoders if self.train_text_encoder else {}
        return AdaptedModules({self.DENOISER: self.denoiser, **encoders}, self)

    @property
    def _first_weight(self) -> Tensor:
        # the first one is no LoRA's, which come after the weight that they adapt; a quantised one is no floating type
        return next(weight for weight in self.denoiser.parameters() if weight.is_floating_point())

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype of the denoiser's frozen weights."""
        return self._first_weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the denoiser."""
        return self._first_weight.device

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent."""
        return 2 ** (len(cast(Any, self.vae.config)["block_out_channels"]) - 1)

    @property
    def resolution_multiple(self) -> int:
        """Image sides must be a multiple of it: pixels per latent, times latents per patch."""
        return self.vae_scale_factor * int(self.denoiser.config.get("patch_size") or 1)

    @property
    def resolution(self) -> int:
        """The image side in pixels that the denoiser was trained at."""
        sample_size = self.denoiser.config["sample_size"]
        return (sample_size if isinstance(sample_size, int) else min(sample_size)) * self.vae_scale_factor

    def example_prompt(self, prompt: str | None) -> str:
        """Source code of the pipeline's first argument, for model cards."""
        return repr(prompt or "a prompt in the style of the captions")

    @property
    def heads(self) -> Mapping[str, nn.Module]:
        """None: these families train adapters only."""
        return {}

    def default_targets(self, component: str) -> list[str]:
        """`TARGETS` of the denoiser, `q_proj k_proj v_proj out_proj` of CLIP text encoders.

        A text encoder whose last layers have no part in the conditioning (`clip_skip`, and SDXL's first one) is
        adapted in the other layers only: the rest would get no gradient.

        Raises:
            ValueError: for a component that this family does not adapt.
        """
        if component == self.DENOISER:
            return list(self.TARGETS)
        if component not in self.trainable_text_encoders:
            known = " and ".join([self.DENOISER, *self.trainable_text_encoders])
            raise ValueError(f"{self.NAME} has no component {component!r}; it has {known}")
        left_out = self._layers_left_out(component)
        if left_out == 0:
            return list(TEXT_ENCODER_TARGETS)
        layers = range(self._num_layers(component) - left_out)
        return [f"layers.{layer}.self_attn.{target}" for layer in layers for target in TEXT_ENCODER_TARGETS]

    def stratified_timesteps(self, num_samples: int, generator: torch.Generator) -> AbstractContextManager[None]:
        """Inside it, `loss` draws each of `num_samples` timesteps from its own quantile bin, in random order."""
        return self._uniform.stratified(num_samples, generator)

    def caption_inputs(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The columns of a batch that hold the captions: token ids (captions, tokens) for each text encoder.

        They are padded and cut as the pipeline does.
        """
        return self._tokenize(self._tokenized_texts(captions))

    def _tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        columns: dict[str, Tensor] = {}
        for component, tokenizer in self.tokenizers.items():
            tokens = tokenizer(
                list(texts),
                padding="max_length",
                truncation=True,
                max_length=self._max_tokens(component),
                return_tensors="pt",
            )
            suffix = component.removeprefix("text_encoder")
            columns[f"input_ids{suffix}"] = tokens["input_ids"]
            if component in self.MASKED_ENCODERS:
                columns[f"attention_mask{suffix}"] = tokens["attention_mask"]
        return columns

    def caption_lengths(self, captions: Sequence[str]) -> dict[str, TokenCounts]:
        """Tokens of each caption for each text encoder, before `caption_inputs` cuts them.

        The encoder's own tokens (start, end) count, as they do for the limit.
        """
        found: dict[str, TokenCounts] = {}
        for component, tokenizer in self.tokenizers.items():
            tokens = tokenizer(self._tokenized_texts(captions), padding=False, truncation=False, verbose=False)
            counts = [len(ids) for ids in tokens["input_ids"]]
            found[component] = TokenCounts(counts, self._max_tokens(component))
        return found

    def _tokenized_texts(self, captions: Sequence[str]) -> list[str]:
        """The texts that the tokenizers get for captions, as the pipeline prepares them."""
        return list(captions)

    @torch.no_grad()
    def embed_captions(self, captions: Sequence[str], batch_size: int = 16) -> dict[str, Tensor]:
        """Encode captions once: columns that stand in a batch instead of `caption_inputs`.

        Args:
            captions: the captions.
            batch_size: how many are encoded at once.

        Returns:
            `EMBEDS` of all captions, on the CPU in the weight dtype.

        Raises:
            ValueError: when the text encoders are trained: the embeddings would be those of the untrained ones.
        """
        if self.train_text_encoder:
            raise ValueError(
                "captions cannot be encoded once while the text encoder is trained: leave out train_text_encoder or "
                "pre_compute_text_embeddings"
            )
        chunks: list[dict[str, Tensor]] = []
        with self._on_device(*self.text_encoders.values()), self._autocast():
            for start in range(0, len(captions), batch_size):
                columns = self._to_device(self.caption_inputs(captions[start : start + batch_size]))
                chunks.append(self._cast(self._encode(columns, None)))
        return {name: torch.cat([chunk[name].cpu() for chunk in chunks]) for name in self.EMBEDS}

    def release_text_encoders(self, prompts: Iterable[str]) -> None:
        """Let go of the text encoders: they leave memory, and captions can only come encoded from now on.

        Args:
            prompts: those that `sample` will be asked for; they are encoded now and kept.

        Raises:
            ValueError: when the text encoders are trained.
        """
        unique = list(dict.fromkeys(prompts))
        embeds = self.embed_captions(unique) if unique else {}
        self._look_up_no_caption()
        self._kept_prompts = {
            prompt: {name: values[row : row + 1] for name, values in embeds.items()}
            for row, prompt in enumerate(unique)
        }
        for component in self.TEXT_ENCODERS:
            setattr(self, component, None)

    @torch.no_grad()
    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the images' latents, scaled as the denoiser sees them.

        Args:
            pixel_values: (batch, 3, height, width) in [-1, 1].

        Returns:
            Two (batch, channels, height, width) float32 tensors in latent pixels, on the family's device.
        """
        with self._on_device(self.vae), torch.autocast(self.device.type, enabled=False):
            posterior = self.vae.encode(pixel_values.to(self.device, self.vae.dtype)).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
        shift, factor = self._latent_shift_and_scale
        return (posterior.mean.float() - shift) * factor, posterior.std.float() * factor

    # ---- the training step

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        """The denoising loss of diffusers' examples: a scalar, float32.

        Args:
            batch: the captions, as `caption_inputs` or `embed_captions` gives them, and either `pixel_values`
                (batch, 3, height, width) in [-1, 1] or `latents` (batch, channels, height, width), already scaled.
                Optionally `is_class`, (batch,) boolean: the images of the class in DreamBooth's prior preservation; the
                loss is then the mean over the other images plus `prior_loss_weight` times the mean over these, each
                zero when the batch has none of them.
            generator: CPU generator from which the posterior sample, the noise, the timesteps and the caption dropout
                are drawn, in this order.

        Raises:
            ValueError: when the batch lacks one of its parts.
        """
        columns = self.caption_columns
        # no text encoder, no columns: ids are then of no use
        encoded, tokenized = (bool(names) and all(name in batch for name in names) for names in (self.EMBEDS, columns))
        if not (encoded or tokenized) or not ("latents" in batch or "pixel_values" in batch):
            captions = " or ".join(dict.fromkeys(" and ".join(names) for names in (columns, self.EMBEDS) if names))
            remedy = (
                " (the family has no text encoder, as in a script with --pre_compute_text_embeddings: pass the "
                "embeddings, or initialise the module with a loss_fn instead of the family)"
            )
            without = "" if columns else remedy
            raise ValueError(
                f"a batch needs {captions}, and pixel_values or latents, got {', '.join(batch) or 'nothing'}{without}"
            )
        if "latents" in batch:
            latents = batch["latents"].to(self.device, torch.float32)
        else:
            mean, std = self.encode_images(batch["pixel_values"])
            latents = mean + std * self._randn(mean.shape, generator)
        noise = self._noise(latents.shape, generator)
        noisy = self._add_noise(latents, noise, self._uniform.draw(len(latents), generator))
        dropped = None
        if self.caption_dropout and not self.evaluates:
            dropped = (torch.rand(len(latents), generator=generator) < self.caption_dropout).to(self.device)

        self.step = StepRecord(timesteps=noisy.timesteps)
        embeds = self._look_up(batch, dropped) if encoded else self._encode_batch(batch, dropped)
        with self._autocast():
            prediction = self._predict(noisy.latents.to(self.weight_dtype), noisy.timesteps, embeds, batch).float()
        losses = F.mse_loss(prediction, noisy.target.float(), reduction="none").mean(dim=(1, 2, 3))
        if noisy.weights is not None:
            losses = losses * noisy.weights
        if "is_class" not in batch:
            return losses.mean()
        is_class = batch["is_class"].to(self.device, torch.bool)
        num_class = is_class.sum()
        # weights instead of selections: a batch may have one kind only, and nothing waits for the device
        instance_weight = 1.0 / (len(losses) - num_class).clamp(min=1)
        class_weight = self.prior_loss_weight / num_class.clamp(min=1)
        return (losses * torch.where(is_class, class_weight, instance_weight)).sum()

    def loss_weight(self, batch: Mapping[str, Tensor]) -> float:
        """The images of the batch, which the loss is the mean over.

        Under prior preservation it is a mean over each kind of images: batches of other proportions of the two than
        their neighbours' cannot be weighted by one number, and none is made here.
        """
        return float(len(batch["latents"] if "latents" in batch else batch["pixel_values"]))

    # ---- samples

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        resolution: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 7.5,
    ) -> list[Image.Image]:
        """Draw one image a prompt, each from its own seed, with the weights as they are now.

        Puts no module into evaluation mode: the caller does. The prompts are encoded as `loss` does it, `clip_skip`
        included, and the latents are decoded in the VAE's dtype, whatever that of the denoiser is.

        Args:
            prompts: the prompts.
            seeds: one seed for each.
            resolution: side of the images in pixels; the base's own by default.
            num_inference_steps: steps of the sampler.
            guidance_scale: classifier-free guidance, or the guidance that the denoiser takes as an input (Flux).

        Raises:
            ValueError: for a prompt that was not kept when the text encoders were let go.
        """
        embeds, no_caption = self._embed_prompts(prompts)
        pipeline: Any = self.pipeline()
        for component in self.TEXT_ENCODERS:  # not by the pipeline: that would run offloaded encoders where they are
            setattr(pipeline, component, None)
        side = resolution or self.resolution
        with self._on_device(self.vae):
            output = pipeline(
                **self._sampling_inputs(embeds, no_caption, guidance_scale),
                height=side,
                width=side,
                num_inference_steps=num_inference_steps,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="latent",
            ).images
            return self._decode(self._sampled_latents(output, side, side))

    def _embed_prompts(self, prompts: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`EMBEDS` of prompts and of no caption, on the device."""
        if self._kept_prompts is not None:
            unknown = [prompt for prompt in prompts if prompt not in self._kept_prompts]
            if unknown:
                raise ValueError(f"prompt {unknown[0]!r} was not encoded before the text encoders were let go")
            kept = [self._kept_prompts[prompt] for prompt in prompts]
            embeds = {name: torch.cat([entry[name] for entry in kept]).to(self.device) for name in self.EMBEDS}
            no_caption = {
                name: values.expand(len(prompts), *values.shape[1:])
                for name, values in self._look_up_no_caption().items()
            }
            return embeds, no_caption
        # outside autocast, as the pipelines do it
        with self._on_device(*self.text_encoders.values()):
            encoded = self._encode(self._to_device(self.caption_inputs(prompts)), None)
            no_caption = self._encode_no_caption(len(prompts))
        return self._cast(encoded), self._cast(no_caption)

    def _decode(self, latents: Tensor) -> list[Image.Image]:
        """Images of scaled latents, in the VAE's dtype."""
        shift, factor = self._latent_shift_and_scale
        decoded = cast(Any, self.vae).decode(latents.to(self.vae.dtype) / factor + shift, return_dict=False)[0]
        pixels = (decoded.float() / 2 + 0.5).clamp(0, 1) * 255
        arrays = pixels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(image) for image in arrays]

    # ---- captions

    def _encode_batch(self, batch: Mapping[str, Tensor], dropped: Tensor | None) -> dict[str, Tensor]:
        """The conditioning from token ids; records which tokens are padding."""
        columns = self._to_device({column: batch[column] for column in self.caption_columns})
        if dropped is not None:
            columns = self._drop_captions(columns, dropped)
        for component in self.trainable_text_encoders:
            input_ids = columns[f"input_ids{component.removeprefix('text_encoder')}"]
            end_token_id = cast(int, self.tokenizers[component].eos_token_id)
            self.step.token_masks[component] = token_mask(input_ids, end_token_id)
        trained = torch.is_grad_enabled() and self.train_text_encoder
        with self._on_device(*self.text_encoders.values()), self._autocast(), torch.set_grad_enabled(trained):
            return self._cast(self._encode(columns, dropped))

    def _drop_captions(self, columns: Mapping[str, Tensor], dropped: Tensor) -> dict[str, Tensor]:
        """The columns of `caption_inputs` with the empty caption in the samples of `dropped`."""
        empty = self._to_device(self._no_caption_inputs(1))
        return {name: torch.where(dropped[:, None], empty[name], values) for name, values in columns.items()}

    def _look_up(self, batch: Mapping[str, Tensor], dropped: Tensor | None) -> dict[str, Tensor]:
        """The conditioning from `embed_captions`."""
        embeds = self._cast({name: batch[name].to(self.device) for name in self.EMBEDS})
        return embeds if dropped is None else replace(embeds, dropped, self._look_up_no_caption())

    def _look_up_no_caption(self) -> dict[str, Tensor]:
        if self._no_caption is None:
            with torch.no_grad(), self._on_device(*self.text_encoders.values()), self._autocast():
                self._no_caption = self._cast(self._encode_no_caption(1))
        return self._no_caption

    def _no_caption_inputs(self, count: int) -> dict[str, Tensor]:
        """`caption_inputs` of what the pipeline takes for no caption."""
        return self.caption_inputs([""] * count)

    def _encode_no_caption(self, count: int) -> dict[str, Tensor]:
        """What the pipeline takes for no caption: the empty one, without `clip_skip`."""
        columns = self._to_device(self._no_caption_inputs(count))
        return self._encode(columns, torch.ones(count, dtype=torch.bool, device=self.device))

    def _check_channels(self, channels: int) -> None:
        """See that the VAE's latents are what the denoiser takes.

        Raises:
            ValueError: when they are not.
        """
        latent_channels = int(cast(Any, self.vae.config)["latent_channels"])
        if channels != latent_channels:
            raise ValueError(
                f"the {self.DENOISER} takes {channels} channels but the VAE makes {latent_channels}: an inpainting or "
                "image-conditioned base is not supported, take a text-to-image one (and a VAE that fits it)"
            )

    def _check_clip_skip(self, clip_skip: int | None, usual: int) -> None:
        """See that the CLIP encoders have so many layers before the hidden state that is usually taken.

        Raises:
            ValueError: when one has not.
        """
        for component in self.trainable_text_encoders:
            limit = self._num_layers(component) + usual
            if clip_skip is not None and not 0 <= clip_skip <= limit:
                raise ValueError(f"clip_skip {clip_skip} is not between 0 and {limit} for the {component}")

    def _num_layers(self, component: str) -> int:
        return int(cast(Any, self.text_encoders[component]).config.num_hidden_layers)

    # ---- small parts

    @property
    def _latent_shift_and_scale(self) -> tuple[float, float]:
        config = cast(Any, self.vae.config)
        return float(config.get("shift_factor") or 0.0), float(config["scaling_factor"])

    @contextmanager
    def _on_device(self, *modules: nn.Module) -> Generator[None, None, None]:
        """Hold the offloaded ones of these modules on the denoiser's device inside the block."""
        adapted = [id(module) for module in self.adapted.values()]
        moved = [module for module in modules if self.offload and id(module) not in adapted]
        try:
            for module in moved:
                module.to(self.device)
            yield
        finally:
            for module in moved:
                module.to("cpu")

    def _autocast(self) -> torch.autocast:
        return autocast(self.device, self.weight_dtype)

    def _to_device(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: values.to(self.device) for name, values in columns.items()}

    def _cast(self, embeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Embeddings in the weight dtype; masks and labels as they are."""
        dtype = self.weight_dtype
        return {name: values.to(dtype) if values.is_floating_point() else values for name, values in embeds.items()}

    def _randn(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return torch.randn(tuple(shape), generator=generator).to(self.device)


def hidden_state(output: Any, usual: int, clip_skip: int | None, unskipped: Tensor | None) -> Tensor:
    """The hidden state of a text encoder that conditions the denoiser: (batch, tokens, width).

    Args:
        output: of the encoder, with `hidden_states`.
        usual: index of the one that is taken without `clip_skip`.
        clip_skip: how many layers further to the front; None is the usual one.
        unskipped: (batch,) boolean, the samples that it is not applied to; None applies it to all.
    """
    hidden: Tensor = output.hidden_states[usual]
    if clip_skip is None:
        return hidden
    skipped: Tensor = output.hidden_states[usual - clip_skip]
    return skipped if unskipped is None else torch.where(unskipped[:, None, None], hidden, skipped)


def token_mask(input_ids: Tensor, end_token_id: int) -> Tensor:
    """Which tokens are not padding: boolean (batch, tokens), True up to and including the first end token.

    CLIP pads with its end token, so the padding cannot be told from the ids alone.
    """
    is_end = torch.eq(input_ids, end_token_id)
    return is_end.cumsum(dim=1) - is_end.long() == 0


def replace(embeds: Mapping[str, Tensor], dropped: Tensor, other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`other`, (1, ...), in the samples of the (batch,) mask `dropped`, and `embeds` in the others."""
    return {
        name: torch.where(dropped.view(-1, *(1,) * (values.ndim - 1)), other[name], values)
        for name, values in embeds.items()
    }
