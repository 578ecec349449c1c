"""Saved LoRAs of the diffusers and PEFT formats, put into a model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import safe_open
from torch import Tensor, nn

from lorainit_diffusers.adapters import AdapterWeights, attach, base_layers, existing_adapter, unwrap
from lorainit_diffusers.export.factors import (
    DIFFUSERS_METADATA_KEY,
    DIFFUSERS_WEIGHT_NAME,
    PEFT_CONFIG_NAME,
    PEFT_PREFIX,
    PEFT_WEIGHT_NAME,
)
from lorainit_diffusers.methods.base import LoraFactors


def load_lora(
    module: nn.Module, path: str | Path, *, component: str | None = None, adapter_name: str = "default"
) -> None:
    """Put a saved LoRA into a model in place, so that its pipeline uses it.

    ::

        pipeline = DiTPipeline.from_pretrained("facebook/DiT-XL-2-256")
        load_lora(pipeline.transformer, "outputs/dit-lora")

    It is an active adapter afterwards; the base weights are untouched and frozen, and run alone in
    :func:`adapters_disabled`. Modules that were trained in full (a classifier's output layer) are the exception: their
    weights replace those of the base. Only safetensors files are read.

    Args:
        module: the base model (a pipeline's transformer or UNet, say) that the LoRA was made for.
        path: what :func:`save_peft_lora` or :func:`save_diffusers_lora` wrote: the folder, or the file in it.
        component: which component's layers to take from a file in the diffusers format (``"transformer"``,
            ``"unet"``, ...); needed only if it holds several.
        adapter_name: PEFT's name for the adapter, which the module must not carry yet.

    Raises:
        FileNotFoundError: no such file, or a folder that holds neither format.
        ValueError: the module carries such an adapter already; the file lacks the component, or holds something other
            than a LoRA; a layer that the module does not have, or of another shape. The module is then as it was.
    """
    if existing_adapter(module, adapter_name) is not None:
        raise ValueError(
            f"{type(module).__name__} already carries an adapter {adapter_name!r}; load into a fresh base, or give "
            "another adapter_name"
        )
    file = _lora_file(Path(path))
    with safe_open(file, framework="pt") as opened:
        keys, metadata = list(opened.keys()), opened.metadata() or {}
        if all(key.startswith(PEFT_PREFIX) for key in keys):
            prefix, config = PEFT_PREFIX, _peft_config(file)
        else:
            component = _component(file, keys, component)
            prefix, config = f"{component}.", {}
            for key, value in json.loads(metadata.get(DIFFUSERS_METADATA_KEY, "{}")).items():
                if key.startswith(prefix):
                    config[key.removeprefix(prefix)] = value
        tensors = {key.removeprefix(prefix): opened.get_tensor(key) for key in keys if key.startswith(prefix)}
    whole = _take_full_modules(module, tensors, config, file)
    entries: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        layer, found, entry = key.rpartition(".lora_")
        entry = entry.removesuffix(".weight")
        if not found or entry not in ("A", "B", "magnitude_vector"):
            raise ValueError(f"{str(file)!r} holds {key!r}, which is no part of a LoRA of linear layers")
        entries.setdefault(layer, {})[entry] = value
    linear = base_layers(module)
    weights: dict[str, AdapterWeights] = {}
    for saved_name, entry in entries.items():
        # transformers 5 has flattened CLIP, whose layers files nest under "text_model."
        name = saved_name if saved_name in linear else saved_name.removeprefix("text_model.")
        layer = linear.get(name)
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"{str(file)!r} adapts layer {saved_name!r}, but {type(unwrap(module)).__name__} has no such linear "
                "layer; load it into the model that it was trained on"
            )
        if "A" not in entry or "B" not in entry:
            raise ValueError(f"{str(file)!r} holds only part of the LoRA of layer {saved_name!r}; save it again")
        rows, columns = entry["B"].shape[0], entry["A"].shape[1]
        if (rows, columns) != (layer.out_features, layer.in_features):
            raise ValueError(
                f"the LoRA of layer {saved_name!r} in {str(file)!r} is for a weight of shape ({rows}, {columns}), but "
                f"that of {type(unwrap(module)).__name__} has ({layer.out_features}, {layer.in_features}); load it "
                "into the model that it was trained on"
            )
        weights[name] = AdapterWeights(
            LoraFactors(entry["A"], entry["B"]),
            scaling=_saved_scaling(config, saved_name, rank=entry["A"].shape[0]),
            magnitude=entry.get("magnitude_vector"),
        )
    if not weights:
        raise ValueError(f"{str(file)!r} holds no LoRA layers; save it again")
    attach(module, weights, adapter_name=adapter_name, use_dora=any(w.magnitude is not None for w in weights.values()))
    own = unwrap(module).state_dict()
    for key, value in whole.items():
        own[key].copy_(value)


def _take_full_modules(
    module: nn.Module, tensors: dict[str, Tensor], config: Mapping[str, Any], file: Path
) -> dict[str, Tensor]:
    """Take the weights of modules that were trained in full out of a file's tensors, and see that they fit."""
    names = tuple(f"{name}." for name in cast("list[str]", config.get("modules_to_save") or []))
    whole = {key: tensors.pop(key) for key in list(tensors) if names and key.startswith(names)}
    own, kind = unwrap(module).state_dict(), type(unwrap(module)).__name__
    for key, value in whole.items():
        if key not in own:
            raise ValueError(
                f"{str(file)!r} holds {key!r}, trained in full, but {kind} has no such weight; load it into the model "
                "that it was trained on"
            )
        if own[key].shape != value.shape:
            raise ValueError(
                f"{key!r}, trained in full, has shape {tuple(value.shape)} in {str(file)!r}, but "
                f"{tuple(own[key].shape)} in {kind}; load the base with as many labels as it was trained with "
                "(id2label, ignore_mismatched_sizes=True)"
            )
    return whole


def _lora_file(path: Path) -> Path:
    """The weights in a folder, or the file itself."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{str(path)!r} is no safetensors file, and no other format is read")
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"there is no LoRA at {str(path)!r}; give the folder that a run wrote, or a file in it")
    for file in (path / PEFT_WEIGHT_NAME, path / DIFFUSERS_WEIGHT_NAME):
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"folder {str(path)!r} holds neither {PEFT_WEIGHT_NAME} nor {DIFFUSERS_WEIGHT_NAME}; give the folder that a "
        "run wrote, or the file in it"
    )


def _peft_config(file: Path) -> dict[str, Any]:
    path = file.parent / PEFT_CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{PEFT_CONFIG_NAME} is missing beside {str(file)!r}: it says how the LoRA is scaled")
    return json.loads(path.read_text(encoding="utf-8"))


def _component(file: Path, keys: Iterable[str], component: str | None) -> str:
    """The component to take from a file in the diffusers format."""
    found = sorted({key.partition(".")[0] for key in keys})
    if any(name.startswith("lora_") for name in found):
        raise ValueError(f"{str(file)!r} is in kohya's format; give the file in the diffusers format instead")
    if component is None and len(found) == 1:
        return found[0]
    if component not in found:
        remedy = "say which one with component" if component is None else f"there is no {component!r}"
        raise ValueError(f"{str(file)!r} holds LoRAs of {', '.join(found)}: {remedy}")
    return component


def _saved_scaling(config: Mapping[str, Any], name: str, rank: int) -> float:
    """What multiplies B A by the file's configuration; 1 without one, and in all files that are written here."""
    if "lora_alpha" not in config:
        return 1.0
    patterns = cast("Mapping[str, float]", config.get("alpha_pattern") or {})
    matching = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", name))  # as PEFT does it
    alpha = float(next(matching, config["lora_alpha"]))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
