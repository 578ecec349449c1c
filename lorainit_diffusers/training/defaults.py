"""What a run does when nothing is said, by the kind of base: steps, batch, learning rate, checkpoints.

The bundled bases have a few million parameters and train best at rates, batches and lengths that would spoil or waste a
base of a real size. Those of the real ones are what diffusers' examples and their users take for LoRA (1e-4, small
batches), and for vision-language models what TRL and the recipes of the models take.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorainit_diffusers.training.banner import Line
from lorainit_diffusers.training.choices import names_in
from lorainit_diffusers.training.options.fields import Options, default_of

# A local base whose weights take no more than this is a tiny one; the smallest real ones take more.
TINY_BYTES = 64_000_000


@dataclass(frozen=True)
class RunDefaults:
    """Options that suit a base; the names are those of the scripts."""

    learning_rate: float = 1e-4
    train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    max_train_steps: int = 1000
    validation_steps: int = 250
    checkpointing_steps: int = 250


_IMAGE_FAMILIES = names_in("families/__init__.py", "TEXT_TO_IMAGE_FAMILIES")
REAL: dict[str, RunDefaults] = {
    **dict.fromkeys(_IMAGE_FAMILIES, RunDefaults()),
    **dict.fromkeys(("sd", "pixart", "dit"), RunDefaults(train_batch_size=4)),
    "classifier": RunDefaults(5e-4, train_batch_size=32, max_train_steps=500, validation_steps=50),
    "vlm": RunDefaults(2e-4, 4, gradient_accumulation_steps=4, max_train_steps=500, validation_steps=50),
}
_TINY_IMAGES = RunDefaults(1e-3, 8, max_train_steps=200, validation_steps=50, checkpointing_steps=500)
TINY: dict[str, RunDefaults] = {
    **dict.fromkeys(_IMAGE_FAMILIES, _TINY_IMAGES),
    "classifier": RunDefaults(1e-3, 32, max_train_steps=60, validation_steps=10, checkpointing_steps=500),
    "vlm": RunDefaults(1e-3, 16, max_train_steps=100, validation_steps=25, checkpointing_steps=500),
}
# How the banner and the help call the options.
_NAMES = {
    "learning_rate": "learning rate {}",
    "train_batch_size": "batches of {}",
    "gradient_accumulation_steps": "{} of them a step",
    "max_train_steps": "{} steps",
    "validation_steps": "a validation every {}",
    "checkpointing_steps": "a checkpoint every {}",
}


def is_tiny(base: str | None) -> bool:
    """Whether a base is a folder of few weights, as the bundled ones are; `None` stands for a bundled one."""
    if base is None:
        return True
    folder = Path(base)
    weights = [path.stat().st_size for path in folder.rglob("*.safetensors")] if folder.is_dir() else []
    return bool(weights) and sum(weights) <= TINY_BYTES


def defaults_of(family: str, base: str | None) -> RunDefaults:
    """The options that suit a base of this family; `None` is its bundled one."""
    return (TINY if is_tiny(base) else REAL)[family]


def usual_value(options: Options, name: str) -> Any:
    """What an option is when nobody gives it, for a run with these options; `None` where there is no such option."""
    base: str | None = getattr(options, "pretrained_model_name_or_path", None)
    family: str = getattr(options, "family_name", "")
    if family in REAL and name in {field.name for field in dataclasses.fields(RunDefaults)}:
        return getattr(defaults_of(family, base), name)
    return default_of(type(options), name)


def describe_defaults(option: str, families: Sequence[str]) -> str:
    """The default of an option for the help: `default 1e-04; 0.001 for tiny bases such as the bundled ones`."""
    real = _by_family(option, families, REAL)
    tiny = _by_family(option, families, TINY)
    return f"default {real}" if real == tiny else f"default {real}; {tiny} for tiny bases, such as the bundled ones"


def default_lines(family: str, base: str | None, options: Mapping[str, Any]) -> list[Line]:
    """What the banner says of options that are at their family's default.

    Args:
        family: Of the base.
        base: Folder or hub name.
        options: All options of a run by name.
    """
    table = dataclasses.asdict(defaults_of(family, base))
    kept = [
        _NAMES[name].format(_shown(value))
        for name, value in table.items()
        if options.get(name) == value and not (name == "gradient_accumulation_steps" and value == 1)
    ]
    which = f"the tiny bases of {family}" if is_tiny(base) else family
    return [("defaults", f"for {which}: {', '.join(kept)}")] if kept else []


def _by_family(option: str, families: Sequence[str], table: Mapping[str, RunDefaults]) -> str:
    values: dict[Any, list[str]] = {}
    for family in families:
        values.setdefault(getattr(table[family], option), []).append(family)
    if len(values) == 1:
        return _shown(next(iter(values)))
    return ", ".join(f"{_shown(value)} ({', '.join(names)})" for value, names in values.items())


def _shown(value: Any) -> str:
    return f"{value:g}"
