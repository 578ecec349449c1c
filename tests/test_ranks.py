"""Rank allocation against exhaustive search."""

from __future__ import annotations

import itertools

import pytest
import torch

from lorainit_diffusers.ranks import allocate_ranks, check_rank_fits, marginal_components, uniform_ranks

LAYERS = {"q": (16, 16), "k": (16, 16), "up": (64, 16), "down": (16, 64)}


def random_scores(seed: int, count: int = 4, names: tuple[str, ...] = tuple(LAYERS)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(count, generator=generator).sort(descending=True).values for name in names}


def best_by_search(
    scores: dict[str, torch.Tensor], costs: dict[str, int], budget: int, min_rank: int, max_rank: int
) -> float:
    """The largest sum of kept scores over all feasible rank vectors."""
    best = -1.0
    for ranks in itertools.product(range(min_rank, max_rank + 1), repeat=len(scores)):
        if sum(rank * costs[name] for rank, name in zip(ranks, scores, strict=True)) <= budget:
            best = max(best, sum(float(scores[name][:r].sum()) for r, name in zip(ranks, scores, strict=True)))
    return best


def kept(scores: dict[str, torch.Tensor], ranks: dict[str, int]) -> float:
    return sum(float(scores[name][:rank].sum()) for name, rank in ranks.items())


def test_uniform_ranks():
    assert uniform_ranks(LAYERS, 4) == dict.fromkeys(LAYERS, 4)
    assert uniform_ranks(LAYERS, 16) == dict.fromkeys(LAYERS, 16)


@pytest.mark.parametrize("rank", [0, -1])
def test_uniform_ranks_are_positive(rank):
    with pytest.raises(ValueError, match=f"rank is {rank}"):
        uniform_ranks(LAYERS, rank)


def test_a_rank_that_does_not_fit_names_the_smallest_layer_and_the_largest_rank():
    with pytest.raises(ValueError, match=r"17 is larger.*'small'.*\(out_features 12, in_features 40\).*at most 12"):
        uniform_ranks({**LAYERS, "small": (12, 40)}, 17)
    with pytest.raises(ValueError, match="max_rank 13"):
        check_rank_fits({"small": (12, 40)}, 13, "max_rank")


def test_no_layer_gets_more_ranks_than_it_has_scores():
    """Not even as its least rank: there is no direction to fill it with."""
    scores = {**random_scores(0), "k": torch.tensor([0.5, 0.4])}
    for budget in ({"rank_budget": 14}, {"parameter_budget": 1000}):
        ranks = allocate_ranks(scores, LAYERS, **budget, min_rank=3, max_rank=4)
        assert ranks["k"] == 2
        assert min(ranks.values()) == 2


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budget", [4, 7, 11, 16])
@pytest.mark.parametrize(("min_rank", "max_rank"), [(0, 4), (1, 4), (1, 3)])
def test_a_rank_budget_keeps_the_best_components(seed, budget, min_rank, max_rank):
    scores = random_scores(seed)
    ranks = allocate_ranks(scores, LAYERS, rank_budget=budget, min_rank=min_rank, max_rank=max_rank)
    assert sum(ranks.values()) == min(budget, max_rank * 4)
    assert all(min_rank <= rank <= max_rank for rank in ranks.values())
    best = best_by_search(scores, dict.fromkeys(scores, 1), budget, min_rank, max_rank)
    assert kept(scores, ranks) == pytest.approx(best, rel=1e-6)


def test_by_hand():
    scores = {"q": torch.tensor([0.9, 0.05]), "k": torch.tensor([0.5, 0.4]), "up": torch.tensor([0.3, 0.2])}
    layers = dict.fromkeys(scores, (8, 8))
    assert allocate_ranks(scores, layers, rank_budget=3, min_rank=0, max_rank=2) == {"q": 1, "k": 2, "up": 0}
    assert allocate_ranks(scores, layers, rank_budget=3, min_rank=1, max_rank=2) == {"q": 1, "k": 1, "up": 1}
    assert allocate_ranks(scores, layers, rank_budget=5, min_rank=1, max_rank=2) == {"q": 1, "k": 2, "up": 2}


def test_ties_go_to_the_layer_that_comes_first():
    scores = {name: torch.tensor([0.5, 0.25]) for name in ("b", "a", "c")}
    layers = dict.fromkeys(scores, (8, 8))
    assert allocate_ranks(scores, layers, rank_budget=4, min_rank=1, max_rank=2) == {"b": 2, "a": 1, "c": 1}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [300, 450, 700])
def test_a_parameter_budget_is_kept_and_used(seed, budget):
    scores = random_scores(seed)
    costs = {name: sum(shape) for name, shape in LAYERS.items()}
    ranks = allocate_ranks(scores, LAYERS, parameter_budget=budget, min_rank=1, max_rank=4)
    spent = sum(rank * costs[name] for name, rank in ranks.items())
    assert spent <= budget
    assert all(1 <= rank <= 4 for rank in ranks.values())
    # Nothing affordable is left out.
    assert all(rank == 4 or spent + costs[name] > budget for name, rank in ranks.items())
    # Greedy by score per parameter is within one component of the knapsack's optimum.
    best = best_by_search(scores, costs, budget, 1, 4)
    assert best - kept(scores, ranks) <= max(float(score.max()) for score in scores.values())


def test_a_parameter_budget_prefers_cheap_layers_at_equal_scores():
    scores = {name: torch.full((2,), 0.5) for name in ("wide", "narrow")}
    layers = {"wide": (64, 64), "narrow": (8, 8)}
    ranks = allocate_ranks(scores, layers, parameter_budget=128 + 3 * 16, min_rank=0, max_rank=2)
    assert ranks == {"wide": 1, "narrow": 2}
    assert allocate_ranks(scores, layers, parameter_budget=40, min_rank=0, max_rank=2) == {"wide": 0, "narrow": 2}


def test_a_parameter_budget_competes_by_score_per_parameter():
    """The wide layer's component scores highest, but the narrow layer's two give more for fewer parameters."""
    scores = {"wide": torch.tensor([0.6, 0.5]), "narrow": torch.tensor([0.5, 0.4])}
    layers = {"wide": (64, 64), "narrow": (8, 8)}
    assert allocate_ranks(scores, layers, parameter_budget=128, min_rank=0, max_rank=2) == {"wide": 0, "narrow": 2}
    assert allocate_ranks(scores, layers, parameter_budget=160, min_rank=0, max_rank=2) == {"wide": 1, "narrow": 2}


def test_equal_shapes_make_the_two_budgets_agree():
    scores = random_scores(9, names=("q", "k"))
    layers = dict.fromkeys(scores, (16, 16))
    by_rank = allocate_ranks(scores, layers, rank_budget=5, max_rank=4)
    assert allocate_ranks(scores, layers, parameter_budget=5 * 32, max_rank=4) == by_rank


def test_a_rank_never_exceeds_the_layer_nor_its_scores():
    scores = {"tiny": torch.full((8,), 0.9), "short": torch.full((2,), 0.8), "big": torch.full((8,), 0.1)}
    layers = {"tiny": (3, 16), "short": (16, 16), "big": (16, 16)}
    ranks = allocate_ranks(scores, layers, rank_budget=24, min_rank=1, max_rank=8)
    assert ranks == {"tiny": 3, "short": 2, "big": 8}


def test_min_rank_may_drop_layers_but_never_below_it():
    scores = {"strong": torch.full((4,), 0.9), "weak": torch.full((4,), 0.001)}
    layers = {"strong": (8, 8), "weak": (8, 8)}
    assert allocate_ranks(scores, layers, rank_budget=4, min_rank=0, max_rank=4) == {"strong": 4, "weak": 0}
    assert allocate_ranks(scores, layers, rank_budget=4, min_rank=2, max_rank=4) == {"strong": 2, "weak": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_rank": 4}, "exactly one"),
        ({"rank_budget": 8, "parameter_budget": 100, "max_rank": 4}, "exactly one"),
        ({"rank_budget": 8, "min_rank": 5, "max_rank": 4}, "min_rank=5, max_rank=4"),
        ({"rank_budget": 8, "min_rank": -1, "max_rank": 4}, "min_rank=-1"),
        ({"rank_budget": 7, "min_rank": 2, "max_rank": 4}, r"rank_budget 7 is too small.*costs 8"),
        ({"parameter_budget": 200, "min_rank": 1, "max_rank": 4}, r"parameter_budget 200 is too small.*costs 224"),
    ],
)
def test_contradictions_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        allocate_ranks(random_scores(0), LAYERS, **arguments)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [5, 8, 13])
@pytest.mark.parametrize("per_parameter", [False, True])
def test_marginal_components_are_those_of_the_sorted_list(seed, budget, per_parameter):
    """Against the list itself: what competes, by worth, cut where the budget ends."""
    scores, min_rank, max_rank = random_scores(seed), 1, 3
    worth = {
        (name, index + 1): float(score) / (sum(LAYERS[name]) if per_parameter else 1)
        for name, values in scores.items()
        for index, score in enumerate(values[:max_rank])
        if index >= min_rank
    }
    if per_parameter:
        ranks = allocate_ranks(scores, LAYERS, parameter_budget=40 * (budget + 2), min_rank=min_rank, max_rank=max_rank)
    else:
        ranks = allocate_ranks(scores, LAYERS, rank_budget=budget, min_rank=min_rank, max_rank=max_rank)
    kept, refused = marginal_components(
        scores, LAYERS, ranks, per_parameter=per_parameter, min_rank=min_rank, max_rank=max_rank
    )
    inside = [key for key in worth if key[1] <= ranks[key[0]]]
    outside = [key for key in worth if key[1] > ranks[key[0]]]
    for found, keys, choose in ((kept, inside, min), (refused, outside, max)):
        if not keys:
            assert found is None
        else:
            key = choose(keys, key=lambda key: worth[key])
            assert found is not None
            assert (found.layer, found.component) == key
            assert found.score == pytest.approx(worth[key])


def test_equal_scores_have_the_margin_of_the_allocation():
    scores = {name: torch.ones(4) for name in LAYERS}
    ranks = allocate_ranks(scores, LAYERS, rank_budget=6, max_rank=4)
    kept, refused = marginal_components(scores, LAYERS, ranks, max_rank=4)
    assert kept is not None
    assert refused is not None
    assert ranks[kept.layer] == kept.component > 1
    assert ranks[refused.layer] == refused.component - 1
    everything = allocate_ranks(scores, LAYERS, rank_budget=16, max_rank=4)
    assert marginal_components(scores, LAYERS, everything, max_rank=4)[1] is None
    least = allocate_ranks(scores, LAYERS, rank_budget=4, max_rank=4)
    assert marginal_components(scores, LAYERS, least, max_rank=4)[0] is None
