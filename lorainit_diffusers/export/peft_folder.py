"""The folder that PEFT's `PeftModel.from_pretrained` reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorainit_diffusers.adapters import config_of, exactly, trained_tensors, unwrap
from lorainit_diffusers.export.factors import (
    LABELS_NAME,
    PEFT_CONFIG_NAME,
    PEFT_PREFIX,
    PEFT_WEIGHT_NAME,
    check_holds,
    exported_biases,
    exported_factors,
    exported_magnitudes,
    file_metadata,
    label_names,
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
    labels: Mapping[int, str] | None = None,
) -> Path:
    """Write a folder that PEFT's `PeftModel.from_pretrained(base, directory)` loads, exactly, on the original base.

    For models whose pipelines have no `load_lora_weights` (DiT, PixArt), and for those that have no pipeline;
    `load_lora` reads it as well.

    Args:
        module: Adapted.
        directory: Created when missing; gets `adapter_config.json` and `adapter_model.safetensors`.
        base_model: Folder or hub name of the base, for the configuration.
        adapter_name: Which adapter.
        full_modules: Names of modules that were trained in full, such as a classifier's output layer; their weights
            are saved as they are (PEFT's `modules_to_save`), and replace those of the base when it is loaded.
        export_rank: Compress layers of a larger rank, as in `exported_factors`.
        pad_rank: Zero-pad every layer to this rank.
        provenance: How the file was made; JSON under a metadata key of our own, which loaders ignore.
        labels: Names of a classifier's outputs, by number, for `label_names.json`, from which `load_lora` sets
            them; when left out, those of the model's configuration, if it is a classifier that has any.

    Returns:
        The folder.

    Raises:
        ValueError: As for `save_diffusers_lora`; a module of `full_modules` that does not exist, or is adapted.
    """
    check_holds(module, adapter_name, "the PEFT folder", lora_bias=True, beside=True, full_modules=full_modules)
    exported = exported_factors(module, adapter_name, export_rank=export_rank, pad_rank=pad_rank)
    whole = _whole_tensors(module, adapter_name, full_modules)
    magnitudes, biases = exported_magnitudes(module, adapter_name), exported_biases(module, adapter_name)
    tensors = {f"{PEFT_PREFIX}{name}.lora_A.weight": factors.lora_A for name, factors in exported.items()}
    tensors |= {f"{PEFT_PREFIX}{name}.lora_B.weight": factors.lora_B for name, factors in exported.items()}
    tensors |= {f"{PEFT_PREFIX}{name}.lora_magnitude_vector": magnitude for name, magnitude in magnitudes.items()}
    tensors |= {f"{PEFT_PREFIX}{name}.lora_B.bias": bias for name, bias in biases.items()}
    tensors |= {f"{PEFT_PREFIX}{key}": value for key, value in whole.items()}
    own = config_of(module, adapter_name)
    kept = [] if own is None else [name for name in own.modules_to_save or [] if name not in full_modules]
    ranks = {f"^{re.escape(name)}": factors.lora_A.shape[0] for name, factors in exported.items()}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        **minimal_config(ranks, exactly(exported), use_dora=bool(magnitudes), lora_bias=bool(biases)),
        **({"modules_to_save": [*full_modules, *kept]} if full_modules or kept else {}),
        **({"bias": own.bias} if own is not None and own.bias != "none" else {}),
        **({} if (rows := _trained_rows(own)) is None else {"trainable_token_indices": rows}),
    }
    directory = Path(directory)
    save_tensors(tensors, directory / PEFT_WEIGHT_NAME, metadata=file_metadata(provenance))
    write_json(directory / PEFT_CONFIG_NAME, config)
    names = label_names(unwrap(module)) if labels is None else [labels[index] for index in sorted(labels)]
    if names is not None:
        index = {str(number): name for number, name in enumerate(names)}
        write_json(directory / LABELS_NAME, {"id2label": index, "label2id": {n: int(i) for i, n in index.items()}})
    return directory


def _trained_rows(config: Any) -> Any:
    """The rows of embeddings that the adapter trains, as its configuration names them (PEFT has it since 0.16)."""
    return getattr(config, "trainable_token_indices", None)


def _whole_tensors(module: nn.Module, adapter_name: str, names: Sequence[str]) -> dict[str, Tensor]:
    """The weights of modules that were trained in full, and all else beside the factors, on the CPU."""
    inner = unwrap(module)
    beside = {
        item.peft_name: item.value.detach().cpu().clone().contiguous() for item in trained_tensors(module, adapter_name)
    }
    known = dict(inner.named_modules())
    tensors: dict[str, Tensor] = {}
    for name in names:
        if any(key.startswith(f"{name}.") for key in beside):
            continue  # PEFT's copy of it was trained
        if name not in known:
            raise ValueError(f"{type(inner).__name__} has no module {name!r} that could have been trained in full")
        state = known[name].state_dict()
        if any("lora_" in key for key in state):
            raise ValueError(f"module {name!r} carries an adapter: it cannot be saved in full, too")
        tensors |= {f"{name}.{key}": value.detach().cpu().clone().contiguous() for key, value in state.items()}
    tensors |= beside
    check_finite(tensors, "the LoRA")
    return tensors
