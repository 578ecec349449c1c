"""Where a run may write: not over the folders that it reads from, nor where everything else of the user lies."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path


def check_can_be_output(path: Path, flag: str) -> None:
    """See that `path` is not a place that no run may fill, nor a file.

    Raises:
        ValueError: Naming the place.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{flag} {str(path)!r} is a file; give a directory")
    root = Path(os.path.abspath(path)).anchor
    places = {"the working directory": ".", "your home directory": os.path.expanduser("~"), "the root": root}
    for what, place in places.items():
        if path.exists() and os.path.exists(place) and path.samefile(place):
            raise ValueError(f"{flag} {str(path)!r} is {what}; give a directory of its own, such as outputs/my-run")


def check_apart(
    path: Path, flag: str, inputs: Mapping[str, str | os.PathLike[str] | None], *, legal_within: Sequence[str] = ()
) -> None:
    """See that what is written and what is read are different places, through links, too.

    Args:
        path: The output directory.
        flag: That names it.
        inputs: By the flag that names it, a folder or file that is read; names of the hub are left alone.
        legal_within: Flags whose folder may lie in the output directory.

    Raises:
        ValueError: Naming both.
    """
    for other, value in inputs.items():
        if value is None or not os.fspath(value) or not os.path.exists(value):
            continue
        place, both = Path(value), f"{flag} {str(path)!r} and {other} {os.fspath(value)!r}"
        if place.is_dir() and is_inside(path, place):
            same = is_inside(place, path)
            how = "are the same directory" if same else f"overlap: the output would lie inside {other}"
            raise ValueError(f"{both} {how}; give an output directory elsewhere")
        if other not in legal_within and is_inside(place, path):
            raise ValueError(f"{both} overlap: {other} lies inside the output directory; give one elsewhere")


def is_inside(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder` or below it, by what the names mean: links and other spellings count as well."""
    try:
        real, place = path.resolve(), folder.resolve()
    except (OSError, RuntimeError):  # a circle of links
        return False
    for candidate in (real, *real.parents):
        if candidate == place or (candidate.exists() and place.exists() and candidate.samefile(place)):
            return True
    return False
