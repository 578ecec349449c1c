"""The output directory of a script's options, and whether a resumed run is the one that wrote the checkpoint."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from common import run_options

from lorainit_diffusers.checkpoints import TrainingState, find_checkpoint, list_checkpoints, load_training_state
from lorainit_diffusers.training import resume
from lorainit_diffusers.training.output_dir import RunDirectory, Wish, claim_directory, directory_of

# Options that name what a run reads.
INPUTS = (
    *("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "train_data_dir", "instance_data_dir"),
    *("dataset_name", "train_data_file", "validation_data_file", "validation_data_dir", "image_dir", "class_data_dir"),
    *("vtab_dir", "encoders"),
)
IDENTITY_NAME = "identity.json"  # of a comparison: what its base and data are
IMAGE_SETS = ("training data", "held-out data")


def claim_output_dir(args: argparse.Namespace, script: str, *, goes_on: bool = False, shared: bool = False) -> Path:
    """The directory that a run writes to, its own from now on; `--dry_run` takes none.

    Of several processes the main one claims it, and the others hear its name. `args.output_dir` becomes that name: the
    default one may have got a number. The caller is decorated with `output_dir.owning`.

    Args:
        args: the options of a script.
        script: that runs.
        goes_on: whether repeated calls go on in one directory.
        shared: whether several processes may write to it at the same time.

    Raises:
        ValueError: when the run may not have the directory; the same in every process.
    """
    if getattr(args, "dry_run", False):
        return Path(args.output_dir)
    answer: list[Any] = [None, None]
    joint, is_main = False, True
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # as the accelerator makes it: on a processor it joins the processes only when told that the processor is meant
        processes = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
        joint, is_main = processes.num_processes > 1, processes.is_main_process
    if is_main:
        try:
            answer[0] = str(claim_directory(_wish(args, script, goes_on, shared)).path)
        except ValueError as error:
            answer[1] = str(error)
    if joint:
        answer = broadcast_object_list(answer)
    if answer[1] is not None:
        raise ValueError(answer[1])
    default_class_images = str(Path(args.output_dir) / "class_images")
    if getattr(args, "class_data_dir", None) == default_class_images:
        args.class_data_dir = str(Path(answer[0]) / "class_images")
    args.output_dir = answer[0]
    return Path(args.output_dir)


def _wish(args: argparse.Namespace, script: str, goes_on: bool, shared: bool = False) -> Wish:
    given: dict[str, str | None] = {}
    for name in INPUTS:
        value = getattr(args, name, None)
        for one in value if isinstance(value, list) else [value]:
            given[f"--{name}"] = one
    class_images = getattr(args, "class_data_dir", None)
    return Wish(
        Path(args.output_dir),
        script,
        is_default=getattr(args, "default_output_dir", False),
        resume=getattr(args, "resume_from_checkpoint", None),
        overwrite=getattr(args, "overwrite_output_dir", False),
        goes_on=goes_on,
        shared=shared,
        guests=[Path(class_images)] if class_images is not None else [],
        inputs=given,
        legal_within=["--class_data_dir"],
    )


def attach_output_dir(args: argparse.Namespace, script: str) -> None:
    """Note what this process writes in a directory that another process of the same run has claimed."""
    RunDirectory(Path(args.output_dir), _wish(args, script, goes_on=True)).attach()


def begin_output(args: argparse.Namespace, state: TrainingState | None) -> None:
    """Called in every process when the first file is about to be written: what is replaced goes now."""
    directory = own_directory(args)
    if directory is not None:
        directory.begin(anew=state is None)
        if getattr(args, "report_to", None):
            directory.others.append(directory.path / args.logging_dir)


def own_directory(args: argparse.Namespace) -> RunDirectory | None:
    """The directory that this process claimed, if it did."""
    return directory_of(args.output_dir)


# -------------------------------------------------------------------------------------------------------------- resume


def find_state(args: argparse.Namespace, output_dir: Path) -> TrainingState | None:
    """The checkpoint to continue from; `latest` starts anew where a run was killed before its first one.

    Raises:
        FileNotFoundError: when the checkpoint that is named does not exist.
    """
    if args.resume_from_checkpoint is None:
        return None
    if args.resume_from_checkpoint == "latest" and not list_checkpoints(output_dir):
        print(f"--resume_from_checkpoint latest: no checkpoint in {str(output_dir)!r} yet, so the run starts anew")
        return None
    return load_training_state(find_checkpoint(output_dir, args.resume_from_checkpoint))


def check_resumed_options(args: argparse.Namespace, accelerator: Accelerator, state: TrainingState) -> None:
    """See that a resumed run is the one that wrote the checkpoint, in everything that decides its weights.

    Raises:
        ValueError: naming every option that differs, with both values.
    """
    before = dict(state.extra["arguments"])
    identity: Mapping[str, Any] = state.extra.get("identity", {})
    now = {**run_options(args), "mixed_precision": accelerator.mixed_precision}
    # older checkpoints keep the flag alone, which may have been left to accelerate's configuration
    before["mixed_precision"] = identity.get("mixed_precision", before.get("mixed_precision") or "no")
    defaults = getattr(args, "option_defaults", None)
    found = resume.option_differences(
        now, before, defaults=defaults if defaults is not None else lambda name: None, known=identity.keys()
    )
    clauses = resume.describe_differences(found, "the checkpoint was written with")
    if identity.get("num_processes", accelerator.num_processes) != accelerator.num_processes:
        clauses.append(
            f"there are {accelerator.num_processes} processes, but the checkpoint was written with "
            f"{identity['num_processes']} (--num_processes of accelerate launch)"
        )
    if clauses:
        raise ValueError(f"{'; '.join(clauses)}; {resume.REMEDY}")


def check_resumed_steps(args: argparse.Namespace, state: TrainingState) -> None:
    """See that the checkpoint lies on the way of a run of this many steps, once it is known how many.

    Raises:
        ValueError: when it does not.
    """
    before = int(state.extra["arguments"].get("max_train_steps", args.max_train_steps))
    resume.check_steps(state.step, args.max_train_steps, before, args.lr_scheduler)


def announce_resume(args: argparse.Namespace, accelerator: Accelerator, state: TrainingState) -> None:
    """Say where a run goes on."""
    rest = "" if state.step < args.max_train_steps else ": nothing is left to train, the result is written again"
    accelerator.print(f"resuming at step {state.step} of {args.max_train_steps} from checkpoint-{state.step}{rest}")


def identify(
    args: argparse.Namespace,
    accelerator: Accelerator,
    state: TrainingState | None,
    records: Mapping[str, Sequence[Any]],
) -> None:
    """Note in `args.identity` what the base and the data are, and compare them with those of the checkpoint.

    Args:
        args: the options of a script.
        accelerator: of the run.
        state: the checkpoint to continue from.
        records: the samples, by what they are called in a message: `training data`, `class images`.

    Raises:
        ValueError: when base or data are not those that the checkpoint was written with.
    """
    if args.init_only or args.dry_run:
        return
    known: dict[str, Any] = getattr(args, "identity", {})
    if not known:
        known = {"num_processes": accelerator.num_processes, "mixed_precision": accelerator.mixed_precision}
        known |= _bases(args)
    args.identity = known | {what: resume.data_identity(samples) for what, samples in records.items()}
    remedy = "restore it, or leave out --resume_from_checkpoint and give another --output_dir"
    if state is not None:
        _compare(args.identity, state.extra.get("identity", {}), "the checkpoint was written with", remedy)


def check_identity(args: argparse.Namespace, output_dir: Path, records: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """What base and data of a comparison are, and that the directory's earlier runs had the same.

    Raises:
        ValueError: when base or data are not those of the runs that the directory holds.
    """
    before = read_identity(output_dir)
    now = _bases(args) | {what: resume.data_identity(samples) for what, samples in records.items()}
    where = f"the runs in --output_dir {str(output_dir)!r} were made with"
    _compare(now, before, where, "restore it, or give another directory")
    return {**before, **now}


def read_identity(output_dir: Path) -> dict[str, Any]:
    """What base and data of a comparison's earlier runs are; nothing where no run has been made."""
    path = output_dir / IDENTITY_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _bases(args: argparse.Namespace) -> dict[str, Any]:
    places = {"base": args.pretrained_model_name_or_path}
    places["VAE"] = getattr(args, "pretrained_vae_model_name_or_path", None)
    revisions = {"base": args.revision}
    return {
        what: resume.base_identity(name, revision=revisions.get(what), cache_dir=args.cache_dir)
        for what, name in places.items()
        if name is not None
    }


def _compare(now: Mapping[str, Any], before: Mapping[str, Any], where: str, remedy: str) -> None:
    for kind in now:
        if not isinstance(now[kind], dict) or kind not in before:
            continue
        differences = resume.base_differences if kind in ("base", "VAE") else resume.data_differences
        if found := differences(now[kind], before[kind]):
            raise ValueError(f"the {kind} is not what {where} ({'; '.join(found)}); {remedy}")
