"""From statistics to factors: each layer's solution, and what stands in where a layer has nothing to learn from."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from lorainit_diffusers import adapters
from lorainit_diffusers.collect import Collection, parts_of
from lorainit_diffusers.methods import Initializer, LoraFactors, Solution
from lorainit_diffusers.methods.base import Observed
from lorainit_diffusers.methods.declared import fewest_rows
from lorainit_diffusers.methods.guard import check_weight, guarded_factors, why_nothing_to_learn
from lorainit_diffusers.methods.kaiming import Kaiming
from lorainit_diffusers.quantized import is_packed
from lorainit_diffusers.rank_plan import RankPlan
from lorainit_diffusers.statistics import SketchedSecondMoment, full_float32


@dataclass(frozen=True)
class Solved:
    """What the solver found.

    Attributes:
        solutions: Layer -> solution; nothing but its factors where its rank was settled before.
        fallbacks: Layer -> why it, or a part of it, got Kaiming's factors.
        num_rows: Layer -> rows that it saw, where anything was observed.
        sketch_columns: Layer -> columns of the sketch of its inputs, where they were not kept exactly.
    """

    solutions: dict[str, Solution] = field(default_factory=dict[str, Solution])
    fallbacks: dict[str, str] = field(default_factory=dict[str, str])
    num_rows: dict[str, int] = field(default_factory=dict[str, int])
    sketch_columns: dict[str, int] = field(default_factory=dict[str, int])

    def scores(self, name: str, caps: Mapping[str, int]) -> dict[str, Tensor]:
        """Scores of every layer, by which ranks are allocated.

        Args:
            name: Of the method, for messages.
            caps: Layer -> the largest rank that was asked for.

        Raises:
            ValueError: The method gives none, although it does not say so.
        """
        scores: dict[str, Tensor] = {}
        for full_name, solution in self.solutions.items():
            if solution.scores is None and full_name not in self.fallbacks:
                raise ValueError(f"init {name!r} gives no scores to allocate ranks by; drop variable_rank")
            # A layer that fell back competes for nothing beyond min_rank.
            scores[full_name] = torch.zeros(caps[full_name]) if solution.scores is None else solution.scores
        return scores


@dataclass(frozen=True)
class Solver:
    """A method at work on the layers of one run.

    Attributes:
        name: Of the method, for messages.
        method: The initialisation.
        plan: The ranks.
        seed: Of everything that is drawn for factors, layer by layer.
    """

    name: str
    method: Initializer
    plan: RankPlan
    seed: int

    def solve(self, layers: Mapping[str, nn.Linear], collection: Collection) -> Solved:
        """Every layer's solution; those whose rows are too few or say nothing get Kaiming's.

        Frees as it goes: a statistic with the last layer that shares it, and, unless the rank is still open, all that a
        solution holds but its factors.

        Raises:
            ValueError: A weight that is not finite, or cannot be decomposed (names the layer).
        """
        solved = Solved()
        with full_float32(_device(layers)):  # neither TF32 nor an autocast of the caller may round a decomposition
            for full_name, layer in layers.items():
                statistic = collection.statistics.pop(full_name, None)
                try:
                    solution = self._solution(full_name, layer, statistic, solved)
                    if not self.plan.variable:
                        factors = self._factors(full_name, layer, solution, self.plan.ranks[full_name], solved)
                        solution = Solution(solution.scores, lambda _rank, factors=factors: factors)
                except torch.linalg.LinAlgError as error:
                    raise ValueError(
                        f"layer {full_name!r} cannot be decomposed for init {self.name!r} ({error}); look for "
                        "non-finite values in its weight, or for activations too large for float32 when squared"
                    ) from error
                solved.solutions[full_name] = solution
        return solved

    def weights(
        self, layers: Mapping[str, nn.Linear], solved: Solved, ranks: Mapping[str, int]
    ) -> dict[str, adapters.AdapterWeights]:
        """What every layer's adapter starts with; layers of rank 0 are left out.

        Raises:
            ValueError: Factors that are not finite (names the layer).
        """
        weights: dict[str, adapters.AdapterWeights] = {}
        with full_float32(_device(layers)):
            for full_name, solution in solved.solutions.items():
                if ranks[full_name] == 0:
                    continue
                factors = self._factors(full_name, layers[full_name], solution, ranks[full_name], solved)
                offset = factors if self.method.step_zero == "offset" and bool(factors.lora_B.any()) else None
                weights[full_name] = adapters.AdapterWeights(factors, self.plan.scalings[full_name], offset=offset)
        return weights

    def _solution(self, full_name: str, layer: nn.Linear, statistic: Observed | None, solved: Solved) -> Solution:
        rank, solver, parts = self.plan.ranks[full_name], self.method, parts_of(statistic)
        if statistic is not None:
            solved.num_rows[full_name] = statistic.num_rows
            if isinstance(parts[0], SketchedSecondMoment):
                solved.sketch_columns[full_name] = parts[0].num_columns
        if statistic is None and self.method.observes != "nothing":
            solver = Kaiming()
            solved.fallbacks[full_name] = "the loss never reaches it: Kaiming A, zero B"
        elif statistic is not None and statistic.num_rows < fewest_rows(self.method, rank):
            solver = Kaiming()
            solved.fallbacks[full_name] = f"only {statistic.num_rows} rows for rank {rank}: Kaiming A, zero B"
        elif (reason := why_nothing_to_learn(self.method, statistic)) is not None:
            solver = Kaiming()
            solved.fallbacks[full_name] = f"{reason}: Kaiming A, zero B"
        generator = torch.Generator().manual_seed(derive_seed(self.seed, full_name))
        for part in parts:
            part.move(layer.weight.device)
        weight = adapters.base_weight(layer)
        if is_packed(layer):
            check_weight(full_name, weight, self.name)
        scaling = self.plan.scalings[full_name]
        return solver.solve(weight, statistic, self.plan.caps[full_name], scaling=scaling, generator=generator)

    def _factors(self, full_name: str, layer: nn.Linear, solution: Solution, rank: int, solved: Solved) -> LoraFactors:
        """The factors of a layer's solution, all of which can be trained; notes what was replaced in them."""
        factors, replaced = guarded_factors(
            solution,
            rank,
            partial(adapters.base_weight, layer),
            layer=full_name,
            method=self.name,
            scaling=self.plan.scalings[full_name],
            seed=derive_seed(self.seed, full_name, "vanishing"),
        )
        if replaced is not None:
            solved.fallbacks.setdefault(full_name, replaced)
        return factors


def _device(layers: Mapping[str, nn.Linear]) -> torch.device:
    return next(iter(layers.values())).weight.device


def derive_seed(*parts: int | str) -> int:
    """A seed from what it is for: equal parts, equal seeds, in every process and on every machine."""
    return zlib.crc32("/".join(map(str, parts)).encode())
