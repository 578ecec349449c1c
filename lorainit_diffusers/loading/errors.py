"""What a loader may raise: one sentence that names what was loaded, what is wrong with it, and the remedy."""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

_MAX_REASON = 300
# diffusers' words for a weight of another shape than the model's
_SHAPES = re.compile(r"(\S+) expected shape (?:torch\.Size)?[(\[]*([\d, ]*).*?but got (?:torch\.Size)?[(\[]*([\d, ]*)")


class BrokenModelError(ValueError):
    """A model that is there but cannot be used as it is."""


class MissingModelError(FileNotFoundError):
    """A model, or one of its files, that is not there."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something, not longer than a few lines of a terminal."""
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    line = next((line for line in lines if line), type(error).__name__)
    return line if len(line) <= _MAX_REASON else f"{line[:_MAX_REASON]} ..."


def custom_code_error(what: str, name: str) -> BrokenModelError:
    """The answer to a base whose class is not in the libraries but in files beside its weights."""
    return BrokenModelError(
        f"the {what} {name!r} needs custom code of its own, which is never run here (trust_remote_code); give a base "
        "whose classes are in diffusers or transformers"
    )


@contextmanager
def loading_errors(what: str, name: str, remedy: str) -> Generator[None, None, None]:
    """Turn whatever a library raises while it loads into one sentence about what was loaded.

    Args:
        what: What is loaded: "base model", "unet of the base model".
        name: Folder or hub name.
        remedy: What to do, for files that are missing or broken.

    Raises:
        MissingModelError: Files that are not there.
        BrokenModelError: Everything else but a lack of memory.
    """
    try:
        yield
    except (BrokenModelError, MissingModelError, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise BrokenModelError(
            f"the {what} {name!r} needs a package that is not installed ({first_line(error)}); install it"
        ) from error
    # The readers of configurations, tokenizers and weights raise what their parsers do: KeyError, TypeError, errors of
    # their own, which derive from nothing but Exception.
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise custom_code_error(what, name) from error
        if (shapes := _SHAPES.search(str(error))) is not None:
            key, wanted, found = (group.strip(" ,") for group in shapes.groups())
            raise BrokenModelError(
                f"the {what} {name!r} has weights of another shape than its configuration says: {key!r} is ({found}), "
                f"not ({wanted}); {remedy}"
            ) from error
        kind = MissingModelError if isinstance(error, OSError) else BrokenModelError
        reason = first_line(error) if isinstance(error, (OSError, ValueError)) else _with_type(error)
        raise kind(f"cannot load the {what} {name!r}: {reason} ({remedy})") from error


def _with_type(error: Exception) -> str:
    line, kind = first_line(error), type(error).__name__
    return line if line == kind else f"{kind}: {line}"


def read_json_object(path: Path, what: str) -> dict[str, Any]:
    """A JSON file that holds one object.

    Raises:
        MissingModelError: There is no such file.
        BrokenModelError: It is no JSON, or holds something else.
    """
    try:
        document: object = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise MissingModelError(
            f"{what} has no {path.name} in {str(path.parent)!r}; copy it from where the model comes from"
        ) from error
    except (OSError, ValueError) as error:
        raise BrokenModelError(
            f"{what}: {str(path)!r} is not JSON ({first_line(error)}); copy the file again"
        ) from error
    if not isinstance(document, dict):
        raise BrokenModelError(
            f"{what}: {str(path)!r} holds a {type(document).__name__}, not a JSON object; copy the file again"
        )
    return cast("dict[str, Any]", document)
