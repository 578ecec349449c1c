"""A run: its options, where it writes, and what it goes on from; `Run` is what a training carries around.

A resumed run is the one that wrote the checkpoint: its options, its base and its data are compared here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env

from lorainit_diffusers.methods import Initializer
from lorainit_diffusers.training import resume
from lorainit_diffusers.training.checkpoints import (
    TrainingState,
    find_checkpoint,
    list_checkpoints,
    load_training_state,
)
from lorainit_diffusers.training.defaults import usual_value
from lorainit_diffusers.training.options.checks import TrainOptions
from lorainit_diffusers.training.options.fields import option_facts, values_of
from lorainit_diffusers.training.options.model import BaseOptions
from lorainit_diffusers.training.options.run import OutputOptions, RunOptions
from lorainit_diffusers.training.output_dir import RunDirectory, Wish, claim_directory, directory_of

SomeOptions = TypeVar("SomeOptions", bound=TrainOptions)
AnyRunOptions = TypeVar("AnyRunOptions", bound=OutputOptions)

# transformers says at every start that torchvision is missing; nothing here needs it
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

IDENTITY_NAME = "identity.json"  # of a comparison: what its base and data are
IMAGE_SETS = ("training data", "held-out data")


@dataclass(frozen=True)
class Run(Generic[SomeOptions]):
    """One training, as far as it is known; what becomes known later makes a new one (`dataclasses.replace`).

    Attributes:
        script: Name of the command, for trackers and messages.
        given: The options as the command line and the base give them: what repeats the run.
        options: The options as they are used, with what depends on base, data and processes filled in.
        method: The initialisation.
        output_dir: The run's own directory.
        state: The checkpoint that it goes on from.
        accelerator: Of the processes.
        identity: What base and data are, in plain values that a checkpoint keeps.
    """

    script: str
    given: SomeOptions
    options: SomeOptions
    method: Initializer
    output_dir: Path
    state: TrainingState | None
    accelerator: Accelerator
    identity: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def first_step(self) -> int:
        """Steps that lie behind the run as it begins."""
        return self.state.step if self.state is not None else 0

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.accelerator.is_main_process

    @property
    def trains(self) -> bool:
        """Whether the run goes on after the initialisation."""
        return self.options.trains

    def with_options(self, **changes: Any) -> Run[SomeOptions]:
        """The run with some options settled."""
        return replace(self, options=replace(self.options, **changes)) if changes else self


def start_run(
    script: str, given: SomeOptions, claimed: SomeOptions, method: Initializer, state: TrainingState | None
) -> Run[SomeOptions]:
    """Join the processes; what could be checked without them has been.

    Args:
        script: Name of the command.
        given: The options as the command line and the base give them.
        claimed: The same with the run's own directory.
        method: The initialisation.
        state: The checkpoint that the run goes on from.
    """
    return Run(script, given, claimed, method, Path(claimed.output_dir), state, start_accelerator(claimed))


def start_accelerator(options: TrainOptions) -> Accelerator:
    """The accelerator of a run, with TF32 as asked for."""
    torch.backends.cuda.matmul.allow_tf32 = options.allow_tf32
    project_dir = str(Path(options.output_dir) / options.logging_dir)
    joined = Accelerator(mixed_precision=options.mixed_precision, log_with=options.report_to, project_dir=project_dir)
    if joined.num_processes == 1 and _asked_for_several(os.environ):
        print(
            "warning: the launch asked for several processes, and one has started: accelerate launch starts one on "
            "processors; start them with torchrun --nproc_per_node 2 (docs/scaling.md)"
        )
    return joined


def _asked_for_several(environment: Mapping[str, str]) -> bool:
    """Whether accelerate's simple launcher was to start several: it names where they meet, and gives them no ranks.

    How many they were to be it tells nobody.
    """
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment
    return by_accelerate and "WORLD_SIZE" not in environment


def weight_dtype(mixed_precision: str | None) -> torch.dtype:
    """The precision that a frozen base is held in."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision or "no", torch.float32)


# ----------------------------------------------------------------------------------------------------------- directory


def claim_output_dir(
    options: AnyRunOptions, script: str, default: str, *, goes_on: bool = False, shared: bool = False
) -> AnyRunOptions:
    """The options with the directory that a run writes to, its own from now on; `--dry_run` takes none.

    Of several processes the main one claims it, and the others hear its name: the default one may get a number. The
    caller is decorated with `output_dir.owning`.

    Args:
        options: Of the script.
        script: That runs.
        default: The directory where none is given.
        goes_on: Whether repeated calls go on in one directory.
        shared: Whether several processes may write to it at the same time.

    Raises:
        ValueError: When the run may not have the directory; the same in every process.
    """
    given = cast("str | None", options.output_dir)
    wished = replace(options, output_dir=default if given is None else given)
    if getattr(options, "dry_run", False):
        return _with_class_images(wished)
    answer: list[Any] = [None, None]
    joint, is_main = False, True
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # as the accelerator makes it: on a processor it joins the processes only when told that the processor is meant
        processes = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
        joint, is_main = processes.num_processes > 1, processes.is_main_process
    if is_main:
        try:
            wish = _wish(_with_class_images(wished), script, goes_on, shared=shared, is_default=given is None)
            answer[0] = str(claim_directory(wish).path)
        except ValueError as error:
            answer[1] = str(error)
    if joint:
        answer = broadcast_object_list(answer)
    if answer[1] is not None:
        raise ValueError(answer[1])
    return _with_class_images(replace(wished, output_dir=answer[0]))


def _with_class_images(options: AnyRunOptions) -> AnyRunOptions:
    """Under prior preservation, the class images are in the run's directory where no other place is given."""
    if not getattr(options, "with_prior_preservation", False) or getattr(options, "class_data_dir", None) is not None:
        return options
    return replace(options, **{"class_data_dir": str(Path(options.output_dir) / "class_images")})


def _wish(
    options: OutputOptions, script: str, goes_on: bool, *, shared: bool = False, is_default: bool = False
) -> Wish:
    given: dict[str, str | None] = {}
    for name, fact in option_facts(type(options)).items():
        if fact.is_path:
            value = getattr(options, name)
            for one in cast(list[Any], value) if isinstance(value, list) else [value]:
                given[f"--{name}"] = one
    class_images = getattr(options, "class_data_dir", None)
    return Wish(
        Path(options.output_dir),
        script,
        is_default=is_default,
        resume=getattr(options, "resume_from_checkpoint", None),
        overwrite=getattr(options, "overwrite_output_dir", False),
        goes_on=goes_on,
        shared=shared,
        guests=[Path(class_images)] if class_images is not None else [],
        inputs=given,
        legal_within=["--class_data_dir"],
    )


def attach_output_dir(options: OutputOptions, script: str) -> None:
    """Note what this process writes in a directory that another process of the same run has claimed."""
    RunDirectory(Path(options.output_dir), _wish(options, script, goes_on=True)).attach()


def begin_output(output_dir: str | Path, *, anew: bool, logging_dir: str | None = None) -> None:
    """Called in every process when the first file is about to be written: what is replaced goes now.

    Args:
        output_dir: That this process claimed, or not.
        anew: Whether the run begins at its start.
        logging_dir: Of a tracker, inside it.
    """
    directory = directory_of(str(output_dir))
    if directory is not None:
        directory.begin(anew=anew)
        if logging_dir is not None:
            directory.others.append(directory.path / logging_dir)


# -------------------------------------------------------------------------------------------------------------- resume


def find_state(options: RunOptions, output_dir: Path) -> TrainingState | None:
    """The checkpoint to continue from; `latest` starts anew where a run was killed before its first one.

    Damaged checkpoints are passed over under `latest`, with a line each.

    Raises:
        FileNotFoundError: When the checkpoint that is named does not exist, or lacks a file.
        ValueError: When it is damaged, or `latest` finds damaged ones only.
    """
    name = options.resume_from_checkpoint
    if name is None:
        return None
    if name == "latest" and not list_checkpoints(output_dir):
        print(f"--resume_from_checkpoint latest: no checkpoint in {str(output_dir)!r} yet, so the run starts anew")
        return None
    # every process looks, before they join, and one of them speaks
    found = find_checkpoint(output_dir, name, say=print if os.environ.get("RANK", "0") == "0" else None)
    return load_training_state(found, checked=name == "latest")


def check_resumed_options(run: Run[Any]) -> None:
    """See that a resumed run is the one that wrote the checkpoint, in everything that decides its weights.

    Raises:
        ValueError: Naming every option that differs, with both values.
    """
    if run.state is None:
        return
    before = dict(run.state.extra["arguments"])
    identity: Mapping[str, Any] = run.state.extra.get("identity", {})
    now = {**values_of(run.options), "mixed_precision": run.accelerator.mixed_precision}
    # older checkpoints keep the flag alone, which may have been left to accelerate's configuration
    before["mixed_precision"] = identity.get("mixed_precision", before.get("mixed_precision") or "no")
    found = resume.option_differences(
        now,
        before,
        option_facts(type(run.options)),
        defaults=partial(usual_value, run.options),
        known=identity.keys(),
    )
    clauses = resume.describe_differences(found, "the checkpoint was written with")
    count = run.accelerator.num_processes
    if identity.get("num_processes", count) != count:
        clauses.append(
            f"there are {count} processes, but the checkpoint was written with {identity['num_processes']} "
            "(--num_processes of accelerate launch)"
        )
    if clauses:
        raise ValueError(f"{'; '.join(clauses)}; {resume.REMEDY}")


def announce_resume(run: Run[Any]) -> None:
    """See that the checkpoint lies on the way of a run of this many steps, and say where it goes on.

    Raises:
        ValueError: When it does not.
    """
    state, steps = run.state, run.options.max_train_steps
    if state is None:
        return
    before = int(state.extra["arguments"].get("max_train_steps", steps))
    resume.check_steps(state.step, steps, before, run.options.lr_scheduler)
    rest = "" if state.step < steps else ": nothing is left to train, the result is written again"
    run.accelerator.print(f"resuming at step {state.step} of {steps} from checkpoint-{state.step}{rest}")


def identify(run: Run[SomeOptions], records: Mapping[str, Sequence[Any]]) -> Run[SomeOptions]:
    """The run with what its base and data are, which must be those of the checkpoint.

    Args:
        run: The run.
        records: The samples, by what they are called in a message: `training data`, `class images`.

    Raises:
        ValueError: When base or data are not those that the checkpoint was written with.
    """
    if run.options.dry_run:
        return run
    known = dict(run.identity)
    if not known:
        count = run.accelerator.num_processes
        known = {"num_processes": count, "mixed_precision": run.accelerator.mixed_precision, **_bases(run.options)}
    known |= {what: resume.data_identity(samples) for what, samples in records.items()}
    if run.state is not None:
        remedy = "restore it, or leave out --resume_from_checkpoint and give another --output_dir"
        _compare(known, run.state.extra.get("identity", {}), "the checkpoint was written with", remedy)
    return replace(run, identity=known)


def check_identity(options: BaseOptions, output_dir: Path, records: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """What base and data of a comparison are, and that the directory's earlier runs had the same.

    Raises:
        ValueError: When base or data are not those of the runs that the directory holds.
    """
    before = read_identity(output_dir)
    now = _bases(options) | {what: resume.data_identity(samples) for what, samples in records.items()}
    where = f"the runs in --output_dir {str(output_dir)!r} were made with"
    _compare(now, before, where, "restore it, or give another directory")
    return {**before, **now}


def read_identity(output_dir: Path) -> dict[str, Any]:
    """What base and data of a comparison's earlier runs are; nothing where no run has been made."""
    path = output_dir / IDENTITY_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _bases(options: BaseOptions) -> dict[str, Any]:
    places: dict[str, str | None] = {"base": options.pretrained_model_name_or_path}
    places["VAE"] = getattr(options, "pretrained_vae_model_name_or_path", None)
    places["init file"] = getattr(options, "init_from", None)
    revisions = {"base": options.revision}
    return {
        what: resume.base_identity(name, revision=revisions.get(what), cache_dir=options.cache_dir)
        for what, name in places.items()
        if name is not None
    }


def _compare(now: Mapping[str, Any], before: Mapping[str, Any], where: str, remedy: str) -> None:
    for kind in now:
        if not isinstance(now[kind], dict) or kind not in before:
            continue
        differences = resume.base_differences if kind in ("base", "VAE", "init file") else resume.data_differences
        if found := differences(now[kind], before[kind]):
            raise ValueError(f"the {kind} is not what {where} ({'; '.join(found)}); {remedy}")
