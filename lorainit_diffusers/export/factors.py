"""What an adapter adds, as plain factors: scaling, offset and compression folded in; what every format shares."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mode
from typing import Any

import torch
from torch import Tensor, nn

from lorainit_diffusers.adapters import AdapterWeights, adapter_weights, trainable_beside, trained_tensors
from lorainit_diffusers.finite import check_finite
from lorainit_diffusers.linalg import SVD, product_svd
from lorainit_diffusers.methods.base import LoraFactors
from lorainit_diffusers.ranges import COUNT

DIFFUSERS_METADATA_KEY = "lora_adapter_metadata"
PROVENANCE_KEY = "lorainit_diffusers"
DIFFUSERS_WEIGHT_NAME = "pytorch_lora_weights.safetensors"
KOHYA_WEIGHT_NAME = "pytorch_lora_weights_kohya.safetensors"
# The two files of a folder that PEFT loads, and what it puts before the layers' names.
PEFT_WEIGHT_NAME = "adapter_model.safetensors"
PEFT_CONFIG_NAME = "adapter_config.json"
PEFT_PREFIX = "base_model.model."
# Names of a classifier's outputs, beside them.
LABELS_NAME = "label_names.json"


def exported_factors(
    module: nn.Module, adapter_name: str = "default", *, export_rank: int | None = None, pad_rank: int | None = None
) -> dict[str, LoraFactors]:
    """Factors by layer name whose plain product B A is all that the adapter adds to the base layer.

    Rank r where there is no offset, 2r where there is one; float32, on the CPU. With an offset the factors are the
    balanced singular ones of the difference, not the two products side by side: a loader that casts them to half
    precision would round two nearly equal products instead of what is left of them. Before training nothing is left,
    and the products are kept, so that another trainer can start from the file.

    Args:
        module: Adapted.
        adapter_name: Which adapter.
        export_rank: Layers of a larger rank are compressed to this one: the best approximation of B A in the Frobenius
            norm (Eckart-Young), as balanced factors. `discarded_energy` says what that costs.
        pad_rank: Zero-pad every layer to this rank, after compression.

    Raises:
        ValueError: `export_rank` below 1; `pad_rank` smaller than the rank that a layer has left; factors that are
            not finite, or with an offset and rounded to 16 bits.
    """
    if export_rank is not None:
        _check_export_rank(export_rank)
    if pad_rank is not None:
        COUNT.check("pad_rank", pad_rank)
    exported: dict[str, LoraFactors] = {}
    for name, weights in adapter_weights(module, adapter_name).items():
        check_finite({f"{name}.{key}": value for key, value in weights.factors._asdict().items()}, "the LoRA")
        check_not_rounded(name, weights)
        factors = plain_factors(weights, export_rank)
        exported[name] = factors if pad_rank is None else _pad(name, factors, pad_rank)
    return exported


def plain_factors(weights: AdapterWeights, export_rank: int | None = None) -> LoraFactors:
    """One layer's factors, scaling and offset in them, as `exported_factors` has them; float32, on the CPU."""
    lora_A, lora_B = weights.factors.lora_A, weights.factors.lora_B * weights.scaling
    if weights.offset is not None:
        lora_A = torch.cat([lora_A, weights.offset.lora_A])
        lora_B = torch.cat([lora_B, -weights.scaling * weights.offset.lora_B], dim=1)
    factors = LoraFactors(lora_A.float().cpu().contiguous(), lora_B.float().cpu().contiguous())
    if weights.offset is not None or (export_rank is not None and lora_A.shape[0] > export_rank):
        factors = _decomposed(factors, export_rank)
    return factors


def check_not_rounded(name: str, weights: AdapterWeights) -> None:
    """See that a layer with an offset still has the factors that were trained.

    The two products nearly cancel: rounded to 16 bits, what was trained is lost in the rounding of both.

    Raises:
        ValueError: Factors of another dtype than float32 (or wider), or with the values of a 16-bit one.
    """
    if weights.offset is None:
        return
    for key in ("lora_A", "lora_B"):
        own: Tensor = getattr(weights.factors, key)
        initial: Tensor = getattr(weights.offset, key)
        narrow = [own.dtype] if own.itemsize < 4 else []
        for dtype in (torch.bfloat16, torch.float16):
            if torch.equal(own, own.to(dtype).to(own.dtype)) and not torch.equal(initial, initial.to(dtype).float()):
                narrow.append(dtype)
        if narrow:
            raise ValueError(
                f"{key} of layer {name!r} was rounded to {str(narrow[0]).removeprefix('torch.')}, in which what was "
                "trained on top of the initial factors is lost; save it in float32, before the model is "
                "cast, or load the last checkpoint"
            )


def check_holds(
    module: nn.Module,
    adapter_name: str,
    file_format: str,
    *,
    lora_bias: bool = False,
    beside: bool = False,
    full_modules: Sequence[str] = (),
) -> None:
    """See that a format holds everything that an adapter trains, and warn of what no format knows of.

    Args:
        module: Adapted.
        adapter_name: Which adapter.
        file_format: Its name, for the message.
        lora_bias: It holds biases of B.
        beside: It holds what is trained beside the factors.
        full_modules: Modules that are saved whole.

    Raises:
        ValueError: Naming the field of `LoraConfig` that the format has no place for.
    """
    lost = {} if beside else {item.field: item.base_name for item in trained_tensors(module, adapter_name)}
    biased = [name for name, weights in adapter_weights(module, adapter_name).items() if weights.bias is not None]
    if biased and not lora_bias:
        lost["lora_bias"] = f"{biased[0]}.lora_B.bias"
    for field, name in lost.items():
        raise ValueError(
            f"{file_format} cannot hold what LoraConfig's {field} trains (such as {name!r}); "
            "write it with save_peft_lora or save_merged, or train without it"
        )
    unknown = trainable_beside(module, adapter_name, full_modules)
    if unknown:
        warnings.warn(
            f"{len(unknown)} trainable parameters of {type(module).__name__} belong to no adapter, and {file_format} "
            f"leaves them out: {', '.join(unknown[:3])}{' ...' if len(unknown) > 3 else ''}",
            stacklevel=3,
        )


def discarded_energy(
    modules: Mapping[str, nn.Module], export_rank: int, adapter_name: str = "default"
) -> dict[str, float]:
    """What compression to `export_rank` loses, by layer (`"component.layer"`).

    Returns:
        Share of `||B A||_F^2`, in [0, 1], with the offset in the product: 0 where nothing is cut, and where the
        product is zero. Under DoRA, it is still the product's energy, before the rows are normalised.

    Raises:
        ValueError: `export_rank` below 1, or a module without the adapter.
    """
    _check_export_rank(export_rank)
    shares: dict[str, float] = {}
    for component, module in modules.items():
        for name, factors in exported_factors(module, adapter_name).items():
            energy = _exported_svd(factors).values.square()
            total, lost = float(energy.sum()), float(energy[export_rank:].sum())
            shares[f"{component}.{name}"] = lost / total if total > 0 else 0.0
    return shares


def _check_export_rank(export_rank: int) -> None:
    remedy = "leave it out to save every rank in full"
    replace(COUNT, remedy=remedy).check("export_rank", export_rank, "{name} {value} {reason}")


def _exported_svd(factors: LoraFactors) -> SVD:
    """Singular triplets of B A in float64, with the values that are mere rounding set to zero."""
    lora_A, lora_B = factors.lora_A.double(), factors.lora_B.double()
    left, values, right = product_svd(lora_B, lora_A)
    # An untrained offset initialisation cancels, which leaves rounding and no energy to share out.
    rounding = 1e-12 * torch.linalg.norm(lora_A) * torch.linalg.norm(lora_B)
    return SVD(left, torch.where(values > rounding, values, 0.0), right)


def _decomposed(factors: LoraFactors, rank: int | None) -> LoraFactors:
    """Balanced singular factors of B A, of at most this rank."""
    if not factors.lora_B.any():  # untrained: keep A's rows, or training from the file could not start
        return LoraFactors(factors.lora_A[:rank].contiguous(), factors.lora_B[:, :rank].contiguous())
    svd = _exported_svd(factors)
    if rank is None and not svd.values.any():
        return factors
    root = svd.values[:rank].sqrt()  # a layer narrower than the rank has fewer triplets
    lora_A, lora_B = root[:, None] * svd.right[:rank], svd.left[:, :rank] * root
    return LoraFactors(lora_A.float().contiguous(), lora_B.float().contiguous())


def _pad(name: str, factors: LoraFactors, rank: int) -> LoraFactors:
    missing = rank - factors.lora_A.shape[0]
    if missing < 0:
        raise ValueError(
            f"pad_rank {rank} is smaller than the exported rank {factors.lora_A.shape[0]} of {name!r}; "
            "raise it, or compress with export_rank"
        )
    return LoraFactors(
        nn.functional.pad(factors.lora_A, (0, 0, 0, missing)), nn.functional.pad(factors.lora_B, (0, missing))
    )


def exported_magnitudes(module: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """(out_features,) DoRA magnitudes by layer name, float32, on the CPU; nothing without DoRA."""
    magnitudes = {
        name: weights.magnitude.float().cpu()
        for name, weights in adapter_weights(module, adapter_name).items()
        if weights.magnitude is not None
    }
    check_finite({f"{name}.magnitude": value for name, value in magnitudes.items()}, "the LoRA")
    return magnitudes


def exported_biases(module: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """(out_features,) biases of B (`lora_bias`) by layer name with the scaling in them, float32, on the CPU."""
    biases = {
        name: (weights.scaling * weights.bias.float()).cpu().contiguous()
        for name, weights in adapter_weights(module, adapter_name).items()
        if weights.bias is not None
    }
    check_finite({f"{name}.lora_B.bias": value for name, value in biases.items()}, "the LoRA")
    return biases


def minimal_config(
    ranks: Mapping[str, int], target_modules: Sequence[str] | str, *, use_dora: bool, lora_bias: bool
) -> dict[str, Any]:
    """A file's LoRA configuration, by the patterns of its layers' names: alpha is the rank in every layer.

    Exactly the fields that every PEFT release knows; above all no `init_lora_weights` that would run an
    initialisation on the base of whoever loads the file.
    """
    common = mode(ranks.values())
    pattern = {name: rank for name, rank in ranks.items() if rank != common}
    return {
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": target_modules,
        "init_lora_weights": True,
        **({"use_dora": True} if use_dora else {}),
        **({"lora_bias": True} if lora_bias else {}),
    }


def label_names(model: nn.Module) -> list[str] | None:
    """The names of a classifier's outputs, by its configuration; `None` for other models and where it has none."""
    found: Any = getattr(getattr(model, "config", None), "id2label", None)
    if not found or "Classification" not in type(model).__name__:
        return None
    names = [str(found[number]) for number in sorted(found, key=int)]
    # transformers' own, for want of any
    return None if names == [f"LABEL_{number}" for number in range(len(names))] else names


def file_metadata(provenance: Mapping[str, Any] | None) -> dict[str, str]:
    """The metadata of a safetensors file: how the LoRA was made, under a key of our own."""
    blobs = {"format": "pt"}
    if provenance is not None:
        blobs[PROVENANCE_KEY] = json.dumps(provenance, sort_keys=True)
    return blobs


def text_model_name(name: str) -> str:
    """The layer's name as files have it: transformers before 5 nests CLIP's layers under `text_model`."""
    # The projection stands beside the text model, not in it.
    return name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"
