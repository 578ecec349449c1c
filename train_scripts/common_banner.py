"""What the scripts print before they begin: the banner of `training/banner.py`, from their options."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, cast, runtime_checkable

from common_data import CaptionedImages, DataNotes, ImageRecord, image_size

from lorainit_diffusers.families.text_to_image import TextToImageFamily
from lorainit_diffusers.methods import Initializer
from lorainit_diffusers.training.banner import (
    Line,
    RunFacts,
    Schedule,
    caption_line,
    count_line,
    cut_lines,
    format_banner,
    run_lines,
    schedule_line,
    shorten,
    size_lines,
)
from lorainit_diffusers.training.defaults import default_lines


@runtime_checkable
class SaysItsData(Protocol):
    """A task that says for the banner what its data are."""

    def data_lines(self) -> list[Line]:
        """Counts, classes or answers, sizes, and what was left out."""
        ...


def image_banner(
    args: argparse.Namespace,
    method: Initializer,
    family: TextToImageFamily,
    images: Mapping[str, CaptionedImages | None],
    notes: DataNotes,
    prompts: Sequence[str],
    schedule: Schedule,
) -> str:
    """The banner of a text-to-image run.

    Args:
        args: its settled options.
        method: the initialisation.
        family: the base.
        images: part of the data -> its images; `training` is the first.
        notes: what reading them found.
        prompts: that samples are drawn from.
        schedule: how long the run trains.
    """
    lines = [*image_lines(args, family, images, notes, prompts), schedule_line(schedule)]
    rates = f"{args.learning_rate:g}"
    if args.train_text_encoder:
        rates += f", text encoders {args.text_encoder_lr:g}"
    return format_banner([*lines, *run_lines(run_facts(args, method, rates)), *notes.lines()])


def image_lines(
    args: argparse.Namespace,
    family: TextToImageFamily,
    images: Mapping[str, CaptionedImages | None],
    notes: DataNotes,
    prompts: Sequence[str],
) -> list[Line]:
    """What the images and captions are; captions that are cut are among them."""
    parts = {name: some for name, some in images.items() if some is not None}
    repeats = getattr(args, "repeats", 1)
    each = f" (each {repeats} times)" if repeats > 1 else ""
    counts = {f"{name}{each if name == 'training' else ''}": len(set(some.records)) for name, some in parts.items()}
    train = parts["training"]
    targets = [train.buckets[bucket] for bucket in train.bucket_of_image]
    sizes = notes.sizes.get("training") or header_sizes(train.records)
    named = {record.caption: record.path.name for some in parts.values() for record in some.records}
    named |= {prompt: f"the prompt {shorten(prompt)!r}" for prompt in prompts if prompt not in named}
    cut = cut_lines(list(named.values()), family.caption_lengths(list(named)))
    return [
        count_line(counts, data_source(args)),
        caption_line([record.caption for record in train.records[: len(sizes)]]),
        *size_lines(sizes, targets[: len(sizes)]),
        *cut,
    ]


def task_banner(args: argparse.Namespace, method: Initializer, task: Any, schedule: Schedule) -> str:
    """The banner of a run on a task with answers that are right or wrong."""
    rates = f"{args.learning_rate:g}"
    if task.family.heads:
        rates += f", the head {args.head_lr:g}"
    return format_banner([*task_lines(task), schedule_line(schedule), *run_lines(run_facts(args, method, rates))])


def task_lines(task: Any) -> list[Line]:
    """What a task says of its data."""
    if isinstance(task, SaysItsData):
        return task.data_lines()
    return [("samples", f"{task.num_train:,d} training, {task.num_validation:,d} validation")]


def comparison_banner(
    args: argparse.Namespace, inits: Sequence[str], lines: Sequence[Line], num_train: int, notes: DataNotes
) -> str:
    """The banner of a comparison: `lines` are those of the data, of which `num_train` samples are trained on."""
    runs = len(inits) * len(args.learning_rates) * len(args.seeds)
    accumulation = getattr(args, "gradient_accumulation_steps", 1)
    schedule = Schedule(args.max_train_steps, args.train_batch_size, accumulation, 1, num_train)
    grid = [(len(inits), "initialisations"), (len(args.learning_rates), "learning rates"), (len(args.seeds), "seeds")]
    facts = [
        ("learning rate", ", ".join(f"{rate:g}" for rate in args.learning_rates)),
        ("adapter", adapter_text(args)),
        ("base", str(args.pretrained_model_name_or_path)),
        ("init", "; ".join(inits)),
        ("comparison", f"{runs} runs: {' x '.join(f'{count} {name}' for count, name in grid)}"),
        ("output", str(args.output_dir)),
    ]
    return format_banner([*lines, schedule_line(schedule), *facts, *notes.lines()])


def run_facts(args: argparse.Namespace, method: Initializer, rates: str) -> RunFacts:
    """What a run is, by its options."""
    warmup = f", {args.lr_warmup_steps} steps of warm-up" if args.lr_warmup_steps else ""
    batches = f"{args.init_num_batches} batches of {args.init_batch_size}"
    return RunFacts(
        base=str(args.pretrained_model_name_or_path),
        init=args.init,
        init_options=dataclasses.asdict(cast(Any, method)),
        learning_rate=f"{rates} ({args.lr_scheduler}{warmup})",
        adapter=adapter_text(args),
        output=str(args.output_dir),
        init_batches=None if method.observes == "nothing" else batches,
        notes=default_lines(vars(args)),
    )


def adapter_text(args: argparse.Namespace) -> str:
    """Rank, alpha and kind of the adapters."""
    rank = f"rank {args.rank} on average" if getattr(args, "variable_rank", False) else f"rank {args.rank}"
    kinds = [name for option, name in (("use_dora", "DoRA"), ("use_rslora", "rsLoRA")) if getattr(args, option, False)]
    return ", ".join([rank, f"alpha {args.lora_alpha:g}", *kinds])


def data_source(args: argparse.Namespace) -> str:
    """Where the data come from, as the user gave it."""
    for name in ("dataset_name", "instance_data_dir", "train_data_dir", "train_data_file"):
        value = getattr(args, name, None)
        if value is not None:
            return f"--{name} {value}"
    return "the bundled data"


def run_schedule(args: argparse.Namespace, num_processes: int, num_samples: int, first_step: int) -> Schedule:
    """How long a run trains, by its settled options."""
    return Schedule(
        args.max_train_steps,
        args.train_batch_size,
        args.gradient_accumulation_steps,
        num_processes,
        num_samples,
        first_step,
    )


def header_sizes(records: Sequence[ImageRecord]) -> list[tuple[int, int]]:
    """(height, width) of the images, from their headers."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(image_size, records))
