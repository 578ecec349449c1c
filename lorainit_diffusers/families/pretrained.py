"""What families share that load their models as diffusers and transformers save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers


def local_folder(name: str, layout: str, *, bare_names: bool = False) -> Path | None:
    """The folder of a base that is a local one; None for a name that can only be a hub repository's.

    Args:
        name: folder or hub name.
        layout: what the folder should be, for the message.
        bare_names: whether a hub name may lack its owner, as the oldest do.

    Raises:
        FileNotFoundError: when it is neither.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    slashes = name.count("/")
    is_hub_name = slashes == 1 or (bare_names and slashes == 0)
    if folder.is_absolute() or name.startswith((".", "~")) or "\\" in name or not is_hub_name:
        raise FileNotFoundError(f"base model {name!r} is not a folder; give {layout} or a hub name (owner/name)")
    return None


def check_transformers_folder(name: str, *, bare_names: bool = False) -> None:
    """See that a base given as a local folder is one of transformers; a hub repository's name is left to the loader.

    Raises:
        FileNotFoundError: when the folder is missing or has no `config.json`.
    """
    folder = local_folder(name, "a folder that save_pretrained wrote", bare_names=bare_names)
    if folder is not None and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"base model folder {name!r} has no config.json; give one that save_pretrained wrote")


def dtype_option(dtype: torch.dtype) -> dict[str, Any]:
    """The option of transformers' `from_pretrained` that says the dtype, which has been renamed."""
    major, minor = (int(number) for number in transformers.__version__.split(".")[:2])
    return {"dtype" if (major, minor) >= (4, 56) else "torch_dtype": dtype}


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Mixed precision for a base that is held in half precision; nothing for others."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype in (torch.float16, torch.bfloat16))
