"""The runs of a comparison: every step is the one that the training scripts take."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from lorainit_diffusers import adapters
from lorainit_diffusers.collect import this_process_alone
from lorainit_diffusers.comparison.grid import PROGRESS_NAME, RESULT_NAME, Grid, Part, PlannedRun
from lorainit_diffusers.comparison.options import ComparisonOptions, HeadRatioOptions
from lorainit_diffusers.comparison.tasks import ComparedTask, make_task
from lorainit_diffusers.evaluation import METRICS
from lorainit_diffusers.files import announce, save_tensors, write_json, write_text
from lorainit_diffusers.initialize import initialize
from lorainit_diffusers.progress import GridProgress
from lorainit_diffusers.training.gradients import DivergedError
from lorainit_diffusers.training.loop import take_step
from lorainit_diffusers.training.optimization import Stepper, head_state_dict, load_heads


class OneProcess(Accelerator):
    """An accelerator for runs that this process trains alone, whatever other processes of a launch train."""

    @property
    def num_processes(self) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]  # whose type is inferred
        """Processes that train a run together."""
        return 1

    @property
    def process_index(self) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """This one among them."""
        return 0

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """What the processes have together, which is what this one has."""
        return tensor


@dataclass(frozen=True)
class StepSettings:
    """What one step of a run depends on, as `training.loop.StepOptions` has it."""

    seed: int
    learning_rate: float
    max_grad_norm: float
    gradient_accumulation_steps: int = 1


@dataclass(frozen=True)
class Start:
    """What the runs of one initialisation and seed begin with.

    Attributes:
        adapters: Of the adapted modules, by name.
        report: Of the initialisation, as JSON has it.
        init_s: Seconds that it took.
    """

    adapters: Mapping[str, Tensor]
    report: Mapping[str, Any]
    init_s: float


def train_runs(
    grid: Grid, device: torch.device, part: Part, bar: GridProgress, task: ComparedTask | None = None
) -> None:
    """Train this process's part of the grid; the runs of one init and seed share the initialisation.

    Args:
        grid: Of the comparison.
        device: Of the base.
        part: The share of this process.
        bar: Hears of every evaluation.
        task: Where it has been loaded already.
    """
    options = grid.options
    groups: dict[tuple[str, int], list[PlannedRun]] = {}
    for run in grid.runs:
        groups.setdefault((run.init.label, run.seed), []).append(run)
    heads: dict[str, Tensor] | None = None
    for group in list(groups.values())[part.places]:
        missing = [run for run in group if not (grid.folder(run) / RESULT_NAME).exists()]
        bar.skip((len(group) - len(missing)) * len(options.eval_steps))
        if not missing:
            continue
        task = task or make_task(options, device)
        heads = head_state_dict(task.family.heads) if heads is None else heads
        load_heads(task.family.heads, heads)
        with this_process_alone():
            start = initialise(task, missing[0], options)
        for run in missing:
            adapters.load_adapter_state_dict(
                dict(task.family.adapted),
                start.adapters,
                use_rslora=options.use_rslora,
                lora_dropout=options.lora_dropout,
            )
            load_heads(task.family.heads, heads)
            train(task, run, grid, start, bar)


def initialise(task: ComparedTask, run: PlannedRun, options: ComparisonOptions) -> Start:
    """The adapters that a run begins with; the task's modules have them afterwards."""
    init = run.init
    num_batches = init.init_num_batches or options.init_num_batches
    report = initialize(
        task.family,
        init.method,
        task.batches(run.seed, options.train_batch_size, range(num_batches)),
        rank=options.rank,
        alpha=options.lora_alpha,
        target_modules=task.targets,
        num_batches=num_batches,
        variable_rank=init.variable_rank,
        parameter_budget=_parameters_of_equal_ranks(task, options) if init.variable_rank else None,
        seed=run.seed,
        use_rslora=options.use_rslora,
        lora_dropout=options.lora_dropout,
        progress=False,
    )
    init_s = report.forward_s + report.statistics_s + report.solve_s
    return Start(adapters.adapter_state_dict(task.family.adapted), report.to_json(), init_s)


def _parameters_of_equal_ranks(task: ComparedTask, options: ComparisonOptions) -> int | None:
    """What `--equal_parameters` holds variable ranks to; `None` without it."""
    if not options.equal_parameters:
        return None
    layers = [
        layer
        for name, module in task.family.adapted.items()
        for layer in adapters.target_layers(module, task.targets[name]).values()
    ]
    return sum(options.rank * (layer.in_features + layer.out_features) for layer in layers)


def train(task: ComparedTask, run: PlannedRun, grid: Grid, start: Start, bar: GridProgress) -> None:
    """Train one run from the adapters as they are; numbers that are no longer finite end it and count as the worst."""
    options = grid.options
    device = next(p.device for module in task.family.adapted.values() for p in module.parameters())
    accelerator = OneProcess(cpu=device.type == "cpu", mixed_precision=options.mixed_precision)
    stepper = make_stepper(task, run, options, accelerator)
    settings = StepSettings(run.seed, run.learning_rate, options.max_grad_norm)
    record = RunRecord(grid, run, task, start)
    for module in task.family.adapted.values():
        module.train()
    record.evaluate(0, 0.0)
    bar.update()
    train_s = 0.0
    batches = task.batches(run.seed, options.train_batch_size, range(options.max_train_steps))
    for step, batch in enumerate(batches, start=1):
        started = time.perf_counter()
        if not record.diverged:
            try:
                take_step(settings, task.family, iter([batch]), accelerator, stepper, step)
            except DivergedError:
                record.diverged = True
                stepper.optimizer.zero_grad()  # the next run has the same parameters
        train_s += time.perf_counter() - started
        if step in options.eval_steps:
            record.evaluate(step, train_s)
            bar.update()
    record.finish()


def make_stepper(task: ComparedTask, run: PlannedRun, options: ComparisonOptions, accelerator: Accelerator) -> Stepper:
    """What moves the weights of a run: the adapters, the factors A at their own rate where they have one, the heads."""
    modules, heads = task.family.adapted, task.family.heads
    trained = [p for module in modules.values() for p in adapters.trainable_parameters(module)]
    of_heads = [p for head in heads.values() for p in head.parameters()]
    groups: list[dict[str, Any]] = [{"params": trained, "lr": run.learning_rate}]
    if run.init.a_lr_ratio != 1.0:
        groups = [
            {"params": trained[0::2], "lr": run.learning_rate * run.init.a_lr_ratio},
            {"params": trained[1::2], "lr": run.learning_rate},
        ]
    if of_heads:
        ratio = options.head_lr_ratio if isinstance(options, HeadRatioOptions) else 1.0
        groups.append({"params": of_heads, "lr": run.learning_rate * ratio})
    return Stepper(options, groups, task.family, accelerator, [*trained, *of_heads])


class RunRecord:
    """What a run has been measured at, written as it comes, and the weights of the steps that are kept.

    Attributes:
        rows: One an evaluation.
        diverged: Whether the weights are no longer finite; what comes then is the worst that can be.
    """

    def __init__(self, grid: Grid, run: PlannedRun, task: ComparedTask, start: Start) -> None:
        self.options, self.task, self.start = grid.options, task, start
        self.directory: Path = grid.folder(run)
        self.rows: list[dict[str, Any]] = []
        self.diverged = False
        (self.directory / "snapshots").mkdir(parents=True, exist_ok=True)
        write_text(self.directory / PROGRESS_NAME, "")
        write_json(self.directory / "init_report.json", start.report)

    def evaluate(self, step: int, train_s: float) -> None:
        """Validate, note the scores, and keep the weights where they are wanted.

        Args:
            step: Number of the step.
            train_s: Seconds of training up to there.
        """
        scores = {} if self.diverged else self.task.validate()
        if not scores or not all(map(math.isfinite, scores.values())):
            # a model that gives no numbers still has an accuracy
            names = scores or [name for name in self.rows[0] if name not in ("step", "train_s")]
            scores = {name: -math.inf if METRICS[name].higher_is_better else math.inf for name in names}
        primary = {self.task.primary_metric: scores[self.task.primary_metric]}
        self.rows.append({"step": step, **primary, **scores, "train_s": train_s})
        if step in self.options.snapshots and not self.diverged:
            family = self.task.family
            weights = {**adapters.adapter_state_dict(family.adapted), **head_state_dict(family.heads)}
            save_tensors(weights, self.directory / "snapshots" / f"step-{step:06d}.safetensors")
        announce(self.directory / PROGRESS_NAME)
        with (self.directory / PROGRESS_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")

    def finish(self) -> None:
        """Write the result: a run either has it whole, or is run again."""
        modules, heads = self.task.family.adapted.values(), self.task.family.heads.values()
        of_heads = sum(p.numel() for head in heads for p in head.parameters())
        result = {
            "rank": self.options.rank,
            "num_parameters": sum(p.numel() for module in modules for p in adapters.trainable_parameters(module)),
            **({"num_head_parameters": of_heads} if of_heads else {}),
            "init_s": self.start.init_s,
            "rows": self.rows,
        }
        write_json(self.directory / RESULT_NAME, result)
