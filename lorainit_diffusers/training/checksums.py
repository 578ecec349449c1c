"""Whether the files of a folder are those that were written: their lengths and SHA-256, in a file beside them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lorainit_diffusers.files import write_json

CHECKSUMS_NAME = "checksums.json"
_CHUNK = 1 << 20


def write_checksums(folder: Path) -> None:
    """Put `checksums.json` into a folder whose other files are all written, and see that the disk has these.

    Its entries are `{"<file>": {"bytes": <length>, "sha256": "<64 digits>"}}`, by path within the folder.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS_NAME)
    entries: dict[str, dict[str, Any]] = {}
    for path in files:
        sync(path)  # or a loss of power after the folder has its name leaves empty files in it
        entries[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    write_json(folder / CHECKSUMS_NAME, entries)
    sync(folder / CHECKSUMS_NAME)


def find_damage(folder: Path) -> str | None:
    """What is wrong with the files of a folder, naming the first one; `None` where they are those that were written.

    A folder without `checksums.json`, of an earlier version, is looked at as far as its formats tell: JSON that can be
    read and says something, safetensors whose length is what the header says.
    """
    if not (folder / CHECKSUMS_NAME).is_file():
        return next((fault for path in sorted(folder.rglob("*")) if (fault := _format_fault(path))), None)
    try:
        entries: dict[str, Any] = _read(folder / CHECKSUMS_NAME)
        known = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return f"{CHECKSUMS_NAME} cannot be read"
    for name, (length, digest) in known.items():
        path = folder / name
        if not path.is_file():
            return f"it has no {name}"
        try:
            found = path.stat().st_size
            if found != length:
                return f"{name} has {found} bytes, but {length} were written"
            if _digest(path) != digest:
                return f"{name} has other bytes than were written"
        except OSError as error:  # a disk that fails
            return f"{name} cannot be read ({error.strerror})"
    return None


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk, where the system can say so."""
    with contextlib.suppress(OSError):  # Windows opens no folder, and some file servers sync nothing
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _format_fault(path: Path) -> str | None:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix == ".json":
            _read(path)
    except (ValueError, OSError, SafetensorError) as error:
        return f"{path.name} cannot be read ({error})"
    return None


def _read(path: Path) -> Any:
    document = json.loads(path.read_text(encoding="utf-8"))
    if not document:
        raise ValueError("it holds nothing")
    return document
