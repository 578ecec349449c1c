"""What generated images are judged by: pure functions of the features that an encoder gives.

| metric | question | range | better |
|---|---|---|---|
| `image_similarity` | do samples look like the training concept? | -1 to 1 | higher |
| `paired_similarity` | does each sample look like its own reference? | -1 to 1 | higher |
| `text_alignment` | do samples show what the prompt says? | -1 to 1 | higher |
| `diversity` | do samples of one prompt differ? (a collapsed model scores 0) | from 0 | higher |
| `drift` | how far did unrelated prompts move from the base model? | 0 to 2 | lower |
| `kid` | are samples distributed like the real images? | from about 0 | lower |

No metric stands alone: a model that copies one training image has the best similarity and no diversity, one that has
learned nothing has the best drift. Values depend on the encoder, so a `Score` carries its name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_ROWS = 2048


@dataclass(frozen=True)
class MetricInfo:
    """How a report shows a metric.

    Attributes:
        label: Heading of its column.
        higher_is_better: The direction of its arrow.
        needs_encoder: Whether its value means something only beside the name of an encoder.
        counted: Whether it is a share of the examples, so that it moves in steps of one example.
    """

    label: str
    higher_is_better: bool
    needs_encoder: bool = True
    counted: bool = False


METRICS: dict[str, MetricInfo] = {
    "validation_loss": MetricInfo("validation loss", higher_is_better=False, needs_encoder=False),
    "image_similarity": MetricInfo("image similarity", higher_is_better=True),
    "paired_similarity": MetricInfo("paired similarity", higher_is_better=True),
    "text_alignment": MetricInfo("text alignment", higher_is_better=True),
    "diversity": MetricInfo("diversity", higher_is_better=True),
    "perceptual_diversity": MetricInfo("perceptual diversity", higher_is_better=True),
    "drift": MetricInfo("drift from the base", higher_is_better=False),
    "kid": MetricInfo("KID", higher_is_better=False),
    "accuracy": MetricInfo("accuracy", higher_is_better=True, needs_encoder=False, counted=True),
    "macro_accuracy": MetricInfo("accuracy, mean of classes", higher_is_better=True, needs_encoder=False, counted=True),
    "exact_match": MetricInfo("exact match", higher_is_better=True, needs_encoder=False, counted=True),
    "token_f1": MetricInfo("token F1", higher_is_better=True, needs_encoder=False),
}


@dataclass(frozen=True)
class Score:
    """The value of a metric together with what it was measured by.

    Attributes:
        metric: A key of `METRICS`.
        value: The value.
        encoder: Name of the encoder; None only for metrics that use none.
        standard_error: Of the value, where it is known.

    Raises:
        ValueError: When the metric is unknown, or needs an encoder and names none.
    """

    metric: str
    value: float
    encoder: str | None = None
    standard_error: float | None = None

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"unknown metric {self.metric!r}; known are {', '.join(METRICS)}")
        if METRICS[self.metric].needs_encoder and not self.encoder:
            raise ValueError(f"a score of {self.metric!r} needs the name of its encoder")

    @property
    def label(self) -> str:
        """Heading for a table, such as `text alignment (tiny-clip)`."""
        label = METRICS[self.metric].label
        return f"{label} ({self.encoder})" if self.encoder else label


class KidEstimate(NamedTuple):
    """What `kid` returns.

    Attributes:
        mean: Mean estimate over the subsets.
        standard_error: Of the estimate for the given samples, see `kid`.
        full: Unbiased estimate from all samples at once; the least noisy one when there are few.
    """

    mean: float
    standard_error: float
    full: float


def image_similarity(generated: Tensor, real: Tensor) -> float:
    """Mean cosine over all pairs of a generated and a real image; in [-1, 1], higher is better.

    DINO and CLIP-I of DreamBooth (Ruiz et al. 2023, arXiv:2208.12242), by the encoder of the features.
    Its ceiling is not 1 but the similarity of the real images among one another.

    Args:
        generated: (n, d).
        real: (m, d).

    Raises:
        ValueError: When the features are not two matrices of one width with finite, non-zero rows.
    """
    _check_width(generated, real, "generated", "real")
    # the mean over all pairs is the product of the means: no (n, m) matrix
    return float(_unit(generated, "generated").mean(0) @ _unit(real, "real").mean(0))


def paired_similarity(generated: Tensor, real: Tensor) -> float:
    """Mean cosine of row i with row i; in [-1, 1], higher is better.

    Args:
        generated: (n, d).
        real: (n, d), the reference of each generated image.

    Raises:
        ValueError: When the shapes differ, or a row is zero or not finite.
    """
    return float(_cosines(generated, real, "generated", "real").mean())


def text_alignment(images: Tensor, texts: Tensor) -> float:
    """Mean cosine of each image with its prompt; in [-1, 1], higher is better.

    CLIP-T of DreamBooth (Ruiz et al. 2023, arXiv:2208.12242). CLIPScore (Hessel et al. 2021, arXiv:2104.08718) is
    2.5 max(cosine, 0) of one pair; torchmetrics' `CLIPScore` is max(100 x this value, 0).

    Args:
        images: (n, d), from an encoder that reads texts too.
        texts: (n, d), the prompt of each image, from the same encoder.

    Raises:
        ValueError: When the shapes differ, or a row is zero or not finite.
    """
    return float(_cosines(images, texts, "images", "texts").mean())


def drift(adapted: Tensor, base: Tensor) -> float:
    """Mean cosine distance of the adapted model's samples from the base model's; in [0, 2], lower is better.

    Both models sample the same prompts, unrelated to the training concept, from the same seeds. 0 says that nothing
    else was changed by the training (an adapter that does nothing has it too).

    Args:
        adapted: (n, d), samples with the adapter.
        base: (n, d), samples without it.

    Raises:
        ValueError: When the shapes differ, or a row is zero or not finite.
    """
    return 1.0 - float(_cosines(adapted, base, "adapted", "base").mean())


def diversity(features: Tensor | Sequence[Tensor], prompt_ids: Sequence[int | str]) -> float:
    """Mean distance between the samples of one prompt, averaged over prompts; from 0, higher is better.

    The protocol is DreamBooth's DIV (Ruiz et al. 2023, arXiv:2208.12242), which uses LPIPS. Here the
    distance is 1 - cosine (in [0, 2]) for one vector an image, and `perceptual_distance` for patch features.

    Args:
        features: (n, d), or the layers of `patch_features`, (n, tokens, d) each.
        prompt_ids: N marks that say which samples share a prompt.

    Raises:
        ValueError: When the numbers differ, a prompt has a single sample, or a vector is zero or not finite.
    """
    layers = [features.unsqueeze(1)] if isinstance(features, Tensor) else features
    _check_layers(layers, "features")
    if len(prompt_ids) != len(layers[0]):
        raise ValueError(f"features of {len(layers[0])} images with {len(prompt_ids)} prompt_ids; they must agree")
    groups: dict[int | str, list[int]] = {}
    for index, prompt in enumerate(prompt_ids):
        groups.setdefault(prompt, []).append(index)
    means: list[float] = []
    for prompt, rows in groups.items():
        if len(rows) < 2:
            raise ValueError(f"prompt {prompt!r} has a single sample; diversity needs two or more of each prompt")
        distances = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        for layer in layers:
            unit = _unit(layer[rows], "features")
            distances += 2.0 - 2.0 * torch.einsum("itd,jtd->ij", unit, unit) / unit.shape[1]
        means.append(float(distances.fill_diagonal_(0).sum()) / (len(rows) * (len(rows) - 1)))
    # |a - b|^2 of unit vectors is twice their cosine distance
    return (0.5 if isinstance(features, Tensor) else 1.0) * sum(means) / len(means)


def perceptual_distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Distance between images in the activations of a network, LPIPS-style; lower is closer.

    Per layer: channels to unit length at every position, squared difference summed over channels, mean over positions;
    then the sum over layers (Zhang et al. 2018, arXiv:1801.03924, equation 1). The channel weights are 1, the paper's
    uncalibrated variant, and the network is the encoder, so values compare with no published LPIPS. In [0, 4] a layer.

    Args:
        first: Layers of `patch_features`, (n, tokens, d) each.
        second: The same of n other images.

    Returns:
        (n,) float64: image i of `first` with image i of `second`.

    Raises:
        ValueError: When the shapes differ, or a vector is zero or not finite.
    """
    _check_layers(first, "first")
    _check_layers(second, "second")
    shapes, others = [tuple(layer.shape) for layer in first], [tuple(layer.shape) for layer in second]
    if shapes != others:
        raise ValueError(f"layers of shapes {shapes} against {others}; both must come from one encoder")
    distance = torch.zeros(len(first[0]), dtype=torch.float64)
    for a, b in zip(first, second, strict=True):
        distance += (_unit(a, "first") - _unit(b, "second")).square().sum(-1).mean(-1)
    return distance


def kid(
    features: Tensor, reference: Tensor, *, subsets: int = 100, subset_size: int | None = None, seed: int = 0
) -> KidEstimate:
    """Kernel inception distance: how far two sets of images are from one distribution; lower is better.

    The unbiased estimate of the squared maximum mean discrepancy with the kernel (x.y / d + 1)^3 (Binkowski et al.
    2018, arXiv:1801.01401), averaged over random subsets. Two sets of one distribution give 0 within the error, below
    0 as often as above. The sets must hold different images: a set with itself is biased below 0.

    The features are taken as they are. Published KID values are of unnormalised Inception features, and compare with
    values of no other encoder. Of unit vectors, x.y / d is so small that the kernel is almost linear, and only the
    means of the two sets are compared: pass features with `normalize=False`.

    The standard error is the delete-d jackknife (Shao & Wu 1989), the deviation between subsets times
    sqrt(m / (n - m)) for subsets of m of n samples. The deviation alone, over the root of the number of subsets as is
    often printed, shrinks with every further subset of the same images. That, and subsets that are a function of `seed`
    alone, is why this is no call of a library.

    Args:
        features: (n, d), generated images.
        reference: (m, d), real images.
        subsets: How many.
        subset_size: Samples of each set in a subset; by default half of the smaller set, at most 1000.
        seed: Of the choice of subsets.

    Raises:
        ValueError: When the features are not two finite matrices of one width and at least 4 rows, or a subset does not
            leave out some samples.
    """
    _check_width(features, reference, "features", "reference")
    num_samples = min(len(features), len(reference))
    if num_samples < 4:
        raise ValueError(f"KID needs 4 or more samples in each set, not {len(features)} and {len(reference)}")
    size = min(num_samples // 2, 1000) if subset_size is None else subset_size
    if not 2 <= size < num_samples:
        raise ValueError(f"subset_size must be from 2 to {num_samples - 1} (one less than the smaller set), not {size}")
    if subsets < 2:
        raise ValueError(f"a standard error needs 2 or more subsets, not {subsets}")
    x, y = features.double().cpu(), reference.double().cpu()
    generator = torch.Generator().manual_seed(seed)

    def subset(rows: Tensor) -> Tensor:
        return rows[torch.randperm(len(rows), generator=generator)[:size]]

    estimates = torch.tensor([_unbiased_mmd(subset(x), subset(y)) for _ in range(subsets)], dtype=torch.float64)
    error = float(estimates.std()) * math.sqrt(size / (num_samples - size))
    return KidEstimate(float(estimates.mean()), error, _unbiased_mmd(x, y))


def _unbiased_mmd(x: Tensor, y: Tensor) -> float:
    """Squared MMD of x (n, d) and y (m, d) without the diagonals (Gretton et al. 2012, equation 3)."""
    num_x, num_y = len(x), len(y)
    within_x = (_kernel_sum(x, x) - _kernel(x.square().sum(1), x.shape[1])) / (num_x * (num_x - 1))
    within_y = (_kernel_sum(y, y) - _kernel(y.square().sum(1), y.shape[1])) / (num_y * (num_y - 1))
    return within_x + within_y - 2.0 * _kernel_sum(x, y) / (num_x * num_y)


def _kernel_sum(x: Tensor, y: Tensor) -> float:
    # a few rows at a time: the full set may be large
    return sum(_kernel(rows @ y.T, x.shape[1]) for rows in x.split(_ROWS))


def _kernel(products: Tensor, width: int) -> float:
    return float((products / width + 1.0).pow(3).sum())


def _cosines(a: Tensor, b: Tensor, name_a: str, name_b: str) -> Tensor:
    """Cosine of each row of a with the same row of b: (n,) float64."""
    _check_width(a, b, name_a, name_b)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} rows of {name_a} against {len(b)} of {name_b}; rows are compared in pairs")
    return (_unit(a, name_a) * _unit(b, name_b)).sum(1)


def _unit(features: Tensor, name: str) -> Tensor:
    """Rows of unit length in float64 on the CPU."""
    rows = features.double().cpu()
    norms = rows.norm(dim=-1, keepdim=True)
    if not bool((norms > 0).all()) or not bool(norms.isfinite().all()):
        raise ValueError(f"{name} hold a vector that is zero or not finite, which has no direction")
    return rows / norms


def _check_width(a: Tensor, b: Tensor, name_a: str, name_b: str) -> None:
    for features, name in ((a, name_a), (b, name_b)):
        if features.ndim != 2 or 0 in features.shape:
            raise ValueError(
                f"{name} must be (samples, features), not empty, but have the shape {tuple(features.shape)}"
            )
        if not bool(features.isfinite().all()):
            raise ValueError(f"{name} hold numbers that are not finite")
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{name_a} have {a.shape[1]} features and {name_b} {b.shape[1]}; both must come from one encoder"
        )


def _check_layers(layers: Sequence[Tensor], name: str) -> None:
    if not layers or any(layer.ndim != 3 or 0 in layer.shape for layer in layers):
        shapes = [tuple(layer.shape) for layer in layers]
        raise ValueError(f"{name} must be layers of (samples, tokens, features), not {shapes}")
    if len({len(layer) for layer in layers}) > 1:
        raise ValueError(f"{name} have layers with different numbers of samples: {[len(layer) for layer in layers]}")
