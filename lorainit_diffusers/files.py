"""How files are written: whole or not at all, with the rights that the user's umask gives, and noted by who asks.

A writer gets a temporary name in the same folder and the file gets its own name when all of it is there, so a process
that is killed leaves the old file or the new one. `watching` tells a function of every path before it is written: a
run keeps a list of its files that way, and sees to it that it takes nobody else's.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

# Of temporary files; nobody else's files end so, and leftovers of a killed process can be told by it.
TEMPORARY_SUFFIX = ".lorainit-tmp"
# Behind any number of apostrophes, so that `csv_text` gives back exactly what `csv_cell` was given.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(inf|nan)")
_watchers: list[Callable[[Path], None]] = []


@contextmanager
def watching(watcher: Callable[[Path], None]) -> Generator[None, None, None]:
    """Inside the block `watcher` is called with every path that is about to be written."""
    add_watcher(watcher)
    try:
        yield
    finally:
        remove_watcher(watcher)


def add_watcher(watcher: Callable[[Path], None]) -> None:
    """Call `watcher` with every path that is about to be written, until `remove_watcher`."""
    _watchers.append(watcher)


def remove_watcher(watcher: Callable[[Path], None]) -> None:
    """Inverse of `add_watcher`; nothing happens when it is not there."""
    if watcher in _watchers:
        _watchers.remove(watcher)


def announce(path: str | os.PathLike[str]) -> None:
    """Say that `path` is about to be written: for files that something else writes, or that grow line by line."""
    for watcher in tuple(_watchers):
        watcher(Path(path))


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Generator[Path, None, None]:
    """A temporary file to write, which takes the place of `path` at the end of the block.

    The file has the rights that any new file of the user has, whatever wrote it. An exception leaves `path` as it was.
    A writer that goes by the name's ending must be told the format.
    """
    path = Path(path)
    announce(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    scratch.unlink(missing_ok=True)
    rights = _rights_of_new_file(scratch)
    try:
        yield scratch
        os.chmod(scratch, rights)
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


@contextmanager
def filling(directory: str | os.PathLike[str]) -> Generator[Path, None, None]:
    """A temporary folder whose files move into `directory` at the end of the block, one by one, as `replacing` does.

    For libraries that write several files. What else is in `directory` stays.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    scratch = directory / f".{os.getpid()}{TEMPORARY_SUFFIX}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
        for source in sorted(path for path in scratch.rglob("*") if path.is_file()):
            with replacing(directory / source.relative_to(scratch)) as target:
                os.replace(source, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def save_tensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, whose bytes are a function of its content.

    The library alone makes it readable for its owner only, and orders the metadata differently in every process.
    """
    with replacing(path) as scratch:
        save_file(dict(tensors), scratch, metadata=metadata)
        if metadata is not None and len(metadata) > 1:
            _sort_metadata(scratch)


def _sort_metadata(path: Path) -> None:
    """Order the metadata of a safetensors file; the header is as long as before, so the tensors stay where they are."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:  # another way to write a character, which no other reader minds
            return
        file.seek(8)
        file.write(text.ljust(size))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text with the line ends as they are."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8", newline="")


def write_json(path: str | os.PathLike[str], document: Any) -> None:
    """Write JSON; paths and dtypes become text."""
    write_text(path, json.dumps(document, indent=2, default=str) + "\n")


def csv_cell(text: str) -> str:
    """A text of the user's data as a cell of a CSV file that a spreadsheet shows, and does not take for a formula.

    A spreadsheet computes a cell that begins with `=`, `+`, `-` or `@`, or with a tab or a carriage return before it.
    An apostrophe in front makes it a text. Numbers stay as they are. `csv_text` is the inverse.
    """
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def csv_text(cell: str) -> str:
    """The text that `csv_cell` made a cell of."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def _rights_of_new_file(path: Path) -> int:
    """The mode that the umask leaves a new file; `path` is made for it (asking for the umask would change it)."""
    with path.open("xb") as file:
        return stat.S_IMODE(os.fstat(file.fileno()).st_mode)
