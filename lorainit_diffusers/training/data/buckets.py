"""Sizes of the crops for images of several aspect ratios."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence


def parse_buckets(text: str, resolution: int, multiple: int) -> list[tuple[int, int]]:
    """The (height, width) of `--aspect_ratio_buckets`: `"1024,1024;768,1344"`, or `auto`.

    `auto` has the square of side `resolution`, and rectangles of about its area and never more, with aspects from 1:2
    to 2:1. Their sides are multiples of an eighth of the resolution, or of 8 `multiple` (the usual 64) if that is less.

    Args:
        text: What the user gave.
        resolution: Side of the square, which is one of the automatic buckets.
        multiple: What the model needs each side to be a multiple of.

    Raises:
        ValueError: When the text is malformed or a side is not a multiple.
    """
    flag = "--aspect_ratio_buckets"
    buckets: list[tuple[int, int]] = []
    if text.strip() == "auto":
        step = multiple * min(8, max(1, resolution // (8 * multiple)))
        buckets.append((resolution, resolution))
        for width in range(step, 2 * resolution + 1, step):
            height = resolution**2 // (width * step) * step
            if max(height, width) <= 2 * min(height, width):
                buckets += [(height, width), (width, height)]
        buckets.sort(key=lambda bucket: bucket[0] / bucket[1])
    else:
        for part in text.strip().strip(";").split(";"):
            match = re.fullmatch(r"\s*([1-9]\d*)\s*,\s*([1-9]\d*)\s*", part)
            if match is None:
                raise ValueError(
                    f"{flag} {text!r}: {part!r} is not height,width; give auto, or pairs such as '1024,1024;768,1344'"
                )
            buckets.append((int(match[1]), int(match[2])))
    for height, width in buckets:
        if height % multiple or width % multiple:
            raise ValueError(f"{flag} {text!r}: the sides of {height},{width} are not multiples of {multiple}")
    return list(dict.fromkeys(buckets))


def nearest_bucket(size: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> int:
    """Index of the bucket whose aspect ratio is nearest to that of `size`, (height, width), on a log scale."""
    aspect = math.log(size[0] / size[1])
    distances = [abs(aspect - math.log(height / width)) for height, width in buckets]
    return distances.index(min(distances))
