"""The file that ComfyUI, A1111 and sd-scripts read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorainit_diffusers.adapters import check_beside, unwrap
from lorainit_diffusers.export import kohya_names
from lorainit_diffusers.export.factors import check_holds, exported_factors, exported_magnitudes, text_model_name
from lorainit_diffusers.files import save_tensors


def save_kohya_lora(
    target: Mapping[str, nn.Module] | Any,
    path: str | Path,
    *,
    adapter_name: str = "default",
    prefixes: Mapping[str, str] | None = None,
    sdxl: bool | None = None,
    export_rank: int | None = None,
    pad_rank: int | None = None,
) -> Path:
    """Write the kohya format that ComfyUI, A1111 and sd-scripts read: `lora_down`, `lora_up` and `alpha`.

    DoRA adds `dora_scale` (out_features, 1): `W' = dora_scale * (W + up @ down) / ||W + up @ down||`, with one norm
    per row, as LyCORIS defines it with `wd_on_output`. Readers differ: diffusers (0.42.1) drops the scale with a
    warning, and ComfyUI divides by the row norms of W alone (pull request 15458), so that the strength of trained DoRA
    layers is off there by the ratio of the two norms. The diffusers format has no such limit.

    Args:
        target: Component -> adapted module; or a model family.
        path: Of the `.safetensors` file.
        adapter_name: Which adapter.
        prefixes: Component -> key prefix; when left out, `kohya_names.PREFIXES` or
            `kohya_names.SDXL_PREFIXES`.
        sdxl: Use SDXL's prefixes and the original UNet's layer names (see `kohya_names`). When left out: if there
            is a `text_encoder_2`, or the UNet's `addition_embed_type` is `"text_time"`; SDXL's first text encoder
            alone needs it said.
        export_rank: Compress layers of a larger rank, as in `exported_factors`.
        pad_rank: Zero-pad every layer to this rank. diffusers' own converter (0.42.1) takes one alpha for all layers
            and so needs it for variable ranks; ComfyUI, A1111 and sd-scripts do not.

    Raises:
        ValueError: A component without a prefix; an SDXL layer that the original UNet does not have; `export_rank`
            below 1; `pad_rank` smaller than the rank that a layer has left; what the format cannot hold
            (`lora_bias`, `bias`, `modules_to_save`, `trainable_token_indices` of `LoraConfig`); another
            component of the family that carries an adapter.
    """
    modules: Mapping[str, nn.Module] = getattr(target, "adapted", target)
    check_beside(modules, adapter_name)
    configs = {component: getattr(unwrap(module), "config", None) for component, module in modules.items()}
    if sdxl is None:
        text_time = getattr(configs.get("unet"), "addition_embed_type", None) == "text_time"
        sdxl = text_time or "text_encoder_2" in modules
    if prefixes is None:
        prefixes = kohya_names.SDXL_PREFIXES if sdxl else kohya_names.PREFIXES
    tensors: dict[str, Tensor] = {}
    for component, module in modules.items():
        if component not in prefixes:
            raise ValueError(f"component {component!r} has no kohya key prefix; known: {', '.join(sorted(prefixes))}")
        check_holds(module, adapter_name, "the kohya format")
        exported = exported_factors(module, adapter_name, export_rank=export_rank, pad_rank=pad_rank)
        magnitudes = exported_magnitudes(module, adapter_name)
        for name, factors in exported.items():
            if component.startswith("text_encoder"):
                file_name = text_model_name(name)
            elif component == "unet" and sdxl:
                file_name = kohya_names.sgm_layer_name(name, _layers_per_block(configs[component]))
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
    """Resnets of each down block of a `UNet2DConditionModel`."""
    layers = config.layers_per_block
    return [layers] * len(config.down_block_types) if isinstance(layers, int) else list(layers)
