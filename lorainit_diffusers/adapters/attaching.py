"""Weights into PEFT's adapters: a new one, or one that a module carries already."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from statistics import mode
from typing import Any, ClassVar, cast

import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lorainit_diffusers.adapters.layers import (
    base_weight,
    bias_of,
    check_plain,
    config_of,
    existing_adapter,
    lora_layers,
    magnitude_of,
    unwrap,
)
from lorainit_diffusers.adapters.weights import AdapterWeights
from lorainit_diffusers.offset import get_offset, set_offset


class _ConfigWithOffset(LoraConfig):
    """The configuration of an adapter with an offset, which describes the tensors that PEFT and diffusers save."""

    as_saved: ClassVar[Mapping[str, Any]] = {}  # set on the instance, and no field, which PEFT would write

    def to_dict(self) -> dict[str, Any]:
        """What PEFT writes: ranks and alphas with those of the initial factors, whose sum is one plain LoRA."""
        return {**super().to_dict(), **self.as_saved}


def attach(
    module: nn.Module,
    weights: Mapping[str, AdapterWeights],
    *,
    adapter_name: str = "default",
    use_rslora: bool = False,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
) -> None:
    """Give every named layer exactly these weights, under an active, trainable float32 adapter.

    A module without this adapter gets one on these layers, and all its other parameters are frozen. In one that has
    it, parameters keep their identity whatever their new rank and dtype are (an optimiser made before still holds
    them), and layers that are not named lose it. Other adapters stay as active and as trainable as they are, but where
    PEFT adds this one: it then is the only active one.

    Args:
        module: Raw, `add_adapter`-ed, or a `PeftModel`.
        weights: Layer name (relative to `unwrap`) -> weights.
        adapter_name: PEFT's name of the adapter.
        use_rslora: Recorded in the configuration of a new adapter; the weights' own scaling counts.
        lora_dropout: Of a new adapter.
        use_dora: Make a new adapter a DoRA one. Magnitudes that the weights leave out start as the base weight's row
            norms, in an adapter that exists already, too.

    Raises:
        ValueError: No weights at all; an offset for a DoRA adapter, or magnitudes for one that is none, or biases for
            one that has none; an adapter of another kind than LoRA of linear layers.
    """
    if not weights:
        raise ValueError("no layer keeps an adapter: every rank is 0; raise the rank budget or min_rank")
    check_plain(module, adapter_name)
    existing = existing_adapter(module, adapter_name)
    if existing is not None:
        use_rslora, use_dora = existing.use_rslora, existing.use_dora
    has_bias = any(w.bias is not None for w in weights.values())
    _check_kinds(weights, adapter_name, use_dora, lora_layers(module, adapter_name))
    if existing is None:
        rank = mode(w.factors.lora_A.shape[0] for w in weights.values())
        alpha = next(iter(weights.values())).scaling * (rank**0.5 if use_rslora else rank)
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]
            target_modules=exactly(weights),
            use_rslora=use_rslora,
            lora_dropout=lora_dropout,
            use_dora=use_dora,
            lora_bias=has_bias,
        )
        _inject(module, config, adapter_name)
    for name, layer in lora_layers(module, adapter_name).items():
        if name in weights:
            _set_factors(layer, adapter_name, weights[name], use_rslora)
            set_offset(layer, adapter_name, weights[name].offset)
            if use_dora:
                _set_magnitude(layer, adapter_name, weights[name].magnitude)
        else:
            _remove(unwrap(module), name, layer, adapter_name)
    _activate(module, adapter_name, alone=existing is None)
    _record_patterns(module, adapter_name)


def _check_kinds(
    weights: Mapping[str, AdapterWeights], adapter_name: str, use_dora: bool, layers: Mapping[str, LoraLayer]
) -> None:
    """See that the adapter has a place for all that the weights hold."""
    for name, w in weights.items():
        if use_dora and w.offset is not None:
            raise ValueError(
                f"layer {name!r} starts from B A != 0 with an offset, which DoRA's magnitudes do not allow; "
                "use an init whose product starts at zero, such as eva or orthonormal, or drop use_dora"
            )
        if not use_dora and w.magnitude is not None:
            raise ValueError(
                f"the weights of layer {name!r} hold a DoRA magnitude, but adapter {adapter_name!r} does not use DoRA; "
                "add it with use_dora=True"
            )
        if w.bias is not None and name in layers and bias_of(layers[name], adapter_name) is None:
            raise ValueError(
                f"the weights of layer {name!r} hold a bias, but adapter {adapter_name!r} has none; "
                "add it with lora_bias=True"
            )


def _activate(module: nn.Module, adapter_name: str, *, alone: bool) -> None:
    """Switch the adapter on, alone or beside those that are active; the trainability of those is theirs."""
    layers = [layer for layer in unwrap(module).modules() if isinstance(layer, LoraLayer)]
    others = [
        (parameter, parameter.requires_grad and not alone)
        for layer in layers
        for name, parameter in cast("nn.Module", layer).named_parameters()
        if f".{adapter_name}." not in f".{name}."
    ]
    if isinstance(module, PeftModel) and adapter_name not in module.active_adapters:
        module.set_adapter(adapter_name)
    for layer in layers:
        if adapter_name in layer.lora_A and adapter_name not in layer.active_adapters:
            layer.set_adapter([name for name in layer.active_adapters if name in layer.lora_A] + [adapter_name])
    for parameter, requires_grad in others:
        parameter.requires_grad_(requires_grad)
    for layer in layers:
        for holder in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
            if adapter_name in holder:
                holder[adapter_name].requires_grad_(True)


def exactly(names: Iterable[str]) -> str:
    """A regular expression for these full names: PEFT would take plain names as endings, too."""
    return f"^({'|'.join(re.escape(name) for name in names)})$"


def _inject(module: nn.Module, config: LoraConfig, adapter_name: str) -> None:
    # PEFT draws random factors, which are replaced at once: the caller's random state must not move.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # PEFT warns where the module has another adapter; that is the caller's purpose.
        warnings.filterwarnings("ignore", message=".*peft_config.*")
        if isinstance(module, PeftModel):
            module.add_adapter(adapter_name, config)
        else:
            inject_adapter_in_model(config, module, adapter_name)  # type: ignore[arg-type]
            if hasattr(module, "_hf_peft_config_loaded"):  # diffusers' and transformers' sign that adapters exist
                module._hf_peft_config_loaded = True  # type: ignore[assignment]


def _device(layer: LoraLayer) -> torch.device:
    return next(layer.get_base_layer().parameters()).device


def _set_factors(layer: LoraLayer, adapter_name: str, weights: AdapterWeights, use_rslora: bool) -> None:
    lora_A, lora_B = weights.factors
    device = _device(layer)
    rank = lora_A.shape[0]
    for holder, value in ((layer.lora_A, lora_A), (layer.lora_B, lora_B)):
        linear = holder[adapter_name]
        assert isinstance(linear, nn.Linear)
        value = value.detach().to(device=device, dtype=torch.float32)
        if linear.weight.shape == value.shape and linear.weight.dtype == torch.float32:
            linear.weight.data.copy_(value)
        else:
            # the object stays, whatever its rank and dtype were: an optimiser made before holds it
            linear.weight.data = value.clone(memory_format=torch.contiguous_format)
            linear.weight.grad = None
        linear.out_features, linear.in_features = value.shape
    bias = bias_of(layer, adapter_name)
    if bias is not None:
        bias.data = (
            torch.zeros_like(bias, dtype=torch.float32)
            if weights.bias is None
            else weights.bias.detach().to(device=device, dtype=torch.float32).clone()
        )
    layer.r[adapter_name] = rank
    layer.scaling[adapter_name] = weights.scaling
    layer.lora_alpha[adapter_name] = weights.scaling * (rank**0.5 if use_rslora else rank)


def _set_magnitude(layer: LoraLayer, adapter_name: str, value: Tensor | None) -> None:
    """DoRA's magnitude becomes this, or the row norms of the base weight (never of W + B A, whatever was there)."""
    if value is None:
        # What PEFT divides by when B A = 0, bit for bit, on the same device: step 0 is exactly the base model.
        initial: Tensor = torch.linalg.norm(base_weight(cast("nn.Linear", layer.get_base_layer())), dim=1)
    else:
        initial = value.detach().to(device=_device(layer), dtype=torch.float32)
    holder = layer.lora_magnitude_vector[adapter_name]
    if magnitude_of(layer, adapter_name).dtype == torch.float32:
        magnitude_of(layer, adapter_name).copy_(initial)
    else:
        holder.weight.data = initial.clone()
    holder.requires_grad_(True)


def _remove(root: nn.Module, name: str, layer: LoraLayer, adapter_name: str) -> None:
    """Take the adapter off one layer; the layer itself goes when it carried nothing else."""
    layer.delete_adapter(adapter_name)
    if len(layer.lora_A) == 0:
        parent, _, child = name.rpartition(".")
        setattr(root.get_submodule(parent), child, layer.get_base_layer())


def _record_patterns(module: nn.Module, adapter_name: str) -> None:
    """Write the ranks and alphas into PEFT's configuration, so that PEFT's own saving reloads the same shapes."""
    config, layers = config_of(module, adapter_name), lora_layers(module, adapter_name)
    if config is None or not layers:
        return
    ranks = {name: int(layer.r[adapter_name]) for name, layer in layers.items()}
    alphas = {name: float(layer.lora_alpha[adapter_name]) for name, layer in layers.items()}
    for key, value in _patterns(ranks, alphas).items():
        setattr(config, key, value)
    config.target_modules = exactly(layers)
    offsets = {name: get_offset(layer, adapter_name) for name, layer in layers.items()}
    config.__class__ = LoraConfig
    vars(config).pop("as_saved", None)
    if any(offsets.values()):
        extra = {name: 0 if offset is None else offset.lora_A.shape[0] for name, offset in offsets.items()}
        whole = {name: rank + extra[name] for name, rank in ranks.items()}
        power = 0.5 if config.use_rslora else 1.0
        saved = _patterns(whole, {name: alphas[name] * (whole[name] / ranks[name]) ** power for name in whole})
        if not saved["alpha_pattern"]:
            # PEFT refuses to exchange the factors of an adapter in place (hotswap) where this differs: the offset of
            # the old ones would stay.
            saved["alpha_pattern"] = {f"^{re.escape(next(iter(layers)))}": saved["lora_alpha"]}
        config.__class__ = _ConfigWithOffset
        vars(config)["as_saved"] = saved


def _patterns(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """The fields of `LoraConfig` that give every layer its rank and alpha."""
    rank, alpha = mode(ranks.values()), mode(alphas.values())
    # Anchored: unanchored keys also match layers whose name merely ends alike.
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(name)}": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{re.escape(name)}": value for name, value in alphas.items() if value != alpha},
    }
