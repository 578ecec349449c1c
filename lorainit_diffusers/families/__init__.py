"""Model families: what one training step is, for each kind of model.

Each family is imported from its own file, so that the library's core does not load every kind of pipeline:
`from lorainit_diffusers.families.sd import StableDiffusionFamily`.
"""

from lorainit_diffusers.families.base import ModelFamily, StepRecord, UniformDraws

__all__ = ["ModelFamily", "StepRecord", "UniformDraws"]
