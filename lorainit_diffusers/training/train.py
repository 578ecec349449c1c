"""One LoRA training, from the options to the files: load, collect and initialise, train, evaluate, save.

What is trained is a `Training`: text-to-image bases (`text_to_image.py`) and tasks with answers (`task.py`) differ in
it, and in nothing here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lorainit_diffusers.families.base import ModelFamily
from lorainit_diffusers.files import write_json
from lorainit_diffusers.training.best import BestFolder
from lorainit_diffusers.training.dry_run import print_plan
from lorainit_diffusers.training.hub import open_hub_repository, upload
from lorainit_diffusers.training.log import RunLog, write_start
from lorainit_diffusers.training.loop import enable_gradient_checkpointing, train_steps
from lorainit_diffusers.training.optimization import Optimization
from lorainit_diffusers.training.options.checks import TrainOptions, build_method, check_method
from lorainit_diffusers.training.output_dir import owning
from lorainit_diffusers.training.outputs import check_export, open_best, report_discarded_energy
from lorainit_diffusers.training.run import Run, announce_resume, claim_output_dir, find_state, start_run
from lorainit_diffusers.training.signals import StoppedError, stopping_at_once
from lorainit_diffusers.training.start import read_init_file, start_adapters

SomeOptions = TypeVar("SomeOptions", bound=TrainOptions)


class Training(Protocol):
    """A base with its data within a run, as `train` needs it."""

    @property
    def run(self) -> Run[Any]:
        """The run, with the options settled that depend on base, data and processes."""
        ...

    @property
    def family(self) -> ModelFamily:
        """The base."""
        ...

    @property
    def targets(self) -> Mapping[str, Sequence[str]]:
        """Layers that get an adapter, by component."""
        ...

    @property
    def primary_metric(self) -> str:
        """What says which step is the best, one of `evaluation.METRICS`."""
        ...

    @property
    def counts(self) -> Mapping[str, int]:
        """How many samples there are, by the names of `config.json`."""
        ...

    @property
    def private_files(self) -> Sequence[str]:
        """Patterns of files that show the user's data, which are not uploaded."""
        ...

    def banner(self) -> str:
        """What is going to be trained on what, for the reader."""
        ...

    def prepare(self, log: RunLog) -> None:
        """Called before there are adapters: evaluate the base, where that has not been done."""
        ...

    def evaluate(self, stage: str, log: RunLog) -> None:
        """Evaluate step 0 and the end thoroughly (`stage`: `step-0`, `end`)."""
        ...

    def validate(self, step: int, log: RunLog) -> None:
        """Evaluate on the validation samples after a step, with a line in the log."""
        ...

    def init_batches(self) -> Mapping[str, Any]:
        """The batches that `initialize` takes, by its keywords."""
        ...

    def training_batches(self, first_step: int, last_step: int) -> Iterator[Any]:
        """This process's batches of the micro-steps after the first step, up to those of the last."""
        ...

    def plan_sample(self) -> tuple[Any, int]:
        """A batch of one sample, and how many samples a batch has, for the estimate of a dry run."""
        ...

    def write_adapter(self, directory: Path, config: Mapping[str, Any]) -> None:
        """Write the adapter as it is now, in the format that stock readers load, right on the original base."""
        ...

    def write_files(self, config: Mapping[str, Any]) -> None:
        """Write the LoRA in all formats, and merged models where they are asked for, into the run's directory."""
        ...

    def write_card(self, log: RunLog, init_report: Mapping[str, Any], best: str | None) -> None:
        """Write the model card; `best` says which step was the best."""
        ...

    def write_reports(self, config: Mapping[str, Any], log: RunLog, init_report: Mapping[str, Any]) -> None:
        """Write the pages for a reader of a finished run."""
        ...

    def summary(self, log: RunLog) -> str | None:
        """The outcome in one line, where there is one."""
        ...


@stopping_at_once()
@owning
def train(
    options: SomeOptions,
    read: Callable[[SomeOptions], Callable[[Run[SomeOptions]], Training]],
    *,
    script: str,
    output_name: str,
    class_images: bool | None = None,
) -> Path:
    """Train one LoRA and return the directory that it was written to.

    Args:
        options: Checked.
        read: Reads the data, and returns what loads the base and makes a `Training` of both.
        script: Name of the command, for trackers and messages.
        output_name: What the default output directory begins with.
        class_images: Whether the run has images of a class; `None` for a script that cannot have any.

    Raises:
        ValueError, FileNotFoundError: For what the user can mend, in one line.
        StoppedError: After a signal that asks the run to stop.
    """
    started = time.perf_counter()

    # ---- load
    training, repository = _load(options, read, script, output_name, class_images)
    run, family = training.run, training.family
    announce_resume(run)
    init = read_init_file(run, family, training.targets)
    log = RunLog(run)
    if run.is_main:
        print(training.banner(), flush=True)
    training.prepare(log)

    # ---- collect and initialise
    init_report = start_adapters(run, family, training.init_batches, training.targets, init)
    if run.options.dry_run:
        if run.is_main:
            print_plan(run, family, *training.plan_sample())
        return run.output_dir
    check_export(run.options, family)
    optimization = Optimization(run, family)
    num_parameters = sum(parameter.numel() for parameter in optimization.parameters)
    config = write_start(run, num_parameters, init_report, training.counts)
    if run.options.init_only:
        if run.is_main:
            _write_untrained(training, config, log, init_report, repository)
        run.accelerator.wait_for_everyone()
        return run.output_dir

    # ---- train
    best, save = _train(training, optimization, config, log, init_report)

    # ---- evaluate and save
    with _last_step_kept(run, save), optimization.average.applied():
        training.evaluate("end", log)
        if run.is_main:
            config["total_s"] = round(time.perf_counter() - started, 1)
            config["best"] = best.summary(log.lines) if best is not None else None
            sentence = best.sentence(log.lines) if best is not None else None
            finish(training, config, log, init_report, sentence)
            if repository is not None:
                upload(run.options, repository, private_files=training.private_files)
            for line in (training.summary(log), f"done in {config['total_s']} s: {run.output_dir}", sentence):
                if line is not None:
                    run.accelerator.print(line)
    run.accelerator.end_training()
    return run.output_dir


def _load(
    options: SomeOptions,
    read: Callable[[SomeOptions], Callable[[Run[SomeOptions]], Training]],
    script: str,
    output_name: str,
    class_images: bool | None,
) -> tuple[Training, str | None]:
    """The training with its base and data, and the repository to upload to; what is wrong is found early.

    Before the processes join, so that an error ends all of them: options, directory, checkpoint, data, repository.
    """
    method = build_method(options.init, options.init_option)
    check_method(options, method, class_images)
    claimed = claim_output_dir(options, script, f"outputs/{output_name}-{options.init}")
    state = find_state(claimed, Path(claimed.output_dir))
    load = read(claimed)
    repository = open_hub_repository(claimed)
    return load(start_run(script, options, claimed, method, state)), repository


def _train(
    training: Training,
    optimization: Optimization,
    config: Mapping[str, Any],
    log: RunLog,
    init_report: Mapping[str, Any],
) -> tuple[BestFolder | None, Callable[[int], None]]:
    """All steps, with validations and checkpoints.

    Returns:
        The folder of the best one, in the main process, if it is kept; and what writes the checkpoint of a step.
    """
    run, family = training.run, training.family
    if run.options.gradient_checkpointing:  # only now: recomputation would count the collection's activations twice
        enable_gradient_checkpointing(family)

    def write_adapter(directory: Path) -> None:
        training.write_adapter(directory, config)

    best = open_best(run, training.primary_metric, write_adapter) if run.is_main else None

    def validate(step: int) -> None:
        training.validate(step, log)
        if best is not None:
            best.update(log.lines)

    def save(step: int) -> None:
        optimization.save(step, init_report, write_more)

    def write_more(checkpoint: Path) -> None:
        write_adapter(checkpoint)
        if best is not None:
            best.copy_into(checkpoint)

    if run.state is None:
        training.evaluate("step-0", log)
        validate(0)
    batches = training.training_batches(run.first_step, run.options.max_train_steps)
    train_steps(run, family, batches, optimization, log, validate=validate, save=save)
    return best, save


@contextmanager
def _last_step_kept(run: Run[Any], save: Callable[[int], None]) -> Generator[None, None, None]:
    """Write the checkpoint of the last step when a signal ends the block, which comes after that step.

    Raises:
        StoppedError: The one from inside, which says so.
    """
    try:
        yield
    except StoppedError as stopped:
        last = run.options.max_train_steps
        if run.is_main and not (run.output_dir / f"checkpoint-{last}").is_dir():
            save(last)
        raise StoppedError(stopped.number, step=last, steps=last) from None


def _write_untrained(
    training: Training,
    config: Mapping[str, Any],
    log: RunLog,
    init_report: Mapping[str, Any],
    repository: str | None,
) -> None:
    """Write the LoRA as it is initialised (`--init_only`)."""
    run = training.run
    training.write_files({**config, **report_discarded_energy(run, training.family)})
    training.write_card(log, init_report, None)
    if repository is not None:
        upload(run.options, repository, private_files=training.private_files)
    run.accelerator.print(f"wrote the initialised LoRA to {run.output_dir}")


def finish(
    training: Training, config: Mapping[str, Any], log: RunLog, init_report: Mapping[str, Any], best: str | None
) -> None:
    """Write what a finished run leaves: the LoRA in its formats, `config.json`, the card, the pages for a reader.

    Args:
        training: With the weights that are saved in the model.
        config: What `config.json` is to say, beside what a compression discards.
        log: Of the run.
        init_report: Of the initialisation.
        best: The sentence on the best step, where one was kept.
    """
    config = {**config, **report_discarded_energy(training.run, training.family)}
    training.write_files(config)
    write_json(training.run.output_dir / "config.json", config)
    training.write_card(log, init_report, best)
    training.write_reports(config, log, init_report)
