"""Data-driven LoRA initialisation for diffusion models."""

from __future__ import annotations

from lorainit_diffusers.adapters import (
    adapter_state_dict,
    adapters_disabled,
    load_adapter_state_dict,
    trainable_parameters,
)
from lorainit_diffusers.checkpoint_hooks import register_checkpoint_hooks
from lorainit_diffusers.export import (
    discarded_energy,
    load_lora,
    save_diffusers_lora,
    save_kohya_lora,
    save_merged,
    save_peft_lora,
)
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
    "discarded_energy",
    "initialize",
    "load_adapter_state_dict",
    "load_lora",
    "make_method",
    "register_checkpoint_hooks",
    "save_diffusers_lora",
    "save_kohya_lora",
    "save_merged",
    "save_peft_lora",
    "trainable_parameters",
]
