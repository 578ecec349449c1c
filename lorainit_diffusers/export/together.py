"""Several formats of one LoRA in one call."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lorainit_diffusers.adapters import check_beside
from lorainit_diffusers.export.diffusers_file import save_diffusers_lora
from lorainit_diffusers.export.factors import DIFFUSERS_WEIGHT_NAME, KOHYA_WEIGHT_NAME, PEFT_WEIGHT_NAME
from lorainit_diffusers.export.kohya_file import save_kohya_lora
from lorainit_diffusers.export.peft_folder import save_peft_lora

FORMATS = ("diffusers", "kohya", "peft")


def save_lora(
    target: Mapping[str, nn.Module] | Any,
    directory: str | Path,
    formats: Sequence[str] = ("diffusers",),
    *,
    adapter_name: str = "default",
    export_rank: int | None = None,
    pad_rank: int | None = None,
    provenance: Mapping[str, Any] | None = None,
    base_model: str | None = None,
) -> dict[str, Path]:
    """Write a LoRA in several formats at once.

    Args:
        target: Component (`"unet"`, `"text_encoder"`, ...) -> adapted module; or a model family.
        directory: Created when missing.
        formats: Of `"diffusers"` (`pytorch_lora_weights.safetensors`), `"kohya"`
            (`pytorch_lora_weights_kohya.safetensors`: ComfyUI and A1111 read all layers of SD and SDXL from this one
            only) and `"peft"` (`adapter_model.safetensors` and its configuration; one component).
        adapter_name: Which adapter.
        export_rank: Compress layers of a larger rank.
        pad_rank: Zero-pad every layer to this rank.
        provenance: How the files were made.
        base_model: Folder or hub name of the base, for the PEFT folder.

    Returns:
        Format -> the file, or PEFT's folder.

    Raises:
        ValueError: An unknown format, or none; several components for `"peft"`; as for the functions of each format.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise ValueError(f"formats {list(formats)!r} must name one or more of {', '.join(FORMATS)}")
    modules: Mapping[str, nn.Module] = getattr(target, "adapted", target)
    check_beside(modules, adapter_name)
    if "peft" in formats and len(modules) > 1:
        raise ValueError(f"a PEFT folder holds one component, not {', '.join(modules)}; leave 'peft' out of formats")
    folder = Path(directory)
    ranks: dict[str, Any] = {"adapter_name": adapter_name, "export_rank": export_rank, "pad_rank": pad_rank}
    written: dict[str, Path] = {}
    if "diffusers" in formats:
        written["diffusers"] = save_diffusers_lora(modules, folder, provenance=provenance, **ranks)
    if "kohya" in formats:
        written["kohya"] = save_kohya_lora(modules, folder / KOHYA_WEIGHT_NAME, **ranks)
    if "peft" in formats:
        (module,) = modules.values()
        written["peft"] = save_peft_lora(module, folder, base_model=base_model, provenance=provenance, **ranks)
    names = {"diffusers": DIFFUSERS_WEIGHT_NAME, "kohya": KOHYA_WEIGHT_NAME, "peft": PEFT_WEIGHT_NAME}
    for name, file in names.items():
        left = folder / file
        if name not in formats and left.is_file():
            warnings.warn(
                f"{str(left)!r} was not written by this call, and may hold another LoRA (of a training that "
                f"writes several formats): add {name!r} to formats, or delete it",
                stacklevel=2,
            )
    return written
