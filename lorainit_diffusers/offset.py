"""The offset of an adapter: initial factors that it subtracts for ever, as part of the adapter itself.

An initialisation with B A != 0 that must keep the base model's function adds `scaling * (B A - B0 A0)`. The frozen
factors live inside the two modules that PEFT runs, `lora_B(lora_A(dropout(x)))`: the first gives A x and A0 x side by
side, the second B A x - B0 A0 x. So there is no second adapter that has to be named, switched, scaled, moved or deleted
with the first, and no order in which other adapters stand beside it.

To everything that reads or writes a state dict, the adapter is an ordinary LoRA of rank r + r0, `[A; A0]` and
`[B, -B0]`: what PEFT and diffusers save is right on the original base, and loads back into both parts, bit for bit.

`.to(bfloat16)` of the whole model leaves these factors in float32: the two products nearly cancel, and their rounding
would be as large as what was trained. PEFT computes in the dtype of the factors, whatever that of the base is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lorainit_diffusers.methods.base import LoraFactors


class _OffsetFactor(nn.Linear):
    """A factor whose `weight` is trained, with the frozen initial one beside it."""

    frozen: Tensor
    rank_dim: int
    sign: float

    def initial(self) -> Tensor:
        """The frozen factor, in the dtype of the trained one."""
        # Whoever casts the trained factor by hand gets the same rounding in both, and so the base model at step 0.
        return self.frozen if self.frozen.dtype == self.weight.dtype else self.frozen.to(self.weight.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def at_least_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            rounds = moved.is_floating_point() and moved.itemsize < 4 <= tensor.itemsize
            return tensor.to(device=moved.device, dtype=torch.float32) if rounds else moved

        return super()._apply(at_least_float32, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self.weight if keep_vars else self.weight.detach()
        destination[f"{prefix}weight"] = torch.cat([weight, self.sign * self.initial()], dim=self.rank_dim)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key, own = f"{prefix}weight", self.weight.shape[self.rank_dim]
        whole = state_dict.get(key)
        if whole is not None:
            expected = list(self.weight.shape)
            expected[self.rank_dim] += self.frozen.shape[self.rank_dim]
            if list(whole.shape) != expected:
                error_msgs.append(
                    f"{key} has shape {tuple(whole.shape)}, but this adapter has an offset and needs "
                    f"{tuple(expected)}: its own factors and the initial ones; load the file into a model without an "
                    "adapter"
                )
                return
            trained, frozen = (
                part.contiguous() for part in whole.split([own, expected[self.rank_dim] - own], dim=self.rank_dim)
            )
            state_dict = {**state_dict, key: trained}
            value = (self.sign * frozen).to(torch.float32)
            if self.frozen.is_meta or local_metadata.get("assign_to_params_buffers", False):
                self.frozen = value
            else:
                with torch.no_grad():
                    self.frozen.copy_(value)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class OffsetA(_OffsetFactor):
    """x -> [A d(x), A0 x]. Dropout d is the adapter's noise: the constant part sees x as it is."""

    rank_dim, sign = 0, 1.0
    dropout: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """The two products side by side, (..., r + r0)."""
        if input.dtype != self.weight.dtype and not torch.is_autocast_enabled(input.device.type):
            input = input.to(self.weight.dtype)
        return torch.cat([linear(self.dropout(input), self.weight), linear(input, self.initial())], dim=-1)


class OffsetB(_OffsetFactor):
    """[h, h0] -> B h - B0 h0, with the bias of B, if any. Equal factors give zero, bit for bit."""

    rank_dim, sign = 1, -1.0

    def forward(self, input: Tensor) -> Tensor:
        """The difference of the two products, (..., out_features)."""
        own, initial = input.split([self.weight.shape[1], self.frozen.shape[1]], dim=-1)
        return linear(own, self.weight, self.bias) - linear(initial, self.initial())


class _LayerWithOffset:
    """What PEFT's layer needs beside the two factors: it merges from their weights and not through them."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        layer = cast(Any, self)
        delta: Tensor = cast(Any, super()).get_delta_weight(adapter)
        offset = get_offset(layer, adapter)
        if offset is None:
            return delta
        product = (offset.lora_B.float() @ offset.lora_A.float()) * layer.scaling[adapter]
        return delta - (product.mT if getattr(layer, "fan_in_fan_out", False) else product).to(delta.dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restore, (type(self).__mro__[2],), self.__dict__.copy()


@cache
def _with_offset(kind: type) -> type:
    """PEFT's class of a layer with the offset in its delta, under its own name."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (_LayerWithOffset, kind), names)


def _restore(kind: type) -> Any:
    return object.__new__(_with_offset(kind))


def get_offset(layer: Any, adapter_name: str) -> LoraFactors | None:
    """The factors whose product this adapter subtracts in a PEFT layer, as it uses them, or `None`."""
    lora_A, lora_B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    if not isinstance(lora_A, OffsetA) or not isinstance(lora_B, OffsetB):
        return None
    return LoraFactors(lora_A.initial(), lora_B.initial())


def set_offset(layer: Any, adapter_name: str, offset: LoraFactors | None) -> None:
    """Give an adapter of a PEFT layer this offset, or none, in place: its modules and parameters keep their identity.

    Args:
        layer: PEFT's LoRA layer of a linear layer.
        adapter_name: One that the layer carries.
        offset: A0 (r0, in_features) and B0 (out_features, r0), copied; the layer's scaling multiplies their product.
    """
    lora_A: Any = layer.lora_A[adapter_name]
    lora_B: Any = layer.lora_B[adapter_name]
    factors: tuple[Any, Any] = (lora_A, lora_B)
    if offset is None:
        if isinstance(lora_A, OffsetA):
            layer.lora_dropout[adapter_name] = lora_A.dropout
            del lora_A.dropout
            for factor in factors:
                del factor.frozen
                factor.__class__ = nn.Linear
        return
    if not isinstance(lora_A, OffsetA):
        lora_A.__class__, lora_B.__class__ = OffsetA, OffsetB
        lora_A.dropout = layer.lora_dropout[adapter_name]
        layer.lora_dropout[adapter_name] = nn.Identity()
    if not isinstance(layer, _LayerWithOffset):
        layer.__class__ = _with_offset(type(layer))
    for factor, value in zip(factors, offset, strict=True):
        # contiguous, as a resumed run has them: products of other layouts round otherwise
        value = value.detach().to(device=factor.weight.device, dtype=torch.float32)
        factor.register_buffer("frozen", value.clone(memory_format=torch.contiguous_format), persistent=False)
