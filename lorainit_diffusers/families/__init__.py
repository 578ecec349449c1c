"""Model families: what one training step is, for each kind of model."""

from lorainit_diffusers.families.base import ModelFamily, StepRecord, UniformDraws
from lorainit_diffusers.families.sd import StableDiffusionFamily

__all__ = ["ModelFamily", "StableDiffusionFamily", "StepRecord", "UniformDraws"]
