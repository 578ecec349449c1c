"""Which models of a script carry adapters, and what diffusers' files call them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lorainit_diffusers import adapters


def unwrapped(model: nn.Module) -> nn.Module:
    """A model without the wrappers of data parallelism and `torch.compile`; PEFT's stays."""
    inner: Any = model
    while True:
        if type(inner).__name__ in {"DistributedDataParallel", "DataParallel"}:
            inner = inner.module
        elif type(inner).__name__ == "OptimizedModule":
            inner = inner._orig_mod
        else:
            return inner


def is_adapted(model: Any, adapter_name: str = "default") -> bool:
    """Whether an object is a model that carries this adapter."""
    return isinstance(model, nn.Module) and bool(adapters.lora_layers(unwrapped(model), adapter_name))


def component_names(models: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """Models by the names that a pipeline has for them: `unet`, `transformer`, `text_encoder` ...

    Models of one name are numbered in their order, as pipelines do it: `text_encoder`, `text_encoder_2`.
    """
    named: dict[str, nn.Module] = {}
    for model in models:
        name = first = _component_name(adapters.unwrap(model))
        number = 1
        while name in named:
            number += 1
            name = f"{first}_{number}"
        named[name] = model
    return named


def _component_name(model: nn.Module) -> str:
    kind = type(model).__name__
    if type(model).__module__.startswith("transformers.") or hasattr(model, "get_input_embeddings"):
        return "text_encoder"
    if "ControlNet" in kind:
        return "controlnet"
    for word, name in (("UNet", "unet"), ("Prior", "prior"), ("Transformer", "transformer"), ("DiT", "transformer")):
        if word in kind:
            return name
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", kind).lower()


def are_trained(modules: Mapping[str, nn.Module], adapter_name: str = "default") -> bool:
    """Whether adapters hold more than a start: B is not zero.

    Raises:
        ValueError: A B that PEFT has drawn at random, which nothing can tell from a trained one.
    """
    for component, module in modules.items():
        config = adapters.config_of(module, adapter_name)
        for name, weights in adapters.adapter_weights(module, adapter_name).items():
            if bool(weights.factors.lora_B.any()) or weights.offset is not None:
                if getattr(config, "init_lora_weights", True) is False:
                    raise ValueError(
                        f"{component}.{name} starts from a random B (init_lora_weights=False), which the "
                        "initialisation would replace: leave init_lora_weights out of LoraConfig"
                    )
                return True
    return False


def agree(modules: Mapping[str, nn.Module], adapter_name: str = "default") -> None:
    """Every process goes on with the factors of the first, on which data parallelism relies; they are equal anyway."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return
    for module in modules.values():
        for weights in adapters.adapter_weights(module, adapter_name).values():
            for value in (*weights.factors, *(weights.offset or ())):
                distributed.broadcast(value, src=0)
