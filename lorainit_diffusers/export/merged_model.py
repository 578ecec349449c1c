"""The whole model with the LoRA merged into its weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from lorainit_diffusers.adapters import (
    AdapterWeights,
    adapter_weights,
    lora_layers,
    state_of_base,
    trained_tensors,
    unwrap,
)
from lorainit_diffusers.export.factors import check_not_rounded
from lorainit_diffusers.files import filling
from lorainit_diffusers.finite import check_finite
from lorainit_diffusers.trained import merged_rows


def save_merged(
    module: nn.Module,
    directory: str | Path,
    *,
    adapter_name: str = "default",
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write the whole model with the LoRA merged into its weights, as `save_pretrained` would without adapters.

    `type(base).from_pretrained(directory)` loads it, without PEFT. The weights are computed in float32 and rounded to
    the base's dtype, one layer at a time; the module stays as it is. Other adapters are left out.

    Args:
        module: Adapted model of diffusers or transformers.
        directory: Created when missing; gets `config.json` and the safetensors weights.
        adapter_name: Which adapter.
        max_shard_size: Largest size of one file, as in `save_pretrained`.

    Returns:
        The folder.

    Raises:
        ValueError: The module carries no such adapter, its base is quantised, or it is of neither library; merged
            weights that are not finite, as where a sum exceeds what float16 can hold.
    """
    merged = adapter_weights(module, adapter_name)
    for name, weights in merged.items():
        check_not_rounded(name, weights)
    inner = unwrap(module)
    kind = type(inner).__name__
    for name, layer in lora_layers(module, adapter_name).items():
        weight = layer.get_base_layer().weight
        if getattr(inner, "hf_quantizer", None) is not None or not cast("Tensor", weight).is_floating_point():
            raise ValueError(
                f"layer {name!r} of {kind} is quantised, and a LoRA cannot be merged into it; save the LoRA, load it "
                "with load_lora into the base in bfloat16, and merge it there"
            )
    state = state_of_base(module)
    for name, adapter in merged.items():
        if adapter.bias is not None and f"{name}.bias" not in state:
            raise ValueError(
                f"layer {name!r} of {kind} has no bias that could take up the one of LoraConfig's lora_bias; save the "
                "LoRA with save_peft_lora"
            )
    is_diffusers = hasattr(inner, "save_config")
    if not is_diffusers and not hasattr(getattr(inner, "config", None), "save_pretrained"):
        raise ValueError(f"{kind} is a model of neither diffusers nor transformers, which say how to save it")
    for name, adapter in merged.items():
        state[f"{name}.weight"] = _merged_weight(state[f"{name}.weight"], adapter)
        if adapter.bias is not None:
            bias = state[f"{name}.bias"]
            state[f"{name}.bias"] = (bias.detach().float() + adapter.scaling * adapter.bias.float()).to(bias).cpu()
    for item in trained_tensors(module, adapter_name):
        if item.field != "bias":  # which PEFT trains in place
            rows = item.field == "trainable_token_indices"
            value = merged_rows(inner, item.base_name, adapter_name) if rows else item.value
            state[item.base_name] = value.detach().cpu().contiguous()
    changed = {
        name: state[name] for adapted in merged for name in (f"{adapted}.weight", f"{adapted}.bias") if name in state
    }
    check_finite(changed, "the merged model")
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
