"""Ranks and scalings: what is asked for, what each layer and the method allow, and what the scores then decide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorainit_diffusers.methods import Initializer
from lorainit_diffusers.methods.declared import gives_scores, largest_rank
from lorainit_diffusers.ranges import COUNT, COUNT_OR_NONE, POSITIVE, Range, check_fields
from lorainit_diffusers.ranks import allocate_ranks, check_rank_fits, marginal_components, uniform_ranks
from lorainit_diffusers.report import RankAllocation
from lorainit_diffusers.target import Target

# How many times the average rank a layer may get under variable ranks (EVA's rho).
MAX_RANK_RATIO = 2


@dataclass(frozen=True)
class RankOptions:
    """How ranks are chosen.

    Attributes:
        rank: Of every layer, or on average under `variable_rank`. `None`: the existing adapter's, layer by layer,
            or 8.
        alpha: LoRA alpha at that rank. `None`: what keeps the scaling of the existing adapter, layer by layer, or the
            rank. Under variable ranks a layer's alpha follows its rank, so that its scaling stays as it is.
        variable_rank: Allocate ranks by pooled scores.
        rank_budget: Sum of ranks under `variable_rank`; `rank` times the number of layers when left out.
        parameter_budget: Number of adapter parameters, instead of `rank_budget`.
        min_rank: Under `variable_rank`; 0 lets layers go without an adapter.
        max_rank: Under `variable_rank`; twice `rank` when left out.
    """

    RANGES: ClassVar[Mapping[str, Range]] = {
        "rank": COUNT,
        "alpha": POSITIVE,
        "rank_budget": COUNT_OR_NONE,
        "parameter_budget": COUNT_OR_NONE,
        "min_rank": COUNT_OR_NONE,
        "max_rank": COUNT_OR_NONE,
    }

    rank: int | None = None
    alpha: float | None = None
    variable_rank: bool = False
    rank_budget: int | None = None
    parameter_budget: int | None = None
    min_rank: int = 1
    max_rank: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class RankPlan:
    """Ranks before anything is known about the data.

    Attributes:
        shapes: Layer -> (out_features, in_features).
        ranks: Layer -> its rank, or what it would have without variable ranks.
        scalings: Layer -> alpha / rank, or alpha / sqrt(rank), at whatever rank it gets.
        caps: Layer -> the largest rank that will be asked of the method.
        variable: Whether scores decide.
        rank_budget: Sum of ranks, if they do and this is what limits them.
        parameter_budget: Number of parameters, if they do and this is what limits them.
        min_rank: Of every layer, if scores decide.
        max_rank: Of every layer, if scores decide.
    """

    shapes: Mapping[str, tuple[int, int]]
    ranks: Mapping[str, int]
    scalings: Mapping[str, float]
    caps: Mapping[str, int]
    variable: bool
    rank_budget: int | None
    parameter_budget: int | None
    min_rank: int
    max_rank: int

    def allocate(self, scores: Mapping[str, Tensor]) -> tuple[dict[str, int], RankAllocation]:
        """Ranks by these scores, and what decided them.

        Raises:
            ValueError: A budget that cannot be met.
        """
        ranks = allocate_ranks(
            scores,
            self.shapes,
            rank_budget=self.rank_budget,
            parameter_budget=self.parameter_budget,
            min_rank=self.min_rank,
            max_rank=self.max_rank,
        )
        per_parameter = self.parameter_budget is not None
        budget = self.parameter_budget if per_parameter else self.rank_budget
        assert budget is not None
        kept, refused = marginal_components(
            scores, self.shapes, ranks, per_parameter=per_parameter, min_rank=self.min_rank, max_rank=self.max_rank
        )
        allocation = RankAllocation(
            budget, per_parameter, self.min_rank, self.max_rank, last_kept=kept, first_refused=refused
        )
        return ranks, allocation


def plan_ranks(target: Target, name: str, method: Initializer, options: RankOptions) -> RankPlan:
    """What the options ask for, held against the layers and the method before anything is computed.

    Args:
        target: What is adapted.
        name: Of the method, for messages.
        method: The initialisation.
        options: How ranks are chosen.

    Raises:
        ValueError: A rank that does not fit a layer or the method (names the layer), options of variable ranks without
            them, variable ranks for a method without scores, a budget that cannot be met.
    """
    shapes = target.shapes
    ranks, scalings = _ranks_and_scalings(target, shapes, options)
    rank_budget, most = options.rank_budget, ranks
    if options.variable_rank:
        if rank_budget is None and options.parameter_budget is None:
            rank_budget = sum(ranks.values())
        offered = options.max_rank
        most = {key: MAX_RANK_RATIO * rank if offered is None else offered for key, rank in ranks.items()}
        if not gives_scores(method):
            raise ValueError(f"init {name!r} gives no scores to allocate ranks by; drop variable_rank")
    elif rank_budget is not None or options.parameter_budget is not None or options.max_rank is not None:
        raise ValueError("rank_budget, parameter_budget and max_rank need variable_rank=True")
    plan = RankPlan(
        shapes=shapes,
        ranks=ranks,
        scalings=scalings,
        caps=_largest_ranks(method, shapes, ranks, most),
        variable=options.variable_rank,
        rank_budget=rank_budget,
        parameter_budget=options.parameter_budget,
        min_rank=options.min_rank,
        max_rank=max(most.values()),
    )
    if plan.variable:  # a budget that cannot be met is refused now, not after the pass
        plan.allocate({full_name: torch.zeros(cap) for full_name, cap in plan.caps.items()})
    return plan


def _ranks_and_scalings(
    target: Target, shapes: Mapping[str, tuple[int, int]], options: RankOptions
) -> tuple[dict[str, int], dict[str, float]]:
    """Rank and scaling of every layer: what the caller asks for, else what its adapter has.

    A component without an adapter follows the first one that has it.
    """
    rank, alpha = options.rank, options.alpha
    first = next((adapter for adapter in target.existing.values() if adapter is not None), None)
    common = rank if rank is not None else first.rank if first is not None else 8
    uniform_ranks(shapes, common if rank is not None or first is None else 1)
    ranks: dict[str, int] = {}
    scalings: dict[str, float] = {}
    for full_name, (component, layer_name) in target.location.items():
        adapter = target.existing[component]
        ranks[full_name] = common if rank is not None or adapter is None else adapter.ranks[layer_name]
        check_rank_fits({full_name: shapes[full_name]}, ranks[full_name], "`rank`")
        if alpha is not None or first is None:
            numerator = alpha if alpha is not None else ranks[full_name]
            scalings[full_name] = numerator / ranks[full_name] ** target.rank_power(full_name)
        else:
            scalings[full_name] = first.scaling if adapter is None else adapter.scalings[layer_name]
    return ranks, scalings


def _largest_ranks(
    method: Initializer,
    shapes: Mapping[str, tuple[int, int]],
    ranks: Mapping[str, int],
    most: Mapping[str, int],
) -> dict[str, int]:
    """The largest rank up to `most` that each layer and the method can use; at least its rank, or an error."""
    caps: dict[str, int] = {}
    for full_name, (out_features, in_features) in shapes.items():
        at_most = min(most[full_name], out_features, in_features)
        # Under variable ranks the cap above `rank` is an offer, which a method may not be able to use in full.
        cap = largest_rank(method, in_features, out_features, at_most)
        at_least = min(ranks[full_name], at_most)
        caps[full_name] = max(cap, at_least)
        try:
            method.statistic(in_features, out_features, caps[full_name])
        except ValueError as error:
            raise ValueError(f"layer {full_name!r}: {error}") from None
        if cap < at_least:
            raise ValueError(
                f"layer {full_name!r}: the init can give it rank {cap} at most, not {at_least}; lower `rank`, or "
                "leave the layer out of target_modules"
            )
    return caps
