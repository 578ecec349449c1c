"""How the pictures of the tiny CLIP's training are changed: moved, recoloured, and turned into black-line drawings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def as_drawing(images: Tensor, strength: Tensor, dark: Tensor, wide: Tensor) -> Tensor:
    """Black outlines, and black where the picture is dark, on white: like the black-line styles it never sees.

    The outline is the morphological gradient: the largest minus the smallest value in a small window.

    Args:
        images: `(batch, 3, height, width)` in [0, 1].
        strength: `(batch, 1, 1, 1)`, the larger, the weaker the edges that become lines.
        dark: `(batch, 1, 1, 1)`, luminance below which a pixel is black.
        wide: `(batch, 1, 1, 1)` bool, thicker lines.
    """

    def gradient(size: int) -> Tensor:
        padded = F.pad(images, (size // 2, (size - 1) // 2) * 2, mode="replicate")
        spread = F.max_pool2d(padded, size, 1) + F.max_pool2d(-padded, size, 1)
        return spread.amax(1, keepdim=True)

    lines = torch.where(wide, gradient(3), gradient(2))
    fill = ((dark - images.mean(1, keepdim=True)) * 10).clamp(0, 1)
    return (1 - torch.maximum((lines * strength - 0.3).clamp(0, 1), fill)).expand_as(images)


def augment(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random flip, shift, scale, rotation, colour, grey, drawing, inversion, blur and noise.

    Args:
        images: `(batch, 3, height, width)` in [0, 1], on white.
        generator: Of the CPU.

    Returns:
        The images; `(batch,)` bool, those turned into drawings; `(batch,)` bool, those inverted or without colour.
    """
    count = len(images)

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(count, channels, 1, 1, generator=generator)

    def chance(probability: float) -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=generator) < probability

    angle, scale, stretch = (uniform(*limits).flatten() for limits in ((-0.12, 0.12), (0.9, 1.25), (0.93, 1.07)))
    flip = 1 - 2 * chance(0.1).flatten().float()
    shift_x, shift_y = uniform(-0.1, 0.1, 2).view(count, 2).unbind(1)
    rows = [
        torch.stack([angle.cos() * scale * stretch * flip, -angle.sin() * scale, shift_x], 1),
        torch.stack([angle.sin() * scale * stretch * flip, angle.cos() * scale, shift_y], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    # Outside of the picture is white: what is sampled is the ink.
    images = 1 - F.grid_sample(1 - images, grid, align_corners=False)

    drawn = chance(0.35).flatten()
    strength, dark, wide = uniform(1.5, 6), uniform(-0.1, 0.5), chance(0.6)
    drawing = as_drawing(images[drawn], strength[drawn], dark[drawn], wide[drawn])
    order = torch.randperm(3, generator=generator)
    images = torch.where(chance(0.2), images[:, order], images)
    images = 1 - (1 - images) * torch.where(chance(0.7), uniform(0.6, 1.3, 3), torch.ones(1))
    grey = chance(0.2)
    images = torch.where(grey, images.mean(1, keepdim=True), images)
    images[drawn] = drawing
    inverted = chance(0.04)
    images = torch.where(inverted, 1 - images, images)
    images = torch.where(chance(0.2), F.avg_pool2d(images, 3, 1, 1, count_include_pad=False), images)
    noisy = chance(0.15).flatten()
    noise = torch.randn(images[noisy].shape, generator=generator)
    images[noisy] += noise * uniform(0, 0.1)[noisy]
    return images.clamp(0, 1), drawn, inverted.flatten() | (grey.flatten() & ~drawn)
