"""What every method must fulfil, whatever it computes."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from core_fixtures import draw_weight, product, relative_error, rows_with_spectrum
from torch import Tensor

from lorainit_diffusers.initialize import make_method
from lorainit_diffusers.methods import METHODS, LoraFactors
from lorainit_diffusers.statistics import SecondMoment, SketchedSecondMoment

SHAPES = [(24, 16), (16, 24), (20, 20)]
RANK = 4
RANDOM = {"kaiming", "gaussian", "orthonormal", "orthogonal"}
EVERY_METHOD = pytest.mark.parametrize("name", METHODS)
MEASURED = {"constraint": "alignment", "pretraining": "measured"}
VARIANTS = [
    *((name, {}) for name in METHODS),
    *(
        ("cntlora", {"constraint": constraint, "truncation": truncation, "gauge": gauge, "base": base, "scale": scale})
        for constraint in ("alignment", "decorrelation")
        for truncation in ("activation", "weight")
        for gauge in ("whitened", "activation", "balanced")
        for base in ("offset", "down_only", "active")
        for scale in ("paper", "matched")
    ),
    *(
        ("cntlora", {**MEASURED, "truncation": truncation, "gauge": gauge, "base": base})
        for truncation in ("activation", "weight")
        for gauge in ("whitened", "activation", "balanced")
        for base in ("offset", "down_only", "active")
    ),
    *(
        ("eva", {"centered": centered, "whiten": whiten, "scale": scale, "sketch_columns": columns})
        for centered in (True, False)
        for whiten in ("none", "singular_value", "variance_ratio")
        for scale in ("paper", "matched")
        for columns in (None, 12)
    ),
    *(
        ("lora_ga", {"direction": direction, "scale": scale})
        for direction in ("ArB2r", "A2rBr", "ArBr", "random")
        for scale in ("stable", "gd", "unit")
    ),
    *(
        ("gradient_step", {"directions": directions, "scale": scale, "step": step})
        for directions in ("inputs", "gradient", "whitened_gradient")
        for scale in ("matched", "unit")
        for step in (0.0, 0.1)
    ),
]
VARIANTS_OF_INPUTS = [(name, options) for name, options in VARIANTS if METHODS[name].observes.startswith("inputs")]


def states(statistic: Any) -> list[dict[str, Tensor]]:
    """The state of a statistic, or of each of its two parts."""
    parts = vars(statistic).values() if dataclasses.is_dataclass(statistic) else [statistic]
    return [part.state_dict() for part in parts]


def _identify(value: object) -> str:
    return "-".join(map(str, value.values())) if isinstance(value, dict) else str(value)


EVERY_STATISTIC = pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in METHODS), ("cntlora", MEASURED)], ids=_identify
)
EVERY_VARIANT = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=_identify)
EVERY_VARIANT_OF_INPUTS = pytest.mark.parametrize(("name", "options"), VARIANTS_OF_INPUTS, ids=_identify)


def observations(
    name: str, shape: tuple[int, int], rows: Tensor | None = None, options: dict[str, Any] | None = None
) -> Any:
    deviations = [0.8**index for index in range(shape[1])]
    if rows is None:
        rows = rows_with_spectrum(150, deviations, mean=0.3)
    if (options or {}).get("pretraining") == "measured":
        return rows, rows_with_spectrum(120, deviations, mean=-0.2, seed=1)
    gradients = [draw_weight(*shape, seed=seed) for seed in (5, 6)]
    observes = METHODS[name].observes
    return {"nothing": None, "inputs": rows, "gradients": gradients, "inputs and gradients": (rows, gradients)}[
        observes
    ]


def assert_valid(factors: LoraFactors, shape: tuple[int, int], rank: int) -> None:
    assert factors.lora_A.shape == (rank, shape[1])
    assert factors.lora_B.shape == (shape[0], rank)
    for factor in factors:
        assert factor.dtype == torch.float32
        assert not factor.requires_grad
        assert torch.isfinite(factor).all()


def test_the_names_of_the_issue_are_all_there():
    expected = [
        "cntlora",
        "eva",
        "lora_ga",
        "gradient_step",
        "gradient_whitened",
        "pissa",
        "olora",
        "milora",
        "corda",
        "orthonormal",
        "orthogonal",
        "gaussian",
        "kaiming",
    ]
    assert set(METHODS) >= set(expected)


@EVERY_METHOD
def test_a_method_is_a_frozen_dataclass(name):
    method = make_method(name)
    assert dataclasses.is_dataclass(method)
    assert type(method).__dataclass_params__.frozen
    assert method.observes in {"nothing", "inputs", "gradients", "inputs and gradients"}
    assert method.step_zero in {"equal", "offset", "moved"}
    assert (method.statistic(16, 16, RANK) is None) == (method.observes == "nothing")


@EVERY_STATISTIC
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [2, 4, 8])
def test_factors_have_the_right_shape_and_type_at_every_rank(solve, name, options, shape, rank):
    solution = solve(name, draw_weight(*shape), observations(name, shape, options=options), 8, **options)
    assert_valid(solution.factors(rank), shape, rank)


@EVERY_VARIANT
def test_the_step_zero_that_a_method_claims_is_the_one_it_has(solve, name, options):
    shape = (24, 16)
    observed = observations(name, shape, options=options)
    factors = solve(name, draw_weight(*shape), observed, RANK, scaling=0.5, **options).factors(RANK)
    assert_valid(factors, shape, RANK)
    change = (factors.lora_B.double() @ factors.lora_A.double()).abs().max()
    if make_method(name, options).step_zero == "equal":
        assert float(change) < 1e-7
    else:
        assert float(change) > 1e-4
    assert float(factors.lora_A.abs().max()) > 1e-4  # A = 0 and B = 0 at once would never train


@EVERY_VARIANT
def test_scores_descend_from_at_most_one_and_are_shares(solve, name, options):
    shape = (24, 16)
    observed = observations(name, shape, options=options)
    scores = solve(name, draw_weight(*shape), observed, RANK, **options).scores
    if scores is None:
        assert name in RANDOM | {"olora", "milora"}
        return
    assert scores.ndim == 1
    assert len(scores) >= RANK
    assert (scores.diff() <= 1e-12).all()
    assert float(scores[0]) > 0
    assert float(scores[-1]) >= 0
    assert float(scores.sum()) <= 1 + 1e-5


@EVERY_STATISTIC
def test_neither_weight_nor_statistic_is_changed(fill, name, options):
    shape = (16, 24)
    weight, method = draw_weight(*shape), make_method(name, options)
    statistic = method.statistic(shape[1], shape[0], RANK)
    if statistic is not None:
        fill(statistic, observations(name, shape, options=options))
        state = copy.deepcopy(states(statistic))
    original = weight.clone()
    method.solve(weight, statistic, RANK, scaling=0.5, generator=torch.Generator()).factors(RANK)
    assert torch.equal(weight, original)
    if statistic is not None:
        for before, after in zip(state, states(statistic), strict=True):
            for key, value in after.items():
                assert torch.equal(value, before[key])


@EVERY_STATISTIC
@pytest.mark.parametrize("size", [24, 544])  # 544: the randomised decompositions
def test_the_generator_is_the_only_source_of_randomness(solve, name, options, size):
    shape, seen = (size, size), []
    weight, observed = draw_weight(*shape), observations(name, shape, options=options)
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        seen.append(solve(name, weight, observed, RANK, seed=7, **options).factors(RANK))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(seen[0].lora_A, seen[1].lora_A)
    assert torch.equal(seen[0].lora_B, seen[1].lora_B)


@EVERY_METHOD
def test_the_seed_matters_for_the_random_methods_only(solve, name):
    shape = (24, 16)
    first, second = (solve(name, draw_weight(*shape), observations(name, shape), seed=s).factors(RANK) for s in (0, 1))
    assert torch.equal(first.lora_A, second.lora_A) == (name not in RANDOM)


@EVERY_STATISTIC
def test_a_zero_weight_gives_finite_factors_and_scores(solve, name, options):
    """Zero-initialised output projections are common (ControlNet, DiT)."""
    shape = (24, 16)
    solution = solve(name, torch.zeros(shape), observations(name, shape, options=options), **options)
    assert_valid(solution.factors(RANK), shape, RANK)
    if solution.scores is not None:
        assert torch.isfinite(solution.scores).all()


@EVERY_VARIANT
def test_dead_inputs_and_zero_gradients_give_finite_factors_and_scores(solve, name, options):
    shape = (24, 16)
    rows, gradients = torch.zeros(150, shape[1]), [torch.zeros(shape)]
    dead = {"inputs": rows, "gradients": gradients, "inputs and gradients": (rows, gradients)}
    observed = dead.get(METHODS[name].observes)
    if options.get("pretraining") == "measured":
        observed = (rows, rows)
    solution = solve(name, draw_weight(*shape), observed, **options)
    assert_valid(solution.factors(RANK), shape, RANK)
    if solution.scores is not None:
        assert torch.isfinite(solution.scores).all()


@EVERY_VARIANT_OF_INPUTS
def test_constant_rows_give_finite_factors_and_scores(solve, name, options):
    """One row a sample, all the same: a pooled unconditional embedding, say."""
    shape = (24, 16)
    rows = torch.linspace(-1, 2, shape[1]).expand(40, -1)
    solution = solve(name, draw_weight(*shape), observations(name, shape, rows, options), **options)
    assert_valid(solution.factors(RANK), shape, RANK)
    assert solution.scores is not None
    assert torch.isfinite(solution.scores).all()


@EVERY_STATISTIC
def test_a_method_that_observes_refuses_to_solve_without_its_statistic(name, options):
    method = make_method(name, options)
    if method.observes == "nothing":
        return
    with pytest.raises(ValueError, match="collection pass"):
        method.solve(draw_weight(16, 16), None, RANK, scaling=1.0, generator=torch.Generator())


@EVERY_STATISTIC
def test_the_split_of_the_rows_into_batches_does_not_matter(name, options):
    if METHODS[name].observes != "inputs":
        return
    shape, solutions = (24, 16), []
    observed = observations(name, shape, options=options)
    for sizes in (150, 40, 1):
        method = make_method(name, options)
        statistic = method.statistic(shape[1], shape[0], RANK)
        pairs = [(statistic, observed)]
        if isinstance(observed, tuple):
            pairs = [(statistic.inputs, observed[0]), (statistic.reference, observed[1])]
        for part, rows in pairs:
            for batch in rows.flip(0).split(sizes):
                part.update(batch)
        solutions.append(method.solve(draw_weight(*shape), statistic, RANK, scaling=1.0, generator=torch.Generator()))
    expected = solutions[0].factors(RANK)
    for solution in solutions[1:]:
        factors = solution.factors(RANK)
        torch.testing.assert_close(solution.scores, solutions[0].scores, rtol=1e-4, atol=1e-7)
        assert relative_error(factors.lora_A.mT @ factors.lora_A, expected.lora_A.mT @ expected.lora_A) < 1e-4
        if bool(expected.lora_B.any()):
            assert relative_error(product(factors), product(expected)) < 1e-4


def sketch_and_model(moment: SecondMoment) -> tuple[SketchedSecondMoment, SecondMoment]:
    """A sketch, and the exact statistic of what the sketch stands for, written out in float64."""
    sketch = moment.sketched(12)
    values, vectors = (part.double() for part in sketch.eigh(centered=False))
    features = moment.features
    rest = (sketch.trace(centered=False) - float(values.sum())) / (features - 12)
    identity = torch.eye(features, dtype=torch.float64)
    dense = vectors * values @ vectors.mT + rest * (identity - vectors @ vectors.mT)
    model = SecondMoment(features)
    model.load_state_dict(
        {
            "num_rows": torch.tensor(moment.num_rows),
            "mean": torch.zeros(features, dtype=torch.float64),
            "scatter": dense * moment.num_rows,
        }
    )
    return sketch, model


@EVERY_VARIANT_OF_INPUTS
def test_a_sketch_is_solved_as_the_moment_that_it_stands_for(fill, name, options):
    """The leading eigenpairs and an even rest, never formed, give what the dense matrix gives."""
    if options.get("sketch_columns"):
        return
    shape = (20, 24)
    rows = rows_with_spectrum(100, [0.85**index for index in range(24)])
    rows = torch.cat([rows, -rows])  # no mean: centred and uncentred moments are then completed alike
    observed = observations(name, shape, rows, options)
    if options.get("pretraining") == "measured":
        observed = (rows, torch.cat([observed[1], -observed[1]]))
    method = make_method(name, options)
    statistic = method.statistic(shape[1], shape[0], RANK)
    fill(statistic, observed)
    if isinstance(statistic, SecondMoment):
        pair = sketch_and_model(statistic)
    else:  # two parts, of which moments are sketched
        parts = {key: getattr(statistic, key) for key in vars(statistic)}
        both = {
            k: sketch_and_model(part) if isinstance(part, SecondMoment) else (part, part) for k, part in parts.items()
        }
        pair = tuple(type(statistic)(**{key: two[index] for key, two in both.items()}) for index in range(2))
    sketched, dense = (
        method.solve(draw_weight(*shape), part, RANK, scaling=0.5, generator=torch.Generator()) for part in pair
    )
    torch.testing.assert_close(sketched.scores[:RANK], dense.scores[:RANK], rtol=1e-4, atol=1e-6, check_dtype=False)
    for rank in (2, RANK):
        found, expected = sketched.factors(rank), dense.factors(rank)
        assert_valid(found, shape, rank)
        assert relative_error(found.lora_A.mT @ found.lora_A, expected.lora_A.mT @ expected.lora_A) < 1e-4
        if bool(expected.lora_B.any()):
            assert relative_error(product(found), product(expected)) < 1e-4


def test_unknown_names_and_options_list_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown init 'lora-ga'.*cntlora, eva, lora_ga"):
        make_method("lora-ga")
    with pytest.raises(ValueError, match=r"'eva' has no option 'rho'.*centered, whiten"):
        make_method("eva", {"rho": 2})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cntlora", {"ridge": -0.1}, "ridge is -0.1"),
        ("cntlora", {"pretraining": "measured"}, "'decorrelation' does not use; set constraint='alignment'"),
        ("corda", {"ridge": 0.0}, "ridge is 0.0"),
        ("lora_ga", {"gamma": 0.0}, "gamma is 0.0"),
        ("gradient_whitened", {"ridge": 0.0}, "ridge is 0.0"),
        ("gradient_step", {"step": -0.1}, "step is -0.1"),
    ],
)
def test_hyper_parameters_that_cannot_work_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_method(name, options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cntlora", {"constraint": "aligment"}),
        ("cntlora", {"truncation": "none"}),
        ("cntlora", {"gauge": "white"}),
        ("cntlora", {"base": "moved"}),
        ("cntlora", {"scale": "match"}),
        ("cntlora", {"pretraining": "measure"}),
        ("eva", {"whiten": "yes"}),
        ("eva", {"scale": "match"}),
        ("lora_ga", {"direction": "ArB"}),
        ("lora_ga", {"scale": "stabel"}),
        ("gradient_whitened", {"scale": "paper"}),
        ("gradient_step", {"directions": "input"}),
    ],
)
def test_a_misspelt_choice_is_refused_and_the_choices_are_listed(name, options):
    """Anything else would silently run another method than the one asked for."""
    ((option, value),) = options.items()
    with pytest.raises(ValueError, match=rf"{option}.*{value}"):
        make_method(name, options)
