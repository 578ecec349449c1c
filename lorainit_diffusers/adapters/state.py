"""What adapters hold: their weights, all that is trained with them, and the tensors that a resumed run needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lorainit_diffusers.adapters.attaching import attach
from lorainit_diffusers.adapters.layers import (
    bias_of,
    check_plain,
    config_of,
    existing_adapter,
    lora_layers,
    magnitude_of,
    unwrap,
)
from lorainit_diffusers.adapters.weights import AdapterWeights
from lorainit_diffusers.methods.base import LoraFactors
from lorainit_diffusers.offset import get_offset
from lorainit_diffusers.trained import TrainedTensor, plain_name, trained_beside, trained_unknown

# The end of the key of a tensor that is trained beside the factors, in a checkpoint.
TRAINED_SUFFIX = "trained"


def adapter_weights(module: nn.Module, adapter_name: str = "default") -> dict[str, AdapterWeights]:
    """Current weights by layer name (not copied), with the initial factors as `offset`.

    Raises:
        ValueError: The module carries no such adapter, or one of another kind than LoRA of linear layers.
    """
    layers = lora_layers(module, adapter_name)
    check_plain(module, adapter_name)
    if not layers:
        raise ValueError(f"{type(module).__name__} carries no adapter {adapter_name!r}; run initialize() first")
    return {
        name: AdapterWeights(
            factors=_factors(layer, adapter_name),
            scaling=float(layer.scaling[adapter_name]),
            offset=get_offset(layer, adapter_name),
            magnitude=magnitude_of(layer, adapter_name) if adapter_name in layer.lora_magnitude_vector else None,
            bias=None if (bias := bias_of(layer, adapter_name)) is None else bias.detach(),
        )
        for name, layer in layers.items()
    }


def _factors(layer: LoraLayer, adapter_name: str) -> LoraFactors:
    lora_A, lora_B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    assert isinstance(lora_A, Tensor)
    assert isinstance(lora_B, Tensor)
    return LoraFactors(lora_A.detach(), lora_B.detach())


def trained_tensors(module: nn.Module, adapter_name: str = "default") -> list[TrainedTensor]:
    """What PEFT trains beside an adapter's factors: `modules_to_save`, biases of the base, rows of an embedding."""
    config = config_of(module, adapter_name)
    bias = str(getattr(config, "bias", "none"))  # not every method of PEFT's has it
    return trained_beside(unwrap(module), adapter_name, bias, lora_layers(module, adapter_name))


def trainable_beside(module: nn.Module, adapter_name: str, full_modules: Sequence[str] = ()) -> list[str]:
    """Names of trainable parameters that neither an adapter nor these modules hold: no LoRA file keeps them."""
    inner = unwrap(module)
    known = {id(item.value) for item in trained_tensors(module, adapter_name)}
    modules = dict(inner.named_modules())
    known |= {id(p) for name in full_modules if name in modules for p in modules[name].parameters()}
    return list(trained_unknown(inner, known))


def trainable_parameters(module: nn.Module, adapter_name: str = "default") -> list[nn.Parameter]:
    """All that an adapter trains; never the initial factors of an offset.

    A, B (with its bias) and DoRA's magnitude of every adapted layer, in the module's order, then what PEFT trains
    beside them: `modules_to_save`, biases of the base, rows of an embedding.
    """
    factors = [
        parameter
        for layer in lora_layers(module, adapter_name).values()
        for holder in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
        if adapter_name in holder
        for parameter in holder[adapter_name].parameters()
    ]
    beside = [item.value for item in trained_tensors(module, adapter_name)]
    return factors + [value for value in beside if isinstance(value, nn.Parameter) and value.requires_grad]


def adapter_state_dict(modules: Mapping[str, nn.Module], adapter_name: str = "default") -> dict[str, Tensor]:
    """Everything that a resumed run needs, offsets included: initial factors are stored, never recomputed.

    Keys are `{component}.{layer}.{lora_A|lora_B|scaling|offset_A|offset_B|magnitude|bias}`, and
    `{component}.{name}.trained` for what PEFT trains beside the factors; tensors are on the CPU.
    """
    state: dict[str, Tensor] = {}
    for component, module in modules.items():
        for name, weights in adapter_weights(module, adapter_name).items():
            entries = {
                "lora_A": weights.factors.lora_A,
                "lora_B": weights.factors.lora_B,
                "scaling": torch.tensor(weights.scaling, dtype=torch.float64),
            }
            if weights.offset is not None:
                entries |= {"offset_A": weights.offset.lora_A, "offset_B": weights.offset.lora_B}
            if weights.magnitude is not None:
                entries["magnitude"] = weights.magnitude
            if weights.bias is not None:
                entries["bias"] = weights.bias
            state |= {f"{component}.{name}.{key}": t.cpu().clone().contiguous() for key, t in entries.items()}
        for item in trained_tensors(module, adapter_name):
            key = f"{component}.{item.base_name}.{TRAINED_SUFFIX}"
            state[key] = item.value.detach().cpu().clone().contiguous()
    return state


def load_adapter_state_dict(
    modules: Mapping[str, nn.Module],
    state: Mapping[str, Tensor],
    adapter_name: str = "default",
    *,
    use_rslora: bool = False,
    lora_dropout: float = 0.0,
) -> None:
    """Inverse of `adapter_state_dict`, on modules that carry the adapter or that do not yet.

    A new adapter is a DoRA one when the state holds magnitudes.

    Raises:
        ValueError: The state holds nothing for one of the modules, or layers that a module does not have; or only one
            of the state and an existing adapter uses DoRA.
    """
    for component, module in modules.items():
        entries: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            if key.startswith(f"{component}."):
                layer, _, entry = key.removeprefix(f"{component}.").rpartition(".")
                entries.setdefault(layer, {})[entry] = value
        beside = {name: entries.pop(name)[TRAINED_SUFFIX] for name in list(entries) if TRAINED_SUFFIX in entries[name]}
        unknown = sorted(entries.keys() - dict(unwrap(module).named_modules()).keys())
        if not entries or unknown:
            what = f"layer {unknown[0]!r}, which it does not have" if unknown else "no layer at all"
            raise ValueError(f"the saved adapter holds, for component {component!r}, {what}; use the same base model")
        existing = existing_adapter(module, adapter_name)
        use_dora = any("magnitude" in entry for entry in entries.values()) or (
            existing is not None and existing.use_dora
        )
        for layer, entry in entries.items():
            if use_dora and "magnitude" not in entry:
                raise ValueError(
                    f"the saved adapter holds no DoRA magnitude for layer '{component}.{layer}'; "
                    "load it into a module without an adapter, or into one whose adapter does not use DoRA"
                )
        weights = {
            layer: AdapterWeights(
                factors=LoraFactors(entry["lora_A"], entry["lora_B"]),
                scaling=float(entry["scaling"]),
                offset=LoraFactors(entry["offset_A"], entry["offset_B"]) if "offset_A" in entry else None,
                magnitude=entry.get("magnitude"),
                bias=entry.get("bias"),
            )
            for layer, entry in entries.items()
        }
        attach(
            module,
            weights,
            adapter_name=adapter_name,
            use_rslora=use_rslora,
            lora_dropout=lora_dropout,
            use_dora=use_dora,
        )
        _load_beside(module, beside, component, adapter_name)


def _load_beside(module: nn.Module, values: Mapping[str, Tensor], component: str, adapter_name: str) -> None:
    """Put what was trained beside the factors where it is trained now, or else into the base."""
    state = unwrap(module).state_dict(keep_vars=True)
    places = {name: value for key, value in state.items() if (name := plain_name(key)) is not None}
    places |= {item.base_name: item.value for item in trained_tensors(module, adapter_name)}
    for name, value in values.items():
        if name not in places or places[name].shape != value.shape:
            found = "which it does not have" if name not in places else f"of shape {tuple(value.shape)}"
            raise ValueError(
                f"the saved adapter holds, for component {component!r}, {name!r}, trained beside the factors, {found}; "
                "use the same base model and the same LoraConfig"
            )
        with torch.no_grad():
            places[name].copy_(value)
