"""The options of a comparison, and the kinds of bases that it compares on; read without importing torch."""

from __future__ import annotations

import importlib
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, TypeVar

from lorainit_diffusers.ranges import COUNT, COUNT_OR_NONE, NOT_NEGATIVE, POSITIVE, SEED
from lorainit_diffusers.training.bundled import BUNDLED_BASES, BUNDLED_DATA, bundled
from lorainit_diffusers.training.choices import init_names, names_in
from lorainit_diffusers.training.defaults import REAL, is_tiny
from lorainit_diffusers.training.options.checks import check_adapter_options, check_init_name, check_option_names
from lorainit_diffusers.training.options.config import read_config
from lorainit_diffusers.training.options.fields import Facts, MayChange, Options, given, option, option_facts
from lorainit_diffusers.training.options.initialisation import LoraOptions
from lorainit_diffusers.training.options.model import BaseOptions, FlowOptions
from lorainit_diffusers.training.options.optimisation import OptimizerOptions
from lorainit_diffusers.training.options.parser import ScriptParser, parse_options
from lorainit_diffusers.training.options.run import OutputOptions
from lorainit_diffusers.training.options.text_to_image import ImageTaskOptions, check_data_source

# Fractions of the budget at which runs are evaluated: dense where the curves are steep.
EVAL_FRACTIONS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
IMAGE_FRACTIONS = (0.0, 0.2, 1.0)
SNAPSHOT_FRACTIONS = (0.0, 1.0)
# What may stand behind an init's name, beside the options of its method.
RUN_OPTIONS = ("variable_rank", "init_num_batches", "a_lr_ratio")
BASELINES = ("gaussian", "orthonormal")
DEFAULT_OUTPUT_DIR = "outputs/compare-inits"
DEFAULT_INITS = ["gaussian", "orthonormal", "cntlora", "gradient_step"]
# What suits the bundled bases; a family in `TASKS` has some of its own.
DEFAULTS: Mapping[str, Any] = {
    **{"learning_rates": [1e-3, 2e-3], "max_train_steps": 100, "train_batch_size": 8, "init_num_batches": 64}
}
_GROWS = MayChange("the grid may grow")


@dataclass(frozen=True)
class TaskKind:
    """A family that is no text-to-image one: its options, its task, and what is compared when nothing is said.

    Attributes:
        options: `module:Class` of the options, a `TaskComparisonOptions`.
        check: `module:function` that fills in and checks what the task reads of them, and returns them.
        task: `module:Class` of the task, which is made from the options, a device and a dtype.
        examples: What the data consists of, in the report's words.
        defaults: Of the options of the comparison.
    """

    options: str
    check: str
    task: str
    examples: str
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])


_OPTIONS = "lorainit_diffusers.comparison.task_options"
_TRAINING = "lorainit_diffusers.training"
TASKS: dict[str, TaskKind] = {
    "classifier": TaskKind(
        options=f"{_OPTIONS}:ClassifierComparisonOptions",
        check=f"{_TRAINING}.classification.options:resolve_classification",
        task=f"{_TRAINING}.classification.task:ClassificationTask",
        examples="images",
        defaults={"learning_rates": [1e-3, 2e-3], "max_train_steps": 60, "train_batch_size": 32},
    ),
    "vlm": TaskKind(
        options=f"{_OPTIONS}:QuestionComparisonOptions",
        check=f"{_TRAINING}.questions.options:resolve_questions",
        task=f"{_TRAINING}.questions.task:QuestionAnsweringTask",
        examples="questions",
        defaults={"learning_rates": [1e-3, 2e-3], "max_train_steps": 60, "train_batch_size": 16},
    ),
}


def known_families() -> list[str]:
    """What `--family` may be."""
    return [*names_in("families/__init__.py", "TEXT_TO_IMAGE_FAMILIES"), *TASKS]


@dataclass(frozen=True, kw_only=True)
class GridOptions(Options):
    """What is compared."""

    _argument_group_name = "comparison"

    family: str = option("sd", f"what the base is, of {', '.join(known_families())} (default sd)")
    inits: Annotated[list[str], _GROWS] = option(
        DEFAULT_INITS, f"of {', '.join(init_names())}, with options after a colon"
    )
    learning_rates: Annotated[list[float], POSITIVE, _GROWS] = option(
        [1e-3, 2e-3],
        "of the LoRA (default 0.001 0.002; for bases of a real size the family's usual one and twice that)",
    )
    seeds: Annotated[list[int], SEED, _GROWS] = option([0, 1], "seeds of data, noise and adapters (default 0 1)")
    eval_steps: Annotated[list[int], COUNT_OR_NONE] = option(None, "steps of the validation (default: 0 and ten more)")
    equal_parameters: bool = option(False, "equal number of parameters, not sum of ranks")
    init_num_batches: Annotated[int, COUNT] = option(64, "batches that the collection pass sees (default 64)")
    num_workers: Annotated[int | None, COUNT, MayChange("every run is one process's own")] = option(
        None, "processes on this machine (default: 1 a GPU, up to 2 on the processor)"
    )


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions(GridOptions, OutputOptions, BaseOptions, LoraOptions, OptimizerOptions, ABC):
    """What every comparison has."""

    @property
    @abstractmethod
    def snapshots(self) -> list[int]:
        """The steps whose weights are kept."""

    @property
    def draws_images(self) -> bool:
        """Whether runs have samples that are scored."""
        return False


@dataclass(frozen=True, kw_only=True)
class ScoredImageOptions(Options):
    """The samples of text-to-image bases, and what they are scored by."""

    _argument_group_name = "samples"

    image_steps: Annotated[list[int], COUNT_OR_NONE] = option(
        None, "steps of the samples (default: 0, a fifth and the end)"
    )
    image_metrics: Annotated[str, MayChange("says which runs are sampled from")] = option(
        "best", "runs that are sampled from (default best)", choices=("best", "all", "none")
    )
    encoders: list[str] | None = option(
        None, "folders or hub names (default: bundled; DINOv2 and CLIP for a base of yours)"
    )
    num_eval_prompts: Annotated[int, COUNT] = option(12, "held-out prompts that are sampled (default 12)")
    drift_prompts: list[str] | None = option(None, "prompts that have nothing to do with the data")
    validation_inference_steps: Annotated[int, COUNT] = option(15, "denoising steps of a sample (default 15)")
    validation_guidance_scale: Annotated[float, NOT_NEGATIVE] = option(
        4.0, "classifier-free guidance of a sample (default 4)"
    )
    sample_batch_size: Annotated[int, COUNT, MayChange("every image has its own seed")] = option(
        8, "images that are drawn at once (default 8)"
    )


@dataclass(frozen=True, kw_only=True)
class ImageComparisonOptions(ComparisonOptions, ImageTaskOptions, FlowOptions, ScoredImageOptions):
    """A comparison on a text-to-image base."""

    @property
    def snapshots(self) -> list[int]:
        """The steps that samples are drawn from."""
        return self.image_steps

    @property
    def draws_images(self) -> bool:
        """Whether `--image_metrics` wants any."""
        return self.image_metrics != "none"


@dataclass(frozen=True, kw_only=True)
class SnapshotOptions(Options):
    """What is kept of a run that draws no images."""

    _argument_group_name = "snapshots"

    snapshot_steps: Annotated[list[int], COUNT_OR_NONE] = option(
        None, "steps whose weights are kept (default: 0 and the end)"
    )


@dataclass(frozen=True, kw_only=True)
class TaskComparisonOptions(ComparisonOptions, SnapshotOptions):
    """A comparison on a task with answers that are right or wrong."""

    @property
    def snapshots(self) -> list[int]:
        """What `--snapshot_steps` says."""
        return self.snapshot_steps

    @property
    def data_source(self) -> str:
        """Folder, file or dataset that is trained on."""
        names = ("train_data_dir", "train_data_file", "dataset_name")
        return str(next(value for name in names if (value := getattr(self, name, None)) is not None))


@dataclass(frozen=True, kw_only=True)
class HeadRatioOptions(Options):
    """How fast modules that are trained in full are trained beside the adapters."""

    _argument_group_name = "head"

    head_lr_ratio: Annotated[float, NOT_NEGATIVE] = option(1.0, "the head's learning rate / the LoRA's (default 1)")


SomeOptions = TypeVar("SomeOptions", bound=ComparisonOptions)


def load(place: str) -> Any:
    """The class or function at `module:name`, imported now."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def parse_comparison(argv: Sequence[str] | None, description: str | None) -> ComparisonOptions:
    """The command line of a comparison, checked as far as that needs no model.

    Raises:
        ValueError: Naming the option, its value and the remedy.
    """
    family = _family(sys.argv[1:] if argv is None else argv)
    kind = TASKS.get(family)
    options: type[ComparisonOptions] = ImageComparisonOptions if kind is None else load(kind.options)

    def defaults(first: Mapping[str, Any]) -> Mapping[str, Any]:
        return usual_options(family, first["pretrained_model_name_or_path"])

    found = parse_options(options, argv, description, defaults=defaults)
    return resolve_comparison(found)


def usual_options(family: str, base: str | None) -> dict[str, Any]:
    """The options that suit a base, where nothing is said; `base` is `None` for the bundled one."""
    kind = TASKS.get(family)
    defaults = {**DEFAULTS, **(kind.defaults if kind is not None else {})}
    if family in REAL and not is_tiny(base):
        usual = REAL[family]
        defaults["learning_rates"] = [usual.learning_rate, 2 * usual.learning_rate]
        defaults["max_train_steps"] = usual.max_train_steps
        defaults["train_batch_size"] = usual.train_batch_size * usual.gradient_accumulation_steps
    return defaults


def comparison_facts(options: ComparisonOptions) -> dict[str, Facts]:
    """The facts of the options; a comparison that goes on has as many steps as before, unlike a training."""
    facts = option_facts(type(options))
    return {**facts, "max_train_steps": replace(facts["max_train_steps"], may_change=None)}


def resolve_comparison(options: ComparisonOptions) -> ComparisonOptions:
    """Fill in what depends on other options, and find what cannot work before anything is loaded.

    Raises:
        ValueError: Naming the option, its value and the remedy.
    """
    kind = TASKS.get(options.family)
    base = given(options.pretrained_model_name_or_path)
    if base is None:
        if options.family not in BUNDLED_BASES:
            raise ValueError(
                f"--pretrained_model_name_or_path is missing, and --family {options.family} has no bundled base: "
                "give a folder in the diffusers layout or a hub name"
            )
        base = bundled(BUNDLED_BASES[options.family], "--pretrained_model_name_or_path")
    precision = options.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # of accelerate launch
    output_dir = given(options.output_dir) or DEFAULT_OUTPUT_DIR
    options = replace(options, pretrained_model_name_or_path=base, mixed_precision=precision, output_dir=output_dir)
    if isinstance(options, ImageComparisonOptions):
        if (options.train_data_dir, options.instance_data_dir, options.dataset_name) == (None, None, None):
            options = replace(options, train_data_dir=bundled(BUNDLED_DATA, "--train_data_dir"))
        options = _settle_steps(options, "image_steps", IMAGE_FRACTIONS)
        check_data_source(options)
    else:
        options = _settle_steps(options, "snapshot_steps", SNAPSHOT_FRACTIONS)
    check_adapter_options(options, options)
    _check_grid(options)
    return options if kind is None else load(kind.check)(options)


def _settle_steps(options: SomeOptions, kept: str, fractions: Sequence[float]) -> SomeOptions:
    """The steps at which runs are evaluated, and those whose weights are kept, each in order and with both ends."""
    steps = options.max_train_steps
    settled: dict[str, list[int]] = {}
    for name, shares in (("eval_steps", EVAL_FRACTIONS), (kept, fractions)):
        chosen: list[int] = getattr(options, name) or [round(share * steps) for share in shares]
        chosen = sorted({0, *chosen, steps})
        if chosen[0] < 0 or chosen[-1] > steps:
            raise ValueError(f"--{name} {chosen}: steps go from 0 to --max_train_steps {steps}")
        settled[name] = chosen
    # weights are kept as a run is evaluated: what is to be sampled from at a step needs an evaluation there
    settled["eval_steps"] = sorted({*settled["eval_steps"], *settled[kept]})
    return replace(options, **settled)


def _check_grid(options: ComparisonOptions) -> None:
    for label in options.inits:
        name, _, texts = label.partition(":")
        check_init_name(name, f"--inits {label!r}")
        of_method = [text for text in filter(None, texts.split(",")) if text.partition("=")[0] not in RUN_OPTIONS]
        try:
            check_option_names(name, of_method)
        except ValueError as error:
            raise ValueError(f"--inits {label!r}: {error}; options of the run are {', '.join(RUN_OPTIONS)}") from None
    for name in ("inits", "learning_rates", "seeds"):
        values = getattr(options, name)
        if len(set(values)) < len(values):
            raise ValueError(f"--{name} {' '.join(map(str, values))}: name each once")


def _family(argv: Sequence[str]) -> str:
    """What the command line, or else its `--config`, says that the base is: each family has options of its own.

    Raises:
        ValueError: For a family that there is not.
    """
    parser = ScriptParser(add_help=False)
    parser.add_argument("--family", choices=known_families())
    parser.add_argument("--config")
    found = parser.parse_known_args(list(argv))[0]
    if found.family is not None or found.config is None:
        return found.family or "sd"
    named = read_config(found.config).values.get("family", "sd")
    if named not in known_families():
        raise ValueError(
            f"--config {found.config}: family {named!r} is unknown; choose from {', '.join(known_families())}"
        )
    return named
