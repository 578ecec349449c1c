"""What the report of a comparison says of how it was made, and that a directory holds one comparison alone."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from lorainit_diffusers.comparison.grid import Grid
from lorainit_diffusers.comparison.options import (
    BASELINES,
    TASKS,
    ComparisonOptions,
    ImageComparisonOptions,
    TaskComparisonOptions,
    comparison_facts,
)
from lorainit_diffusers.comparison.samples import encoder_names
from lorainit_diffusers.comparison.tasks import (
    TextToImageTask,
    captions_cut,
    load_family,
    split_records,
)
from lorainit_diffusers.files import write_json
from lorainit_diffusers.training.banner import (
    Line,
    Schedule,
    caption_line,
    count_line,
    format_banner,
    schedule_line,
    size_lines,
)
from lorainit_diffusers.training.bundled import ROOT
from lorainit_diffusers.training.data.notes import DataNotes
from lorainit_diffusers.training.log import versions
from lorainit_diffusers.training.options.fields import default_of, given, values_of
from lorainit_diffusers.training.resume import describe_differences, option_differences
from lorainit_diffusers.training.run import IMAGE_SETS, read_identity, weight_dtype
from lorainit_diffusers.training.run_banner import adapter_text, data_source, task_lines
from lorainit_diffusers.training.task import Task

CONFIG_NAME = "config.json"


def check_same_comparison(grid: Grid) -> None:
    """See that results from an earlier call belong to this comparison.

    Raises:
        ValueError: Naming every option that differs.
    """
    path, options = grid.directory / CONFIG_NAME, grid.options
    if not path.is_file():
        return
    found = option_differences(
        values_of(options),
        json.loads(path.read_text(encoding="utf-8"))["arguments"],
        comparison_facts(options),
        defaults=lambda name: default_of(type(options), name),
        known=read_identity(grid.directory),
    )
    if found:
        clauses = describe_differences(found, f"--output_dir {str(grid.directory)!r} holds runs with")
        raise ValueError(f"{'; '.join(clauses)}; use the same or another directory")


def records_of(options: ComparisonOptions, task: Task | None) -> dict[str, Sequence[Any]]:
    """The samples by what messages call them; text-to-image bases have no `task` here."""
    if isinstance(options, ImageComparisonOptions):
        return dict(zip(IMAGE_SETS, split_records(options), strict=True))
    return dict(getattr(task, "records", {}))


def write_config(grid: Grid, task: Task | None, argv: Sequence[str], device: str) -> None:
    """Write what the report says of the comparison beside its numbers.

    Args:
        grid: Of the comparison.
        task: Where the family is not a text-to-image one.
        argv: The command line.
        device: Of the training.
    """
    options = grid.options
    write_json(
        grid.directory / CONFIG_NAME,
        {
            "arguments": values_of(options),
            "command": " ".join(["python train_scripts/compare_inits.py", *map(shlex.quote, argv)]),
            "family": options.family,
            "base_model": _short(options.pretrained_model_name_or_path),
            **describe_data(options, task),
            "versions": versions(),
            "hardware": hardware(device),
            "date": datetime.date.today().isoformat(),
            "baselines": [label for label in BASELINES if label in options.inits],
            "seeds": options.seeds,
            "learning_rates": dict.fromkeys(options.inits, options.learning_rates),
            "max_train_steps": options.max_train_steps,
        },
    )


def describe_data(options: ComparisonOptions, task: Task | None) -> dict[str, Any]:
    """What `config.json` says of the data and of what is measured on it; text-to-image bases have no `task` here."""
    if isinstance(options, ImageComparisonOptions):
        records, heldout = split_records(options)
        return {
            "dataset": _short(options.data_source),
            "num_images": len(records),
            "num_heldout_images": len(heldout),
            "primary_metric": TextToImageTask.primary_metric,
            "encoder": ", ".join(Path(name).name for name in encoder_names(options)),
        }
    answers = cast(Task, task)
    return {
        "generates_images": False,
        "dataset": _short(cast(TaskComparisonOptions, options).data_source),
        "examples": TASKS[options.family].examples,
        "num_train": answers.num_train,
        "num_validation": answers.num_validation,
        "primary_metric": answers.primary_metric,
    }


def comparison_banner(options: ComparisonOptions, task: Task | None, *, captions: bool) -> str:
    """What is compared on what, before it begins.

    Args:
        options: Of the comparison.
        task: Where the family is not a text-to-image one.
        captions: Load a text-to-image base to see which captions it cuts, although no task of this process does.
    """
    notes = DataNotes()
    if isinstance(options, ImageComparisonOptions):
        lines, num_train = _image_lines(options, notes, captions=captions)
    else:
        lines, num_train = task_lines(task), cast(Task, task).num_train
    counts = {"initialisations": options.inits, "learning rates": options.learning_rates, "seeds": options.seeds}
    sizes = [f"{len(values)} {name}" for name, values in counts.items()]
    runs = len(options.inits) * len(options.learning_rates) * len(options.seeds)
    facts: list[Line] = [
        ("learning rate", ", ".join(f"{rate:g}" for rate in options.learning_rates)),
        ("adapter", adapter_text(options)),
        ("base", str(options.pretrained_model_name_or_path)),
        ("init", "; ".join(options.inits)),
        ("comparison", f"{runs} runs: {' x '.join(sizes)}"),
        ("output", str(options.output_dir)),
    ]
    schedule = Schedule(options.max_train_steps, options.train_batch_size, 1, 1, num_train)
    return format_banner([*lines, schedule_line(schedule), *facts, *notes.lines()])


def _image_lines(options: ImageComparisonOptions, notes: DataNotes, *, captions: bool) -> tuple[list[Line], int]:
    """What images and captions are compared on, and how many are trained on; `notes` gets what reading left out."""
    records, heldout = split_records(options, notes)
    sizes = [size for part in notes.sizes.values() for size in part]
    side = given(options.resolution)
    lines = [
        count_line({"training": len(records), "held out": len(heldout)}, data_source(options)),
        caption_line([record.caption for record in records]),
        *size_lines(sizes, None if side is None else [(side, side)] * len(sizes)),
    ]
    if captions:
        family = load_family(options, torch.device("cpu"), weight_dtype(options.mixed_precision))
        lines += captions_cut(family, [*records, *heldout])
    return lines, len(records)


def hardware(device: str) -> str:
    """The device in words."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{os.cpu_count()} cores of {name}"


def _short(path: str | Path) -> str:
    """A path inside the repository without the repository's own place."""
    return str(path).removeprefix(f"{ROOT}{os.sep}")
