"""OLoRA (Büyükakyüz 2024, arXiv:2406.01775): the QR factors of the pre-trained weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorainit_diffusers.linalg import solve_dtype
from lorainit_diffusers.methods.base import LoraFactors, Observed, Observes, Solution, StepZero
from lorainit_diffusers.methods.declared import Declared
from lorainit_diffusers.statistics import Statistic


@dataclass(frozen=True)
class OLoRA(Declared):
    """W0 = Q R, B = Q[:, :r], A = R[:r]; the adapter is offset.

    As in PEFT, A and B are not divided by the scaling: the offset is `scaling * B A`.
    """

    observes: ClassVar[Observes] = "nothing"
    summary: ClassVar[str] = (
        "The first columns and rows of the weight's QR decomposition, subtracted again from the base."
    )
    source: ClassVar[str] = "arXiv:2406.01775"
    cost: ClassVar[str] = "one full QR a layer; no data"
    gives_scores: ClassVar[bool] = False

    @property
    def step_zero(self) -> StepZero:
        """The adapter subtracts the initial B A."""
        return "offset"

    def statistic(self, in_features: int, out_features: int, rank: int) -> Statistic | None:
        """Nothing is observed."""
        return None

    def solve(
        self, weight: Tensor, statistic: Observed | None, max_rank: int, *, scaling: float, generator: torch.Generator
    ) -> Solution:
        """No scores: QR without pivoting does not order its components."""
        q, r = torch.linalg.qr(weight.to(solve_dtype(max(weight.shape), weight.device)))
        return Solution(None, lambda rank: LoraFactors(r[:rank].float().contiguous(), q[:, :rank].float().contiguous()))
