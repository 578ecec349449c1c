"""Saved LoRAs of the diffusers and PEFT formats, put into a model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import safe_open
from torch import Tensor, nn

from lorainit_diffusers.adapters import (
    AdapterWeights,
    attach,
    base_layers,
    default_config,
    existing_adapter,
    state_of_base,
    unwrap,
)
from lorainit_diffusers.export.factors import (
    DIFFUSERS_METADATA_KEY,
    DIFFUSERS_WEIGHT_NAME,
    LABELS_NAME,
    PEFT_CONFIG_NAME,
    PEFT_PREFIX,
    PEFT_WEIGHT_NAME,
)
from lorainit_diffusers.lora_config import check_config
from lorainit_diffusers.methods.base import LoraFactors


def load_lora(
    module: nn.Module, path: str | Path, *, component: str | None = None, adapter_name: str = "default"
) -> None:
    """Put a saved LoRA into a model in place, so that its pipeline uses it.

    ::

        pipeline = DiTPipeline.from_pretrained("facebook/DiT-XL-2-256")
        load_lora(pipeline.transformer, "outputs/dit-lora")

    It is an active adapter afterwards; the base weights are untouched and frozen, and run alone in
    `adapters_disabled`. What was trained in full (a classifier's output layer, biases) is the exception: it
    replaces the base's, and a classifier gets the names of its labels. Only safetensors files are read.

    Args:
        module: The base model (a pipeline's transformer or UNet, say) that the LoRA was made for.
        path: What `save_peft_lora` or `save_diffusers_lora` wrote: the folder, or the file in it.
        component: Which component's layers to take from a file in the diffusers format (`"transformer"`,
            `"unet"`, ...); needed only if it holds several.
        adapter_name: PEFT's name for the adapter, which the module must not carry yet.

    Raises:
        FileNotFoundError: No such file, or a folder that holds neither format.
        ValueError: The module carries such an adapter already; the file lacks the component, or holds something other
            than a LoRA; a configuration that cannot be honoured (such as PEFT's pissa or olora, whose factors assume a
            base that they have changed); a layer that the module does not have, or of another shape. The module is then
            as it was.
    """
    if existing_adapter(module, adapter_name) is not None:
        raise ValueError(
            f"{type(module).__name__} already carries an adapter {adapter_name!r}; load into a fresh base, or give "
            "another adapter_name"
        )
    file = _lora_file(Path(path))
    tensors, config = _read(file, component)
    whole = _take_full_modules(module, tensors, config, file)
    names = _saved_labels(file, unwrap(module))
    weights = _layer_weights(unwrap(module), tensors, config, file)
    if not weights:
        raise ValueError(f"{str(file)!r} holds no LoRA layers; save it again")
    attach(module, weights, adapter_name=adapter_name, use_dora=any(w.magnitude is not None for w in weights.values()))
    own = state_of_base(module)
    for key, value in whole.items():
        own[key].copy_(value)
    if names is not None:
        settings = cast(Any, unwrap(module)).config
        settings.id2label = dict(enumerate(names))
        settings.label2id = {name: number for number, name in enumerate(names)}


def _layer_weights(
    inner: nn.Module, tensors: Mapping[str, Tensor], config: Mapping[str, Any], file: Path
) -> dict[str, AdapterWeights]:
    """What a file holds of every layer, each held against the layer of the model.

    Raises:
        ValueError: Naming the file, the layer and what does not fit.
    """
    linear = base_layers(inner)
    weights: dict[str, AdapterWeights] = {}
    for saved_name, entry in _by_layer(tensors, file).items():
        # transformers 5 has flattened CLIP, whose layers files nest under "text_model."
        name = saved_name if saved_name in linear else saved_name.removeprefix("text_model.")
        layer = linear.get(name)
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"{str(file)!r} adapts layer {saved_name!r}, but {type(inner).__name__} has no such linear "
                "layer; load it into the model that it was trained on"
            )
        if "A" not in entry or "B" not in entry:
            raise ValueError(f"{str(file)!r} holds only part of the LoRA of layer {saved_name!r}; save it again")
        rows, columns = entry["B"].shape[0], entry["A"].shape[1]
        if (rows, columns) != (layer.out_features, layer.in_features):
            raise ValueError(
                f"the LoRA of layer {saved_name!r} in {str(file)!r} is for a weight of shape ({rows}, {columns}), but "
                f"that of {type(inner).__name__} has ({layer.out_features}, {layer.in_features}); load it "
                "into the model that it was trained on"
            )
        rank = _saved_rank(config, saved_name, entry["A"], entry["B"], file)
        for flag, kept in (("use_dora", "magnitude_vector"), ("lora_bias", "B.bias")):
            if config and bool(config.get(flag)) != (kept in entry):
                raise ValueError(
                    f"{str(file)!r} has {flag}={config.get(flag)!r}, but {'no ' if kept not in entry else ''}tensor "
                    f"'{saved_name}.lora_{kept}'; save it again"
                )
        weights[name] = AdapterWeights(
            LoraFactors(entry["A"], entry["B"]),
            scaling=_saved_scaling(config, saved_name, rank),
            magnitude=entry.get("magnitude_vector"),
            bias=entry.get("B.bias"),
        )
    return weights


def _by_layer(tensors: Mapping[str, Tensor], file: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of every layer, by what they are of it."""
    entries: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        layer, found, entry = key.rpartition(".lora_")
        entry = entry.removesuffix(".weight")
        if not found or entry not in ("A", "B", "B.bias", "magnitude_vector"):
            raise ValueError(f"{str(file)!r} holds {key!r}, which is no part of a LoRA of linear layers")
        entries.setdefault(layer, {})[entry] = value
    return entries


def _read(file: Path, component: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of one component and their configuration, which must be one that can be honoured."""
    with safe_open(file, framework="pt") as opened:
        keys, metadata = list(opened.keys()), opened.metadata() or {}
        folder = all(key.startswith(PEFT_PREFIX) for key in keys)
        if folder:
            prefix, config, where = PEFT_PREFIX, _peft_config(file), f"{str(file.parent / PEFT_CONFIG_NAME)!r}"
        else:
            component = _component(file, keys, component)
            prefix, config, where = f"{component}.", {}, f"the metadata of {str(file)!r}"
            for key, value in json.loads(metadata.get(DIFFUSERS_METADATA_KEY, "{}")).items():
                if key.startswith(prefix):
                    config[key.removeprefix(prefix)] = value
        tensors = {key.removeprefix(prefix): opened.get_tensor(key) for key in keys if key.startswith(prefix)}
    remedy = (
        "load it with PEFT, and convert it there (save_pretrained's path_initial_model_for_weight_conversion, merge)"
    )
    check_config(config, default_config(), where, remedy)
    fields = ["trainable_token_indices"] if folder else ["trainable_token_indices", "bias", "modules_to_save"]
    for field in fields:
        if config.get(field) not in (None, "none", [], {}):
            raise ValueError(f"{where} has {field}={config[field]!r}, which is not in its weights; {remedy}")
    return tensors, config


def _saved_labels(file: Path, model: nn.Module) -> list[str] | None:
    """The names of a classifier's outputs that a folder carries, which must fit the model."""
    path = file.parent / LABELS_NAME
    if file.name != PEFT_WEIGHT_NAME or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["id2label"]
        names = [str(found[str(number)]) for number in range(len(found))]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} holds no id2label from 0 on ({error}); save the LoRA again") from error
    count = len(getattr(getattr(model, "config", None), "id2label", None) or ())
    if count != len(names):
        raise ValueError(
            f"{str(path)!r} names {len(names)} labels, but {type(model).__name__} has {count}; load the base with as "
            "many (id2label, ignore_mismatched_sizes=True)"
        )
    return names


def _take_full_modules(
    module: nn.Module, tensors: dict[str, Tensor], config: Mapping[str, Any], file: Path
) -> dict[str, Tensor]:
    """Take what was trained beside the factors out of a file's tensors, by the base's names, and see that it fits."""
    names = [f".{name}." for name in cast("list[str]", config.get("modules_to_save") or [])]
    has_bias = config.get("bias", "none") != "none"
    whole: dict[str, Tensor] = {}
    for key in list(tensors):
        biased = has_bias and key.endswith("bias") and ".lora_" not in key
        if biased or any(name in f".{key}" for name in names):
            whole[key.replace(".base_layer.", ".")] = tensors.pop(key)
    own, kind = state_of_base(module), type(unwrap(module)).__name__
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
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no JSON ({error}); save the LoRA again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{str(path)!r} holds no JSON object; save the LoRA again")
    return cast("dict[str, Any]", config)


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


def _saved_rank(config: Mapping[str, Any], name: str, lora_A: Tensor, lora_B: Tensor, file: Path) -> int:
    """The rank of a layer's factors, which must be the configuration's: the scaling depends on it."""
    rank = lora_A.shape[0]
    said = _by_pattern(config.get("rank_pattern"), name, config.get("r", rank))
    if lora_B.shape[1] != rank or int(said) != rank:
        raise ValueError(
            f"the factors of layer {name!r} in {str(file)!r} have ranks {rank} and {lora_B.shape[1]}, but its "
            f"configuration says {said}; save it again"
        )
    return rank


def _saved_scaling(config: Mapping[str, Any], name: str, rank: int) -> float:
    """What multiplies B A by the file's configuration; 1 without one, and in all files that are written here."""
    if "lora_alpha" not in config:
        return 1.0
    alpha = float(_by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"]))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _by_pattern(patterns: Any, name: str, default: float) -> float:
    """A layer's entry among patterns, as PEFT finds it."""
    matching = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name))
    return next(matching, default)
