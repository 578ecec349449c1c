"""The layers of an image classifier: which get an adapter, which make the logits, and what their outputs are called."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

# What the projections of attention are called, split and fused; those of its output share their names with others.
_ATTENTION_INPUTS = frozenset({"q_proj", "k_proj", "v_proj", "query", "key", "value", "qkv", "qkv_proj", "in_proj"})
_ATTENTION_OUTPUTS = frozenset({"o_proj", "out_proj", "dense", "proj"})
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
# The layers that mix channels in convolutional networks of the ConvNeXt kind.
_POINTWISE = frozenset({"pwconv1", "pwconv2"})
# Where models keep the layers that make the logits: `classifier`, `classifier.1`, `cls_classifier`, `head`, `fc`.
_HEAD = re.compile(r"\w*classifier\w*|\w*head|fc")


def projections(model: nn.Module) -> list[str]:
    """Names of the layers that get an adapter when nothing is said: attention's linear layers, or pointwise ones.

    Layers inside `nn.MultiheadAttention` are none of them: it never calls them as modules.

    Raises:
        ValueError: When there are none (lists the linear layers).
    """
    fused = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention))
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not (fused and name.startswith(fused))
    ]
    attention: list[str] = []
    for name in linear:
        parent, _, own = name.rpartition(".")
        if _ATTENTION.search(parent) and own in _ATTENTION_INPUTS | _ATTENTION_OUTPUTS:
            attention.append(name)
    found = attention or [name for name in linear if name.rpartition(".")[2] in _POINTWISE]
    if not found:
        endings = sorted({name.rpartition(".")[2] for name in linear if name not in head_layers(model)})
        raise ValueError(
            f"{type(model).__name__} has no attention and no pointwise layers; name the layers in target_modules: its "
            f"linear layers end in {', '.join(endings[:12]) or 'nothing, and only these can have a LoRA'}"
        )
    return found


def head_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers that make the logits: one, or as many as distilled models have.

    Raises:
        ValueError: When there is none.
    """
    num_labels = len(labels_of(cast(Any, model).config))
    named = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == num_labels
        and any(_HEAD.fullmatch(part) for part in name.split("."))
        and not _ATTENTION.search(name)
    ]
    # Pooling layers may be called a head, too; the output layer is the outermost.
    top = min((name.count(".") for name in named), default=0)
    heads = [name for name in named if name.count(".") == top]
    if not heads:
        raise ValueError(
            f"{type(model).__name__} has no linear output layer for its {num_labels} labels under a name such as "
            "classifier or head; give a base that ends in one"
        )
    return heads


def match_labels(class_names: Sequence[str], labels: Mapping[str, int]) -> list[int | None]:
    """The output of every class, by its name: the same text, or the same but for case, spaces, hyphens, underscores."""

    def loose(text: str) -> str:
        return re.sub(r"[\s_-]+", " ", text).strip().casefold()

    by_loose: dict[str, list[int]] = {}
    for label, output in labels.items():
        by_loose.setdefault(loose(label), []).append(output)
    matched: list[int | None] = []
    for name in class_names:
        similar = by_loose.get(loose(name), [])
        matched.append(labels[name] if name in labels else similar[0] if len(similar) == 1 else None)
    return matched


def labels_of(config: Any) -> dict[str, int]:
    """Label -> output, in the order of the outputs."""
    pairs = sorted((int(output), str(label)) for output, label in cast("dict[Any, Any]", config.id2label).items())
    labels: dict[str, int] = {}
    for output, label in pairs:
        # a label that two outputs share (ImageNet's "crane") would hide one of them
        labels[label if label not in labels else f"{label} ({output})"] = output
    return labels


def some_of(names: Sequence[str], limit: int = 5) -> str:
    """The first few names, and how many there are beside them."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
