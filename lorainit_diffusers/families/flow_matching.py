"""Rectified flow (Liu et al. 2022, arXiv:2209.03003; Esser et al. 2024, arXiv:2403.03206): SD3, Flux and their like.

Noise is mixed in along a straight line, (1 - sigma) x + sigma noise, and the model predicts its direction, noise - x.
The training step is that of diffusers' DreamBooth and text-to-image examples for these models.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, NamedTuple, cast

import diffusers
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3
from torch import Tensor

from lorainit_diffusers.families.text_to_image import NoisyLatents, TextToImageFamily

WEIGHTING_SCHEMES = ("none", "logit_normal", "mode", "sigma_sqrt", "cosmap")


class NoiseLevels(NamedTuple):
    """A table of noise levels, from noise to data.

    Attributes:
        sigmas: (num_train_timesteps,) shares of noise.
        timesteps: (num_train_timesteps,) what the pipelines call them.
    """

    sigmas: Tensor
    timesteps: Tensor


@dataclass
class FlowMatchingFamily(TextToImageFamily):
    """A base that learnt the velocity between data and noise.

    Attributes:
        weighting_scheme: How levels of noise are drawn (`none`: uniformly, `logit_normal`, `mode`) or weighted
            (`sigma_sqrt`, `cosmap`), as in section 3.1 of Esser et al.; None is the family's usual one.
        logit_mean: Mean of the normal distribution behind `logit_normal`; positive is less noise, as in diffusers.
        logit_std: Its standard deviation.
        mode_scale: How much `mode` prefers the middle.
        max_sequence_length: Tokens of the large text encoder; None is the family's usual number.
        sampler: Class of the base's own scheduler. Samples are drawn with it where it is one of `SAMPLERS`, and with a
            FlowMatchEulerDiscreteScheduler where not.
    """

    _: KW_ONLY
    weighting_scheme: str | None = None
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    max_sequence_length: int | None = None
    sampler: str = "FlowMatchEulerDiscreteScheduler"

    OPTIONS: ClassVar[tuple[str, ...]] = (
        *("weighting_scheme", "logit_mean", "logit_std", "mode_scale", "max_sequence_length"),
    )
    # What diffusers' example for the family takes when nothing is said.
    WEIGHTING_SCHEME: ClassVar[str] = "logit_normal"
    # Schedulers of other kinds of noise, which some bases have for samples and which know flow matching, too.
    SAMPLERS: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.weighting_scheme = self.weighting_scheme or self.WEIGHTING_SCHEME
        if self.weighting_scheme not in WEIGHTING_SCHEMES:
            raise ValueError(f"weighting_scheme {self.weighting_scheme!r} is not one of {', '.join(WEIGHTING_SCHEMES)}")
        self._shifted_levels: dict[float, NoiseLevels] = {}

    @classmethod
    def _load_scheduler(cls, config: Mapping[str, Any], options: dict[str, Any]) -> FlowMatchEulerDiscreteScheduler:
        config = dict(config)
        if str(config.get("_class_name")) in cls.SAMPLERS:
            prediction = config.get("prediction_type")
            if prediction != "flow_prediction":
                raise ValueError(
                    f"the base's {config['_class_name']} has the prediction_type {prediction!r}: {cls.NAME} is trained "
                    "with flow matching, where it is 'flow_prediction'; take a base that has it"
                )
            # what the others call their shift of the noise levels
            config["shift"] = float(config.get("flow_shift") or 1.0)
            return _made_of(FlowMatchEulerDiscreteScheduler, config)
        return cast(FlowMatchEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler.from_config(config))

    @classmethod
    def _from_index(cls, index: Mapping[str, Any]) -> dict[str, Any]:
        return {"sampler": str(index["scheduler"][1])}

    @classmethod
    def check_scheduler_class(cls, name: str, scheduler: str) -> None:
        """Refuse the scheduler of another kind of noise."""
        if not scheduler.startswith("FlowMatch") and scheduler not in cls.SAMPLERS:
            raise ValueError(
                f"base model {name!r} samples with {scheduler}: {cls.NAME} is trained with flow matching, and its "
                "scheduler is a FlowMatchEulerDiscreteScheduler; take a base that has one"
            )

    def _sampling_scheduler(self) -> Any:
        # a copy: a pipeline changes its scheduler's table of noise levels, which training reads
        config = self.noise_scheduler.config
        if self.sampler in self.SAMPLERS:
            return _made_of(getattr(diffusers, self.sampler), config)
        return FlowMatchEulerDiscreteScheduler.from_config(config)

    def _levels(self, latents: Tensor) -> NoiseLevels:
        """The noise levels for images of this size: the base's table, or that of `_shift_exponent`."""
        exponent = None
        if self.noise_scheduler.config["use_dynamic_shifting"]:
            exponent = self._shift_exponent(latents)
        if exponent is None:
            return NoiseLevels(self.noise_scheduler.sigmas, self.noise_scheduler.timesteps)
        if exponent not in self._shifted_levels:
            scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(self.noise_scheduler.config)
            count = int(self.noise_scheduler.config["num_train_timesteps"])
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / count, count), mu=exponent)
            self._shifted_levels[exponent] = NoiseLevels(scheduler.sigmas[:count], scheduler.timesteps)
        return self._shifted_levels[exponent]

    def _shift_exponent(self, latents: Tensor) -> float | None:
        """By how much the pipeline shifts the levels of noise for images of this size (its `mu`).

        Asked only where the base's scheduler shifts by the size. None takes them unshifted.

        Args:
            latents: As `_add_noise` gets them.
        """
        return None

    def _add_noise(self, latents: Tensor, noise: Tensor, uniform: Tensor) -> NoisyLatents:
        scheduler = self.noise_scheduler
        num_timesteps = int(scheduler.config["num_train_timesteps"])
        # The table runs from noise to data, and carries the base's shift of the levels.
        index = (self._density(uniform) * num_timesteps).long().clamp(0, num_timesteps - 1)
        table = self._levels(latents)
        sigmas = table.sigmas[index].to(self.device)
        timesteps = table.timesteps[index].to(self.device)
        level = sigmas.view(-1, *(1,) * (latents.ndim - 1))
        return NoisyLatents((1.0 - level) * latents + level * noise, timesteps, noise - latents, self._weights(sigmas))

    def _density(self, uniform: Tensor) -> Tensor:
        """Uniform numbers mapped to the distribution of the place in the table of noise levels."""
        # diffusers' compute_density_for_timestep_sampling draws by itself, so that its numbers cannot be stratified
        if self.weighting_scheme == "logit_normal":
            return torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(uniform))
        if self.weighting_scheme == "mode":
            return 1 - uniform - self.mode_scale * (torch.cos(math.pi * uniform / 2) ** 2 - 1 + uniform)
        return uniform

    def _weights(self, sigmas: Tensor) -> Tensor | None:
        """(batch,) weights of the samples' losses."""
        if self.weighting_scheme in ("sigma_sqrt", "cosmap"):
            return compute_loss_weighting_for_sd3(str(self.weighting_scheme), sigmas)
        return None


def _made_of(kind: Any, config: Mapping[str, Any]) -> Any:
    """A scheduler of a class from another one's configuration, which it keeps whole.

    What `from_config` does, without its warning about the entries that only the other class knows.
    """
    own = inspect.signature(kind.__init__).parameters
    entries = {name: value for name, value in config.items() if not name.startswith("_")}
    scheduler = kind(**{name: value for name, value in entries.items() if name in own})
    scheduler.register_to_config(**{name: value for name, value in entries.items() if name not in own})
    return scheduler
