"""Where adapters are, and on what: PEFT's layers in a module, their configuration, and the layers to be adapted."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from lorainit_diffusers.adapters.weights import ExistingAdapter
from lorainit_diffusers.lora_config import check_config
from lorainit_diffusers.quantized import is_packed, undo_cpu_packing
from lorainit_diffusers.trained import plain_name

# The weight of bitsandbytes' 4-bit layers, by name: the package is optional.
PACKED_PARAMETER = "Params4bit"


def unwrap(module: nn.Module) -> nn.Module:
    """The model that a `PeftModel` wraps, or the module itself; layer names are relative to it."""
    return cast("nn.Module", module.base_model.model) if isinstance(module, PeftModel) else module


def lora_layers(module: nn.Module, adapter_name: str = "default") -> dict[str, LoraLayer]:
    """PEFT layers that carry this adapter, by name."""
    return {
        name: layer
        for name, layer in unwrap(module).named_modules()
        if isinstance(layer, LoraLayer) and adapter_name in layer.lora_A
    }


def existing_adapter(module: nn.Module, adapter_name: str = "default") -> ExistingAdapter | None:
    """How the module is already adapted under this name, or `None`."""
    layers = lora_layers(module, adapter_name)
    if not layers:
        return None
    return ExistingAdapter(
        ranks={name: int(layer.r[adapter_name]) for name, layer in layers.items()},
        scalings={name: float(layer.scaling[adapter_name]) for name, layer in layers.items()},
        use_rslora=_use_rslora(module, adapter_name),
        use_dora=any(bool(layer.use_dora.get(adapter_name, False)) for layer in layers.values()),
    )


def default_config() -> dict[str, Any]:
    """PEFT's `LoraConfig` without any option."""
    return LoraConfig().to_dict()


def config_of(module: nn.Module, adapter_name: str = "default") -> LoraConfig | None:
    """PEFT's configuration of an adapter, where the module has one."""
    configs = cast("Mapping[str, LoraConfig]", getattr(module, "peft_config", None) or {})
    return configs.get(adapter_name)


def check_plain(module: nn.Module, adapter_name: str = "default") -> None:
    """See that an adapter is what this library computes with: a LoRA, or DoRA, of linear layers on the original base.

    Raises:
        ValueError: Naming the layer, or the field of its configuration and the value.
    """
    kind, adapter = type(unwrap(module)).__name__, f"adapter {adapter_name!r} of"
    remedy = "add it with a plain LoraConfig"
    for name, layer in unwrap(module).named_modules():
        if not isinstance(layer, BaseTunerLayer) or adapter_name not in _adapter_names(layer):
            continue
        if not isinstance(layer, LoraLayer):
            if type(layer).__name__ == "TrainableTokensLayer":  # rows of an embedding, see trained.py
                continue
            raise ValueError(f"{adapter} {kind} is no LoRA: layer {name!r} is PEFT's {type(layer).__name__}; {remedy}")
        plain = (
            adapter_name in layer.lora_A
            and isinstance(layer.lora_A[adapter_name], nn.Linear)
            and isinstance(layer.get_base_layer(), nn.Linear)
            and type(layer).__name__ != "ParamWrapper"
        )
        if not plain:
            raise ValueError(
                f"{adapter} {kind} adapts {name!r}, a {type(layer.get_base_layer()).__name__} (by PEFT's "
                f"{type(layer).__name__}); only linear layers are supported: take it out of target_modules and "
                "target_parameters"
            )
        variant = layer.lora_variant.get(adapter_name)
        if variant is not None and not type(variant).__name__.startswith("Dora"):
            raise ValueError(f"{adapter} {kind} is a variant of LoRA ({type(variant).__name__}); {remedy}")
    config = config_of(module, adapter_name)
    if config is not None:
        fields = {key: value for key, value in vars(config).items() if key != "as_saved"}
        check_config(fields, vars(LoraConfig()), f"the configuration of {adapter} {kind}", remedy)


def _adapter_names(layer: BaseTunerLayer) -> set[str]:
    held = (getattr(layer, name, None) for name in layer.adapter_layer_names)
    return {name for holder in held if holder is not None for name in holder}  # type: ignore[union-attr]


def _use_rslora(module: nn.Module, adapter_name: str) -> bool:
    # The layers know it too, but only in recent PEFT releases.
    config = config_of(module, adapter_name)
    return config is not None and bool(config.use_rslora)


def check_beside(modules: Mapping[str, nn.Module], adapter_name: str = "default") -> None:
    """See that no other part of a family carries this adapter, or trains one: nothing would initialise or save it.

    Args:
        modules: A family's `adapted`, whose `beside` names its other parts; nothing is known of a plain mapping.
        adapter_name: PEFT's name of the adapter.

    Raises:
        ValueError: Naming the component.
    """
    beside: Mapping[str, nn.Module] = getattr(modules, "beside", {})
    for component, module in beside.items():
        for name, layer in unwrap(module).named_modules():
            if not isinstance(layer, BaseTunerLayer):
                continue
            held = adapter_name in _adapter_names(layer)
            if held or any(p.requires_grad for p in cast("nn.Module", layer).parameters()):
                raise ValueError(
                    f"{component} carries an adapter (on {name!r}), but the family adapts {', '.join(modules)} only: "
                    "make the family with train_text_encoder=True, or pass every adapted module by name, as "
                    f"{{{', '.join(f'{key!r}: {key}' for key in (*modules, component))}}}"
                )


def base_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer by name, those with adapters by the layer that they adapt."""
    return {
        name: cast("nn.Linear", layer.get_base_layer()) if isinstance(layer, LoraLayer) else layer
        for name, layer in unwrap(module).named_modules()
        if isinstance(layer, (nn.Linear, LoraLayer)) and not re.search(r"\.(base_layer|lora_[AB])", name)
    }


def state_of_base(module: nn.Module) -> dict[str, Tensor]:
    """The state dict that the module had before it got adapters, with its tensors as they are."""
    inner = unwrap(module)
    adapted = {name for name, layer in inner.named_modules() if isinstance(layer, LoraLayer)}
    state = {key: value for key, value in inner.state_dict().items() if key.rpartition(".lora_")[0] not in adapted}
    return {name: value for key, value in state.items() if (name := plain_name(key)) is not None}


def target_layers(
    module: nn.Module, target_modules: Sequence[str] | str | None, adapter_name: str = "default"
) -> dict[str, nn.Linear]:
    """Base linear layer of every target, by name.

    Args:
        module: Raw or adapted.
        target_modules: Names or name endings, or one regular expression for the full name, as in `LoraConfig`. Left
            out for an adapted module, whose targets are the layers it already adapts.
        adapter_name: Of the adapter that the module may carry.

    Raises:
        ValueError: Nothing matches, or something matches that is no linear layer, or a quantised one of another kind
            than bitsandbytes' 4 bits (names it).
    """
    adapted = lora_layers(module, adapter_name)
    if adapted:
        candidates = {name: layer.get_base_layer() for name, layer in adapted.items()}
        for name, layer in unwrap(module).named_modules():
            linear = isinstance(layer, (nn.Linear, LoraLayer)) and not re.search(r"\.(base_layer|lora_[AB])", name)
            if target_modules is not None and linear and _matches(name, target_modules) != (name in adapted):
                raise ValueError(
                    f"{type(module).__name__} already carries an adapter {adapter_name!r}, and target_modules "
                    f"{target_modules!r} disagree with it about layer {name!r}; leave target_modules out, or choose "
                    "the layers when the adapter is added"
                )
    else:
        if target_modules is None:
            raise ValueError(
                f"{type(module).__name__} carries no adapter {adapter_name!r} and no target_modules were given; "
                'pass target_modules, for example ["to_q", "to_k", "to_v", "to_out.0"]'
            )
        candidates = {
            name: layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
            for name, layer in unwrap(module).named_modules()
            if _matches(name, target_modules) and ".base_layer" not in name
        }
    for name, layer in candidates.items():
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"layer {name!r} is a {type(layer).__name__}; only linear layers are supported: "
                "make the target module names more specific"
            )
        if is_packed(layer) and type(layer.weight).__name__ != PACKED_PARAMETER:
            raise ValueError(
                f"layer {name!r} is a {type(layer).__name__}, whose packed weight cannot be read: load the base "
                "unquantised, or in bitsandbytes' 4 bits"
            )
    if not candidates:
        linear = sorted({n.rsplit(".", 1)[-1] for n, m in unwrap(module).named_modules() if isinstance(m, nn.Linear)})
        raise ValueError(
            f"target_modules {target_modules!r} match no layer of {type(module).__name__}; "
            f"its linear layers end in {', '.join(linear[:12])}"
        )
    return {name: layer for name, layer in candidates.items() if isinstance(layer, nn.Linear)}


def _matches(name: str, target_modules: Sequence[str] | str) -> bool:
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in target_modules)


def base_weight(layer: nn.Linear) -> Tensor:
    """(out_features, in_features) float32 weight of a base layer, not to be written; dequantised where it is packed."""
    undo_cpu_packing(layer)
    return cast("Tensor", dequantize_module_weight(layer)).detach().float()


@contextmanager
def adapters_disabled(modules: Mapping[str, nn.Module]) -> Generator[None, None, None]:
    """Run the base models: every adapter is bypassed inside the block, and trainability is as before after it."""
    layers = [m for module in modules.values() for m in module.modules() if isinstance(m, LoraLayer)]
    trainable = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    enabled = [layer for layer in layers if not layer.disable_adapters]
    for layer in enabled:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in enabled:
            layer.enable_adapters(True)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)


def magnitude_of(layer: LoraLayer, adapter_name: str) -> Tensor:
    """(out_features,) DoRA's row norms, not copied."""
    magnitude = layer.lora_magnitude_vector[adapter_name].weight
    assert isinstance(magnitude, Tensor)
    return magnitude.detach()


def bias_of(layer: LoraLayer, adapter_name: str) -> nn.Parameter | None:
    """The bias of B (PEFT's `lora_bias`), if any."""
    return cast("nn.Parameter | None", layer.lora_B[adapter_name].bias)
