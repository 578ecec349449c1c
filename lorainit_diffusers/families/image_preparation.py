"""How a picture becomes what an image classifier sees: its image processor's recipe, without torchvision."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

from lorainit_diffusers.loading.errors import BrokenModelError, loading_errors
from lorainit_diffusers.loading.files import check_transformers_folder
from lorainit_diffusers.loading.hub import hub_options


@dataclass(frozen=True)
class ImagePreparation:
    """How a picture becomes what the base sees: its image processor's recipe, in two halves.

    `crop` is done once; augmentation comes between it and `normalize`, which is part of the training step.

    Attributes:
        resolution: Side of the square that the base sees, in pixels.
        shorter_side: To which a picture is resized before its centre is cut out.
        mean, std: Of the channels, as the processor scales them.
        scale: What a pixel of 1.0 is multiplied by before that.
        reverse_channels: Whether the base wants blue first.
        resample: Pillow's resampling filter.
        processor: The image processor, for saving.
    """

    resolution: int
    shorter_side: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    scale: float = 1.0
    reverse_channels: bool = False
    resample: int = int(Image.Resampling.BILINEAR)
    processor: Any = field(default=None, repr=False, compare=False)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        resolution: int | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> ImagePreparation:
        """Read a base's image processor.

        Args:
            path: Folder or hub name of the base.
            resolution: Side of the square, instead of the processor's; the margin is cut in the same proportion.
            revision: Hub revision.
            cache_dir: Where downloads are kept; Hugging Face's own place by default.

        Raises:
            FileNotFoundError: When there is no such base, or it has no image processor.
            ValueError: When its pictures are not square or have no size.
        """
        name = os.fspath(path)
        check_transformers_folder(name, bare_names=True, weights=False)
        # The processors on Pillow and numpy: torchvision is not needed. transformers 5 has renamed the option.
        renamed = importlib.util.find_spec("transformers.image_processing_backends") is not None
        options: dict[str, Any] = {"backend": "pil"} if renamed else {"use_fast": False}
        source: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
        source |= hub_options("base model", name, "config.json", **source)
        what = "image processor of the base model"
        with loading_errors(what, name, "save the image processor into the folder"):
            processor: Any = AutoImageProcessor.from_pretrained(name, trust_remote_code=False, **source, **options)
        with loading_errors(what, name, "correct its preprocessor_config.json, or copy it again"):
            return cls._of_processor(name, processor, resolution)

    @classmethod
    def _of_processor(cls, name: str, processor: Any, resolution: int | None) -> ImagePreparation:
        """The recipe of an image processor."""
        settings: dict[str, Any] = processor.to_dict()
        size = _as_sides(settings.get("size"))
        crop = _as_sides(settings.get("crop_size")) if settings.get("do_center_crop") else {}
        whole, cut = _side(name, size), _side(name, crop) if crop else None
        if cut is None:
            cut = whole
            if settings.get("crop_pct") and whole < 384:  # ConvNeXt's way to say that a margin is cut off
                whole = int(whole / settings["crop_pct"])
        if resolution is not None:
            whole, cut = max(resolution, round(whole * resolution / cut)), resolution
        scale = 255.0 * float(settings.get("rescale_factor", 1 / 255)) if settings.get("do_rescale", True) else 255.0
        normalizes, resample = settings.get("do_normalize", False), settings.get("resample")
        return cls(
            resolution=cut,
            shorter_side=max(whole, cut),
            mean=tuple(settings["image_mean"]) if normalizes else (0.0, 0.0, 0.0),
            std=tuple(settings["image_std"]) if normalizes else (1.0, 1.0, 1.0),
            scale=scale,
            reverse_channels=bool(settings.get("do_flip_channel_order", False)),
            resample=int(Image.Resampling.BILINEAR if resample is None else resample),
            processor=processor,
        )

    def crop(self, image: Image.Image) -> Tensor:
        """The centre of a picture: (3, resolution, resolution) uint8."""
        image = image.convert("RGB")
        factor = self.shorter_side / min(image.size)
        size = tuple(max(self.shorter_side, round(side * factor)) for side in image.size)
        if size != image.size:
            image = image.resize((size[0], size[1]), Image.Resampling(self.resample))
        left, top = (image.width - self.resolution) // 2, (image.height - self.resolution) // 2
        image = image.crop((left, top, left + self.resolution, top + self.resolution))
        return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()

    def normalize(self, images: Tensor) -> Tensor:
        """What the base takes, of (batch, 3, height, width) in [0, 1]."""
        mean, std = (images.new_tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        images = (images * self.scale - mean) / std
        return images.flip(1) if self.reverse_channels else images

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the image processor, at this resolution."""
        processor, side = self.processor, {"height": self.resolution, "width": self.resolution}
        settings: dict[str, Any] = processor.to_dict()
        if settings.get("do_center_crop"):
            processor.crop_size = side
            processor.size = {"shortest_edge": self.shorter_side}
        elif "shortest_edge" in (settings.get("size") or {}):
            processor.size = {"shortest_edge": self.resolution}
        else:
            processor.size = side
        processor.save_pretrained(os.fspath(directory))


def _as_sides(size: Any) -> dict[str, int]:
    """A processor's size by side; old ones give a number."""
    return {"height": size, "width": size} if isinstance(size, int) else dict(size or {})


def _side(name: str, size: Mapping[str, int]) -> int:
    """The side of a square, or the shorter one that pictures are resized to."""
    sides = {value for key in ("height", "width", "shortest_edge") if (value := size.get(key))}
    if len(sides) != 1:
        raise BrokenModelError(
            f"the image processor of base model {name!r} gives images a size of {dict(size)}; only squares are "
            "supported: set height and width to the same number in its preprocessor_config.json"
        )
    return int(sides.pop())
