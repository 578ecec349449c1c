"""What families share that load their models as diffusers and transformers save them."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

import torch
import transformers


def dtype_option(dtype: torch.dtype) -> dict[str, Any]:
    """The option of transformers' `from_pretrained` that says the dtype, which has been renamed."""
    major, minor = (int(number) for number in transformers.__version__.split(".")[:2])
    return {"dtype" if (major, minor) >= (4, 56) else "torch_dtype": dtype}


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Mixed precision for a base that is held in half precision; nothing for others."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype in (torch.float16, torch.bfloat16))


def check_option_names(family: type, options: Mapping[str, Any], known: Collection[str]) -> None:
    """See that a family has the options that its `from_pretrained` was given, before anything is loaded.

    Raises:
        TypeError: As Python's own for a keyword that a function does not take; names the closest one.
    """
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(sorted(known))}"
            raise TypeError(f"{family.__name__}.from_pretrained has no option {name!r}{meant}")
