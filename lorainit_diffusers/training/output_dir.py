"""The directory that a run writes to: made by it, marked by it, and used by no other run at the same time.

A run owns a directory that it made, or found empty. The hidden folder `.lorainit` in it is the mark:

    run.json    who made the directory: the run's number, the script, when, and whether the run has finished
    files.txt   what was written, one name a line; nothing else is ever replaced, deleted or uploaded
    lock        held by the process that writes

`claim_directory` decides whether a run may have a directory, before anything is written; `RunDirectory.begin` is called
when the first file is about to be written, and `owning` gives everything back when the run ends. A run that fails
before that leaves nothing behind.
"""

from __future__ import annotations

import datetime
import functools
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from lorainit_diffusers import files
from lorainit_diffusers.training.checkpoints import list_checkpoints, recover_checkpoints
from lorainit_diffusers.training.places import check_apart, check_can_be_output, is_inside
from lorainit_diffusers.training.run_lock import RunLock
from lorainit_diffusers.training.run_mark import (
    FILES_NAME,
    LOCK_NAME,
    MARK,
    RESULTS,
    RUN_NAME,
    SAMPLE_ROW,
    Kind,
    Wish,
    guests_of,
    inspect,
    own_version,
    read_mark,
    read_written,
    resumes_here,
    some,
    strangers,
)

# what other files take from here
__all__ = [
    "FILES_NAME",
    "MARK",
    "RUN_NAME",
    "RunDirectory",
    "Wish",
    "claim_directory",
    "directory_of",
    "owning",
    "written_names",
    "wrote",
]

P = ParamSpec("P")
R = TypeVar("R")
_active: list[RunDirectory] = []


def claim_directory(wish: Wish) -> RunDirectory:
    """The directory of a run, locked; with a number behind its name where only the default one is taken.

    Raises:
        ValueError: When the directory holds files of somebody else, or a run that is not to be replaced, or another
            run is using it, or it cannot be written; with the remedy.
    """
    if wish.overwrite and wish.resume is not None:
        raise ValueError(
            f"--overwrite_output_dir and --resume_from_checkpoint {wish.resume} exclude each other: the one replaces "
            "the run that the other goes on with; leave one of them out"
        )
    for path in _names(wish):
        check_can_be_output(path, wish.flag)
        holder = RunLock(path / MARK / LOCK_NAME, wish.script).holder()
        refusal = _refusal(path, inspect(path, wish), wish) if holder is None else _in_use(holder, wish)
        if refusal is None or not (wish.is_default and refusal.may_be_numbered):
            check_apart(path, wish.flag, wish.inputs, legal_within=wish.legal_within)
        claimed = RunDirectory(path, wish)
        if refusal is None and (holder := claimed.lock()) is not None:
            refusal = _in_use(holder, wish)
        elif refusal is None:
            refusal = _refusal(path, inspect(path, wish), wish)  # another run may have been there meanwhile
            if refusal is None:
                claimed.take()
                if path != wish.directory:
                    print(
                        f"{wish.flag}: {str(wish.directory)!r} holds an earlier run, so this one goes to {str(path)!r}"
                    )
                return claimed
            claimed.give_back()
        if not (wish.is_default and refusal.may_be_numbered):
            raise ValueError(f"{wish.flag} {str(path)!r} {refusal.text}")
    raise AssertionError("there is always another number")


def _in_use(holder: str, wish: Wish) -> _Refusal:
    text = f"is in use by {holder}; wait until that has ended, or give another directory"
    return _Refusal(text, may_be_numbered=wish.resume is None)


def _names(wish: Wish) -> Iterable[Path]:
    """Names to try: the one that was asked for, or the default one and those with numbers."""
    if not wish.is_default:
        yield wish.directory
        return
    numbered = [wish.directory]
    while numbered[-1].exists() or len(numbered) == 1:
        numbered.append(wish.directory.with_name(f"{wish.directory.name}-{len(numbered) + 1}"))
    if wish.resume is not None:  # the newest one is meant, or the one that a checkpoint's path names
        existing = [path for path in numbered if path.exists()] or numbered[:1]
        named = [path for path in existing if is_inside(Path(wish.resume), path)]
        yield (named or existing)[-1]
        yield numbered[-1]
    else:
        yield from numbered
    number = len(numbered)
    while True:  # another run may have taken the name since
        number += 1
        yield wish.directory.with_name(f"{wish.directory.name}-{number}")


@dataclass(frozen=True)
class _Refusal:
    text: str
    may_be_numbered: bool = False


def _refusal(path: Path, kind: Kind, wish: Wish) -> _Refusal | None:
    """Why the run may not have the directory, or None."""
    if kind == "empty":
        return None
    if kind == "foreign":
        found = some(strangers(path, wish, set()))
        text = f"holds files that no run of this project wrote ({found}); give a new or an empty directory"
        return _Refusal(text, may_be_numbered=True)
    marked = read_mark(path)
    if marked is not None and marked["script"] != wish.script:
        return _Refusal(f"belongs to a run of {marked['script']}; give another directory", may_be_numbered=True)
    resumes = wish.goes_on or resumes_here(path, wish)
    if kind != "earlier version" and (resumes or wish.overwrite or kind == "failed"):
        written = read_written(path)
        found = [name for name in strangers(path, wish, written) if RESULTS.fullmatch(name)]
        in_the_way = [name for name in found if not (path / name).is_dir()]  # a folder can take more files
        if in_the_way:
            text = f"holds {some(in_the_way)}, which this project did not write; move that away, or give another one"
            return _Refusal(text)
    checkpoints = list_checkpoints(path)
    if wish.goes_on or (resumes and (checkpoints or kind in ("failed", "unfinished"))):
        return None
    has = f"holds {checkpoints[-1].name} of an earlier run" if checkpoints else "holds an earlier run"
    go_on = "continue it with --resume_from_checkpoint latest, "
    if kind == "earlier version":
        go_on = go_on if checkpoints else ""
        return _Refusal(f"{has}; {go_on}give another directory, or delete it", may_be_numbered=True)
    if wish.overwrite or kind == "failed":
        return None
    state = "that has finished" if kind == "finished" else "that was stopped"
    go_on = go_on if checkpoints or kind == "unfinished" else ""
    remedy = f"{go_on}give another directory, or replace the run with --overwrite_output_dir"
    return _Refusal(f"{has} {state}; {remedy}", may_be_numbered=kind == "finished")


class RunDirectory:
    """A directory that a run may write to; see `claim_directory`.

    Attributes:
        path: Of the directory.
        kind: What it was before.
        others: Folders in it that something else fills, such as a tracker: what is new in them at the end is the run's.
    """

    def __init__(self, path: Path, wish: Wish) -> None:
        self.path, self.wish = path, wish
        self.kind: Kind = inspect(path, wish)
        self._place = Path(os.path.abspath(path))
        self._guests = guests_of(path, wish)
        self._lock = RunLock(path / MARK / LOCK_NAME, wish.script)
        self.others: list[Path] = []
        self._made: list[Path] = []
        self._written: set[str] = set()
        self._logs: set[str] | None = None
        self._begun = False

    # ---- taking and giving back

    def lock(self) -> str | None:
        """Make what is missing of the directory and lock it; who uses it, or None.

        Raises:
            ValueError: When it cannot be written.
        """
        try:
            for folder in [*reversed(self.path.parents), self.path, self.path / MARK]:
                if not folder.exists():
                    folder.mkdir(exist_ok=True)
                    self._made.append(folder)
            if not os.access(self.path, os.W_OK | os.X_OK):
                raise PermissionError("permission denied")
            holder = None if self.wish.shared else self._lock.acquire()
        except OSError as error:
            self._remove_made()
            raise ValueError(
                f"{self.wish.flag} {str(self.path)!r} cannot be written ({error}); choose another"
            ) from error
        return holder

    def take(self) -> None:
        """After `lock`: from now on, what is written here is noted."""
        self.kind = inspect(self.path, self.wish)
        if not self.wish.shared:  # what lies there half written is a killed run's
            recover_checkpoints(self.path)
            for leftover in self.path.rglob(f".*{files.TEMPORARY_SUFFIX}"):
                shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        if self.kind == "earlier version":
            self._adopt()
        self._written = read_written(self.path)
        _active.append(self)
        files.add_watcher(self.note)

    def attach(self) -> None:
        """Note what is written here beside the process that holds the lock, as a worker of it."""
        self._begun = True
        self._written = read_written(self.path)
        _active.append(self)
        files.add_watcher(self.note)

    def begin(self, *, anew: bool) -> None:
        """Called when the first file is about to be written; an earlier run that is replaced goes now.

        Args:
            anew: The run does not go on with what the directory has.
        """
        if self._begun:
            return
        self._begun = True
        mark = read_mark(self.path)
        if not self.wish.goes_on and (anew or not resumes_here(self.path, self.wish)):
            self._remove_earlier_run()
            mark = None
        if mark is None:
            now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            mark = {"run": uuid.uuid4().hex, "script": self.wish.script, "created": now, "version": own_version()}
        files.write_json(self.path / MARK / RUN_NAME, {**mark, "status": "running"})
        self._logs = self._all_files()

    def release(self, error: BaseException | None) -> None:
        """The run has ended: note how, and let others have the directory."""
        files.remove_watcher(self.note)
        if self in _active:
            _active.remove(self)
        if not self._begun:
            self.give_back()
            return
        for folder in self.others:
            self._note_new(folder)
        if (mark := read_mark(self.path)) is not None and (self._lock.is_held or self.wish.shared):
            done = error is None or mark["status"] == "finished"
            status = "finished" if done else "failed" if isinstance(error, Exception) else "unfinished"
            files.write_json(self.path / MARK / RUN_NAME, {**mark, "status": status})
        self._lock.release()

    def give_back(self) -> None:
        """Unlock the directory and remove what was made of it, for a run that wrote nothing."""
        self._lock.release()
        if self.path / MARK in self._made:
            (self.path / MARK / LOCK_NAME).unlink(missing_ok=True)
            (self.path / MARK / FILES_NAME).unlink(missing_ok=True)
        self._remove_made()

    def finish(self) -> None:
        """Note that the result is there in full, whatever happens to it next."""
        if (mark := read_mark(self.path)) is not None:
            files.write_json(self.path / MARK / RUN_NAME, {**mark, "status": "finished"})

    def _remove_made(self) -> None:
        for folder in reversed(self._made):
            try:
                folder.rmdir()
            except OSError:
                return  # it holds something by now
        self._made.clear()

    # ---- what the run wrote

    def note(self, path: Path) -> None:
        """Keep the name of a file that is about to be written; a stranger of that name is moved out of the way."""
        name = self._name(path)
        if name is None or name in self._written:
            return
        if os.path.lexists(path):
            self._written |= read_written(self.path)  # another process of this run may have written it
            if name in self._written:
                return
            kept = next(kept for number in range(1, 10**6) if not os.path.lexists(kept := f"{path}.yours-{number}"))
            os.replace(path, kept)
            print(f"{str(path)!r} was not written by this run, so it is called {Path(kept).name} now")
        self._written.add(name)
        with (self.path / MARK / FILES_NAME).open("a", encoding="utf-8") as file:
            file.write(f"{name}\n")  # short enough to be one write, so that workers' lines do not mix

    def wrote(self, path: str | os.PathLike[str]) -> bool:
        """Whether a run of this directory wrote the file."""
        return self._name(Path(path)) in self._written

    def _name(self, path: Path) -> str | None:
        """The name below the directory; None for what is elsewhere, temporary, the mark's or a guest's."""
        path = Path(os.path.abspath(path))
        if not path.is_relative_to(self._place) or any(path.is_relative_to(guest) for guest in self._guests):
            return None
        parts = path.relative_to(self._place).parts
        if not parts or parts[0] == MARK or (parts[0].startswith(".checkpoint-") and parts[0].endswith(".tmp")):
            return None
        return None if any(part.endswith(files.TEMPORARY_SUFFIX) for part in parts) else "/".join(parts)

    def _adopt(self) -> None:
        """Take what an earlier version of this project wrote, which left no list."""
        names: list[str] = []
        for path in sorted(self.path.iterdir()):
            if not RESULTS.fullmatch(path.name) and not self.wish.goes_on:
                continue
            below = [path] if path.is_file() else [inner for inner in sorted(path.rglob("*")) if inner.is_file()]
            if path.name == "samples":
                below = [inner for inner in below if inner.parent == path and SAMPLE_ROW.fullmatch(inner.name)]
            names += [name for inner in below if (name := self._name(inner)) is not None]
        files.write_text(self.path / MARK / FILES_NAME, "".join(f"{name}\n" for name in names))

    def _remove_earlier_run(self) -> None:
        """Delete the files of the run that this one replaces, and folders that are empty then."""
        for name in sorted(self._written):
            path = self.path / name
            if path.is_symlink() or path.is_file():
                path.unlink()
        folders = {parent for name in self._written for parent in Path(name).parents if parent.parts}
        for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
            place = self.path / folder
            if place.is_dir() and not place.is_symlink() and not any(place.iterdir()):
                place.rmdir()
        self._written.clear()
        (self.path / MARK / FILES_NAME).unlink(missing_ok=True)
        if self.kind != "empty":
            stays = strangers(self.path, self.wish, set())
            kept = f"; what it did not write stays: {some(stays)}" if stays else ""
            print(f"{self.wish.flag} {str(self.path)!r}: the earlier run is replaced{kept}")

    def _note_new(self, folder: Path) -> None:
        """Note the files in a folder that were not there when the run began, and that something else has written."""
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            name = self._name(path)
            if path.is_file() and name is not None and name not in self._written and name not in (self._logs or ()):
                self._written.add(name)
                with (self.path / MARK / FILES_NAME).open("a", encoding="utf-8") as file:
                    file.write(f"{name}\n")

    def _all_files(self) -> set[str]:
        return {name for path in self.path.rglob("*") if path.is_file() and (name := self._name(path)) is not None}


def owning(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator of what a script runs: directories that it claims are released when it ends, however it ends."""

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        before = tuple(_active)
        try:
            result = function(*args, **options)
        except BaseException as error:
            for directory in [directory for directory in _active if directory not in before]:
                directory.release(error)
            raise
        for directory in [directory for directory in _active if directory not in before]:
            directory.release(None)
        return result

    return call


def directory_of(path: str | os.PathLike[str]) -> RunDirectory | None:
    """The claimed directory that `path` is, or lies in."""
    place = Path(os.path.abspath(path))
    found = [directory for directory in _active if place.is_relative_to(Path(os.path.abspath(directory.path)))]
    return found[-1] if found else None


def written_names(path: str | os.PathLike[str]) -> list[str]:
    """What a run wrote in its directory, below it, as far as it exists; by known names where nobody kept a list."""
    place = Path(path)
    if (place / MARK / FILES_NAME).is_file():
        return sorted(name for name in read_written(place) if (place / name).is_file())
    return sorted(entry.name for entry in place.iterdir() if entry.is_file() and RESULTS.fullmatch(entry.name))


def wrote(path: str | os.PathLike[str]) -> bool:
    """Whether a file is the run's own; true outside of claimed directories, where nobody keeps a list."""
    directory = directory_of(path)
    return directory is None or directory.wrote(path)
