"""What a run prints before it begins: the banner of `banner.py`, from its options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, cast, runtime_checkable

from lorainit_diffusers.families.text_to_image import TextToImageFamily
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
from lorainit_diffusers.training.data.captioned_images import CaptionedImages
from lorainit_diffusers.training.data.images import ImageRecord, image_size
from lorainit_diffusers.training.data.notes import DataNotes
from lorainit_diffusers.training.defaults import default_lines
from lorainit_diffusers.training.options.fields import Options, values_of
from lorainit_diffusers.training.options.initialisation import LoraOptions
from lorainit_diffusers.training.options.text_to_image import TextToImageOptions
from lorainit_diffusers.training.run import Run


@runtime_checkable
class SaysItsData(Protocol):
    """A task that says for the banner what its data are."""

    def data_lines(self) -> list[Line]:
        """Counts, classes or answers, sizes, and what was left out."""
        ...


def image_banner(
    run: Run[TextToImageOptions],
    family: TextToImageFamily,
    images: Mapping[str, CaptionedImages | None],
    notes: DataNotes,
    prompts: Sequence[str],
    schedule: Schedule,
) -> str:
    """The banner of a text-to-image run.

    Args:
        run: The run, its options settled.
        family: The base.
        images: Part of the data -> its images; `training` is the first.
        notes: What reading them found.
        prompts: That samples are drawn from.
        schedule: How long the run trains.
    """
    options = run.options
    lines = [*image_lines(options, family, images, notes, prompts), schedule_line(schedule)]
    rates = f"{options.learning_rate:g}"
    if options.train_text_encoder:
        rates += f", text encoders {options.text_encoder_lr:g}"
    return format_banner([*lines, *run_lines(run_facts(run, rates)), *notes.lines()])


def image_lines(
    options: Options,
    family: TextToImageFamily,
    images: Mapping[str, CaptionedImages | None],
    notes: DataNotes,
    prompts: Sequence[str],
) -> list[Line]:
    """What the images and captions are; captions that are cut are among them."""
    parts = {name: some for name, some in images.items() if some is not None}
    repeats = getattr(options, "repeats", 1)
    each = f" (each {repeats} times)" if repeats > 1 else ""
    counts = {f"{name}{each if name == 'training' else ''}": len(set(some.records)) for name, some in parts.items()}
    train = parts["training"]
    targets = [train.buckets[bucket] for bucket in train.bucket_of_image]
    sizes = notes.sizes.get("training") or header_sizes(train.records)
    named = {record.caption: record.path.name for some in parts.values() for record in some.records}
    named |= {prompt: f"the prompt {shorten(prompt)!r}" for prompt in prompts if prompt not in named}
    cut = cut_lines(list(named.values()), family.caption_lengths(list(named)))
    return [
        count_line(counts, data_source(options)),
        caption_line([record.caption for record in train.records[: len(sizes)]]),
        *size_lines(sizes, targets[: len(sizes)]),
        *_beside_lines(parts),
        *cut,
    ]


def _beside_lines(parts: Mapping[str, CaptionedImages]) -> list[Line]:
    """How many images have a mask or a conditioning image, where any has."""
    found: list[Line] = []
    for label, kind in (("masks", "mask"), ("conditioning", "conditioning image")):
        counts = {name: sum(kind in record.beside for record in set(some.records)) for name, some in parts.items()}
        if any(counts.values()):
            found.append((label, ", ".join(f"{count:,d} {name}" for name, count in counts.items())))
    return found


def task_banner(run: Run[Any], task: Any, schedule: Schedule) -> str:
    """The banner of a run on a task with answers that are right or wrong."""
    rates = f"{run.options.learning_rate:g}"
    if task.family.heads:
        rates += f", the head {run.options.head_lr:g}"
    return format_banner([*task_lines(task), schedule_line(schedule), *run_lines(run_facts(run, rates))])


def task_lines(task: Any) -> list[Line]:
    """What a task says of its data."""
    if isinstance(task, SaysItsData):
        return task.data_lines()
    return [("samples", f"{task.num_train:,d} training, {task.num_validation:,d} validation")]


def run_facts(run: Run[Any], rates: str) -> RunFacts:
    """What a run is, by its options."""
    options = run.options
    warmup = f", {options.lr_warmup_steps} steps of warm-up" if options.lr_warmup_steps else ""
    batches = f"{options.init_num_batches} batches of {options.init_batch_size}"
    base = str(options.pretrained_model_name_or_path)
    return RunFacts(
        base=base,
        init=options.init,
        init_options=dataclasses.asdict(cast(Any, run.method)),
        learning_rate=f"{rates} ({options.lr_scheduler}{warmup})",
        adapter=adapter_text(options),
        output=str(run.output_dir),
        init_batches=None if run.method.observes == "nothing" else batches,
        notes=default_lines(options.family_name, base, values_of(options)),
    )


def adapter_text(options: LoraOptions) -> str:
    """Rank, alpha and kind of the adapters."""
    rank = f"rank {options.rank} on average" if getattr(options, "variable_rank", False) else f"rank {options.rank}"
    kinds = [
        name for option, name in (("use_dora", "DoRA"), ("use_rslora", "rsLoRA")) if getattr(options, option, False)
    ]
    return ", ".join([rank, f"alpha {options.lora_alpha:g}", *kinds])


def data_source(options: Options) -> str:
    """Where the data come from, as the user gave it."""
    for name in ("dataset_name", "instance_data_dir", "train_data_dir", "train_data_file"):
        value = getattr(options, name, None)
        if value is not None:
            return f"--{name} {value}"
    return "the bundled data"


def run_schedule(run: Run[Any], num_samples: int) -> Schedule:
    """How long a run trains, by its settled options."""
    options = run.options
    return Schedule(
        options.max_train_steps,
        options.train_batch_size,
        options.gradient_accumulation_steps,
        run.accelerator.num_processes,
        num_samples,
        run.first_step,
    )


def header_sizes(records: Sequence[ImageRecord]) -> list[tuple[int, int]]:
    """(height, width) of the images, from their headers."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(image_size, records))
