"""The command line of the comparison, and the kinds of tasks that it compares on."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from common_options import (
    add_dataset_arguments,
    add_flow_arguments,
    add_lora_arguments,
    add_loss_arguments,
    add_optimizer_arguments,
    check_init_name,
    check_option_names,
    validate_adapter_arguments,
    validate_shared_arguments,
)

from lorainit_diffusers.training.bundled import BUNDLED_BASES, BUNDLED_DATA
from lorainit_diffusers.training.choices import init_names, names_in
from lorainit_diffusers.training.cli_parser import ScriptParser
from lorainit_diffusers.training.defaults import REAL, is_tiny
from lorainit_diffusers.training.option_defaults import OptionDefaults

# Fractions of the budget at which runs are evaluated: dense where the curves are steep.
EVAL_FRACTIONS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
IMAGE_FRACTIONS = (0.0, 0.2, 1.0)
# What may stand behind an init's name, beside the options of its method.
RUN_OPTIONS = ("variable_rank", "init_num_batches", "a_lr_ratio")
BASELINES = ("gaussian", "orthonormal")
# What suits the bundled bases; a family in `TASKS` has some of its own.
DEFAULTS = {"learning_rates": [1e-3, 2e-3], "max_train_steps": 100, "train_batch_size": 8, "init_num_batches": 64}


@dataclass(frozen=True)
class TaskKind:
    """A family that is no text-to-image one: where its task is, and what a comparison does when nothing is said.

    Attributes:
        module: file of the task.
        task: its class, which is made from the options, a device and a dtype.
        add_arguments: the function that adds the options that the task reads.
        examples: what the data consists of, in the report's words.
        has_head: whether a module may be trained in full beside the adapters.
        defaults: of the options of the comparison.
        options: file of `add_arguments`, which a command line is read with; left out for the task's own.
    """

    module: str
    task: str
    add_arguments: str
    examples: str
    has_head: bool
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    options: str | None = None

    def load(self, name: str) -> Callable[..., Any]:
        """The class or function of this name, imported now."""
        return getattr(importlib.import_module(self.module), name)

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the options that the task reads."""
        getattr(importlib.import_module(self.options or self.module), self.add_arguments)(parser)


TASKS = {
    "classifier": TaskKind(
        *("common_classify", "ClassificationTask", "add_classification_arguments"),
        examples="images",
        has_head=True,
        defaults={"learning_rates": [1e-3, 2e-3], "max_train_steps": 60, "train_batch_size": 32},
        options="common_classify_options",
    ),
    "vlm": TaskKind(
        *("common_questions", "QuestionAnsweringTask", "add_question_arguments"),
        examples="questions",
        has_head=False,
        defaults={"learning_rates": [1e-3, 2e-3], "max_train_steps": 60, "train_batch_size": 16},
        options="common_question_options",
    ),
}


def parse_comparison(description: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of the comparison, checked as far as that needs no model.

    Raises:
        ValueError: naming the option, its value and the remedy.
    """
    chosen_family = ScriptParser(add_help=False)
    chosen_family.add_argument("--family", default="sd")
    chosen_family.add_argument("--pretrained_model_name_or_path")
    chosen = chosen_family.parse_known_args(argv)[0]
    kind = TASKS.get(chosen.family)  # each family has options of its own
    defaults: dict[str, Any] = {**DEFAULTS, **(kind.defaults if kind is not None else {})}
    if chosen.family in REAL and not is_tiny(chosen.pretrained_model_name_or_path):
        usual = REAL[chosen.family]
        defaults["learning_rates"] = [usual.learning_rate, 2 * usual.learning_rate]
        defaults["max_train_steps"] = usual.max_train_steps
        defaults["train_batch_size"] = usual.train_batch_size * usual.gradient_accumulation_steps
    parser = ScriptParser(description)
    add = parser.add_argument_group("comparison").add_argument
    add("--output_dir", default="outputs/compare-inits")
    default_inits = ["gaussian", "orthonormal", "cntlora", "gradient_step"]
    add("--inits", nargs="+", default=default_inits, help=f"of {', '.join(init_names())}, with options after a colon")
    default_rates = " ".join(f"{rate:g}" for rate in defaults["learning_rates"])
    rates_help = f"(default {default_rates})"
    add("--learning_rates", nargs="+", type=float, default=defaults["learning_rates"], help=rates_help)
    add("--seeds", nargs="+", type=int, default=[0, 1])
    add("--eval_steps", nargs="+", type=int, help="steps of the validation (default: 0 and ten more)")
    add("--equal_parameters", action="store_true", help="equal number of parameters, not sum of ranks")
    batches_help = f"batches that the collection pass sees (default {defaults['init_num_batches']})"
    add("--init_num_batches", type=int, default=defaults["init_num_batches"], help=batches_help)
    add("--num_workers", type=int, help="processes on this machine (default: 1 a GPU, up to 2 on the processor)")
    add("--part", help=argparse.SUPPRESS)
    if kind is None:
        add_image_arguments(parser)
    else:
        add("--snapshot_steps", nargs="+", type=int, help="steps whose weights are kept (default: 0 and the end)")
        if kind.has_head:
            add("--head_lr_ratio", type=float, default=1.0, help="the head's learning rate / the LoRA's (default 1)")
    add = parser.add_argument_group("model").add_argument
    families = [*names_in("families/__init__.py", "TEXT_TO_IMAGE_FAMILIES"), *TASKS]
    add("--family", default="sd", choices=families, help="what the base is (default sd)")
    with_base = ", ".join(BUNDLED_BASES)
    add("--pretrained_model_name_or_path", help=f"folder or hub name (default: bundled; {with_base} have one)")
    add("--revision", help="hub revision")
    add_lora_arguments(parser, text_encoders=kind is None)
    if kind is None:
        add("--variant", help="weight variant, such as fp16")
        add_dataset_arguments(parser)
        add_loss_arguments(parser)
        add_flow_arguments(parser)
    else:
        add("--cache_dir", help="where downloads are kept (default: Hugging Face's own)")
        kind.add_options(parser)
    add_optimizer_arguments(parser, defaults["max_train_steps"], defaults["train_batch_size"])
    parser.set_defaults(option_defaults=OptionDefaults(parser))
    args = parser.parse_args(argv)
    if args.pretrained_model_name_or_path is None:
        if args.family not in BUNDLED_BASES:
            raise ValueError(
                f"--pretrained_model_name_or_path is missing, and --family {args.family} has no bundled base: "
                "give a folder in the diffusers layout or a hub name"
            )
        args.pretrained_model_name_or_path = BUNDLED_BASES[args.family]
    args.lora_alpha = float(args.rank) if args.lora_alpha is None else args.lora_alpha
    if kind is None and args.train_data_dir is None and args.instance_data_dir is None and args.dataset_name is None:
        args.train_data_dir = str(BUNDLED_DATA)
    if args.mixed_precision is None:
        args.mixed_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # set by accelerate launch
    steps = args.max_train_steps
    kept = ("image_steps", IMAGE_FRACTIONS) if kind is None else ("snapshot_steps", (0.0, 1.0))
    for name, fractions in (("eval_steps", EVAL_FRACTIONS), kept):
        chosen = getattr(args, name) or [round(fraction * steps) for fraction in fractions]
        chosen = sorted({0, *chosen, steps})
        if chosen[0] < 0 or chosen[-1] > steps:
            raise ValueError(f"--{name} {chosen}: steps go from 0 to --max_train_steps {steps}")
        setattr(args, name, chosen)
    # weights are kept as a run is evaluated: what is to be sampled from at a step needs an evaluation there
    args.eval_steps = sorted({*args.eval_steps, *getattr(args, kept[0])})
    if kind is None:
        validate_shared_arguments(args)
    else:
        validate_adapter_arguments(args)
    for label in args.inits:
        name, _, options = label.partition(":")
        check_init_name(name, f"--inits {label!r}")
        of_method = [
            option for option in filter(None, options.split(",")) if option.partition("=")[0] not in RUN_OPTIONS
        ]
        try:
            check_option_names(name, of_method)
        except ValueError as error:
            raise ValueError(f"--inits {label!r}: {error}; options of the run are {', '.join(RUN_OPTIONS)}") from None
    for name in ("inits", "learning_rates", "seeds"):
        values = getattr(args, name)
        if len(set(values)) < len(values):
            raise ValueError(f"--{name} {' '.join(map(str, values))}: name each once")
    return args


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """The samples of text-to-image bases, and what they are scored by."""
    add = parser.add_argument_group("samples").add_argument
    add("--image_steps", nargs="+", type=int, help="steps of the samples (default: 0, a fifth and the end)")
    add("--image_metrics", default="best", choices=("best", "all", "none"), help="runs that are sampled from")
    add("--encoders", nargs="+", help="folders or hub names (default: bundled; DINOv2 and CLIP for a base of yours)")
    add("--num_eval_prompts", type=int, default=12, help="held-out prompts that are sampled (default 12)")
    add("--drift_prompts", nargs="+", help="prompts that have nothing to do with the data")
    add("--validation_inference_steps", type=int, default=15)
    add("--validation_guidance_scale", type=float, default=4.0)
    add("--sample_batch_size", type=int, default=8)
