"""What an initialisation is: the contract that every file of this package fulfils."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from lorainit_diffusers.ranges import check_fields
from lorainit_diffusers.statistics import InputsAndGradient, InputsAndReference, InputStatistic, Statistic

Observes = Literal["nothing", "inputs", "gradients", "inputs and gradients"]
StepZero = Literal["equal", "offset", "moved"]
# What the collection gathers of one layer.
Observed = Statistic | InputsAndGradient | InputsAndReference


class LoraFactors(NamedTuple):
    """Initial weights of one LoRA layer; the layer adds `scaling * lora_B @ lora_A`.

    Attributes:
        lora_A: (rank, in_features) float32.
        lora_B: (out_features, rank) float32.
    """

    lora_A: Tensor
    lora_B: Tensor


@dataclass(frozen=True)
class Solution:
    """A method's answer for one layer, before its rank is known.

    One decomposition serves the scores and the factors of every rank, so that allocating ranks costs no second solve.

    Attributes:
        scores: (k,) what each component is worth, descending, in units comparable between layers (a share of the
            layer's total); `None` where a method has no notion of it.
        factors: Rank -> factors, for ranks up to the `max_rank` that was asked for. Under variable ranks the
            solutions of all layers are alive at once, so this must hold on to no weight.
    """

    scores: Tensor | None
    factors: Callable[[int], LoraFactors]


class Initializer(Protocol):
    """An initialisation: a frozen dataclass of hyper-parameters, without state.

    That much it must have. What more it can say of itself, such as the largest rank that it can give a layer, and what
    holds of one that does not say it, is in `declared`.

    Attributes:
        observes: What its collection pass looks at. A method of `"inputs"` whose statistic is an
            `InputsAndReference` gets a second pass over reference batches.
    """

    observes: ClassVar[Observes]

    @property
    def step_zero(self) -> StepZero:
        """Whether the adapted model starts as the base model.

        `"equal"`: B A = 0. `"offset"`: B A is not zero; the adapter subtracts it. `"moved"`: B A is
        not zero and stays: the model starts elsewhere.
        """
        ...

    def statistic(self, in_features: int, out_features: int, rank: int) -> Observed | None:
        """An empty statistic for one layer, or `None` when the method observes nothing."""
        ...

    def solve(
        self,
        weight: Tensor,
        statistic: Observed | None,
        max_rank: int,
        *,
        scaling: float,
        generator: torch.Generator,
    ) -> Solution:
        """Solve one layer.

        Args:
            weight: (out_features, in_features) pre-trained weight, float32; not to be changed.
            statistic: As `statistic` made it, filled; or the sketch of it, where the memory budget asked for one.
            max_rank: The largest rank that will be asked of the solution.
            scaling: Alpha / rank (or alpha / sqrt(rank)) that the layer multiplies B A by.
            generator: CPU generator, seeded by run and layer; the only source of randomness.
        """
        ...


def check_hyperparameters(method: Initializer) -> None:
    """Refuse a value that is none of those that a field of this dataclass allows.

    A `Literal` field has choices, and a numeric one a range in the class's `RANGES`.

    Raises:
        ValueError: Naming the field, its value, and the choices or the range.
    """
    check_fields(method)
    for name, hint in get_type_hints(type(method)).items():
        if get_origin(hint) is Literal and getattr(method, name) not in get_args(hint):
            choices = ", ".join(map(repr, get_args(hint)))
            raise ValueError(f"{name} is {getattr(method, name)!r}; use one of {choices}")


def one_if_zero(value: Tensor) -> Tensor:
    """A 0-d non-negative tensor, or 1 where it vanishes: the unit of layers whose inputs are all zero."""
    return torch.where(value > 0, value, torch.ones_like(value))


def input_statistic(statistic: Observed | None) -> InputStatistic:
    """Narrow to the statistic of inputs that a method asked for."""
    if statistic is None or not hasattr(statistic, "eigenbasis"):
        raise ValueError("this method needs the layer's input statistic; run the collection pass with it")
    return statistic  # type: ignore[return-value]


def kaiming_input_power(trace: float, in_features: int) -> float:
    """E||A x||^2 a row of A for PEFT's default initialisation, given E||x||^2 = `trace`.

    Kaiming-uniform with a = sqrt(5) draws A's entries with variance 1 / (3 in_features).
    """
    return trace / (3 * in_features)


def zeros_of_output(weight: Tensor) -> Callable[[int], Tensor]:
    """A function rank -> (out_features, rank) zero B, which holds on to the weight's shape and device only."""
    out_features, device = weight.shape[0], weight.device
    return lambda rank: torch.zeros(out_features, rank, dtype=torch.float32, device=device)
