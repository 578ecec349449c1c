"""What a model family is, and how its timesteps are drawn.

A family owns everything about one training step in `loss(batch, generator)`. The collection pass of an initialisation,
the gradient pass of LoRA-GA and the training loop all call that one function, so they see the same distribution.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn


@dataclass
class StepRecord:
    """What the latest call of `loss` drew and masked.

    Attributes:
        timesteps: (batch,) timesteps of the step, or None for a family without them.
        token_masks: For each component that has padded token inputs, a boolean (batch, tokens); True is a real token.
        masked_layers: For components where only some layers see these tokens (a transformer's others see those of the
            image, of which there may be as many), the endings of the names of those that do.
        layer_masks: For components whose layers see several sequences: for each of these, the endings of the names of
            the layers that see it, and its mask. They go before `token_masks`.
    """

    timesteps: Tensor | None = None
    token_masks: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    masked_layers: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    layer_masks: dict[str, list[tuple[tuple[str, ...], Tensor]]] = field(
        default_factory=dict[str, list[tuple[tuple[str, ...], Tensor]]]
    )

    def token_mask(self, component: str, layer: str) -> Tensor | None:
        """The mask of the tokens that this layer of a component sees, or None where none of them is padding."""
        for endings, mask in self.layer_masks.get(component, ()):
            if _ends_with(layer, endings):
                return mask
        endings = self.masked_layers.get(component)
        if endings is not None and not _ends_with(layer, endings):
            return None
        return self.token_masks.get(component)


def _ends_with(layer: str, endings: tuple[str, ...]) -> bool:
    return any(f".{layer}".endswith(f".{ending}") for ending in endings)


class AdaptedModules(dict[str, nn.Module]):
    """The modules of a family that get LoRA, by component name, and what the family holds beside them.

    Attributes:
        beside: Its other modules, by name: an adapter on one of them would be neither initialised nor saved.
    """

    def __init__(self, adapted: Mapping[str, nn.Module], family: object) -> None:
        super().__init__(adapted)
        taken = {id(module) for module in adapted.values()}
        self.beside: dict[str, nn.Module] = {
            name: value
            for name, value in vars(family).items()
            if isinstance(value, nn.Module) and id(value) not in taken
        }


@runtime_checkable
class ModelFamily(Protocol):
    """One kind of model: which of its modules get adapters, and what one training step is.

    A family whose loss is a mean over something else than the samples of a batch has a `loss_weight`, too: see
    `WeighsBatches`.
    """

    step: StepRecord

    @property
    def adapted(self) -> Mapping[str, nn.Module]:
        """The modules that get LoRA, by component name (`unet`, `text_encoder`, ...)."""
        ...

    @property
    def heads(self) -> Mapping[str, nn.Module]:
        """Modules trained in full beside the adapters, by component and name (`model.classifier`); often none."""
        ...

    def default_targets(self, component: str) -> list[str]:
        """Suffixes of the layer names that get an adapter when the user names none."""
        ...

    def loss(self, batch: Any, generator: torch.Generator) -> Tensor:
        """The loss of one training step, a scalar; every random number comes from `generator`, on the CPU."""
        ...

    def stratified_timesteps(self, num_samples: int, generator: torch.Generator) -> AbstractContextManager[None]:
        """Inside it, the timesteps that `loss` draws cover the training distribution evenly over `num_samples`."""
        ...


class EvaluationMode:
    """Whether `loss` leaves out what belongs to training only: dropout of captions, augmentation, mixup, smoothing.

    It does not follow from the mode of the modules: a collection pass runs them in evaluation mode, on the batches and
    the captions of the training.
    """

    evaluates: bool = False

    @contextmanager
    def evaluating(self) -> Generator[None, None, None]:
        """Inside the block, `loss` is that of an evaluation; the mode of the modules is left as it is."""
        before = self.evaluates
        self.evaluates = True
        try:
            yield
        finally:
            self.evaluates = before


@contextmanager
def evaluating(family: ModelFamily) -> Generator[None, None, None]:
    """No dropout of any kind inside the block, neither of the family's loss nor of its modules, and no gradients.

    Afterwards the family and every module are in the mode that they were in.
    """
    modes = [(module, module.training) for root in family.adapted.values() for module in root.modules()]
    evaluation = family.evaluating() if isinstance(family, EvaluationMode) else nullcontext()
    try:
        for root in family.adapted.values():
            root.eval()
        with evaluation, torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@runtime_checkable
class WeighsBatches(Protocol):
    """A family that says how much of the data a batch is."""

    def loss_weight(self, batch: Any) -> float:
        """How many things `loss` is the mean over in this batch: answers' tokens, images, ..."""
        ...


def loss_weight(family: ModelFamily, batch: Any) -> float:
    """How much a batch counts beside others, so that the mean over batches is the loss of all of them in one.

    The loss of a batch is a mean. The gradient of one large batch is therefore the mean of those of its parts weighted
    by what each part's loss is the mean over, not the plain mean, unless all parts have as much of it. A family says
    it by `loss_weight(batch)`; of another one it is the number of samples, the length of the batch's first tensor.

    Raises:
        ValueError: When a family gives a weight that is not a positive number.
    """
    if not isinstance(family, WeighsBatches):
        return float(max(_num_samples(batch), 1))
    weight = float(family.loss_weight(batch))
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(
            f"{type(family).__name__}.loss_weight gives {weight} for a batch; it must be positive: leave out batches "
            "that have nothing to train on"
        )
    return weight


def _num_samples(batch: Any) -> int:
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    columns: list[Any] = []
    if isinstance(batch, Mapping):
        columns = list(cast("Mapping[Any, Any]", batch).values())
    elif isinstance(batch, (list, tuple)):
        columns = list(cast("list[Any]", batch))
    return next((len(column) for column in columns if isinstance(column, Tensor) and column.ndim), 1)


class UniformDraws:
    """Uniform numbers for timesteps: independent by default, stratified inside a `with` block.

    A family maps u in [0, 1) through the inverse distribution function of its timesteps. Stratifying u therefore
    stratifies any such distribution: of n samples, exactly one falls into each of its n quantile bins (Latin hypercube
    sampling in one dimension, McKay et al. 1979).
    """

    def __init__(self) -> None:
        self._pool: Tensor | None = None
        self._num_samples = 0
        self._generator: torch.Generator | None = None

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Return (count,) float64 in [0, 1) on the CPU.

        Outside a stratified block they come from `generator`; inside it from the stratified set, which starts anew when
        it is used up.
        """
        if self._pool is None or self._generator is None:
            return torch.rand(count, generator=generator, dtype=torch.float64)
        while self._pool.numel() < count:
            self._pool = torch.cat([self._pool, stratified_uniform(self._num_samples, self._generator)])
        drawn, self._pool = self._pool[:count], self._pool[count:]
        return drawn

    @contextmanager
    def stratified(self, num_samples: int, generator: torch.Generator) -> Generator[None, None, None]:
        """Draw from a stratified, shuffled set of `num_samples` inside the block; restores what was before.

        Raises:
            ValueError: When `num_samples` is not positive.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1 to stratify timesteps, got {num_samples}")
        before = self._pool, self._num_samples, self._generator
        self._pool, self._num_samples, self._generator = torch.empty(0, dtype=torch.float64), num_samples, generator
        try:
            yield
        finally:
            self._pool, self._num_samples, self._generator = before


def stratified_uniform(num_samples: int, generator: torch.Generator) -> Tensor:
    """One uniform number from each of `num_samples` equal bins of [0, 1), in random order: (num_samples,) float64."""
    jitter = torch.rand(num_samples, generator=generator, dtype=torch.float64)
    order = torch.randperm(num_samples, generator=generator)
    # The largest double below 1 keeps floor(u * T) below T when the jitter of the last bin rounds up.
    return ((order + jitter) / num_samples).clamp(max=1.0 - 2.0**-53)
