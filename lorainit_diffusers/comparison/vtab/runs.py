"""The protocol from its options to its summary: what is missing is run, the rest is kept."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from lorainit_diffusers.comparison.vtab.data import TaskParts, find_tasks, read_task
from lorainit_diffusers.comparison.vtab.options import (
    DEFAULT_OUTPUT_DIR,
    Setting,
    VtabOptions,
    protocol_facts,
    run_options,
)
from lorainit_diffusers.comparison.vtab.results import (
    SUMMARY_NAME,
    Results,
    selection_settings,
    test_settings,
    write_results,
)
from lorainit_diffusers.files import write_json
from lorainit_diffusers.initialize import initialize
from lorainit_diffusers.methods import Initializer
from lorainit_diffusers.progress import progress_bar
from lorainit_diffusers.training.classification.data import ClassData
from lorainit_diffusers.training.classification.options import ClassifierTrainingOptions
from lorainit_diffusers.training.classification.task import ClassificationTask
from lorainit_diffusers.training.log import versions
from lorainit_diffusers.training.loop import take_step
from lorainit_diffusers.training.optimization import Stepper, parameter_groups
from lorainit_diffusers.training.options.checks import build_method
from lorainit_diffusers.training.options.fields import default_of, values_of
from lorainit_diffusers.training.output_dir import owning
from lorainit_diffusers.training.resume import describe_differences, option_differences
from lorainit_diffusers.training.run import (
    IDENTITY_NAME,
    begin_output,
    check_identity,
    claim_output_dir,
    read_identity,
    start_accelerator,
    weight_dtype,
)

SCRIPT = "vtab_protocol"


@owning
def run_protocol(options: VtabOptions) -> Path:
    """Run what is missing and return the directory of the results.

    Raises:
        ValueError, FileNotFoundError: For what the user can mend, in one line.
    """
    # what is missing is said before hours of work
    parts = {name: read_task(folder) for name, folder in find_tasks(options).items()}
    for task in parts.values():
        task.data("select")
        task.data("test")
    options = claim_output_dir(options, SCRIPT, DEFAULT_OUTPUT_DIR, goes_on=True, shared=True)
    check_directory(options, parts)
    if start_accelerator(options).num_processes > 1:
        raise ValueError("this script runs in one process: start it without a launcher, and share the work by --tasks")
    output_dir = Path(options.output_dir)
    results = Results(output_dir)
    for name, task in parts.items():
        run_missing(options, list(selection_settings(options, name)), results, task.data("select"))
        run_missing(options, list(test_settings(options, results, name)), results, task.data("test"))
        write_results(options, results)
    print((output_dir / SUMMARY_NAME).read_text(encoding="utf-8"))
    return output_dir


def run_missing(options: VtabOptions, settings: Sequence[Setting], results: Results, data: ClassData) -> None:
    """Run what has not finished; the images are decoded once, the base is loaded anew for each."""
    task: ClassificationTask | None = None
    missing = [setting for setting in settings if results.get(setting) is None]
    for setting in progress_bar(missing, desc=data.source, shown=bool(missing)):
        own = run_options(options, setting)
        accelerator = start_accelerator(own)
        if task is None:
            task = ClassificationTask(own, accelerator.device, weight_dtype(accelerator.mixed_precision), data)
        else:
            task = task.anew(own)
        values = run(task, own, accelerator)
        results.add(setting, values)
        tqdm.write(f"{' '.join(map(str, setting))}: accuracy {values['accuracy']:.4f}, {values['total_s']:.0f} s")


def run(task: ClassificationTask, options: ClassifierTrainingOptions, accelerator: Accelerator) -> dict[str, float]:
    """Initialise, train and evaluate a fresh base: metrics and costs.

    Args:
        task: With a base that nothing has been done to.
        options: Of the run.
        accelerator: Of the run.
    """
    started = time.perf_counter()
    family = task.family
    _initialise(task, options, build_method(options.init, options.init_option))
    init_s = time.perf_counter() - started
    stepper = Stepper(options, parameter_groups(options, family), family, accelerator)
    for module in family.adapted.values():
        module.train()
    num_batches = options.max_train_steps * options.gradient_accumulation_steps
    batches = task.batches(options.seed, options.train_batch_size, range(num_batches))
    for step in range(1, options.max_train_steps + 1):
        take_step(options, family, batches, accelerator, stepper, step)
    return {
        **task.evaluate(),
        "num_trainable_parameters": sum(parameter.numel() for parameter in stepper.parameters),
        "init_s": round(init_s, 2),
        "total_s": round(time.perf_counter() - started, 2),
    }


def _initialise(task: ClassificationTask, options: ClassifierTrainingOptions, method: Initializer) -> None:
    initialize(
        task.family,
        method,
        task.batches(options.init_seed, options.init_batch_size, range(options.init_num_batches)),
        rank=options.rank,
        alpha=options.lora_alpha,
        target_modules=task.targets,
        num_batches=options.init_num_batches,
        variable_rank=options.variable_rank,
        rank_budget=options.rank_budget,
        max_rank=options.max_rank,
        seed=options.init_seed,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        lora_dropout=options.lora_dropout,
        memory_budget_gb=options.init_memory_budget_gb,
        statistics_device=options.init_statistics_device,
        progress=False,
    )


def check_directory(options: VtabOptions, parts: Mapping[str, TaskParts]) -> None:
    """See that earlier runs in the directory were made with the same options, base and images, and note them.

    Raises:
        ValueError: Naming every option that differs, or what differs in the data.
    """
    output_dir, facts = Path(options.output_dir), protocol_facts()
    free = {name for name, fact in facts.items() if fact.may_change is not None} | {"train_data_dir"}  # is vtab_dir
    now = {name: value for name, value in values_of(options).items() if name not in free}
    path = output_dir / "config.json"
    if path.is_file():
        found = option_differences(
            now,
            _as_now(json.loads(path.read_text(encoding="utf-8"))["arguments"]),
            facts,
            defaults=lambda name: default_of(VtabOptions, name),
            known=read_identity(output_dir),
        )
        if found:
            clauses = describe_differences(found, f"the runs in {options.output_dir!r} were made with")
            raise ValueError(f"{'; '.join(clauses)}; use the same, or another --output_dir")
    images = {f"data of task {name}": [*task.train, *task.val, *task.test] for name, task in parts.items()}
    identity = check_identity(options, output_dir, images)
    begin_output(output_dir, anew=True)
    write_json(path, {"arguments": now, "versions": versions()})
    write_json(output_dir / IDENTITY_NAME, identity)


def _as_now(before: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an earlier call; the first version wrote what follows another option as one run had it."""
    values = dict(before)
    if "own_alpha" not in values:
        return values
    values |= {"lora_alpha": values.pop("own_alpha"), "head_lr": values.pop("own_head_lr"), "init_seed": None}
    if values["init_batch_size"] == values["train_batch_size"]:
        values["init_batch_size"] = None
    # the protocol's own: these stood for the first run
    return {name: value for name, value in values.items() if name not in ("learning_rate", "data_seed")}
