"""Images drawn by a text-to-image base, with the weights as they are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from lorainit_diffusers.families.captions import CaptionEncoding


@dataclass
class Sampling(CaptionEncoding):
    """How images are drawn: the third of the four steps of `TextToImageFamily`.

    A family gives its `pipeline`, and where it differs what the pipeline is called with (`_sampling_inputs`) and how
    its latents are laid out (`_sampled_latents`).
    """

    @abstractmethod
    def pipeline(self) -> DiffusionPipeline:
        """A pipeline around the live modules, for samples.

        Never call `.to(dtype=...)` on it: that would cast the adapters in training.
        """

    def example_prompt(self, prompt: str | None) -> str:
        """Source code of the pipeline's first argument, for model cards."""
        return repr(prompt or "a prompt in the style of the captions")

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        resolution: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 7.5,
    ) -> list[Image.Image]:
        """Draw one image a prompt, each from its own seed, with the weights as they are now.

        Puts no module into evaluation mode: the caller does. The prompts are encoded as `loss` does it, `clip_skip`
        included, and the latents are decoded in the VAE's dtype, whatever that of the denoiser is.

        Args:
            prompts: The prompts.
            seeds: One seed for each.
            resolution: Side of the images in pixels; the base's own by default.
            num_inference_steps: Steps of the sampler.
            guidance_scale: Classifier-free guidance, or the guidance that the denoiser takes as an input (Flux).

        Raises:
            ValueError: For a prompt that was not kept when the text encoders were let go.
        """
        embeds, no_caption = self._embed_prompts(prompts)
        pipeline: Any = self.pipeline()
        for component in self.TEXT_ENCODERS:  # not by the pipeline: that would run offloaded encoders where they are
            setattr(pipeline, component, None)
        side = resolution or self.resolution
        with self._on_device(self.vae):
            output = pipeline(
                **self._sampling_inputs(embeds, no_caption, guidance_scale),
                **self._size_inputs(side),
                num_inference_steps=num_inference_steps,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="latent",
                return_dict=False,
            )[0]
            return self._decode(self._sampled_latents(output, side, side))

    def _size_inputs(self, side: int) -> dict[str, int]:
        """The pipeline's keyword arguments for square images of this side in pixels."""
        return {"height": side, "width": side}

    def _sampling_inputs(
        self, embeds: Mapping[str, Tensor], no_caption: Mapping[str, Tensor], guidance_scale: float
    ) -> dict[str, Any]:
        """The pipeline's keyword arguments for this conditioning."""
        negative = {f"negative_{name}": values for name, values in no_caption.items()}
        return {**embeds, **negative, "guidance_scale": guidance_scale}

    def _sampled_latents(self, output: Tensor, height: int, width: int) -> Tensor:
        """(batch, channels, height, width) of what the pipeline calls latents; `height` and `width` in pixels."""
        return output

    def _decode(self, latents: Tensor) -> list[Image.Image]:
        """Images of scaled latents, in the VAE's dtype."""
        shift, factor = self._latent_shift_and_scale
        decoded = self._decoded(latents.to(self.vae.dtype) / factor + shift)
        pixels = (decoded.float() / 2 + 0.5).clamp(0, 1) * 255
        arrays = pixels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(image) for image in arrays]

    def _decoded(self, latents: Tensor) -> Tensor:
        """(batch, 3, height, width) in [-1, 1] of the VAE's own latents."""
        return cast(Any, self.vae).decode(latents, return_dict=False)[0]
