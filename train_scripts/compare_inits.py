"""Compare initialisations: the same data, seeds and budget for each, over learning rates and seeds.

    python train_scripts/compare_inits.py --output_dir outputs/compare

trains {inits} x {learning rates} x {seeds} on the bundled base and style set, scores them over the steps and writes
`report.html`, with the tables and pictures that it shows beside it. `--family sd3` takes the bundled diffusion
transformer, `--family classifier` and `--family vlm` the bundled image classifier and vision-language model with their
data, and `--pretrained_model_name_or_path` a base of yours; `--family vlm --help` has the options of that family. An
init may carry options, its method's or those of the run:

    --inits gaussian cntlora cntlora:gauge=balanced cntlora:variable_rank=true eva:init_num_batches=8

Start it again after an interruption: finished runs are kept, and the results are those of an uninterrupted one. The
grid may grow between calls. Under `accelerate launch` with several processes the grid is split among them.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from common_compare_options import BASELINES, TASKS, parse_comparison

from lorainit_diffusers.training.cli_parser import run_script


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        ValueError: naming the option, its value and the remedy.
    """
    return parse_comparison(__doc__, argv)


if __name__ == "__main__":
    run_script(parse_args)  # a mistake in the options is answered before the imports below, which take seconds

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from common import (
    ROOT,
    public_arguments,
    save_sample_row,
    seeded_generator,
    versions,
)
from common_banner import comparison_banner, task_lines
from common_compare import (
    ImageScorer,
    TextToImageTask,
    encoder_names,
    image_comparison_lines,
    make_task,
    split_records,
)
from common_data import DataNotes
from common_options import build_method, check_family_options, make_optimizer
from common_output import (
    IDENTITY_NAME,
    IMAGE_SETS,
    attach_output_dir,
    begin_output,
    check_identity,
    claim_output_dir,
    read_identity,
)
from common_run import head_state_dict, load_heads
from common_tasks import Task
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file

from lorainit_diffusers import adapters
from lorainit_diffusers.comparison import Comparison, result_sentences, write_report
from lorainit_diffusers.evaluation import METRICS, load_encoder
from lorainit_diffusers.families import family_class
from lorainit_diffusers.files import announce, replacing, save_tensors, write_json, write_text
from lorainit_diffusers.initialize import initialize
from lorainit_diffusers.methods import Initializer
from lorainit_diffusers.methods.declared import gives_scores, needs_reference
from lorainit_diffusers.progress import GridProgress
from lorainit_diffusers.ranges import COUNT, NOT_NEGATIVE
from lorainit_diffusers.training.gradients import clip_gradients, weight_at_fault
from lorainit_diffusers.training.output_dir import owning
from lorainit_diffusers.training.resume import describe_differences, option_differences

# A killed comparison goes on with other values of these alone, and why.
FREE_TO_CHANGE = {
    "output_dir": "the directory may be moved",
    "inits": "the grid may grow",
    "learning_rates": "the grid may grow",
    "seeds": "the grid may grow",
    "num_workers": "every run is one process's own",
    "part": "every run is one process's own",
    "image_metrics": "says which runs are sampled from",
    "sample_batch_size": "every image has its own seed",
    "cache_dir": "where downloads lie",
}
# Options that name the data, the first one that is given.
DATA_ARGUMENTS = ("instance_data_dir", "train_data_dir", "train_data_file", "dataset_name")
Row = dict[str, Any]
ComparedTask = TextToImageTask | Task


@dataclass(frozen=True)
class Init:
    """One column of the comparison: a method with its hyper-parameters, and what else sets its runs apart.

    Attributes:
        label: as on the command line.
        method: the configured method.
        variable_rank: ranks by score under the budget.
        init_num_batches: batches of the collection pass.
        a_lr_ratio: learning rate of A divided by that of B (0 freezes A; LoRA+, arXiv:2402.12354, has it below 1).
    """

    label: str
    name: str
    method: Initializer
    variable_rank: bool = False
    init_num_batches: int | None = None
    a_lr_ratio: float = 1.0

    @classmethod
    def parse(cls, label: str) -> Init:
        """Read `name` or `name:key=value,key=value`.

        Raises:
            ValueError: for an unknown name, key or value.
        """
        name, _, text = label.partition(":")
        of_run: dict[str, Any] = {}
        of_method: list[str] = []
        kinds: dict[str, Callable[[str], Any]] = {
            "variable_rank": lambda value: {"true": True, "false": False}[value.lower()],
            "init_num_batches": int,
            "a_lr_ratio": float,
        }
        for option in filter(None, text.split(",")):
            key, _, value = option.partition("=")
            if key not in kinds:
                of_method.append(option)
                continue
            try:
                of_run[key] = kinds[key](value)
            except (ValueError, KeyError):
                raise ValueError(f"--inits {label!r}: {value!r} is not a value of {key}") from None
        try:
            init = cls(label, name, build_method(name, of_method), **of_run)
        except ValueError as error:
            raise ValueError(f"--inits {label!r}: {error}; options of the run are {', '.join(kinds)}") from None
        for key, allowed in (("init_num_batches", COUNT), ("a_lr_ratio", NOT_NEGATIVE)):
            if key in of_run:
                allowed.check(f"--inits {label!r}: {key}", of_run[key], "{name}={value} {reason}")
        if init.variable_rank and not gives_scores(init.method):
            raise ValueError(f"--inits {label!r}: {name} gives no scores to allocate ranks by; drop variable_rank")
        if needs_reference(init.method):
            raise ValueError(f"--inits {label!r}: pretraining=measured needs class images, which a comparison has not")
        return init


@dataclass(frozen=True)
class Run:
    """One cell of the grid."""

    init: Init
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder and in the results."""
        label = re.sub(r"[^\w.=+-]+", "-", self.init.label)
        return f"{label}-lr{self.learning_rate:g}-seed{self.seed}"


def draws_images(args: argparse.Namespace) -> bool:
    """Whether runs have samples that are scored."""
    return args.family not in TASKS and args.image_metrics != "none"


def snapshot_steps(args: argparse.Namespace) -> list[int]:
    """The steps whose weights are kept: those that samples are drawn from, where there are samples."""
    return args.snapshot_steps if args.family in TASKS else args.image_steps


@owning
def main(argv: Sequence[str] | None = None) -> Path:
    """Run what is missing of the grid, then write the results and the report; returns the directory."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse_args(argv)
    inits = [Init.parse(label) for label in args.inits]
    if args.family not in TASKS:
        family = family_class(args.family)
        check_family_options(args, family)
        family.check_base(args.pretrained_model_name_or_path)
        split_records(args)
        for encoder in encoder_names(args) if draws_images(args) else ():
            load_encoder(encoder)  # what cannot be scored is said before hours of training
    runs = [Run(i, lr, seed) for i in inits for seed in args.seeds for lr in args.learning_rates]

    # the grid is split by hand: a process that waits for another one's runs may wait for hours
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(days=30))
    # without an accelerator, accelerate joins the processes of a launch only when told that the processor is meant
    on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[patience])
    part, num_parts = accelerator.process_index, accelerator.num_processes
    output_dir = Path(args.output_dir)
    if args.part is None:
        output_dir = claim_output_dir(args, "compare_inits", goes_on=True)
    if args.part is not None or not accelerator.is_main_process:
        attach_output_dir(args, "compare_inits")
    workers = 1
    if args.part is not None:
        part, num_parts = map(int, args.part.split("/"))
        threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    elif num_parts == 1:
        workers = args.num_workers or (min(2, os.cpu_count() or 1) if on_cpu else 1)
    is_main = args.part is None and accelerator.is_main_process
    task: Task | None = None
    if is_main:
        check_same_comparison(output_dir, args)
        arguments = public_arguments(args)  # a task fills in what was not given
        if args.family in TASKS:  # what cannot be read is said here, not in a worker's log
            task = cast(Task, make_task(args, accelerator.device))
        identity = check_identity(args, output_dir, records_of(args, task))
        data = describe_data(args, task)
        begin_output(args, None)
        write_json(output_dir / IDENTITY_NAME, identity)
        write_config(output_dir, args, arguments, argv, str(accelerator.device), data)
        print(describe_comparison(args, task, captions=workers > 1), flush=True)
        if workers > 1:
            task = None  # each worker has its own
    accelerator.wait_for_everyone()

    for phase, work, chosen, steps, result in (
        ("training", partial(train_runs, task=task), lambda: list(runs), args.eval_steps, "result.json"),
        ("sampling", score_runs, lambda: runs_to_score(output_dir, runs, args), snapshot_steps(args), "scores.json"),
    ):
        if args.part is not None and phase != os.environ["LORAINIT_COMPARE_PHASE"]:
            continue
        files = [output_dir / "runs" / run.name / result for run in chosen()]
        if not files:
            continue
        # of several processes, the first shows its own part
        total = len(files) * len(steps) // num_parts
        with GridProgress(phase, total, len(files), partial(count_files, files), shown=is_main) as bar:
            if workers > 1:
                run_workers(
                    output_dir, argv, phase, workers, bar, lambda p=phase: count_rows(output_dir, runs, args, p)
                )
            else:
                work(output_dir, runs, args, accelerator.device, part, num_parts, bar)
        accelerator.wait_for_everyone()
        if is_main:
            write_results(output_dir, runs, args)
        accelerator.wait_for_everyone()
    if is_main:
        paths = write_report(output_dir)
        for line in [*(result_sentences(output_dir) if paths else []), *map(str, paths)]:
            print(line)
    return output_dir


def train_runs(
    output_dir: Path,
    runs: Sequence[Run],
    args: argparse.Namespace,
    device: torch.device,
    part: int,
    num_parts: int,
    bar: GridProgress,
    task: ComparedTask | None = None,
) -> None:
    """Train this process's part of the grid; the runs of one init and seed share the initialisation."""
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.init.label, run.seed), []).append(run)
    heads: dict[str, torch.Tensor] | None = None
    for group in list(groups.values())[part::num_parts]:
        missing = [run for run in group if not (output_dir / "runs" / run.name / "result.json").exists()]
        bar.skip((len(group) - len(missing)) * len(args.eval_steps))
        if not missing:
            continue
        task = task or make_task(args, device)
        heads = head_state_dict(task.family.heads) if heads is None else heads
        load_heads(task.family.heads, heads)
        state, init_report, init_s = initialise(task, missing[0], args)
        for run in missing:
            adapters.load_adapter_state_dict(
                dict(task.family.adapted), state, use_rslora=args.use_rslora, lora_dropout=args.lora_dropout
            )
            load_heads(task.family.heads, heads)
            train(task, run, args, output_dir / "runs" / run.name, init_report, init_s, bar)


def initialise(
    task: ComparedTask, run: Run, args: argparse.Namespace
) -> tuple[dict[str, torch.Tensor], dict[str, Any], float]:
    """The initial adapters of a run, the report, and the seconds that they took."""
    init = run.init
    num_batches = init.init_num_batches or args.init_num_batches
    budget = None
    if init.variable_rank and args.equal_parameters:
        layers = [
            layer
            for name, module in task.family.adapted.items()
            for layer in adapters.target_layers(module, task.targets[name]).values()
        ]
        budget = sum(args.rank * (layer.in_features + layer.out_features) for layer in layers)
    report = initialize(
        task.family,
        init.method,
        task.batches(run.seed, args.train_batch_size, range(num_batches)),
        rank=args.rank,
        alpha=args.lora_alpha,
        target_modules=task.targets,
        num_batches=num_batches,
        variable_rank=init.variable_rank,
        parameter_budget=budget,
        seed=run.seed,
        use_rslora=args.use_rslora,
        lora_dropout=args.lora_dropout,
        progress=False,
    )
    init_s = report.forward_s + report.statistics_s + report.solve_s
    return adapters.adapter_state_dict(task.family.adapted), report.to_json(), init_s


def train(
    task: ComparedTask,
    run: Run,
    args: argparse.Namespace,
    directory: Path,
    init_report: Mapping[str, Any],
    init_s: float,
    bar: GridProgress,
) -> None:
    """Train one run from the adapters as they are; numbers that are no longer finite end it and count as the worst."""
    (directory / "snapshots").mkdir(parents=True, exist_ok=True)
    progress_path = directory / "progress.jsonl"
    write_text(progress_path, "")
    write_json(directory / "init_report.json", init_report)
    modules, heads = dict(task.family.adapted), task.family.heads
    parameters = [p for module in modules.values() for p in adapters.trainable_parameters(module)]
    head_parameters = [p for head in heads.values() for p in head.parameters()]
    groups = [
        {"params": parameters[0::2], "lr": run.learning_rate * run.init.a_lr_ratio},
        {"params": parameters[1::2], "lr": run.learning_rate},
    ]
    if head_parameters:
        groups.append({"params": head_parameters, "lr": run.learning_rate * args.head_lr_ratio})
    trained = [*parameters, *head_parameters]
    optimizer = make_optimizer(args, groups)
    scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    rows: list[Row] = []
    train_s = 0.0
    diverged = False

    def evaluate(step: int) -> None:
        scores = {} if diverged else task.validate()
        if not scores or not all(map(math.isfinite, scores.values())):
            # a model that gives no numbers still has an accuracy
            names = scores or [name for name in rows[0] if name not in ("step", "train_s")]
            scores = {name: -math.inf if METRICS[name].higher_is_better else math.inf for name in names}
        primary = {task.primary_metric: scores[task.primary_metric]}
        rows.append({"step": step, **primary, **scores, "train_s": train_s})
        if step in snapshot_steps(args) and not diverged:
            weights = {**adapters.adapter_state_dict(modules), **head_state_dict(heads)}
            save_tensors(weights, directory / "snapshots" / f"step-{step:06d}.safetensors")
        with progress_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        bar.update()

    for module in modules.values():
        module.train()
    evaluate(0)
    batches = task.batches(run.seed, args.train_batch_size, range(args.max_train_steps))
    for step, batch in enumerate(batches, start=1):
        start = time.perf_counter()
        if not diverged:
            # the numbers that the family's training script draws on one process
            parts = (run.seed, "step", step, 0, 0)
            torch.manual_seed(seeded_generator(*parts).initial_seed())  # for the dropout of the adapters
            loss = task.family.loss(batch, seeded_generator(*parts))
            loss.backward()
            norm = clip_gradients(trained, args.max_grad_norm)
            diverged = not (math.isfinite(float(loss.detach())) and math.isfinite(norm))
            if not diverged:
                optimizer.step()
                scheduler.step()
                diverged = weight_at_fault(modules, trained) is not None
            optimizer.zero_grad()
        train_s += time.perf_counter() - start
        if step in args.eval_steps:
            evaluate(step)
    result = {
        "rank": args.rank,
        "num_parameters": sum(p.numel() for p in parameters),
        **({"num_head_parameters": sum(p.numel() for p in head_parameters)} if head_parameters else {}),
        "init_s": init_s,
        "rows": rows,
    }
    write_whole(directory / "result.json", result)


def write_whole(path: Path, document: Mapping[Any, Any]) -> None:
    """Write JSON that is there in full or not at all: a run either has its result or is run again."""
    part = path.with_suffix(f".{os.getpid()}.part")
    write_json(part, document)
    announce(path)
    part.replace(path)


def runs_to_score(output_dir: Path, runs: Sequence[Run], args: argparse.Namespace) -> list[Run]:
    """The runs that samples are drawn from: none, all, or those at the best learning rate of each init."""
    if not draws_images(args):
        return []
    if args.image_metrics == "all":
        return list(runs)
    best = Comparison.load(output_dir).best_learning_rates()
    return [run for run in runs if best.get(run.init.label) == run.learning_rate]


def score_runs(
    output_dir: Path,
    runs: Sequence[Run],
    args: argparse.Namespace,
    device: torch.device,
    part: int,
    num_parts: int,
    bar: GridProgress,
) -> None:
    """Draw samples from this process's part of the runs at the image steps and score them."""
    scorer: ImageScorer | None = None
    base, base_strip = {}, []
    for run in runs_to_score(output_dir, runs, args)[part::num_parts]:
        directory = output_dir / "runs" / run.name
        if (directory / "scores.json").exists():
            bar.skip(len(args.image_steps))
            continue
        (directory / "samples").mkdir(exist_ok=True)
        scored: dict[int, dict[str, float]] = {}
        for step in args.image_steps:
            snapshot = directory / "snapshots" / f"step-{step:06d}.safetensors"
            if snapshot.exists():  # a run that diverged has none
                scorer = scorer or ImageScorer(args, device)
                state = load_file(snapshot)
                scorer.load(state)
                if not base:
                    base, base_strip = scorer.draw_base()
                    if part == 0:
                        save_sample_row(output_dir, "base", base_strip)
                        write_json(output_dir / "prompts.json", {"prompts": scorer.grid_columns})
                adds_nothing = not any(value.any() for name, value in state.items() if name.endswith("lora_B"))
                drawn, strip = (base, base_strip) if adds_nothing else scorer.draw()
                save_sample_row(directory / "samples", f"step-{step:06d}", strip)
                scored[step] = scorer.score(drawn, base)
            bar.update()
        write_whole(directory / "scores.json", scored)


def run_workers(
    output_dir: Path, argv: Sequence[str], phase: str, workers: int, bar: GridProgress, count: Callable[[], int]
) -> None:
    """Run this script once for each part of the grid and show their common progress.

    Raises:
        ValueError: when a worker fails; the message has its last line.
    """
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    environment = {
        **os.environ,
        "LORAINIT_COMPARE_PHASE": phase,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
    }
    logs = [output_dir / f"worker-{worker}.log" for worker in range(workers)]
    processes: list[subprocess.Popen[bytes]] = []
    bar.skip(count())
    try:
        for worker, log in enumerate(logs):
            announce(log)
            command = [sys.executable, __file__, *argv, "--part", f"{worker}/{workers}"]
            with log.open("wb") as file:
                processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file))
        running = True
        while running:
            time.sleep(1.0)
            codes = [process.poll() for process in processes]
            running = None in codes
            bar.update(count() - bar.n)
            for code, log in zip(codes, logs, strict=True):
                if code:
                    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
                    last = lines[-1].removeprefix("error: ") if lines else f"exit code {code}"
                    raise ValueError(f"a worker failed ({log}): {last}")
    finally:
        for process in processes:
            process.terminate()
            process.wait()


def end_with_parent(parent: int) -> None:
    """End this worker when the process that started it is gone: a restarted comparison has workers of its own."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def count_files(paths: Sequence[Path]) -> int:
    """How many of these files there are: of the results of runs, those that are finished."""
    return sum(path.exists() for path in paths)


def count_rows(output_dir: Path, runs: Sequence[Run], args: argparse.Namespace, phase: str) -> int:
    """Evaluations that are done, for the progress bar."""
    total = 0
    for directory in (output_dir / "runs" / run.name for run in runs):
        if phase == "sampling":
            total += len(snapshot_steps(args)) * (directory / "scores.json").exists()
        elif (directory / "result.json").exists():
            total += len(args.eval_steps)
        elif (directory / "progress.jsonl").exists():
            total += (directory / "progress.jsonl").read_bytes().count(b"\n")
    return total


def write_results(output_dir: Path, runs: Sequence[Run], args: argparse.Namespace) -> None:
    """Write `results.csv`, which is a function of the arguments alone, and the measured seconds in `timings.csv`."""
    rows: list[Row] = []
    timings: list[Row] = []
    metric_columns: dict[str, None] = {}
    for run in runs:
        directory = output_dir / "runs" / run.name
        result = json.loads((directory / "result.json").read_text(encoding="utf-8"))
        scores: dict[str, dict[str, float]] = {}
        if draws_images(args) and (directory / "scores.json").exists():
            scores = json.loads((directory / "scores.json").read_text(encoding="utf-8"))
        for line in result["rows"]:
            scored = scores.get(str(line["step"]), {})
            metric_columns |= dict.fromkeys(scored)
            rows.append(
                {
                    "run": run.name,
                    "init": run.init.label,
                    "learning_rate": run.learning_rate,
                    "seed": run.seed,
                    "rank": result["rank"],
                    **{name: result[name] for name in ("num_parameters", "num_head_parameters") if name in result},
                    **{name: value for name, value in line.items() if name != "train_s"},
                    **scored,
                }
            )
            timings.append(
                {
                    "run": run.name,
                    "step": line["step"],
                    "init_s": round(result["init_s"], 3),
                    "train_s": round(line["train_s"], 3),
                }
            )
    columns = dict.fromkeys(name for row in rows for name in row if name not in metric_columns)
    for path, table, names in (
        (output_dir / "results.csv", rows, [*columns, *metric_columns]),
        (output_dir / "timings.csv", timings, ["run", "step", "init_s", "train_s"]),
    ):
        with replacing(path) as scratch, scratch.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)


def describe_comparison(args: argparse.Namespace, task: Task | None, *, captions: bool) -> str:
    """The banner; `captions` looks for those that are cut although no task of this process does."""
    notes = DataNotes()
    if task is None:
        lines, num_train = image_comparison_lines(args, notes, captions=captions)
    else:
        lines, num_train = task_lines(task), task.num_train
    return comparison_banner(args, args.inits, lines, num_train, notes)


def records_of(args: argparse.Namespace, task: Task | None) -> dict[str, Sequence[Any]]:
    """The samples by what messages call them; text-to-image bases have no `task` here."""
    if task is None:
        return dict(zip(IMAGE_SETS, split_records(args), strict=True))
    return dict(getattr(task, "records", {}))


def describe_data(args: argparse.Namespace, task: Task | None) -> dict[str, Any]:
    """What `config.json` says of the data and of what is measured on it; text-to-image bases have no `task` here."""
    dataset = _short(next(value for name in DATA_ARGUMENTS if (value := getattr(args, name, None))))
    if task is None:
        records, heldout = split_records(args)
        return {
            "dataset": dataset,
            "num_images": len(records),
            "num_heldout_images": len(heldout),
            "primary_metric": TextToImageTask.primary_metric,
            "encoder": ", ".join(Path(name).name for name in encoder_names(args)),
        }
    return {
        "generates_images": False,
        "dataset": dataset,
        "examples": TASKS[args.family].examples,
        "num_train": task.num_train,
        "num_validation": task.num_validation,
        "primary_metric": task.primary_metric,
    }


def write_config(
    output_dir: Path,
    args: argparse.Namespace,
    arguments: Mapping[str, Any],
    argv: Sequence[str],
    device: str,
    data: Mapping[str, Any],
) -> None:
    """Write what the report says of the comparison beside its numbers.

    Args:
        output_dir: where to.
        args: the options as they are used.
        arguments: the options as they were given, by which another call is compared with this one.
        argv: the command line.
        device: of the training.
        data: what is said of the data.
    """
    write_json(
        output_dir / "config.json",
        {
            "arguments": {name: value for name, value in arguments.items() if name != "part"},
            "command": " ".join(["python train_scripts/compare_inits.py", *map(shlex.quote, argv)]),
            "family": args.family,
            "base_model": _short(args.pretrained_model_name_or_path),
            **data,
            "versions": versions(),
            "hardware": hardware(device),
            "date": datetime.date.today().isoformat(),
            "baselines": [label for label in BASELINES if label in args.inits],
            "seeds": args.seeds,
            "learning_rates": dict.fromkeys(args.inits, args.learning_rates),
            "max_train_steps": args.max_train_steps,
        },
    )


def check_same_comparison(output_dir: Path, args: argparse.Namespace) -> None:
    """See that results from an earlier call belong to this comparison.

    Raises:
        ValueError: naming every option that differs.
    """
    path = output_dir / "config.json"
    if not path.is_file():
        return
    earlier = json.loads(path.read_text(encoding="utf-8"))["arguments"]
    known = read_identity(output_dir)
    found = option_differences(
        public_arguments(args), earlier, defaults=args.option_defaults, free=FREE_TO_CHANGE, known=known
    )
    if found:
        clauses = describe_differences(found, f"--output_dir {str(output_dir)!r} holds runs with")
        raise ValueError(f"{'; '.join(clauses)}; use the same or another directory")


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


if __name__ == "__main__":
    run_script(main)
