"""A base in one `.safetensors` file, as model sites offer them.

Such a file holds weights alone. diffusers takes the configurations and tokenizers from a folder beside it (a clone of
the repository that the file is from has them), from its cache, or from the hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lorainit_diffusers.loading.errors import BrokenModelError, MissingModelError, first_line
from lorainit_diffusers.loading.files import PICKLED, check_safetensors
from lorainit_diffusers.loading.hub import offline, why_unreachable

WEIGHT_SUFFIXES = (".safetensors", ".gguf", *PICKLED)


def is_single_file(name: str) -> bool:
    """Whether a name is that of a file of weights, which may be missing."""
    return Path(name).is_file() or name.endswith(WEIGHT_SUFFIXES)


def conversion_command(kind: Any, file: Path) -> str:
    """A command line that makes a folder of a single file, where the hub can be reached."""
    folder = str(file.with_suffix(""))
    code = f"from diffusers import {kind.__name__} as P; P.from_single_file({str(file)!r}).save_pretrained({folder!r})"
    return f'python -c "{code}"'


def check_single_file(kind: Any, name: str, what: str) -> None:
    """See that a single file can be read by this class.

    Args:
        kind: A pipeline or model of diffusers.
        name: Path of the file.
        what: What it is: "base model".

    Raises:
        MissingModelError: There is no such file.
        BrokenModelError: It is pickled or of another format, cut off, or the class reads no single files.
    """
    file = Path(name)
    if not file.is_file():
        raise MissingModelError(f"{what} {name!r}: there is no such file; give a folder, a hub name or a file")
    if file.suffix != ".safetensors":
        pickled = "is pickled and may run any code" if file.suffix in PICKLED else "is no safetensors file"
        raise BrokenModelError(
            f"{what} {name!r} {pickled}: only safetensors weights are read; get the .safetensors version of it"
        )
    check_safetensors(file, f"the {what} {name!r}")
    whole = file.resolve().parent.parent
    if (file.parent / "config.json").is_file() and (whole / "model_index.json").is_file():
        raise BrokenModelError(f"{what} {name!r} is one part of a base; give the whole folder {str(whole)!r}")
    if not hasattr(kind, "from_single_file"):
        raise BrokenModelError(
            f"{what} {name!r} is a single file, which a {kind.__name__} cannot be read from; give a folder in the "
            "diffusers layout, or a hub name"
        )


def load_single_file(
    kind: Any, name: str, *, what: str, dtype: torch.dtype, config: str | None = None, **options: Any
) -> Any:
    """Load a pipeline or a model from a single file.

    Args:
        kind: A pipeline or model of diffusers.
        name: Path of the file.
        what: What it is: "base model".
        dtype: Of its weights.
        config: Folder with the configurations; where the file has some beside it, those by default.
        **options: Of `from_single_file`.

    Raises:
        BrokenModelError: It cannot be loaded; the message has the command that makes a folder of it.
    """
    file = Path(name)
    if config is None and (file.parent / "model_index.json").is_file():
        config = str(file.parent)
    unreachable = None if config is not None else why_unreachable()
    if config is not None:
        options["config"] = config
    try:
        with offline(unreachable is not None):
            return kind.from_single_file(
                name, torch_dtype=dtype, local_files_only=config is not None or unreachable is not None, **options
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of the readers of checkpoints, configurations and tokenizers
        hub = "" if unreachable is None else f"cannot reach the hub for its configurations ({unreachable}); "
        raise BrokenModelError(
            f"the {what} {name!r} cannot be loaded from a single file: {hub}{first_line(error)}. Make a folder of it "
            f"where the hub can be reached, and give that: {conversion_command(kind, file)}"
        ) from error
