"""What adapters add, as files: for diffusers, PEFT and kohya's readers, or merged into a whole model; and back.

``scaling * B A - scaling * B0 A0``, an adapter and its offset twin, is one LoRA of rank 2r, with the scaling folded
into B and alpha = rank in every layer: whatever a loader assumes about alpha, the strength is right, on the original
base. It is decomposed anew, because the two products nearly cancel, which half precision would not survive well.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mode
from typing import Any, cast

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor, nn

from lorainit_diffusers import kohya
from lorainit_diffusers.adapters import (
    AdapterWeights,
    adapter_weights,
    attach,
    base_layers,
    exactly,
    existing_adapter,
    lora_layers,
    state_of_base,
    unwrap,
)
from lorainit_diffusers.files import filling, save_tensors, write_json
from lorainit_diffusers.finite import check_finite
from lorainit_diffusers.linalg import SVD, product_svd
from lorainit_diffusers.methods.base import LoraFactors

DIFFUSERS_METADATA_KEY = "lora_adapter_metadata"
PROVENANCE_KEY = "lorainit_diffusers"
DIFFUSERS_WEIGHT_NAME = "pytorch_lora_weights.safetensors"
# The two files of a folder that PEFT loads, and what it puts before the layers' names.
PEFT_WEIGHT_NAME = "adapter_model.safetensors"
PEFT_CONFIG_NAME = "adapter_config.json"
PEFT_PREFIX = "base_model.model."


def exported_factors(
    module: nn.Module, adapter_name: str = "default", *, export_rank: int | None = None, pad_rank: int | None = None
) -> dict[str, LoraFactors]:
    """Factors by layer name whose plain product B A is all that the adapter and its twin add to the base layer.

    Rank r where there is no twin, 2r where there is one; float32, on the CPU. With a twin the factors are the balanced
    singular ones of the difference, not the two products side by side: a loader that casts them to half precision would
    round two nearly equal products instead of what is left of them. Before training nothing is left, and the products
    are kept, so that another trainer can start from the file.

    Args:
        module: adapted.
        adapter_name: which adapter.
        export_rank: layers of a larger rank are compressed to this one: the best approximation of B A in the Frobenius
            norm (Eckart-Young), as balanced factors. :func:`discarded_energy` says what that costs.
        pad_rank: zero-pad every layer to this rank, after compression.

    Raises:
        ValueError: ``export_rank`` below 1; ``pad_rank`` smaller than the rank that a layer has left; factors that are
            not finite.
    """
    if export_rank is not None:
        _check_export_rank(export_rank)
    exported: dict[str, LoraFactors] = {}
    for name, weights in adapter_weights(module, adapter_name).items():
        check_finite({f"{name}.{key}": value for key, value in weights.factors._asdict().items()}, "the LoRA")
        lora_A, lora_B = weights.factors.lora_A, weights.factors.lora_B * weights.scaling
        if weights.offset is not None:
            lora_A = torch.cat([lora_A, weights.offset.lora_A])
            lora_B = torch.cat([lora_B, -weights.scaling * weights.offset.lora_B], dim=1)
        factors = LoraFactors(lora_A.float().cpu().contiguous(), lora_B.float().cpu().contiguous())
        if weights.offset is not None or (export_rank is not None and lora_A.shape[0] > export_rank):
            factors = _decomposed(factors, export_rank)
        exported[name] = factors if pad_rank is None else _pad(name, factors, pad_rank)
    return exported


def discarded_energy(
    modules: Mapping[str, nn.Module], export_rank: int, adapter_name: str = "default"
) -> dict[str, float]:
    """What compression to ``export_rank`` loses, by layer (``"component.layer"``).

    Returns:
        Share of ``||B A||_F^2``, in [0, 1], with the twin's part in the product: 0 where nothing is cut, and where the
        product is zero. Under DoRA, it is still the product's energy, before the rows are normalised.

    Raises:
        ValueError: ``export_rank`` below 1, or a module without the adapter.
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
    if export_rank < 1:
        raise ValueError(f"export_rank {export_rank} must be at least 1; leave it out to save every rank in full")


def _exported_svd(factors: LoraFactors) -> SVD:
    """Singular triplets of B A in float64, with the values that are mere rounding set to zero."""
    lora_A, lora_B = factors.lora_A.double(), factors.lora_B.double()
    left, values, right = product_svd(lora_B, lora_A)
    # An untrained offset initialisation cancels with its twin, which leaves rounding and no energy to share out.
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


def save_diffusers_lora(
    modules: Mapping[str, nn.Module],
    directory: str | Path,
    *,
    weight_name: str = DIFFUSERS_WEIGHT_NAME,
    adapter_name: str = "default",
    export_rank: int | None = None,
    pad_rank: int | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write a file that ``pipeline.load_lora_weights(directory)`` loads, exactly, on the original base.

    Args:
        modules: component (``"unet"``, ``"transformer"``, ``"text_encoder"``, ...) -> adapted module.
        directory: created when missing.
        weight_name: of the file.
        adapter_name: which adapter.
        export_rank: compress layers of a larger rank, as in :func:`exported_factors`.
        pad_rank: zero-pad every layer to this rank, for loaders that cannot mix ranks.
        provenance: how the file was made; JSON under a metadata key of our own, which loaders ignore.

    Returns:
        The file.

    Raises:
        ValueError: ``export_rank`` below 1; ``pad_rank`` smaller than the rank that a layer has left (2r for offset
            initialisations that are not compressed).
    """
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for component, module in modules.items():
        exported = exported_factors(module, adapter_name, export_rank=export_rank, pad_rank=pad_rank)
        magnitudes = _exported_magnitudes(module, adapter_name)
        text_encoder = component.startswith("text_encoder")
        for name, factors in exported.items():
            key = f"{component}.{_text_model_name(name) if text_encoder else name}"
            tensors |= {f"{key}.lora_A.weight": factors.lora_A, f"{key}.lora_B.weight": factors.lora_B}
            if name in magnitudes:
                # transformers 5 needs the parameter's full name, and ignores the short one that PEFT writes.
                suffix = "lora_magnitude_vector.weight" if text_encoder else "lora_magnitude_vector"
                tensors[f"{key}.{suffix}"] = magnitudes[name]
        # transformers 5 has flattened CLIP: patterns without "text_model." match both layouts as name endings. Others
        # are anchored, because PEFT matches unanchored keys as endings of any name.
        names = {name: name.removeprefix("text_model.") if text_encoder else name for name in exported}
        ranks = {f"{'' if text_encoder else '^'}{names[name]}": f.lora_A.shape[0] for name, f in exported.items()}
        config = _minimal_config(ranks, sorted(names.values()), use_dora=bool(magnitudes))
        metadata |= {f"{component}.{key}": value for key, value in config.items()}
    blobs = {**_file_metadata(provenance), DIFFUSERS_METADATA_KEY: json.dumps(metadata, sort_keys=True)}
    path = Path(directory) / weight_name
    save_tensors(tensors, path, metadata=blobs)
    return path


def _minimal_config(ranks: Mapping[str, int], target_modules: Sequence[str] | str, use_dora: bool) -> dict[str, Any]:
    """A file's LoRA configuration, by the patterns of its layers' names: alpha is the rank in every layer.

    Exactly the fields that every PEFT release knows; above all no ``init_lora_weights`` that would run an
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
    }


def save_peft_lora(
    module: nn.Module,
    directory: str | Path,
    *,
    base_model: str | None = None,
    adapter_name: str = "default",
    full_modules: Sequence[str] = (),
    export_rank: int | None = None,
    pad_rank: int | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write a folder that PEFT's ``PeftModel.from_pretrained(base, directory)`` loads, exactly, on the original base.

    For models whose pipelines have no ``load_lora_weights`` (DiT, PixArt), and for those that have no pipeline;
    :func:`load_lora` reads it as well.

    Args:
        module: adapted.
        directory: created when missing; gets ``adapter_config.json`` and ``adapter_model.safetensors``.
        base_model: folder or hub name of the base, for the configuration.
        adapter_name: which adapter.
        full_modules: names of modules that were trained in full, such as a classifier's output layer; their weights
            are saved as they are (PEFT's ``modules_to_save``), and replace those of the base when it is loaded.
        export_rank: compress layers of a larger rank, as in :func:`exported_factors`.
        pad_rank: zero-pad every layer to this rank.
        provenance: how the file was made; JSON under a metadata key of our own, which loaders ignore.

    Returns:
        The folder.

    Raises:
        ValueError: as for :func:`save_diffusers_lora`; a module of ``full_modules`` that does not exist, or is adapted.
    """
    exported = exported_factors(module, adapter_name, export_rank=export_rank, pad_rank=pad_rank)
    whole = _full_modules(module, full_modules)
    magnitudes = _exported_magnitudes(module, adapter_name)
    tensors = {f"{PEFT_PREFIX}{name}.lora_A.weight": factors.lora_A for name, factors in exported.items()}
    tensors |= {f"{PEFT_PREFIX}{name}.lora_B.weight": factors.lora_B for name, factors in exported.items()}
    tensors |= {f"{PEFT_PREFIX}{name}.lora_magnitude_vector": magnitude for name, magnitude in magnitudes.items()}
    tensors |= {f"{PEFT_PREFIX}{key}": value for key, value in whole.items()}
    ranks = {f"^{re.escape(name)}": factors.lora_A.shape[0] for name, factors in exported.items()}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        **_minimal_config(ranks, exactly(exported), use_dora=bool(magnitudes)),
        **({"modules_to_save": list(full_modules)} if full_modules else {}),
    }
    directory = Path(directory)
    save_tensors(tensors, directory / PEFT_WEIGHT_NAME, metadata=_file_metadata(provenance))
    write_json(directory / PEFT_CONFIG_NAME, config)
    return directory


def _full_modules(module: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """The weights of modules that were trained in full, on the CPU."""
    inner = unwrap(module)
    known = dict(inner.named_modules())
    tensors: dict[str, Tensor] = {}
    for name in names:
        if name not in known:
            raise ValueError(f"{type(inner).__name__} has no module {name!r} that could have been trained in full")
        state = known[name].state_dict()
        if any("lora_" in key for key in state):
            raise ValueError(f"module {name!r} carries an adapter: it cannot be saved in full, too")
        tensors |= {f"{name}.{key}": value.detach().cpu().clone().contiguous() for key, value in state.items()}
    check_finite(tensors, "the LoRA")
    return tensors


def _file_metadata(provenance: Mapping[str, Any] | None) -> dict[str, str]:
    blobs = {"format": "pt"}
    if provenance is not None:
        blobs[PROVENANCE_KEY] = json.dumps(provenance, sort_keys=True)
    return blobs


def load_lora(
    module: nn.Module, path: str | Path, *, component: str | None = None, adapter_name: str = "default"
) -> None:
    """Put a saved LoRA into a model in place, so that its pipeline uses it.

    ::

        pipeline = DiTPipeline.from_pretrained("facebook/DiT-XL-2-256")
        load_lora(pipeline.transformer, "outputs/dit-lora")

    It is an active adapter afterwards; the base weights are untouched and frozen, and run alone in
    :func:`adapters_disabled`. Modules that were trained in full (a classifier's output layer) are the exception: their
    weights replace those of the base. Only safetensors files are read.

    Args:
        module: the base model (a pipeline's transformer or UNet, say) that the LoRA was made for.
        path: what :func:`save_peft_lora` or :func:`save_diffusers_lora` wrote: the folder, or the file in it.
        component: which component's layers to take from a file in the diffusers format (``"transformer"``,
            ``"unet"``, ...); needed only if it holds several.
        adapter_name: PEFT's name for the adapter, which the module must not carry yet.

    Raises:
        FileNotFoundError: no such file, or a folder that holds neither format.
        ValueError: the module carries such an adapter already; the file lacks the component, or holds something other
            than a LoRA; a layer that the module does not have, or of another shape. The module is then as it was.
    """
    if existing_adapter(module, adapter_name) is not None:
        raise ValueError(
            f"{type(module).__name__} already carries an adapter {adapter_name!r}; load into a fresh base, or give "
            "another adapter_name"
        )
    file = _lora_file(Path(path))
    with safe_open(file, framework="pt") as opened:
        keys, metadata = list(opened.keys()), opened.metadata() or {}
        if all(key.startswith(PEFT_PREFIX) for key in keys):
            prefix, config = PEFT_PREFIX, _peft_config(file)
        else:
            component = _component(file, keys, component)
            prefix, config = f"{component}.", {}
            for key, value in json.loads(metadata.get(DIFFUSERS_METADATA_KEY, "{}")).items():
                if key.startswith(prefix):
                    config[key.removeprefix(prefix)] = value
        tensors = {key.removeprefix(prefix): opened.get_tensor(key) for key in keys if key.startswith(prefix)}
    whole = _take_full_modules(module, tensors, config, file)
    entries: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        layer, found, entry = key.rpartition(".lora_")
        entry = entry.removesuffix(".weight")
        if not found or entry not in ("A", "B", "magnitude_vector"):
            raise ValueError(f"{str(file)!r} holds {key!r}, which is no part of a LoRA of linear layers")
        entries.setdefault(layer, {})[entry] = value
    linear = base_layers(module)
    weights: dict[str, AdapterWeights] = {}
    for saved_name, entry in entries.items():
        # transformers 5 has flattened CLIP, whose layers files nest under "text_model."
        name = saved_name if saved_name in linear else saved_name.removeprefix("text_model.")
        layer = linear.get(name)
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"{str(file)!r} adapts layer {saved_name!r}, but {type(unwrap(module)).__name__} has no such linear "
                "layer; load it into the model that it was trained on"
            )
        if "A" not in entry or "B" not in entry:
            raise ValueError(f"{str(file)!r} holds only part of the LoRA of layer {saved_name!r}; save it again")
        rows, columns = entry["B"].shape[0], entry["A"].shape[1]
        if (rows, columns) != (layer.out_features, layer.in_features):
            raise ValueError(
                f"the LoRA of layer {saved_name!r} in {str(file)!r} is for a weight of shape ({rows}, {columns}), but "
                f"that of {type(unwrap(module)).__name__} has ({layer.out_features}, {layer.in_features}); load it "
                "into the model that it was trained on"
            )
        weights[name] = AdapterWeights(
            LoraFactors(entry["A"], entry["B"]),
            scaling=_saved_scaling(config, saved_name, rank=entry["A"].shape[0]),
            magnitude=entry.get("magnitude_vector"),
        )
    if not weights:
        raise ValueError(f"{str(file)!r} holds no LoRA layers; save it again")
    attach(module, weights, adapter_name=adapter_name, use_dora=any(w.magnitude is not None for w in weights.values()))
    own = unwrap(module).state_dict()
    for key, value in whole.items():
        own[key].copy_(value)


def _take_full_modules(
    module: nn.Module, tensors: dict[str, Tensor], config: Mapping[str, Any], file: Path
) -> dict[str, Tensor]:
    """Take the weights of modules that were trained in full out of a file's tensors, and see that they fit."""
    names = tuple(f"{name}." for name in cast("list[str]", config.get("modules_to_save") or []))
    whole = {key: tensors.pop(key) for key in list(tensors) if names and key.startswith(names)}
    own, kind = unwrap(module).state_dict(), type(unwrap(module)).__name__
    for key, value in whole.items():
        if key not in own:
            raise ValueError(
                f"{str(file)!r} holds {key!r}, trained in full, but {kind} has no such weight; load it into the model "
                "that it was trained on"
            )
        if own[key].shape != value.shape:
            raise ValueError(
                f"{key!r}, trained in full, has shape {tuple(value.shape)} in {str(file)!r}, but "
                f"{tuple(own[key].shape)} in {kind}; load the base with as many labels as it was trained with "
                "(id2label, ignore_mismatched_sizes=True)"
            )
    return whole


def _lora_file(path: Path) -> Path:
    """The weights in a folder, or the file itself."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{str(path)!r} is no safetensors file, and no other format is read")
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"there is no LoRA at {str(path)!r}; give the folder that a run wrote, or a file in it")
    for file in (path / PEFT_WEIGHT_NAME, path / DIFFUSERS_WEIGHT_NAME):
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"folder {str(path)!r} holds neither {PEFT_WEIGHT_NAME} nor {DIFFUSERS_WEIGHT_NAME}; give the folder that a "
        "run wrote, or the file in it"
    )


def _peft_config(file: Path) -> dict[str, Any]:
    path = file.parent / PEFT_CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{PEFT_CONFIG_NAME} is missing beside {str(file)!r}: it says how the LoRA is scaled")
    return json.loads(path.read_text(encoding="utf-8"))


def _component(file: Path, keys: Iterable[str], component: str | None) -> str:
    """The component to take from a file in the diffusers format."""
    found = sorted({key.partition(".")[0] for key in keys})
    if any(name.startswith("lora_") for name in found):
        raise ValueError(f"{str(file)!r} is in kohya's format; give the file in the diffusers format instead")
    if component is None and len(found) == 1:
        return found[0]
    if component not in found:
        remedy = "say which one with component" if component is None else f"there is no {component!r}"
        raise ValueError(f"{str(file)!r} holds LoRAs of {', '.join(found)}: {remedy}")
    return component


def _saved_scaling(config: Mapping[str, Any], name: str, rank: int) -> float:
    """What multiplies B A by the file's configuration; 1 without one, and in all files that are written here."""
    if "lora_alpha" not in config:
        return 1.0
    patterns = cast("Mapping[str, float]", config.get("alpha_pattern") or {})
    matching = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", name))  # as PEFT does it
    alpha = float(next(matching, config["lora_alpha"]))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def save_merged(
    module: nn.Module,
    directory: str | Path,
    *,
    adapter_name: str = "default",
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write the whole model with the LoRA merged into its weights, as ``save_pretrained`` would without adapters.

    ``type(base).from_pretrained(directory)`` loads it, without PEFT. The weights are computed in float32 and rounded to
    the base's dtype, one layer at a time; the module stays as it is. Other adapters are left out.

    Args:
        module: adapted model of diffusers or transformers.
        directory: created when missing; gets ``config.json`` and the safetensors weights.
        adapter_name: which adapter.
        max_shard_size: largest size of one file, as in ``save_pretrained``.

    Returns:
        The folder.

    Raises:
        ValueError: the module carries no such adapter, its base is quantised, or it is of neither library; merged
            weights that are not finite, as where a sum exceeds what float16 can hold.
    """
    merged = adapter_weights(module, adapter_name)
    inner = unwrap(module)
    kind = type(inner).__name__
    for name, layer in lora_layers(module, adapter_name).items():
        weight = layer.get_base_layer().weight
        if getattr(inner, "hf_quantizer", None) is not None or not cast("Tensor", weight).is_floating_point():
            raise ValueError(
                f"layer {name!r} of {kind} is quantised, and a LoRA cannot be merged into it; save the LoRA, load it "
                "with load_lora into the base in bfloat16, and merge it there"
            )
    is_diffusers = hasattr(inner, "save_config")
    if not is_diffusers and not hasattr(getattr(inner, "config", None), "save_pretrained"):
        raise ValueError(f"{kind} is a model of neither diffusers nor transformers, which say how to save it")
    state = state_of_base(module)
    for name, adapter in merged.items():
        state[f"{name}.weight"] = _merged_weight(state[f"{name}.weight"], adapter)
    check_finite({f"{name}.weight": state[f"{name}.weight"] for name in merged}, "the merged model")
    for name in _tied_copies(inner, state):
        del state[name]
    stem = "diffusion_pytorch_model" if is_diffusers else "model"
    with filling(directory) as scratch:
        if is_diffusers:
            cast(Any, inner).save_config(scratch)
        else:
            config = copy.deepcopy(cast(Any, inner).config)
            config.architectures = [kind]
            config.save_pretrained(scratch)
        pattern = stem + "{suffix}.safetensors"
        save_torch_state_dict(state, scratch, filename_pattern=pattern, max_shard_size=max_shard_size)
        written = {path.name for path in scratch.iterdir()}
    shard = re.compile(rf"{stem}(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
    for path in Path(directory).iterdir():  # a model that was there in other pieces would be loaded in its place
        if shard.fullmatch(path.name) and path.name not in written:
            path.unlink()
    return Path(directory)


def _tied_copies(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Tensors that a model of transformers ties to another one, which is in the state, too, and loads without."""
    tied: Iterable[str] = getattr(model, "_tied_weights_keys", None) or ()  # patterns: a list, in transformers 5 a dict
    matching = {name for name in state if any(re.search(pattern, name) for pattern in tied)}
    kept = {tensor.data_ptr() for name, tensor in state.items() if name not in matching}
    return [name for name in matching if state[name].data_ptr() in kept]


def _merged_weight(weight: Tensor, adapter: AdapterWeights) -> Tensor:
    """The weight that a layer with this adapter acts as, in its own dtype, on the CPU."""
    delta = adapter.factors.lora_B.float() @ adapter.factors.lora_A.float()
    if adapter.offset is not None:
        delta -= adapter.offset.lora_B.float() @ adapter.offset.lora_A.float()
    merged = weight.detach().float() + adapter.scaling * delta
    if adapter.magnitude is not None:
        merged *= (adapter.magnitude.float() / torch.linalg.norm(merged, dim=1))[:, None]
    return merged.to(weight.dtype).cpu()


def save_kohya_lora(
    modules: Mapping[str, nn.Module],
    path: str | Path,
    *,
    adapter_name: str = "default",
    prefixes: Mapping[str, str] | None = None,
    sdxl: bool | None = None,
    export_rank: int | None = None,
    pad_rank: int | None = None,
) -> Path:
    """Write the kohya format that ComfyUI, A1111 and sd-scripts read: ``lora_down``, ``lora_up`` and ``alpha``.

    DoRA adds ``dora_scale`` (out_features, 1): ``W' = dora_scale * (W + up @ down) / ||W + up @ down||``, with one norm
    per row, as LyCORIS defines it with ``wd_on_output``. Readers differ: diffusers (0.42.1) drops the scale with a
    warning, and ComfyUI divides by the row norms of W alone (pull request 15458), so that the strength of trained DoRA
    layers is off there by the ratio of the two norms. The diffusers format has no such limit.

    Args:
        modules: component -> adapted module.
        path: of the ``.safetensors`` file.
        adapter_name: which adapter.
        prefixes: component -> key prefix; when left out, :data:`kohya.PREFIXES` or :data:`kohya.SDXL_PREFIXES`.
        sdxl: use SDXL's prefixes and the original UNet's layer names (see :mod:`kohya`). When left out: if there is a
            ``text_encoder_2``, or the UNet's ``addition_embed_type`` is ``"text_time"``; SDXL's first text encoder
            alone needs it said.
        export_rank: compress layers of a larger rank, as in :func:`exported_factors`.
        pad_rank: zero-pad every layer to this rank. diffusers' own converter (0.42.1) takes one alpha for all layers
            and so needs it for variable ranks; ComfyUI, A1111 and sd-scripts do not.

    Raises:
        ValueError: a component without a prefix; an SDXL layer that the original UNet does not have; ``export_rank``
            below 1; ``pad_rank`` smaller than the rank that a layer has left.
    """
    configs = {component: getattr(unwrap(module), "config", None) for component, module in modules.items()}
    if sdxl is None:
        text_time = getattr(configs.get("unet"), "addition_embed_type", None) == "text_time"
        sdxl = text_time or "text_encoder_2" in modules
    if prefixes is None:
        prefixes = kohya.SDXL_PREFIXES if sdxl else kohya.PREFIXES
    tensors: dict[str, Tensor] = {}
    for component, module in modules.items():
        if component not in prefixes:
            raise ValueError(f"component {component!r} has no kohya key prefix; known: {', '.join(sorted(prefixes))}")
        exported = exported_factors(module, adapter_name, export_rank=export_rank, pad_rank=pad_rank)
        magnitudes = _exported_magnitudes(module, adapter_name)
        for name, factors in exported.items():
            if component.startswith("text_encoder"):
                file_name = _text_model_name(name)
            elif component == "unet" and sdxl:
                file_name = kohya.sgm_layer_name(name, _layers_per_block(configs[component]))
            else:
                file_name = name
            key = f"{prefixes[component]}_{file_name.replace('.', '_')}"
            tensors |= {
                f"{key}.lora_down.weight": factors.lora_A,
                f"{key}.lora_up.weight": factors.lora_B,
                f"{key}.alpha": torch.tensor(float(factors.lora_A.shape[0])),
            }
            if name in magnitudes:
                tensors[f"{key}.dora_scale"] = magnitudes[name][:, None]
    path = Path(path)
    save_tensors(tensors, path, metadata={"format": "pt"})
    return path


def _layers_per_block(config: Any) -> list[int]:
    """Resnets of each down block of a ``UNet2DConditionModel``."""
    layers = config.layers_per_block
    return [layers] * len(config.down_block_types) if isinstance(layers, int) else list(layers)


def _exported_magnitudes(module: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """(out_features,) DoRA magnitudes by layer name, float32, on the CPU; nothing without DoRA."""
    magnitudes = {
        name: weights.magnitude.float().cpu()
        for name, weights in adapter_weights(module, adapter_name).items()
        if weights.magnitude is not None
    }
    check_finite({f"{name}.magnitude": value for name, value in magnitudes.items()}, "the LoRA")
    return magnitudes


def _text_model_name(name: str) -> str:
    """The layer's name as files have it: transformers before 5 nests CLIP's layers under ``text_model``."""
    # The projection stands beside the text model, not in it.
    return name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"


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
