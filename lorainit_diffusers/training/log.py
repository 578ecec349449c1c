"""`metrics.jsonl`, the trackers, and what is written before the first step."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from lorainit_diffusers.files import write_json, write_text
from lorainit_diffusers.training.options.config import write_run_config
from lorainit_diffusers.training.options.fields import values_of
from lorainit_diffusers.training.run import Run, begin_output
from lorainit_diffusers.training.run_report import write_ranks


class RunLog:
    """`metrics.jsonl`, one line a step or validation, and the trackers.

    Attributes:
        lines: All lines, those of the run that is resumed included.
    """

    def __init__(self, run: Run[Any]) -> None:
        options, state = run.options, run.state
        self.path, self.accelerator = run.output_dir / "metrics.jsonl", run.accelerator
        self.lines = read_metrics(self.path, state.step) if state is not None else []
        if not options.dry_run:
            logging_dir = options.logging_dir if options.report_to is not None else None
            begin_output(run.output_dir, anew=state is None, logging_dir=logging_dir)
        if not run.trains:
            return
        if options.report_to:
            logging_dir = run.output_dir / options.logging_dir
            logging_dir.mkdir(exist_ok=True)
            run.accelerator.init_trackers(
                run.script,
                config={k: v for k, v in values_of(options).items() if isinstance(v, (int, float, str))},
                init_kwargs={"wandb": {"dir": str(logging_dir)}},
            )
        if run.is_main:
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def write(self, line: dict[str, Any]) -> None:
        """Add a line; its `step` is the trackers' step, and its `stage`, where it has one, comes before their names."""
        self.lines.append(line)
        stage = f"{line['stage']}/" if "stage" in line else ""
        values = {f"{stage}{name}": value for name, value in line.items() if name not in ("step", "stage")}
        self.accelerator.log(values, step=int(line["step"]))
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def read_metrics(path: Path, before_step: int) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl` up to and including `before_step`, but that of the end; none without a file."""
    if not path.is_file():
        return []
    whole = [text for text in path.read_text(encoding="utf-8").splitlines() if text.endswith("}")]
    lines = [json.loads(text) for text in whole]  # a killed run may have left half a line at the end
    # the end is evaluated again when the run gets there
    return [line for line in lines if line["step"] <= before_step and line.get("stage") != "end"]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    packages = (
        "lorainit-diffusers",
        "torch",
        "diffusers",
        "transformers",
        "accelerate",
        "peft",
        "safetensors",
        "numpy",
    )
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def describe_run(run: Run[Any]) -> dict[str, Any]:
    """What `config.json` says: the resolved options, the method's hyper-parameters, seeds, versions and hardware."""
    return {
        "arguments": values_of(run.options),
        "method": {"name": run.options.init, **dataclasses.asdict(cast(Any, run.method))},
        "step_zero": run.method.step_zero,
        "seeds": {"seed": run.options.seed, "init_seed": run.options.init_seed},
        "versions": versions(),
        "device": str(run.accelerator.device),
        "num_processes": run.accelerator.num_processes,
        "mixed_precision": run.accelerator.mixed_precision,
    }


def write_start(
    run: Run[Any], num_parameters: int, init_report: Mapping[str, Any], counts: Mapping[str, int]
) -> dict[str, Any]:
    """Write `run.yaml`, `config.json` and `init_report.json` before the first step, so that a killed run has them.

    Args:
        run: The run.
        num_parameters: That are trained.
        init_report: Of the initialisation.
        counts: How many samples there are, by name.

    Returns:
        What `config.json` says.
    """
    config = describe_run(run) | dict(counts)
    config["num_trainable_parameters"] = num_parameters
    if run.is_main:
        write_run_config(run.output_dir, run.given, run.script)
        write_json(run.output_dir / "init_report.json", init_report)
        write_ranks(run.output_dir, init_report)
        write_json(run.output_dir / "config.json", config)
    return config
