"""The base model: where it is, how it is held in memory, and its denoising loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from lorainit_diffusers.ranges import COUNT, NOT_NEGATIVE, STEP_RANGES
from lorainit_diffusers.training.choices import names_in
from lorainit_diffusers.training.options.fields import MayChange, Options, Place, option


@dataclass(frozen=True, kw_only=True)
class BaseOptions(Options):
    """The base model."""

    _argument_group_name = "model"

    pretrained_model_name_or_path: Annotated[str, Place("base")] = option(
        None, "folder or hub name (default: the bundled base, where there is one)"
    )
    revision: Annotated[str | None, Place("base", is_path=False)] = option(None, "hub revision")
    cache_dir: Annotated[str | None, MayChange("where downloads lie")] = option(
        None, "where downloads are kept (default: Hugging Face's own)"
    )


@dataclass(frozen=True, kw_only=True)
class VariantOptions(Options):
    """Which of the weights of a text-to-image base."""

    _argument_group_name = "model, weights"

    variant: str | None = option(None, "weight variant, such as fp16")


@dataclass(frozen=True, kw_only=True)
class ImageBaseOptions(Options):
    """How the parts of a text-to-image base are held."""

    _argument_group_name = "model, parts"

    pretrained_vae_model_name_or_path: Annotated[str | None, Place("VAE")] = option(
        None, "another VAE (default: the base's, in float32)"
    )
    enable_xformers_memory_efficient_attention: bool = option(
        False, "xformers' attention kernels in the denoiser; needs a CUDA device"
    )
    offload: Annotated[bool, MayChange("where frozen modules wait, not where they compute")] = option(
        False, "keep the VAE and frozen text encoders in CPU memory while unused"
    )


@dataclass(frozen=True, kw_only=True)
class LossOptions(Options):
    """The denoising loss."""

    _argument_group_name = "loss"

    snr_gamma: Annotated[float | None, replace(NOT_NEGATIVE, remedy="5 is usual, and 0 is off")] = option(
        None, "min-SNR weighting (5.0 is usual; default: off)"
    )
    noise_offset: Annotated[float, STEP_RANGES["noise_offset"]] = option(
        0.0, "offset of the noise, one a channel, as a share of its spread (default 0)"
    )
    prediction_type: str | None = option(
        None, "what the denoiser predicts (default: the base's)", choices=("epsilon", "v_prediction", "sample")
    )
    caption_dropout: Annotated[float, STEP_RANGES["caption_dropout"]] = option(
        0.0, "share of samples that train without their caption (default 0)"
    )
    clip_skip: Annotated[int | None, COUNT] = option(
        None, "text encoder layers to leave out at the end, as the pipelines count them"
    )


@dataclass(frozen=True, kw_only=True)
class FlowOptions(Options):
    """The loss of flow-matching bases, and the inputs that some of them take."""

    _argument_group_name = "diffusion transformers"

    weighting_scheme: str | None = option(
        None,
        "of the noise levels (default: the family's usual one)",
        choices=names_in("families/flow_matching.py", "WEIGHTING_SCHEMES"),
    )
    logit_mean: Annotated[float, STEP_RANGES["logit_mean"]] = option(0.0, "of logit_normal (default 0)")
    logit_std: Annotated[float, STEP_RANGES["logit_std"]] = option(1.0, "of logit_normal (default 1)")
    mode_scale: Annotated[float, STEP_RANGES["mode_scale"]] = option(1.29, "of mode (default 1.29)")
    guidance_scale: Annotated[float | None, STEP_RANGES["guidance_scale"]] = option(
        None, "input of FLUX.1 and FLUX.2 dev (default: the family's usual one, 3.5 and 4.0)"
    )
    max_sequence_length: Annotated[int | None, STEP_RANGES["max_sequence_length"]] = option(
        None, "tokens of the large text encoder (default: the family's usual number)"
    )


@dataclass(frozen=True, kw_only=True)
class QuantizationOptions(Options):
    """The base in fewer bits."""

    _argument_group_name = "quantization"

    quantization: str | None = option(None, "hold the transformer in 4 bits (bitsandbytes)", choices=("nf4",))


# The options that only some families have: what they are when nobody gives them.
FAMILY_OPTIONS = (
    *("snr_gamma", "noise_offset", "prediction_type", "clip_skip"),
    *("weighting_scheme", "logit_mean", "logit_std", "mode_scale", "guidance_scale", "max_sequence_length"),
)
