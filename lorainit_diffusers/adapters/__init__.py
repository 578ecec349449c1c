"""PEFT adapters: put factors into a model, keep them exact, read them out. The only package that imports peft.

A module may come raw, after diffusers' or transformers' `add_adapter`, or wrapped by `get_peft_model`; the layers
that PEFT injects are the same in all three, and everything here works on those.

**Offset.** An initialisation with B A != 0 that must keep the base model's function has frozen factors in the adapter
itself, which then adds `scaling * (B A - B0 A0)` (see `offset`). Base weights are never
written. The frozen factors are buffers, so no `requires_grad_`, `set_adapter` or `enable_adapters` can make them
trainable, and no optimiser can find them.

**DoRA** (arXiv:2402.09353, PEFT's `use_dora`). A layer's weight is `m (W + scaling * B A) / ||W + scaling * B A||`
with one norm per row and a trainable magnitude m, which starts as the norms of W. Folding the scaling into B leaves
that as it is. With an offset the sum would no longer have this form, so DoRA and the offset exclude each other.
"""

from __future__ import annotations

from lorainit_diffusers.adapters.attaching import (
    attach,
    exactly,
)
from lorainit_diffusers.adapters.layers import (
    PACKED_PARAMETER,
    adapters_disabled,
    base_layers,
    base_weight,
    check_beside,
    check_plain,
    config_of,
    default_config,
    existing_adapter,
    lora_layers,
    state_of_base,
    target_layers,
    unwrap,
)
from lorainit_diffusers.adapters.state import (
    TRAINED_SUFFIX,
    adapter_state_dict,
    adapter_weights,
    load_adapter_state_dict,
    trainable_beside,
    trainable_parameters,
    trained_tensors,
)
from lorainit_diffusers.adapters.weights import (
    AdapterWeights,
    ExistingAdapter,
)

__all__ = [
    "PACKED_PARAMETER",
    "TRAINED_SUFFIX",
    "AdapterWeights",
    "ExistingAdapter",
    "adapter_state_dict",
    "adapter_weights",
    "adapters_disabled",
    "attach",
    "base_layers",
    "base_weight",
    "check_beside",
    "check_plain",
    "config_of",
    "default_config",
    "exactly",
    "existing_adapter",
    "load_adapter_state_dict",
    "lora_layers",
    "state_of_base",
    "target_layers",
    "trainable_beside",
    "trainable_parameters",
    "trained_tensors",
    "unwrap",
]
