"""Data-driven LoRA initialisation for diffusion models.

The public names are imported when they are first asked for: what needs none of them, such as the command line of a
script, does not wait for torch and diffusers.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorainit_diffusers.adapters import (
        adapter_state_dict,
        adapters_disabled,
        load_adapter_state_dict,
        trainable_parameters,
    )
    from lorainit_diffusers.attach import attach
    from lorainit_diffusers.export import (
        discarded_energy,
        load_lora,
        save_diffusers_lora,
        save_kohya_lora,
        save_lora,
        save_merged,
        save_peft_lora,
    )
    from lorainit_diffusers.export.checkpoint_hooks import register_checkpoint_hooks
    from lorainit_diffusers.initialize import initialize, make_method
    from lorainit_diffusers.methods import METHODS, Initializer, LoraFactors
    from lorainit_diffusers.report import InitReport, LayerReport

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "InitReport",
    "Initializer",
    "LayerReport",
    "LoraFactors",
    "adapter_state_dict",
    "adapters_disabled",
    "attach",
    "discarded_energy",
    "initialize",
    "load_adapter_state_dict",
    "load_lora",
    "make_method",
    "register_checkpoint_hooks",
    "save_diffusers_lora",
    "save_kohya_lora",
    "save_lora",
    "save_merged",
    "save_peft_lora",
    "trainable_parameters",
]

# The file of each public name.
_FILES = {
    "adapters": ("adapter_state_dict", "adapters_disabled", "load_adapter_state_dict", "trainable_parameters"),
    "attach": ("attach",),
    "export": (
        *("discarded_energy", "load_lora"),
        *("save_diffusers_lora", "save_kohya_lora", "save_lora", "save_merged", "save_peft_lora"),
    ),
    "export.checkpoint_hooks": ("register_checkpoint_hooks",),
    "initialize": ("initialize", "make_method"),
    "methods": ("METHODS", "Initializer", "LoraFactors"),
    "report": ("InitReport", "LayerReport"),
}
_FILE_OF = {name: file for file, names in _FILES.items() for name in names}


def __getattr__(name: str) -> Any:
    """A public name, or one of the package's own modules."""
    if name in _FILE_OF:
        value = getattr(importlib.import_module(f"{__name__}.{_FILE_OF[name]}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """Keeps `lorainit_diffusers.initialize` the function: importing the file of that name would bind the file."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _FILE_OF and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
