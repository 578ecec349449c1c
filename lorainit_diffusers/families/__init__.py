"""Model families: what one training step is, for each kind of model.

Each family is imported from its own file, so that the library's core does not load every kind of pipeline:
`from lorainit_diffusers.families.sd import StableDiffusionFamily`, or `family_class("sd")`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from lorainit_diffusers.families.base import ModelFamily, StepRecord, UniformDraws

if TYPE_CHECKING:
    from lorainit_diffusers.families.text_to_image import TextToImageFamily

# The text-to-image families by their short names: file and class.
TEXT_TO_IMAGE_FAMILIES = {
    "sd": ("sd", "StableDiffusionFamily"),
    "sdxl": ("sdxl", "StableDiffusionXLFamily"),
    "sd3": ("sd3", "StableDiffusion3Family"),
    "flux": ("flux", "FluxFamily"),
    "pixart": ("pixart", "PixArtFamily"),
    "dit": ("pixart", "DiTFamily"),
    "lumina2": ("lumina2", "Lumina2Family"),
    "flux2": ("flux2", "Flux2Family"),
    "qwen_image": ("qwen_image", "QwenImageFamily"),
    "z_image": ("z_image", "ZImageFamily"),
    "sana": ("sana", "SanaFamily"),
    "wan": ("wan", "WanFamily"),
}

# All families.
FAMILIES = {
    **TEXT_TO_IMAGE_FAMILIES,
    "classifier": ("classifier", "ClassifierFamily"),
    "vlm": ("vlm", "VisionLanguageFamily"),
}


def family_class(name: str) -> type[TextToImageFamily]:
    """The text-to-image family of a short name, imported now.

    Raises:
        ValueError: For an unknown name (lists the known ones).
        ImportError: For a family of pipelines that the installed diffusers does not have.
    """
    if name not in TEXT_TO_IMAGE_FAMILIES:
        raise ValueError(f"unknown family {name!r}; known: {', '.join(TEXT_TO_IMAGE_FAMILIES)}")
    module, kind = TEXT_TO_IMAGE_FAMILIES[name]
    try:
        return getattr(importlib.import_module(f"lorainit_diffusers.families.{module}"), kind)
    except ImportError as error:
        raise ImportError(f"the family {name!r} needs a newer version of diffusers or transformers: {error}") from error


__all__ = ["FAMILIES", "TEXT_TO_IMAGE_FAMILIES", "ModelFamily", "StepRecord", "UniformDraws", "family_class"]
