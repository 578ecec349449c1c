"""The one public call: collect, solve, allocate ranks, attach adapters."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lorainit_diffusers import adapters
from lorainit_diffusers.budget import GB, MemoryBudget, sketch_columns
from lorainit_diffusers.collect import Collection, PassOptions, collect, is_distributed, known_length
from lorainit_diffusers.early_stop import EarlyStop, directions_of
from lorainit_diffusers.methods import METHODS, Initializer
from lorainit_diffusers.methods.declared import needs_reference, reference_options, zero_delta_options
from lorainit_diffusers.methods.guard import check_weights
from lorainit_diffusers.ranges import COUNT_OR_NONE, FINITE, SEED, Range, check_fields
from lorainit_diffusers.rank_plan import RankOptions, RankPlan, plan_ranks
from lorainit_diffusers.report import InitReport, LayerReport
from lorainit_diffusers.solving import Solver, derive_seed
from lorainit_diffusers.statistics import InputsAndReference
from lorainit_diffusers.target import AdapterOptions, Target, TargetModules, find_target
from lorainit_diffusers.training_step import training_step

if TYPE_CHECKING:  # families import diffusers' pipelines, which a user's own script may not need
    from lorainit_diffusers.families.base import ModelFamily

# Bins of the timestep distribution when the number of batches is not known beforehand.
DEFAULT_NUM_STRATA = 16


@dataclass(frozen=True)
class CollectOptions:
    """How the statistics are collected.

    Attributes:
        num_batches: Cap on the batches drawn, and on the reference batches; all when left out.
        seed: Of everything random: the global generators during the pass (restored after it) and the factors.
        share_inputs: Keep one statistic for layers that one tensor feeds.
        mask_padding: Leave padded tokens out of the statistics, where the family knows them.
        memory_budget_gb: What the statistics of one process may take (10^9 bytes). The widest layers' second moments
            are sketched where the exact ones would not fit, which the report says. `None`: half of the memory that is
            free on the statistics' device, on the process that has least. A decomposition needs some five times its own
            moment on top, one layer at a time.
        statistics_device: Where the statistics wait for the end of the pass, `"cpu"` say, while their products are
            taken where the model runs. `None`: there, too. Decompositions run on the layer's device.
        progress: Show a progress bar.
        allow_unreached: Layers that the loss never reaches start as PEFT starts them, instead of an error: for targets
            that somebody else has chosen, such as a text encoder's last layer, whose output SDXL does not read.
        early_stop: End the pass when between half of the batches and all of them the directions of a few layers turned
            by a sine of this at most, root mean square (0.1 is strict; see `early_stop.py`).
            `num_batches` stays the cap. Every batch is used where several processes collect, or a reference is
            compared with. `None`: every batch.
    """

    RANGES: ClassVar[Mapping[str, Range]] = {
        "num_batches": COUNT_OR_NONE,  # 0 is refused as no batches
        "seed": SEED,
        "memory_budget_gb": FINITE,  # `MemoryBudget` says what else
        "early_stop": Range(0, 1, above=True),
    }

    num_batches: int | None = None
    seed: int = 0
    share_inputs: bool = True
    mask_padding: bool = True
    memory_budget_gb: float | None = None
    statistics_device: torch.device | str | None = None
    progress: bool = True
    allow_unreached: bool = False
    early_stop: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Data:
    """What is collected over.

    Attributes:
        batches: What the loss takes; drawn once. In mean gradients a batch counts as much as the family's loss is a
            mean over (answers' tokens, images); under a `loss_fn` all count alike.
        reference_batches: Samples of the pre-training distribution (DreamBooth's class images, say) for methods that
            compare the data with it, such as CNTLoRA with `pretraining="measured"`, and for no other; drawn once,
            through the same loss.
        loss_fn: Batch -> 0-d loss; `None` for the family's.
    """

    batches: Iterable[Any]
    reference_batches: Iterable[Any] | None
    loss_fn: Callable[[Any], Tensor] | None


def make_method(name: str, options: Mapping[str, Any] | None = None) -> Initializer:
    """A method by name.

    Raises:
        ValueError: An unknown name or option (lists the known ones).
    """
    if name not in METHODS:
        raise ValueError(f"unknown init {name!r}; known: {', '.join(METHODS)}")
    method = METHODS[name]
    known = getattr(method, "__dataclass_fields__", {})
    for option in options or {}:
        if option not in known:
            raise ValueError(f"init {name!r} has no option {option!r}; known: {', '.join(known) or 'none'}")
    return method(**(options or {}))


def initialize(
    target: nn.Module | Mapping[str, nn.Module] | ModelFamily,
    method: str | Initializer = "cntlora",
    batches: Iterable[Any] = (),
    loss_fn: Callable[[Any], Tensor] | None = None,
    *,
    reference_batches: Iterable[Any] | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    target_modules: TargetModules = None,
    num_batches: int | None = None,
    variable_rank: bool = False,
    rank_budget: int | None = None,
    parameter_budget: int | None = None,
    min_rank: int = 1,
    max_rank: int | None = None,
    seed: int = 0,
    adapter_name: str = "default",
    use_rslora: bool = False,
    use_dora: bool = False,
    lora_dropout: float = 0.0,
    share_inputs: bool = True,
    mask_padding: bool = True,
    memory_budget_gb: float | None = None,
    statistics_device: torch.device | str | None = None,
    progress: bool = True,
    allow_unreached: bool = False,
    early_stop: float | None = None,
) -> InitReport:
    """Initialise LoRA adapters from the fine-tuning data: `initialize(unet, "cntlora", batches, loss_fn)`.

    Call it after `unet.add_adapter(LoraConfig(...))` or `get_peft_model` (or on a raw module, with `rank` and
    `target_modules`) and before `accelerator.prepare`, `torch.compile` and the creation of the optimiser. Then
    the adapter is active and trainable in float32; the base weights are untouched, and what a method starts with beside
    them is subtracted again inside the adapter (see `offset`). See `RankOptions`, `AdapterOptions`, `CollectOptions`.

    Args:
        target: A module, named components, or a model family (whose own loss is used).
        method: A name from `METHODS`, or a configured instance.
        batches: What the loss takes, drawn once; in mean gradients a family weights them. Methods may need none.
        loss_fn: One training loss: batch -> 0-d tensor. Left out for a family.
        reference_batches: Samples of the pre-training distribution, for methods that compare the data with it.
        rank: Of every layer, or on average. Default: the existing adapter's, layer by layer, or 8.
        alpha: LoRA alpha at that rank. Default: what keeps the scaling of the existing adapter, or the rank.
        target_modules: Names, endings, an expression, or a mapping by component. Default: what is adapted, or usual.
        num_batches: Cap on the batches drawn, and on the reference batches; all when left out.
        variable_rank: Allocate ranks by pooled scores.
        rank_budget: Sum of ranks then; `rank` times the number of layers when left out.
        parameter_budget: Number of adapter parameters, instead of `rank_budget`.
        min_rank: Under `variable_rank`; 0 lets layers go without an adapter.
        max_rank: Under `variable_rank`; twice `rank` when left out.
        seed: Of everything random.
        adapter_name: PEFT's name of the adapter.
        use_rslora: Scale by alpha / sqrt(rank); for new adapters.
        use_dora: Decompose the weights (DoRA); for new adapters, and methods that start from the base without offset.
        lora_dropout: For new adapters.
        share_inputs: Keep one statistic for layers that one tensor feeds.
        mask_padding: Leave padded tokens out of the statistics, where the family knows them.
        memory_budget_gb: What the statistics of one process may take (10^9 bytes). Default: half of what is free.
        statistics_device: Where the statistics are kept. Default: where the model runs.
        progress: Show a progress bar.
        allow_unreached: Layers that the loss never reaches start as PEFT starts them, instead of an error.
        early_stop: A sine; the pass ends when more batches turn the directions by no more than that.

    Returns:
        The report: ranks, scores and rows of every layer, and the cost.

    Raises:
        ValueError: Bad arguments, before anything is computed; in the pass, non-finite activations, or statistics that
            do not fit into memory in any form. Names the culprit.
    """
    name, method = (method, make_method(method)) if isinstance(method, str) else (_name_of(method), method)
    data = Data(batches, reference_batches, loss_fn)
    ranks = RankOptions(rank, alpha, variable_rank, rank_budget, parameter_budget, min_rank, max_rank)
    adapter = AdapterOptions(adapter_name, use_rslora, use_dora, lora_dropout)
    memory = (memory_budget_gb, statistics_device)
    options = CollectOptions(
        num_batches, seed, share_inputs, mask_padding, *memory, progress, allow_unreached, early_stop
    )
    return _initialize(find_target(target, target_modules, adapter), name, method, data, ranks, options)


def _initialize(
    target: Target, name: str, method: Initializer, data: Data, rank_options: RankOptions, options: CollectOptions
) -> InitReport:
    """Collect -> scores and ranks -> factors -> adapters."""
    if target.has_dora:
        check_zero_delta(name, method)
    plan = plan_ranks(target, name, method, rank_options)
    _check_reference(name, method, data.reference_batches, plan)
    check_weights(target.layers, name)
    budget = MemoryBudget(
        None if options.memory_budget_gb is None else options.memory_budget_gb * GB,
        num_columns=sketch_columns(max(plan.caps.values())),
        device=options.statistics_device,
    )

    collection = _collect(target, method, plan, data, options, budget)
    collected_at = time.perf_counter()
    solver = Solver(name, method, plan, options.seed)
    solved = solver.solve(target.layers, collection)
    ranks, allocation = plan.allocate(solved.scores(name, plan.caps)) if plan.variable else (plan.ranks, None)
    weights = solver.weights(target.layers, solved, ranks)
    solved_at = time.perf_counter()
    target.attach(weights)
    attached_at = time.perf_counter()

    def report_layer(full_name: str) -> LayerReport:
        scores, kept = solved.solutions[full_name].scores, ranks[full_name]
        return LayerReport(
            rank=kept,
            alpha=plan.scalings[full_name] * kept ** target.rank_power(full_name),
            scores=None if scores is None else [float(f"{score:.6g}") for score in scores.tolist()],
            captured=None if scores is None else float(scores[:kept].sum()),
            num_rows=solved.num_rows.get(full_name, 0),
            shared_group=collection.leaders.get(full_name, full_name),
            fallback=solved.fallbacks.get(full_name),
            sketch_columns=solved.sketch_columns.get(full_name),
        )

    return InitReport(
        method=name,
        options=asdict(method) if is_dataclass(method) else {},  # type: ignore[arg-type]
        step_zero=method.step_zero,
        layers={full_name: report_layer(full_name) for full_name in target.layers},
        num_passes=collection.num_passes,
        forward_s=collection.forward_s,
        statistics_s=collection.statistics_s,
        solve_s=solved_at - collected_at,
        attach_s=attached_at - solved_at,
        statistics_bytes=budget.used,
        peak_statistics_bytes=budget.peak,
        memory_budget_bytes=None if budget.num_bytes is None else int(budget.num_bytes),
        statistics_device=None if budget.device is None else str(budget.device),
        allocation=allocation,
        early_stop=collection.early_stop,
    )


def _collect(
    target: Target, method: Initializer, plan: RankPlan, data: Data, options: CollectOptions, budget: MemoryBudget
) -> Collection:
    """The collection pass of this method, and one over reference batches; empty where it observes nothing."""
    if method.observes == "nothing":
        return Collection()
    step = training_step(target.family, data.loss_fn, target.location, mask_padding=options.mask_padding)
    # Every process draws its own noise and timesteps; the factors, which must agree, are seeded by layer instead.
    pass_seed = derive_seed(options.seed, "collect", torch.distributed.get_rank() if is_distributed() else 0)
    pass_options = PassOptions(
        method.observes,
        num_batches=options.num_batches,
        seed=pass_seed,
        share_inputs=options.share_inputs,
        progress=options.progress,
        allow_unreached=options.allow_unreached,
    )

    def collect_over(
        batches: Iterable[Any], part: Literal["inputs", "reference"], batch_name: str, stop: EarlyStop | None = None
    ) -> Collection:
        def make_statistic(full_name: str, layer: nn.Linear) -> Any:
            statistic = method.statistic(layer.in_features, layer.out_features, plan.caps[full_name])
            return getattr(statistic, part) if isinstance(statistic, InputsAndReference) else statistic

        # Both passes draw the same noise and timesteps, so that what they differ in is the data.
        step.generator.manual_seed(pass_seed)
        # One stratum a batch: every sample position then walks through the whole timestep distribution once.
        strata = options.num_batches or known_length(batches) or DEFAULT_NUM_STRATA
        named = replace(pass_options, batch_name=batch_name, early_stop=stop)
        with step.stratified(strata):
            return collect(target.modules, target.layers, batches, step, make_statistic, named, budget)

    stop: EarlyStop | None = None
    if options.early_stop is not None and not is_distributed() and data.reference_batches is None:
        directions = directions_of(method, target.layers, plan.caps)
        stop = EarlyStop(options.early_stop, list(target.layers), directions)
    with adapters.adapters_disabled(target.modules):
        collection = collect_over(data.batches, "inputs", "batch", stop)
        collection.early_stop = None if stop is None else stop.reason
        if data.reference_batches is not None:
            reference = collect_over(data.reference_batches, "reference", "reference batch")
            collection = collection.with_reference(reference)
    budget.release()
    return collection


def check_zero_delta(name: str, method: Initializer) -> None:
    """See that a method can start a DoRA: its magnitudes are those of the base weight, so B A must be zero.

    Raises:
        ValueError: Naming the method and what works instead.
    """
    if method.step_zero == "equal":
        return
    options = dict(zero_delta_options(method))
    own = f"it with {' '.join(f'{key}={value}' for key, value in options.items())}"
    if name in METHODS:
        own += f", which is make_method({name!r}, {options})"
    remedies = ", or ".join([*([own] if options else []), "a zero-delta init such as eva or orthonormal"])
    raise ValueError(
        f"init {name!r} starts from B A != 0, which DoRA's magnitudes do not allow; use {remedies}, or drop use_dora"
    )


def _check_reference(
    name: str,
    method: Initializer,
    reference_batches: Iterable[Any] | None,
    plan: RankPlan,
) -> None:
    """Reference batches are given exactly where the method compares the data with them."""
    first, (out_features, in_features) = next(iter(plan.shapes.items()))
    needed = needs_reference(method, method.statistic(in_features, out_features, plan.caps[first]))
    if needed and reference_batches is None:
        raise ValueError(
            f"init {name!r} with these options compares the data with a reference: pass reference_batches, samples of "
            "the pre-training distribution such as DreamBooth's class images"
        )
    if not needed and reference_batches is not None:
        users = [
            f", or use {known} with " + " and ".join(f"{key}={value!r}" for key, value in options.items())
            for known, kind in METHODS.items()
            if (options := reference_options(kind))
        ]
        raise ValueError(
            f"init {name!r} with these options does not use reference_batches; leave them out{''.join(users)}"
        )


def _name_of(method: Initializer) -> str:
    return next((name for name, known in METHODS.items() if type(method) is known), type(method).__name__)
