"""Random changes of batches of images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorainit_diffusers.families.augment import Augmentation, mixup

EVERYTHING = Augmentation(
    crop_scale=(0.5, 1.3),
    crop_ratio=0.8,
    rotation=20,
    flip=0.5,
    brightness=0.3,
    contrast=0.3,
    saturation=0.5,
    grayscale=0.3,
    permute_channels=0.3,
    erase=0.5,
)


def images(count: int = 8, height: int = 12, width: int = 12) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_nothing_happens_by_default() -> None:
    before = images()
    assert torch.equal(Augmentation()(before, generator()), before)


def test_every_draw_comes_from_the_generator() -> None:
    torch.manual_seed(0)
    first = EVERYTHING(images(), generator())
    torch.manual_seed(5)
    assert torch.equal(EVERYTHING(images(), generator()), first)
    assert not torch.equal(EVERYTHING(images(), generator(2)), first)
    assert first.shape == images().shape
    assert 0 <= first.min() <= first.max() <= 1


def test_the_input_is_not_changed() -> None:
    before = images()
    kept = before.clone()
    EVERYTHING(before, generator())
    assert torch.equal(before, kept)


def test_every_image_is_changed_in_its_own_way() -> None:
    same = images(1).expand(16, -1, -1, -1)
    changed = EVERYTHING(same, generator())
    assert len({tuple(image.flatten().tolist()) for image in changed}) == 16


def test_a_flip_mirrors_exactly() -> None:
    before = images(height=10, width=14)
    torch.testing.assert_close(Augmentation(flip=1.0)(before, generator()), before.flip(3), rtol=1e-4, atol=1e-4)
    half = Augmentation(flip=0.5)(before, generator())
    kinds = [
        "kept" if torch.allclose(a, b, atol=1e-4) else "mirrored" if torch.allclose(a, b.flip(2), atol=1e-4) else "?"
        for a, b in zip(half, before, strict=True)
    ]
    assert set(kinds) == {"kept", "mirrored"}


def test_a_crop_keeps_a_part_of_its_share() -> None:
    # a ramp tells where a crop lies and how much of the width it has
    ramp = torch.linspace(0, 1, 101).expand(64, 3, 101, 101)
    cropped = Augmentation(crop_scale=(0.25, 0.25))(ramp, generator())
    widths = cropped[:, 0, 0, -1] - cropped[:, 0, 0, 0]
    torch.testing.assert_close(widths, torch.full_like(widths, 0.5), rtol=0.03, atol=0.01)
    starts = cropped[:, 0, 0, 0]
    assert starts.min() < 0.1
    assert 0.4 < starts.max() < 0.52
    larger = Augmentation(crop_scale=(4.0, 4.0))(ramp, generator())
    assert (larger[:, 0, 0] == larger[:, 0, 0, :1]).float().mean() > 0.1  # the border is repeated


def test_a_rotation_turns_by_its_angle_on_rectangles_too() -> None:
    y, x = torch.meshgrid(torch.arange(41.0) - 20, torch.arange(61.0) - 30, indexing="ij")
    disc = ((x - 12) ** 2 + y**2 < 9).float().expand(24, 3, 41, 61)  # 12 pixels right of the centre
    turned = Augmentation(rotation=90)(disc, generator())
    mass = turned[:, 0].sum((1, 2))
    at_x, at_y = (turned[:, 0] * x).sum((1, 2)) / mass, (turned[:, 0] * y).sum((1, 2)) / mass
    torch.testing.assert_close((at_x**2 + at_y**2).sqrt(), torch.full((24,), 12.0), rtol=0.05, atol=0.5)
    assert at_y.min() < -8
    assert at_y.max() > 8


def test_colours_change_as_named() -> None:
    before = images()
    gray = Augmentation(grayscale=1.0)(before, generator())
    assert torch.equal(gray[:, 0], gray[:, 1])
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    torch.testing.assert_close(gray[:, :1], (before * weights).sum(1, keepdim=True))
    dark = before * 0.5
    factors = Augmentation(brightness=0.5)(dark, generator()) / dark
    assert float(factors.amax((1, 2, 3)).sub(factors.amin((1, 2, 3))).max()) < 1e-4
    assert 0.5 <= factors.min() <= factors.max() <= 1.5
    permuted = Augmentation(permute_channels=1.0)(before, generator())
    torch.testing.assert_close(permuted.sum(1), before.sum(1))
    assert not torch.equal(permuted, before)
    single = Augmentation(saturation=0.5, contrast=0.2)(before[:, :1], generator())
    assert single.shape == before[:, :1].shape


def test_erasing_leaves_one_grey_rectangle() -> None:
    before = images(32, 24, 24).clamp(max=0.4)
    erased = Augmentation(erase=1.0)(before, generator())
    for old, new in zip(before, erased, strict=True):
        gone = (new == 0.5).all(0)
        assert torch.equal(new[:, ~gone], old[:, ~gone])
        rows, columns = gone.any(1).sum(), gone.any(0).sum()
        assert int(gone.sum()) == int(rows * columns)  # a rectangle
        assert gone.float().mean() < 0.5
    assert torch.equal(Augmentation(erase=0.0)(before, generator()), before)


def test_mixup_mixes_images_and_targets_alike() -> None:
    before = torch.eye(6).view(6, 1, 1, 6).expand(6, 3, 1, 6)  # an image that says which it is
    mixed, targets = mixup(before, torch.eye(6), 0.4, generator())
    torch.testing.assert_close(mixed[:, 0, 0], targets)
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    again, _ = mixup(before, torch.eye(6), 0.4, generator())
    assert torch.equal(mixed, again)
    with pytest.raises(ValueError, match="alpha must be positive, got 0"):
        mixup(before, torch.eye(6), 0.0, generator())


def test_mixups_weights_follow_the_beta_distribution() -> None:
    weights, _ = mixup(torch.ones(4000, 1), torch.ones(4000, 1), 0.5, generator())
    assert torch.allclose(weights, torch.ones(4000, 1))  # convex: of equal images
    zeros_and_ones = (torch.arange(4000) % 2).float()[:, None]
    mixed, _ = mixup(zeros_and_ones, zeros_and_ones, 0.5, generator())
    assert abs(float(mixed.mean()) - 0.5) < 0.03


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_scale": (0.0, 1.0)}, "crop_scale must be two increasing"),
        ({"crop_scale": (0.9, 0.5)}, "crop_scale must be two increasing"),
        ({"crop_ratio": 1.5}, "crop_ratio must lie in"),
        ({"flip": 1.5}, r"flip must lie in \[0, 1\], got 1.5"),
        ({"erase": -0.1}, r"erase must lie in \[0, 1\]"),
        ({"rotation": -5.0}, "rotation must not be negative"),
    ],
)
def test_values_that_mean_nothing_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)
