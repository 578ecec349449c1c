"""Exact training state on disk, without pickle: tensors in safetensors, everything else in JSON.

A checkpoint is a folder `checkpoint-<step>`:

    adapters.safetensors   the adapters, with the initial factors of offset initialisations
    optimizer.safetensors  the optimiser's tensors, keyed `<parameter index>.<name>`, with `/` between nested names
    state.json             step, optimiser groups and scalars, learning-rate scheduler, the caller's own values
    checksums.json         length and SHA-256 of every other file, written last

Floats survive JSON exactly (Python writes the shortest text that reads back as the same double), so a restored run
continues bit for bit. The folder is written under a temporary name and then renamed: an interrupted save leaves no
half checkpoint behind. One that a disk or a copy has damaged since is told by its checksums: `latest` passes over it,
and one that is named is refused.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lorainit_diffusers.files import announce, save_tensors, write_text
from lorainit_diffusers.finite import check_finite
from lorainit_diffusers.training.checksums import find_damage, sync, write_checksums

ADAPTERS_NAME = "adapters.safetensors"
OPTIMIZER_NAME = "optimizer.safetensors"
STATE_NAME = "state.json"
_REMEDY = (
    "restore it from a copy, name another checkpoint, or give --resume_from_checkpoint latest, "
    "which takes the newest whole one"
)
_FILES = (ADAPTERS_NAME, OPTIMIZER_NAME, STATE_NAME)
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Endings of the hidden folders that stand beside a checkpoint while it is written, replaced or deleted.
_UNFINISHED, _REPLACED, _DELETED = ".tmp", ".old.tmp", ".deleted.tmp"
_LEFTOVER = re.compile(r"\.(checkpoint-\d+)(\.tmp|\.old\.tmp|\.deleted\.tmp)")


@dataclass(frozen=True)
class TrainingState:
    """What `load_training_state` read.

    Attributes:
        step: Optimiser steps that were done.
        tensors: The adapters, for `adapters.load_adapter_state_dict`.
        extra: The caller's own JSON values.
        optimizer_state: As `Optimizer.state_dict` has it.
        scheduler_state: As `LRScheduler.state_dict` has it.
        directory: Where it was read from.
    """

    step: int
    tensors: dict[str, Tensor]
    extra: dict[str, Any]
    optimizer_state: dict[str, Any]
    scheduler_state: dict[str, Any]
    directory: Path | None = None

    def restore(self, optimizer: Optimizer, lr_scheduler: LRScheduler | None = None) -> None:
        """Put the state into an optimiser over the same parameters, and into its scheduler.

        Raises:
            ValueError: When the optimiser has other parameter groups than the one that was saved.
        """
        saved = [len(group["params"]) for group in self.optimizer_state["param_groups"]]
        given = [len(group["params"]) for group in optimizer.param_groups]
        if saved != given:
            raise ValueError(
                f"the checkpoint's optimiser has parameter groups of {saved} tensors, this run's has {given}; "
                "resume with the options of the run that wrote it"
            )
        optimizer.load_state_dict(self.optimizer_state)
        if lr_scheduler is not None:
            lr_scheduler.load_state_dict(self.scheduler_state)


def save_training_state(
    directory: str | os.PathLike[str],
    *,
    tensors: Mapping[str, Tensor],
    optimizer: Optimizer,
    lr_scheduler: LRScheduler | None,
    step: int,
    extra: Mapping[str, Any] | None = None,
    write_more: Callable[[Path], None] | None = None,
) -> Path:
    """Write one checkpoint folder; an existing one of that name is replaced.

    Args:
        directory: The checkpoint folder, for example `output/checkpoint-100`.
        tensors: Adapter tensors by name.
        optimizer: Its state dictionary is saved.
        lr_scheduler: Likewise, when there is one.
        step: Optimiser steps that were done.
        extra: JSON values of the caller.
        write_more: Writes further files into the folder that it is given, which gets its name when all is written.

    Returns:
        The folder.

    Raises:
        ValueError: When a value is neither a tensor nor JSON, or a tensor holds values that are not finite; an
            existing checkpoint is then as it was.
    """
    check_finite(tensors, f"the checkpoint of step {step}")
    optimizer_state = optimizer.state_dict()
    optimizer_tensors: dict[str, Tensor] = {}
    optimizer_scalars: dict[str, dict[str, Any]] = {}
    for index, values in optimizer_state["state"].items():
        tensors_of_one, optimizer_scalars[str(index)] = _split(values)
        optimizer_tensors |= {f"{index}.{name}": value for name, value in tensors_of_one.items()}
    check_finite(optimizer_tensors, f"the optimiser's state of step {step}")
    directory = Path(directory)
    temporary = directory.with_name(f".{directory.name}{_UNFINISHED}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    document = {
        "step": step,
        "optimizer": {"param_groups": optimizer_state["param_groups"], "scalars": optimizer_scalars},
        "lr_scheduler": lr_scheduler.state_dict() if lr_scheduler is not None else {},
        "extra": dict(extra or {}),
    }
    try:
        text = json.dumps(document, indent=1)
    except TypeError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ValueError(f"training state of step {step} holds a value that JSON cannot: {error}") from error
    save_tensors(_plain(tensors), temporary / ADAPTERS_NAME)
    save_tensors(_plain(optimizer_tensors), temporary / OPTIMIZER_NAME)
    write_text(temporary / STATE_NAME, text)
    if write_more is not None:
        write_more(temporary)
    write_checksums(temporary)
    for path in temporary.rglob("*"):
        announce(directory / path.relative_to(temporary))
    swap_in(temporary, directory)
    sync(directory.parent)
    return directory


def swap_in(new: Path, directory: Path) -> None:
    """Give the folder `new` the name `directory`; what had it before is deleted.

    Where the system can exchange two names in one step, there is no moment without a folder of that name. Elsewhere
    the older one has a hidden name for a moment, and `recover_checkpoints` gives it back after a kill.
    """
    if not directory.exists():
        new.rename(directory)
        return
    if _exchange(new, directory):
        old = new
    else:
        old = directory.with_name(f".{directory.name}{_REPLACED}")
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
        new.rename(directory)
    shutil.rmtree(old)


def _exchange(first: Path, second: Path) -> bool:
    """Let two names change places in one step; whether the system could."""
    if not sys.platform.startswith("linux"):
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


def recover_checkpoints(output_dir: str | os.PathLike[str]) -> None:
    """Tidy up after a run that was killed while it wrote, replaced or deleted a checkpoint.

    Call it before the checkpoints are listed, by the one process that writes to the folder.
    """
    for path in sorted(Path(output_dir).glob(".checkpoint-*")):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or not path.is_dir():
            continue
        whole = path.with_name(match.group(1))
        if match.group(2) == _REPLACED and not whole.exists():
            path.rename(whole)
        else:
            shutil.rmtree(path)


def damage_of(directory: str | os.PathLike[str]) -> str | None:
    """What is wrong with a checkpoint, naming the file; `None` for one that can be resumed."""
    directory = Path(directory)
    missing = next((name for name in _FILES if not (directory / name).is_file()), None)
    return f"it has no {missing}" if missing is not None else find_damage(directory)


def load_training_state(directory: str | os.PathLike[str], *, checked: bool = False) -> TrainingState:
    """Read a checkpoint folder; tensors come on the CPU.

    Args:
        directory: The folder.
        checked: `damage_of` has found nothing wrong with it.

    Raises:
        FileNotFoundError: When the folder or one of its files is missing.
        ValueError: When one of its files is not as it was written.
    """
    directory = Path(directory)
    damage = None if checked else damage_of(directory)
    if damage is not None and damage.startswith("it has no "):
        raise FileNotFoundError(f"{str(directory)!r} is not a whole training checkpoint: {damage}; {_REMEDY}")
    if damage is not None:
        raise ValueError(f"the checkpoint {str(directory)!r} is damaged: {damage}; {_REMEDY}")
    document = json.loads((directory / STATE_NAME).read_text(encoding="utf-8"))
    state: dict[int, dict[str, Any]] = {
        int(index): dict(scalars) for index, scalars in document["optimizer"]["scalars"].items()
    }
    for key, tensor in load_file(directory / OPTIMIZER_NAME).items():
        index, _, path = key.partition(".")
        *outer, name = path.split("/")
        values = state.setdefault(int(index), {})
        for part in outer:
            values = values.setdefault(part, {})
        values[name] = tensor
    groups: list[dict[str, Any]] = [_betas_as_tuple(group) for group in document["optimizer"]["param_groups"]]
    return TrainingState(
        step=int(document["step"]),
        tensors=load_file(directory / ADAPTERS_NAME),
        extra=document["extra"],
        optimizer_state={"state": state, "param_groups": groups},
        scheduler_state=document["lr_scheduler"],
        directory=directory,
    )


def list_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The checkpoint folders in `output_dir`, oldest step first."""
    found: list[tuple[int, Path]] = []
    for path in Path(output_dir).glob("checkpoint-*"):
        match = _CHECKPOINT.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match.group(1)), path))
    return [path for _, path in sorted(found)]


def find_checkpoint(
    output_dir: str | os.PathLike[str], name: str, *, say: Callable[[str], object] | None = None
) -> Path:
    """The checkpoint that `--resume_from_checkpoint` means.

    Args:
        output_dir: Where the run writes.
        name: `latest` (the newest whose files are those that were written), the name of a checkpoint in `output_dir`,
            or a path.
        say: Is told of each checkpoint that `latest` passes over: its name, and what is wrong with it.

    Raises:
        FileNotFoundError: When there is none.
        ValueError: When `latest` finds damaged ones only; names each with what is wrong.
    """
    known = list_checkpoints(output_dir)
    if name == "latest":
        if not known:
            raise FileNotFoundError(
                f"--resume_from_checkpoint latest: there is no checkpoint in {os.fspath(output_dir)!r}; "
                "leave the flag out to start anew"
            )
        damaged: list[str] = []
        for path in reversed(known):
            damage = damage_of(path)
            if damage is None:
                return path
            damaged.append(f"{path.name}: {damage}")
            if say is not None and path != known[0]:
                say(f"{path.name} in {os.fspath(output_dir)!r} is damaged ({damage}); the one before is tried")
        raise ValueError(
            f"--resume_from_checkpoint latest: no checkpoint in {os.fspath(output_dir)!r} is whole "
            f"({'; '.join(damaged)}); restore one from a copy, or start anew with --overwrite_output_dir"
        )
    for path in (Path(output_dir) / name, Path(name)):
        if (path / STATE_NAME).is_file() or (path.is_dir() and _CHECKPOINT.fullmatch(path.name)):
            return path
    has = ", ".join(path.name for path in known) or "none"
    raise FileNotFoundError(
        f"--resume_from_checkpoint {name}: no such checkpoint; checkpoints in {os.fspath(output_dir)!r}: {has}"
    )


def prune_checkpoints(output_dir: str | os.PathLike[str], keep: int, *, step: int | None = None) -> list[Path]:
    """Delete checkpoints until at most `keep` are left, and return the deleted ones.

    Those beyond `step` go first: a run that goes on from an earlier checkpoint, because the later ones are damaged or
    because the user named it, must not lose its own ones to them. Then the oldest go.

    Call it with one less than the limit *before* saving, so that the disk never holds more than the limit; but keep
    one, so that a run that is killed meanwhile can be resumed.

    Args:
        output_dir: Of the run.
        keep: So many stay.
        step: Where the run is; the newest checkpoint counts as its own when left out.

    Raises:
        ValueError: When `keep` is negative.
    """
    if keep < 0:
        raise ValueError(f"cannot keep {keep} checkpoints; the limit must be at least 1")
    known = list_checkpoints(output_dir)
    if step is not None:
        beyond = [path for path in known if _step_of(path) > step]
        known = beyond + [path for path in known if path not in beyond]
    surplus = known[: max(0, len(known) - keep)]
    for path in surplus:
        hidden = path.with_name(f".{path.name}{_DELETED}")  # a kill leaves no checkpoint that lacks half its files
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
        shutil.rmtree(hidden)
    return surplus


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _split(values: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by path and everything else, nested as it was: bitsandbytes keeps its state in a dictionary within."""
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            tensors[prefix + name] = value
        elif isinstance(value, dict):
            inner, others[name] = _split(cast("dict[str, Any]", value), f"{prefix}{name}/")
            tensors |= inner
        else:
            others[name] = value
    return tensors, others


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses views that share storage; a clone is one tensor of an adapter, never a base weight
    return {name: torch.clone(tensor.detach().cpu()).contiguous() for name, tensor in tensors.items()}


def _betas_as_tuple(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if name == "betas" else value for name, value in group.items()}
