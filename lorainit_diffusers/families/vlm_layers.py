"""Which layers of a vision-language model are in which of its parts, by what transformers calls them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

# What transformers calls the parts, outermost first: a projector may lie in the tower (Qwen-VL's merger).
_LANGUAGE_NAMES = frozenset({"language_model", "text_model"})
_VISION_NAMES = frozenset({"vision_tower", "vision_model", "visual", "vision_encoder"})
_PROJECTOR_NAMES = frozenset(
    {"multi_modal_projector", "mm_projector", "connector", "merger", "projector", "language_projection"}
    | {"vision_projection", "embed_vision", "aligner"}
)
# Attention's projections, split and fused, and those of its output, whose names other layers have, too.
_ATTENTION_INPUTS = frozenset(
    {"q_proj", "k_proj", "v_proj", "query", "key", "value"}
    | {"qkv_proj", "qkv", "query_key_value", "c_attn", "Wqkv", "wqkv"}
)
_ATTENTION_OUTPUTS = frozenset({"o_proj", "out_proj", "dense", "c_proj", "proj", "wo", "projection_layer"})
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
# Attention from text to the states of an image: its keys and values see no tokens.
_CROSS_ATTENTION = re.compile(r"cross_?att|encoder_attn", re.IGNORECASE)
_KEYS_AND_VALUES = frozenset({"k_proj", "v_proj", "key", "value"})


def parts_of_layers(model: nn.Module) -> dict[str, str]:
    """Linear layers of the parts by name; the part of each."""
    modules = dict(model.named_modules())
    names = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    # those of adapters are none of the base's
    names = [name.replace(".base_layer", "") for name in names if ".lora_" not in name]
    parts = {name: part for name in names if (part := _part(name)) is not None}
    if "language" not in parts.values() and hasattr(model, "get_decoder"):
        decoder: Any = cast(Any, model).get_decoder()
        prefix = next((f"{name}." for name, module in modules.items() if module is decoder), None)
        parts |= {name: "language" for name in names if prefix and name.startswith(prefix) and name not in parts}
    return parts


def default_layers(model: nn.Module, part_of_layer: Mapping[str, str], part: str) -> list[str]:
    """Names of the layers of a part that get an adapter when the user names none; often none.

    Of the language model and the vision tower it is the projections of attention, of the projector all linear layers.
    Layers of the tower beyond the one whose features the model takes have no part in the loss, and none here.

    Args:
        model: The whole model.
        part_of_layer: From `parts_of_layers`.
        part: `language`, `vision` or `projector`.
    """
    layers = [name for name, own in part_of_layer.items() if own == part]
    if part != "projector":
        layers = [name for name in layers if is_attention(name)]
    if part == "vision":
        num_used = _num_used_vision_layers(cast(Any, model).config)
        layers = [name for name in layers if not _beyond(name, num_used) and ".head." not in f".{name}."]
    return layers


def layers_of_tokens(part_of_layer: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the layers whose rows are tokens: the language model's, but for what it reads of images."""
    return tuple(
        name
        for name, part in part_of_layer.items()
        if part == "language" and not (_CROSS_ATTENTION.search(name) and name.rpartition(".")[2] in _KEYS_AND_VALUES)
    )


def _part(name: str) -> str | None:
    """The part of a model that a layer of this name is in; None for one beside them, such as the output layer."""
    part: str | None = None
    for segment in name.split(".")[:-1]:
        if segment in _LANGUAGE_NAMES:
            return "language"
        if segment in _PROJECTOR_NAMES:
            return "projector"
        if segment in _VISION_NAMES:
            part = "vision"
    last = name.rpartition(".")[2]  # a projector may be one linear layer itself
    return "projector" if last in _PROJECTOR_NAMES else part


def is_attention(name: str) -> bool:
    """Whether a layer of this name is one of attention's projections."""
    *parents, last = name.split(".")
    if last in _ATTENTION_OUTPUTS:
        return any(_ATTENTION.search(parent) for parent in parents[-2:])
    return last in _ATTENTION_INPUTS


def conv1d_attention(model: nn.Module) -> str | None:
    """Name of the first projection of attention that is a Conv1D, which is no linear layer."""
    names = (name for name, module in model.named_modules() if type(module).__name__ == "Conv1D")
    return next(filter(is_attention, names), None)


def _num_used_vision_layers(config: Any) -> int | None:
    """How many layers of the vision tower lie before the features that the model takes; None where it says nothing."""
    chosen = getattr(config, "vision_feature_layer", None)
    total = getattr(getattr(config, "vision_config", None), "num_hidden_layers", None)
    if chosen is None or total is None:
        return None
    layers = chosen if isinstance(chosen, (list, tuple)) else [chosen]
    # hidden state 0 is what goes into the first layer
    return max(int(layer) if layer >= 0 else int(total) + 1 + int(layer) for layer in layers)


def _beyond(name: str, num_layers: int | None) -> bool:
    """Whether the layer belongs to a block beyond the first `num_layers`."""
    match = re.search(r"(?:^|\.)layers?\.(\d+)\.", name)
    return num_layers is not None and match is not None and int(match[1]) >= num_layers
