"""The model cards of the tiny models, and what the cards of those that answer have in common."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import emoji_pictures as emoji
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from recipe_options import TaskRecipeOptions
from shared import Phase, load_checkpoint
from torch import nn

from lorainit_diffusers.files import write_text


def picture_source(key: str, *, use: str = "") -> dict[str, str]:
    """What the model cards say of a package of pictures."""
    package = emoji.PACKAGES[key]
    name = f"{package.name} {package.version}"
    return {"source": package.source, "package": name, "licence": package.licence, "use": use}


def render_card(template: str, **values: Any) -> str:
    """A model card as Markdown.

    Args:
        template: File in `templates`.
        values: What it says, by the names of the template.
    """
    # the page is Markdown: HTML's escaping would show in the code and in the commands
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    filters: dict[str, Any] = {"number": _number, "thousands": _thousands, "millions": _millions}
    environment.filters.update(filters)
    return environment.get_template(template).render(values)


def write_card(directory: Path, template: str, **values: Any) -> None:
    """Writes the card of a model, `README.md`, beside its weights; `size` is that of all its files, in bytes."""
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    write_text(directory / "README.md", render_card(template, size=size, **values))


def _number(value: float, digits: int) -> str:
    return f"{float(value):.{digits}f}"  # `float` says of a value that is missing which one it is


def _thousands(count: int) -> str:
    return f"{int(count):,}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f}"


def num_parameters(module: nn.Module) -> int:
    """How many numbers a module learns."""
    return sum(p.numel() for p in module.parameters())


def card_fields(options: TaskRecipeOptions, phase: Phase, names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """What the model cards of models that answer say of data, training and licences, by the names of their fields.

    Args:
        options: Of the recipe.
        phase: Its training.
        names: Concepts by style, of training and figures.
    """
    state = load_checkpoint(options.work_dir / phase.name / "checkpoint.safetensors")[1]
    minutes, step, processes = state["elapsed_s"] / 60, int(state["step"]), int(state["num_processes"])
    together = options.batch_size * processes
    num_images = sum(len(names[style]) for style in emoji.CLASSIFIER_STYLES)
    uses = {key: "training" if key in emoji.CLASSIFIER_STYLES else "figures" for key in names}
    uses["emojibase"] = "names and groups"
    limited = f"--{phase.name}_minutes {minutes:.0f}"
    return {
        "num_images": num_images,
        "num_concepts": len(set().union(*(names[style] for style in emoji.CLASSIFIER_STYLES))),
        "styles": emoji.CLASSIFIER_STYLES,
        "num_steps": step,
        "batch_size": together,
        "exposures": step * together / num_images,
        "minutes": minutes,
        "loss": state["loss"],
        "hardware": options.hardware or _hardware(),
        "date": options.date,
        "seed": options.seed,
        "launcher": "python" if processes == 1 else f"torchrun --nproc_per_node {processes}",
        "flags": limited if phase.budget.minutes else f"--{phase.name}_minutes 0 --{phase.name}_steps {step}",
        "sources": [picture_source(key, use=use) for key, use in uses.items()],
    }


def _hardware() -> str:
    """What this machine has."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} {platform.machine()} cores"
