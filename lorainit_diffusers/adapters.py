"""PEFT adapters: put factors into a model, keep them exact, read them out. The only file that imports peft.

A module may come raw, after diffusers' or transformers' ``add_adapter``, or wrapped by ``get_peft_model``; the layers
that PEFT injects are the same in all three, and everything here works on those.

**Offset.** An initialisation with B A != 0 that must keep the base model's function has frozen factors in the adapter
itself, which then adds ``scaling * (B A - B0 A0)`` (see :mod:`~lorainit_diffusers.offset`). Base weights are never
written. The frozen factors are buffers, so no ``requires_grad_``, ``set_adapter`` or ``enable_adapters`` can make them
trainable, and no optimiser can find them.

**DoRA** (arXiv:2402.09353, PEFT's ``use_dora``). A layer's weight is ``m (W + scaling * B A) / ||W + scaling * B A||``
with one norm per row and a trainable magnitude m, which starts as the norms of W. Folding the scaling into B leaves
that as it is. With an offset the sum would no longer have this form, so DoRA and the offset exclude each other.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mode
from typing import Any, ClassVar, cast

import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from lorainit_diffusers.lora_config import check_config
from lorainit_diffusers.methods.base import LoraFactors
from lorainit_diffusers.offset import get_offset, set_offset
from lorainit_diffusers.quantized import is_packed, undo_cpu_packing
from lorainit_diffusers.trained import TrainedTensor, plain_name, trained_beside, trained_unknown

# The weight of bitsandbytes' 4-bit layers, by name: the package is optional.
PACKED_PARAMETER = "Params4bit"
# The end of the key of a tensor that is trained beside the factors, in a checkpoint.
TRAINED_SUFFIX = "trained"


@dataclass(frozen=True)
class AdapterWeights:
    """Everything that one adapted layer adds to its base layer.

    Attributes:
        factors: trainable A (rank, in_features) and B (out_features, rank).
        scaling: the layer adds ``scaling * B A``.
        offset: initial factors whose ``scaling * B0 A0`` the adapter subtracts; ``None`` without an offset.
        magnitude: (out_features,) DoRA's trainable row norms; ``None`` without DoRA, and in :func:`attach` for those of
            the base weight.
        bias: (out_features,) trainable bias of B (PEFT's ``lora_bias``), of which the layer adds ``scaling`` times;
            ``None`` without one, and in :func:`attach` for zero.
    """

    factors: LoraFactors
    scaling: float
    offset: LoraFactors | None = None
    magnitude: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class ExistingAdapter:
    """The configuration of an adapter that a module already carries.

    Attributes:
        ranks: by layer name.
        scalings: alpha / rank, or alpha / sqrt(rank), by layer name.
        use_rslora: whether it is the latter.
        use_dora: whether it decomposes the weight (DoRA).
    """

    ranks: Mapping[str, int]
    scalings: Mapping[str, float]
    use_rslora: bool
    use_dora: bool

    @property
    def rank(self) -> int:
        """Of most layers."""
        return mode(self.ranks.values())

    @property
    def scaling(self) -> float:
        """Of most layers."""
        return mode(self.scalings.values())


class _ConfigWithOffset(LoraConfig):
    """The configuration of an adapter with an offset, which describes the tensors that PEFT and diffusers save."""

    as_saved: ClassVar[Mapping[str, Any]] = {}  # set on the instance, and no field, which PEFT would write

    def to_dict(self) -> dict[str, Any]:
        """What PEFT writes: ranks and alphas with those of the initial factors, whose sum is one plain LoRA."""
        return {**super().to_dict(), **self.as_saved}


def unwrap(module: nn.Module) -> nn.Module:
    """The model that a ``PeftModel`` wraps, or the module itself; layer names are relative to it."""
    return cast("nn.Module", module.base_model.model) if isinstance(module, PeftModel) else module


def lora_layers(module: nn.Module, adapter_name: str = "default") -> dict[str, LoraLayer]:
    """PEFT layers that carry this adapter, by name."""
    return {
        name: layer
        for name, layer in unwrap(module).named_modules()
        if isinstance(layer, LoraLayer) and adapter_name in layer.lora_A
    }


def existing_adapter(module: nn.Module, adapter_name: str = "default") -> ExistingAdapter | None:
    """How the module is already adapted under this name, or ``None``."""
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
    """PEFT's ``LoraConfig`` without any option."""
    return LoraConfig().to_dict()


def config_of(module: nn.Module, adapter_name: str = "default") -> LoraConfig | None:
    """PEFT's configuration of an adapter, where the module has one."""
    configs = cast("Mapping[str, LoraConfig]", getattr(module, "peft_config", None) or {})
    return configs.get(adapter_name)


def check_plain(module: nn.Module, adapter_name: str = "default") -> None:
    """See that an adapter is what this library computes with: a LoRA, or DoRA, of linear layers on the original base.

    Raises:
        ValueError: naming the layer, or the field of its configuration and the value.
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
        module: raw or adapted.
        target_modules: names or name endings, or one regular expression for the full name, as in ``LoraConfig``. Left
            out for an adapted module, whose targets are the layers it already adapts.
        adapter_name: of the adapter that the module may carry.

    Raises:
        ValueError: nothing matches, or something matches that is no linear layer, or a quantised one of another kind
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


def base_weight(layer: nn.Linear) -> Tensor:
    """(out_features, in_features) float32 weight of a base layer, not to be written; dequantised where it is packed."""
    undo_cpu_packing(layer)
    return cast("Tensor", dequantize_module_weight(layer)).detach().float()


def _matches(name: str, target_modules: Sequence[str] | str) -> bool:
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in target_modules)


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
        module: raw, ``add_adapter``-ed, or a ``PeftModel``.
        weights: layer name (relative to :func:`unwrap`) -> weights.
        adapter_name: PEFT's name of the adapter.
        use_rslora: recorded in the configuration of a new adapter; the weights' own scaling counts.
        lora_dropout: of a new adapter.
        use_dora: make a new adapter a DoRA one. Magnitudes that the weights leave out start as the base weight's row
            norms, in an adapter that exists already, too.

    Raises:
        ValueError: no weights at all; an offset for a DoRA adapter, or magnitudes for one that is none, or biases for
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
        if w.bias is not None and name in layers and _bias(layers[name], adapter_name) is None:
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
    bias = _bias(layer, adapter_name)
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
    if _magnitude(layer, adapter_name).dtype == torch.float32:
        _magnitude(layer, adapter_name).copy_(initial)
    else:
        holder.weight.data = initial.clone()
    holder.requires_grad_(True)


def _magnitude(layer: LoraLayer, adapter_name: str) -> Tensor:
    magnitude = layer.lora_magnitude_vector[adapter_name].weight
    assert isinstance(magnitude, Tensor)
    return magnitude.detach()


def _bias(layer: LoraLayer, adapter_name: str) -> nn.Parameter | None:
    """The bias of B (PEFT's ``lora_bias``), if any."""
    return cast("nn.Parameter | None", layer.lora_B[adapter_name].bias)


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
    """The fields of ``LoraConfig`` that give every layer its rank and alpha."""
    rank, alpha = mode(ranks.values()), mode(alphas.values())
    # Anchored: unanchored keys also match layers whose name merely ends alike.
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(name)}": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{re.escape(name)}": value for name, value in alphas.items() if value != alpha},
    }


def adapter_weights(module: nn.Module, adapter_name: str = "default") -> dict[str, AdapterWeights]:
    """Current weights by layer name (not copied), with the initial factors as ``offset``.

    Raises:
        ValueError: the module carries no such adapter, or one of another kind than LoRA of linear layers.
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
            magnitude=_magnitude(layer, adapter_name) if adapter_name in layer.lora_magnitude_vector else None,
            bias=None if (bias := _bias(layer, adapter_name)) is None else bias.detach(),
        )
        for name, layer in layers.items()
    }


def trained_tensors(module: nn.Module, adapter_name: str = "default") -> list[TrainedTensor]:
    """What PEFT trains beside an adapter's factors: ``modules_to_save``, biases of the base, rows of an embedding."""
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


def _factors(layer: LoraLayer, adapter_name: str) -> LoraFactors:
    lora_A, lora_B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    assert isinstance(lora_A, Tensor)
    assert isinstance(lora_B, Tensor)
    return LoraFactors(lora_A.detach(), lora_B.detach())


def check_beside(modules: Mapping[str, nn.Module], adapter_name: str = "default") -> None:
    """See that no other part of a family carries this adapter, or trains one: nothing would initialise or save it.

    Args:
        modules: a family's ``adapted``, whose ``beside`` names its other parts; nothing is known of a plain mapping.
        adapter_name: PEFT's name of the adapter.

    Raises:
        ValueError: naming the component.
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


def trainable_parameters(module: nn.Module, adapter_name: str = "default") -> list[nn.Parameter]:
    """All that an adapter trains; never the initial factors of an offset.

    A, B (with its bias) and DoRA's magnitude of every adapted layer, in the module's order, then what PEFT trains
    beside them: ``modules_to_save``, biases of the base, rows of an embedding.
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

    Keys are ``{component}.{layer}.{lora_A|lora_B|scaling|offset_A|offset_B|magnitude|bias}``, and
    ``{component}.{name}.trained`` for what PEFT trains beside the factors; tensors are on the CPU.
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
    """Inverse of :func:`adapter_state_dict`, on modules that carry the adapter or that do not yet.

    A new adapter is a DoRA one when the state holds magnitudes.

    Raises:
        ValueError: the state holds nothing for one of the modules, or layers that a module does not have; or only one
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
