"""Rectified flow (Liu et al. 2022, arXiv:2209.03003; Esser et al. 2024, arXiv:2403.03206): SD3, Flux and their like.

Noise is mixed in along a straight line, (1 - sigma) x + sigma noise, and the model predicts its direction, noise - x.
The training step is that of diffusers' DreamBooth and text-to-image examples for these models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, cast

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from lorainit_diffusers.families.text_to_image import NoisyLatents, TextToImageFamily

WEIGHTING_SCHEMES = ("none", "logit_normal", "mode", "sigma_sqrt", "cosmap")


@dataclass
class FlowMatchingFamily(TextToImageFamily):
    """A base that learnt the velocity between data and noise.

    Attributes:
        weighting_scheme: how levels of noise are drawn (`none`: uniformly, `logit_normal`, `mode`) or weighted
            (`sigma_sqrt`, `cosmap`), as in section 3.1 of Esser et al.; None is the family's usual one.
        logit_mean: mean of the normal distribution behind `logit_normal`; positive is less noise, as in diffusers.
        logit_std: its standard deviation.
        mode_scale: how much `mode` prefers the middle.
        max_sequence_length: tokens of the large text encoder; None is the family's usual number.
    """

    _: KW_ONLY
    weighting_scheme: str | None = None
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    max_sequence_length: int | None = None

    OPTIONS: ClassVar[tuple[str, ...]] = (
        *("weighting_scheme", "logit_mean", "logit_std", "mode_scale", "max_sequence_length"),
    )
    # What diffusers' example for the family takes when nothing is said.
    WEIGHTING_SCHEME: ClassVar[str] = "logit_normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.weighting_scheme = self.weighting_scheme or self.WEIGHTING_SCHEME
        if self.weighting_scheme not in WEIGHTING_SCHEMES:
            raise ValueError(f"weighting_scheme {self.weighting_scheme!r} is not one of {', '.join(WEIGHTING_SCHEMES)}")

    @classmethod
    def _load_scheduler(cls, config: Mapping[str, Any], options: dict[str, Any]) -> FlowMatchEulerDiscreteScheduler:
        return cast(FlowMatchEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler.from_config(dict(config)))

    @classmethod
    def check_scheduler_class(cls, name: str, scheduler: str) -> None:
        """Refuse the scheduler of another kind of noise."""
        if not scheduler.startswith("FlowMatch"):
            raise ValueError(
                f"base model {name!r} samples with {scheduler}: {cls.NAME} is trained with flow matching, and its "
                "scheduler is a FlowMatchEulerDiscreteScheduler; take a base that has one"
            )

    def _sampling_scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        # a copy: a pipeline changes its scheduler's table of noise levels, which training reads
        return cast(
            FlowMatchEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler.from_config(self.noise_scheduler.config)
        )

    def _add_noise(self, latents: Tensor, noise: Tensor, uniform: Tensor) -> NoisyLatents:
        scheduler = self.noise_scheduler
        num_timesteps = int(scheduler.config["num_train_timesteps"])
        # The table runs from noise to data, and carries the base's shift of the levels.
        index = (self._density(uniform) * num_timesteps).long().clamp(0, num_timesteps - 1)
        sigmas = scheduler.sigmas[index].to(self.device)
        timesteps = scheduler.timesteps[index].to(self.device)
        level = sigmas.view(-1, 1, 1, 1)
        return NoisyLatents((1.0 - level) * latents + level * noise, timesteps, noise - latents, self._weights(sigmas))

    def _density(self, uniform: Tensor) -> Tensor:
        """Uniform numbers mapped to the distribution of the place in the table of noise levels."""
        if self.weighting_scheme == "logit_normal":
            return torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(uniform))
        if self.weighting_scheme == "mode":
            return 1 - uniform - self.mode_scale * (torch.cos(math.pi * uniform / 2) ** 2 - 1 + uniform)
        return uniform

    def _weights(self, sigmas: Tensor) -> Tensor | None:
        """(batch,) weights of the samples' losses."""
        if self.weighting_scheme == "sigma_sqrt":
            return sigmas**-2.0
        if self.weighting_scheme == "cosmap":
            return 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
        return None
