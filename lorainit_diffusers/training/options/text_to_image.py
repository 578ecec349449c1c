"""The options of the scripts that train a LoRA on a text-to-image base."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from lorainit_diffusers.training.bundled import BUNDLED_BASES, BUNDLED_DATA, bundled
from lorainit_diffusers.training.choices import names_in
from lorainit_diffusers.training.options.checks import (
    TrainOptions,
    check_adapter_options,
    check_run_options,
    has_cuda,
    require_package,
)
from lorainit_diffusers.training.options.data import DatasetOptions, ImageDataOptions, PriorOptions
from lorainit_diffusers.training.options.family import AUTO, settled_family
from lorainit_diffusers.training.options.fields import Options, given, option
from lorainit_diffusers.training.options.initialisation import TextEncoderOptions, TextEncoderRateOptions
from lorainit_diffusers.training.options.model import (
    BaseOptions,
    FlowOptions,
    ImageBaseOptions,
    LossOptions,
    QuantizationOptions,
    VariantOptions,
)
from lorainit_diffusers.training.options.run import SampleOptions

# The families whose denoiser is a transformer, the one with a bundled base first.
TRANSFORMER_FAMILIES = tuple(
    sorted(
        (name for name in names_in("families/__init__.py", "TEXT_TO_IMAGE_FAMILIES") if name not in ("sd", "sdxl")),
        key=lambda name: name != "sd3",
    )
)


@dataclass(frozen=True, kw_only=True)
class ImageTaskOptions(BaseOptions, VariantOptions, TextEncoderOptions, DatasetOptions, LossOptions):
    """A text-to-image base with its data: what a training and a comparison have in common."""


@dataclass(frozen=True, kw_only=True)
class TextToImageOptions(
    ImageTaskOptions,
    ImageBaseOptions,
    TextEncoderRateOptions,
    ImageDataOptions,
    PriorOptions,
    SampleOptions,
    TrainOptions,
):
    """What every script has that trains a text-to-image base; `resolution` is settled once the base is loaded."""


@dataclass(frozen=True, kw_only=True)
class StableDiffusionOptions(TextToImageOptions):
    """Options of `train_sd_lora.py`."""

    FAMILIES = ("sd",)


@dataclass(frozen=True, kw_only=True)
class StableDiffusionXLOptions(TextToImageOptions):
    """Options of `train_sdxl_lora.py`."""

    FAMILIES = ("sdxl",)


@dataclass(frozen=True, kw_only=True)
class FamilyOptions(Options):
    """Which family of diffusion transformers the base is of."""

    _argument_group_name = "family"

    family: str = option(
        AUTO, "what the base is (default: what its model_index.json says)", choices=(AUTO, *TRANSFORMER_FAMILIES)
    )


@dataclass(frozen=True, kw_only=True)
class TransformerOptions(FamilyOptions, TextToImageOptions, FlowOptions, QuantizationOptions):
    """Options of `train_dit_lora.py`."""

    FAMILIES = TRANSFORMER_FAMILIES

    @property
    def family_name(self) -> str:
        """What `--family` says, or where it leaves that open the base."""
        return settled_family(self.family, given(self.pretrained_model_name_or_path), self.revision)


AnyOptions = TypeVar("AnyOptions", bound=TextToImageOptions)


def resolve_text_to_image(options: AnyOptions) -> AnyOptions:
    """Fill in what depends on other options, and find what cannot work before anything is loaded.

    Raises:
        ValueError: Naming the option, its value and the remedy.
    """
    base = given(options.pretrained_model_name_or_path)
    own_base = base is not None
    if base is None:
        if options.family_name not in BUNDLED_BASES:
            raise ValueError(
                "--pretrained_model_name_or_path is missing: give a folder in the diffusers layout or a hub name"
            )
        base = bundled(BUNDLED_BASES[options.family_name], "--pretrained_model_name_or_path")
    train_data_dir = options.train_data_dir
    if (train_data_dir, options.instance_data_dir, options.dataset_name) == (None, None, None):
        if own_base and options.family_name != "sd":  # the bundled set is made for the bundled bases
            raise ValueError("there is no data: give --train_data_dir, --instance_data_dir or --dataset_name")
        train_data_dir = bundled(BUNDLED_DATA, "--train_data_dir")
    options = replace(
        options,
        pretrained_model_name_or_path=base,
        train_data_dir=train_data_dir,
        center_crop=options.center_crop or options.cache_latents,
        snr_gamma=options.snr_gamma or None,  # 0 is off
    )
    check_text_to_image(options)
    if isinstance(options, TransformerOptions):
        _check_quantization(options)
    return options


def check_text_to_image(options: TextToImageOptions) -> None:
    """Find what cannot work before anything is loaded.

    Raises:
        ValueError: Naming the option, its value and the remedy.
    """
    check_adapter_options(options, options, epochs=options.num_train_epochs)
    check_data_source(options)
    check_run_options(options)
    if options.cache_latents and options.random_flip:
        raise ValueError("--cache_latents keeps one encoding of each image: leave out --random_flip")
    if options.pre_compute_text_embeddings and options.train_text_encoder:
        raise ValueError("--pre_compute_text_embeddings keeps the embeddings of now: leave out --train_text_encoder")
    if options.embeddings_cache_dir is not None and not options.pre_compute_text_embeddings:
        raise ValueError(
            f"--embeddings_cache_dir {options.embeddings_cache_dir} keeps what --pre_compute_text_embeddings makes: "
            "give both or none"
        )
    _check_prior_preservation(options)
    rate = options.text_encoder_lr
    if options.optimizer == "prodigy" and options.train_text_encoder and rate not in (0, options.learning_rate):
        raise ValueError(f"--text_encoder_lr {rate}: prodigy finds one step size for all; leave it out or give 0")
    if options.enable_xformers_memory_efficient_attention:
        flag = "--enable_xformers_memory_efficient_attention"
        require_package("xformers", flag)
        if not has_cuda():
            raise ValueError(f"{flag} needs a CUDA device; leave it out")


def check_data_source(options: DatasetOptions) -> None:
    """See that there is one source of images, with the options that belong to it.

    Raises:
        ValueError: Naming the options.
    """
    sources = ("train_data_dir", "instance_data_dir", "dataset_name")
    given = [f"--{name}" for name in sources if getattr(options, name) is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other: give one of them")
    if options.instance_data_dir is not None and options.instance_prompt is None:
        raise ValueError("--instance_data_dir and --instance_prompt go together: give both or neither")
    if options.instance_prompt is not None and options.train_data_dir is not None:
        raise ValueError("--instance_prompt is for --instance_data_dir or --dataset_name: give both or neither")
    for name in ("mask_column", "conditioning_image_column"):
        if options.instance_data_dir is not None and getattr(options, name) is not None:
            raise ValueError(
                f"--{name} {getattr(options, name)} is a column of metadata, which --instance_data_dir does not read; "
                "give --train_data_dir or --dataset_name" + ", or masks by their names" * (name == "mask_column")
            )
    if options.dataset_name is not None:
        require_package("datasets", "--dataset_name")
    elif options.dataset_config_name is not None:
        raise ValueError("--dataset_config_name needs --dataset_name")


def _check_prior_preservation(options: TextToImageOptions) -> None:
    if not options.with_prior_preservation:
        for name in ("class_prompt", "class_data_dir"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name} has no effect without --with_prior_preservation; add that, or leave it out")
        return
    if options.class_prompt is None:
        raise ValueError(
            "--with_prior_preservation needs --class_prompt, the prompt of the class without the rare token"
        )
    if options.instance_prompt is None:
        raise ValueError(
            "--with_prior_preservation belongs to DreamBooth: give --instance_data_dir and --instance_prompt"
        )
    if options.conditioning_image_column is not None:
        raise ValueError(
            "--with_prior_preservation draws class images without an image beside the noise: leave out "
            "--conditioning_image_column"
        )
    if options.aspect_ratio_buckets is not None:
        raise ValueError("--with_prior_preservation makes square class images: leave out --aspect_ratio_buckets")


def _check_quantization(options: TransformerOptions) -> None:
    if options.quantization is None:
        return
    flag = f"--quantization {options.quantization}"
    require_package("bitsandbytes", flag)
    if not has_cuda():
        raise ValueError(f"{flag} needs a CUDA device: diffusers loads 4-bit models on no other; leave it out")
    if options.export_merged:
        raise ValueError(f"--export_merged adds to weights in full, {flag} packs them: leave one of them out")
