"""A task with answers that are right or wrong, within a run: what `train` needs of it.

A task is a base with its data: images and classes, or images, questions and answers. The scripts of classifiers and of
vision-language models differ in the task, and in nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from lorainit_diffusers import export
from lorainit_diffusers.evaluation import plot_loss
from lorainit_diffusers.families.base import ModelFamily
from lorainit_diffusers.files import filling
from lorainit_diffusers.training.log import RunLog
from lorainit_diffusers.training.model_card import CardFacts, write_model_card
from lorainit_diffusers.training.options.checks import TrainOptions
from lorainit_diffusers.training.options.optimisation import scaled_rates, steps_of_epochs
from lorainit_diffusers.training.options.task import TaskOptions
from lorainit_diffusers.training.outputs import describe_training, export_options
from lorainit_diffusers.training.run import Run, check_resumed_options, identify, weight_dtype
from lorainit_diffusers.training.run_banner import run_schedule, task_banner
from lorainit_diffusers.training.stages import stage_label, stages
from lorainit_diffusers.training.train import train


class Task(Protocol):
    """A base with its data, as a training script and a comparison need it.

    Attributes:
        primary_metric: What curves and comparisons are about, one of those that `validate` and `evaluate` return.
        family: The base.
        targets: Layers that get an adapter, by component.
        num_train: Training samples.
        num_validation: Validation samples.

    A task may also have `records`, the samples by what messages call them: a run is resumed with the same alone; and
    `settled`, options that depend on the data, by name.
    """

    primary_metric: str
    family: ModelFamily
    targets: dict[str, list[str]]
    num_train: int
    num_validation: int

    @property
    def usage(self) -> list[str]:
        """Lines of Python that load the base as `model`, for the model card."""
        ...

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

    def write_report(self, output_dir: Path, lines: Sequence[Mapping[str, Any]], options: TrainOptions) -> None:
        """Write the pages for a reader over all stages of a run; `lines` are those of `metrics.jsonl`."""
        ...

    def save_processor(self, directory: Path) -> None:
        """Write the files that a merged model needs beside its weights: image processor, tokenizer."""
        ...


def train_task(
    options: TaskOptions, make_task: Callable[[torch.device, torch.dtype], Task], *, name: str, tags: Sequence[str]
) -> Path:
    """Train one LoRA on a task and return the directory that it was written to.

    Args:
        options: The checked options of a script.
        make_task: Loads the base and its data on a device, the base in a precision.
        name: Of the script, for trackers.
        tags: Of the base's kind, for the model card.

    Raises:
        ValueError, FileNotFoundError: For what the user can mend, in one line.
    """

    def read(options: TaskOptions) -> Callable[[Run[TaskOptions]], TaskTraining]:
        return partial(load_task, make_task=make_task, tags=tags)

    return train(options, read, script=name, output_name=options.output_name)


def load_task(
    run: Run[TaskOptions], make_task: Callable[[torch.device, torch.dtype], Task], tags: Sequence[str]
) -> TaskTraining:
    """Load the base and its data, and settle the options that depend on them."""
    task = make_task(run.accelerator.device, weight_dtype(run.accelerator.mixed_precision))
    count = run.accelerator.num_processes
    run = run.with_options(**getattr(task, "settled", {}), **scaled_rates(run.options, count))
    check_resumed_options(run)
    run = identify(run, getattr(task, "records", {}))
    batches_per_epoch = -(-task.num_train // run.options.train_batch_size)
    run = run.with_options(**steps_of_epochs(run.options, batches_per_epoch, count))
    return TaskTraining(run, task, tags)


class TaskTraining:
    """A task within a run; implements `train.Training`."""

    # they show or quote the samples of the user, which are nobody else's business
    private_files: Sequence[str] = ("report.html", "mistakes.png", "predictions_*.jsonl")

    def __init__(self, run: Run[TaskOptions], task: Task, tags: Sequence[str]) -> None:
        self.run, self.task, self.tags = run, task, tags
        self.family, self.primary_metric = task.family, task.primary_metric
        self.targets: Mapping[str, Sequence[str]] = task.targets
        self.counts: Mapping[str, int] = {
            "num_train_samples": task.num_train,
            "num_validation_samples": task.num_validation,
        }

    def banner(self) -> str:
        """What is going to be trained on what."""
        return task_banner(self.run, self.task, run_schedule(self.run, self.task.num_train))

    def prepare(self, log: RunLog) -> None:
        """Evaluate the base, unless the run goes on from a checkpoint."""
        if self.run.trains and self.run.state is None:
            self.evaluate("base", log)

    def evaluate(self, stage: str, log: RunLog) -> None:
        """Evaluate thoroughly, in the main process: the others wait at the next exchange."""
        if not self.run.is_main:
            return
        metrics = self.task.evaluate()
        step = self.run.options.max_train_steps if stage == "end" else 0
        log.write({"step": step, "stage": stage, **metrics})
        self.task.write_results(self.run.output_dir, stage)
        values = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items())
        self.run.accelerator.print(f"{stage_label(self.family, stage):7s} {values}")

    def validate(self, step: int, log: RunLog) -> None:
        """One pass over the validation samples, in the main process."""
        if self.run.is_main:
            log.write({"step": step, **self.task.validate()})

    def init_batches(self) -> Mapping[str, Any]:
        """The batches that `initialize` takes, by its keywords."""
        options, accelerator = self.run.options, self.run.accelerator
        count = accelerator.num_processes
        numbers = range(accelerator.process_index, options.init_num_batches * count, count)
        return {"batches": self.task.batches(options.init_seed, options.init_batch_size, numbers)}

    def training_batches(self, first_step: int, last_step: int) -> Iterator[Any]:
        """This process's batches of the micro-steps after the first step, up to those of the last."""
        options, accelerator = self.run.options, self.run.accelerator
        count = accelerator.num_processes
        micro_steps = options.gradient_accumulation_steps * count
        first, last = first_step * micro_steps + accelerator.process_index, last_step * micro_steps
        return self.task.batches(options.seed, options.train_batch_size, range(first, last, count))

    def plan_sample(self) -> tuple[Any, int]:
        """A batch of one sample, and how many samples a batch has."""
        options = self.run.options
        return next(iter(self.task.batches(options.seed, 1, range(1)))), options.train_batch_size

    def write_adapter(self, directory: Path, config: Mapping[str, Any]) -> None:
        """Write the adapter in PEFT's format, right on the original base, with the modules that are trained in full."""
        options, heads = self.run.options, self.family.heads
        for component, module in self.family.adapted.items():
            prefix = f"{component}."
            export.save_peft_lora(
                module,
                directory,
                base_model=options.pretrained_model_name_or_path,
                full_modules=[head.removeprefix(prefix) for head in heads if head.startswith(prefix)],
                **export_options(options, config),
            )

    def write_files(self, config: Mapping[str, Any]) -> None:
        """Write the adapter, and with `--export_merged` the whole model."""
        directory = self.run.output_dir
        self.write_adapter(directory, config)
        if self.run.options.export_merged:
            for module in self.family.adapted.values():
                export.save_merged(module, directory / "merged")
                with filling(directory / "merged") as scratch:
                    self.task.save_processor(scratch)

    def write_card(self, log: RunLog, init_report: Mapping[str, Any], best: str | None) -> None:
        """Write the model card: what it is, how it was made and how to use it."""
        options, task = self.run.options, self.task
        by_stage = stages(log.lines)
        columns = [key for key in next(iter(by_stage.values()), {}) if key not in ("step", "stage")]
        scores = {
            stage_label(task.family, stage): [f"{line[key]:.4f}" if key in line else "" for key in columns]
            for stage, line in by_stage.items()
        }
        rows = describe_training(options, init_report)
        if best is not None:
            rows["best validation"] = best
        rows |= {
            "trained in full": ", ".join(task.family.heads) or "nothing",
            "data": f"{task.num_train} training and {task.num_validation} validation samples",
        }
        place = options.hub_model_id or str(self.run.output_dir)
        facts = CardFacts(
            title=f"{options.init} LoRA",
            base_model=options.pretrained_model_name_or_path,
            init=options.init,
            step_zero=init_report["step_zero"],
            tags=[*self.tags, "lora", "peft", "lorainit-diffusers"],
            rows=rows,
            usage="\n".join([*task.usage, f"model = PeftModel.from_pretrained(model, {place!r})"]),
            notes=["The licences of the base model and of the training data apply."],
            library="peft",
            score_columns=columns,
            scores=scores,
        )
        write_model_card(self.run.output_dir / "README.md", facts)

    def write_reports(self, config: Mapping[str, Any], log: RunLog, init_report: Mapping[str, Any]) -> None:
        """Write the loss curve and the task's own pages."""
        options = self.run.options
        title = f"{options.init}, rank {options.rank}, learning rate {options.learning_rate:g}"
        plot_loss(log.lines, self.run.output_dir / "loss.png", title, "validation loss")
        self.task.write_report(self.run.output_dir, log.lines, options)

    def summary(self, log: RunLog) -> str | None:
        """The primary metric of base, step 0 and end, in one line."""
        return summary(self.task, log.lines)


def summary(task: Task, lines: Sequence[Mapping[str, Any]]) -> str:
    """The primary metric of base, step 0 and end, in one line."""
    values = {stage: float(line[task.primary_metric]) for stage, line in stages(lines).items()}
    family = getattr(task, "family", None)
    named = [f"{stage_label(family, stage)} {value:.3f}" for stage, value in values.items()]
    return f"{task.primary_metric.replace('_', ' ')}: {', '.join(named)}"
