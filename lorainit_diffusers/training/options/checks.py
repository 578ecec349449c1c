"""What cannot work, found before anything is loaded; and the objects that options stand for."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import types
import typing
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorainit_diffusers.training.choices import init_names, init_option_names
from lorainit_diffusers.training.options.fields import default_of
from lorainit_diffusers.training.options.initialisation import InitOptions, LoraOptions, TextEncoderOptions
from lorainit_diffusers.training.options.model import FAMILY_OPTIONS, BaseOptions
from lorainit_diffusers.training.options.optimisation import OptimizerOptions, ScheduledOptions
from lorainit_diffusers.training.options.run import ExportOptions, OutputOptions, RunOptions
from lorainit_diffusers.training.options.spelling import closest, unknown_name
from lorainit_diffusers.training.ranges import check_schedule

# torch, diffusers and the library's core are imported where they are needed: a command line is read without them
if TYPE_CHECKING:
    from lorainit_diffusers.families.text_to_image import TextToImageFamily
    from lorainit_diffusers.methods import Initializer

# Extras of the package, by the module that they install.
EXTRAS = {
    "bitsandbytes": "8bit",
    "datasets": "datasets",
    "prodigyopt": "prodigy",
    "tensorboard": "tracking",
    "wandb": "wandb",
    "xformers": "xformers",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions(BaseOptions, InitOptions, LoraOptions, ScheduledOptions, OutputOptions, RunOptions, ExportOptions):
    """What every script that trains a LoRA has."""

    @property
    def family_name(self) -> str:
        """The base's family, as `families` and `training.defaults` call it."""
        return self.FAMILIES[0]

    @property
    def output_name(self) -> str:
        """What the default output directory begins with."""
        return f"{self.family_name}-lora"


def check_run_options(options: TrainOptions) -> None:
    """The options on initialisation, checkpoints, exports and trackers that all training scripts have.

    Raises:
        ValueError: Naming the option, its value and the remedy.
    """
    check_init_name(options.init)
    check_option_names(options.init, options.init_option)
    if options.init_from is not None and options.init_only:
        raise ValueError(
            f"--init_only would write what --init_from {options.init_from} holds already: leave one of them out"
        )
    if not options.variable_rank and (options.rank_budget is not None or options.max_rank is not None):
        raise ValueError("--rank_budget and --max_rank need --variable_rank")
    if options.hub_private and not options.push_to_hub:
        raise ValueError("--hub_private has no effect without --push_to_hub; add that, or leave it out")
    if options.report_to == "wandb" and options.hub_token is not None:
        raise ValueError("--report_to wandb records the command line, --hub_token in it: use `hf auth login` instead")
    if options.report_to is not None:
        require_package(options.report_to, f"--report_to {options.report_to}")


def check_adapter_options(lora: LoraOptions, optimizer: OptimizerOptions, *, epochs: int | None = None) -> None:
    """The options on adapters and optimiser that every script that trains has.

    Args:
        lora: Of the adapters.
        optimizer: Of the optimiser.
        epochs: Length of the run in passes over the data, where it is given so; then the steps are not known yet.

    Raises:
        ValueError: Naming the option, its value and the remedy.
    """
    if epochs is None:
        check_schedule(optimizer.lr_scheduler, optimizer.lr_warmup_steps, optimizer.max_train_steps)
    if lora.lora_layers is not None and not lora.layer_names:
        raise ValueError("--lora_layers is empty; name layers such as to_q,to_k")
    if optimizer.optimizer == "prodigy":
        require_package("prodigyopt", "--optimizer prodigy")
    if optimizer.use_8bit_adam:
        if optimizer.optimizer != "adamw":
            raise ValueError(f"--use_8bit_adam is a form of adamw: leave out --optimizer {optimizer.optimizer}")
        require_package("bitsandbytes", "--use_8bit_adam")
    if optimizer.mixed_precision == "fp16" and not has_cuda():
        raise ValueError("--mixed_precision fp16 needs a CUDA device; use bf16 or no")


def check_method(options: TrainOptions, method: Initializer, class_images: bool | None) -> None:
    """See that the other options let this initialisation do what it is asked for.

    Args:
        options: Of the run.
        method: The initialisation.
        class_images: Whether the run has class images; `None` for a script that cannot have any.

    Raises:
        ValueError: Naming the options and the remedy.
    """
    from lorainit_diffusers.initialize import check_zero_delta, needs_reference

    collects = options.init_from is None
    if collects and needs_reference(method) and class_images is None:
        raise ValueError(
            "--init_option pretraining=measured needs class images, which this script has not: leave it out"
        )
    if collects and needs_reference(method) and not class_images:
        raise ValueError(
            "--init_option pretraining=measured takes the class images as the pre-training data: "
            "add --with_prior_preservation and --class_prompt"
        )
    if options.use_dora:
        check_zero_delta(options.init, method)
    if options.init_only and options.export_rank is not None and method.step_zero == "offset":
        raise ValueError(
            f"--export_rank compresses the change, which is zero before training with --init {options.init}: leave out "
            "--export_rank or --init_only, or use an init without an offset, such as eva or cntlora with "
            "--init_option base=down_only"
        )


def check_family_options(options: TextEncoderOptions, family_class: type[TextToImageFamily]) -> None:
    """See that the options that only some families have are this family's.

    Raises:
        ValueError: Naming the option.
    """
    from lorainit_diffusers.families.text_to_image import CLIP_ENCODERS

    for name in FAMILY_OPTIONS:
        default = default_of(type(options), name)
        value = getattr(options, name, default)
        if name not in family_class.OPTIONS and value != default:
            raise ValueError(f"--{name} {value} has no effect on {family_class.NAME}; leave it out")
    column = getattr(options, "conditioning_image_column", None)
    if column is not None and not family_class.CONDITIONED:
        raise ValueError(
            f"--conditioning_image_column {column}: {family_class.NAME} sees no image beside the noise; leave it out"
        )
    if options.train_text_encoder and not set(family_class.TEXT_ENCODERS.values()) & set(CLIP_ENCODERS):
        raise ValueError(
            f"--train_text_encoder: {family_class.NAME} has no text encoder that its LoRA could hold; leave it out"
        )


def has_cuda() -> bool:
    """Whether there is a CUDA device; asked only when an option needs one, since it imports torch."""
    import torch

    return torch.cuda.is_available()


def require_package(name: str, flag: str) -> None:
    """Check that an optional package is installed.

    Raises:
        ValueError: When it is not.
    """
    if importlib.util.find_spec(name) is None:
        remedy = f'pip install "lorainit-diffusers[{EXTRAS[name]}]" or leave it out'
        raise ValueError(f"{flag} needs the package {name}, which is not installed; {remedy}")


# ------------------------------------------------------------------------------------------------------ initialisation


def build_method(name: str, options: Sequence[str]) -> Initializer:
    """The initialisation `name` with its hyper-parameters set from `key=value` texts.

    Raises:
        ValueError: For an unknown name or key, or a value that the key's type does not take.
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
        ValueError: Naming the nearest one and all that there are.
    """
    if name not in init_names():
        raise ValueError(f"{given}: " * bool(given) + unknown_name("init", name, init_names()))


def check_option_names(name: str, options: Sequence[str]) -> None:
    """See that an initialisation has these options, before it is imported; their values are checked when it is built.

    Raises:
        ValueError: Naming the nearest key and all that there are.
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
