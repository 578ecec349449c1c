"""What PEFT trains beside the factors of an adapter: whole modules, biases, rows of an embedding.

PEFT's `modules_to_save` trains a copy of a module, `bias` trains biases of the base in place, and
`trainable_token_indices` trains rows of an embedding. Here they are found on the live model, under the names that
they have in a PEFT folder and in the plain base.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn


class TrainedTensor(NamedTuple):
    """One tensor that is trained beside the factors.

    Attributes:
        field: Of `LoraConfig` that asks for it (`modules_to_save`, `bias` or `trainable_token_indices`).
        peft_name: In a PEFT folder, without its prefix.
        base_name: In the plain base model's state dict; of the whole embedding for rows of it.
        value: The live tensor.
    """

    field: str
    peft_name: str
    base_name: str
    value: Tensor


def _is_a(module: nn.Module, name: str) -> bool:
    # by name: only adapters.py imports peft
    return any(kind.__name__ == name for kind in type(module).__mro__)


def trained_beside(
    model: nn.Module, adapter_name: str, bias: str, adapted_layers: Collection[str]
) -> list[TrainedTensor]:
    """Everything that an adapter trains beside its factors.

    Args:
        model: Without PEFT's wrapper.
        adapter_name: PEFT's name of the adapter.
        bias: Of its configuration: `"none"`, `"all"` or `"lora_only"`.
        adapted_layers: Names of the layers that carry the adapter.
    """
    found: list[TrainedTensor] = []
    wrappers: list[str] = []
    for name, module in model.named_modules():
        if _is_a(module, "ModulesToSaveWrapper"):
            wrappers.append(f"{name}.")
            copies: Any = module.modules_to_save
            if adapter_name in copies:
                state: dict[str, Tensor] = copies[adapter_name].state_dict(keep_vars=True)
                names = {key: f"{name}.{key}" for key in state}
                found += [TrainedTensor("modules_to_save", names[key], names[key], state[key]) for key in state]
        elif _is_a(module, "TrainableTokensWrapper"):
            rows: Any = module.token_adapter
            if adapter_name in rows.trainable_tokens_delta and not rows.tied_adapter:
                delta = f"{name}.token_adapter.trainable_tokens_delta"
                value = rows.trainable_tokens_delta[adapter_name]
                found.append(TrainedTensor("trainable_token_indices", delta, f"{name}.weight", value))
    if bias != "none":
        layers = {f"{name}.base_layer.bias" for name in adapted_layers}
        for name, parameter in model.named_parameters():
            is_bias = name == "bias" or name.endswith(".bias")
            of_base = ".lora_" not in name and not name.startswith(tuple(wrappers))
            if is_bias and of_base and (bias == "all" or name in layers):
                found.append(TrainedTensor("bias", name, name.replace(".base_layer.", "."), parameter))
    return found


def merged_rows(model: nn.Module, base_name: str, adapter_name: str) -> Tensor:
    """The whole embedding whose rows an adapter trains, with these rows in it."""
    wrapper: Any = model.get_submodule(base_name.removesuffix(".weight"))
    return wrapper.token_adapter.get_merged_weights([adapter_name])


def plain_name(name: str) -> str | None:
    """The name that a tensor had before PEFT wrapped its module, or `None` for what PEFT has added."""
    if re.search(r"\.modules_to_save\.|\.trainable_tokens_(delta|original)\.", name):
        return None
    return re.sub(r"\.(token_adapter\.base_layer|original_module|base_layer)\.", ".", name)


def trained_unknown(model: nn.Module, known: Collection[int]) -> Iterator[str]:
    """Names of trainable parameters that belong to no adapter and are not among these (`id` of the tensors)."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_" not in name and id(parameter) not in known:
            yield name
