"""What a LoRA file holds, read from its header and its names: whoever wrote it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lorainit_diffusers.export.factors import (
    DIFFUSERS_METADATA_KEY,
    DIFFUSERS_WEIGHT_NAME,
    PEFT_CONFIG_NAME,
    PEFT_PREFIX,
    PEFT_WEIGHT_NAME,
    PROVENANCE_KEY,
)

# Endings of the names of the first factor, those of the second one, and what writes them.
_FORMATS = (
    (".lora_A.weight", ".lora_B.weight", "diffusers"),
    (".lora_down.weight", ".lora_up.weight", "kohya"),
    (".lora.down.weight", ".lora.up.weight", "diffusers, of before 2024"),
    ("_lora.down.weight", "_lora.up.weight", "diffusers, attention processors"),
)


@dataclass(frozen=True)
class LoraLayer:
    """One layer of a LoRA file.

    Attributes:
        name: As the file has it.
        rank: Of the factors.
        alpha: Numerator of the scale alpha / rank, as a reader of the format takes it.
        in_features: Of the layer.
        out_features: Of the layer.
    """

    name: str
    rank: int
    alpha: float
    in_features: int
    out_features: int


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file.

    Attributes:
        path: Of the file.
        format: Who writes such names.
        layers: Sorted by name.
        num_bytes: Of the file.
        dtypes: Of its tensors, with how many there are.
        other: Names of tensors that belong to no layer, such as heads that are trained in full.
        provenance: How this library made it; empty for files of others.
    """

    path: Path
    format: str
    layers: tuple[LoraLayer, ...]
    num_bytes: int
    dtypes: Mapping[str, int]
    other: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def components(self) -> dict[str, int]:
        """Models that the layers belong to, with how many layers each has."""
        names = Counter(_component(layer.name, self.format) for layer in self.layers)
        return dict(sorted(names.items()))

    @property
    def folded(self) -> bool | None:
        """Whether an offset was folded in, so that the ranks are twice those of the training; `None` if unknown."""
        step_zero = self.provenance.get("step_zero")
        return None if step_zero is None else step_zero == "offset"


def inspect_lora(path: str | Path) -> LoraFile:
    """Read what a LoRA file holds, without its weights.

    Args:
        path: A `.safetensors` file, or a folder with one: of a run, or of a PEFT adapter.

    Raises:
        FileNotFoundError: When there is no such file, or none in the folder.
        ValueError: When it is no safetensors file, or holds no LoRA.
    """
    path = _file(Path(path))
    try:
        with safe_open(path, framework="pt") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            shapes = {name: tuple(one.get_shape()) for name, one in slices.items()}
            dtypes = Counter(str(one.get_dtype()) for one in slices.values())
            scalars = {name: float(opened.get_tensor(name)) for name in shapes if name.endswith(".alpha")}
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is no safetensors file ({error}); give the file of a LoRA") from error
    found = [one for one in _FORMATS if any(name.endswith(one[0]) for name in shapes)]
    if not found:
        some = ", ".join(list(shapes)[:3]) or "nothing"
        raise ValueError(f"{str(path)!r} holds no LoRA (but {some}); give the file of a LoRA")
    down, up, kind = found[0]
    names = sorted(name.removesuffix(down) for name in shapes if name.endswith(down))
    if all(name.startswith(PEFT_PREFIX) for name in names):
        kind = "PEFT adapter"
    config = _config(path, metadata)
    layers: list[LoraLayer] = []
    used: set[str] = set()
    for name in names:
        first, second = shapes[name + down], shapes.get(name + up)
        if second is None:
            raise ValueError(f"{str(path)!r}: layer {name!r} has {down[1:]} but no {up[1:]}; the file is not whole")
        alpha = scalars.get(f"{name}.alpha", _alpha(config, name, first[0]))
        layers.append(LoraLayer(name, first[0], alpha, first[1], second[0]))
        used |= {name + down, name + up, f"{name}.alpha"}
    other = tuple(sorted(set(shapes) - used))
    provenance: Any = json.loads(metadata.get(PROVENANCE_KEY, "{}"))
    return LoraFile(path, kind, tuple(layers), path.stat().st_size, dict(dtypes), other, provenance)


def _file(path: Path) -> Path:
    """The file that a path means."""
    if path.is_dir():
        for name in (DIFFUSERS_WEIGHT_NAME, PEFT_WEIGHT_NAME):
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(f"the folder {str(path)!r} has no LoRA file in it; give the file itself")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}; give a .safetensors file, or a folder with one")
    return path


def _config(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The adapter's configuration by the file's metadata, or beside it."""
    beside = path.with_name(PEFT_CONFIG_NAME)
    try:
        if DIFFUSERS_METADATA_KEY in metadata:
            return dict(json.loads(metadata[DIFFUSERS_METADATA_KEY]))
        return dict(json.loads(beside.read_text(encoding="utf-8"))) if beside.is_file() else {}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{str(path)!r}: its configuration is no JSON object ({error}); the file is damaged") from None


def _alpha(config: Mapping[str, Any], name: str, rank: int) -> float:
    """Alpha of a layer without one of its own: the configuration's, or the rank, as readers take it."""
    bare = name.removeprefix(PEFT_PREFIX)
    component, _, layer = bare.partition(".")
    prefix = f"{component}." if f"{component}.lora_alpha" in config else ""
    patterns: Mapping[str, Any] = config.get(f"{prefix}alpha_pattern") or {}
    layer = layer if prefix else bare
    for pattern, alpha in patterns.items():
        if layer.endswith(pattern.lstrip("^").replace("\\", "")):
            return float(alpha)
    ranks: Mapping[str, Any] = config.get(f"{prefix}rank_pattern") or {}
    own_rank = any(layer.endswith(pattern.lstrip("^").replace("\\", "")) for pattern in ranks)
    default = config.get(f"{prefix}lora_alpha")
    return float(rank) if default is None or (own_rank and not patterns) else float(default)


def _component(name: str, kind: str) -> str:
    """The model that a layer belongs to, as far as its name says."""
    if kind == "kohya":
        for prefix in ("lora_te1", "lora_te2", "lora_te3", "lora_te", "lora_unet"):
            if name.startswith(f"{prefix}_"):
                return prefix
        return name.partition("_")[0]
    return "model" if name.startswith(PEFT_PREFIX) else name.partition(".")[0]
