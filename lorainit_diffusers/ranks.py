"""Rank allocation: how many components each layer keeps, under a budget.

The pooled rule is EVA's (Paischer et al. 2024, arXiv:2410.07170, section 3.2): components of all layers compete by
score, the best are kept until the budget is spent, and a layer's rank is how many of its components were kept.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lorainit_diffusers.report import RankedComponent


def uniform_ranks(layers: Mapping[str, tuple[int, int]], rank: int) -> dict[str, int]:
    """The same rank everywhere.

    Args:
        layers: Name -> (out_features, in_features).
        rank: Of every layer.

    Raises:
        ValueError: A layer is smaller than the rank (names the smallest).
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; it must be at least 1")
    check_rank_fits(layers, rank, "`rank`")
    return dict.fromkeys(layers, rank)


def check_rank_fits(layers: Mapping[str, tuple[int, int]], rank: int, flag: str) -> None:
    """Refuse a rank above the smallest dimension of the smallest layer.

    Raises:
        ValueError: Naming the layer, its shape and the largest rank that fits.
    """
    name, shape = min(layers.items(), key=lambda item: min(item[1]))
    if rank > min(shape):
        raise ValueError(
            f"{flag} {rank} is larger than the smallest dimension of layer {name!r} "
            f"(out_features {shape[0]}, in_features {shape[1]}); use at most {min(shape)}, or leave the layer out of "
            "target_modules"
        )


def allocate_ranks(
    scores: Mapping[str, Tensor],
    layers: Mapping[str, tuple[int, int]],
    *,
    rank_budget: int | None = None,
    parameter_budget: int | None = None,
    min_rank: int = 1,
    max_rank: int,
) -> dict[str, int]:
    """Ranks by pooled scores under a budget.

    Every layer first gets `min_rank`; the rest of the budget goes to the best remaining components. Under a rank
    budget a component costs 1 and competes by its score; under a parameter budget it costs in_features + out_features
    and competes by its score per parameter. Ties go to the layer that comes first.

    Args:
        scores: Name -> (k,) descending scores, comparable between layers.
        layers: Name -> (out_features, in_features).
        rank_budget: Sum of ranks.
        parameter_budget: Sum of rank * (in_features + out_features).
        min_rank: Of every layer; 0 lets a layer go without an adapter.
        max_rank: Of every layer; the layer's smallest dimension and the number of its scores cap it as well.

    Raises:
        ValueError: Not exactly one budget; bounds that contradict each other; a budget that does not reach
            `min_rank` everywhere.
    """
    if (rank_budget is None) == (parameter_budget is None):
        raise ValueError("give exactly one of rank_budget and parameter_budget")
    if not 0 <= min_rank <= max_rank:
        raise ValueError(f"need 0 <= min_rank <= max_rank, got min_rank={min_rank}, max_rank={max_rank}")
    costs = {name: 1 if parameter_budget is None else sum(shape) for name, shape in layers.items()}
    caps = {name: min(max_rank, *layers[name], len(scores[name])) for name in layers}
    ranks = {name: min(min_rank, caps[name]) for name in layers}
    budget = rank_budget if parameter_budget is None else parameter_budget
    assert budget is not None
    left = budget - sum(ranks[name] * costs[name] for name in layers)
    if left < 0:
        unit = "rank_budget" if parameter_budget is None else "parameter_budget"
        raise ValueError(
            f"{unit} {budget} is too small: min_rank={min_rank} on {len(layers)} layers alone costs {budget - left}"
        )
    order = {name: position for position, name in enumerate(layers)}
    pool = [
        (-float(score) / costs[name], order[name], index, name)
        for name in layers
        for index, score in enumerate(scores[name].tolist()[ranks[name] : caps[name]])
    ]
    for _, _, _, name in sorted(pool):
        # Within a layer the scores descend, so components are met in order and a rank is always a prefix.
        if costs[name] <= left:
            ranks[name] += 1
            left -= costs[name]
    return ranks


def marginal_components(
    scores: Mapping[str, Tensor],
    layers: Mapping[str, tuple[int, int]],
    ranks: Mapping[str, int],
    *,
    per_parameter: bool = False,
    min_rank: int = 1,
    max_rank: int,
) -> tuple[RankedComponent | None, RankedComponent | None]:
    """The last component that got a rank, and the first that was refused, among those that competed.

    Args:
        scores: As `allocate_ranks` got them.
        layers: Name -> (out_features, in_features).
        ranks: What it returned.
        per_parameter: Whether components competed by their score per parameter (a parameter budget).
        min_rank: Of every layer; what it gives away competes for nothing.
        max_rank: Of every layer; what lies beyond it does not compete either.

    Returns:
        Both; the former is `None` where every layer has its `min_rank`, the latter where every layer has as much
        as it may have.
    """
    kept: list[tuple[float, int, RankedComponent]] = []
    refused: list[tuple[float, int, RankedComponent]] = []
    for position, (name, rank) in enumerate(ranks.items()):
        worth = (scores[name] / (sum(layers[name]) if per_parameter else 1)).tolist()
        if rank > min_rank:
            kept.append((worth[rank - 1], -position, RankedComponent(name, rank, worth[rank - 1])))
        if rank < min(max_rank, *layers[name], len(worth)):
            refused.append((worth[rank], -position, RankedComponent(name, rank + 1, worth[rank])))
    return (min(kept)[2] if kept else None), (max(refused)[2] if refused else None)
