"""The one public call: collect, solve, allocate ranks, attach adapters."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, is_dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lorainit_diffusers import adapters
from lorainit_diffusers.budget import GB, MemoryBudget, sketch_columns
from lorainit_diffusers.collect import Collection, collect, known_length
from lorainit_diffusers.families.base import loss_weight
from lorainit_diffusers.methods import METHODS, Initializer, LoraFactors, Solution
from lorainit_diffusers.methods.base import Observed
from lorainit_diffusers.methods.declared import (
    fewest_rows,
    gives_scores,
    largest_rank,
    needs_reference,
    reference_options,
    zero_delta_options,
)
from lorainit_diffusers.methods.guard import check_weight, check_weights, guarded_factors, why_nothing_to_learn
from lorainit_diffusers.methods.kaiming import Kaiming
from lorainit_diffusers.quantized import is_packed
from lorainit_diffusers.ranges import (
    COUNT,
    COUNT_OR_NONE,
    FINITE,
    POSITIVE,
    SEED,
    SHARE_BELOW_ONE,
    Range,
    check_keywords,
)
from lorainit_diffusers.ranks import allocate_ranks, check_rank_fits, marginal_components, uniform_ranks
from lorainit_diffusers.report import InitReport, LayerReport, RankAllocation
from lorainit_diffusers.statistics import (
    InputsAndGradient,
    InputsAndReference,
    SketchedSecondMoment,
    Statistic,
    full_float32,
)

if TYPE_CHECKING:  # families import diffusers' pipelines, which a user's own script may not need
    from lorainit_diffusers.families.base import ModelFamily

# How many times the average rank a layer may get under variable ranks (EVA's rho).
MAX_RANK_RATIO = 2
# Bins of the timestep distribution when the number of batches is not known beforehand.
DEFAULT_NUM_STRATA = 16
# The numbers of `initialize`.
RANGES: dict[str, Range] = {
    "rank": COUNT,
    "alpha": POSITIVE,
    "num_batches": COUNT_OR_NONE,  # 0 is refused as no batches
    "rank_budget": COUNT_OR_NONE,
    "parameter_budget": COUNT_OR_NONE,
    "min_rank": COUNT_OR_NONE,
    "max_rank": COUNT_OR_NONE,
    "seed": SEED,
    "lora_dropout": SHARE_BELOW_ONE,
    "memory_budget_gb": FINITE,  # `MemoryBudget` says what else
}


def make_method(name: str, options: Mapping[str, Any] | None = None) -> Initializer:
    """A method by name.

    Raises:
        ValueError: an unknown name or option (lists the known ones).
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
    target_modules: Sequence[str] | str | Mapping[str, Sequence[str] | str] | None = None,
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
) -> InitReport:
    """Initialise LoRA adapters from the fine-tuning data.

    In a script of your own, after ``unet.add_adapter(LoraConfig(...))`` or ``get_peft_model`` (or on a raw module, with
    ``rank`` and ``target_modules``)::

        initialize(unet, "cntlora", batches, loss_fn)

    where ``loss_fn(batch)`` is one training loss. Call it before ``accelerator.prepare``, ``torch.compile`` and the
    creation of the optimiser. Afterwards the adapter is active and trainable in float32; the base weights are
    untouched.

    Methods such as CNTLoRA, LoRA-GA and PiSSA put frozen initial factors into the adapter, whose product it subtracts
    (see :mod:`~lorainit_diffusers.offset`): to PEFT and diffusers it is one adapter, and what they save is right on the
    original base, with rank 2r. :func:`~lorainit_diffusers.export.save_diffusers_lora` writes it more exactly for
    readers in half precision.

    Args:
        target: a module, named components, or a model family (whose own loss is used).
        method: a name from ``METHODS``, or a configured instance.
        batches: what the loss takes; drawn once, at most ``num_batches``. Not needed by methods that observe nothing.
            In mean gradients a batch counts as much as the family's loss is a mean over (answers' tokens, images);
            under a ``loss_fn`` all count alike.
        loss_fn: batch -> 0-d loss. Left out for a family.
        reference_batches: samples of the pre-training distribution (DreamBooth's class images, say) for methods that
            compare the data with it, such as CNTLoRA with ``pretraining="measured"``, and for no other; drawn once, at
            most ``num_batches``, through the same loss.
        rank: of every layer, or on average under ``variable_rank``. Default: the existing adapter's, layer by layer, or
            8.
        alpha: LoRA alpha at that rank. Default: what keeps the scaling of the existing adapter, layer by layer, or the
            rank. Under variable ranks a layer's alpha follows its rank, so that its scaling stays as it is.
        target_modules: names, name endings or a regular expression; per component if a mapping. Default: the layers
            already adapted, or the family's default.
        num_batches: cap on the batches drawn, and on the reference batches; all when left out.
        variable_rank: allocate ranks by pooled scores.
        rank_budget: sum of ranks under ``variable_rank``; ``rank`` times the number of layers when left out.
        parameter_budget: number of adapter parameters, instead of ``rank_budget``.
        min_rank: under ``variable_rank``; 0 lets layers go without an adapter.
        max_rank: under ``variable_rank``; twice ``rank`` when left out.
        seed: of everything random: the global generators during the pass (restored after it) and the factors.
        adapter_name: PEFT's name of the adapter.
        use_rslora: scale by alpha / sqrt(rank); for new adapters.
        use_dora: train the magnitudes of the weight apart from its direction (DoRA); for new adapters, and with methods
            that start from the base model without an offset.
        lora_dropout: for new adapters.
        share_inputs: keep one statistic for layers that one tensor feeds.
        mask_padding: leave padded tokens out of the statistics, where the family knows them.
        memory_budget_gb: what the statistics of one process may take (10^9 bytes). The widest layers' second moments
            are sketched where the exact ones would not fit, which the report says. Default: half of the memory that is
            free on the statistics' device, on the process that has least. A decomposition needs some five times its own
            moment on top, one layer at a time.
        statistics_device: where the statistics wait for the end of the pass, ``"cpu"`` say, while their products are
            taken where the model runs. Default: there, too. Decompositions run on the layer's device.
        progress: show a progress bar.

    Returns:
        The report: ranks, scores and rows of every layer, and the cost.

    Raises:
        ValueError: bad arguments, before anything is computed: numbers out of range, unknown method, no matching layer,
            a rank that does not fit, a wrapped or compiled module, an adapter that is no LoRA of linear layers or whose
            base PEFT has changed, a part of the family that carries an adapter but is not adapted, DoRA with B A != 0,
            no batches, reference batches missing or unused, mean gradients that do not fit into the memory budget; or,
            in the pass, non-finite activations, or statistics that do not fit in any form. Names the culprit.
    """
    check_keywords(
        RANGES,
        rank=rank,
        alpha=alpha,
        num_batches=num_batches,
        rank_budget=rank_budget,
        parameter_budget=parameter_budget,
        min_rank=min_rank,
        max_rank=max_rank,
        seed=seed,
        lora_dropout=lora_dropout,
        memory_budget_gb=memory_budget_gb,
    )
    name, method = (method, make_method(method)) if isinstance(method, str) else (_name_of(method), method)
    family: ModelFamily | None = None
    modules: Mapping[str, nn.Module]
    if isinstance(target, nn.Module):
        modules = {"": target}
    elif isinstance(target, Mapping):
        modules = target
    else:
        family, modules = target, target.adapted
    adapters.check_beside(modules, adapter_name)
    for component, module in modules.items():
        _check_not_wrapped(component, module)

    existing = {component: adapters.existing_adapter(module, adapter_name) for component, module in modules.items()}
    if any(adapter.use_dora for adapter in existing.values() if adapter is not None) or (
        use_dora and None in existing.values()
    ):
        check_zero_delta(name, method)
    rslora = {key: use_rslora if adapter is None else adapter.use_rslora for key, adapter in existing.items()}

    layers: dict[str, nn.Linear] = {}
    location: dict[str, tuple[str, str]] = {}
    for component, module in modules.items():
        adapters.check_plain(module, adapter_name)
        targets = target_modules.get(component) if isinstance(target_modules, Mapping) else target_modules
        if targets is None and family is not None and existing[component] is None:
            targets = family.default_targets(component)
        for layer_name, layer in adapters.target_layers(module, targets, adapter_name).items():
            full_name = f"{component}.{layer_name}" if component else layer_name
            layers[full_name] = layer
            location[full_name] = (component, layer_name)
    shapes = {full_name: (layer.out_features, layer.in_features) for full_name, layer in layers.items()}
    ranks, scalings = _ranks_and_scalings(existing, location, shapes, rslora, rank, alpha)
    if variable_rank:
        if rank_budget is None and parameter_budget is None:
            rank_budget = sum(ranks.values())
        most = {key: max_rank if max_rank is not None else MAX_RANK_RATIO * value for key, value in ranks.items()}
    else:
        if rank_budget is not None or parameter_budget is not None or max_rank is not None:
            raise ValueError("rank_budget, parameter_budget and max_rank need variable_rank=True")
        most = ranks
    if variable_rank and not gives_scores(method):
        raise ValueError(f"init {name!r} gives no scores to allocate ranks by; drop variable_rank")
    caps = _largest_ranks(method, shapes, ranks, most)
    allocate = partial(
        allocate_ranks,
        layers=shapes,
        rank_budget=rank_budget,
        parameter_budget=parameter_budget,
        min_rank=min_rank,
        max_rank=max(most.values()),
    )
    if variable_rank:  # a budget that cannot be met is refused now, not after the pass
        allocate({full_name: torch.zeros(caps[full_name]) for full_name in layers})
    first, (out_features, in_features) = next(iter(shapes.items()))
    _check_reference(name, method, reference_batches, method.statistic(in_features, out_features, caps[first]))
    check_weights(layers, name)

    collection = Collection()
    budget = MemoryBudget(
        None if memory_budget_gb is None else memory_budget_gb * GB,
        num_columns=sketch_columns(max(caps.values())),
        device=statistics_device,
    )
    if method.observes != "nothing":
        collection = _collect(
            family,
            modules,
            layers,
            location,
            method,
            caps,
            batches,
            reference_batches,
            loss_fn,
            budget=budget,
            num_batches=num_batches,
            seed=seed,
            share_inputs=share_inputs,
            mask_padding=mask_padding,
            progress=progress,
        )
    num_rows = {full_name: statistic.num_rows for full_name, statistic in collection.statistics.items()}
    columns = {full_name: _sketch_columns(statistic) for full_name, statistic in collection.statistics.items()}

    start = time.perf_counter()
    device = next(iter(layers.values())).weight.device
    with full_float32(device):  # neither TF32 nor an autocast of the caller may round a decomposition
        solutions, fallbacks = _solve(name, method, layers, collection, ranks, caps, scalings, seed, keep=variable_rank)
    allocation: RankAllocation | None = None
    if variable_rank:
        scores: dict[str, Tensor] = {}
        for full_name, solution in solutions.items():
            if solution.scores is None and full_name not in fallbacks:
                raise ValueError(f"init {name!r} gives no scores to allocate ranks by; drop variable_rank")
            # A layer that fell back competes for nothing beyond min_rank.
            scores[full_name] = torch.zeros(caps[full_name]) if solution.scores is None else solution.scores
        ranks = allocate(scores)
        allocation = _allocation(scores, shapes, ranks, rank_budget, parameter_budget, min_rank, max(most.values()))
    weights: dict[str, dict[str, adapters.AdapterWeights]] = {component: {} for component in modules}
    for full_name, solution in solutions.items():
        if ranks[full_name] == 0:
            continue
        with full_float32(device):
            factors, replaced = _factors(
                name, solution, ranks[full_name], full_name, layers[full_name], scalings[full_name], seed
            )
        if replaced is not None:
            fallbacks.setdefault(full_name, replaced)
        offset = method.step_zero == "offset" and bool(factors.lora_B.any())
        component, layer_name = location[full_name]
        weights[component][layer_name] = adapters.AdapterWeights(
            factors,
            scalings[full_name],
            offset=factors if offset else None,
        )
    solve_s = time.perf_counter() - start
    start = time.perf_counter()
    for component, module in modules.items():
        adapters.attach(
            module,
            weights[component],
            adapter_name=adapter_name,
            use_rslora=use_rslora,
            use_dora=use_dora,
            lora_dropout=lora_dropout,
        )
    if family is not None:  # attaching froze them, too
        for head in family.heads.values():
            head.requires_grad_(True)
    attach_s = time.perf_counter() - start

    def report_layer(full_name: str) -> LayerReport:
        scores, kept = solutions[full_name].scores, ranks[full_name]
        return LayerReport(
            rank=kept,
            alpha=scalings[full_name] * (kept**0.5 if rslora[location[full_name][0]] else kept),
            scores=None if scores is None else [float(f"{score:.6g}") for score in scores.tolist()],
            captured=None if scores is None else float(scores[:kept].sum()),
            num_rows=num_rows.get(full_name, 0),
            shared_group=collection.leaders.get(full_name, full_name),
            fallback=fallbacks.get(full_name),
            sketch_columns=columns.get(full_name),
        )

    return InitReport(
        method=name,
        options=asdict(method) if is_dataclass(method) else {},  # type: ignore[arg-type]
        step_zero=method.step_zero,
        layers={full_name: report_layer(full_name) for full_name in layers},
        num_passes=collection.num_passes,
        forward_s=collection.forward_s,
        statistics_s=collection.statistics_s,
        solve_s=solve_s,
        attach_s=attach_s,
        statistics_bytes=budget.used,
        peak_statistics_bytes=budget.peak,
        memory_budget_bytes=None if budget.num_bytes is None else int(budget.num_bytes),
        statistics_device=None if budget.device is None else str(budget.device),
        allocation=allocation,
    )


def _allocation(
    scores: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, int]],
    ranks: Mapping[str, int],
    rank_budget: int | None,
    parameter_budget: int | None,
    min_rank: int,
    max_rank: int,
) -> RankAllocation:
    """What decided these ranks."""
    per_parameter = parameter_budget is not None
    budget = parameter_budget if per_parameter else rank_budget
    assert budget is not None
    kept, refused = marginal_components(
        scores, shapes, ranks, per_parameter=per_parameter, min_rank=min_rank, max_rank=max_rank
    )
    return RankAllocation(budget, per_parameter, min_rank, max_rank, last_kept=kept, first_refused=refused)


def _parts(statistic: Observed | None) -> list[Statistic]:
    """The statistics that make up what was observed of a layer."""
    if isinstance(statistic, InputsAndGradient):
        return [statistic.inputs, statistic.gradient]
    if isinstance(statistic, InputsAndReference):
        return [statistic.inputs, statistic.reference]
    return [] if statistic is None else [statistic]


def _sketch_columns(statistic: Observed) -> int | None:
    """Columns where a layer's inputs were sketched; ``None`` where they were kept exactly, or not at all."""
    inputs = _parts(statistic)[0]
    return inputs.num_columns if isinstance(inputs, SketchedSecondMoment) else None


def _ranks_and_scalings(
    existing: Mapping[str, adapters.ExistingAdapter | None],
    location: Mapping[str, tuple[str, str]],
    shapes: Mapping[str, tuple[int, int]],
    rslora: Mapping[str, bool],
    rank: int | None,
    alpha: float | None,
) -> tuple[dict[str, int], dict[str, float]]:
    """Rank and scaling of every layer: what the caller asks for, else what its adapter has.

    A component without an adapter follows the first one that has it.
    """
    first = next((adapter for adapter in existing.values() if adapter is not None), None)
    common = rank if rank is not None else first.rank if first is not None else 8
    uniform_ranks(shapes, common if rank is not None or first is None else 1)
    ranks: dict[str, int] = {}
    scalings: dict[str, float] = {}
    for full_name, (component, layer_name) in location.items():
        adapter = existing[component]
        ranks[full_name] = common if rank is not None or adapter is None else adapter.ranks[layer_name]
        check_rank_fits({full_name: shapes[full_name]}, ranks[full_name], "rank")
        if alpha is not None or first is None:
            numerator = alpha if alpha is not None else ranks[full_name]
            scalings[full_name] = numerator / (ranks[full_name] ** (0.5 if rslora[component] else 1))
        else:
            scalings[full_name] = first.scaling if adapter is None else adapter.scalings[layer_name]
    return ranks, scalings


def _largest_ranks(
    method: Initializer,
    shapes: Mapping[str, tuple[int, int]],
    ranks: Mapping[str, int],
    most: Mapping[str, int],
) -> dict[str, int]:
    """The largest rank up to ``most`` that each layer and the method can use; at least its rank, or an error."""
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
                f"layer {full_name!r}: the init can give it rank {cap} at most, not {at_least}; lower the rank, or "
                "leave the layer out of the target modules"
            )
    return caps


def check_zero_delta(name: str, method: Initializer) -> None:
    """See that a method can start a DoRA: its magnitudes are those of the base weight, so B A must be zero.

    Raises:
        ValueError: naming the method and what works instead.
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
    statistic: Observed | None,
) -> None:
    """Reference batches are given exactly where the method compares the data with them."""
    needed = needs_reference(method, statistic)
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


def _collect(
    family: ModelFamily | None,
    modules: Mapping[str, nn.Module],
    layers: Mapping[str, nn.Linear],
    location: Mapping[str, tuple[str, str]],
    method: Initializer,
    caps: Mapping[str, int],
    batches: Iterable[Any],
    reference_batches: Iterable[Any] | None,
    loss_fn: Callable[[Any], Tensor] | None,
    *,
    budget: MemoryBudget,
    num_batches: int | None,
    seed: int,
    share_inputs: bool,
    mask_padding: bool,
    progress: bool,
) -> Collection:
    """The collection pass of this method, and one over reference batches, through the family's loss or the user's."""
    observes = method.observes
    assert observes != "nothing"
    # Every process draws its own noise and timesteps; the factors, which must agree, are seeded by layer instead.
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    pass_seed = _derive_seed(seed, "collect", torch.distributed.get_rank() if distributed else 0)
    generator = torch.Generator()
    token_mask = describe_step = batch_weight = None
    if family is not None:
        owner = family
        # a loss of the user's own may be a mean over anything
        batch_weight = partial(loss_weight, owner) if loss_fn is None else None

        def family_loss(batch: Any) -> Tensor:
            return owner.loss(batch, generator)

        def family_token_mask(full_name: str) -> Tensor | None:
            return owner.step.token_mask(*location[full_name])

        def family_step() -> str:
            timesteps = owner.step.timesteps
            return "" if timesteps is None else f"timesteps {timesteps.flatten().tolist()}"

        loss_fn, describe_step = loss_fn or family_loss, family_step
        token_mask = family_token_mask if mask_padding else None
    if loss_fn is None:
        raise ValueError("loss_fn is missing: pass the function that computes one training loss from a batch")

    def collect_over(batches: Iterable[Any], part: Literal["inputs", "reference"], batch_name: str) -> Collection:
        def make_statistic(full_name: str, layer: nn.Linear) -> Any:
            statistic = method.statistic(layer.in_features, layer.out_features, caps[full_name])
            return getattr(statistic, part) if isinstance(statistic, InputsAndReference) else statistic

        # Both passes draw the same noise and timesteps, so that what they differ in is the data.
        generator.manual_seed(pass_seed)
        stratified: Any = nullcontext()
        if family is not None:
            # One stratum a batch: every sample position then walks through the whole timestep distribution once.
            strata = num_batches or known_length(batches) or DEFAULT_NUM_STRATA
            stratified = family.stratified_timesteps(strata, generator)
        with stratified:
            return collect(
                modules,
                layers,
                batches,
                loss_fn,
                make_statistic,
                observes=observes,
                num_batches=num_batches,
                seed=pass_seed,
                share_inputs=share_inputs,
                token_mask=token_mask,
                batch_weight=batch_weight,
                describe_step=describe_step,
                batch_name=batch_name,
                progress=progress,
                budget=budget,
            )

    with adapters.adapters_disabled(modules):
        collection = collect_over(batches, "inputs", "batch")
        if reference_batches is not None:
            collection = collection.with_reference(collect_over(reference_batches, "reference", "reference batch"))
    budget.release()
    return collection


def _factors(
    name: str, solution: Solution, rank: int, full_name: str, layer: nn.Linear, scaling: float, seed: int
) -> tuple[LoraFactors, str | None]:
    """The factors of a layer's solution, all of whose components can be trained, and what was replaced in them."""
    own_seed = _derive_seed(seed, full_name, "vanishing")
    weight = partial(adapters.base_weight, layer)
    return guarded_factors(solution, rank, weight, layer=full_name, method=name, scaling=scaling, seed=own_seed)


def _solve(
    name: str,
    method: Initializer,
    layers: Mapping[str, nn.Linear],
    collection: Collection,
    ranks: Mapping[str, int],
    caps: Mapping[str, int],
    scalings: Mapping[str, float],
    seed: int,
    *,
    keep: bool,
) -> tuple[dict[str, Solution], dict[str, str]]:
    """Every layer's solution, and why those whose rows are too few or say nothing got Kaiming's instead.

    Frees as it goes: a statistic with the last layer that shares it, and, unless the rank is still open (``keep``), all
    that a solution holds but its factors.
    """
    solutions: dict[str, Solution] = {}
    fallbacks: dict[str, str] = {}
    for full_name, layer in layers.items():
        statistic = collection.statistics.pop(full_name, None)
        rank = ranks[full_name]
        solver: Initializer = method
        if statistic is not None and statistic.num_rows < fewest_rows(method, rank):
            solver = Kaiming()
            fallbacks[full_name] = f"only {statistic.num_rows} rows for rank {rank}: Kaiming A, zero B"
        elif (reason := why_nothing_to_learn(method, statistic)) is not None:
            solver = Kaiming()
            fallbacks[full_name] = f"{reason}: Kaiming A, zero B"
        generator = torch.Generator().manual_seed(_derive_seed(seed, full_name))
        for part in _parts(statistic):
            part.move(layer.weight.device)
        weight = adapters.base_weight(layer)
        if is_packed(layer):
            check_weight(full_name, weight, name)
        try:
            solution = solver.solve(
                weight,
                statistic,
                caps[full_name],
                scaling=scalings[full_name],
                generator=generator,
            )
            if not keep:
                factors, replaced = _factors(name, solution, rank, full_name, layer, scalings[full_name], seed)
                if replaced is not None:
                    fallbacks.setdefault(full_name, replaced)
                solution = Solution(solution.scores, lambda _rank, factors=factors: factors)
            solutions[full_name] = solution
        except torch.linalg.LinAlgError as error:
            raise ValueError(
                f"layer {full_name!r} cannot be decomposed for init {name!r} ({error}); look for non-finite values in "
                "its weight, or for activations too large for float32 when squared"
            ) from error
    return solutions, fallbacks


def _derive_seed(*parts: int | str) -> int:
    return zlib.crc32("/".join(map(str, parts)).encode())


def _name_of(method: Initializer) -> str:
    return next((name for name, known in METHODS.items() if type(method) is known), type(method).__name__)


def _check_not_wrapped(component: str, module: nn.Module) -> None:
    """Collection needs the plain module: compiled graphs skip hooks, and wrappers rename or shard the layers."""
    kind = type(module).__name__
    if kind in {"OptimizedModule", "DistributedDataParallel", "FullyShardedDataParallel", "DataParallel"}:
        where = f" (component {component!r})" if component else ""
        raise ValueError(f"initialize() got a {kind}{where}; call it before torch.compile and accelerator.prepare")
