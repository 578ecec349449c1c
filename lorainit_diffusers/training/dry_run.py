"""What `--dry_run` prints: what would be trained, and an estimate of the memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorainit_diffusers import adapters
from lorainit_diffusers.families.base import ModelFamily
from lorainit_diffusers.training.loop import enable_gradient_checkpointing
from lorainit_diffusers.training.run import Run

# Bytes of optimiser state for each trained parameter.
OPTIMIZER_BYTES = {"adamw": 8, "sgd": 0, "prodigy": 16}
EIGHT_BIT_ADAM_BYTES = 2


def print_plan(run: Run[Any], family: ModelFamily, sample: Any, num_samples: int) -> None:
    """Say what would be trained: layers, ranks, parameters, and an estimate of the memory.

    The activations are measured: the bytes that one forward pass of one sample keeps for the backward pass.

    Args:
        run: The run.
        family: The base, with adapters.
        sample: A batch of one sample, as `family.loss` takes it.
        num_samples: In a batch of the training.
    """
    options = run.options
    # all modules of the base, those without adapters included
    modules: Mapping[str, nn.Module] = getattr(family, "modules", family.adapted)
    total = factors = 0
    print(f"{'layer':80s} {'rank':>5s} {'parameters':>11s}")
    for component, module in family.adapted.items():
        for name, layer in adapters.adapter_weights(module).items():
            count = sum(tensor.numel() for tensor in (*layer.factors, layer.magnitude) if tensor is not None)
            factors += sum(tensor.numel() for tensor in layer.factors)
            total += count
            print(f"{component + '.' + name:80s} {layer.factors.lora_A.shape[0]:5d} {count:11,d}")
    for name, head in family.heads.items():
        count = sum(parameter.numel() for parameter in head.parameters())
        total += count
        print(f"{name:80s}  full {count:11,d}")
    print(f"{total:,d} trained parameters, to be initialised by {options.init}")

    device = next(p.device for module in family.adapted.values() for p in module.parameters())
    frozen = sum(
        p.numel() * p.element_size()
        for module in modules.values()
        for name, p in module.named_parameters()
        if ".lora_" not in name and p.device == device  # --offload keeps some elsewhere
    )
    activations = _activation_bytes(options.gradient_checkpointing, family, modules, sample)
    slots = EIGHT_BIT_ADAM_BYTES if options.use_8bit_adam else OPTIMIZER_BYTES[options.optimizer]
    parts = {
        "base model": frozen,
        "trained weights and gradients": 8 * total,
        "frozen twin": 4 * factors if run.method.step_zero == "offset" else 0,
        f"optimiser ({'8-bit ' if options.use_8bit_adam else ''}{options.optimizer})": slots * total,
        "moving average": 4 * total if options.use_ema else 0,
        f"activations ({num_samples} samples)": num_samples * activations,
    }
    print(f"memory on {device}, estimated (without the buffers of kernels, collection and sampling):")
    for what, size in {**{w: s for w, s in parts.items() if s}, "together": sum(parts.values())}.items():
        print(f"  {what:32s} {size / 2**20:12,.3f} MiB")


def _activation_bytes(checkpointing: bool, family: ModelFamily, modules: Mapping[str, nn.Module], sample: Any) -> int:
    weights = {p.untyped_storage().data_ptr() for module in modules.values() for p in module.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    if checkpointing:
        enable_gradient_checkpointing(family)
    for module in family.adapted.values():
        module.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = family.loss(sample, torch.Generator().manual_seed(0))  # held, so that no storage is used twice
    size = sum(kept.values())
    del loss
    return size
