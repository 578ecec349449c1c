"""What the methods say of themselves is what they do, and a method that says nothing works too."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from core_fixtures import ATTENTION_LAYERS, squared_loss, tiny_attention, token_batches
from torch import Tensor

from lorainit_diffusers import METHODS, adapters, initialize, make_method
from lorainit_diffusers.methods import LoraFactors, Observes, Solution, StepZero
from lorainit_diffusers.methods.base import Observed
from lorainit_diffusers.methods.declared import (
    Declared,
    fewest_rows,
    gives_scores,
    largest_rank,
    learns_from,
    needs_reference,
    reference_options,
    zero_delta_options,
)
from lorainit_diffusers.methods.describe import describe_method, describe_methods
from lorainit_diffusers.statistics import InputsAndReference, SecondMoment

EVERY_METHOD = pytest.mark.parametrize("name", METHODS)
TARGETS = list(ATTENTION_LAYERS)
LIMITED: list[tuple[str, dict[str, Any]]] = [*((name, {}) for name in METHODS), ("eva", {"sketch_columns": 6})]


@dataclass(frozen=True)
class Bare:
    """A program's own method, with nothing but what `Initializer` asks for: A from the inputs, ranks up to 6."""

    observes: ClassVar[Observes] = "inputs"
    length: float = 1.0

    @property
    def step_zero(self) -> StepZero:
        return "equal"

    def statistic(self, in_features: int, out_features: int, rank: int) -> Observed | None:
        if rank > 6:
            raise ValueError(f"rank {rank} is above 6")
        return SecondMoment(in_features)

    def solve(
        self, weight: Tensor, statistic: Any, max_rank: int, *, scaling: float, generator: torch.Generator
    ) -> Solution:
        values, vectors = statistic.leading(max_rank, centered=False)

        def factors(rank: int) -> LoraFactors:
            lora_A = vectors[:, :rank].mT.float() * self.length
            return LoraFactors(lora_A.contiguous(), torch.zeros(len(weight), rank))

        return Solution(values / statistic.trace(centered=False), factors)


@dataclass(frozen=True)
class BareWithReference(Bare):
    """Another, which compares the inputs with a reference, as its statistic alone shows."""

    def statistic(self, in_features: int, out_features: int, rank: int) -> Observed | None:
        return InputsAndReference(SecondMoment(in_features), SecondMoment(in_features))

    def solve(
        self, weight: Tensor, statistic: Any, max_rank: int, *, scaling: float, generator: torch.Generator
    ) -> Solution:
        assert statistic.reference.num_rows > 0
        return super().solve(weight, statistic.inputs, max_rank, scaling=scaling, generator=generator)


@dataclass(frozen=True)
class SaysMore(Bare):
    """One that says a few things, without inheriting `Declared`."""

    gives_scores: ClassVar[bool] = False
    summary: ClassVar[str] = "As it is said."

    def largest_rank(self, in_features: int, out_features: int, at_most: int) -> int:
        return min(3, at_most)

    def fewest_rows(self, rank: int) -> int:
        return 10**6


@pytest.fixture
def added() -> Iterator[None]:
    METHODS.update({"bare": Bare, "bare_with_reference": BareWithReference, "says_more": SaysMore})
    yield
    for name in ("bare", "bare_with_reference", "says_more"):
        del METHODS[name]


def start(method: Any, **options: Any) -> tuple[Any, Any]:
    module = tiny_attention()
    options = {"rank": 4, "target_modules": TARGETS, "progress": False} | options
    return module, initialize(module, method, token_batches(), squared_loss(module), **options)


@EVERY_METHOD
def test_a_method_of_this_package_says_what_it_is(name):
    method = METHODS[name]
    assert issubclass(method, Declared)
    for attribute in ("summary", "source", "cost"):
        assert getattr(method, attribute), f"{name} does not say its {attribute}"
        assert "summary" in vars(method), "an inherited summary tells of another method"


@pytest.mark.parametrize(("name", "options"), LIMITED)
@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (9, 9), (2, 30)])
def test_the_largest_rank_is_the_largest_one_that_the_statistic_accepts(name, options, shape):
    method = make_method(name, options)

    def accepted(rank: int) -> bool:
        try:
            method.statistic(shape[1], shape[0], rank)
        except ValueError:
            return False
        return True

    for at_most in range(1, min(shape) + 1):
        tried = max((rank for rank in range(1, at_most + 1) if accepted(rank)), default=0)
        assert largest_rank(method, shape[1], shape[0], at_most) == tried


@EVERY_METHOD
def test_scores_are_given_by_those_that_say_so(solve, name):
    observed: Any = None
    method = make_method(name)
    rows, gradients = torch.randn(60, 16), [torch.randn(12, 16)]
    if method.observes != "nothing":
        observed = {"inputs": rows, "gradients": gradients}.get(method.observes, (rows, gradients))
    solution = solve(name, torch.randn(12, 16), observed)
    assert (solution.scores is not None) == gives_scores(method)


@EVERY_METHOD
def test_options_that_are_said_to_start_at_the_base_do(name):
    options = zero_delta_options(METHODS[name])
    if options:
        assert make_method(name, options).step_zero == "equal"


@EVERY_METHOD
def test_the_statistic_has_a_reference_where_the_method_says_that_it_needs_one(name):
    with_reference = reference_options(METHODS[name])
    for options in ({}, with_reference):
        method = make_method(name, options)
        assert needs_reference(method) == isinstance(method.statistic(16, 16, 2), InputsAndReference)
    assert needs_reference(make_method(name, with_reference)) == bool(with_reference)


def test_what_eva_and_gradient_step_learn_from_follows_their_options():
    assert learns_from(make_method("eva")) == {"variation"}
    assert learns_from(make_method("eva", {"centered": False})) == {"inputs"}
    assert learns_from(make_method("gradient_step")) == {"inputs", "gradient"}
    assert learns_from(make_method("gradient_step", {"directions": "inputs"})) == {"variation"}
    assert learns_from(make_method("lora_ga")) == {"gradient"}
    assert not learns_from(make_method("pissa"))


def test_a_method_that_says_nothing_works():
    module, report = start(Bare())
    assert {layer.rank for layer in report.layers.values()} == {4}
    assert not any(layer.fallback for layer in report.layers.values())
    lora_A = adapters.adapter_weights(module)[TARGETS[0]].factors.lora_A
    torch.testing.assert_close(lora_A.norm(dim=1), torch.ones(4))
    assert fewest_rows(Bare(), 4) == 4


def test_a_method_that_says_nothing_gets_ranks_by_score_up_to_what_its_statistic_accepts():
    _, report = start(Bare(), variable_rank=True)  # an offer of 8
    ranks = [layer.rank for layer in report.layers.values()]
    assert max(ranks) <= 6
    assert sum(ranks) == 4 * len(TARGETS)
    with pytest.raises(ValueError, match=rf"layer '{re.escape(TARGETS[0])}': rank 7 is above 6"):
        start(Bare(), rank=7)


def test_a_method_that_says_nothing_is_known_by_its_statistic_to_need_a_reference():
    with pytest.raises(ValueError, match="pass reference_batches"):
        start(BareWithReference())
    start(BareWithReference(), reference_batches=token_batches())
    with pytest.raises(ValueError, match=r"does not use reference_batches.*cntlora with constraint='alignment'"):
        start(Bare(), reference_batches=token_batches())


def test_what_a_method_says_counts_without_inheriting_anything():
    with pytest.raises(ValueError, match=r"rank 3 at most, not 4"):
        start(SaysMore())
    with pytest.raises(ValueError, match="gives no scores to allocate ranks by; drop variable_rank"):
        start(SaysMore(), rank=2, variable_rank=True)
    _, report = start(SaysMore(), rank=2)
    assert all("rows for rank 2" in layer.fallback for layer in report.layers.values())


def test_a_method_without_scores_is_refused_before_the_pass():
    def loss(batch: Tensor) -> Tensor:
        pytest.fail("the loss must not run")

    for name in METHODS:
        if not gives_scores(METHODS[name]):
            with pytest.raises(ValueError, match=f"'{name}' gives no scores to allocate ranks by; drop variable_rank"):
                initialize(
                    tiny_attention(), name, token_batches(), loss, rank=4, target_modules=TARGETS, variable_rank=True
                )


@EVERY_METHOD
def test_the_description_is_plain_data(name):
    described = describe_method(name)
    data = json.loads(json.dumps(dataclasses.asdict(described)))
    assert data["name"] == name
    assert data["observes"] == METHODS[name].observes
    assert data["step_zero"] == make_method(name).step_zero
    assert [option["key"] for option in data["options"]] == [
        field.name for field in dataclasses.fields(METHODS[name]) if field.init
    ]
    assert bool(data["needs"]) == (data["observes"] != "nothing")
    assert data["zero_delta"] == ({} if data["step_zero"] == "equal" else dict(zero_delta_options(METHODS[name])))


@pytest.mark.usefixtures("added")
def test_methods_that_a_program_has_added_are_described():
    by_name = {described.name: described for described in describe_methods()}
    assert list(by_name) == list(METHODS)
    bare = by_name["bare"]
    assert bare.summary.startswith("A program's own method")
    assert bare.step_zero == "equal"
    assert (bare.source, bare.cost) == ("", "")
    assert [(option.key, option.default) for option in bare.options] == [("length", "1.0")]
    assert "reference" not in str(bare.needs)
    assert by_name["says_more"].summary == "As it is said."
    assert not by_name["says_more"].gives_scores
