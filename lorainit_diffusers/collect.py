"""The collection pass: the training loss with hooks attached.

`collect` runs a loss over a few batches and gathers one statistic a layer. It owns batches, shared inputs,
evaluation mode, token masks, the check for non-finite values, timing and the reduction over processes; it knows
neither models nor methods.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lorainit_diffusers.budget import MemoryBudget
from lorainit_diffusers.early_stop import EarlyStop
from lorainit_diffusers.hooks import model_state_preserved, observe_inputs, observe_weight_gradients
from lorainit_diffusers.methods.base import Observed
from lorainit_diffusers.progress import progress_bar
from lorainit_diffusers.statistics import GradientMean, InputsAndGradient, InputsAndReference, Statistic, all_reduce
from lorainit_diffusers.training_step import TrainingStep

# (name, layer) -> an empty statistic for it.
MakeStatistic = Callable[[str, nn.Linear], Statistic | InputsAndGradient]

# float16 gradients of a mean loss underflow; a power of two scales them exactly and is divided out in float32.
FLOAT16_LOSS_SCALE = 1024.0


@dataclass
class Collection:
    """What a collection pass gathered.

    Attributes:
        statistics: Layer -> statistic; layers fed by the same tensor hold the same object, or the same parts.
        leaders: Layer -> the first layer of its group of shared inputs (itself when it shares with none).
        num_passes: Forward passes made on this process.
        forward_s: Seconds in the loss (and backward), statistics not counted.
        statistics_s: Seconds in the statistics.
        early_stop: Why the pass ended when it did, where that was asked for and something could be said.
    """

    statistics: dict[str, Observed] = field(default_factory=dict[str, Observed])
    leaders: dict[str, str] = field(default_factory=dict)
    num_passes: int = 0
    forward_s: float = 0.0
    statistics_s: float = 0.0
    early_stop: str | None = None

    def with_reference(self, reference: Collection) -> Collection:
        """This pass and one over reference batches, both of second moments, as one: an `InputsAndReference` a layer.

        The groups of shared inputs are this pass's; the costs add up.
        """
        return Collection(
            {
                name: InputsAndReference(cast(Any, inputs), cast(Any, reference.statistics[name]))
                for name, inputs in self.statistics.items()
            },
            self.leaders,
            self.num_passes + reference.num_passes,
            self.forward_s + reference.forward_s,
            self.statistics_s + reference.statistics_s,
        )


class _SharedInputs:
    """Tells by identity which layers were fed by one tensor in the current forward.

    A tensor is the same when it is the same object, still alive, at the same version; hashing its values would cost
    more than the statistic itself.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[weakref.ref[Tensor], int, int, torch.Size, str]] = {}
        self.trace: dict[str, list[str]] = {}

    def leader(self, name: str, tensor: Tensor) -> str:
        """The first layer that saw this tensor in this forward; notes it in `trace`."""
        # Tensors made under inference_mode (cached prompt embeddings, say) keep no version.
        version = 0 if tensor.is_inference() else tensor._version
        signature = (version, tensor.data_ptr(), tensor.shape)
        entry = self._seen.get(id(tensor))
        if entry is not None and entry[0]() is tensor and entry[1:4] == signature:
            leader = entry[4]
        else:
            leader = name
            self._seen[id(tensor)] = (weakref.ref(tensor), *signature, name)
        self.trace.setdefault(name, []).append(leader)
        return leader


@dataclass(frozen=True)
class PassOptions:
    """How one collection pass goes.

    Attributes:
        observes: Layer inputs (no backward pass), weight gradients (forward and backward), or both in one pass.
        num_batches: Cap on the batches; `None` means all of them, which must then be finite.
        seed: Of torch's global generators during the pass; they are as before after it.
        share_inputs: One statistic for all layers that one tensor feeds.
        batch_name: What messages and the progress bar call a batch.
        progress: Show a progress bar.
        allow_unreached: Leave out layers that the loss never reaches, instead of refusing them.
        early_stop: Ends the pass before the last batch; `None` for all batches.
    """

    observes: Literal["inputs", "gradients", "inputs and gradients"]
    num_batches: int | None = None
    seed: int | None = None
    share_inputs: bool = True
    batch_name: str = "batch"
    progress: bool = True
    allow_unreached: bool = False
    early_stop: EarlyStop | None = None


def collect(
    modules: Mapping[str, nn.Module],
    layers: Mapping[str, nn.Linear],
    batches: Iterable[Any],
    step: TrainingStep | Callable[[Any], Tensor],
    make_statistic: MakeStatistic,
    options: PassOptions | None = None,
    budget: MemoryBudget | None = None,
    **keywords: Any,
) -> Collection:
    """Run the training loss over the batches and gather a statistic for every layer.

    The modules are in evaluation mode meanwhile (dropout off; no gradients for inputs). Training mode,
    `requires_grad`, hooks and the global random state are restored even when the forward raises.

    Args:
        modules: Component -> module; their mode is switched and restored.
        layers: Name -> linear layer inside them.
        batches: What the loss takes; at most `options.num_batches` are drawn.
        step: The training loss, and what is known about its steps; or the loss alone.
        make_statistic: (name, layer) -> empty statistic; an `InputsAndGradient` where both are observed.
        options: What is observed, over how many batches.
        budget: Of memory, which makes sketches of what does not fit; `None` for no limit.
        **keywords: Fields of the step and of the options one by one, such as `observes="inputs"`.

    Raises:
        ValueError: No batches; statistics that do not fit into the budget in any form; non-finite activations or
            gradients (names layer, batch and timesteps); a layer that the loss never reached; layers that share their
            input in one batch and not in another.
    """
    step, options = _grouped(step, options, keywords)
    budget = budget or MemoryBudget(math.inf, num_columns=1)
    budget.start(next(iter(layers.values())).weight.device, _minimum_over_processes)
    gathering = _Pass(layers, step, make_statistic, options, budget)
    total = options.num_batches if options.num_batches is not None else known_length(batches)
    with model_state_preserved(modules):
        if options.seed is not None:
            torch.manual_seed(options.seed)
        for module in modules.values():
            module.eval()
            for parameter in module.parameters():
                parameter.requires_grad_(False)
        bar = progress_bar(
            total=total, desc=f"collecting {options.observes}", unit=options.batch_name, shown=options.progress
        )
        with gathering.watching() as leaves, bar:
            for batch in islice(batches, options.num_batches):
                gathering.take(batch, leaves)
                bar.update()
                if gathering.has_seen_enough():
                    break
    return gathering.finished()


def _grouped(
    step: TrainingStep | Callable[[Any], Tensor], options: PassOptions | None, keywords: Mapping[str, Any]
) -> tuple[TrainingStep, PassOptions]:
    """The step and the options, with these fields of theirs.

    Raises:
        TypeError: A keyword that is a field of neither.
    """
    names = {item.name for item in fields(TrainingStep)}
    of_step = {key: value for key, value in keywords.items() if key in names}
    of_options = {key: value for key, value in keywords.items() if key not in names}
    step = replace(step if isinstance(step, TrainingStep) else TrainingStep(step), **of_step)
    return step, PassOptions(**of_options) if options is None else replace(options, **of_options)


class _Pass:
    """One collection pass: what it has gathered so far, and what a batch adds to it.

    Statistics are held by the first layer of each group of shared inputs: the budget may replace one by its sketch
    while the pass goes on.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Linear],
        step: TrainingStep,
        make_statistic: MakeStatistic,
        options: PassOptions,
        budget: MemoryBudget,
    ) -> None:
        self._layers, self._step, self._make_statistic = layers, step, make_statistic
        self._options, self._budget = options, budget
        self._result = Collection()
        self._inputs: dict[str, Statistic] = {}
        self._gradients: dict[str, GradientMean] = {}
        self._shared = _SharedInputs()
        self._ran_before: set[str] = set()
        self._weight, self._weight_unit = 1.0, 0.0  # of the current batch
        self._in_backward = False
        if self._observes_gradients:
            self._gradients = {
                name: cast(Any, _part(make_statistic(name, layer), "gradient")) for name, layer in layers.items()
            }
            budget.admit_gradients(self._gradients)
        if not self._observes_inputs:
            self._result.leaders = {name: name for name in layers}
        # Losses are scaled only where the weights, and so the gradients, are float16.
        in_float16 = any(_compute_dtype(layer) == torch.float16 for layer in layers.values())
        self._scale = FLOAT16_LOSS_SCALE if self._gradients and in_float16 else 1.0

    @property
    def _observes_inputs(self) -> bool:
        return self._options.observes != "gradients"

    @property
    def _observes_gradients(self) -> bool:
        return self._options.observes != "inputs"

    @contextmanager
    def watching(self) -> Generator[list[Tensor], None, None]:
        """Observe the layers inside the block; yields what a backward pass has to reach."""
        with ExitStack() as stack:
            if self._observes_inputs:
                stack.enter_context(observe_inputs(self._layers, self._on_input))
            leaves: list[Tensor] = []
            if self._gradients:
                leaves = stack.enter_context(observe_weight_gradients(self._layers, self._on_gradient))
            yield leaves

    def _on_input(self, name: str, tensor: Tensor) -> None:
        if self._in_backward:  # gradient checkpointing runs the forward again
            return
        start = _now(tensor)
        leaders, token_mask = self._result.leaders, self._step.token_mask
        leader = self._shared.leader(name, tensor) if self._options.share_inputs else name
        if name not in leaders:
            leaders[name] = leader
            if leader == name:
                statistic = _part(self._make_statistic(name, self._layers[name]), "inputs")
                self._budget.admit(name, statistic, self._inputs)
        if leaders[name] == name:
            self._inputs[name].update(_rows(tensor.detach(), token_mask(name) if token_mask else None))
        self._result.statistics_s += _now(tensor) - start

    def _on_gradient(self, name: str, gradient: Tensor) -> None:
        start, scale = _now(gradient), self._scale
        self._gradients[name].update(gradient.float() / scale if scale != 1.0 else gradient, self._weight)
        self._result.statistics_s += _now(gradient) - start

    def take(self, batch: Any, leaves: Sequence[Tensor]) -> None:
        """Run the loss of one batch, and see that what it added is sound.

        Raises:
            ValueError: See `collect`.
        """
        self._shared = _SharedInputs()
        result, before, start = self._result, self._result.statistics_s, time.perf_counter()
        _now(self._loss_of(batch, leaves))
        result.forward_s += time.perf_counter() - start - (result.statistics_s - before)
        if self._options.share_inputs and self._observes_inputs:
            _check_sharing(self._ran_before, self._shared.trace, result.leaders)
            self._ran_before |= self._shared.trace.keys()
        batch_name = f"{self._options.batch_name} {result.num_passes}"
        _check_finite(self._inputs, "input activations", batch_name, self._step.describe_step)
        _check_finite(self._gradients, "weight gradient", batch_name, self._step.describe_step)
        result.num_passes += 1

    def _loss_of(self, batch: Any, leaves: Sequence[Tensor]) -> Tensor:
        """The loss, after its backward pass where gradients are observed."""
        if not self._gradients:
            with torch.no_grad():
                return self._step.loss_fn(batch)
        if self._step.batch_weight is not None:
            # in units of a first batch, the same on all processes: equal weights are then exactly 1
            own = self._step.batch_weight(batch)
            self._weight_unit = self._weight_unit or _minimum_over_processes(own)
            self._weight = own / self._weight_unit
        with torch.enable_grad():
            loss = self._step.loss_fn(batch)
            if not loss.requires_grad:
                raise ValueError(
                    "the loss does not depend on the target layers, or ran under no_grad: no gradient to collect"
                )
            # Only into the target weights: the loss may run trainable modules that were not handed over.
            self._in_backward = True
            try:
                (loss * self._scale).backward(inputs=leaves)
            finally:
                self._in_backward = False
        return loss

    def has_seen_enough(self) -> bool:
        """Whether more batches would change nothing that is asked for, see `early_stop`."""
        stop, start = self._options.early_stop, time.perf_counter()
        if stop is None or not stop.is_due(self._result.num_passes):
            return False
        is_over = stop.is_over(self._result.num_passes, self._observed)
        self._result.statistics_s += time.perf_counter() - start
        return is_over

    def _observed(self, layer: str) -> Observed | None:
        """What was observed of a layer so far; `None` where nothing was."""
        inputs, gradient = self._inputs.get(self._result.leaders.get(layer, "")), self._gradients.get(layer)
        if not self._observes_gradients:
            return inputs
        if gradient is None or gradient.num_rows == 0:
            return None
        if not self._observes_inputs:
            return gradient
        return None if inputs is None else InputsAndGradient(cast(Any, inputs), gradient)

    def finished(self) -> Collection:
        """What was gathered, by layer and over all processes.

        Raises:
            ValueError: No batch was taken, or the loss reached a layer in none of them.
        """
        result, inputs, gradients, name = self._result, self._inputs, self._gradients, self._options.batch_name
        if result.num_passes == 0:
            raise ValueError(
                f"the collection pass got no {name}es: the data is empty, the iterator was already used up, "
                f"or num_batches is 0; pass at least one {name}"
            )
        start = time.perf_counter()
        unreached: set[str] = set()
        if self._observes_inputs:
            unreached |= _unreached(self._layers, {layer: inputs[leader] for layer, leader in result.leaders.items()})
        if self._observes_gradients:
            unreached |= _unreached(self._layers, gradients)
        if unreached and not (self._options.allow_unreached and len(unreached) < len(self._layers)):
            raise ValueError(
                f"the loss never reached layer {next(name for name in self._layers if name in unreached)!r}"
                + (f" and {len(unreached) - 1} more" if len(unreached) > 1 else "")
                + "; leave it out of target_modules, or check that the loss uses this module"
            )
        _all_reduce([*inputs.values(), *(value for layer, value in gradients.items() if layer not in unreached)])
        for layer in self._layers:
            if layer in unreached:
                continue
            if not gradients:
                result.statistics[layer] = inputs[result.leaders[layer]]
            elif not inputs:
                result.statistics[layer] = gradients[layer]
            else:
                both = InputsAndGradient(cast(Any, inputs[result.leaders[layer]]), gradients[layer])
                result.statistics[layer] = both
        if not self._observes_gradients:
            self._budget.watch(result.statistics)  # a pass over a reference may yet demote them
        result.statistics_s += time.perf_counter() - start
        return result


def parts_of(statistic: Observed | None) -> list[Statistic]:
    """The statistics that make up what was observed of a layer."""
    if isinstance(statistic, InputsAndGradient):
        return [statistic.inputs, statistic.gradient]
    if isinstance(statistic, InputsAndReference):
        return [statistic.inputs, statistic.reference]
    return [] if statistic is None else [statistic]


def _rows(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """(..., features) -> (n, features), without the tokens that the (batch, tokens) mask leaves out."""
    if mask is not None and tensor.shape[:-1] == mask.shape:
        return tensor[mask.to(tensor.device)]
    return tensor.reshape(-1, tensor.shape[-1])


def _compute_dtype(layer: nn.Linear) -> torch.dtype:
    """The weight's, or what a packed one is unpacked to."""
    return getattr(layer, "compute_dtype", None) or layer.weight.dtype


def _now(tensor: Tensor) -> float:
    """Wall clock, with the accelerator's queue drained so that work is charged to whom it belongs."""
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def known_length(batches: Iterable[Any]) -> int | None:
    """Number of batches, or `None` where it is not known (a loader over a stream has a `len` that raises)."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None


def _check_sharing(ran_before: set[str], trace: Mapping[str, list[str]], leaders: Mapping[str, str]) -> None:
    """Layers may share a statistic only if one tensor feeds both in every call of every batch."""
    for name, leader in leaders.items():
        joined_late = leader in ran_before and name not in ran_before
        if name != leader and (joined_late or trace.get(name) != trace.get(leader)):
            raise ValueError(
                f"layer {name!r} shares its input with {leader!r} in some calls or batches but not in all; "
                "pass share_inputs=False to collect every layer on its own"
            )


def _part(statistic: Statistic | InputsAndGradient, part: Literal["inputs", "gradient"]) -> Statistic:
    return getattr(statistic, part) if isinstance(statistic, InputsAndGradient) else statistic


def _check_finite(
    statistics: Mapping[str, Statistic], what: str, batch: str, describe_step: Callable[[], str] | None
) -> None:
    flags = [statistic.is_finite for statistic in statistics.values()]
    if not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all()):  # one device sync a batch
        return
    culprit = next(name for name, flag in zip(statistics, flags, strict=True) if not bool(flag))
    description = describe_step() if describe_step is not None else ""
    step = f" ({description})" if description else ""
    if getattr(statistics[culprit], "overflowed", False):
        raise ValueError(
            f"{what} at layer {culprit!r} in {batch}{step} are too large, about 1e19 and more: their squares overflow "
            "float32; leave the layer out of target_modules, or look for a broken image, VAE or base"
        )
    raise ValueError(
        f"non-finite {what} at layer {culprit!r} in {batch}{step}; "
        "try float32 or bf16 instead of fp16, and look for a broken image or VAE"
    )


def _unreached(layers: Mapping[str, nn.Linear], statistics: Mapping[str, Statistic]) -> set[str]:
    return {name for name in layers if name not in statistics or statistics[name].num_rows == 0}


# Whether other processes are left out; see `this_process_alone`.
_alone: ContextVar[bool] = ContextVar("_alone", default=False)


@contextmanager
def this_process_alone() -> Generator[None, None, None]:
    """What is collected inside the block is of this process, though others of a launch may be collecting, too."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def is_distributed() -> bool:
    """Whether a collection is one of several processes together."""
    distributed = torch.distributed
    return (
        not _alone.get()
        and distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def _minimum_over_processes(value: float) -> float:
    if not is_distributed():
        return value
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    smallest = torch.tensor(value, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(smallest, op=torch.distributed.ReduceOp.MIN)
    return float(smallest)


def _all_reduce(statistics: Iterable[Statistic]) -> None:
    distributed = torch.distributed
    if not is_distributed():
        return

    def sum_across_processes(tensor: Tensor) -> None:
        if tensor.device.type == "cpu" and distributed.get_backend() == "nccl":  # which knows only GPUs
            on_gpu = tensor.cuda()
            distributed.all_reduce(on_gpu)
            tensor.copy_(on_gpu)
        else:
            distributed.all_reduce(tensor)

    all_reduce({id(statistic): statistic for statistic in statistics}.values(), sum_across_processes)
