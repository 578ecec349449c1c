"""Whether the Hugging Face hub can be reached, found out in seconds.

The libraries retry every file of a repository for a minute when there is no network. So one short question is asked
first; without an answer, what was downloaded before is used, or the run stops.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants

from lorainit_diffusers.loading.errors import MissingModelError, first_line

# Of the question; name look-ups, which no time-out of the client covers, get as long again.
TIMEOUT_S = 4.0
# An answer is believed for so long: a base is many files.
ANSWER_AGE_S = 60.0
_latest: tuple[float, str, str | None] | None = None


def why_unreachable() -> str | None:
    """Why the hub cannot be reached, or `None` when it can; takes a few seconds at most."""
    global _latest
    if constants.HF_HUB_OFFLINE or _is_set("TRANSFORMERS_OFFLINE"):
        return "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"
    endpoint = constants.ENDPOINT
    if _latest is None or _latest[1] != endpoint or time.monotonic() - _latest[0] > ANSWER_AGE_S:
        _latest = time.monotonic(), endpoint, _ask(endpoint)
    return _latest[2]


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").strip().upper() in {"1", "ON", "YES", "TRUE"}


def _ask(endpoint: str) -> str | None:
    """Send one request; any answer counts, a refusal too."""
    outcome: list[str | None] = []

    def ask() -> None:
        try:
            session: Any = huggingface_hub.utils.get_session()
            session.head(endpoint, timeout=TIMEOUT_S)
            outcome.append(None)
        except Exception as error:  # of requests or httpx, whichever this version of the client is made with
            outcome.append(f"{endpoint}: {first_line(error)}")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * TIMEOUT_S)
    return outcome[0] if outcome else f"{endpoint} gave no answer within {2 * TIMEOUT_S:.0f} s"


def hub_options(
    what: str, name: str, file: str, *, revision: str | None = None, cache_dir: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Options of `from_pretrained` for a folder or a hub name: with no hub, only files that are there already.

    Args:
        what: What is loaded, for the message: "base model".
        name: Folder or hub name.
        file: A file that every such repository has, by which it is known whether it was downloaded before.
        revision: Of the repository.
        cache_dir: Where downloads are kept.

    Raises:
        MissingModelError: A hub name that was never downloaded, and the hub cannot be reached.
    """
    if Path(name).exists():
        return {}
    reason = why_unreachable()
    if reason is None:
        return {}
    cached = huggingface_hub.try_to_load_from_cache(
        name, file, cache_dir=None if cache_dir is None else os.fspath(cache_dir), revision=revision
    )
    if isinstance(cached, str):
        return {"local_files_only": True}
    raise MissingModelError(
        f"cannot reach the hub for the {what} {name!r} ({reason}), and it was not downloaded before; give a local "
        "folder, or connect to the network"
    )


@contextmanager
def offline(active: bool = True) -> Generator[None, None, None]:
    """Inside it, the libraries read their caches alone and ask no server."""
    if not active:
        yield
        return
    # `datasets` keeps a copy of its own; it is none of ours to import
    holders: list[Any] = [constants, *(module.config for name in ("datasets",) if (module := sys.modules.get(name)))]
    before = [holder.HF_HUB_OFFLINE for holder in holders]
    try:
        for holder in holders:
            holder.HF_HUB_OFFLINE = True
        _forget_sessions()
        yield
    finally:
        for holder, value in zip(holders, before, strict=True):
            holder.HF_HUB_OFFLINE = value
        _forget_sessions()


def _forget_sessions() -> None:
    """Older clients decide when a session is made whether it may ask a server."""
    for name in ("reset_sessions", "close_session"):
        forget = getattr(huggingface_hub.utils, name, None)
        if forget is not None:
            forget()


@contextmanager
def datasets_without_retries(name: str) -> Generator[None, None, None]:
    """Inside it, the `datasets` library, which is imported by then, reads its cache alone without a hub.

    Args:
        name: Of the dataset, or its local folder.

    Raises:
        MissingModelError: The hub cannot be reached, and the dataset is not in the cache.
    """
    reason = None if Path(name).exists() else why_unreachable()
    if reason is None:
        yield
        return
    try:
        with offline():
            yield
    except Exception as error:  # of its many readers
        raise MissingModelError(
            f"cannot reach the hub for the dataset {name!r} ({reason}), and it was not downloaded before; give a local "
            "folder, or connect to the network"
        ) from error
