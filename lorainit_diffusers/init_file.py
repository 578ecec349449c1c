"""An initialisation as a file: collect once, start from it anywhere.

One safetensors file holds the factors of every layer, their scalings, the report (ranks and scores), the settings, and
a key that says what the initialisation was made for: the base weights, the layers and the data. Whoever starts from it
gets the adapter of the run that made it, bit for bit, or is told what differs. No collection pass is needed, so that a
run whose models are sharded or compiled, or that trains in other software, can start from data, too.

The base is known by samples of every weight, taken at evenly spaced places, and by the sums of the adapted ones; across
dtypes they are compared up to their rounding. Nothing is pickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lorainit_diffusers import adapters
from lorainit_diffusers.files import save_tensors
from lorainit_diffusers.finite import check_finite
from lorainit_diffusers.report import InitReport

INIT_FILE_NAME = "lorainit_init.safetensors"
METADATA_KEY = "lorainit_init"
VERSION = 1
# Numbers taken of every weight of the base.
NUM_SAMPLES = 16
# How far they may be apart, as shares of the largest: where both bases have one dtype, and where they have two.
SAME_DTYPE, OTHER_DTYPE = 1e-6, 1e-2
_ENTRIES = ("lora_A", "lora_B", "scaling", "magnitude", "bias", "offset_A", "offset_B")


@dataclass(frozen=True)
class BaseKey:
    """What a component of the base looked like.

    Attributes:
        kind: Name of its class.
        tensors: Name -> (shape, dtype) of every weight.
        samples: (weights, 2 + NUM_SAMPLES) float64: sum and sum of magnitudes, which are NaN where the weight is not
            adapted, then the samples, padded with zeros.
    """

    kind: str
    tensors: dict[str, tuple[tuple[int, ...], str]]
    samples: Tensor


@dataclass(frozen=True)
class InitFile:
    """A whole initialisation.

    Attributes:
        method: Its name, and `options` its hyper-parameters.
        state: As `adapter_state_dict` gives it, offsets included.
        ranks: `component.layer` -> rank; 0 where the layer got no adapter.
        asked_ranks: The ranks that the adapters had before, or would have had without variable ranks.
        report: `InitReport.to_json`.
        settings: Everything else that decides the result, such as seed and number of batches.
        base: Component -> what its base looked like.
        data: What is known of the data; empty where nothing is.
    """

    method: str
    options: dict[str, Any]
    state: dict[str, Tensor]
    ranks: dict[str, int]
    asked_ranks: dict[str, int]
    report: dict[str, Any]
    settings: dict[str, Any]
    base: dict[str, BaseKey]
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def components(self) -> list[str]:
        """The adapted components, such as `unet` and `text_encoder`."""
        return list(self.base)


def init_of(
    modules: Mapping[str, nn.Module],
    report: InitReport,
    *,
    asked_ranks: Mapping[str, int] | None = None,
    settings: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    adapter_name: str = "default",
) -> InitFile:
    """The initialisation that modules carry now, right after `initialize`.

    Args:
        modules: Component -> adapted module.
        report: What `initialize` returned.
        asked_ranks: `component.layer` -> rank before variable ranks were allocated; those of the report if left out.
        settings: What else decided the result; JSON.
        data: What is known of the data; JSON, with the values that another run's are to equal.
        adapter_name: PEFT's name of the adapter.
    """
    state = adapters.adapter_state_dict(modules, adapter_name)
    ranks = {name: layer.rank for name, layer in report.layers.items()}
    return InitFile(
        method=report.method,
        options=report.options,
        state={key: value for key, value in state.items() if key.endswith(tuple(f".{entry}" for entry in _ENTRIES))},
        ranks=ranks,
        asked_ranks=dict(ranks if asked_ranks is None else asked_ranks),
        report=report.to_json(),
        settings=dict(settings or {}),
        base={component: base_key(module, adapter_name) for component, module in modules.items()},
        data=dict(data or {}),
    )


def base_key(module: nn.Module, adapter_name: str = "default", layers: Collection[str] | None = None) -> BaseKey:
    """What the base of a module looks like, from every adapted weight and a few values of the others.

    Args:
        module: With the adapter, or the base alone.
        adapter_name: PEFT's name of the adapter.
        layers: That count as adapted; those that are when left out.
    """
    adapted = {f"{name}.weight" for name in (adapters.lora_layers(module, adapter_name) if layers is None else layers)}
    tensors: dict[str, tuple[tuple[int, ...], str]] = {}
    rows: list[Tensor] = []
    for name, value in adapters.state_of_base(module).items():
        tensors[name] = tuple(value.shape), str(value.dtype).removeprefix("torch.")
        rows.append(_samples(value, adapted=name in adapted))
    return BaseKey(type(adapters.unwrap(module)).__name__, tensors, torch.stack(rows))


def _samples(value: Tensor, *, adapted: bool) -> Tensor:
    """One row of `BaseKey`'s samples."""
    flat = value.detach().reshape(-1)
    row = torch.zeros(2 + NUM_SAMPLES, dtype=torch.float64)
    row[:2] = math.nan
    if adapted:
        row[0] = flat.sum(dtype=torch.float64)
        row[1] = torch.linalg.vector_norm(flat.float(), 1, dtype=torch.float64)
    places = torch.linspace(0, max(flat.numel() - 1, 0), NUM_SAMPLES).long()[: flat.numel()]
    row[2 : 2 + len(places)] = flat[places.to(flat.device)].double().cpu()
    return row


def _differ(made: Tensor, found: Tensor, same_dtype: bool) -> bool:
    tolerance = SAME_DTYPE if same_dtype else OTHER_DTYPE
    # the sums are not known where only one of the two adapts the layer
    sums = (made[:2] - found[:2]).abs() > tolerance * made[1].abs()
    samples = (made[2:] - found[2:]).abs() > tolerance * made[2:].abs().max()
    return bool(sums.any()) or bool(samples.any())


def check_weight(key: BaseKey, layer: str, weight: Tensor) -> None:
    """See that one adapted layer has the weight that a file was made for, in whatever software it is.

    Args:
        key: Of the layer's component.
        layer: Its name in that component.
        weight: (out_features, in_features).

    Raises:
        ValueError: Another shape, or other values.
    """
    index, (shape, dtype) = next(
        (index, entry) for index, (name, entry) in enumerate(key.tensors.items()) if name == f"{layer}.weight"
    )
    same = dtype == str(weight.dtype).removeprefix("torch.")
    if tuple(weight.shape) != shape or _differ(key.samples[index], _samples(weight, adapted=True), same):
        raise ValueError(
            f"the init file was made for another base: the weight of {layer!r} differs; start from the base that it "
            "was made for, or make the file anew"
        )


def save_init_file(init: InitFile, path: str | Path) -> Path:
    """Write an initialisation, whole or not at all.

    Raises:
        ValueError: Factors that are not finite.
    """
    path = Path(path)
    check_finite(init.state, f"the initialisation {str(path)!r}")
    # Initial factors are those that the adapter subtracts: one copy is enough.
    offsets = sorted(key.removesuffix(".offset_A") for key in init.state if key.endswith(".offset_A"))
    tensors = {key: value for key, value in init.state.items() if not key.endswith((".offset_A", ".offset_B"))}
    for layer in offsets:
        for side in "AB":
            if not torch.equal(init.state[f"{layer}.offset_{side}"], init.state[f"{layer}.lora_{side}"]):
                raise ValueError(
                    f"layer {layer!r} has been trained: an init file holds the start of a run, so write it before the "
                    "first step"
                )
    document = {
        "version": VERSION,
        "method": init.method,
        "options": init.options,
        "offsets": offsets,
        "ranks": init.ranks,
        "asked_ranks": init.asked_ranks,
        "report": init.report,
        "settings": init.settings,
        "data": init.data,
        "base": {name: {"kind": key.kind, "tensors": key.tensors} for name, key in init.base.items()},
    }
    tensors |= {f"base_samples.{name}": key.samples for name, key in init.base.items()}
    metadata = {"format": "pt", METADATA_KEY: json.dumps(document, default=str)}
    save_tensors(tensors, path, metadata=metadata)
    return path


def load_init_file(path: str | Path) -> InitFile:
    """Read an initialisation.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no init file, or one of a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no init file {str(path)!r}; write it first, or name the one that was written"
        )
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{str(path)!r} is no safetensors file, or is not complete ({error}); write it again"
        ) from error
    if METADATA_KEY not in metadata:
        raise ValueError(
            f"{str(path)!r} is a safetensors file, but no init file: a trained LoRA, say; "
            "name the one that save_init_file wrote"
        )
    try:
        document = json.loads(metadata[METADATA_KEY])
        if document["version"] != VERSION:
            raise ValueError(
                f"{str(path)!r} is an init file of version {document['version']}, and this release reads version "
                f"{VERSION}; write it again with this release"
            )
        base = {
            name: BaseKey(
                key["kind"],
                {tensor: (tuple(shape), dtype) for tensor, (shape, dtype) in key["tensors"].items()},
                tensors.pop(f"base_samples.{name}"),
            )
            for name, key in document["base"].items()
        }
        for layer in document["offsets"]:
            tensors[f"{layer}.offset_A"] = tensors[f"{layer}.lora_A"]
            tensors[f"{layer}.offset_B"] = tensors[f"{layer}.lora_B"]
        fields = ("method", "options", "ranks", "asked_ranks", "report", "settings", "data")
        return InitFile(state=tensors, base=base, **{name: document[name] for name in fields})
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the init file {str(path)!r} is damaged ({error!r}); write it again") from error


def apply_init(
    init: InitFile,
    modules: Mapping[str, nn.Module],
    adapter_name: str = "default",
    *,
    use_rslora: bool = False,
    lora_dropout: float = 0.0,
) -> None:
    """Give modules, adapted or not, the initialisation of a file: the adapter of the run that made it, bit for bit.

    An optimiser made before still holds the parameters, as with `initialize`.

    Args:
        init: Of `load_init_file`.
        modules: Component -> module, on the base that the file was made for; of the file's components, all or some.
        adapter_name: PEFT's name of the adapter.
        use_rslora: What a new adapter's configuration says of its scaling, which is the file's in any case.
        lora_dropout: Of a new adapter.

    Raises:
        ValueError: A component that the file lacks; another base (names the weight), other target layers (names one),
            or another rank or scaling than that of an adapter that is there.
    """
    check_init(init, modules, adapter_name)
    for component, module in modules.items():
        own = {key: value for key, value in init.state.items() if key.startswith(f"{component}.")}
        adapters.load_adapter_state_dict(
            {component: module}, own, adapter_name, use_rslora=use_rslora, lora_dropout=lora_dropout
        )


def check_init(init: InitFile, modules: Mapping[str, nn.Module], adapter_name: str = "default") -> None:
    """See that modules can start from a file; nothing is changed.

    Raises:
        ValueError: As `apply_init`.
    """
    for component, module in modules.items():
        if component not in init.base:
            raise ValueError(
                f"the init file has no component {component!r}, only {', '.join(init.components)}: "
                "make it with the same components as the run that starts from it"
            )
        adapters.check_plain(module, adapter_name)
        check_base(init, component, module, adapter_name)
        _check_adapter(init, component, module, adapter_name)


def check_base(init: InitFile, component: str, module: nn.Module, adapter_name: str = "default") -> None:
    """See that a component stands on the base that the file was made for.

    Raises:
        ValueError: Naming the weight that differs, and how.
    """
    layers = [name.removeprefix(f"{component}.") for name in init.ranks if name.startswith(f"{component}.")]
    made, found = init.base[component], base_key(module, adapter_name, layers)
    remedy = "start from the base that it was made for, or make the file anew"
    missing = sorted(made.tensors.keys() ^ found.tensors.keys())
    if missing:
        where = "the file's base only" if missing[0] in made.tensors else "this base only"
        raise ValueError(
            f"the init file was made for another base: {component} ({found.kind}) has {missing[0]!r} in {where}; "
            f"{remedy}"
        )
    row_of = {name: index for index, name in enumerate(made.tensors)}
    for index, (name, (shape, dtype)) in enumerate(found.tensors.items()):
        made_shape, made_dtype = made.tensors[name]
        if made_shape != shape:
            raise ValueError(
                f"the init file was made for another base: {name!r} of {component} is {list(shape)} here and "
                f"{list(made_shape)} in the file; {remedy}"
            )
        if _differ(made.samples[row_of[name]], found.samples[index], dtype == made_dtype):
            raise ValueError(
                f"the init file was made for another base: the values of {name!r} of {component} differ; {remedy}"
            )


def _check_adapter(init: InitFile, component: str, module: nn.Module, adapter_name: str) -> None:
    existing = adapters.existing_adapter(module, adapter_name)
    if existing is None:
        return
    prefix = f"{component}."
    asked = {name.removeprefix(prefix): rank for name, rank in init.asked_ranks.items() if name.startswith(prefix)}
    different = sorted(asked.keys() ^ existing.ranks.keys())
    if different:
        where = "adapted here, but not in it" if different[0] in existing.ranks else "adapted in it, but not here"
        raise ValueError(
            f"the init file was made for other target layers: {component}.{different[0]} is {where}; "
            "adapt the same layers, or make the file anew"
        )
    for name, rank in existing.ranks.items():
        if rank != asked[name]:
            raise ValueError(
                f"the init file was made for rank {asked[name]} of {component}.{name}, this adapter has rank {rank}; "
                "use the rank that it was made for, or make the file anew"
            )
        scaling = init.state.get(f"{prefix}{name}.scaling")
        if scaling is not None and not math.isclose(float(scaling), existing.scalings[name], rel_tol=1e-6):
            raise ValueError(
                f"the init file was made for a scaling (alpha / rank) of {float(scaling):g} in {component}.{name}, and "
                f"this adapter has {existing.scalings[name]:g}; use the alpha that it was made for, or make the file "
                "anew"
            )


def data_difference(init: InitFile, data: Mapping[str, Any]) -> str | None:
    """In words what differs between the data of a file and another's; `None` where nothing is known to.

    Only what both say something about is compared.
    """
    different = [key for key in init.data if key in data and init.data[key] != data[key]]
    if not different:
        return None
    parts = [f"{key.replace('_', ' ')} {init.data[key]} in the file, {data[key]} here" for key in different]
    return f"the init file was made from other data: {'; '.join(parts)}"
