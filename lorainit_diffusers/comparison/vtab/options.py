"""The options of the protocol, and those of its runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple

from lorainit_diffusers.ranges import POSITIVE, SEED
from lorainit_diffusers.training.classification.options import ClassifierTrainingOptions, resolve_classifier_training
from lorainit_diffusers.training.options.checks import (
    build_method,
    check_init_name,
    check_method,
    check_option_names,
)
from lorainit_diffusers.training.options.fields import (
    Facts,
    MayChange,
    Options,
    check_values,
    default_of,
    given,
    option,
    option_facts,
)
from lorainit_diffusers.training.options.parser import parse_options
from lorainit_diffusers.training.ranges import RANK

# What the protocol decides: these options of the training script have no meaning here.
DECIDED = (
    *("init", "rank", "learning_rate", "seed", "init_seed", "train_data_dir", "dataset_name", "validation_fraction"),
    *("shots", "max_train_samples", "init_only", "dry_run", "resume_from_checkpoint", "push_to_hub", "report_to"),
    *("export_merged", "export_rank", "pad_rank", "use_ema", "num_train_epochs"),
)
# 1,600 steps of 64 are about a hundred passes over a thousand images. The protocol augments nothing: some of its tasks
# are about where things are, and how they are turned.
DEFAULTS: Mapping[str, Any] = {
    **{"max_train_steps": 1600, "train_batch_size": 64, "validation_steps": 1, "lr_scheduler": "cosine"},
    **{"random_flip": False, "crop_scale": [1.0, 1.0]},
}
DEFAULT_OUTPUT_DIR = "outputs/vtab"
_GROWS = MayChange("the grid may grow")
# What may differ between calls on one directory, beside the grid.
_FREE = ("output_dir", "cache_dir", "logging_dir")


class Setting(NamedTuple):
    """One run: on training images alone to `select` a learning rate, or on validation images, too, to `test` it."""

    task: str
    init: str
    rank: int
    stage: str
    learning_rate: float
    seed: int

    @property
    def file_name(self) -> str:
        """Of its result."""
        text = "-".join(str(part) for part in (*self[:4], f"{self.learning_rate:g}", self.seed))
        return "".join(c if c.isalnum() or c in "-_.=" else "_" for c in text) + ".json"


@dataclass(frozen=True, kw_only=True)
class ProtocolOptions(Options):
    """What is compared, and on which tasks."""

    _argument_group_name = "protocol"

    vtab_dir: Annotated[str, MayChange("the data may be moved")] = option(None, "a folder for each task")
    tasks: Annotated[list[str] | None, _GROWS] = option(None, "names of the folders (default: all)")
    inits: Annotated[list[str], _GROWS] = option(
        ["gaussian", "orthonormal", "eva", "cntlora"], "name or name:key=value,... (default gaussian to cntlora)"
    )
    ranks: Annotated[list[int], RANK, _GROWS] = option([2, 4, 8, 16], "of the adapters (default 2 4 8 16)")
    learning_rates: Annotated[list[float], POSITIVE, _GROWS] = option(
        [5e-4, 1e-3, 2e-3, 5e-3], "of which the best is chosen (default 5e-4 1e-3 2e-3 5e-3)"
    )
    seeds: Annotated[list[int], SEED, _GROWS] = option(
        [0, 1, 2, 3, 4], "of the tests; learning rates take the first (default 0 1 2 3 4)"
    )


@dataclass(frozen=True, kw_only=True)
class VtabOptions(ProtocolOptions, ClassifierTrainingOptions):
    """Options of `vtab_protocol.py`: the protocol's, and those of the training script that it passes on."""

    def __post_init__(self) -> None:
        # what follows another option (alpha the rank, say) follows it in each run: nothing is filled in here
        check_values(self)


def parse_vtab(argv: Sequence[str] | None, description: str | None) -> VtabOptions:
    """The command line, checked as far as that needs no data.

    Raises:
        ValueError: Naming the option, its value and the remedy.
    """
    options = parse_options(VtabOptions, argv, description, defaults=lambda first: DEFAULTS)
    if given(options.vtab_dir) is None:
        raise ValueError("--vtab_dir is missing: give a folder that has a folder for each task")
    for name in DECIDED:
        if getattr(options, name) != default_of(VtabOptions, name):
            raise ValueError(f"--{name} is decided by the protocol; leave it out")
    for init in options.inits:
        name, _, texts = init.partition(":")
        check_init_name(name, f"--inits {init!r}")
        check_option_names(name, list(filter(None, texts.split(","))))
    for name in ("inits", "ranks", "learning_rates", "seeds", "tasks"):
        values = getattr(options, name)
        if values is not None and len(set(values)) < len(values):
            raise ValueError(f"--{name} {values}: give each once")
    options = replace(
        options, train_data_dir=options.vtab_dir, output_dir=given(options.output_dir) or DEFAULT_OUTPUT_DIR
    )
    first: list[ClassifierTrainingOptions] = []
    for init in options.inits:
        setting = Setting("", init, options.ranks[0], "select", options.learning_rates[0], options.seeds[0])
        first.append(run_options(options, setting))
    base = resolve_classifier_training(first[0]).pretrained_model_name_or_path
    return replace(options, pretrained_model_name_or_path=base)


def run_options(options: VtabOptions, setting: Setting) -> ClassifierTrainingOptions:
    """The options of the training script for one run.

    Raises:
        ValueError: For an unknown initialisation, or one that the other options do not allow.
    """
    init, _, texts = setting.init.partition(":")
    names = [field.name for field in dataclasses.fields(ClassifierTrainingOptions)]
    values: dict[str, Any] = {name: getattr(options, name) for name in names} | {
        **{"init": init, "init_option": [*options.init_option, *filter(None, texts.split(","))]},
        **{"rank": setting.rank, "learning_rate": setting.learning_rate, "seed": setting.seed},
        "data_seed": setting.seed,  # of a new head's weights
    }
    own = ClassifierTrainingOptions(**values)
    check_method(own, build_method(own.init, own.init_option), None)
    return own


def protocol_facts() -> dict[str, Facts]:
    """The facts of the options, of which the grid alone may differ between calls on one directory."""
    own = {field.name for field in dataclasses.fields(ProtocolOptions)}
    facts = option_facts(VtabOptions)
    return {
        name: fact if name in own or name in _FREE else replace(fact, may_change=None) for name, fact in facts.items()
    }
