"""One run in one directory at a time: a lock that names who holds it, and that a killed process leaves open."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import time
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import psutil

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_BUSY = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK)
_ATTEMPTS = 5


class RunLock:
    """A lock on a file; the operating system takes it back when the process ends, however it ends.

    Where the file system has no locks, the process that the file names decides: it holds the lock as long as it runs.

    Args:
        path: Of the file, which stays; its text says who holds the lock or held it last.
        what: The program that asks for it, in words.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what = path, what
        self._descriptor: int | None = None

    @property
    def is_held(self) -> bool:
        """Whether this process holds it."""
        return self._descriptor is not None

    def acquire(self) -> str | None:
        """Take the lock; who holds it in words where that is somebody else, and otherwise None."""
        holder: str | None = None
        for _ in range(_ATTEMPTS):
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            holder = _take(descriptor)
            if holder is None and _is_same_file(descriptor, self.path):
                self._hold(descriptor)
                return None
            os.close(descriptor)
            time.sleep(0.05)  # somebody may only look who holds it, or its last holder has just deleted the file
        return holder or "another process"

    def _hold(self, descriptor: int) -> None:
        process = psutil.Process()
        own = {"pid": process.pid, "host": platform.node(), "started": process.create_time(), "program": self.what}
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, json.dumps(own).encode())
        self._descriptor = descriptor
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def holder(self) -> str | None:
        """Who holds the lock, in words; None where nobody does. Takes nothing and makes no file."""
        try:
            descriptor = os.open(self.path, os.O_RDWR)
        except OSError:
            return None
        try:
            return _take(descriptor)
        finally:
            os.close(descriptor)

    def release(self) -> None:
        """Give the lock back; nothing happens when it is not held."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None

    def _forget(self) -> None:
        """In a forked process, such as one that loads data: it must not keep the lock alive."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None


def _take(descriptor: int) -> str | None:
    """Lock an open file without waiting; who holds it where somebody does."""
    text = os.read(descriptor, 4096)
    try:
        found: Any = json.loads(text or b"{}")
    except ValueError:
        found = {}
    holder = cast("dict[str, Any]", found if isinstance(found, dict) else {})
    try:
        if fcntl is None:
            raise OSError(errno.ENOTSUP, "no locks of files")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY or _is_running(holder):
            return _describe(holder)
    return None


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _is_running(holder: dict[str, Any]) -> bool:
    """Whether the process still runs that wrote this; of another machine nobody can say, so it counts as running."""
    if not holder:
        return False
    if holder.get("host") != platform.node():
        return True
    try:
        return abs(psutil.Process(int(holder["pid"])).create_time() - float(holder["started"])) < 1.0
    except (psutil.Error, KeyError, ValueError):
        return False


def _describe(holder: dict[str, Any]) -> str:
    try:
        started = datetime.fromtimestamp(float(holder["started"])).isoformat(" ", "seconds")
        return f"{holder['program']} (process {holder['pid']} on {holder['host']}, started {started})"
    except (KeyError, TypeError, ValueError):
        return "another process"
