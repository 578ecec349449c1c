"""What the Stable Diffusion families share: a UNet that denoises the latents of a VAE under CLIP text embeddings.

The training step is that of diffusers' text-to-image and DreamBooth examples, for the three prediction types. A family
adds which text encoders it has, how they make the conditioning, and its pipeline: see `families/sd.py` and
`families/sdxl.py`.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from lorainit_diffusers.families.base import StepRecord, UniformDraws

if TYPE_CHECKING:
    from typing_extensions import Self

UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
# The script that trains each kind of pipeline, for the error that meets a base of the other family.
SCRIPTS = {
    "StableDiffusionPipeline": "train_sd_lora.py",
    "StableDiffusionXLPipeline": "train_sdxl_lora.py",
}


@dataclass
class LatentDiffusionFamily(ABC):
    """A base and its training loss. Its modules are taken as they are; `from_pretrained` freezes what it loads.

    Attributes:
        tokenizer: CLIP tokenizer; prompts are padded to its `model_max_length`.
        text_encoder: CLIP text model.
        vae: autoencoder, used in its own dtype and never trained.
        unet: the denoiser.
        noise_scheduler: gives `alphas_cumprod`, the number of timesteps and the prediction type.
        train_text_encoder: whether the text encoders get LoRA and gradients too.
        snr_gamma: gamma of min-SNR weighting (Hang et al. 2023, arXiv:2303.09556); None is the plain mean square.
        noise_offset: strength of a per-channel constant added to the noise (0 is off).
        caption_dropout: probability that a sample trains without its caption, on what the pipeline takes for none.
        clip_skip: last text encoder layers to leave out, as the pipelines count them; None is their default.
        prior_loss_weight: weight of the class images (`is_class`) of DreamBooth's prior preservation (Ruiz et al. 2023,
            arXiv:2208.12242, equation 2).
        offload: keep the VAE and frozen text encoders on the CPU, and on the UNet's device only while they are used.
        force_zeros_for_empty_prompt: whether the pipeline takes zeros for no caption instead of the encoded empty one.
        step: what the latest `loss` drew.
    """

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    noise_scheduler: DDPMScheduler
    _: KW_ONLY
    train_text_encoder: bool = False
    snr_gamma: float | None = None
    noise_offset: float = 0.0
    caption_dropout: float = 0.0
    clip_skip: int | None = None
    prior_loss_weight: float = 1.0
    offload: bool = False
    force_zeros_for_empty_prompt: bool = False
    step: StepRecord = field(default_factory=StepRecord)

    NAME: ClassVar[str]
    PIPELINE: ClassVar[type[DiffusionPipeline]]
    # Field name -> class of the text encoders; their tokenizers and token ids have the same suffix.
    TEXT_ENCODERS: ClassVar[Mapping[str, type[nn.Module]]]
    # Which hidden state of a text encoder conditions the UNet when no `clip_skip` moves it further to the front.
    HIDDEN_STATE: ClassVar[int]
    # Columns of a batch that stand for the captions once they are encoded.
    EMBEDS: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        check_prediction_type(str(self.noise_scheduler.config["prediction_type"]))
        if self.snr_gamma is not None and self.snr_gamma <= 0:
            raise ValueError(f"snr_gamma must be positive, got {self.snr_gamma}; leave it out for the plain loss")
        if not 0.0 <= self.caption_dropout <= 1.0:
            raise ValueError(f"caption_dropout is a probability, got {self.caption_dropout}")
        if self.prior_loss_weight < 0:
            raise ValueError(f"prior_loss_weight must not be negative, got {self.prior_loss_weight}")
        channels, latent_channels = self.unet.config["in_channels"], self.vae.config["latent_channels"]
        if channels != latent_channels:
            raise ValueError(
                f"the UNet takes {channels} channels but the VAE makes {latent_channels}: an inpainting or "
                "image-conditioned base is not supported, take a text-to-image one (and a VAE that fits it)"
            )
        if self.clip_skip is not None:
            for component in self.TEXT_ENCODERS:
                limit = self._num_layers(component) + self.HIDDEN_STATE
                if not 0 <= self.clip_skip <= limit:
                    raise ValueError(f"clip_skip {self.clip_skip} is not between 0 and {limit} for the {component}")
        self._uniform = UniformDraws()
        self._no_caption: dict[str, Tensor] | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        variant: str | None = None,
        vae_path: str | os.PathLike[str] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        weight_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        train_text_encoder: bool = False,
        snr_gamma: float | None = None,
        noise_offset: float = 0.0,
        caption_dropout: float = 0.0,
        prediction_type: str | None = None,
        clip_skip: int | None = None,
        prior_loss_weight: float = 1.0,
        offload: bool = False,
    ) -> Self:
        """Load a base from a local folder or a hub name, frozen; only safetensors weights are read.

        The noise schedule is a `DDPMScheduler` made from the base's scheduler configuration, as in diffusers' examples:
        what the base samples with (Euler for SDXL) is another discretisation of the same schedule.

        Args:
            path: folder in the diffusers layout, or the name of a hub repository.
            revision: hub revision of the base.
            variant: weight variant in the base's file names, such as `fp16`.
            vae_path: folder or hub name of another VAE to use with the base.
            cache_dir: where downloads are kept; Hugging Face's own place by default.
            weight_dtype: dtype of the UNet and the text encoders. The VAE is in float32 whatever it is: SDXL's
                overflows to black images in half precision.
            device: where the modules go; with `offload`, the VAE and frozen text encoders stay on the CPU.
            train_text_encoder: see the class, as for the remaining arguments.
            snr_gamma: see the class.
            noise_offset: see the class.
            caption_dropout: see the class.
            prediction_type: what the UNet predicts, when the base's scheduler configuration does not say it right.
            clip_skip: see the class.
            prior_loss_weight: see the class.
            offload: see the class.

        Raises:
            FileNotFoundError: when there is no such base or VAE, or it has no safetensors weights.
            ValueError: when the base is of another family, or an option is out of its range.
        """
        name = os.fspath(path)
        cls.check_base(name)
        if prediction_type is not None:
            check_prediction_type(prediction_type)
        source: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
        weights: dict[str, Any] = {**source, "use_safetensors": True, "variant": variant}
        with _named_errors("base model", name):
            index: dict[str, Any] = dict(cast(Any, cls.PIPELINE.load_config(name, **source)))
            check_pipeline_class(name, index, cls.PIPELINE.__name__)
            noise_scheduler = cast(DDPMScheduler, DDPMScheduler.from_pretrained(name, subfolder="scheduler", **source))
            parts: dict[str, Any] = {}
            for component, kind in cls.TEXT_ENCODERS.items():
                tokenizer = component.replace("text_encoder", "tokenizer")
                parts[tokenizer] = CLIPTokenizer.from_pretrained(name, subfolder=tokenizer, **source)
                # transformers has renamed `torch_dtype` to `dtype`; both are understood by the versions supported, so
                # the text encoders are loaded as they are and cast below.
                parts[component] = cast(Any, kind).from_pretrained(name, subfolder=component, **weights)
                parts[component].to(dtype=weight_dtype)
            unet = UNet2DConditionModel.from_pretrained(name, subfolder="unet", torch_dtype=weight_dtype, **weights)
        # revision and variant are the base's: another repository does not have them
        vae_source = (
            {**weights, "subfolder": "vae"} if vae_path is None else {**weights, "revision": None, "variant": None}
        )
        vae_name = name if vae_path is None else os.fspath(vae_path)
        with _named_errors("VAE", vae_name):
            vae = AutoencoderKL.from_pretrained(vae_name, torch_dtype=torch.float32, **vae_source)
        if prediction_type is not None:
            noise_scheduler.register_to_config(prediction_type=prediction_type)
        frozen = [unet, vae, *(parts[component] for component in cls.TEXT_ENCODERS)]
        for module in frozen:
            offloaded = offload and module is not unet and (module is vae or not train_text_encoder)
            cast(nn.Module, module).requires_grad_(False).eval().to("cpu" if offloaded else device)
        return cls(
            vae=vae,
            unet=unet,
            noise_scheduler=noise_scheduler,
            train_text_encoder=train_text_encoder,
            snr_gamma=snr_gamma,
            noise_offset=noise_offset,
            caption_dropout=caption_dropout,
            clip_skip=clip_skip,
            prior_loss_weight=prior_loss_weight,
            offload=offload,
            force_zeros_for_empty_prompt=bool(
                index.get("force_zeros_for_empty_prompt", cls.force_zeros_for_empty_prompt)
            ),
            **parts,
        )

    @classmethod
    def check_base(cls, name: str) -> None:
        """See that a base given as a local folder exists and holds a pipeline of this family.

        A name that can only be a hub repository is left to the loader.

        Raises:
            FileNotFoundError: when the folder is missing or is not in the diffusers layout.
            ValueError: when it holds another kind of pipeline.
        """
        folder = Path(name)
        if not folder.is_dir():
            if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1 or "\\" in name:
                raise FileNotFoundError(
                    f"base model {name!r} is not a folder; "
                    "give a folder in the diffusers layout or a hub name (owner/name)"
                )
            return
        index = folder / "model_index.json"
        if not index.is_file():
            raise FileNotFoundError(
                f"base model folder {name!r} has no model_index.json; "
                "convert single-file checkpoints to the diffusers layout"
            )
        check_pipeline_class(name, json.loads(index.read_text(encoding="utf-8")), cls.PIPELINE.__name__)

    # ---- what a family adds

    @abstractmethod
    def pipeline(self) -> DiffusionPipeline:
        """A pipeline around the live modules, for samples.

        Never call `.to(dtype=...)` on it: that would cast the adapters in training. It samples with DDIM on the base's
        own noise schedule: deterministic, and right for every prediction type and for zero-terminal-SNR schedules.
        """

    @abstractmethod
    def _encode(self, input_ids: Mapping[str, Tensor], unskipped: Tensor | None) -> dict[str, Tensor]:
        """Run the text encoders on token ids on their device: `EMBEDS` of the captions.

        Args:
            input_ids: the columns of `caption_inputs`.
            unskipped: (batch,) boolean, the samples that `clip_skip` is not applied to; None applies it to all.
        """

    def _layers_left_out(self, component: str) -> int:
        """How many of the last layers of a text encoder have no part in the conditioning."""
        return -1 - self.HIDDEN_STATE + (self.clip_skip or 0)

    def _unet_inputs(
        self, batch: Mapping[str, Tensor], latents: Tensor, embeds: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """The UNet's keyword arguments for this conditioning."""
        return {"encoder_hidden_states": embeds["prompt_embeds"]}

    # ---- what the scripts ask

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """The text encoders, by component name."""
        return {component: getattr(self, component) for component in self.TEXT_ENCODERS}

    @property
    def tokenizers(self) -> dict[str, CLIPTokenizer]:
        """The tokenizers, by the column of a batch that holds their token ids."""
        names = [component.removeprefix("text_encoder") for component in self.TEXT_ENCODERS]
        return {f"input_ids{suffix}": getattr(self, f"tokenizer{suffix}") for suffix in names}

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The UNet, the VAE and the text encoders, by component name."""
        return {"unet": self.unet, "vae": self.vae, **self.text_encoders}

    @property
    def adapted(self) -> Mapping[str, nn.Module]:
        """The UNet, and the text encoders when they are trained."""
        return {"unet": self.unet, **(self.text_encoders if self.train_text_encoder else {})}

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype of the UNet's frozen weights."""
        return self.unet.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the UNet."""
        return self.unet.conv_in.weight.device

    @property
    def resolution(self) -> int:
        """The image side in pixels that the UNet was trained at."""
        sample_size = self.unet.config["sample_size"]
        side = sample_size if isinstance(sample_size, int) else min(sample_size)
        return side * self.resolution_multiple

    @property
    def resolution_multiple(self) -> int:
        """Pixels per latent: image sides must be a multiple of it."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    def default_targets(self, component: str) -> list[str]:
        """Attention projections: `to_q to_k to_v to_out.0` (UNet), `q_proj k_proj v_proj out_proj` (text encoders).

        A text encoder whose last layers have no part in the conditioning (`clip_skip`, and SDXL's first one) is
        adapted in the other layers only: the rest would get no gradient.

        Raises:
            ValueError: for a component that this family does not adapt.
        """
        if component == "unet":
            return list(UNET_TARGETS)
        if component not in self.TEXT_ENCODERS:
            known = " and ".join(["unet", *self.TEXT_ENCODERS])
            raise ValueError(f"{self.NAME} has no component {component!r}; it has {known}")
        left_out = self._layers_left_out(component)
        if left_out == 0:
            return list(TEXT_ENCODER_TARGETS)
        layers = range(self._num_layers(component) - left_out)
        return [f"layers.{layer}.self_attn.{target}" for layer in layers for target in TEXT_ENCODER_TARGETS]

    def stratified_timesteps(self, num_samples: int, generator: torch.Generator) -> AbstractContextManager[None]:
        """Inside it, `loss` draws each of `num_samples` timesteps from its own quantile bin, in random order."""
        return self._uniform.stratified(num_samples, generator)

    def caption_inputs(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The columns of a batch that hold the captions: token ids (captions, tokens) for each text encoder.

        They are padded and cut to the tokenizer's length, as the pipeline does.
        """
        return {
            column: cast(
                Tensor,
                tokenizer(
                    list(captions),
                    padding="max_length",
                    truncation=True,
                    max_length=tokenizer.model_max_length,
                    return_tensors="pt",
                )["input_ids"],
            )
            for column, tokenizer in self.tokenizers.items()
        }

    @torch.no_grad()
    def embed_captions(self, captions: Sequence[str], batch_size: int = 16) -> dict[str, Tensor]:
        """Encode captions once: columns that stand in a batch instead of `caption_inputs`.

        Args:
            captions: the captions.
            batch_size: how many are encoded at once.

        Returns:
            `EMBEDS` of all captions, on the CPU in the weight dtype: `prompt_embeds` (captions, tokens, width), and in
            SDXL `pooled_prompt_embeds` (captions, width).

        Raises:
            ValueError: when the text encoders are trained: the embeddings would be those of the untrained ones.
        """
        if self.train_text_encoder:
            raise ValueError(
                "captions cannot be encoded once while the text encoder is trained: leave out train_text_encoder or "
                "pre_compute_text_embeddings"
            )
        chunks: list[dict[str, Tensor]] = []
        with self._on_device(*self.text_encoders.values()), self._autocast():
            for start in range(0, len(captions), batch_size):
                input_ids = self._to_device(self.caption_inputs(captions[start : start + batch_size]))
                chunks.append(self._encode(input_ids, None))
        return {name: torch.cat([chunk[name].to("cpu", self.weight_dtype) for chunk in chunks]) for name in self.EMBEDS}

    @torch.no_grad()
    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the images' latents, scaled as the UNet sees them.

        Args:
            pixel_values: (batch, 3, height, width) in [-1, 1].

        Returns:
            Two (batch, channels, height / 8, width / 8) float32 tensors on the family's device.
        """
        with self._on_device(self.vae), torch.autocast(self.device.type, enabled=False):
            posterior = self.vae.encode(pixel_values.to(self.device, self.vae.dtype)).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
        factor = float(self.vae.config["scaling_factor"])
        return posterior.mean.float() * factor, posterior.std.float() * factor

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        """The denoising loss of diffusers' examples: a scalar, float32.

        Args:
            batch: the captions, as `caption_inputs` or `embed_captions` gives them, and either `pixel_values`
                (batch, 3, height, width) in [-1, 1] or `latents` (batch, channels, height / 8, width / 8), already
                scaled. Optionally `is_class`, (batch,) boolean: the images of the class in DreamBooth's prior
                preservation; the loss is then the mean over the other images plus `prior_loss_weight` times the mean
                over these, each zero when the batch has none of them.
            generator: CPU generator from which the posterior sample, the noise, the timesteps and the caption dropout
                are drawn, in this order.

        Raises:
            ValueError: when the batch lacks one of its parts.
        """
        encoded, tokenized = (all(name in batch for name in names) for names in (self.EMBEDS, self.tokenizers))
        if not (encoded or tokenized) or not ("latents" in batch or "pixel_values" in batch):
            raise ValueError(
                f"a batch needs {' and '.join(self.tokenizers)} or {' and '.join(self.EMBEDS)}, and pixel_values or "
                f"latents, got {', '.join(batch) or 'nothing'}"
            )
        scheduler = self.noise_scheduler
        if "latents" in batch:
            latents = batch["latents"].to(self.device, torch.float32)
        else:
            mean, std = self.encode_images(batch["pixel_values"])
            latents = mean + std * self._randn(mean.shape, generator)
        noise = self._randn(latents.shape, generator)
        if self.noise_offset:
            noise = noise + self.noise_offset * self._randn((*latents.shape[:2], 1, 1), generator)
        num_timesteps = int(scheduler.config["num_train_timesteps"])
        timesteps = (self._uniform.draw(len(latents), generator) * num_timesteps).long().to(self.device)
        noisy_latents = scheduler.add_noise(latents, noise, cast(torch.IntTensor, timesteps))
        dropped = None
        if self.caption_dropout:
            dropped = (torch.rand(len(latents), generator=generator) < self.caption_dropout).to(self.device)

        self.step = StepRecord(timesteps=timesteps)
        dtype = self.weight_dtype
        if encoded:
            embeds = self._look_up(batch, dropped)
        else:
            embeds = self._encode_batch(batch, dropped)
        with self._autocast():
            inputs = self._unet_inputs(batch, latents, embeds)
            prediction = self.unet(noisy_latents.to(dtype), timesteps, return_dict=False, **inputs)[0].float()

        prediction_type = scheduler.config["prediction_type"]
        if prediction_type == "epsilon":
            target = noise
        elif prediction_type == "v_prediction":
            target = scheduler.get_velocity(latents, noise, cast(torch.IntTensor, timesteps))
        else:
            target = latents
        losses = F.mse_loss(prediction, target.float(), reduction="none").mean(dim=(1, 2, 3))
        if self.snr_gamma is not None:
            losses = losses * self._min_snr_weights(timesteps, self.snr_gamma)
        if "is_class" not in batch:
            return losses.mean()
        is_class = batch["is_class"].to(self.device, torch.bool)
        num_class = is_class.sum()
        # weights instead of selections: a batch may have one kind only, and nothing waits for the device
        instance_weight = 1.0 / (len(losses) - num_class).clamp(min=1)
        class_weight = self.prior_loss_weight / num_class.clamp(min=1)
        return (losses * torch.where(is_class, class_weight, instance_weight)).sum()

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
        included, and the latents are decoded in the VAE's dtype, whatever that of the UNet is.

        Args:
            prompts: the prompts.
            seeds: one seed for each.
            resolution: side of the images in pixels; the base's own by default.
            num_inference_steps: DDIM steps.
            guidance_scale: classifier-free guidance.
        """
        embeds: dict[str, Tensor] = {}
        with self._on_device(*self.text_encoders.values()):
            # not by the pipeline: that would run offloaded encoders where they are, and its `clip_skip` needs a
            # `text_model` that transformers 5 has taken out of CLIPTextModel
            encoded = self._encode(self._to_device(self.caption_inputs(prompts)), None)
            no_caption = self._encode_no_caption(len(prompts))
        for name in self.EMBEDS:
            embeds[name] = encoded[name].to(self.weight_dtype)
            embeds[f"negative_{name}"] = no_caption[name].to(self.weight_dtype)
        pipeline: Any = self.pipeline()
        for component in self.TEXT_ENCODERS:
            setattr(pipeline, component, None)
        side = resolution or self.resolution
        with self._on_device(self.vae):
            latents = pipeline(
                **embeds,
                height=side,
                width=side,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="latent",
            ).images
            latents = latents.to(self.vae.dtype) / float(self.vae.config["scaling_factor"])
            decoded = cast(Tensor, self.vae.decode(latents, return_dict=False)[0]).float()
        pixels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(image) for image in pixels]

    # ---- captions

    def _encode_batch(self, batch: Mapping[str, Tensor], dropped: Tensor | None) -> dict[str, Tensor]:
        """The conditioning from token ids; records which tokens are padding."""
        input_ids = self._to_device({column: batch[column] for column in self.tokenizers})
        if dropped is not None and not self.force_zeros_for_empty_prompt:
            empty = self._to_device(self.caption_inputs([""]))
            input_ids = {column: torch.where(dropped[:, None], empty[column], ids) for column, ids in input_ids.items()}
        for component, column in zip(self.TEXT_ENCODERS, input_ids, strict=True):
            end_token_id = cast(int, self.tokenizers[column].eos_token_id)
            self.step.token_masks[component] = token_mask(input_ids[column], end_token_id)
        trained = torch.is_grad_enabled() and self.train_text_encoder
        with self._on_device(*self.text_encoders.values()), self._autocast(), torch.set_grad_enabled(trained):
            embeds = self._encode(input_ids, dropped)
        embeds = {name: values.to(self.weight_dtype) for name, values in embeds.items()}
        if dropped is not None and self.force_zeros_for_empty_prompt:
            zero = {name: torch.zeros_like(values[:1]) for name, values in embeds.items()}
            return _replace(embeds, dropped, zero)
        return embeds

    def _look_up(self, batch: Mapping[str, Tensor], dropped: Tensor | None) -> dict[str, Tensor]:
        """The conditioning from `embed_captions`."""
        embeds = {name: batch[name].to(self.device, self.weight_dtype) for name in self.EMBEDS}
        if dropped is None:
            return embeds
        if self._no_caption is None:
            with torch.no_grad(), self._on_device(*self.text_encoders.values()), self._autocast():
                no_caption = self._encode_no_caption(1)
            self._no_caption = {name: values.to(self.weight_dtype) for name, values in no_caption.items()}
        return _replace(embeds, dropped, self._no_caption)

    def _encode_no_caption(self, count: int) -> dict[str, Tensor]:
        """What the pipeline takes for no caption: the empty one, without `clip_skip`, or zeros."""
        input_ids = self._to_device(self.caption_inputs([""] * count))
        embeds = self._encode(input_ids, torch.ones(count, dtype=torch.bool, device=self.device))
        if self.force_zeros_for_empty_prompt:
            return {name: torch.zeros_like(values) for name, values in embeds.items()}
        return embeds

    def _num_layers(self, component: str) -> int:
        return int(cast(Any, self.text_encoders[component]).config.num_hidden_layers)

    # ---- small parts

    def _ddim_scheduler(self) -> Any:
        # `clip_sample` is for pixels; a configuration without it (Euler's has none) would get DDIM's default, True
        return DDIMScheduler.from_config(self.noise_scheduler.config, clip_sample=False)

    @contextmanager
    def _on_device(self, *modules: nn.Module) -> Generator[None, None, None]:
        """Hold the offloaded ones of these modules on the UNet's device inside the block."""
        adapted = [id(module) for module in self.adapted.values()]
        moved = [module for module in modules if self.offload and id(module) not in adapted]
        try:
            for module in moved:
                module.to(self.device)
            yield
        finally:
            for module in moved:
                module.to("cpu")

    def _autocast(self) -> torch.autocast:
        dtype = self.weight_dtype
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype in (torch.float16, torch.bfloat16))

    def _to_device(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: values.to(self.device) for name, values in columns.items()}

    def _randn(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return torch.randn(tuple(shape), generator=generator).to(self.device)

    def _min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Min-SNR weights: min(snr, gamma) for the clean sample, divided by snr (epsilon) or snr + 1 (v)."""
        alphas_cumprod = self.noise_scheduler.alphas_cumprod.to(self.device)[timesteps].float()
        snr = alphas_cumprod / (1.0 - alphas_cumprod)
        prediction_type = self.noise_scheduler.config["prediction_type"]
        if prediction_type == "epsilon":
            return (gamma / snr).clamp(max=1.0)
        if prediction_type == "v_prediction":
            return snr.clamp(max=gamma) / (snr + 1.0)
        return snr.clamp(max=gamma)


def token_mask(input_ids: Tensor, end_token_id: int) -> Tensor:
    """Which tokens are not padding: boolean (batch, tokens), True up to and including the first end token.

    CLIP pads with its end token, so the padding cannot be told from the ids alone.
    """
    is_end = torch.eq(input_ids, end_token_id)
    return is_end.cumsum(dim=1) - is_end.long() == 0


def check_prediction_type(prediction_type: str) -> None:
    """See that the loss knows this prediction type.

    Raises:
        ValueError: when it does not.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction type {prediction_type!r} is not one of {', '.join(PREDICTION_TYPES)}")


def check_pipeline_class(name: str, index: Mapping[str, Any], pipeline_class: str) -> None:
    """See that `model_index.json` names this class and a scheduler of the DDPM kind.

    Raises:
        ValueError: when it names another class (the message says which script is for it) or another kind of noise.
    """
    found = str(index.get("_class_name"))
    if found != pipeline_class:
        remedy = f"use {SCRIPTS[found]} for it" if found in SCRIPTS else f"this family takes a {pipeline_class}"
        raise ValueError(f"base model {name!r} is a {found}, not a {pipeline_class}; {remedy}")
    scheduler = str((index.get("scheduler") or ("", ""))[1])
    if scheduler.startswith(("EDM", "FlowMatch")):
        raise ValueError(
            f"base model {name!r} samples with {scheduler}: its training noise is not that of a DDPM, which the loss "
            "here is for; take a base with an epsilon, v-prediction or sample objective"
        )


def _replace(embeds: Mapping[str, Tensor], dropped: Tensor, other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`other`, (1, ...), in the samples of the (batch,) mask `dropped`, and `embeds` in the others."""
    return {
        name: torch.where(dropped.view(-1, *(1,) * (values.ndim - 1)), other[name], values)
        for name, values in embeds.items()
    }


@contextmanager
def _named_errors(what: str, name: str) -> Generator[None, None, None]:
    """Turn the loaders' errors into one line that names what was loaded."""
    try:
        yield
    except OSError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"cannot load the {what} {name!r}: {reason} (give a folder in the diffusers layout with safetensors "
            "weights, or a hub name)"
        ) from error
