"""The noise of DDPM-type bases (Ho et al. 2020, arXiv:2006.11239): Stable Diffusion 1/2/XL, PixArt and DiT.

The training step is that of diffusers' text-to-image and DreamBooth examples, for the three prediction types.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, cast

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from lorainit_diffusers.families.text_to_image import NoisyLatents, TextToImageFamily

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass
class DenoisingFamily(TextToImageFamily):
    """A base that learnt to undo the noise of a DDPM schedule, at uniform timesteps.

    The noise schedule is a `DDPMScheduler` made from the base's scheduler configuration, as in diffusers' examples:
    what the base samples with (Euler for SDXL) is another discretisation of the same schedule.

    Attributes:
        snr_gamma: Gamma of min-SNR weighting (Hang et al. 2023, arXiv:2303.09556); None is the plain mean square.
        noise_offset: Strength of a per-channel constant added to the noise (0 is off).
    """

    _: KW_ONLY
    snr_gamma: float | None = None
    noise_offset: float = 0.0

    OPTIONS: ClassVar[tuple[str, ...]] = ("snr_gamma", "noise_offset", "prediction_type")

    def __post_init__(self) -> None:
        check_prediction_type(str(self.noise_scheduler.config["prediction_type"]))
        super().__post_init__()

    @classmethod
    def _load_scheduler(cls, config: Mapping[str, Any], options: dict[str, Any]) -> DDPMScheduler:
        """The base's schedule; the option `prediction_type` overrules what its configuration says."""
        prediction_type = options.pop("prediction_type", None)
        if prediction_type is not None:
            check_prediction_type(prediction_type)
        noise_scheduler = cast(DDPMScheduler, DDPMScheduler.from_config(dict(config)))
        if prediction_type is not None:
            noise_scheduler.register_to_config(prediction_type=prediction_type)
        return noise_scheduler

    @classmethod
    def check_scheduler_class(cls, name: str, scheduler: str) -> None:
        """Refuse the scheduler of another kind of noise."""
        if scheduler.startswith(("EDM", "FlowMatch")):
            raise ValueError(
                f"base model {name!r} samples with {scheduler}: its training noise is not that of a DDPM, which the "
                "loss here is for; take a base with an epsilon, v-prediction or sample objective"
            )

    def _noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        noise = super()._noise(shape, generator)
        if self.noise_offset:
            noise = noise + self.noise_offset * self._randn((*shape[:2], 1, 1), generator)
        return noise

    def _add_noise(self, latents: Tensor, noise: Tensor, uniform: Tensor) -> NoisyLatents:
        scheduler = self.noise_scheduler
        num_timesteps = int(scheduler.config["num_train_timesteps"])
        timesteps = (uniform * num_timesteps).long().to(self.device)
        prediction_type = scheduler.config["prediction_type"]
        if prediction_type == "epsilon":
            target = noise
        elif prediction_type == "v_prediction":
            target = scheduler.get_velocity(latents, noise, cast(torch.IntTensor, timesteps))
        else:
            target = latents
        weights = None if self.snr_gamma is None else self._min_snr_weights(timesteps, self.snr_gamma)
        noisy = scheduler.add_noise(latents, noise, cast(torch.IntTensor, timesteps))
        return NoisyLatents(noisy, timesteps, target, weights)

    def _min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Min-SNR weights: min(snr, gamma) for the clean sample, divided by snr (epsilon) or snr + 1 (v)."""
        # not diffusers' compute_snr: it takes roots first and squares them again, which rounds to other numbers
        alphas_cumprod = self.noise_scheduler.alphas_cumprod.to(self.device)[timesteps].float()
        snr = alphas_cumprod / (1.0 - alphas_cumprod)
        prediction_type = self.noise_scheduler.config["prediction_type"]
        if prediction_type == "epsilon":
            return (gamma / snr).clamp(max=1.0)
        if prediction_type == "v_prediction":
            return snr.clamp(max=gamma) / (snr + 1.0)
        return snr.clamp(max=gamma)

    def _ddim_scheduler(self) -> Any:
        """DDIM on the base's own schedule: deterministic, right for every prediction type and zero terminal SNR."""
        # `clip_sample` is for pixels; a configuration without it (Euler's has none) would get DDIM's default, True
        return DDIMScheduler.from_config(self.noise_scheduler.config, clip_sample=False)


def check_prediction_type(prediction_type: str) -> None:
    """See that the loss knows this prediction type.

    Raises:
        ValueError: When it does not.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction type {prediction_type!r} is not one of {', '.join(PREDICTION_TYPES)}")
