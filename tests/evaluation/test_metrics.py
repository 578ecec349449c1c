from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.functional import cosine_similarity, pairwise_cosine_similarity
from torchmetrics.functional.image.lpips import _normalize_tensor, _spatial_average
from torchmetrics.functional.multimodal import clip_score
from torchmetrics.image.kid import poly_mmd

from lorainit_diffusers.evaluation import (
    METRICS,
    Score,
    diversity,
    drift,
    image_similarity,
    kid,
    metrics,
    paired_similarity,
    perceptual_distance,
    text_alignment,
)

X_AXIS = torch.eye(3)[0]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layers(n: int, seed: int = 0) -> list[Tensor]:
    return [randn(n, 16, 8, seed=seed), randn(n, 4, 12, seed=seed + 1)]


# agreement with independent implementations


def test_image_similarity_is_the_mean_of_all_pairs() -> None:
    a, b = randn(7, 5) + 0.5, 3 * randn(4, 5, seed=1) + 0.5
    assert image_similarity(a, b) == pytest.approx(float(pairwise_cosine_similarity(a, b).mean()), abs=1e-6)


def test_paired_metrics_are_the_mean_cosine() -> None:
    a, b = randn(7, 5) + 0.5, 3 * randn(7, 5, seed=1) + 0.5
    expected = float(cosine_similarity(a, b, reduction="mean"))
    assert abs(expected) > 0.01
    assert paired_similarity(a, b) == pytest.approx(expected, abs=1e-6)
    assert text_alignment(a, b) == pytest.approx(expected, abs=1e-6)
    assert drift(a, b) == pytest.approx(1 - expected, abs=1e-6)


class FeatureTable(nn.Module):
    """Stands for a CLIP model and its processor: returns features that are given."""

    def __init__(self, images: Tensor, texts: Tensor) -> None:
        super().__init__()
        self.config, self.images, self.texts = None, images, texts

    def forward(self, **inputs: object) -> dict[str, Tensor]:
        return dict.fromkeys(("pixel_values", "input_ids", "attention_mask"), torch.zeros(1, 1))

    def get_image_features(self, *_: Tensor) -> Tensor:
        return self.images

    def get_text_features(self, *_: Tensor) -> Tensor:
        return self.texts


@pytest.mark.parametrize("sign", [1, -1])
def test_text_alignment_and_clip_score(sign: int) -> None:
    images = randn(5, 6)
    texts = sign * (images + randn(5, 6, seed=1))
    model = FeatureTable(images, texts)
    theirs = float(clip_score(list(torch.zeros(5, 3, 2, 2)), ["a"] * 5, lambda: (model, model)))
    ours = text_alignment(images, texts)
    assert ours * sign > 0.3
    assert theirs == pytest.approx(max(100 * ours, 0), abs=1e-4)


def test_perceptual_distance_is_uncalibrated_lpips() -> None:
    a, b = layers(3), layers(3, seed=5)
    ours = perceptual_distance(a, b)

    theirs = torch.zeros(3)
    for first, second in zip(a, b, strict=True):
        maps = [_normalize_tensor(layer.mT.unflatten(2, (2, -1))) for layer in (first, second)]
        theirs += _spatial_average((maps[0] - maps[1]).square().sum(1, keepdim=True), keep_dim=False).squeeze(1)
    assert torch.allclose(ours.float(), theirs, atol=1e-5)

    for index in range(3):
        expected = 0.0
        for first, second in zip(a, b, strict=True):
            positions = [
                sum((p / math.hypot(*u) - q / math.hypot(*v)) ** 2 for p, q in zip(u, v, strict=True))
                for u, v in zip(first[index].tolist(), second[index].tolist(), strict=True)
            ]
            expected += sum(positions) / len(positions)
        assert float(ours[index]) == pytest.approx(expected, abs=1e-12)


def test_diversity_averages_pairs_within_prompts_then_prompts() -> None:
    features, prompts = randn(7, 5), ["a", "b", "a", "b", "b", "b", "b"]
    expected = []
    for prompt in ("a", "b"):
        rows = features[[index for index, name in enumerate(prompts) if name == prompt]]
        cosines = pairwise_cosine_similarity(rows, zero_diagonal=True)
        expected.append(1 - float(cosines.sum()) / (len(rows) * (len(rows) - 1)))
    assert diversity(features, prompts) == pytest.approx(sum(expected) / 2, abs=1e-6)


def test_perceptual_diversity_is_the_mean_perceptual_distance() -> None:
    features = layers(4)
    pairs = [(0, 1), (0, 2), (1, 2)]
    rows = [0, 1, 3]  # of prompt 0, sample 2 has a prompt of its own with a copy
    features = [torch.cat([layer, layer[2:3]]) for layer in features]
    distances = [
        float(perceptual_distance([layer[[rows[i]]] for layer in features], [layer[[rows[j]]] for layer in features]))
        for i, j in pairs
    ]
    assert diversity(features, [0, 0, 1, 0, 1]) == pytest.approx(sum(distances) / 3 / 2, abs=1e-12)


@pytest.mark.parametrize("offset", [0.0, 0.7])
def test_kid_of_the_full_set_is_the_unbiased_mmd(offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = randn(30, 6).double(), randn(30, 6, seed=1).double() + offset
    expected = float(poly_mmd(x, y))
    assert kid(x, y).full == pytest.approx(expected, abs=1e-12)
    monkeypatch.setattr(metrics, "_ROWS", 7)
    assert kid(x, y).full == pytest.approx(expected, abs=1e-12)


def test_kid_of_sets_of_different_sizes() -> None:
    x, y = randn(9, 4).double(), randn(5, 4, seed=1).double() + 0.5

    def mean_kernel(a: Tensor, b: Tensor, pairs: list[tuple[int, int]]) -> float:
        return sum((float(a[i] @ b[j]) / 4 + 1) ** 3 for i, j in pairs) / len(pairs)

    within_x = mean_kernel(x, x, [(i, j) for i in range(9) for j in range(9) if i != j])
    within_y = mean_kernel(y, y, [(i, j) for i in range(5) for j in range(5) if i != j])
    between = mean_kernel(x, y, [(i, j) for i in range(9) for j in range(5)])
    assert kid(x, y).full == pytest.approx(within_x + within_y - 2 * between, abs=1e-10)


def test_kid_of_subsets_has_the_mean_of_the_full_set() -> None:
    x, y = randn(40, 6), randn(50, 6, seed=1) + 0.5
    estimate = kid(x, y, subsets=400, subset_size=20)
    # size / (n - size) is 1 here: the standard error is the deviation between subsets
    assert abs(estimate.mean - estimate.full) < 4 * estimate.standard_error / math.sqrt(400)
    assert kid(x, y, subsets=400, subset_size=20) == estimate
    assert kid(x, y, subsets=400, subset_size=20, seed=1).mean != estimate.mean


# what the standard error of KID means


def test_kid_of_one_distribution_is_zero_within_its_error() -> None:
    estimates = [kid(*randn(120, 8, seed=seed).split(60), subsets=50) for seed in range(20)]
    scores = [estimate.mean / estimate.standard_error for estimate in estimates]
    assert max(abs(score) for score in scores) < 3
    assert sum(score > 0 for score in scores) in range(3, 18), "an unbiased estimate lies on both sides of 0"
    shifted = [kid(randn(60, 8, seed=s), randn(60, 8, seed=s + 99) + 0.9, subsets=50) for s in range(5)]
    assert min(estimate.mean / estimate.standard_error for estimate in shifted) > 3


@pytest.mark.parametrize(("subset_size", "subsets"), [(None, 50), (None, 200), (15, 50)])
def test_kid_error_is_the_spread_between_fresh_samples(subset_size: int | None, subsets: int) -> None:
    estimates = [
        kid(randn(60, 8, seed=s), randn(60, 8, seed=s + 500) + 0.5, subsets=subsets, subset_size=subset_size)
        for s in range(40)
    ]
    spread = float(torch.tensor([estimate.full for estimate in estimates]).std())
    error = sum(estimate.standard_error for estimate in estimates) / len(estimates)
    assert 0.7 < error / spread < 1.5


# every metric moves the way its table says

GoodAndBad = Callable[[], tuple[float, float]]
NEAR, FAR = X_AXIS + 0.1 * randn(8, 3), -X_AXIS + 0.1 * randn(8, 3, seed=1)
REAL = X_AXIS + 0.1 * randn(8, 3, seed=2)
EXTREMES: dict[str, GoodAndBad] = {
    "image_similarity": lambda: (image_similarity(NEAR, REAL), image_similarity(FAR, REAL)),
    "paired_similarity": lambda: (paired_similarity(NEAR, REAL), paired_similarity(FAR, REAL)),
    "text_alignment": lambda: (text_alignment(NEAR, REAL), text_alignment(FAR, REAL)),
    "drift": lambda: (drift(NEAR, REAL), drift(FAR, REAL)),
    "kid": lambda: (kid(NEAR, REAL).mean, kid(FAR, REAL).mean),
    "diversity": lambda: (diversity(randn(8, 3), [0] * 8), diversity(NEAR, [0] * 8)),
    "perceptual_diversity": lambda: (
        diversity([randn(8, 4, 3)], [0] * 8),
        diversity([randn(1, 4, 3) + 0.1 * randn(8, 4, 3, seed=1)], [0] * 8),
    ),
}


def test_every_metric_of_the_table_is_tried() -> None:
    assert {name for name, metric in METRICS.items() if metric.needs_encoder} == set(EXTREMES)
    assert not METRICS["validation_loss"].higher_is_better
    counted = {name for name, metric in METRICS.items() if metric.counted}
    assert counted == {"accuracy", "macro_accuracy", "exact_match"}
    assert all(METRICS[name].higher_is_better for name in counted)


@pytest.mark.parametrize("name", EXTREMES)
def test_better_samples_score_better(name: str) -> None:
    good, bad = EXTREMES[name]()
    assert abs(good - bad) > 0.1
    assert (good > bad) == METRICS[name].higher_is_better


def test_similarity_falls_and_drift_grows_step_by_step() -> None:
    base, other = randn(6, 16), randn(6, 16, seed=1)
    mixes = [(1 - share) * base + share * other for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    drifts = [drift(mix, base) for mix in mixes]
    assert drifts[0] == pytest.approx(0, abs=1e-12)
    assert drifts == sorted(set(drifts))
    similarities = [paired_similarity(mix, base) for mix in mixes]
    assert similarities == sorted(set(similarities), reverse=True)


def test_pairs_matter_where_the_metric_says_so() -> None:
    images = torch.eye(4)
    swapped = images.roll(1, 0)
    assert text_alignment(images, images) == 1.0
    assert text_alignment(images, swapped) == 0.0
    assert image_similarity(images, swapped) == image_similarity(images, images) == 0.25


def test_kid_grows_with_the_distance_of_the_means() -> None:
    x, y = randn(50, 4), randn(50, 4, seed=1)
    values = [kid(x + offset, y).mean for offset in (0.0, 0.5, 1.0, 2.0)]
    assert values == sorted(values)
    assert values[1] > 10 * abs(values[0])


def test_a_copied_image_is_similar_and_not_diverse() -> None:
    real = randn(40, 16) + 1
    copies, fresh = real.mean(0) + 0.01 * randn(40, 16, seed=1), randn(40, 16, seed=2) + 1
    assert image_similarity(copies, real) > image_similarity(fresh, real)
    assert diversity(copies, [0] * 40) < 0.01 * diversity(fresh, [0] * 40)


def test_kid_sees_the_spread_only_of_features_as_they_are() -> None:
    x, y = randn(400, 64), randn(400, 64, seed=1) * torch.linspace(0.2, 2, 64)
    as_they_are = kid(x, y, subsets=20)
    assert as_they_are.mean > 5 * as_they_are.standard_error
    unit = kid(nn.functional.normalize(x), nn.functional.normalize(y), subsets=20)
    assert abs(unit.mean) < 2 * unit.standard_error


def test_a_collapsed_model_has_no_diversity_however_different_its_prompts_are() -> None:
    features = torch.stack([X_AXIS, X_AXIS, X_AXIS, -X_AXIS, -X_AXIS])
    prompts = ["left"] * 3 + ["right"] * 2
    assert diversity(features, prompts) == pytest.approx(0, abs=1e-12)
    assert diversity([features.unsqueeze(1)], prompts) == pytest.approx(0, abs=1e-12)
    assert diversity(features, ["a", "b", "b", "a", "b"]) > 0.5


def test_only_kid_depends_on_the_length_of_the_features() -> None:
    a, b = randn(6, 4) + 1, randn(6, 4, seed=1) + 1
    for metric in (image_similarity, paired_similarity, text_alignment, drift):
        assert metric(10 * a, 0.1 * b) == pytest.approx(metric(a, b), abs=1e-6)
    assert diversity(10 * a, [0] * 6) == pytest.approx(diversity(a, [0] * 6), abs=1e-6)
    assert kid(10 * a, b).full > 10 * kid(a, b).full


def test_half_precision_features_are_not_rounded_further() -> None:
    a, b = (randn(6, 400) + 1).half(), (randn(6, 400, seed=1) + 1).half()
    assert drift(a, b) == drift(a.double(), b.double())
    assert kid(a, b) == kid(a.double(), b.double())


# errors

FEATURES = randn(6, 3)
WITH_ZERO = torch.cat([FEATURES[:5], torch.zeros(1, 3)])
WITH_NAN = torch.cat([FEATURES[:5], torch.full((1, 3), torch.nan)])
TWO_SETS = [image_similarity, paired_similarity, text_alignment, drift, kid]
COSINES = TWO_SETS[:-1]


@pytest.mark.parametrize("metric", TWO_SETS, ids=lambda metric: metric.__name__)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (FEATURES[0], r"shape \(3,\)"),
        (FEATURES[:0], r"shape \(0, 3\)"),
        (FEATURES[:, :2], "from one encoder"),
        (WITH_NAN, "not finite"),
    ],
)
def test_features_that_cannot_be_compared(metric: Callable[..., object], bad: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric(FEATURES, bad)
    with pytest.raises(ValueError, match=message):
        metric(bad, FEATURES)


@pytest.mark.parametrize("metric", COSINES, ids=lambda metric: metric.__name__)
def test_a_zero_vector_has_no_cosine(metric: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="has no direction"):
        metric(WITH_ZERO, FEATURES)


@pytest.mark.parametrize("metric", COSINES[1:], ids=lambda metric: metric.__name__)
def test_pairs_need_as_many_of_both(metric: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match=r"6 rows .* against 5 .* in pairs"):
        metric(FEATURES, FEATURES[:5])


@pytest.mark.parametrize(
    ("features", "prompts", "message"),
    [
        (FEATURES, [0] * 5, "6 images with 5 prompt_ids"),
        (FEATURES, ["a"] * 5 + ["b"], "'b' has a single sample"),
        (WITH_ZERO, [0] * 6, "has no direction"),
        (FEATURES[0], [0] * 3, "samples, tokens, features"),
        (FEATURES[:0], [], "samples, tokens, features"),
        ([], [], "samples, tokens, features"),
        ([FEATURES], [0] * 6, "samples, tokens, features"),
        ([randn(6, 2, 3), randn(5, 2, 3)], [0] * 6, "different numbers of samples"),
    ],
)
def test_diversity_errors(features: Tensor | list[Tensor], prompts: list[int | str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        diversity(features, prompts)


def test_perceptual_distance_needs_layers_of_one_encoder() -> None:
    with pytest.raises(ValueError, match="from one encoder"):
        perceptual_distance(layers(3), layers(2))
    with pytest.raises(ValueError, match="from one encoder"):
        perceptual_distance(layers(3), layers(3)[:1])
    with pytest.raises(ValueError, match="samples, tokens, features"):
        perceptual_distance([FEATURES], [FEATURES])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subset_size": 6}, "from 2 to 5"),
        ({"subset_size": 1}, "from 2 to 5"),
        ({"subsets": 1}, "2 or more subsets"),
    ],
)
def test_kid_errors(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kid(FEATURES, randn(9, 3), **options)


def test_kid_needs_four_samples() -> None:
    with pytest.raises(ValueError, match="not 6 and 3"):
        kid(FEATURES, FEATURES[:3])


def test_a_score_names_its_encoder() -> None:
    score = Score("text_alignment", 0.3, "tiny-clip")
    assert score.label == "text alignment (tiny-clip)"
    assert Score("validation_loss", 0.1).label == "validation loss"
    with pytest.raises(ValueError, match="needs the name of its encoder"):
        Score("text_alignment", 0.3)
    with pytest.raises(ValueError, match="unknown metric 'fid'"):
        Score("fid", 0.3, "inception")
