"""The options of the training scripts, with the names of diffusers' examples, and the checks that need no model."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import math
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorainit_diffusers.training.choices import (
    INTERPOLATIONS,
    LR_SCHEDULERS,
    init_names,
    init_option_names,
    names_in,
)
from lorainit_diffusers.training.cli_parser import ScriptParser, closest, unknown_name
from lorainit_diffusers.training.defaults import TINY, describe_defaults
from lorainit_diffusers.training.option_defaults import OptionDefaults
from lorainit_diffusers.training.ranges import check_options, check_schedule

# torch, diffusers and the library's core are imported where they are needed: a command line is read without them
if TYPE_CHECKING:
    import torch

    from lorainit_diffusers.families.text_to_image import TextToImageFamily
    from lorainit_diffusers.methods import Initializer


def __getattr__(name: str) -> Any:
    """`torch`, for those who know it as this module's, imported when it is asked for."""
    if name == "torch":
        return importlib.import_module(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Extras of the package, by the module that they install.
EXTRAS = {
    "bitsandbytes": "8bit",
    "datasets": "datasets",
    "prodigyopt": "prodigy",
    "tensorboard": "tracking",
    "wandb": "wandb",
    "xformers": "xformers",
}


# Options that only some families have, with their defaults.
FAMILY_OPTIONS: dict[str, Any] = {
    **{"snr_gamma": None, "noise_offset": 0.0, "prediction_type": None, "clip_skip": None},
    **{"weighting_scheme": None, "logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29},
    **{"guidance_scale": 3.5, "max_sequence_length": None},
}

# ------------------------------------------------------------------------------------------------------ option groups


def add_init_arguments(parser: argparse.ArgumentParser) -> None:
    """How the LoRA starts."""
    add = parser.add_argument_group("initialisation").add_argument
    add("--init", default="cntlora", help=f"one of {', '.join(init_names())} (default cntlora)")
    add("--init_num_batches", type=int, default=64, help="batches that the collection pass sees (default 64)")
    add("--init_batch_size", type=int, help="their size (default: train_batch_size)")
    add("--init_seed", type=int, help="seed of the collection pass and of random initialisations (default: seed)")
    add("--init_option", action="append", default=[], metavar="KEY=VALUE", help="of the method; `help` lists them")
    add(
        "--init_mask_padding",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="leave the padding tokens of the text encoders out of the statistics (default: on)",
    )
    add(
        "--init_memory_budget_gb",
        type=float,
        help="of the statistics; wide layers are sketched beyond it (default: auto)",
    )
    add("--init_statistics_device", choices=("cpu",), help="keep the statistics there (default: where the layers are)")
    add("--init_only", action="store_true", help="write the initialised LoRA and its report, and stop")
    add("--variable_rank", action="store_true", help="give each layer a rank by its scores, under the budget")
    add("--rank_budget", type=int, help="sum of the ranks with --variable_rank (default: rank x layers)")
    add("--max_rank", type=int, help="largest rank of a layer with --variable_rank (default: twice the rank)")
    add("--dry_run", action="store_true", help="print layers, ranks, parameters and memory, and stop; trains nothing")


def add_base_arguments(parser: argparse.ArgumentParser, default_base: str | None) -> Callable[..., Any]:
    """The base model; returns the group's `add_argument`."""
    add = parser.add_argument_group("model").add_argument
    default = "required" if default_base is None else "default: the bundled base"
    add("--pretrained_model_name_or_path", default=default_base, help=f"folder or hub name ({default})")
    add("--revision", help="hub revision")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere and later GPUs, except in statistics")
    return add


def add_model_arguments(parser: argparse.ArgumentParser, default_base: str | None) -> None:
    """The base model of a text-to-image script, and how it is held in memory."""
    add = add_base_arguments(parser, default_base)
    add("--pretrained_vae_model_name_or_path", help="another VAE (default: the base's, in float32)")
    add("--variant", help="weight variant, such as fp16")
    add("--enable_xformers_memory_efficient_attention", action="store_true")
    add("--offload", action="store_true", help="keep the VAE and frozen text encoders in CPU memory while unused")


def add_lora_arguments(parser: argparse.ArgumentParser, *, text_encoders: bool = True) -> None:
    """The adapters; text-to-image bases have text encoders that may get them, too."""
    add = parser.add_argument_group("LoRA").add_argument
    add("--rank", type=int, default=8, help="rank of every layer, or on average with --variable_rank (default 8)")
    add("--lora_alpha", type=float, help="default: the rank, so that the scale is 1")
    add("--lora_dropout", type=float, default=0.0)
    add("--use_rslora", action="store_true", help="scale by alpha / sqrt(rank)")
    add("--lora_layers", help="comma-separated names or name endings of the layers (default: attention)")
    if text_encoders:
        add("--train_text_encoder", action="store_true", help="LoRA on the text encoders' attention, too")


def add_dataset_arguments(parser: argparse.ArgumentParser) -> Callable[..., Any]:
    """Where images and captions are; returns the group's `add_argument`."""
    add = parser.add_argument_group("data").add_argument
    add("--train_data_dir", help="captioned images: metadata.jsonl or .csv, or a .txt beside each")
    add("--instance_data_dir", help="DreamBooth: images of one subject")
    add("--instance_prompt", help="DreamBooth: the prompt for all of them, with a rare token")
    add("--dataset_name", help="hub name or folder of a dataset with an image and a caption column")
    add("--dataset_config_name", help="configuration of that dataset")
    add("--cache_dir", help="where downloads are kept (default: Hugging Face's own)")
    add("--image_column", help="default: file_name in a folder's metadata, image in a dataset")
    add("--caption_column", help="default: text")
    add("--max_train_samples", type=int, help="use the first images only")
    add("--repeats", type=int, default=1, help="how often each image counts in an epoch (default 1)")
    add("--resolution", type=int, help="side of the square crops in pixels (default: the base's)")
    return add


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Images and captions, and what is done to the images."""
    add = add_dataset_arguments(parser)
    share = "share of the images to hold out, by their content, where the data hold out none (default: none)"
    add("--validation_fraction", type=float, help=share)
    add("--center_crop", action="store_true", help="crop the centre instead of a random place")
    add("--random_flip", action="store_true", help="mirror half of the images")
    add("--image_interpolation_mode", choices=INTERPOLATIONS, default="lanczos")
    add("--aspect_ratio_buckets", help='sizes such as "1024,1024;768,1344" (height,width), or auto (default: squares)')
    add("--cache_latents", action="store_true", help="encode the images once; implies --center_crop")
    add("--pre_compute_text_embeddings", action="store_true", help="encode the captions once")
    add("--dataloader_num_workers", type=int, default=0)


def add_dreambooth_arguments(parser: argparse.ArgumentParser) -> None:
    """Prior preservation: images of the class keep the model from forgetting it."""
    add = parser.add_argument_group("prior preservation").add_argument
    add("--with_prior_preservation", action="store_true", help="train on images of the class, too")
    add("--class_prompt", help="prompt of the class, such as 'a photo of a dog'")
    add("--class_data_dir", help="images of the class; missing ones are generated (default: in output_dir)")
    add("--num_class_images", type=int, default=100, help="images of the class (default 100)")
    add("--prior_loss_weight", type=float, default=1.0)
    add("--sample_batch_size", type=int, default=4, help="images generated at once (default 4)")


def add_loss_arguments(parser: argparse.ArgumentParser) -> None:
    """The denoising loss."""
    add = parser.add_argument_group("loss").add_argument
    add("--snr_gamma", type=float, help="min-SNR weighting (5.0 is usual; default: off)")
    add("--noise_offset", type=float, default=0.0)
    add("--prediction_type", choices=("epsilon", "v_prediction", "sample"), help="default: the base's")
    add("--caption_dropout", type=float, default=0.0, help="share of samples that train without their caption")
    add("--clip_skip", type=int, help="text encoder layers to leave out at the end, as the pipelines count them")


def add_flow_arguments(parser: argparse.ArgumentParser) -> None:
    """The loss of flow-matching bases, and the inputs that some of them take."""
    add = parser.add_argument_group("diffusion transformers").add_argument
    default = FAMILY_OPTIONS
    schemes = names_in("families/flow_matching.py", "WEIGHTING_SCHEMES")
    add("--weighting_scheme", choices=schemes, help="of the noise levels (default: the family's usual one)")
    add("--logit_mean", type=float, default=default["logit_mean"], help="of logit_normal (default 0)")
    add("--logit_std", type=float, default=default["logit_std"], help="of logit_normal (default 1)")
    add("--mode_scale", type=float, default=default["mode_scale"], help="of mode (default 1.29)")
    add("--guidance_scale", type=float, default=default["guidance_scale"], help="input of Flux dev (default 3.5)")
    add("--max_sequence_length", type=int, help="tokens of the large text encoder (default: the family's usual number)")


def add_training_arguments(
    parser: argparse.ArgumentParser,
    families: Sequence[str],
    *,
    second_lr: str = "text_encoder_lr",
) -> None:
    """Learning rates, accumulation, averages; `second_lr` is the rate of text encoders or of heads.

    The defaults are those of tiny bases of the first family, until `parse_with_defaults` knows the base.
    """
    tiny = TINY[families[0]]
    add = parser.add_argument_group("training").add_argument
    rate_help = describe_defaults("learning_rate", families)
    add("--learning_rate", type=float, default=tiny.learning_rate, help=f"{rate_help}; 0 freezes")
    add(f"--{second_lr}", type=float, help="default: learning_rate")
    add("--scale_lr", action="store_true", help="multiply learning rates by processes x accumulation x batch size")
    add("--num_train_epochs", type=int, help="instead of --max_train_steps: passes over the images")
    number = tiny.gradient_accumulation_steps
    accumulation_help = f"batches of one step ({describe_defaults('gradient_accumulation_steps', families)})"
    add("--gradient_accumulation_steps", type=int, default=number, help=accumulation_help)
    add("--gradient_checkpointing", action="store_true", help="less memory, more time")
    add("--use_dora", action="store_true", help="train magnitude and direction (DoRA, arXiv:2402.09353)")
    add("--use_ema", action="store_true", help="sample and save a moving average of the LoRA weights")
    add("--ema_decay", type=float, default=0.999, help="its decay, reached as (1 + step) / (10 + step) (default 0.999)")
    steps, batch_size = (describe_defaults(name, families) for name in ("max_train_steps", "train_batch_size"))
    add_optimizer_arguments(parser, tiny.max_train_steps, tiny.train_batch_size, steps, batch_size)


def add_optimizer_arguments(
    parser: argparse.ArgumentParser,
    max_train_steps: int,
    batch_size: int,
    about_steps: str | None = None,
    about_batch_size: str | None = None,
) -> None:
    """Optimiser, schedule, length and precision: what one run and a comparison of runs have in common.

    Args:
        parser: gets the options.
        max_train_steps: default of the option.
        batch_size: default of `--train_batch_size`.
        about_steps: what the help says of the default instead of the number.
        about_batch_size: likewise.
    """
    add = parser.add_argument_group("optimiser").add_argument
    add("--optimizer", default="adamw", choices=("adamw", "sgd", "prodigy"))
    add("--use_8bit_adam", action="store_true", help="AdamW with 8-bit state (bitsandbytes)")
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.999)
    add("--adam_weight_decay", type=float, default=1e-2)
    add("--adam_epsilon", type=float, default=1e-8)
    add("--prodigy_beta3", type=float, help="default: square root of beta2")
    yes_or_no = argparse.BooleanOptionalAction
    add("--prodigy_decouple", action=yes_or_no, default=True, help="decoupled weight decay")
    add("--prodigy_use_bias_correction", action=yes_or_no, default=True)
    add("--prodigy_safeguard_warmup", action=yes_or_no, default=True)
    add("--max_grad_norm", type=float, default=1.0)
    add("--lr_scheduler", default="constant", choices=LR_SCHEDULERS)
    add("--lr_warmup_steps", type=int, default=0)
    add("--lr_num_cycles", type=int, default=1, help="restarts of cosine_with_restarts (default 1)")
    add("--lr_power", type=float, default=1.0, help="power of polynomial (default 1)")
    add(
        "--max_train_steps",
        type=int,
        default=max_train_steps,
        help=f"optimiser steps ({about_steps or f'default {max_train_steps}'})",
    )
    default = f"samples a process and micro-step ({about_batch_size or f'default {batch_size}'})"
    add("--train_batch_size", type=int, default=batch_size, help=default)
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: what accelerate is configured for")


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    """The pictures that a run draws as it goes."""
    add = parser.add_argument_group("samples").add_argument
    add("--validation_prompt", nargs="+", help="prompts for samples (default: some training and held-out captions)")
    add("--num_validation_images", type=int, default=1, help="samples a prompt (default 1)")
    add("--validation_inference_steps", type=int, default=25)
    add("--validation_guidance_scale", type=float, default=5.0)


def add_run_arguments(parser: argparse.ArgumentParser, families: Sequence[str]) -> None:
    """Seeds, validation, checkpoints and outputs."""
    add = parser.add_argument_group("run").add_argument
    add("--output_dir", help="a directory of its own (default: outputs/<script>-<init>, with a number if it is taken)")
    add("--overwrite_output_dir", action="store_true", help="replace the run in output_dir, and what it wrote alone")
    add("--seed", type=int, default=0)
    for name, what in (("validation_steps", "validations"), ("checkpointing_steps", "checkpoints")):
        about = f"steps between {what} ({describe_defaults(name, families)})"
        add(f"--{name}", type=int, default=getattr(TINY[families[0]], name), help=about)
    add("--checkpoints_total_limit", type=int, help="the oldest are deleted first")
    yes_or_no = argparse.BooleanOptionalAction
    add(
        "--keep_best",
        action=yes_or_no,
        default=True,
        help="keep the LoRA of the best validation in best/ (default: on)",
    )
    add("--resume_from_checkpoint", help="latest, a checkpoint's name in output_dir, or its path")
    add("--report_to", choices=("tensorboard", "wandb"))
    add("--logging_dir", default="logs", help="inside output_dir (default logs)")
    add("--export_rank", type=int, help="compress every layer of the saved LoRA to this rank; says what that discards")
    add("--pad_rank", type=int, help="zero-pad every layer of the saved LoRA to this rank, for old loaders")
    add("--export_merged", action="store_true", help="write the models with the LoRA in their weights, too")
    add("--push_to_hub", action="store_true", help="upload the result")
    add("--hub_private", action="store_true", help="make the repository a private one")
    add("--hub_model_id", help="repository to upload to (default: the name of output_dir)")
    add("--hub_token", help="default: the token of `hf auth login`")
    parser.set_defaults(option_defaults=OptionDefaults(parser))


def make_training_parser(
    description: str | None, default_base: str | None, families: Sequence[str] = ("sd",)
) -> argparse.ArgumentParser:
    """All options of a script that trains one LoRA on bases of these families."""
    parser = ScriptParser(description)
    add_init_arguments(parser)
    add_model_arguments(parser, default_base)
    add_lora_arguments(parser)
    add_data_arguments(parser)
    add_dreambooth_arguments(parser)
    add_loss_arguments(parser)
    add_training_arguments(parser, families)
    add_sample_arguments(parser)
    add_run_arguments(parser, families)
    return parser


# ------------------------------------------------------------------------------------------- defaults, checks, objects


def resolve_defaults(args: argparse.Namespace, script: str, default_data: Path | None) -> None:
    """Fill in the options whose default depends on others.

    Raises:
        ValueError: when the base or the data has no default and is not given.
    """
    if args.pretrained_model_name_or_path is None:
        raise ValueError(
            "--pretrained_model_name_or_path is missing: give a folder in the diffusers layout or a hub name"
        )
    args.init_batch_size = args.train_batch_size if args.init_batch_size is None else args.init_batch_size
    args.init_seed = args.seed if args.init_seed is None else args.init_seed
    args.lora_alpha = float(args.rank) if args.lora_alpha is None else args.lora_alpha
    args.text_encoder_lr = args.learning_rate if args.text_encoder_lr is None else args.text_encoder_lr
    args.center_crop = args.center_crop or args.cache_latents
    settle_output_dir(args, script)
    if args.train_data_dir is None and args.instance_data_dir is None and args.dataset_name is None:
        if default_data is None:
            raise ValueError("there is no data: give --train_data_dir, --instance_data_dir or --dataset_name")
        args.train_data_dir = str(default_data)
    if args.with_prior_preservation and args.class_data_dir is None:
        args.class_data_dir = str(Path(args.output_dir) / "class_images")


def settle_output_dir(args: argparse.Namespace, script: str) -> None:
    """The default output directory, where none is given, and whether it is one."""
    args.default_output_dir = args.output_dir is None
    args.output_dir = f"outputs/{script}-{args.init}" if args.output_dir is None else args.output_dir


def validate_arguments(args: argparse.Namespace) -> None:
    """Find what cannot work before anything is loaded.

    Raises:
        ValueError: naming the option, its value and the remedy.
    """
    validate_shared_arguments(args)
    validate_run_arguments(args)
    if args.cache_latents and args.random_flip:
        raise ValueError("--cache_latents keeps one encoding of each image: leave out --random_flip")
    if args.pre_compute_text_embeddings and args.train_text_encoder:
        raise ValueError("--pre_compute_text_embeddings keeps the embeddings of now: leave out --train_text_encoder")
    _validate_prior_preservation(args)
    if args.optimizer == "prodigy" and args.train_text_encoder and args.text_encoder_lr not in (0, args.learning_rate):
        raise ValueError(
            f"--text_encoder_lr {args.text_encoder_lr}: prodigy finds one step size for all; leave it out or give 0"
        )
    if args.enable_xformers_memory_efficient_attention:
        flag = "--enable_xformers_memory_efficient_attention"
        require_package("xformers", flag)
        if not has_cuda():
            raise ValueError(f"{flag} needs a CUDA device; leave it out")


def validate_run_arguments(args: argparse.Namespace) -> None:
    """The options on initialisation, checkpoints, exports and trackers that all training scripts have.

    Raises:
        ValueError: naming the option, its value and the remedy.
    """
    check_init_name(args.init)
    check_option_names(args.init, args.init_option)
    if not args.variable_rank and (args.rank_budget is not None or args.max_rank is not None):
        raise ValueError("--rank_budget and --max_rank need --variable_rank")
    if args.hub_private and not args.push_to_hub:
        raise ValueError("--hub_private has no effect without --push_to_hub; add that, or leave it out")
    if args.report_to == "wandb" and args.hub_token is not None:
        raise ValueError("--report_to wandb records the command line, --hub_token in it: use `hf auth login` instead")
    if args.report_to is not None:
        require_package(args.report_to, f"--report_to {args.report_to}")


def _validate_prior_preservation(args: argparse.Namespace) -> None:
    if not args.with_prior_preservation:
        for name in ("class_prompt", "class_data_dir"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name} has no effect without --with_prior_preservation; add that, or leave it out")
        return
    if args.class_prompt is None:
        raise ValueError(
            "--with_prior_preservation needs --class_prompt, the prompt of the class without the rare token"
        )
    if args.instance_prompt is None:
        raise ValueError(
            "--with_prior_preservation belongs to DreamBooth: give --instance_data_dir and --instance_prompt"
        )
    if args.aspect_ratio_buckets is not None:
        raise ValueError("--with_prior_preservation makes square class images: leave out --aspect_ratio_buckets")


def check_method(args: argparse.Namespace, method: Initializer) -> None:
    """See that the other options let this initialisation do what it is asked for.

    Raises:
        ValueError: naming the options and the remedy.
    """
    from lorainit_diffusers.initialize import check_zero_delta, needs_reference

    if needs_reference(method) and not hasattr(args, "with_prior_preservation"):
        raise ValueError(
            "--init_option pretraining=measured needs class images, which this script has not: leave it out"
        )
    if needs_reference(method) and not args.with_prior_preservation:
        raise ValueError(
            "--init_option pretraining=measured takes the class images as the pre-training data: "
            "add --with_prior_preservation and --class_prompt"
        )
    if args.use_dora:
        check_zero_delta(args.init, method)
    if args.init_only and args.export_rank is not None and method.step_zero == "offset":
        raise ValueError(
            f"--export_rank compresses the change, which is zero before training with --init {args.init}: leave out "
            "--export_rank or --init_only, or use an init without an offset, such as eva or cntlora with "
            "--init_option base=down_only"
        )


def check_family_options(args: argparse.Namespace, family_class: type[TextToImageFamily]) -> None:
    """See that the options that only some families have are this family's.

    Raises:
        ValueError: naming the option.
    """
    from lorainit_diffusers.families.text_to_image import CLIP_ENCODERS

    for name, default in FAMILY_OPTIONS.items():
        if name not in family_class.OPTIONS and getattr(args, name, default) != default:
            raise ValueError(f"--{name} {getattr(args, name)} has no effect on {family_class.NAME}; leave it out")
    if args.train_text_encoder and not set(family_class.TEXT_ENCODERS.values()) & set(CLIP_ENCODERS):
        raise ValueError(
            f"--train_text_encoder: {family_class.NAME} has no text encoder that its LoRA could hold; leave it out"
        )


def has_cuda() -> bool:
    """Whether there is a CUDA device; asked only when an option needs one, since it imports torch."""
    import torch

    return torch.cuda.is_available()


def validate_shared_arguments(args: argparse.Namespace) -> None:
    """The options on data, adapters and optimiser that all text-to-image scripts have.

    Raises:
        ValueError: naming the option, its value and the remedy.
    """
    validate_adapter_arguments(args)
    args.snr_gamma = args.snr_gamma or None  # 0 is off
    sources = ("train_data_dir", "instance_data_dir", "dataset_name")
    given = [f"--{name}" for name in sources if getattr(args, name) is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other: give one of them")
    if args.instance_data_dir is not None and args.instance_prompt is None:
        raise ValueError("--instance_data_dir and --instance_prompt go together: give both or neither")
    if args.instance_prompt is not None and args.train_data_dir is not None:
        raise ValueError("--instance_prompt is for --instance_data_dir or --dataset_name: give both or neither")
    if args.dataset_name is not None:
        require_package("datasets", "--dataset_name")
    elif args.dataset_config_name is not None:
        raise ValueError("--dataset_config_name needs --dataset_name")


def validate_adapter_arguments(args: argparse.Namespace) -> None:
    """The options on adapters and optimiser that every script that trains has.

    Raises:
        ValueError: naming the option, its value and the remedy.
    """
    check_options(vars(args))
    if getattr(args, "num_train_epochs", None) is None:  # else once the steps are known
        check_schedule(args.lr_scheduler, args.lr_warmup_steps, args.max_train_steps)
    if args.lora_layers is not None and not layer_names(args.lora_layers):
        raise ValueError("--lora_layers is empty; name layers such as to_q,to_k")
    if args.optimizer == "prodigy":
        require_package("prodigyopt", "--optimizer prodigy")
    if args.use_8bit_adam:
        if args.optimizer != "adamw":
            raise ValueError(f"--use_8bit_adam is a form of adamw: leave out --optimizer {args.optimizer}")
        require_package("bitsandbytes", "--use_8bit_adam")
    if args.mixed_precision == "fp16" and not has_cuda():
        raise ValueError("--mixed_precision fp16 needs a CUDA device; use bf16 or no")


def require_package(name: str, flag: str) -> None:
    """Check that an optional package is installed.

    Raises:
        ValueError: when it is not.
    """
    if importlib.util.find_spec(name) is None:
        remedy = f'pip install "lorainit-diffusers[{EXTRAS[name]}]" or leave it out'
        raise ValueError(f"{flag} needs the package {name}, which is not installed; {remedy}")


def layer_names(text: str) -> list[str]:
    """The names in a comma-separated list."""
    return text.replace(",", " ").split()


def scale_learning_rates(args: argparse.Namespace, num_processes: int) -> None:
    """Apply `--scale_lr`, as diffusers' examples do."""
    if args.scale_lr:
        factor = args.train_batch_size * args.gradient_accumulation_steps * num_processes
        for name in ("learning_rate", "text_encoder_lr", "head_lr"):
            if hasattr(args, name):
                setattr(args, name, factor * getattr(args, name))
        check_options(vars(args), ("learning_rate",))


def resolve_epochs(args: argparse.Namespace, batches_per_epoch: int, num_processes: int) -> None:
    """Turn `--num_train_epochs` into steps: as many as it takes to see every image that often.

    Raises:
        ValueError: when the warm-up is longer than that.
    """
    if args.num_train_epochs is not None:
        batches_per_step = args.gradient_accumulation_steps * num_processes
        args.max_train_steps = args.num_train_epochs * math.ceil(batches_per_epoch / batches_per_step)
        check_options(vars(args), ("max_train_steps",))
        check_schedule(args.lr_scheduler, args.lr_warmup_steps, args.max_train_steps)


def make_optimizer(args: argparse.Namespace, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimiser that `--optimizer` names, over parameter groups that carry their learning rates."""
    import torch

    if args.optimizer == "sgd":
        return torch.optim.SGD(groups)
    betas = (args.adam_beta1, args.adam_beta2)
    if args.optimizer == "prodigy":
        return importlib.import_module("prodigyopt").Prodigy(
            groups,
            betas=betas,
            beta3=args.prodigy_beta3,
            weight_decay=args.adam_weight_decay,
            eps=args.adam_epsilon,
            decouple=args.prodigy_decouple,
            use_bias_correction=args.prodigy_use_bias_correction,
            safeguard_warmup=args.prodigy_safeguard_warmup,
        )
    adamw = importlib.import_module("bitsandbytes").optim.AdamW8bit if args.use_8bit_adam else torch.optim.AdamW
    return adamw(groups, betas=betas, weight_decay=args.adam_weight_decay, eps=args.adam_epsilon)


def build_method(name: str, options: Sequence[str]) -> Initializer:
    """The initialisation `name` with its hyper-parameters set from `key=value` texts.

    Raises:
        ValueError: for an unknown name or key, or a value that the key's type does not take.
    """
    from lorainit_diffusers.initialize import make_method
    from lorainit_diffusers.methods import METHODS

    check_init_name(name)
    method: Any = METHODS[name]
    hints = typing.get_type_hints(method)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(method) if field.init}
    values: dict[str, Any] = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals or key not in fields:
            raise ValueError(_unknown_option(name, option, list(fields)))
        values[key] = _parse_option(option, text, fields[key])
    return make_method(name, values)


def check_init_name(name: str, given: str = "") -> None:
    """See that there is an initialisation of this name; `given` is the option that it is from, where that is not clear.

    Raises:
        ValueError: naming the nearest one and all that there are.
    """
    if name not in init_names():
        raise ValueError(f"{given}: " * bool(given) + unknown_name("init", name, init_names()))


def check_option_names(name: str, options: Sequence[str]) -> None:
    """See that an initialisation has these options, before it is imported; their values are checked when it is built.

    Raises:
        ValueError: naming the nearest key and all that there are.
    """
    try:
        known = init_option_names(name)
    except ValueError:  # one that a program has added
        return
    for option in options:
        key, equals, _ = option.partition("=")
        if not equals or key not in known:
            raise ValueError(_unknown_option(name, option, known))


def _unknown_option(name: str, option: str, known: Sequence[str]) -> str:
    """What to give instead of an option that a method has not."""
    key, _, value = option.partition("=")
    if key == "help":
        from lorainit_diffusers.training.method_options import describe_options

        return describe_options(name)
    meant = closest(key, known)
    question = f"; did you mean {meant}={value or '...'}?" if meant is not None else ""
    if not known:
        return f"--init_option {option!r}: init {name} has no options (known: none); leave it out"
    listed = f"(known: {', '.join(known)}; docs/methods.md says what they mean)"
    return f"--init_option {option!r}: give key=value with a key of {name} {listed}{question}"


def _parse_option(option: str, text: str, hint: Any) -> Any:
    accepted = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for kind in accepted:
        if kind is type(None) and text.lower() == "none":
            return None
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if typing.get_origin(kind) is typing.Literal and text in typing.get_args(kind):
            return text
        if kind in (int, float, str):
            try:
                return kind(text)
            except ValueError:
                continue
    wanted = " or ".join(
        " | ".join(map(str, typing.get_args(kind))) if typing.get_origin(kind) is typing.Literal else str(kind.__name__)
        for kind in accepted
    )
    raise ValueError(f"--init_option {option!r}: {text!r} is not {wanted}")
