"""Compare initialisations the way VTAB-1k is used for adapters, for those who have such data.

    python train_scripts/vtab_protocol.py --vtab_dir vtab-1k --output_dir outputs/vtab \
        --pretrained_model_name_or_path facebook/dinov2-small --inits gaussian eva cntlora

For each task, initialisation and rank: train on the 800 training images at every learning rate, choose the one that is
best on the 200 validation images, train on both with several seeds, and test (Zhai et al. 2019, arXiv:1910.04867; the
ranks are those that adapters are compared at). A directory is a task, with a folder per class in `train`, `val` and
`test`, or with lists `train800.txt`, `val200.txt` and `test.txt` of lines "path label".

Finished runs are kept: the same command continues, with more `--tasks`, `--inits`, `--ranks` or `--seeds`, too, and
several processes may share the work by `--tasks`. It writes `results.csv` and `summary.md`. All options that
`train_classifier_lora.py` has beside those on data and outputs may be added; its `--help` lists them.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from common_classify_options import add_classification_arguments, check_classification_arguments
from common_options import build_method, check_init_name, check_method, check_option_names
from common_task_options import make_task_parser, resolve_task_options

from lorainit_diffusers.training.bundled import BUNDLED_BASES
from lorainit_diffusers.training.cli_parser import ScriptParser, run_script

# The parts of a task: the kind of split that a folder is called as, and the names of a list.
PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "train": ("train", ("train800.txt", "train.txt")),
    "val": ("validation", ("val200.txt", "val.txt")),
    "test": ("test", ("test.txt",)),
}
# What this script decides: these options of the training script have no meaning here.
DECIDED = (
    *("init", "rank", "learning_rate", "seed", "init_seed", "train_data_dir", "dataset_name", "validation_fraction"),
    *("shots", "max_train_samples", "init_only", "dry_run", "resume_from_checkpoint", "push_to_hub", "report_to"),
    *("export_merged", "export_rank", "pad_rank", "use_ema", "num_train_epochs"),
)
# What may differ between calls on one directory.
EXTENSIBLE = (
    "vtab_dir",
    "tasks",
    "inits",
    "ranks",
    "learning_rates",
    "seeds",
    "output_dir",
    "cache_dir",
    "logging_dir",
    "train_data_dir",  # is vtab_dir
)
COLUMNS: tuple[str, ...] = (
    *("task", "init", "rank", "stage", "learning_rate", "seed", "accuracy", "macro_accuracy", "validation_loss"),
    *("num_trainable_parameters", "init_s", "total_s"),
)


class Setting(NamedTuple):
    """One run: on training images alone to `select` a learning rate, or on validation images, too, to `test` it."""

    task: str
    init: str
    rank: int
    stage: str
    learning_rate: float
    seed: int

    @property
    def file_name(self) -> str:
        """Of its result."""
        text = "-".join(str(part) for part in (*self[:4], f"{self.learning_rate:g}", self.seed))
        return "".join(c if c.isalnum() or c in "-_.=" else "_" for c in text) + ".json"


# ------------------------------------------------------------------------------------------------------------- options


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of this script, and those of the training script that it passes on.

    Raises:
        ValueError: naming the option, its value and the remedy.
    """
    parser = ScriptParser(__doc__)
    add = parser.add_argument
    add("--vtab_dir", help="a folder for each task")
    add("--tasks", nargs="+", help="names of the folders (default: all)")
    add("--inits", nargs="+", default=["gaussian", "orthonormal", "eva", "cntlora"], help="name or name:key=value,...")
    add("--ranks", nargs="+", type=int, default=[2, 4, 8, 16])
    add("--learning_rates", nargs="+", type=float, default=[5e-4, 1e-3, 2e-3, 5e-3])
    add("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="of the tests; learning rates take the first")
    add("--output_dir", default="outputs/vtab")
    own, rest = parser.parse_known_args(argv)
    # 1,600 steps of 64 are about a hundred passes over a thousand images
    base, add_data = BUNDLED_BASES["classifier"], add_classification_arguments
    training = make_task_parser(None, base, add_data, "classifier")
    training.set_defaults(max_train_steps=1600, train_batch_size=64, validation_steps=1)
    training.more_options = tuple(parser.flags)
    # the protocol augments nothing: some of its tasks are about where things are, and how they are turned
    training.set_defaults(lr_scheduler="cosine", random_flip=False, crop_scale=[1.0, 1.0])
    args = training.parse_args(rest)
    if own.vtab_dir is None:
        raise ValueError("--vtab_dir is missing: give a folder that has a folder for each task")
    for name in DECIDED:
        if getattr(args, name) != training.get_default(name):
            raise ValueError(f"--{name} is decided by the protocol; leave it out")
    for init in own.inits:
        name, _, options = init.partition(":")
        check_init_name(name, f"--inits {init!r}")
        check_option_names(name, list(filter(None, options.split(","))))
    args.train_data_dir = own.vtab_dir
    args.output_dir = own.output_dir
    args.own_alpha, args.own_head_lr = args.lora_alpha, args.head_lr  # by default they follow what is varied
    resolve_task_options(args, "vtab")
    check_classification_arguments(args)
    for name, value in vars(own).items():
        setattr(args, name, value)
    for name in ("inits", "ranks", "learning_rates", "seeds", "tasks"):
        values = getattr(args, name)
        if values is not None and len(set(values)) < len(values):
            raise ValueError(f"--{name} {values}: give each once")
    for init in args.inits:
        run_arguments(args, Setting("", init, args.ranks[0], "select", args.learning_rates[0], args.seeds[0]))
    return args


def run_arguments(args: argparse.Namespace, setting: Setting) -> argparse.Namespace:
    """The options of the training script for one run.

    Raises:
        ValueError: for an unknown initialisation, or one that the other options do not allow.
    """
    own = copy.copy(args)
    own.init, _, options = setting.init.partition(":")
    own.init_option = [*args.init_option, *filter(None, options.split(","))]
    own.rank, own.learning_rate, own.seed, own.init_seed = (
        setting.rank,
        setting.learning_rate,
        setting.seed,
        setting.seed,
    )
    own.lora_alpha = float(setting.rank) if args.own_alpha is None else args.own_alpha
    own.head_lr = setting.learning_rate if args.own_head_lr is None else args.own_head_lr
    own.data_seed = setting.seed  # of a new head's weights
    check_method(own, build_method(own.init, own.init_option))
    return own


if __name__ == "__main__":
    run_script(parse_args)  # a mistake in the options is answered before the imports below, which take seconds

from accelerate import Accelerator
from common import public_arguments, versions
from common_classify import (
    ClassData,
    ClassificationTask,
    check_classes,
    class_folders,
    natural_order,
    read_class_images,
)
from common_data import ImageRecord
from common_output import IDENTITY_NAME, begin_output, check_identity, claim_output_dir, read_identity
from common_run import Optimization, backward_step, start_accelerator, weight_dtype
from tqdm.auto import tqdm

from lorainit_diffusers.comparison.estimates import bootstrap
from lorainit_diffusers.files import replacing, write_json, write_text
from lorainit_diffusers.initialize import initialize
from lorainit_diffusers.progress import progress_bar
from lorainit_diffusers.training.data.files import find_file
from lorainit_diffusers.training.data.splits import split_kinds
from lorainit_diffusers.training.data.text import read_text, split_lines
from lorainit_diffusers.training.output_dir import owning
from lorainit_diffusers.training.resume import describe_differences, option_differences

# ---------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class TaskParts:
    """The images of a task, whose captions are the names of their classes."""

    train: list[ImageRecord]
    val: list[ImageRecord]
    test: list[ImageRecord]
    source: str

    def data(self, stage: str) -> ClassData:
        """What a run trains and is judged on."""
        train = self.train if stage == "select" else [*self.train, *self.val]
        names = {record.caption for record in train}
        heldout = self.val if stage == "select" else self.test
        return check_classes(ClassData(train, heldout, tuple(sorted(names, key=natural_order)), self.source))


def find_tasks(args: argparse.Namespace) -> dict[str, Path]:
    """The folders of the tasks by name.

    Raises:
        FileNotFoundError: when a folder is missing.
    """
    root = Path(args.vtab_dir)
    if not root.is_dir():
        raise FileNotFoundError(
            f"--vtab_dir {args.vtab_dir!r} is not a directory; give one with a folder for each task"
        )
    known = {path.name: path for path in class_folders(root)}
    for name in args.tasks or []:
        if name not in known:
            raise FileNotFoundError(
                f"--tasks {name}: there is no such folder in {args.vtab_dir!r} (it has {_some(known)})"
            )
    if not known:
        raise FileNotFoundError(f"--vtab_dir {args.vtab_dir!r} has no folders; give one with a folder for each task")
    return {name: known[name] for name in args.tasks or known}


def read_task(folder: Path) -> TaskParts:
    """The training, validation and test images of a task.

    Raises:
        FileNotFoundError: when a part, or an image that a list names, is missing.
        ValueError: when a list has a line that is not "path label", or a part has no images.
    """
    parts: dict[str, list[ImageRecord]] = {}
    by_name = {path.name: path for path in class_folders(folder)}
    kinds = split_kinds(by_name)
    for part, (kind, lists) in PARTS.items():
        folders = [by_name[name] for name in kinds if kinds[name] == kind]
        if len(folders) > 1:
            names = ", ".join(path.name for path in folders)
            raise ValueError(f"task {str(folder)!r} has several {part} parts ({names}); keep one of them")
        found = next(iter([*folders, *(folder / name for name in lists if (folder / name).exists())]), None)
        if found is None:
            names = ", ".join([part, *(["validation"] if part == "val" else []), *lists])
            raise FileNotFoundError(f"task {str(folder)!r} has no {part} part; add one of {names}")
        parts[part] = read_class_images(found, f"task {str(folder)!r}") if found.is_dir() else _read_list(found)
        if not parts[part]:
            raise ValueError(f"the {part} part of the task, {str(found)!r}, has no images; add some")
    return TaskParts(parts["train"], parts["val"], parts["test"], f"task {str(folder)!r}")


def _read_list(file: Path) -> list[ImageRecord]:
    records: dict[Path, ImageRecord] = {}
    for number, line in enumerate(split_lines(read_text(file)), start=1):
        if not line.strip():
            continue
        place = f"{str(file)!r}, line {number}"
        parts = line.strip().rsplit(maxsplit=1)
        if len(parts) != 2:
            raise ValueError(f"{place}: {line.strip()!r} is not a path and a label, such as images/00001.jpg 3")
        image = find_file(file.parent, parts[0])
        if image is None:
            raise FileNotFoundError(
                f"{place}: there is no image {str(file.parent / parts[0])!r}; paths are relative to the list"
            )
        if records.setdefault(image, ImageRecord(image, parts[1])).caption != parts[1]:
            raise ValueError(
                f"{place}: {parts[0]} has the label {parts[1]} here and {records[image].caption} in a line before; "
                "keep one of them"
            )
    return list(records.values())


# ---------------------------------------------------------------------------------------------------------------- runs


def run(task: ClassificationTask, args: argparse.Namespace, accelerator: Accelerator) -> dict[str, float]:
    """Initialise, train and evaluate a fresh base: metrics and costs.

    Args:
        task: with a base that nothing has been done to.
        args: the options of the run.
        accelerator: of the script.
    """
    started = time.perf_counter()
    family = task.family
    initialize(
        family,
        build_method(args.init, args.init_option),
        task.batches(args.init_seed, args.init_batch_size, range(args.init_num_batches)),
        rank=args.rank,
        alpha=args.lora_alpha,
        target_modules=task.targets,
        num_batches=args.init_num_batches,
        variable_rank=args.variable_rank,
        rank_budget=args.rank_budget,
        max_rank=args.max_rank,
        seed=args.init_seed,
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
        lora_dropout=args.lora_dropout,
        memory_budget_gb=args.init_memory_budget_gb,
        statistics_device=args.init_statistics_device,
        progress=False,
    )
    init_s = time.perf_counter() - started
    optimization = Optimization(args, family, accelerator, None)
    for module in family.adapted.values():
        module.train()
    micro_steps = args.gradient_accumulation_steps
    batches = task.batches(args.seed, args.train_batch_size, range(args.max_train_steps * micro_steps))
    for step in range(1, args.max_train_steps + 1):
        backward_step(args, family, batches, accelerator, optimization.parameters, step)
        optimization.step()
    return {
        **task.evaluate(),
        "num_trainable_parameters": sum(parameter.numel() for parameter in optimization.parameters),
        "init_s": round(init_s, 2),
        "total_s": round(time.perf_counter() - started, 2),
    }


class Results:
    """The finished runs of a directory, one file each, so that a killed process leaves none by half."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "runs"
        self.directory.mkdir(exist_ok=True)

    def get(self, setting: Setting) -> dict[str, Any] | None:
        """The result of a run, if it has finished."""
        path = self.directory / setting.file_name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def add(self, setting: Setting, values: dict[str, float]) -> None:
        """Keep the result of a run."""
        write_json(self.directory / setting.file_name, {**setting._asdict(), **values})

    def all(self) -> list[dict[str, Any]]:
        """All results, in order."""
        rows = [json.loads(path.read_text(encoding="utf-8")) for path in self.directory.glob("*.json")]
        return sorted(rows, key=lambda row: [row[name] for name in Setting._fields])


def selection_settings(args: argparse.Namespace, task: str) -> Iterator[Setting]:
    """The runs that learning rates are chosen by."""
    for init in args.inits:
        for rank in args.ranks:
            for rate in args.learning_rates:
                yield Setting(task, init, rank, "select", rate, args.seeds[0])


def best_rate(args: argparse.Namespace, results: Results, task: str, init: str, rank: int) -> float | None:
    """The learning rate that is best on the validation images, the lowest of equal ones; None before all have run."""
    scores: dict[float, tuple[float, float]] = {}
    for setting in selection_settings(args, task):
        if (setting.init, setting.rank) == (init, rank):
            result = results.get(setting)
            if result is None:
                return None
            scores[setting.learning_rate] = (-result["accuracy"], result["validation_loss"])
    return min(scores, key=lambda rate: (*scores[rate], rate))


def test_settings(args: argparse.Namespace, results: Results, task: str) -> Iterator[Setting]:
    """The runs at the chosen learning rates."""
    for init in args.inits:
        for rank in args.ranks:
            rate = best_rate(args, results, task, init, rank)
            if rate is not None:
                yield from (Setting(task, init, rank, "test", rate, seed) for seed in args.seeds)


def run_missing(
    args: argparse.Namespace, settings: Sequence[Setting], results: Results, data: ClassData, accelerator: Accelerator
) -> None:
    """Run what has not finished; the images are decoded once, the base is loaded anew for each."""
    task: ClassificationTask | None = None
    missing = [setting for setting in settings if results.get(setting) is None]
    for setting in progress_bar(missing, desc=data.source, shown=bool(missing)):
        own = run_arguments(args, setting)
        if task is None:
            task = ClassificationTask(own, accelerator.device, weight_dtype(accelerator.mixed_precision), data)
        else:
            task = task.anew(own)
        values = run(task, own, accelerator)
        results.add(setting, values)
        tqdm.write(f"{' '.join(map(str, setting))}: accuracy {values['accuracy']:.4f}, {values['total_s']:.0f} s")


# ------------------------------------------------------------------------------------------------------------- results


def write_results(args: argparse.Namespace, results: Results) -> None:
    """Write `results.csv`, of everything in the directory, and `summary.md`, of what was asked for."""
    path = Path(args.output_dir) / "results.csv"
    with replacing(path) as scratch, scratch.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(results.all())
    write_text(Path(args.output_dir) / "summary.md", summary(args, results))


def summary(args: argparse.Namespace, results: Results) -> str:
    """Test accuracy by initialisation and rank, on average and task by task."""
    tasks = list(find_tasks(args))
    scores = {
        (task, init, rank): found
        for task in tasks
        for init in args.inits
        for rank in args.ranks
        if (found := _test_scores(args, results, task, init, rank))
    }
    header = f"| initialisation | {' | '.join(f'rank {rank}' for rank in args.ranks)} |"
    rule = f"|---|{'---|' * len(args.ranks)}"
    base = args.pretrained_model_name_or_path
    lines = [
        "# Test accuracy by initialisation and rank",
        "",
        f"Base `{base}`; {args.max_train_steps} steps of {args.train_batch_size} images; learning rates "
        f"{', '.join(f'{rate:g}' for rate in args.learning_rates)}, chosen on the validation images for each task, "
        f"initialisation and rank with seed {args.seeds[0]}; {len(args.seeds)} seeds on training and validation images "
        "together. Means over seeds, in percent; in brackets 95 % bootstrap intervals over seeds.",
    ]
    missing = len(tasks) * len(args.inits) * len(args.ranks) * len(args.seeds) - sum(map(len, scores.values()))
    if missing:
        lines += ["", f"{missing} test runs are missing: what is said here is of the others."]
    if len(tasks) > 1:
        lines += ["", f"## Mean of {len(tasks)} tasks", "", header, rule]
        for init in args.inits:
            cells = [_mean_over_tasks([scores.get((task, init, rank), {}) for task in tasks]) for rank in args.ranks]
            lines.append(f"| {init} | {' | '.join(cells)} |")
    for task in tasks:
        lines += ["", f"## {task}", "", header, rule]
        for init in args.inits:
            cells: list[str] = []
            for rank in args.ranks:
                rate, found = best_rate(args, results, task, init, rank), scores.get((task, init, rank), {})
                cells.append(f"{_interval(list(found.values()))}, lr {rate:g}" if found and rate is not None else "–")
            lines.append(f"| {init} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _test_scores(args: argparse.Namespace, results: Results, task: str, init: str, rank: int) -> dict[int, float]:
    """Test accuracy by seed."""
    rate = best_rate(args, results, task, init, rank)
    if rate is None:
        return {}
    found = {seed: results.get(Setting(task, init, rank, "test", rate, seed)) for seed in args.seeds}
    return {seed: result["accuracy"] for seed, result in found.items() if result is not None}


def _mean_over_tasks(scores: Sequence[dict[int, float]]) -> str:
    """Of the seeds that every task has."""
    seeds = set(scores[0]).intersection(*scores[1:])
    return _interval([sum(task[seed] for task in scores) / len(scores) for seed in sorted(seeds)])


def _interval(values: Sequence[float]) -> str:
    if not values:
        return "–"
    estimate = bootstrap([100 * value for value in values])
    bounds = f" [{estimate.low:.1f}, {estimate.high:.1f}]" if len(values) > 1 else ""
    return f"{estimate.value:.1f}{bounds}"


def check_directory(args: argparse.Namespace, parts: Mapping[str, TaskParts]) -> None:
    """See that earlier runs in the directory were made with the same options, base and images, and note them.

    Raises:
        ValueError: naming every option that differs, or what differs in the data.
    """
    now = {name: value for name, value in public_arguments(args).items() if name not in EXTENSIBLE}
    output_dir = Path(args.output_dir)
    path = output_dir / "config.json"
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))["arguments"]
        known = read_identity(output_dir)
        found = option_differences(now, before, defaults=args.option_defaults, free=EXTENSIBLE, known=known)
        if found:
            clauses = describe_differences(found, f"the runs in {args.output_dir!r} were made with")
            raise ValueError(f"{'; '.join(clauses)}; use the same, or another --output_dir")
    images = {f"data of task {name}": [*task.train, *task.val, *task.test] for name, task in parts.items()}
    identity = check_identity(args, output_dir, images)
    begin_output(args, None)
    write_json(path, {"arguments": now, "versions": versions()})
    write_json(output_dir / IDENTITY_NAME, identity)


def _some(names: Any, limit: int = 8) -> str:
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


@owning
def main(argv: Sequence[str] | None = None) -> Path:
    """Run what is missing and return the directory of the results."""
    args = parse_args(argv)
    folders = find_tasks(args)
    parts = {
        name: read_task(folder) for name, folder in folders.items()
    }  # what is missing is said before hours of work
    for task in parts.values():
        task.data("select")
        task.data("test")
    output_dir = claim_output_dir(args, "vtab_protocol", goes_on=True, shared=True)
    check_directory(args, parts)
    accelerator = start_accelerator(args)
    if accelerator.num_processes > 1:
        raise ValueError("this script runs in one process: start it without a launcher, and share the work by --tasks")
    results = Results(output_dir)
    for name, task in parts.items():
        run_missing(args, list(selection_settings(args, name)), results, task.data("select"), accelerator)
        run_missing(args, list(test_settings(args, results, name)), results, task.data("test"), accelerator)
        write_results(args, results)
    print((output_dir / "summary.md").read_text(encoding="utf-8"))
    return output_dir


if __name__ == "__main__":
    run_script(main)
