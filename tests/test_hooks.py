"""Observers see the very tensors of a pass and leave nothing behind."""

from __future__ import annotations

import pytest
import torch
from core_fixtures import tiny_attention
from torch import Tensor, nn

from lorainit_diffusers.hooks import model_state_preserved, observe_inputs, observe_weight_gradients


def num_hooks(module: nn.Module) -> int:
    on_modules = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in module.modules()
    )
    on_parameters = sum(
        len(p._backward_hooks or {}) + len(p._post_accumulate_grad_hooks or {}) for p in module.parameters()
    )
    return on_modules + on_parameters


def test_the_callback_gets_the_very_tensor_by_position_and_by_keyword():
    layer, seen = nn.Linear(4, 3), []
    x = torch.randn(2, 4)
    with observe_inputs({"layer": layer}, lambda name, tensor: seen.append((name, tensor))):
        layer(x)
        layer(input=x)
    layer(x)
    assert [(name, tensor is x) for name, tensor in seen] == [("layer", True), ("layer", True)]


def test_a_layer_with_other_keywords_is_observed_too():
    class Projection(nn.Linear):
        def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(hidden_states) * scale

    layer, seen = Projection(4, 3), []
    x = torch.randn(2, 4)
    with observe_inputs({"layer": layer}, lambda _, tensor: seen.append(tensor)):
        layer(scale=2.0, hidden_states=x)
    assert seen[0] is x


def test_a_call_without_a_tensor_names_the_layer():
    class Constant(nn.Module):
        def forward(self) -> int:
            return 1

    layer = Constant()
    with pytest.raises(ValueError, match=r"'odd\.layer'"), observe_inputs({"odd.layer": layer}, lambda *_: None):
        layer()


@pytest.mark.parametrize("raises", [False, True])
def test_input_hooks_are_gone_afterwards(raises):
    module = tiny_attention()
    layers = dict(module.named_children())
    try:
        with observe_inputs(layers, lambda *_: None):
            assert num_hooks(module) == len(layers)
            if raises:
                raise KeyError("inside")
    except KeyError:
        pass
    assert num_hooks(module) == 0


def test_hooks_that_were_there_stay():
    layer, calls = nn.Linear(4, 3), []
    layer.register_forward_pre_hook(lambda *_: calls.append("mine"))
    with observe_inputs({"layer": layer}, lambda *_: calls.append("theirs")):
        layer(torch.randn(2, 4))
    layer(torch.randn(2, 4))
    assert calls.count("mine") == 2
    assert calls.count("theirs") == 1


def test_weight_gradients_equal_autograd_and_are_freed_at_once():
    module, x = tiny_attention().eval(), torch.randn(2, 5, 16)
    layers = {name: layer for name, layer in module.named_children() if isinstance(layer, nn.Linear)}
    weights = [layer.weight for layer in layers.values()]
    expected = dict(zip(layers, torch.autograd.grad(module(x).square().sum(), weights), strict=True))
    seen: dict[str, Tensor] = {}
    alive: list[int] = []

    def callback(name: str, gradient: Tensor) -> None:
        seen[name] = gradient.clone()
        alive.append(sum(weight.grad is not None for weight in weights))

    with observe_weight_gradients(layers, callback):
        module(x).square().sum().backward()
        assert all(weight.grad is None for weight in weights)
    assert seen.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(seen[name], gradient)
    assert max(alive) == 1


def test_a_layer_called_twice_gives_one_gradient_the_sum():
    layer, x = nn.Linear(4, 4, bias=False), torch.randn(2, 4)
    (expected,) = torch.autograd.grad(layer(layer(x)).square().sum(), [layer.weight])
    seen = []
    with observe_weight_gradients({"layer": layer}, lambda _, gradient: seen.append(gradient.clone())):
        layer(layer(x)).square().sum().backward()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_gradient_observer_restores_grad_and_requires_grad(raises, requires_grad):
    layer = nn.Linear(4, 3)
    layer.weight.requires_grad_(requires_grad)
    kept = torch.full((3, 4), 7.0)
    layer.weight.grad = kept
    try:
        with observe_weight_gradients({"layer": layer}, lambda *_: None):
            assert layer.weight.requires_grad
            layer(torch.randn(2, 4)).sum().backward()
            if raises:
                raise KeyError("inside")
    except KeyError:
        pass
    assert layer.weight.grad is kept
    assert torch.equal(kept, torch.full((3, 4), 7.0))
    assert layer.weight.requires_grad is requires_grad
    assert num_hooks(layer) == 0


@pytest.mark.parametrize("raises", [False, True])
def test_model_state_is_preserved(raises):
    module = tiny_attention().train()
    module.dropout.eval()  # a mixed state, as when a user froze a part
    module.up.weight.requires_grad_(False)
    before = {name: m.training for name, m in module.named_modules()}
    trainable = {name: p.requires_grad for name, p in module.named_parameters()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    try:
        with model_state_preserved({"module": module}):
            module.eval()
            module.requires_grad_(False)
            module.up.weight.requires_grad_(True)
            torch.manual_seed(99)
            torch.randn(3)
            if raises:
                raise KeyError("inside")
    except KeyError:
        pass
    assert {name: m.training for name, m in module.named_modules()} == before
    assert {name: p.requires_grad for name, p in module.named_parameters()} == trainable
    assert torch.equal(torch.get_rng_state(), state)
