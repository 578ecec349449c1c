"""Random changes of images for classifiers, on whole batches of tensors, every draw from one generator.

They are part of a family's `loss`, so that a collection pass sees what training sees. torch only: no image library.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lorainit_diffusers.ranges import NOT_NEGATIVE, OF_FAMILY, SHARE, Range, check_fields

# A crop of more is nearly all border.
MAX_CROP_SCALE = 100.0
# ITU-R BT.601, as image libraries turn colour into grey.
_LUMINANCE = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Augmentation:
    """What may happen to an image; the defaults change nothing.

    Attributes:
        crop_scale: Share of the area that a random crop keeps, at least and at most ("random resized crop"; Szegedy et
            al. 2014, arXiv:1409.4842). Above 1, the crop reaches beyond the image, whose border is repeated.
        crop_ratio: Width over height of the crop, at least; at most its inverse.
        rotation: Largest angle, in degrees, to either side.
        flip: Probability of mirroring.
        brightness, contrast, saturation: Each a factor drawn from [1 - value, 1 + value].
        grayscale: Probability of losing the colours.
        permute_channels: Probability of the colour channels in another order (drawings keep what they show).
        invert: Probability of the negative.
        erase: Probability that a rectangle of up to a third of the area is grey (Zhong et al. 2017, arXiv:1708.04896).
    """

    RANGES: ClassVar[Mapping[str, Range]] = {
        "crop_ratio": Range(0, 1, above=True),
        "rotation": NOT_NEGATIVE,
        **dict.fromkeys(("flip", "brightness", "contrast", "saturation"), SHARE),
        **dict.fromkeys(("grayscale", "permute_channels", "invert", "erase"), SHARE),
    }

    crop_scale: tuple[float, float] = (1.0, 1.0)
    crop_ratio: float = 1.0
    rotation: float = 0.0
    flip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    grayscale: float = 0.0
    permute_channels: float = 0.0
    invert: float = 0.0
    erase: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        if not 0 < low <= high <= MAX_CROP_SCALE:
            raise ValueError(f"crop_scale must be two increasing shares above 0, got {self.crop_scale}")
        check_fields(self, OF_FAMILY)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Change every image of a batch in its own way.

        Args:
            images: (batch, channels, height, width) in [0, 1].
            generator: Of the CPU.

        Returns:
            As many images of the same size, in [0, 1].
        """
        images = self._move(images, generator)
        images = self._recolour(images, generator)
        return self._erase(images, generator) if self.erase else images

    def _move(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Crop, stretch, rotate and mirror in one interpolation."""
        if self.crop_scale == (1.0, 1.0) and self.crop_ratio == 1 and not self.rotation and not self.flip:
            return images
        count, _, height, width = images.shape
        area = _uniform(count, *self.crop_scale, generator)
        ratio = _uniform(count, math.log(self.crop_ratio), -math.log(self.crop_ratio), generator).exp()
        size_x, size_y = (area * ratio).sqrt(), (area / ratio).sqrt()
        mirror = 1 - 2 * (torch.rand(count, generator=generator) < self.flip).float()
        angle = _uniform(count, -self.rotation, self.rotation, generator) * (math.pi / 180)
        # Normalised coordinates: the image is [-1, 1]. Where the crop is larger than it, the image lies inside.
        shift_x, shift_y = ((1 - size).abs() * _uniform(count, -1.0, 1.0, generator) for size in (size_x, size_y))
        aspect = height / width  # a rotation turns pixels, not normalised coordinates
        rows = [
            torch.stack([angle.cos() * size_x * mirror, -angle.sin() * size_y * aspect, shift_x], 1),
            torch.stack([angle.sin() * size_x * mirror / aspect, angle.cos() * size_y, shift_y], 1),
        ]
        theta = torch.stack(rows, 1).to(images.device, images.dtype)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)

    def _recolour(self, images: Tensor, generator: torch.Generator) -> Tensor:
        count, channels = images.shape[:2]

        def factor(spread: float) -> Tensor:
            return _uniform(count, 1 - spread, 1 + spread, generator).view(-1, 1, 1, 1).to(images.device)

        def chance(probability: float) -> Tensor:
            return (torch.rand(count, generator=generator) < probability).view(-1, 1, 1, 1).to(images.device)

        if self.permute_channels:
            order = torch.rand(count, channels, generator=generator).argsort(1)
            permuted = images[torch.arange(count)[:, None], order]
            images = torch.where(chance(self.permute_channels), permuted, images)
        if self.brightness:
            images = images * factor(self.brightness)
        if self.contrast:
            mean = _grey(images).mean((2, 3), keepdim=True)
            images = mean + (images - mean) * factor(self.contrast)
        if self.saturation:
            grey = _grey(images)
            images = grey + (images - grey) * factor(self.saturation)
        if self.grayscale:
            images = torch.where(chance(self.grayscale), _grey(images).expand_as(images), images)
        if self.invert:
            images = torch.where(chance(self.invert), 1 - images, images)
        return images.clamp(0, 1)

    def _erase(self, images: Tensor, generator: torch.Generator) -> Tensor:
        count, _, height, width = images.shape
        area = _uniform(count, 0.02, 1 / 3, generator)
        ratio = _uniform(count, math.log(0.3), -math.log(0.3), generator).exp()
        tall, wide = (area * ratio).sqrt().clamp(max=1.0), (area / ratio).sqrt().clamp(max=1.0)
        top, left = (
            (1 - tall) * torch.rand(count, generator=generator),
            (1 - wide) * torch.rand(count, generator=generator),
        )
        y = (torch.arange(height) + 0.5).view(1, -1, 1) / height
        x = (torch.arange(width) + 0.5).view(1, 1, -1) / width
        low_y, low_x = top.view(-1, 1, 1), left.view(-1, 1, 1)
        inside = (y >= low_y) & (y < low_y + tall.view(-1, 1, 1)) & (x >= low_x) & (x < low_x + wide.view(-1, 1, 1))
        chosen = torch.rand(count, generator=generator) < self.erase
        return images.masked_fill((inside & chosen.view(-1, 1, 1)).unsqueeze(1).to(images.device), 0.5)


def mixup(images: Tensor, targets: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Convex combinations of images and of their targets (Zhang et al. 2017, arXiv:1710.09412).

    Args:
        images: (batch, ...).
        targets: (batch, classes), probabilities.
        alpha: Of the Beta(alpha, alpha) distribution that the weight of each image is drawn from.
        generator: Of the CPU.

    Raises:
        ValueError: When alpha is not positive.
    """
    if alpha <= 0:
        raise ValueError(f"mixup's alpha must be positive, got {alpha}")
    # torch's Beta distribution takes no generator: the ratio of Gamma draws, from numpy seeded by the generator.
    import numpy as np

    seed = int(torch.randint(2**62, (1,), generator=generator))
    weights = torch.from_numpy(np.random.default_rng(seed).beta(alpha, alpha, len(images))).float()
    order = torch.randperm(len(images), generator=generator).to(images.device)
    weights = weights.to(images.device)
    image_weights = weights.view(-1, *[1] * (images.ndim - 1)).to(images.dtype)
    mixed = image_weights * images + (1 - image_weights) * images[order]
    return mixed, weights[:, None] * targets + (1 - weights[:, None]) * targets[order]


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def _grey(images: Tensor) -> Tensor:
    """(batch, 1, height, width); the mean for images that are not of three channels."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    weights = images.new_tensor(_LUMINANCE).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)
