"""One LoRA training on a task with answers that are right or wrong, from the options to the files.

A task is a base with its data: images and classes, or images, questions and answers. The scripts of classifiers and of
vision-language models differ in the task, and in nothing here.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from common import write_model_card
from common_banner import run_schedule, task_banner
from common_export import (
    check_export,
    describe_training,
    markdown_rows,
    open_best,
    open_hub_repository,
    report_discarded_energy,
    upload,
)
from common_options import build_method, check_method, resolve_epochs, scale_learning_rates
from common_output import (
    announce_resume,
    check_resumed_options,
    check_resumed_steps,
    claim_output_dir,
    find_state,
    identify,
)
from common_plan import print_plan
from common_run import (
    Optimization,
    RunLog,
    enable_gradient_checkpointing,
    initialise,
    start_accelerator,
    train_steps,
    trains,
    weight_dtype,
    write_start,
)
from common_task_options import make_task_parser as make_task_parser
from common_task_options import resolve_task_options as resolve_task_options

from lorainit_diffusers import export
from lorainit_diffusers.evaluation import plot_loss
from lorainit_diffusers.families.base import ModelFamily
from lorainit_diffusers.files import filling, write_json
from lorainit_diffusers.training.output_dir import owning

# The stages of a run that are evaluated thoroughly: what the base does is not always what step 0 does.
STAGES = ("base", "step-0", "end")
# Files that show or quote the samples of the user, which are nobody else's business: they are not uploaded.
PRIVATE_FILES = ("report.html", "mistakes.png", "predictions_*.jsonl")


class Task(Protocol):
    """A base with its data, as a training script and a comparison need it.

    Attributes:
        primary_metric: what curves and comparisons are about, one of those that `validate` and `evaluate` return.
        family: the base.
        targets: layers that get an adapter, by component.
        num_train: training samples.
        num_validation: validation samples.

    A task may also have `records`, the samples by what messages call them: a run is resumed with the same alone.
    """

    primary_metric: str
    family: ModelFamily
    targets: dict[str, list[str]]
    num_train: int
    num_validation: int

    def batches(self, seed: int, batch_size: int, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
        """The training batches of these numbers, as `family.loss` takes them; batch k is a function of (seed, k)."""
        ...

    def validate(self) -> dict[str, float]:
        """Metrics by name from one pass over the validation samples; the same in every call."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Metrics by name from a thorough evaluation."""
        ...

    def write_results(self, output_dir: Path, name: str) -> None:
        """Write what the latest `evaluate` found, sample by sample, for the stage `name`."""
        ...

    def write_report(self, output_dir: Path, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write the pages for a reader over all stages of a run; `lines` are those of `metrics.jsonl`."""
        ...

    def save_processor(self, directory: Path) -> None:
        """Write the files that a merged model needs beside its weights: image processor, tokenizer."""
        ...


@owning
def train_task(
    args: argparse.Namespace,
    make_task: Callable[[torch.device, torch.dtype], Task],
    *,
    name: str,
    tags: Sequence[str],
    usage: Sequence[str],
) -> Path:
    """Train one LoRA on a task and return the directory that it was written to.

    Args:
        args: the checked options of a script.
        make_task: loads the base and its data on a device, the base in a precision.
        name: of the script, for trackers.
        tags: of the base's kind, for the model card.
        usage: lines of Python that load the base as `model`, for the model card.

    Raises:
        ValueError, FileNotFoundError: for what the user can mend, in one line.
    """
    started = time.perf_counter()
    method = build_method(args.init, args.init_option)
    check_method(args, method)
    output_dir = claim_output_dir(args, name)
    state = find_state(args, output_dir)
    repository = open_hub_repository(args)

    # ---- load
    accelerator = start_accelerator(args)
    is_main, count = accelerator.is_main_process, accelerator.num_processes
    task = make_task(accelerator.device, weight_dtype(accelerator.mixed_precision))
    family = task.family
    scale_learning_rates(args, count)
    if state is not None:
        check_resumed_options(args, accelerator, state)
    identify(args, accelerator, state, getattr(task, "records", {}))
    resolve_epochs(args, -(-task.num_train // args.train_batch_size), count)
    if state is not None:
        check_resumed_steps(args, state)
        announce_resume(args, accelerator, state)
    first_step = state.step if state is not None else 0
    log = RunLog(args, accelerator, name, state)

    if is_main:
        print(task_banner(args, method, task, run_schedule(args, count, task.num_train, first_step)), flush=True)

    def evaluate(stage: str, step: int) -> None:
        """Thoroughly, in the main process: the others wait at the next exchange."""
        if not is_main:
            return
        metrics = task.evaluate()
        log.write({"step": step, "stage": stage, **metrics})
        task.write_results(output_dir, stage)
        accelerator.print(
            f"{stage_label(family, stage):7s} {', '.join(f'{key} {value:.4f}' for key, value in metrics.items())}"
        )

    def validate(step: int) -> None:
        if is_main:
            log.write({"step": step, **task.validate()})
            if best is not None:
                best.update(log.lines)

    if trains(args) and state is None:
        evaluate("base", 0)

    # ---- collect and initialise
    numbers = range(accelerator.process_index, args.init_num_batches * count, count)
    batches = {"batches": task.batches(args.init_seed, args.init_batch_size, numbers)}
    init_report = initialise(args, family, method, batches, task.targets, accelerator, state)
    if args.dry_run:
        if is_main:
            sample = next(iter(task.batches(args.seed, 1, range(1))))
            print_plan(args, family, family.adapted, method, sample, args.train_batch_size)
        return output_dir
    check_export(args, family)
    optimization = Optimization(args, family, accelerator, state)
    counts = {"num_train_samples": task.num_train, "num_validation_samples": task.num_validation}
    config = write_start(args, method, accelerator, optimization, init_report, counts)
    if args.init_only:
        if is_main:
            save_adapter(args, task, config, accelerator)
            write_card(args, task, init_report, log.lines, tags, usage)
            if repository is not None:
                upload(args, repository, private_files=PRIVATE_FILES)
            accelerator.print(f"wrote the initialised LoRA to {output_dir}")
        accelerator.wait_for_everyone()
        return output_dir

    # ---- train
    if args.gradient_checkpointing:  # only now: recomputation would count the activations of the collection twice
        enable_gradient_checkpointing(family)
    best = open_best(args, task.primary_metric, partial(write_adapter, args, task, config), state) if is_main else None
    if state is None:
        evaluate("step-0", 0)
        validate(0)
    micro_steps = args.gradient_accumulation_steps * count
    first, last = first_step * micro_steps + accelerator.process_index, args.max_train_steps * micro_steps
    training_batches = task.batches(args.seed, args.train_batch_size, range(first, last, count))

    def write_more(checkpoint: Path) -> None:
        write_adapter(args, task, config, checkpoint)
        if best is not None:
            best.copy_into(checkpoint)

    loop = (optimization, log, init_report, validate, first_step, write_more)
    train_steps(args, family, training_batches, accelerator, *loop)

    # ---- evaluate and save
    with optimization.average.applied():
        evaluate("end", args.max_train_steps)
        if is_main:
            config["total_s"] = round(time.perf_counter() - started, 1)
            title = f"{args.init}, rank {args.rank}, learning rate {args.learning_rate:g}"
            plot_loss(log.lines, output_dir / "loss.png", title, "validation loss")
            save_adapter(args, task, config, accelerator)
            config["best"] = best.summary(log.lines) if best is not None else None
            sentence = best.sentence(log.lines) if best is not None else None
            write_json(output_dir / "config.json", config)
            task.write_report(output_dir, log.lines)
            write_card(args, task, init_report, log.lines, tags, usage, sentence)
            if repository is not None:
                upload(args, repository, private_files=PRIVATE_FILES)
            accelerator.print(summary(task, log.lines))
            accelerator.print(f"done in {config['total_s']} s: {output_dir}")
            if sentence is not None:
                accelerator.print(sentence)
    accelerator.end_training()
    return output_dir


def stages(lines: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The metrics of the thorough evaluations by stage, of a log's lines."""
    found = {str(line["stage"]): line for line in lines if "stage" in line}
    return {stage: found[stage] for stage in STAGES if stage in found}


def stage_label(family: ModelFamily | None, stage: str) -> str:
    """A stage as it is shown: a head that is new and random scores what chance does, whatever the base can."""
    untrained = stage in ("base", "step-0") and getattr(family, "has_new_head", False)
    return f"{stage} (new random head)" if untrained else stage


def summary(task: Task, lines: Sequence[Mapping[str, Any]]) -> str:
    """The primary metric of base, step 0 and end, in one line."""
    values = {stage: float(line[task.primary_metric]) for stage, line in stages(lines).items()}
    family = getattr(task, "family", None)
    named = [f"{stage_label(family, stage)} {value:.3f}" for stage, value in values.items()]
    return f"{task.primary_metric.replace('_', ' ')}: {', '.join(named)}"


def save_adapter(args: argparse.Namespace, task: Task, config: dict[str, Any], accelerator: Accelerator) -> None:
    """Write the adapter in PEFT's format, right on the original base; `config` gets what a compression discards."""
    output_dir, family = Path(args.output_dir), task.family
    report_discarded_energy(args, family, config, accelerator)
    write_adapter(args, task, config, output_dir)
    if args.export_merged:
        for module in family.adapted.values():
            export.save_merged(module, output_dir / "merged")
            with filling(output_dir / "merged") as scratch:
                task.save_processor(scratch)


def write_adapter(args: argparse.Namespace, task: Task, config: Mapping[str, Any], directory: Path) -> None:
    """Write the adapter as it is now into a folder, in PEFT's format."""
    family = task.family
    provenance = {"init": config["method"], "versions": config["versions"], "seeds": config["seeds"]}
    for component, module in family.adapted.items():
        prefix = f"{component}."
        export.save_peft_lora(
            module,
            directory,
            base_model=args.pretrained_model_name_or_path,
            full_modules=[head.removeprefix(prefix) for head in family.heads if head.startswith(prefix)],
            export_rank=args.export_rank,
            pad_rank=args.pad_rank,
            provenance=provenance,
        )


def write_card(
    args: argparse.Namespace,
    task: Task,
    init_report: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    tags: Sequence[str],
    usage: Sequence[str],
    best: str | None = None,
) -> None:
    """Write the model card: what it is, how it was made and how to use it; `best` says which step was the best."""
    by_stage = stages(lines)
    columns = [key for key in next(iter(by_stage.values()), {}) if key not in ("step", "stage")]
    table = [f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)] if by_stage else []
    for stage, line in by_stage.items():
        cells = " | ".join(f"{line[key]:.4f}" if key in line else "" for key in columns)
        table.append(f"| {stage_label(task.family, stage)} | {cells} |")
    base = args.pretrained_model_name_or_path
    code = [*usage, f"model = PeftModel.from_pretrained(model, {args.hub_model_id or args.output_dir!r})"]
    rows = describe_training(args, init_report)
    if best is not None:
        rows["best validation"] = best
    rows |= {
        "trained in full": ", ".join(task.family.heads) or "nothing",
        "data": f"{task.num_train} training and {task.num_validation} validation samples",
    }
    newline = "\n"
    body = f"""
LoRA for `{base}`, initialised with **{args.init}** (step 0: {init_report["step_zero"]}).

{newline.join(table)}

{markdown_rows(rows)}

```python
{newline.join(code)}
```

The licences of the base model and of the training data apply.
"""
    write_model_card(
        Path(args.output_dir) / "README.md",
        title=f"{args.init} LoRA",
        base_model=base,
        library="peft",
        prompt=None,
        tags=[*tags, "lora", "peft", "lorainit-diffusers"],
        body=body,
    )
