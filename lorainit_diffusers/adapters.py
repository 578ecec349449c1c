"""PEFT adapters: put factors into a model, keep them exact, read them out. The only file that imports peft.

A module may come raw, after diffusers' or transformers' ``add_adapter``, or wrapped by ``get_peft_model``; the layers
that PEFT injects are the same in all three, and everything here works on those.

**Offset twin.** An initialisation with B A != 0 that must keep the base model's function gets a second, frozen adapter
(``"<name>_offset"``) that adds ``-scaling * B0 A0``. Base weights are never written. The twin's factors are buffers, so
no ``requires_grad_``, ``set_adapter`` or ``enable_adapters`` can make them trainable, and no optimiser can find them.

**DoRA** (arXiv:2402.09353, PEFT's ``use_dora``). A layer's weight is ``m (W + scaling * B A) / ||W + scaling * B A||``
with one norm per row and a trainable magnitude m, which starts as the norms of W. Folding the scaling into B leaves
that as it is. With a twin the sum would no longer have this form, so DoRA and the offset twin exclude each other.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mode
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from lorainit_diffusers.methods.base import LoraFactors
from lorainit_diffusers.quantized import is_packed, undo_cpu_packing

OFFSET_SUFFIX = "_offset"
# The weight of bitsandbytes' 4-bit layers, by name: the package is optional.
PACKED_PARAMETER = "Params4bit"
# Where diffusers looks for the LoraConfig of a file, and where we say how it was made.


@dataclass(frozen=True)
class AdapterWeights:
    """Everything that one adapted layer adds to its base layer.

    Attributes:
        factors: trainable A (rank, in_features) and B (out_features, rank).
        scaling: the layer adds ``scaling * B A``.
        offset: initial factors whose ``scaling * B0 A0`` the frozen twin subtracts; ``None`` without a twin.
        magnitude: (out_features,) DoRA's trainable row norms; ``None`` without DoRA, and in :func:`attach` for those of
            the base weight.
    """

    factors: LoraFactors
    scaling: float
    offset: LoraFactors | None = None
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class ExistingAdapter:
    """The configuration of an adapter that a module already carries.

    Attributes:
        rank: of its ``LoraConfig``.
        scaling: alpha / rank, or alpha / sqrt(rank).
        use_rslora: whether it is the latter.
        use_dora: whether it decomposes the weight (DoRA).
    """

    rank: int
    scaling: float
    use_rslora: bool
    use_dora: bool


class _FrozenFactor(nn.Module):
    """A linear map without bias whose weight is a buffer."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


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
    layer = next(iter(layers.values()))
    return ExistingAdapter(
        rank=int(layer.r[adapter_name]),
        scaling=float(layer.scaling[adapter_name]),
        use_rslora=_use_rslora(module, adapter_name),
        use_dora=bool(layer.use_dora.get(adapter_name, False)),
    )


def _use_rslora(module: nn.Module, adapter_name: str) -> bool:
    # The layers know it too, but only in recent PEFT releases.
    configs = cast("Mapping[str, LoraConfig]", getattr(module, "peft_config", {}))
    return adapter_name in configs and bool(configs[adapter_name].use_rslora)


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
    return {key.replace(".base_layer.", "."): value for key, value in state.items()}


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
                    f"{type(module).__name__} already carries an adapter {adapter_name!r}, and target modules "
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
            f"target modules {target_modules!r} match no layer of {type(module).__name__}; "
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
    them), and layers that are not named lose it.

    Args:
        module: raw, ``add_adapter``-ed, or a ``PeftModel``.
        weights: layer name (relative to :func:`unwrap`) -> weights.
        adapter_name: PEFT's name of the adapter; the twin's is that plus ``"_offset"``.
        use_rslora: recorded in the configuration of a new adapter; the weights' own scaling counts.
        lora_dropout: of a new adapter.
        use_dora: make a new adapter a DoRA one. Magnitudes that the weights leave out start as the base weight's row
            norms, in an adapter that exists already, too.

    Raises:
        ValueError: no weights at all; an offset for a DoRA adapter, or magnitudes for one that is none.
    """
    if not weights:
        raise ValueError("no layer keeps an adapter: every rank is 0; raise the rank budget or min_rank")
    inner = unwrap(module)
    existing = existing_adapter(module, adapter_name)
    if existing is not None:
        use_rslora, use_dora = existing.use_rslora, existing.use_dora
    for name, w in weights.items():
        if use_dora and w.offset is not None:
            raise ValueError(
                f"layer {name!r} starts from B A != 0 with an offset twin, which DoRA's magnitudes do not allow; "
                "use an init whose product starts at zero, such as eva or orthonormal, or drop use_dora"
            )
        if not use_dora and w.magnitude is not None:
            raise ValueError(
                f"the weights of layer {name!r} hold a DoRA magnitude, but adapter {adapter_name!r} does not use DoRA; "
                "add it with use_dora=True"
            )
    rank = mode(w.factors.lora_A.shape[0] for w in weights.values())
    if existing is None:
        alpha = next(iter(weights.values())).scaling * (rank**0.5 if use_rslora else rank)
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]
            target_modules=exactly(weights),
            use_rslora=use_rslora,
            lora_dropout=lora_dropout,
            use_dora=use_dora,
        )
        _inject(module, config, adapter_name)
    for name, layer in lora_layers(module, adapter_name).items():
        if name in weights:
            _set_factors(layer, adapter_name, weights[name], use_rslora)
            if use_dora:
                _set_magnitude(layer, adapter_name, weights[name].magnitude)
        else:
            _remove(inner, name, layer, adapter_name)
    twin = adapter_name + OFFSET_SUFFIX
    twins = [name for name, w in weights.items() if w.offset is not None]
    if twins and not lora_layers(module, twin):
        _inject(module, LoraConfig(r=rank, lora_alpha=rank, target_modules=exactly(twins)), twin)
    for name, layer in lora_layers(module, adapter_name).items():
        _set_twin(layer, adapter_name, weights[name])
    _record_patterns(module, adapter_name)


def exactly(names: Iterable[str]) -> str:
    """A regular expression for these full names: PEFT would take plain names as endings, too."""
    return f"^({'|'.join(re.escape(name) for name in names)})$"


def _inject(module: nn.Module, config: LoraConfig, adapter_name: str) -> None:
    # PEFT draws random factors, which are replaced at once: the caller's random state must not move.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # PEFT warns that a second adapter exists; the twin is one on purpose.
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
        linear.weight.requires_grad_(True)
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


def _set_twin(layer: LoraLayer, adapter_name: str, weights: AdapterWeights) -> None:
    twin = adapter_name + OFFSET_SUFFIX
    if weights.offset is None:
        if twin in layer.lora_A:
            layer.delete_adapter(twin)
        active = [adapter_name]
    else:
        device = _device(layer)
        # contiguous, as a resumed run has them: products of other layouts round otherwise
        lora_A, lora_B = (
            factor.detach().to(device=device, dtype=torch.float32).clone(memory_format=torch.contiguous_format)
            for factor in weights.offset
        )
        layer.lora_A[twin] = _FrozenFactor(lora_A)
        layer.lora_B[twin] = _FrozenFactor(-lora_B)
        layer.r[twin] = lora_A.shape[0]
        layer.lora_alpha[twin] = weights.scaling * lora_A.shape[0]
        layer.scaling[twin] = weights.scaling
        # The twin must see what the adapter sees, or dropout would break the cancellation in training mode too:
        # dropout is the adapter's noise and stays off in the constant part.
        layer.lora_dropout[twin] = nn.Identity()
        active = [adapter_name, twin]
    others = [name for name in layer.active_adapters if name not in (adapter_name, twin) and name in layer.lora_A]
    layer.set_adapter(others + active)


def _remove(root: nn.Module, name: str, layer: LoraLayer, adapter_name: str) -> None:
    """Take the adapter off one layer; the layer itself goes when it carried nothing else."""
    for carried in (adapter_name, adapter_name + OFFSET_SUFFIX):
        if carried in layer.lora_A:
            layer.delete_adapter(carried)
    if len(layer.lora_A) == 0:
        parent, _, child = name.rpartition(".")
        setattr(root.get_submodule(parent), child, layer.get_base_layer())


def _record_patterns(module: nn.Module, adapter_name: str) -> None:
    """Write the ranks and alphas into PEFT's configuration, so that PEFT's own saving reloads the same shapes."""
    configs: Mapping[str, Any] = getattr(module, "peft_config", {})
    for carried in (adapter_name, adapter_name + OFFSET_SUFFIX):
        layers = lora_layers(module, carried)
        if carried not in configs or not layers:
            continue
        config = configs[carried]
        config.r = mode(int(layer.r[carried]) for layer in layers.values())
        config.lora_alpha = mode(float(layer.lora_alpha[carried]) for layer in layers.values())
        config.rank_pattern, config.alpha_pattern = {}, {}
        for name, layer in layers.items():
            # Anchored: unanchored keys also match layers whose name merely ends alike.
            if layer.r[carried] != config.r:
                config.rank_pattern[f"^{re.escape(name)}"] = int(layer.r[carried])
            if layer.lora_alpha[carried] != config.lora_alpha:
                config.alpha_pattern[f"^{re.escape(name)}"] = float(layer.lora_alpha[carried])
        config.target_modules = exactly(layers)


def adapter_weights(module: nn.Module, adapter_name: str = "default") -> dict[str, AdapterWeights]:
    """Current weights by layer name (not copied), with the twin's as ``offset``.

    Raises:
        ValueError: the module carries no such adapter.
    """
    layers = lora_layers(module, adapter_name)
    if not layers:
        raise ValueError(f"{type(module).__name__} carries no adapter {adapter_name!r}; run initialize() first")
    twin = adapter_name + OFFSET_SUFFIX
    return {
        name: AdapterWeights(
            factors=_factors(layer, adapter_name),
            scaling=float(layer.scaling[adapter_name]),
            offset=LoraFactors(_factors(layer, twin).lora_A, -_factors(layer, twin).lora_B)
            if twin in layer.lora_A
            else None,
            magnitude=_magnitude(layer, adapter_name) if adapter_name in layer.lora_magnitude_vector else None,
        )
        for name, layer in layers.items()
    }


def _factors(layer: LoraLayer, adapter_name: str) -> LoraFactors:
    lora_A, lora_B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    assert isinstance(lora_A, Tensor)
    assert isinstance(lora_B, Tensor)
    return LoraFactors(lora_A.detach(), lora_B.detach())


def trainable_parameters(module: nn.Module, adapter_name: str = "default") -> list[nn.Parameter]:
    """A, B and DoRA's magnitude of every adapted layer, in the module's order; never the twin's."""
    return [
        parameter
        for layer in lora_layers(module, adapter_name).values()
        for holder in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
        if adapter_name in holder
        for parameter in holder[adapter_name].parameters()
    ]


def adapter_state_dict(modules: Mapping[str, nn.Module], adapter_name: str = "default") -> dict[str, Tensor]:
    """Everything that a resumed run needs, twins included: initial factors are stored, never recomputed.

    Keys are ``{component}.{layer}.{lora_A|lora_B|scaling|offset_A|offset_B|magnitude}``; tensors are on the CPU.
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
            state |= {f"{component}.{name}.{key}": t.cpu().clone().contiguous() for key, t in entries.items()}
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
