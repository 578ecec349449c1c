"""The parts of a text-to-image base: loading them, where they are, which of them get adapters."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn

from lorainit_diffusers.families.base import AdaptedModules, EvaluationMode
from lorainit_diffusers.families.pipelines import CLIP_ENCODERS, check_base, load_base
from lorainit_diffusers.families.pretrained import autocast, check_option_names
from lorainit_diffusers.ranges import check_step

if TYPE_CHECKING:
    from typing_extensions import Self

TEXT_ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


class _Parts:
    """Attributes that each family declares as fields of its own, in the order of its constructor."""

    vae: AutoencoderKL
    noise_scheduler: Any


@dataclass
class BaseParts(_Parts, EvaluationMode, ABC):
    """A base as its parts: the first of the four steps of `TextToImageFamily`, whose docstring has the attributes.

    What a family has is said by its class attributes; what differs in loading it, by `_from_index`, `_load_scheduler`
    and `check_scheduler_class`.
    """

    _: KW_ONLY
    train_text_encoder: bool = False
    offload: bool = False

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
    # Classes of a text encoder that differs between the family's bases: `model_index.json` says which of them it is.
    ENCODER_CLASSES: ClassVar[Mapping[str, tuple[type[nn.Module], ...]]] = {}
    # Text encoders that a base may do without.
    OPTIONAL_ENCODERS: ClassVar[frozenset[str]] = frozenset()
    # What the denoiser's class was called when older bases were saved.
    FORMER_NAMES: ClassVar[tuple[str, ...]] = ()
    # Options of `from_pretrained` beyond the common ones, by the scripts' names.
    OPTIONS: ClassVar[tuple[str, ...]] = ()
    # Formats that a LoRA is saved in: what the pipelines load (`diffusers`), kohya's names (`kohya`), or PEFT's
    # files (`peft`) where they load nothing.
    EXPORTS: ClassVar[tuple[str, ...]] = ("diffusers",)

    def __post_init__(self) -> None:
        check_step(self)
        if self.train_text_encoder and not self.trainable_text_encoders:
            raise ValueError(f"{self.NAME} has no text encoder that can be trained; leave out train_text_encoder")

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
        **options: Any,
    ) -> Self:
        """Load a base from a local folder, a hub name or a single file, frozen; only safetensors weights are read.

        Args:
            path: Folder in the diffusers layout, the name of a hub repository, or one `.safetensors` file.
            revision: Hub revision of the base.
            variant: Weight variant in the base's file names, such as `fp16`.
            vae_path: Folder, hub name or single file of another VAE to use with the base.
            cache_dir: Where downloads are kept; Hugging Face's own place by default.
            weight_dtype: Dtype of the denoiser and the text encoders. The VAE is in float32 whatever it is: SDXL's
                overflows to black images in half precision.
            device: Where the modules go; with `offload`, the VAE and frozen text encoders stay on the CPU.
            quantization_config: diffusers' quantisation of the denoiser, such as a `BitsAndBytesConfig` for 4 bits.
            **options: Attributes of the family by name, such as `train_text_encoder`, `caption_dropout` or `snr_gamma`;
                see its class.

        Raises:
            FileNotFoundError: When there is no such base or VAE, it has no safetensors weights, or the hub cannot be
                reached.
            TypeError: For an option that the family has not.
            ValueError: When the base is of another family or broken (weights that are missing, left over, of another
                shape or not finite), or an option is out of its range.
        """
        own = {option.name for option in fields(cls) if option.init and option.kw_only}
        check_option_names(cls, options, own | set(cls.OPTIONS))
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
                trained = options.get("train_text_encoder", False) and isinstance(module, CLIP_ENCODERS)
                offloaded = options.get("offload", False) and component != cls.DENOISER and not trained
                cast(nn.Module, module).requires_grad_(False).eval().to("cpu" if offloaded else device)
        return cast(Any, cls)(
            **base.parts,
            **{cls.DENOISER: base.denoiser},
            vae=base.vae,
            noise_scheduler=noise_scheduler,
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
            FileNotFoundError: When the folder, or a file that it needs, is missing.
            ValueError: When it holds another kind of pipeline (the message says which family is for it), or a file is
                broken.
        """
        check_base(cls, name)

    @classmethod
    def check_index_entries(cls, name: str, index: Mapping[str, Any]) -> None:
        """Refuse what else the family cannot train, by the base's `model_index.json`."""

    @classmethod
    @abstractmethod
    def check_scheduler_class(cls, name: str, scheduler: str) -> None:
        """Refuse the scheduler of another kind of noise."""

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
    def modules(self) -> dict[str, nn.Module]:
        """The denoiser, the VAE and the text encoders, by component name."""
        return {self.DENOISER: self.denoiser, "vae": self.vae, **self.text_encoders}

    @property
    def adapted(self) -> Mapping[str, nn.Module]:
        """The denoiser, and the CLIP text encoders when they are trained."""
        encoders = self.trainable_text_encoders if self.train_text_encoder else {}
        return AdaptedModules({self.DENOISER: self.denoiser, **encoders}, self)

    @property
    def heads(self) -> Mapping[str, nn.Module]:
        """None: these families train adapters only."""
        return {}

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

    def default_targets(self, component: str) -> list[str]:
        """`TARGETS` of the denoiser, `q_proj k_proj v_proj out_proj` of CLIP text encoders.

        A text encoder whose last layers have no part in the conditioning (`clip_skip`, and SDXL's first one) is
        adapted in the other layers only: the rest would get no gradient.

        Raises:
            ValueError: For a component that this family does not adapt.
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

    def _layers_left_out(self, component: str) -> int:
        """How many of the last layers of a text encoder have no part in the conditioning."""
        return 0

    def _check_channels(self, channels: int) -> None:
        """See that the VAE's latents are what the denoiser takes.

        Raises:
            ValueError: When they are not.
        """
        latent_channels = self._latent_channels
        if channels != latent_channels:
            raise ValueError(
                f"the {self.DENOISER} takes {channels} channels but the VAE makes {latent_channels}: an inpainting or "
                "image-conditioned base is not supported, take a text-to-image one (and a VAE that fits it)"
            )

    def _check_clip_skip(self, clip_skip: int | None, usual: int) -> None:
        """See that the CLIP encoders have so many layers before the hidden state that is usually taken.

        Raises:
            ValueError: When one has not.
        """
        for component in self.trainable_text_encoders:
            limit = self._num_layers(component) + usual
            if clip_skip is not None and not 0 <= clip_skip <= limit:
                raise ValueError(f"clip_skip {clip_skip} is not between 0 and {limit} for the {component}")

    def _num_layers(self, component: str) -> int:
        return int(cast(Any, self.text_encoders[component]).config.num_hidden_layers)

    @property
    def _latent_channels(self) -> int:
        """Channels of the VAE's latents."""
        return int(cast(Any, self.vae.config)["latent_channels"])

    @property
    def _latent_shift_and_scale(self) -> tuple[float | Tensor, float | Tensor]:
        """What is taken from the VAE's latents and what they are then multiplied by, by channel where it differs."""
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
