"""Weights, inputs and gradients that are zero, constant, of low rank, huge or not finite, for every method.

Each is either an error that names the layer and the method, or gives factors that are finite and all of which can be
trained, with the reason in the report where they are Kaiming's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorainit_diffusers import adapters, initialize
from lorainit_diffusers.initialize import make_method
from lorainit_diffusers.methods import METHODS, cntlora, corda, eva, gradient_step
from lorainit_diffusers.statistics import SketchedSecondMoment

RANK, IN, OUT = 4, 24, 16
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EVERY_METHOD = pytest.mark.parametrize("name", METHODS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EXACT_AND_SKETCHED = pytest.mark.parametrize("statistic_kind", [False, True], ids=["exact", "sketched"], indirect=True)
OBSERVES_INPUTS = [name for name in METHODS if METHODS[name].observes.startswith("inputs")]
OBSERVES_GRADIENTS = [name for name in METHODS if "gradients" in METHODS[name].observes]
# whose A and B would both be zero; OLoRA's B is not, nor is CNTLoRA's A
OF_WEIGHTS = ["pissa", "milora", "corda"]


@pytest.fixture
def statistic_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sketches of 12 columns in the place of exact moments, as a small memory budget makes them."""
    if request.param:
        for module in (cntlora, corda, eva, gradient_step):
            monkeypatch.setattr(module, "SecondMoment", lambda features: SketchedSecondMoment(features, 12))


class OneLayer(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layer = nn.Linear(IN, OUT, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1)) / IN**0.5)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.to(self.layer.weight.dtype))


def rows(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(40, IN, generator=generator) * torch.linspace(1, 0.1, IN) + 0.2 for _ in range(3)]


def start(
    module: OneLayer,
    name: str,
    batches: list[Tensor],
    *,
    loss: Callable[[Tensor], Tensor] | None = None,
    **options: Any,
) -> Any:
    """Initialise the layer, and see that all that came out of it can be trained."""
    target = torch.randn(40, OUT, generator=torch.Generator().manual_seed(9))
    report = initialize(
        module,
        make_method(name, options),
        batches,
        loss or (lambda batch: (module(batch).float() - target).square().mean()),
        rank=RANK,
        target_modules=["layer"],
        progress=False,
    )
    ((_, weights),) = adapters.adapter_weights(module).items()
    lora_A, lora_B = weights.factors
    assert bool(lora_A.isfinite().all())
    assert bool(lora_B.isfinite().all())
    alive = (lora_A.norm(dim=1) > 1e-7) | (lora_B.norm(dim=0) > 1e-7)
    assert bool(alive.all()), f"{int((~alive).sum())} components can never be trained"
    return report.layers["layer"]


def gradient_reaches_every_component(module: OneLayer) -> bool:
    ((_, weights),) = adapters.adapter_weights(module).items()
    lora_A, lora_B = (factor.clone().requires_grad_() for factor in weights.factors)
    output = rows(5)[0] @ lora_A.mT @ lora_B.mT
    (output - torch.randn(output.shape, generator=torch.Generator().manual_seed(2))).square().mean().backward()
    assert lora_A.grad is not None
    assert lora_B.grad is not None
    return bool(((lora_A.grad.norm(dim=1) > 0) | (lora_B.grad.norm(dim=0) > 0)).all())


@EVERY_DTYPE
@EVERY_METHOD
def test_usual_layers_fall_back_to_nothing(name: str, dtype: torch.dtype) -> None:
    assert start(OneLayer(dtype), name, rows()).fallback is None


@EVERY_DTYPE
@EVERY_METHOD
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named_before_the_pass(name: str, value: float, dtype: torch.dtype) -> None:
    module = OneLayer(dtype)
    module.layer.weight.data[3, 5] = value

    def never(batch: Tensor) -> Tensor:
        raise AssertionError("the pass had begun")

    with pytest.raises(ValueError, match=f"'layer' .* init '{name}': its weight has NaN or infinity"):
        start(module, name, rows(), loss=never)
    assert not adapters.lora_layers(module)


@EVERY_DTYPE
@EVERY_METHOD
def test_a_zero_weight(name: str, dtype: torch.dtype) -> None:
    module = OneLayer(dtype)
    module.layer.weight.data.zero_()
    layer = start(module, name, rows())
    assert gradient_reaches_every_component(module)
    if name in OF_WEIGHTS:
        assert layer.fallback == f"all 4 components of {name} vanish, since its weight is zero: Kaiming A, zero B"


@EVERY_METHOD
def test_a_weight_of_lower_rank_than_the_adapter(name: str) -> None:
    module = OneLayer()
    generator = torch.Generator().manual_seed(3)
    module.layer.weight.data = torch.randn(OUT, 2, generator=generator) @ torch.randn(2, IN, generator=generator)
    start(module, name, rows())
    assert gradient_reaches_every_component(module)


def test_vanishing_components_are_replaced_and_the_product_is_not() -> None:
    module = OneLayer()
    with torch.no_grad():
        module.layer.weight.zero_()
        module.layer.weight[0, 0], module.layer.weight[1, 1] = 3.0, 2.0
    layer = start(module, "pissa", [])
    assert (
        layer.fallback == "2 of 4 components of pissa vanish, since the layer has no such directions: Kaiming A, zero B"
    )
    ((_, weights),) = adapters.adapter_weights(module).items()
    product = weights.scaling * weights.factors.lora_B @ weights.factors.lora_A
    torch.testing.assert_close(product, module.layer.weight, atol=1e-6, rtol=0)
    bound = IN**-0.5
    assert bool((weights.factors.lora_A[2:].abs() <= bound).all())
    assert not weights.factors.lora_B[:, 2:].any()


@EXACT_AND_SKETCHED
@EVERY_DTYPE
@pytest.mark.parametrize("name", OBSERVES_INPUTS)
def test_zero_inputs(name: str, dtype: torch.dtype, statistic_kind: None) -> None:
    layer = start(OneLayer(dtype), name, [torch.zeros(40, IN)] * 2)
    assert layer.fallback == "all its inputs are zero: Kaiming A, zero B"


@EXACT_AND_SKETCHED
@EVERY_DTYPE
@pytest.mark.parametrize("name", OBSERVES_INPUTS)
def test_constant_inputs(name: str, dtype: torch.dtype, statistic_kind: None) -> None:
    constant = torch.randn(1, IN, generator=torch.Generator().manual_seed(4)).expand(40, IN)
    layer = start(OneLayer(dtype), name, [constant] * 2)
    if name == "eva":
        assert layer.fallback == "its inputs never vary: Kaiming A, zero B"


@EXACT_AND_SKETCHED
@EVERY_METHOD
def test_inputs_of_lower_rank_than_the_adapter(name: str, statistic_kind: None) -> None:
    generator = torch.Generator().manual_seed(6)
    span = torch.randn(2, IN, generator=generator)
    module = OneLayer()
    start(module, name, [torch.randn(40, 2, generator=generator) @ span for _ in range(2)])
    assert gradient_reaches_every_component(module)


@EVERY_DTYPE
@pytest.mark.parametrize("name", OBSERVES_GRADIENTS)
def test_zero_gradients(name: str, dtype: torch.dtype) -> None:
    module = OneLayer(dtype)
    layer = start(module, name, rows(), loss=lambda batch: (module(batch).float() * 0.0).sum())
    assert layer.fallback == "its mean gradient is zero: Kaiming A, zero B"


@pytest.mark.parametrize("name", OBSERVES_GRADIENTS)
def test_gradients_of_lower_rank_than_the_adapter(name: str) -> None:
    module = OneLayer()
    start(module, name, rows(), loss=lambda batch: module(batch)[:1, :1].square().sum())
    assert gradient_reaches_every_component(module)


@EXACT_AND_SKETCHED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OBSERVES_INPUTS)
@pytest.mark.parametrize("size", [1e20, 3e25, 1e36])
def test_finite_inputs_whose_squares_overflow(name: str, dtype: torch.dtype, statistic_kind: None, size: float) -> None:
    module = OneLayer(dtype)
    huge = [batch * size for batch in rows()]
    with pytest.raises(ValueError, match=r"input activations at layer 'layer' in batch 0 are too large, about 1e19"):
        start(module, name, huge, loss=lambda batch: (module(batch) * 1e-38).float().mean())
    assert not adapters.lora_layers(module)
    assert module.layer.weight.requires_grad


@EXACT_AND_SKETCHED
@pytest.mark.parametrize("name", OBSERVES_INPUTS)
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e4, 1e15])
def test_inputs_of_any_other_size(name: str, statistic_kind: None, size: float) -> None:
    module = OneLayer()
    start(module, name, [batch * size for batch in rows()], loss=lambda b: (module(b) / size).mean())


@EVERY_METHOD
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_weights_of_any_size(name: str, size: float) -> None:
    module = OneLayer()
    module.layer.weight.data *= size
    message = None
    try:
        start(module, name, rows(), loss=lambda batch: (module(batch) / size).square().mean())
    except ValueError as error:
        message = str(error)
    assert message is None or ("'layer'" in message and "\n" not in message)


@pytest.mark.parametrize("variable_rank", [False, True])
@pytest.mark.parametrize("name", ["pissa", "cntlora", "eva", "lora_ga"])
def test_layers_that_fell_back_compete_for_no_rank(name: str, variable_rank: bool) -> None:
    module = nn.Sequential(OneLayer(), OneLayer())
    first, second = module[0], module[1]
    assert isinstance(first, OneLayer)
    assert isinstance(second, OneLayer)
    second.layer.weight.data.zero_()
    target = torch.randn(40, OUT, generator=torch.Generator().manual_seed(9))

    def loss(batch: Tensor) -> Tensor:
        return (first(batch) - target).square().mean() + 0.0 * second(batch * 0).sum()

    report = initialize(
        module, name, rows(), loss, rank=4, target_modules=["layer"], variable_rank=variable_rank, progress=False
    )
    assert report.layers["0.layer"].fallback is None
    assert report.layers["1.layer"].fallback is not None
    assert report.layers["0.layer"].rank >= report.layers["1.layer"].rank
    ((_, weights),) = adapters.adapter_weights(second).items()
    assert bool(weights.factors.lora_A.norm(dim=1).all())
