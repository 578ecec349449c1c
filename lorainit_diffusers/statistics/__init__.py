"""Streaming statistics of what a linear layer sees: what the initialisations are computed from.

Each statistic is fed row batches with `update`, joined across processes with `all_reduce` (or
`merge`), and read when the pass is over. All are additive: any split of the rows into batches, any order and any
number of processes give the same result up to rounding in the accumulator.

* `SecondMoment`: the exact mean and covariance (Chan, Golub and LeVeque 1979, the pairwise update).
* `SketchedSecondMoment`: a Nyström sketch of the same in `features x k` numbers (Tropp et al. 2017,
  arXiv:1706.05736, algorithm 3), for layers whose exact moment would not fit.
* `GradientMean`: the mean gradient of a weight.

Accumulators live where the rows are, or on the device given to `move`; products are taken where the rows are, in
true float32 (no TF32, no autocast): half-precision activations are converted before anything is squared, so a float16
activation of 1e4 does not overflow.
"""

from __future__ import annotations

from lorainit_diffusers.statistics.base import InputStatistic, Statistic, SumAcrossProcesses, full_float32
from lorainit_diffusers.statistics.gradient import GradientMean
from lorainit_diffusers.statistics.pairs import InputsAndGradient, InputsAndReference
from lorainit_diffusers.statistics.processes import all_reduce
from lorainit_diffusers.statistics.second_moment import SecondMoment
from lorainit_diffusers.statistics.sketch import SketchedSecondMoment

__all__ = [
    "GradientMean",
    "InputStatistic",
    "InputsAndGradient",
    "InputsAndReference",
    "SecondMoment",
    "SketchedSecondMoment",
    "Statistic",
    "SumAcrossProcesses",
    "all_reduce",
    "full_float32",
]
