"""What a directory holds for a run that wants to write to it: the mark of an earlier run, and files of others."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from lorainit_diffusers import files
from lorainit_diffusers.training.checkpoints import list_checkpoints
from lorainit_diffusers.training.places import is_inside

MARK = ".lorainit"
RUN_NAME, FILES_NAME, LOCK_NAME = "run.json", "files.txt", "lock"
# What file managers leave in a folder that is empty for its owner.
_IGNORED = frozenset({".DS_Store", "Thumbs.db", "desktop.ini", ".directory"})
# What a run may write at the top of its directory: files of these names that it did not write are in its way.
RESULTS = re.compile(
    r"config\.json|init_report\.json|metrics\.jsonl|README\.md|(loss|samples|accuracy|curves|mistakes|ranks)\.png"
    r"|pytorch_lora_weights(_kohya)?\.safetensors|adapter_(model\.safetensors|config\.json)|report\.html|labels\.json|lorainit_init\.safetensors"
    r"|per_class\.csv|predictions_[\w-]+\.jsonl|confusion_[\w-]+\.png|checkpoint-\d+|best|merged|samples"
)
SAMPLE_ROW = re.compile(r"base\.png|step-\d+\.png")

Kind = Literal["empty", "foreign", "earlier version", "failed", "unfinished", "finished"]


@dataclass(frozen=True)
class Wish:
    """What a run wants of a directory.

    Attributes:
        directory: Where to.
        script: That runs; another one's directory is refused.
        flag: That names the directory, for messages.
        is_default: Nobody named the directory, so another name will do.
        resume: `latest`, or the name or path of a checkpoint to go on from.
        overwrite: The directory's earlier run may be replaced.
        goes_on: Repeated calls go on in one directory, as those of a comparison do.
        shared: Several processes may write at the same time, each its own files.
        guests: Folders within that may hold files of the user, such as class images.
        inputs: What the run reads, by the flag that names it; it must not overlap with the directory.
        legal_within: Flags of these that may lie in the directory.
    """

    directory: Path
    script: str
    flag: str = "--output_dir"
    is_default: bool = False
    resume: str | None = None
    overwrite: bool = False
    goes_on: bool = False
    shared: bool = False
    guests: Sequence[Path] = ()
    inputs: Mapping[str, str | None] = field(default_factory=dict[str, "str | None"])
    legal_within: Sequence[str] = ()


def inspect(path: Path, wish: Wish) -> Kind:
    """What a directory holds."""
    if not path.is_dir():
        return "empty"
    found = strangers(path, wish, set())
    marked = read_mark(path)
    if marked is not None:
        status = marked.get("status")
        if status == "failed":
            if list_checkpoints(path):
                return "unfinished"
            saved = [name for name in read_written(path) if name.endswith(".safetensors") and (path / name).is_file()]
            return "finished" if saved else "failed"  # a result is not lost to a mistake that came after it
        return "finished" if status == "finished" else "unfinished"
    if not found:
        return "empty"
    return "earlier version" if _is_of_earlier_version(path, wish) else "foreign"


def read_mark(path: Path) -> dict[str, Any] | None:
    """What `run.json` says, or None where there is none.

    Raises:
        ValueError: When it cannot be read.
    """
    file = path / MARK / RUN_NAME
    try:
        mark = json.loads(file.read_text(encoding="utf-8"))
        return {**mark, "script": str(mark["script"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(file)!r} cannot be read ({error}); give another directory") from error


def read_written(path: Path) -> set[str]:
    """The names of all files that runs of a directory have written, below it."""
    file = path / MARK / FILES_NAME
    if not file.is_file():
        return set()
    return set(filter(None, file.read_text(encoding="utf-8").split("\n")))


def strangers(path: Path, wish: Wish, written: set[str]) -> list[str]:
    """The names at the top of a directory that are neither of `written`, nor the mark, nor a guest's."""
    if not path.is_dir():
        return []
    guests = guests_of(path, wish)
    place = Path(os.path.abspath(path))
    known = {name.split("/")[0] for name in written}
    found: list[str] = []
    for entry in sorted(place.iterdir()):
        ours = entry.name in known or entry.name == MARK or entry.name in _IGNORED
        temporary = entry.name.endswith(files.TEMPORARY_SUFFIX) or re.fullmatch(r"\.checkpoint-\d+.*\.tmp", entry.name)
        guest = any(guest == entry or guest.is_relative_to(entry) for guest in guests)
        if not ours and not temporary and not (guest and entry.is_dir()):
            found.append(entry.name)
    return found


def guests_of(path: Path, wish: Wish) -> list[Path]:
    """The guests' folders, those below the directory that was asked for below the one that it has become."""
    asked = Path(os.path.abspath(wish.directory))
    guests = [Path(os.path.abspath(guest)) for guest in wish.guests]
    place = Path(os.path.abspath(path))
    return [place / guest.relative_to(asked) if guest.is_relative_to(asked) else guest for guest in guests]


def _is_of_earlier_version(path: Path, wish: Wish) -> bool:
    """Whether a directory without a mark was written by a version of this project that made none."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        known = {"arguments", "versions"} <= set(config)
    except (OSError, ValueError, TypeError):
        known = False
    if wish.goes_on:
        return known
    has_state = any((checkpoint / "state.json").is_file() for checkpoint in list_checkpoints(path))
    return has_state or (known and (path / "init_report.json").is_file())


def resumes_here(path: Path, wish: Wish) -> bool:
    """Whether the run goes on from a checkpoint of this directory, not of another one."""
    if wish.resume is None:
        return False
    is_name = "/" not in wish.resume and os.sep not in wish.resume
    return is_name or (path / wish.resume).exists() or is_inside(Path(wish.resume), path)


def some(names: Sequence[str], limit: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def own_version() -> str:
    """Of this package."""
    try:
        return version("lorainit-diffusers")
    except PackageNotFoundError:
        return "unknown"
