"""What is adapted: the modules, their layers, and the adapters that they carry already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from lorainit_diffusers import adapters
from lorainit_diffusers.ranges import SHARE_BELOW_ONE, Range, check_fields

if TYPE_CHECKING:  # families import diffusers' pipelines, which a user's own script may not need
    from lorainit_diffusers.families.base import ModelFamily

TargetModules = Sequence[str] | str | Mapping[str, Sequence[str] | str] | None


@dataclass(frozen=True)
class AdapterOptions:
    """What PEFT is told about the adapters; all but the name is for new ones.

    Attributes:
        adapter_name: PEFT's name of the adapter.
        use_rslora: Scale by alpha / sqrt(rank).
        use_dora: Train the magnitudes of the weight apart from its direction (DoRA); with methods that start from the
            base model without an offset.
        lora_dropout: Of the adapter's inputs, while training.
    """

    RANGES: ClassVar[Mapping[str, Range]] = {"lora_dropout": SHARE_BELOW_ONE}

    adapter_name: str = "default"
    use_rslora: bool = False
    use_dora: bool = False
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Target:
    """What one call of `initialize` adapts.

    Attributes:
        family: That the modules belong to, if any.
        modules: Component -> module.
        layers: Full name (component and layer) -> base linear layer.
        location: Full name -> (component, name inside it).
        existing: Component -> the adapter that it carries already.
        adapter: What new adapters are.
    """

    family: ModelFamily | None
    modules: Mapping[str, nn.Module]
    layers: Mapping[str, nn.Linear]
    location: Mapping[str, tuple[str, str]]
    existing: Mapping[str, adapters.ExistingAdapter | None]
    adapter: AdapterOptions

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of every layer."""
        return {name: (layer.out_features, layer.in_features) for name, layer in self.layers.items()}

    @property
    def has_dora(self) -> bool:
        """Whether an adapter is, or will be, a DoRA one."""
        found = self.existing.values()
        return any(adapter.use_dora for adapter in found if adapter is not None) or (
            self.adapter.use_dora and None in found
        )

    def rank_power(self, full_name: str) -> float:
        """The power of the rank that a layer's alpha is divided by: 1/2 under rsLoRA, else 1."""
        adapter = self.existing[self.location[full_name][0]]
        return 0.5 if (self.adapter.use_rslora if adapter is None else adapter.use_rslora) else 1

    def attach(self, weights: Mapping[str, adapters.AdapterWeights]) -> None:
        """Give every layer that is named its weights, and take the adapter off the others."""
        for component, module in self.modules.items():
            of_component = {
                self.location[name][1]: value for name, value in weights.items() if self.location[name][0] == component
            }
            adapters.attach(
                module,
                of_component,
                adapter_name=self.adapter.adapter_name,
                use_rslora=self.adapter.use_rslora,
                use_dora=self.adapter.use_dora,
                lora_dropout=self.adapter.lora_dropout,
            )
        if self.family is not None:  # attaching froze them, too
            for head in self.family.heads.values():
                head.requires_grad_(True)


def find_target(
    target: nn.Module | Mapping[str, nn.Module] | ModelFamily, target_modules: TargetModules, adapter: AdapterOptions
) -> Target:
    """The layers that are to be adapted.

    Args:
        target: A module, named components, or a model family.
        target_modules: Names, name endings or a regular expression; per component if a mapping. `None`: the layers
            already adapted, or the family's default.
        adapter: Its name, and what it is where it is new.

    Raises:
        ValueError: No matching layer, a wrapped or compiled module, an adapter that is no LoRA of linear layers, a part
            of the family that carries an adapter but is not adapted.
    """
    family: ModelFamily | None = None
    modules: Mapping[str, nn.Module]
    if isinstance(target, nn.Module):
        modules = {"": target}
    elif isinstance(target, Mapping):
        modules = target
    else:
        family, modules = target, target.adapted
    name = adapter.adapter_name
    adapters.check_beside(modules, name)
    for component, module in modules.items():
        _check_not_wrapped(component, module)
    existing = {component: adapters.existing_adapter(module, name) for component, module in modules.items()}
    layers: dict[str, nn.Linear] = {}
    location: dict[str, tuple[str, str]] = {}
    for component, module in modules.items():
        adapters.check_plain(module, name)
        targets = target_modules.get(component) if isinstance(target_modules, Mapping) else target_modules
        if targets is None and family is not None and existing[component] is None:
            targets = family.default_targets(component)
        for layer_name, layer in adapters.target_layers(module, targets, name).items():
            full_name = f"{component}.{layer_name}" if component else layer_name
            layers[full_name] = layer
            location[full_name] = (component, layer_name)
    return Target(family, modules, layers, location, existing, adapter)


def _check_not_wrapped(component: str, module: nn.Module) -> None:
    """Collection needs the plain module: compiled graphs skip hooks, and wrappers rename or shard the layers."""
    kind = type(module).__name__
    if kind in {"OptimizedModule", "DistributedDataParallel", "FullyShardedDataParallel", "DataParallel"}:
        where = f" (component {component!r})" if component else ""
        raise ValueError(f"initialize() got a {kind}{where}; call it before torch.compile and accelerator.prepare")
