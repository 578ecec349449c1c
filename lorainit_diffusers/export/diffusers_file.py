"""The file that `pipeline.load_lora_weights` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lorainit_diffusers.adapters import check_beside
from lorainit_diffusers.export.factors import (
    DIFFUSERS_METADATA_KEY,
    DIFFUSERS_WEIGHT_NAME,
    check_holds,
    exported_biases,
    exported_factors,
    exported_magnitudes,
    file_metadata,
    minimal_config,
    text_model_name,
)
from lorainit_diffusers.files import save_tensors


def save_diffusers_lora(
    target: Mapping[str, nn.Module] | Any,
    directory: str | Path,
    *,
    weight_name: str = DIFFUSERS_WEIGHT_NAME,
    adapter_name: str = "default",
    export_rank: int | None = None,
    pad_rank: int | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write a file that `pipeline.load_lora_weights(directory)` loads, exactly, on the original base.

    Args:
        target: Component (`"unet"`, `"transformer"`, `"text_encoder"`, ...) -> adapted module; or a model family.
        directory: Created when missing.
        weight_name: Of the file.
        adapter_name: Which adapter.
        export_rank: Compress layers of a larger rank, as in `exported_factors`.
        pad_rank: Zero-pad every layer to this rank, for loaders that cannot mix ranks.
        provenance: How the file was made; JSON under a metadata key of our own, which loaders ignore.

    Returns:
        The file.

    Raises:
        ValueError: `export_rank` below 1; `pad_rank` smaller than the rank that a layer has left (2r for offset
            initialisations that are not compressed); what `bias`, `modules_to_save` or `trainable_token_indices`
            of `LoraConfig` train, which the format cannot hold; another component that carries an adapter, in the
            family or in the file that would be overwritten.
    """
    modules: Mapping[str, nn.Module] = getattr(target, "adapted", target)
    path = Path(directory) / weight_name
    check_beside(modules, adapter_name)
    _check_overwrites_nothing_else(path, modules)
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for component, module in modules.items():
        check_holds(module, adapter_name, "the diffusers format", lora_bias=True)
        exported = exported_factors(module, adapter_name, export_rank=export_rank, pad_rank=pad_rank)
        magnitudes, biases = exported_magnitudes(module, adapter_name), exported_biases(module, adapter_name)
        text_encoder = component.startswith("text_encoder")
        for name, factors in exported.items():
            key = f"{component}.{text_model_name(name) if text_encoder else name}"
            tensors |= {f"{key}.lora_A.weight": factors.lora_A, f"{key}.lora_B.weight": factors.lora_B}
            if name in biases:
                tensors[f"{key}.lora_B.bias"] = biases[name]
            if name in magnitudes:
                # transformers 5 needs the parameter's full name, and ignores the short one that PEFT writes.
                suffix = "lora_magnitude_vector.weight" if text_encoder else "lora_magnitude_vector"
                tensors[f"{key}.{suffix}"] = magnitudes[name]
        # transformers 5 has flattened CLIP: patterns without "text_model." match both layouts as name endings. Others
        # are anchored, because PEFT matches unanchored keys as endings of any name.
        names = {name: name.removeprefix("text_model.") if text_encoder else name for name in exported}
        ranks = {f"{'' if text_encoder else '^'}{names[name]}": f.lora_A.shape[0] for name, f in exported.items()}
        config = minimal_config(ranks, sorted(names.values()), use_dora=bool(magnitudes), lora_bias=bool(biases))
        metadata |= {f"{component}.{key}": value for key, value in config.items()}
    blobs = {**file_metadata(provenance), DIFFUSERS_METADATA_KEY: json.dumps(metadata, sort_keys=True)}
    save_tensors(tensors, path, metadata=blobs)
    return path


def _check_overwrites_nothing_else(path: Path, modules: Mapping[str, nn.Module]) -> None:
    """See that a file that is there, such as the one that the script itself has saved, loses no component."""
    if not path.is_file():
        return
    try:
        with safe_open(path, framework="pt") as opened:
            keys = list(opened.keys())
    except SafetensorError:  # no safetensors file: nothing that could be lost
        return
    lost = sorted({key.partition(".")[0] for key in keys if ".lora" in key} - set(modules))
    if lost:
        raise ValueError(
            f"{str(path)!r} also holds the LoRA of {', '.join(lost)}, which this call would overwrite with that of "
            f"{', '.join(modules)} alone; pass every adapted module (a family: with train_text_encoder=True), or "
            "another weight_name"
        )
