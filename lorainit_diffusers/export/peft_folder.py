"""The folder that PEFT's `PeftModel.from_pretrained` reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorainit_diffusers.adapters import exactly, unwrap
from lorainit_diffusers.export.factors import (
    PEFT_CONFIG_NAME,
    PEFT_PREFIX,
    PEFT_WEIGHT_NAME,
    exported_factors,
    exported_magnitudes,
    file_metadata,
    minimal_config,
)
from lorainit_diffusers.files import save_tensors, write_json
from lorainit_diffusers.finite import check_finite


def save_peft_lora(
    module: nn.Module,
    directory: str | Path,
    *,
    base_model: str | None = None,
    adapter_name: str = "default",
    full_modules: Sequence[str] = (),
    export_rank: int | None = None,
    pad_rank: int | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write a folder that PEFT's ``PeftModel.from_pretrained(base, directory)`` loads, exactly, on the original base.

    For models whose pipelines have no ``load_lora_weights`` (DiT, PixArt), and for those that have no pipeline;
    :func:`load_lora` reads it as well.

    Args:
        module: adapted.
        directory: created when missing; gets ``adapter_config.json`` and ``adapter_model.safetensors``.
        base_model: folder or hub name of the base, for the configuration.
        adapter_name: which adapter.
        full_modules: names of modules that were trained in full, such as a classifier's output layer; their weights
            are saved as they are (PEFT's ``modules_to_save``), and replace those of the base when it is loaded.
        export_rank: compress layers of a larger rank, as in :func:`exported_factors`.
        pad_rank: zero-pad every layer to this rank.
        provenance: how the file was made; JSON under a metadata key of our own, which loaders ignore.

    Returns:
        The folder.

    Raises:
        ValueError: as for :func:`save_diffusers_lora`; a module of ``full_modules`` that does not exist, or is adapted.
    """
    exported = exported_factors(module, adapter_name, export_rank=export_rank, pad_rank=pad_rank)
    whole = _full_modules(module, full_modules)
    magnitudes = exported_magnitudes(module, adapter_name)
    tensors = {f"{PEFT_PREFIX}{name}.lora_A.weight": factors.lora_A for name, factors in exported.items()}
    tensors |= {f"{PEFT_PREFIX}{name}.lora_B.weight": factors.lora_B for name, factors in exported.items()}
    tensors |= {f"{PEFT_PREFIX}{name}.lora_magnitude_vector": magnitude for name, magnitude in magnitudes.items()}
    tensors |= {f"{PEFT_PREFIX}{key}": value for key, value in whole.items()}
    ranks = {f"^{re.escape(name)}": factors.lora_A.shape[0] for name, factors in exported.items()}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        **minimal_config(ranks, exactly(exported), use_dora=bool(magnitudes)),
        **({"modules_to_save": list(full_modules)} if full_modules else {}),
    }
    directory = Path(directory)
    save_tensors(tensors, directory / PEFT_WEIGHT_NAME, metadata=file_metadata(provenance))
    write_json(directory / PEFT_CONFIG_NAME, config)
    return directory


def _full_modules(module: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """The weights of modules that were trained in full, on the CPU."""
    inner = unwrap(module)
    known = dict(inner.named_modules())
    tensors: dict[str, Tensor] = {}
    for name in names:
        if name not in known:
            raise ValueError(f"{type(inner).__name__} has no module {name!r} that could have been trained in full")
        state = known[name].state_dict()
        if any("lora_" in key for key in state):
            raise ValueError(f"module {name!r} carries an adapter: it cannot be saved in full, too")
        tensors |= {f"{name}.{key}": value.detach().cpu().clone().contiguous() for key, value in state.items()}
    check_finite(tensors, "the LoRA")
    return tensors
