"""Exact adapters in the checkpoints that `accelerate` writes for a script of your own.

`accelerator.save_state` writes the modules that it prepared, unless the script's own hooks write PEFT's adapter in
their place, as diffusers' DreamBooth script does, in whatever form and dtype they choose. The hooks here write and read
one more file in every checkpoint folder, exact in every bit, whatever the others do.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import nn

from lorainit_diffusers.adapters import adapter_state_dict, load_adapter_state_dict
from lorainit_diffusers.files import save_tensors
from lorainit_diffusers.finite import check_finite

# diffusers, given a folder of LoRA weights, passes over safetensors files with "checkpoint" in their name.
ADAPTER_STATE_NAME = "lorainit_checkpoint.safetensors"
# These shard the parameters, or train copies of their own.
UNSUPPORTED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def register_checkpoint_hooks(
    accelerator: Accelerator, modules: Mapping[str, nn.Module], adapter_name: str = "default"
) -> None:
    """Make `accelerator.save_state` and `load_state` keep the adapters exactly, offsets included.

    Call it after `initialize` and after the script's own hooks are registered
    (they run in the order of registration, and this one has the last word). `load_state` puts the saved values into the
    parameters that the optimizer holds.

    Args:
        accelerator: Of the script.
        modules: Component (`"unet"`, `"text_encoder"`, ...) -> adapted module, before or after `prepare`; a family's
            `adapted`.
        adapter_name: PEFT's name of the adapter.

    Raises:
        ValueError: A module carries no such adapter, or the processes shard the parameters. `load_state` then raises it
            for a checkpoint that lacks the file, or that another base or other ranks wrote.
    """
    if accelerator.distributed_type in UNSUPPORTED:
        raise ValueError(
            f"checkpoint hooks need whole parameters, which {accelerator.distributed_type.value} does not keep; "
            "launch one process, or data parallelism (MULTI_GPU)"
        )
    # A module without the adapter is refused now, not at the first checkpoint.
    adapter_state_dict(_unwrapped(accelerator, modules), adapter_name)

    # Neither hook touches `models` and `weights`: those are for the script's own hooks, which empty them.
    def save_adapters(models: list[nn.Module], weights: list[dict[str, torch.Tensor]], output_dir: str) -> None:
        write_adapters(accelerator, _unwrapped(accelerator, modules), output_dir, adapter_name)

    def load_adapters(models: list[nn.Module], input_dir: str) -> None:
        if not (Path(input_dir) / ADAPTER_STATE_NAME).is_file():
            raise ValueError(
                f"checkpoint {os.fspath(input_dir)!r} has no {ADAPTER_STATE_NAME}, so its initial factors are lost; "
                "resume from a checkpoint saved after register_checkpoint_hooks, or start anew"
            )
        read_adapters(_unwrapped(accelerator, modules), input_dir, adapter_name)

    accelerator.register_save_state_pre_hook(save_adapters)
    accelerator.register_load_state_pre_hook(load_adapters)


def write_adapters(
    accelerator: Accelerator, modules: Mapping[str, nn.Module], directory: str | Path, adapter_name: str = "default"
) -> None:
    """Write the adapters of unwrapped modules into a checkpoint, exactly, on the process that writes it."""
    on_each_node = accelerator.project_configuration.save_on_each_node
    if accelerator.is_local_main_process if on_each_node else accelerator.is_main_process:
        state = adapter_state_dict(modules, adapter_name)
        check_finite(state, f"the checkpoint {os.fspath(directory)!r}")
        save_tensors(state, Path(directory) / ADAPTER_STATE_NAME)


def read_adapters(
    modules: Mapping[str, nn.Module],
    directory: str | Path,
    adapter_name: str = "default",
    *,
    same_ranks: bool = True,
) -> None:
    """Put the adapters of a checkpoint into the parameters that the optimizer holds.

    Args:
        modules: Component -> unwrapped module.
        directory: Of the checkpoint.
        adapter_name: PEFT's name of the adapter.
        same_ranks: Refuse other ranks. Without it the parameters get the shapes of the checkpoint, which only an
            optimizer without state and one process can follow.

    Raises:
        ValueError: Another base, or other ranks, wrote it.
    """
    path = Path(directory) / ADAPTER_STATE_NAME
    state = load_file(path)
    for key, value in adapter_state_dict(modules, adapter_name).items():
        if not key.endswith((".lora_A", ".lora_B")):
            continue
        features = 1 if key.endswith(".lora_A") else 0
        if not same_ranks and (key not in state or state[key].shape[features] == value.shape[features]):
            continue
        # The optimizer holds the live parameters, which another shape would replace.
        if key not in state or state[key].shape != value.shape:
            saved = tuple(state[key].shape) if key in state else "missing"
            raise ValueError(
                f"{path}: {key} is {saved}, this run's is {tuple(value.shape)}; "
                "resume with the base, rank and target_modules of the run that wrote it"
            )
    load_adapter_state_dict(modules, state, adapter_name)


def _unwrapped(accelerator: Accelerator, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    def unwrap(module: Any) -> nn.Module:
        module = accelerator.unwrap_model(module)
        return getattr(module, "_orig_mod", module)  # torch.compile's wrapper prefixes the layers' names

    return {component: unwrap(module) for component, module in modules.items()}
