"""CNTLoRA (Das et al. 2025, ICCV, arXiv:2507.08044): constraints on activations, solved in closed form.

Only the paper's abstract, its first figure's caption and the start of its introduction were available, and no code
is public. The equations below are **our derivation**, chosen to have every property that those state: the estimate
depends on the pre-trained weight and the fine-tuning activations only, it has a closed form, it is decomposed into
both factors, and ranks vary.

Let S = E[x x'] over the fine-tuning inputs of a layer, S_l = S + ridge (eigenvalues floored) and W0 its weight.

* `"alignment"`: the adapted layer gives the fine-tuning inputs the output second moment that the pre-trained layer
  gave its pre-training inputs. These are taken as isotropic (layers follow normalisations):
  (W0 + D) S_l (W0 + D)' = c^2 W0 W0'. Of all solutions D = W0 (c S_l^(-1/2) - I) is the one that displaces the inputs
  least (the optimal-transport map); c^2 is the mean eigenvalue of S_l, so isotropic inputs give D = 0.
  Or they are measured on samples of the pre-training distribution, with second moment S_p (S_pl with its own ridge):
  (W0 + D) S_l (W0 + D)' = W0 S_pl W0', and D = W0 (T - I) with the optimal-transport map between two Gaussians,
  T = S_l^(-1/2) (S_l^(1/2) S_pl S_l^(1/2))^(1/2) S_l^(-1/2) (Knott & Smith 1984). Equal distributions give D = 0.
* `"decorrelation"`: (W0 + D) X = W0 X_p with X_p uncorrelated with X gives the ridge solution D = -W0 S S_l^(-1).

The decorrelation needs products with S and solves with S_l only. The alignments are computed in the eigenbasis of S,
where all of these but T are column scalings of W0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lorainit_diffusers.eigenbasis import Eigenbasis
from lorainit_diffusers.linalg import (
    SVD,
    Leading,
    Operator,
    column_limit,
    leading_eigenpairs,
    product_svd,
    times,
    top_svd,
    transposed_times,
)
from lorainit_diffusers.methods.base import (
    LoraFactors,
    Observed,
    Observes,
    Solution,
    StepZero,
    check_hyperparameters,
    input_statistic,
    kaiming_input_power,
    one_if_zero,
)
from lorainit_diffusers.methods.declared import Declared
from lorainit_diffusers.ranges import Range
from lorainit_diffusers.ridged import FewRowsRidged, RidgedMoment
from lorainit_diffusers.statistics import InputsAndReference, InputStatistic, SecondMoment

# Directions that the fine-tuning data never excites would otherwise dominate the inverse.
EIGENVALUE_FLOOR = 1e-4
# Below this share of the largest, a singular value of D is rounding.
SMALLEST_SINGULAR_VALUE = 1e-5


@dataclass(frozen=True)
class CNTLoRA(Declared):
    """The closed-form estimate D of the weight change, truncated to rank r and factored.

    Attributes:
        constraint: Which constraint D solves, see the module's docstring.
        ridge: Added to S, as a multiple of its mean eigenvalue; to S_p likewise, of its own.
        truncation: `"activation"` keeps the best rank-r approximation of the output change on the data (SVD of
            D S_l^(1/2)); `"weight"` that of D itself.
        gauge: How B A = D_r is split. `"whitened"`: the hidden activations A x are uncorrelated with equal variance
            (under S_l), which preconditions the training of B; `"activation"`: uncorrelated, the square root of the
            singular values on both sides; `"balanced"`: the plain SVD of D_r, its square root on both sides.
        base: `"offset"` subtracts B A of step 0 and so keeps the base model's function; `"down_only"` keeps
            A and sets B = 0; `"active"` starts from W0 + gamma * D_r.
        gamma: Of `"active"`.
        scale: One scalar moves between A and B (`"down_only"`: scales A). `"paper"`: ||A||_F = ||B||_F
            (`"down_only"`: ||A||_F = sqrt(rank)); `"matched"`: E||A x||^2 as PEFT's Kaiming initialisation has it.
        pretraining: What `"alignment"` takes the pre-training inputs for. `"isotropic"`: white, as strong as the
            fine-tuning inputs; `"measured"`: as the reference batches have them, which `initialize` then needs.
    """

    observes: ClassVar[Observes] = "inputs"
    summary: ClassVar[str] = (
        "Constraints on the layer's inputs, solved in closed form for the change of the weight, whose factors are "
        "subtracted again from the base."
    )
    source: ClassVar[str] = "arXiv:2507.08044 (the paper's abstract; the equations are our derivation)"
    cost: ClassVar[str] = (
        "one forward pass a batch, a second moment for each group of layers with the same input, a truncated SVD "
        "and a solve a layer"
    )
    zero_delta: ClassVar[Mapping[str, Any]] = {"base": "down_only"}
    with_reference: ClassVar[Mapping[str, Any]] = {"constraint": "alignment", "pretraining": "measured"}
    RANGES: ClassVar[Mapping[str, Range]] = {"ridge": Range(0, 10**6), "gamma": Range(-(10**6), 10**6)}

    constraint: Literal["alignment", "decorrelation"] = "decorrelation"
    ridge: float = 0.1
    truncation: Literal["activation", "weight"] = "activation"
    gauge: Literal["whitened", "activation", "balanced"] = "balanced"
    base: Literal["offset", "down_only", "active"] = "offset"
    gamma: float = 0.1
    scale: Literal["paper", "matched"] = "paper"
    pretraining: Literal["isotropic", "measured"] = "isotropic"

    def __post_init__(self) -> None:
        check_hyperparameters(self)
        if self.pretraining == "measured" and self.constraint != "alignment":
            raise ValueError(
                f"pretraining is 'measured', which constraint {self.constraint!r} does not use; "
                "set constraint='alignment' as well, or leave pretraining at 'isotropic'"
            )

    @property
    def step_zero(self) -> StepZero:
        """Follows from `base`."""
        steps: dict[str, StepZero] = {"offset": "offset", "down_only": "equal", "active": "moved"}
        return steps[self.base]

    @property
    def needs_reference(self) -> bool:
        """Follows from `pretraining`."""
        return self.pretraining == "measured"

    def statistic(self, in_features: int, out_features: int, rank: int) -> Observed | None:
        """The exact second moment of the inputs; with `pretraining="measured"`, that of the reference too."""
        if self.pretraining == "measured":
            return InputsAndReference(SecondMoment(in_features), SecondMoment(in_features))
        return SecondMoment(in_features)

    def solve(
        self, weight: Tensor, statistic: Observed | None, max_rank: int, *, scaling: float, generator: torch.Generator
    ) -> Solution:
        """Scores are the shares of ||D S_l^(1/2)||_F^2 (`truncation="weight"`: of ||D||_F^2).

        Raises:
            ValueError: The statistic is not the one that this method asked for.
        """
        reference: InputStatistic | None = None
        if self.pretraining == "measured":
            if not isinstance(statistic, InputsAndReference):
                raise ValueError(
                    "pretraining='measured' needs the inputs and their reference; run the collection pass over both"
                )
            statistic, reference = statistic.inputs, statistic.reference
        inputs = input_statistic(statistic)
        if self.constraint == "decorrelation" and self.ridge >= EIGENVALUE_FLOOR:
            truncated = self._decorrelated(weight, inputs, max_rank)
            # A direction that D does not have has no row in U' D; the eigenbasis completes it.
            if truncated.singular[-1] > SMALLEST_SINGULAR_VALUE * truncated.singular[0]:
                return self._factored(truncated, inputs, scaling)
        return self._solve_in_eigenbasis(weight, inputs, reference, max_rank, scaling)

    def _decorrelated(self, weight: Tensor, inputs: InputStatistic, max_rank: int) -> _Truncated:
        """D = -W0 S S_l^(-1) = -W0 (I - ridge S_l^(-1)), truncated; without an eigenbasis.

        The left singular vectors U of D S_l^(1/2) are those of D S_l D' = W0 (S - ridge + ridge^2 S_l^(-1)) W0', and
        D_r = U U' D: products with S and solves with its Cholesky factor are all that this needs.
        """
        ridged = inputs.ridged(self.ridge)
        few = isinstance(ridged, FewRowsRidged)
        squared = self._squared_few(weight, ridged) if few else self._squared(weight, inputs, ridged)
        leading = leading_eigenpairs(
            squared,
            weight.shape[0],
            max_rank,
            device=weight.device,
            start=weight @ inputs.mean().to(weight)[:, None],  # the mean's output is far ahead of all others
            with_trace=True,
            max_columns=column_limit(*weight.shape),
            delicate=True,
        )
        rows = -ridged.shrink(transposed_times(weight, leading.vectors)).mT
        coloured = self.truncation == "weight" and self.gauge != "balanced"
        return _Truncated(leading, rows, inputs, ridged, coloured=coloured)

    def _squared(self, weight: Tensor, inputs: InputStatistic, ridged: RidgedMoment) -> Operator:
        """D S_l D' (`truncation="weight"`: D D'), as an operator."""

        def apply(block: Tensor) -> Tensor:
            block = transposed_times(weight, block)
            shrunk = ridged.shrink(block)
            if self.truncation == "weight":
                return times(weight, ridged.shrink(shrunk))
            return times(weight, inputs.times(block) - ridged.ridge * shrunk)

        return apply

    def _squared_few(self, weight: Tensor, ridged: FewRowsRidged) -> Operator:
        """The same where S = Y' Y for few rows Y: with Z = Y W0', D S_l D' = Z' (Y S_l^(-1) Y') Z."""
        outputs = ridged.rows @ weight.mT  # Z

        def apply(block: Tensor) -> Tensor:
            block = ridged.shrink_rows(times(outputs, block))
            return transposed_times(outputs, block if self.truncation == "activation" else ridged.solve_rows(block))

        return apply

    def _factored(self, truncated: _Truncated, inputs: InputStatistic, scaling: float) -> Solution:
        """The split of D_r = U R into B A that `gauge`, `base` and `scale` ask for."""
        scores = truncated.singular.square() / (truncated.total if truncated.total > 0 else 1.0)
        trace = inputs.trace(centered=False)
        natural = "weight" if self.gauge == "balanced" else "activation"  # the metric that the gauge is orthogonal in

        def factors(rank: int) -> LoraFactors:
            left, singular = truncated.left[:, :rank], truncated.singular[:rank]
            if natural == self.truncation:
                mixing = torch.diag(1 / singular)
            else:
                other = truncated.rows if natural == "weight" else truncated.coloured_rows
                turned, singular, _ = product_svd(left, other[:rank])
                left, mixing = turned, (turned.mT @ left) / singular[:, None]
            # A = mixing R: orthonormal rows in the metric of the gauge
            lora_B = left * singular
            if self.gauge != "whitened":
                mixing, lora_B = singular.sqrt()[:, None] * mixing, left * singular.sqrt()
            lora_A = mixing @ truncated.rows[:rank]
            power = ((mixing @ truncated.rows_moment[:rank, :rank]) * mixing).sum()
            lora_B = lora_B * ((self.gamma if self.base == "active" else 1.0) / scaling)
            factor = self._factor(lora_A, lora_B, power, trace)
            lora_A, lora_B = lora_A * factor, lora_B / factor
            if self.base == "down_only":
                lora_B = torch.zeros_like(lora_B)
            return LoraFactors(lora_A.float().contiguous(), lora_B.float().contiguous())

        return Solution(scores, factors)

    def _solve_in_eigenbasis(
        self, weight: Tensor, inputs: InputStatistic, reference: InputStatistic | None, max_rank: int, scaling: float
    ) -> Solution:
        """Everything else, in coordinates in which S is diagonal: there, any function of S is one factor a column."""
        basis = inputs.eigenbasis(centered=False)
        values, trace = basis.values, inputs.trace(centered=False)
        ridged = self._ridged(values)
        root = ridged.sqrt()
        projected = basis.project(weight.to(values.dtype))  # (out, in), columns in the eigenbasis of S, as delta's are
        if reference is not None:
            delta = self._transported_minus_self(projected, root, basis, reference.eigenbasis(centered=False))
        elif self.constraint == "alignment":
            delta = projected * (ridged.mean().sqrt() / root - 1)
        else:
            delta = projected * (-values / ridged)
        metric = root if self.truncation == "activation" else torch.ones_like(root)
        truncated = SVD(*(part.to(root.dtype) for part in top_svd(delta * metric, max_rank)))
        total = (delta * metric).square().sum()
        scores = truncated.values.square() / total.clamp_min(torch.finfo(total.dtype).tiny)

        def factors(rank: int) -> LoraFactors:
            left, singular, right = truncated.left[:, :rank], truncated.values[:rank], truncated.right[:rank]
            # The gauges differ in the metric in which the factors are orthogonal; rotate where it is not truncation's.
            gauge_metric = torch.ones_like(root) if self.gauge == "balanced" else root
            if not torch.equal(gauge_metric, metric):
                left, singular, right = product_svd(left * singular, right / metric * gauge_metric)
            lora_A, lora_B = right / gauge_metric, left * singular
            if self.gauge != "whitened" and bool(singular.any()):  # D = 0 keeps A's directions
                lora_A, lora_B = lora_A * singular.sqrt()[:, None], left * singular.sqrt()
            lora_B = lora_B * ((self.gamma if self.base == "active" else 1.0) / scaling)
            factor = self._factor(lora_A, lora_B, (lora_A.square() * values).sum(), trace)
            lora_A, lora_B = basis.lift(lora_A) * factor, lora_B / factor
            if self.base == "down_only":
                lora_B = torch.zeros_like(lora_B)
            return LoraFactors(lora_A.float().contiguous(), lora_B.float().contiguous())

        return Solution(scores, factors)

    def _ridged(self, values: Tensor) -> Tensor:
        """(features,) eigenvalues with the ridge added and the floor applied."""
        mean_eigenvalue = one_if_zero(values.mean())
        return (values + self.ridge * mean_eigenvalue).clamp_min(EIGENVALUE_FLOOR * mean_eigenvalue)

    def _transported_minus_self(self, rows: Tensor, root: Tensor, basis: Eigenbasis, reference: Eigenbasis) -> Tensor:
        """`rows @ (T - I)`, all in the eigenbasis of S, where S_l^(1/2) is diag(`root`).

        Of sketches both moments are a multiple of the identity outside the span Z of their leading eigenvectors, and so
        is T: sqrt(rest of S_pl / rest of S_l). Within Z the same formula holds for the small matrices.
        """
        # In float64 at any size: the condition number of the product is that of S_l times that of S_pl.
        scale, reference_values = root.double(), self._ridged(reference.values).double()
        if basis.num_known == reference.num_known == len(root):
            half = scale[:, None] * (basis.vectors.mT.double() @ reference.vectors.double())
            half = half * reference_values.sqrt()
            identity = torch.eye(len(scale), dtype=scale.dtype, device=scale.device)
            return rows @ (_transport(half @ half.mT, scale) - identity).to(root.dtype)
        k, rest, reference_rest = basis.num_known, scale[-1], reference_values[-1]
        leading = basis.project(reference.vectors.mT.to(root.dtype)).mT.double()  # (features, k') columns
        span = torch.linalg.qr(leading[k:]).Q  # Z: the first k axes, and these
        inner = torch.cat([leading[:k], span.mT @ leading[k:]])
        scale = torch.cat([scale[:k], rest.expand(span.shape[1])])
        identity = torch.eye(len(scale), dtype=scale.dtype, device=scale.device)
        moment = inner * (reference_values[: reference.num_known] - reference_rest) @ inner.mT
        moment = moment + reference_rest * identity
        outside = reference_rest.sqrt() / rest
        within = (_transport(scale[:, None] * moment * scale, scale) - outside * identity).to(root.dtype)
        span, outside = span.to(root.dtype), (outside - 1).to(root.dtype)
        change = torch.cat([rows[:, :k], rows[:, k:] @ span], dim=1) @ within
        return outside * rows + torch.cat([change[:, :k], change[:, k:] @ span.mT], dim=1)

    def _factor(self, lora_A: Tensor, lora_B: Tensor, power: Tensor, trace: float) -> Tensor:
        """The scalar that A is multiplied and B divided by; `power` is E||A x||^2."""
        tiny = torch.finfo(lora_A.dtype).tiny
        rank, in_features = lora_A.shape
        if self.scale == "matched" and float(power) > 0:
            return (rank * kaiming_input_power(trace, in_features) / power).sqrt()
        norm_A = lora_A.norm().clamp_min(tiny)
        norm_B = lora_B.norm()
        if self.base == "down_only" or float(norm_B) == 0.0:  # D = 0: nothing to balance against
            return rank**0.5 / norm_A
        return (norm_B / norm_A).sqrt()


class _Truncated:
    """D_r = U R of one layer: what all ways to split it have in common. Holds on to no weight and no moment.

    Attributes:
        left: (out_features, max_rank) U, orthonormal columns.
        singular: (max_rank,) singular values of D in the metric of the truncation, descending.
        rows: (max_rank, in_features) R = U' D.
        total: The sum of all squared singular values.
        coloured_rows: (max_rank, in_features) R F with F F' = S_l, where `coloured` asks for them.
        rows_moment: (max_rank, max_rank) R S R'.
    """

    def __init__(
        self, leading: Leading, rows: Tensor, inputs: InputStatistic, ridged: RidgedMoment, *, coloured: bool
    ) -> None:
        self.left, self.singular, self.rows, self.total = leading.vectors, leading.values.sqrt(), rows, leading.trace
        self.rows_moment = rows @ inputs.times(rows.mT)
        self.coloured_rows = ridged.colour_transposed(rows.mT).mT if coloured else rows


def _transport(squared: Tensor, scale: Tensor) -> Tensor:
    """S_l^(-1/2) `squared`^(1/2) S_l^(-1/2) with S_l^(1/2) = diag(`scale`); squared is S_l^(1/2) S_pl S_l^(1/2)."""
    values, vectors = torch.linalg.eigh(squared)
    return (vectors * values.clamp_min(0).sqrt() @ vectors.mT) / torch.outer(scale, scale)
