"""What adapters add, as files: for diffusers, PEFT and kohya's readers, or merged into a whole model; and back.

`scaling * B A - scaling * B0 A0`, an adapter with its offset, is one LoRA of rank 2r, with the scaling folded into B
and alpha = rank in every layer: whatever a loader assumes about alpha, the strength is right, on the original base. It
is decomposed anew, because the two products nearly cancel, which half precision would not survive well.
"""

from __future__ import annotations

from lorainit_diffusers.export.diffusers_file import save_diffusers_lora
from lorainit_diffusers.export.factors import (
    DIFFUSERS_METADATA_KEY,
    DIFFUSERS_WEIGHT_NAME,
    KOHYA_WEIGHT_NAME,
    LABELS_NAME,
    PEFT_CONFIG_NAME,
    PEFT_PREFIX,
    PEFT_WEIGHT_NAME,
    PROVENANCE_KEY,
    discarded_energy,
    exported_factors,
)
from lorainit_diffusers.export.kohya_file import save_kohya_lora
from lorainit_diffusers.export.load import load_lora
from lorainit_diffusers.export.merged_model import save_merged
from lorainit_diffusers.export.peft_folder import save_peft_lora
from lorainit_diffusers.export.together import save_lora

__all__ = [
    "DIFFUSERS_METADATA_KEY",
    "DIFFUSERS_WEIGHT_NAME",
    "KOHYA_WEIGHT_NAME",
    "LABELS_NAME",
    "PEFT_CONFIG_NAME",
    "PEFT_PREFIX",
    "PEFT_WEIGHT_NAME",
    "PROVENANCE_KEY",
    "discarded_energy",
    "exported_factors",
    "load_lora",
    "save_diffusers_lora",
    "save_kohya_lora",
    "save_lora",
    "save_merged",
    "save_peft_lora",
]
