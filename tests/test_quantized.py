"""Quantised bases: packed weights are observed, differentiated, dequantised and adapted as what they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from core_fixtures import ATTENTION_LAYERS, product, relative_error, squared_loss, tiny_attention, token_batches
from safetensors.torch import load_file
from torch import Tensor, nn

from lorainit_diffusers import METHODS, adapter_state_dict, initialize, load_adapter_state_dict, make_method
from lorainit_diffusers.adapters import adapter_weights, base_weight, lora_layers, trainable_parameters
from lorainit_diffusers.collect import PassOptions, collect
from lorainit_diffusers.export import save_diffusers_lora
from lorainit_diffusers.hooks import observe_weight_gradients
from lorainit_diffusers.quantized import is_packed, undo_cpu_packing
from lorainit_diffusers.statistics import GradientMean
from lorainit_diffusers.training_step import TrainingStep

TARGETS = list(ATTENTION_LAYERS)
SIZES = {"features": 64, "hidden": 128}  # whole blocks of 64, which bitsandbytes' CPU kernel needs


class PackedLinear(nn.Linear):
    """Two numbers a byte: enough like a 4-bit layer for hooks, with a forward pass that autograd can go through."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.step = float(linear.weight.detach().abs().max()) / 7
        codes = (linear.weight.detach() / self.step).round().clamp(-7, 7).to(torch.int64) + 8
        self.weight = nn.Parameter((codes[:, ::2] * 16 + codes[:, 1::2]).to(torch.uint8), requires_grad=False)
        self.bias.data.copy_(linear.bias.detach())

    def dense(self) -> Tensor:
        codes = torch.stack([self.weight.data // 16, self.weight.data % 16], dim=-1).flatten(1)
        return (codes.float() - 8) * self.step

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.dense().to(input.dtype), self.bias)


def packed_and_dense() -> tuple[nn.Module, nn.Module]:
    """One model twice: with packed weights, and with the weights that these stand for."""
    packed, dense = tiny_attention(**SIZES).eval(), tiny_attention(**SIZES).eval()
    for name in TARGETS:
        setattr(packed, name, PackedLinear(getattr(packed, name)))
        getattr(dense, name).weight.data.copy_(getattr(packed, name).dense())
    return packed, dense


def layers_of(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: getattr(module, name) for name in TARGETS}


def gradients_of(module: nn.Module, batches: list[Tensor]) -> dict[str, Any]:
    return collect(
        {"": module},
        layers_of(module),
        batches,
        TrainingStep(squared_loss(module)),
        lambda name, layer: GradientMean((layer.out_features, layer.in_features)),
        PassOptions("gradients", progress=False),
    ).statistics


def test_packed_weights_are_told_from_plain_ones():
    packed, dense = packed_and_dense()
    assert all(is_packed(layer) for layer in layers_of(packed).values())
    assert not any(is_packed(layer) for layer in layers_of(dense).values())
    assert not is_packed(nn.Linear(4, 4, dtype=torch.bfloat16))
    in_bfloat16 = nn.Linear(8, 4)
    in_bfloat16.weight = nn.Parameter(torch.zeros(16, 1, dtype=torch.bfloat16))  # 4 bits in another storage type
    assert is_packed(in_bfloat16)


def test_gradients_of_packed_weights_equal_those_of_the_weights_they_stand_for():
    packed, dense = packed_and_dense()
    batches = token_batches(3, features=64)
    found, expected = gradients_of(packed, batches), gradients_of(dense, batches)
    for name in TARGETS:
        assert found[name].num_rows == 3
        assert relative_error(found[name].mean(), expected[name].mean()) < 1e-5


def test_packed_and_plain_layers_mix():
    packed, dense = packed_and_dense()
    packed.to_v, packed.up = dense.to_v, dense.up
    batches = token_batches(2, features=64)
    found, expected = gradients_of(packed, batches), gradients_of(dense, batches)
    for name in TARGETS:
        assert relative_error(found[name].mean(), expected[name].mean()) < 1e-5


def test_a_packed_layer_called_twice_gives_one_gradient_the_sum_and_no_hook_stays():
    plain = nn.Linear(8, 8)
    layer = PackedLinear(plain)
    plain.weight.data.copy_(layer.dense())
    x, seen = torch.randn(2, 3, 8), []
    (expected,) = torch.autograd.grad(plain(plain(x)).square().sum(), [plain.weight])
    with observe_weight_gradients({"layer": layer}, lambda _, gradient: seen.append(gradient.clone())) as leaves:
        layer(input=layer(x)).square().sum().backward(inputs=leaves)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], expected)
    assert not layer._forward_hooks
    assert not layer.weight.requires_grad
    assert not layer(x).requires_grad or layer.bias.requires_grad


@pytest.mark.parametrize("moment", ["forward", "backward", "between"])
def test_no_hook_of_a_packed_layer_stays_after_an_exception(moment: str):
    layer, seen = PackedLinear(nn.Linear(8, 8)), []

    def fail(*_: Any) -> None:
        raise RuntimeError("broken")

    def run() -> None:
        with observe_weight_gradients({"layer": layer}, fail if moment == "backward" else seen.append) as leaves:
            output = layer(torch.randn(2, 8) if moment != "forward" else torch.randn(2, 7))
            if moment == "between":
                fail()
            output.square().sum().backward(inputs=leaves)

    with pytest.raises(RuntimeError, match="broken" if moment != "forward" else "shapes cannot be multiplied"):
        run()
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
    layer.bias.requires_grad_(False)
    assert not layer(torch.randn(2, 8)).requires_grad
    assert seen == []


def test_another_kind_of_packed_layer_is_refused_by_name():
    packed, _ = packed_and_dense()
    with pytest.raises(ValueError, match=r"layer 'to_q' is a PackedLinear, whose packed weight cannot be read.*4 bits"):
        initialize(packed, "eva", [], lambda batch: batch, rank=4, target_modules=TARGETS)


# --- bitsandbytes ---------------------------------------------------------------------------------------------------


@pytest.fixture
def quantised() -> tuple[nn.Module, nn.Module]:
    """A model in NF4 as loaders leave it, and the dense one with the dequantised weights."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    module, dense = tiny_attention(**SIZES).eval(), tiny_attention(**SIZES).eval()
    for name in TARGETS:
        plain = getattr(module, name)
        layer = bitsandbytes.nn.Linear4bit(
            plain.in_features, plain.out_features, compute_dtype=torch.float32, quant_type="nf4"
        )
        layer.load_state_dict(plain.state_dict())
        setattr(module, name, layer)
    module.to("cpu").requires_grad_(False).eval()  # quantises
    module.is_loaded_in_4bit = True
    for _ in range(2):  # the second time, with block scales that a first inference has rounded
        module(token_batches(1, features=64)[0])
        undo_cpu_packing(module)
    for name in TARGETS:
        getattr(dense, name).weight.data.copy_(base_weight(getattr(module, name)))
    return module, dense.requires_grad_(False)


def test_inference_does_not_change_what_is_read_from_a_4_bit_weight(quantised):
    """On some CPUs bitsandbytes repacks the weights in the first inference, and dequantises them wrongly after it."""
    module, dense = quantised
    original = tiny_attention(**SIZES)
    for name in TARGETS:
        assert relative_error(getattr(dense, name).weight, getattr(original, name).weight) < 0.12  # 4 bits
    with torch.no_grad():
        module(token_batches(1, features=64)[0])
    for name in TARGETS:
        torch.testing.assert_close(base_weight(getattr(module, name)), getattr(dense, name).weight)


def test_gradients_of_4_bit_weights_equal_those_of_the_dequantised_ones(quantised):
    module, dense = quantised
    batches = token_batches(2, features=64)
    with torch.no_grad():
        module(batches[0])  # some CPUs' inference kernel has no backward pass
    found, expected = gradients_of(module, batches), gradients_of(dense, batches)
    for name in TARGETS:
        assert relative_error(found[name].mean(), expected[name].mean()) < 2e-2  # the CPU kernel computes in bfloat16


@pytest.mark.parametrize("name", METHODS)
def test_every_method_starts_a_4_bit_base_as_it_starts_the_dequantised_one(quantised, name):
    module, dense = quantised
    batches = token_batches(2, features=64)
    with torch.no_grad():
        base = module(batches[0])
    for target in (module, dense):
        initialize(target, name, batches, squared_loss(target), rank=4, target_modules=TARGETS, progress=False)
    found, expected = lora_layers(module), lora_layers(dense)
    for key in TARGETS:
        assert type(found[key]).__module__ == "peft.tuners.lora.bnb"
        pairs = [
            (layer.lora_A["default"].weight, layer.lora_B["default"].weight) for layer in (found[key], expected[key])
        ]
        if bool(pairs[1][1].any()) and name != "milora":  # whose smallest singular directions are not well defined
            assert relative_error(product(pairs[0]), product(pairs[1])) < 5e-2
    if make_method(name).step_zero != "moved":
        with torch.no_grad():
            assert relative_error(module.eval()(batches[0]), base) < 1e-3


def test_an_adapter_on_a_4_bit_base_trains_saves_and_resumes(quantised, tmp_path: Path):
    module, _ = quantised
    batches = token_batches(2, features=64)
    initialize(module, "cntlora", batches, squared_loss(module), rank=4, target_modules=TARGETS, progress=False)
    optimizer = torch.optim.SGD(trainable_parameters(module), lr=0.1)
    before = squared_loss(module)(batches[0]).item()
    for _ in range(5):
        optimizer.zero_grad()
        loss = squared_loss(module.train())(batches[0])
        loss.backward()
        optimizer.step()
    assert squared_loss(module.eval())(batches[0]).item() < before
    file = load_file(save_diffusers_lora({"transformer": module}, tmp_path))
    assert len(file) == 2 * len(TARGETS)
    for name, weights in adapter_weights(module).items():
        added = product(weights.factors) - product(weights.offset)
        saved = [file[f"transformer.{name}.lora_{factor}.weight"] for factor in "AB"]
        assert relative_error(product((saved[0], saved[1])), added) < 1e-4
    state = adapter_state_dict({"": module})
    load_adapter_state_dict({"": module}, state)
    assert all(torch.equal(value, state[key]) for key, value in adapter_state_dict({"": module}).items())
