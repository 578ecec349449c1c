"""What the text-to-image families share: a denoiser of VAE latents under text embeddings, UNet or transformer.

A training step is one template, `TextToImageFamily.loss`: latents, noise, a level of noise, captions, prediction, mean
square. What differs between families is filled in at three places: how noise is added and what the target is
(`_add_noise`: `families/ddpm.py` and `families/flow_matching.py`), how captions become conditioning (`_encode`), and
how the denoiser is called (`_predict`).

The class is built in four steps, each of which knows those before it only: the parts of a base (`families/loading.py`),
its captions (`families/captions.py`), drawing images (`families/sampling.py`), and the training step here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lorainit_diffusers.families.base import StepRecord, UniformDraws
from lorainit_diffusers.families.captions import TokenCounts, hidden_state, replace, token_mask
from lorainit_diffusers.families.pipelines import CLIP_ENCODERS
from lorainit_diffusers.families.sampling import Sampling

# What families and those who use them find here, whichever step it belongs to.
__all__ = [
    "CLIP_ENCODERS",
    "NoisyLatents",
    "TextToImageFamily",
    "TokenCounts",
    "hidden_state",
    "replace",
    "token_mask",
]


@dataclass
class NoisyLatents:
    """One batch as the denoiser sees it, and what it should say.

    Attributes:
        latents: (batch, channels, height, width) with noise.
        timesteps: (batch,) of the noise schedule, as the pipelines count them.
        target: What the denoiser should predict, of the latents' shape.
        weights: (batch,) of the samples' losses; None is 1 for all.
    """

    latents: Tensor
    timesteps: Tensor
    target: Tensor
    weights: Tensor | None = None


@dataclass
class TextToImageFamily(Sampling):
    """A base and its training loss. Its modules are taken as they are; `from_pretrained` freezes what it loads.

    A family adds, as fields: its tokenizers and text encoders, `vae`, the denoiser and `noise_scheduler`.

    Attributes:
        train_text_encoder: Whether the CLIP text encoders get LoRA and gradients too.
        caption_dropout: Probability that a sample trains without its caption, on what the pipeline takes for none.
        prior_loss_weight: Weight of the class images (`is_class`) of DreamBooth's prior preservation (Ruiz et al. 2023,
            arXiv:2208.12242, equation 2).
        offload: Keep the VAE and frozen text encoders on the CPU, and on the denoiser's device only while they are
            used.
        step: What the latest `loss` drew.
    """

    _: KW_ONLY
    caption_dropout: float = 0.0
    prior_loss_weight: float = 1.0

    # Whether the denoiser can see an image beside the noise: `conditioning_latents` of the batch that `_predict` gets.
    CONDITIONED: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._uniform = UniformDraws()

    @abstractmethod
    def _add_noise(self, latents: Tensor, noise: Tensor, uniform: Tensor) -> NoisyLatents:
        """Noise the latents.

        Args:
            latents: (batch, channels, height, width) float32.
            noise: Of the same shape, standard normal.
            uniform: (batch,) float64 in [0, 1) on the CPU, from which the levels of noise follow.
        """

    @abstractmethod
    def _predict(
        self, latents: Tensor, timesteps: Tensor, embeds: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> Tensor:
        """The denoiser's prediction, of the latents' shape.

        Args:
            latents: Noisy, in the weight dtype.
            timesteps: (batch,).
            embeds: `EMBEDS`.
            batch: As `loss` got it.
        """

    def _noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """The noise of a training step."""
        return self._randn(shape, generator)

    def stratified_timesteps(self, num_samples: int, generator: torch.Generator) -> AbstractContextManager[None]:
        """Inside it, `loss` draws each of `num_samples` timesteps from its own quantile bin, in random order."""
        return self._uniform.stratified(num_samples, generator)

    @torch.no_grad()
    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the images' latents, scaled as the denoiser sees them.

        Args:
            pixel_values: (batch, 3, height, width) in [-1, 1].

        Returns:
            Two (batch, channels, height, width) float32 tensors in latent pixels, on the family's device.
        """
        with self._on_device(self.vae), torch.autocast(self.device.type, enabled=False):
            mean, std = self._posterior(pixel_values.to(self.device, self.vae.dtype))
        shift, factor = self._latent_shift_and_scale
        return (mean.float() - shift) * factor, std.float() * factor

    def _posterior(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's latents, as it makes them.

        Args:
            pixel_values: In the VAE's dtype and on its device.
        """
        posterior = cast(Any, self.vae).encode(pixel_values).latent_dist
        return posterior.mean, posterior.std

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        """The denoising loss of diffusers' examples: a scalar, float32.

        Args:
            batch: The captions, as `caption_inputs` or `embed_captions` gives them, and either `pixel_values`
                (batch, 3, height, width) in [-1, 1] or `latents` (batch, channels, height, width), already scaled.
                Optionally `is_class`, (batch,) boolean: the images of the class in DreamBooth's prior preservation; the
                loss is then the mean over the other images plus `prior_loss_weight` times the mean over these, each
                zero when the batch has none of them. `loss_mask`, (batch, 1, height, width) in [0, 1], of any
                resolution: how much each place of an image counts; a sample's loss is then the mean weighted by it, and
                zero where nothing counts. For a base that sees an image beside the noise, `conditioning_images` as
                `pixel_values`, or `conditioning_latents`, already scaled.
            generator: CPU generator from which the posterior sample, the noise, the timesteps and the caption dropout
                are drawn, in this order.

        Raises:
            ValueError: When the batch lacks one of its parts, or has one that the family does not take.
        """
        encoded = self._is_encoded(batch)
        batch = self._with_conditioning(batch)
        if "latents" in batch:
            latents = batch["latents"].to(self.device, torch.float32)
        else:
            mean, std = self.encode_images(batch["pixel_values"])
            latents = mean + std * self._randn(mean.shape, generator)
        noise = self._noise(latents.shape, generator)
        noisy = self._add_noise(latents, noise, self._uniform.draw(len(latents), generator))
        dropped = None
        if self.caption_dropout and not self.evaluates:
            dropped = (torch.rand(len(latents), generator=generator) < self.caption_dropout).to(self.device)

        self.step = StepRecord(timesteps=noisy.timesteps)
        embeds = self._look_up(batch, dropped) if encoded else self._encode_batch(batch, dropped)
        with self._autocast():
            prediction = self._predict(noisy.latents.to(self.weight_dtype), noisy.timesteps, embeds, batch).float()
        losses = F.mse_loss(prediction, noisy.target.float(), reduction="none")
        if "loss_mask" in batch:
            losses = losses * self._area_weights(batch["loss_mask"], losses)
        losses = losses.mean(dim=tuple(range(1, losses.ndim)))
        if noisy.weights is not None:
            losses = losses * noisy.weights
        if "is_class" not in batch:
            return losses.mean()
        return self._prior_preservation(losses, batch["is_class"].to(self.device, torch.bool))

    def _with_conditioning(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The batch with `conditioning_latents` on the device, where it has an image to see beside the noise.

        Raises:
            ValueError: When the family takes none.
        """
        given = next((name for name in ("conditioning_latents", "conditioning_images") if name in batch), None)
        if given is None:
            return batch
        if not self.CONDITIONED:
            raise ValueError(f"{self.NAME} sees no image beside the noise; leave {given} out of the batch")
        if given == "conditioning_images":
            latents = self.encode_images(batch[given])[0]  # the most likely ones, as the pipelines take them
        else:
            latents = batch[given].to(self.device, torch.float32)
        return {**batch, "conditioning_latents": latents.to(self.weight_dtype)}

    def _area_weights(self, mask: Tensor, losses: Tensor) -> Tensor:
        """Weights of the places of a sample's loss, of mean 1 wherever anything counts.

        Args:
            mask: `loss_mask`.
            losses: (batch, channels, ..., height, width).

        Raises:
            ValueError: When the mask is of another shape or number of samples, or on the CPU and not in [0, 1].
        """
        if mask.ndim != 4 or mask.shape[1] != 1 or len(mask) != len(losses):
            raise ValueError(
                f"loss_mask has the shape {tuple(mask.shape)}; for {len(losses)} samples it must be ({len(losses)}, 1, "
                "height, width)"
            )
        if mask.device.type == "cpu" and not 0 <= float(mask.min()) <= float(mask.max()) <= 1:  # no device waits for it
            raise ValueError(
                f"loss_mask has numbers from {float(mask.min()):g} to {float(mask.max()):g}; they must lie in [0, 1]"
            )
        weights = F.interpolate(mask.to(self.device, torch.float32), losses.shape[-2:], mode="area")
        weights = weights / weights.mean(dim=(1, 2, 3), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return weights.view(len(losses), *(1,) * (losses.ndim - 3), *losses.shape[-2:])

    def _is_encoded(self, batch: Mapping[str, Tensor]) -> bool:
        """Whether a batch holds embeddings instead of token ids.

        Raises:
            ValueError: When it lacks captions or images.
        """
        columns = self.caption_columns
        # no text encoder, no columns: ids are then of no use
        encoded, tokenized = (bool(names) and all(name in batch for name in names) for names in (self.EMBEDS, columns))
        if not (encoded or tokenized) or not ("latents" in batch or "pixel_values" in batch):
            captions = " or ".join(dict.fromkeys(" and ".join(names) for names in (columns, self.EMBEDS) if names))
            remedy = (
                " (the family has let its text encoders go, as under pre_compute_text_embeddings: pass the "
                "embeddings, or initialise the module with a loss_fn instead of the family)"
            )
            without = "" if columns else remedy
            raise ValueError(
                f"a batch needs {captions}, and pixel_values or latents, got {', '.join(batch) or 'nothing'}{without}"
            )
        return encoded

    def _prior_preservation(self, losses: Tensor, is_class: Tensor) -> Tensor:
        """The mean over the other images plus `prior_loss_weight` times that over the class images: a scalar.

        Args:
            losses: (batch,) of the samples.
            is_class: (batch,) boolean.
        """
        num_class = is_class.sum()
        # weights instead of selections: a batch may have one kind only, and nothing waits for the device
        instance_weight = 1.0 / (len(losses) - num_class).clamp(min=1)
        class_weight = self.prior_loss_weight / num_class.clamp(min=1)
        return (losses * torch.where(is_class, class_weight, instance_weight)).sum()

    def loss_weight(self, batch: Mapping[str, Tensor]) -> float:
        """The images of the batch, which the loss is the mean over.

        Under prior preservation it is a mean over each kind of images: batches of other proportions of the two than
        their neighbours' cannot be weighted by one number, and none is made here.
        """
        return float(len(batch["latents"] if "latents" in batch else batch["pixel_values"]))
