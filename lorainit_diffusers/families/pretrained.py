"""What families share that load their models as diffusers and transformers save them."""

from __future__ import annotations

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
