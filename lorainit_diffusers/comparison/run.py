"""A comparison from its options to its report: train what is missing of the grid, draw and score samples, write."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from lorainit_diffusers.comparison.grid import (
    PROGRESS_NAME,
    RESULT_NAME,
    SCORES_NAME,
    Grid,
    Part,
    PlannedRun,
    count_files,
    write_results,
)
from lorainit_diffusers.comparison.options import DEFAULT_OUTPUT_DIR, ComparisonOptions, ImageComparisonOptions
from lorainit_diffusers.comparison.provenance import check_same_comparison, comparison_banner, records_of, write_config
from lorainit_diffusers.comparison.report import result_sentences, write_report
from lorainit_diffusers.comparison.samples import encoder_names, runs_to_score, score_runs
from lorainit_diffusers.comparison.tasks import make_answer_task, split_records
from lorainit_diffusers.comparison.training import train_runs
from lorainit_diffusers.comparison.workers import run_workers
from lorainit_diffusers.evaluation import load_encoder
from lorainit_diffusers.families import family_class
from lorainit_diffusers.files import write_json
from lorainit_diffusers.progress import GridProgress
from lorainit_diffusers.training.options.checks import check_family_options
from lorainit_diffusers.training.options.config import write_run_config
from lorainit_diffusers.training.output_dir import owning
from lorainit_diffusers.training.run import (
    IDENTITY_NAME,
    attach_output_dir,
    begin_output,
    check_identity,
    claim_output_dir,
)
from lorainit_diffusers.training.task import Task

SCRIPT = "compare_inits"
# The two halves of the work: every run is trained, and then some are sampled from.
TRAINING, SAMPLING = "training", "sampling"


@owning
def compare(options: ComparisonOptions, argv: Sequence[str]) -> Path:
    """Run what is missing of the grid, then write the results and the report; returns the directory.

    Args:
        options: Checked.
        argv: The command line, for the report.

    Raises:
        ValueError, FileNotFoundError: For what the user can mend, in one line.
    """
    Grid.of(options, Path(options.output_dir))  # a label that is none is said before anything is loaded
    if isinstance(options, ImageComparisonOptions):
        _check_images(options)
    # without an accelerator, accelerate joins the processes of a launch only when told that the processor is meant
    on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    # the grid is split by hand: a process that waits for another one's runs may wait for hours
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(days=30))
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=options.mixed_precision, kwargs_handlers=[patience])
    given, options = options, claim_output_dir(options, SCRIPT, DEFAULT_OUTPUT_DIR, goes_on=True)
    if not accelerator.is_main_process:
        attach_output_dir(options, SCRIPT)
    grid = Grid.of(options, Path(options.output_dir))
    part = Part(accelerator.process_index, accelerator.num_processes)
    workers = 1
    if part.count == 1:
        workers = options.num_workers or (min(2, os.cpu_count() or 1) if on_cpu else 1)
    task: Task | None = None
    if accelerator.is_main_process:
        task = _begin(grid, given, accelerator.device, argv, captions=workers > 1)
    accelerator.wait_for_everyone()

    for phase in (TRAINING, SAMPLING):
        if files := _files(grid, phase):
            # of several processes, the first shows its own part
            total = len(files) * _num_evaluations(grid, phase) // part.count
            shown = accelerator.is_main_process
            with GridProgress(phase, total, len(files), partial(count_files, files), shown=shown) as bar:
                if workers > 1:
                    logs = [grid.directory / f"worker-{worker}.log" for worker in range(workers)]
                    work = partial(work_part, phase, options, str(accelerator.device), workers)
                    run_workers(work, logs, bar, partial(count_evaluations, grid, phase))
                else:
                    _work(grid, phase, accelerator.device, part, bar, task)
        accelerator.wait_for_everyone()
        if files and accelerator.is_main_process:
            write_results(grid)
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        paths = write_report(grid.directory)
        for line in [*(result_sentences(grid.directory) if paths else []), *map(str, paths)]:
            print(line)
    return grid.directory


def _check_images(options: ImageComparisonOptions) -> None:
    """Find what cannot be trained or scored before hours of training."""
    family = family_class(options.family)
    check_family_options(options, family)
    family.check_base(options.pretrained_model_name_or_path)
    split_records(options)
    for encoder in encoder_names(options) if options.draws_images else ():
        load_encoder(encoder)


def _begin(
    grid: Grid, given: ComparisonOptions, device: torch.device, argv: Sequence[str], *, captions: bool
) -> Task | None:
    """Check the directory's earlier runs, write what the comparison is, and say it; the task, where it is at hand.

    Args:
        grid: Of the comparison.
        given: The options as the command line gives them.
        device: Of the training.
        argv: The command line.
        captions: Whether other processes load the base, so that this one has to say which captions it cuts.
    """
    options = grid.options
    check_same_comparison(grid)
    task: Task | None = None
    if not isinstance(options, ImageComparisonOptions):  # what cannot be read is said here, not in a worker's log
        task = make_answer_task(options, device)
    identity = check_identity(options, grid.directory, records_of(options, task))
    begin_output(grid.directory, anew=True)
    write_json(grid.directory / IDENTITY_NAME, identity)
    write_run_config(grid.directory, given, SCRIPT)
    write_config(grid, task, argv, str(device))
    print(comparison_banner(options, task, captions=captions), flush=True)
    return None if captions else task  # each worker has its own


@owning
def work_part(phase: str, options: ComparisonOptions, device: str, count: int, part: int) -> None:
    """The work of one worker: its part of a phase.

    Args:
        phase: `training` or `sampling`.
        options: Of the comparison, with its directory.
        device: Of the training.
        count: Workers.
        part: Number of this one.
    """
    attach_output_dir(options, SCRIPT)
    grid = Grid.of(options, Path(options.output_dir))
    files = _files(grid, phase)
    with GridProgress(phase, 0, len(files), partial(count_files, files), shown=False) as bar:
        _work(grid, phase, torch.device(device), Part(part, count), bar, None)


def _work(grid: Grid, phase: str, device: torch.device, part: Part, bar: GridProgress, task: Task | None) -> None:
    if phase == TRAINING:
        train_runs(grid, device, part, bar, task)
    else:
        score_runs(grid, device, part, bar)


def _files(grid: Grid, phase: str) -> list[Path]:
    """The files that a phase leaves, one a run."""
    if phase == TRAINING:
        return [grid.folder(run) / RESULT_NAME for run in grid.runs]
    return [grid.folder(run) / SCORES_NAME for run in runs_to_score(grid)]


def _num_evaluations(grid: Grid, phase: str) -> int:
    """Of one run in a phase."""
    return len(grid.options.eval_steps if phase == TRAINING else grid.options.snapshots)


def count_evaluations(grid: Grid, phase: str) -> int:
    """Evaluations that are done, for the progress of workers."""
    return sum(_count_of_run(grid, run, phase) for run in grid.runs)


def _count_of_run(grid: Grid, run: PlannedRun, phase: str) -> int:
    folder = grid.folder(run)
    if (folder / (RESULT_NAME if phase == TRAINING else SCORES_NAME)).exists():
        return _num_evaluations(grid, phase)
    if phase == TRAINING and (folder / PROGRESS_NAME).exists():
        return (folder / PROGRESS_NAME).read_bytes().count(b"\n")
    return 0
