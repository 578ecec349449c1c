"""The options of the recipes of the bundled models and sample sets; read before torch is imported.

A training of a recipe ends at the first of its two limits, minutes and steps; a limit of 0 is none.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from lorainit_diffusers.ranges import COUNT, COUNT_OR_NONE, FINITE, NOT_NEGATIVE, POSITIVE, SEED, SHARE_BELOW_ONE
from lorainit_diffusers.training.bundled import ROOT
from lorainit_diffusers.training.options.fields import Options, option
from lorainit_diffusers.training.ranges import SIDE

# archives of the npm packages that the pictures come from
DEFAULT_CACHE = Path.home() / ".cache" / "lorainit-diffusers"
MODELS = ROOT / "assets" / "models"
AVERAGE_DECAY = replace(SHARE_BELOW_ONE, remedy="such as 0.999")
_REQUIRED: Any = dataclasses.MISSING
PHASES = ("data", "export")
SD_PHASES = ("data", "vae", "unet", "decoder", "export")
DIT_PHASES = ("data", "transformer", "export")
VIT_PHASES = ("data", "vit", "export")
VLM_PHASES = ("data", "vlm", "export")
CLIP_PHASES = ("data", "train", "export")
ALL_PHASES = "what to run (default: all)"


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(Options):
    """What all recipes of a model take; a recipe declares anew what it has another default of."""

    work_dir: Path = option(_REQUIRED, "pictures, checkpoints, logs and samples; needed")
    output_dir: Path = option(_REQUIRED, "where the model is written; needed")
    cache_dir: Path = option(DEFAULT_CACHE, "archives of the npm packages")
    phases: list[str] = option([*PHASES], ALL_PHASES, choices=PHASES)
    ema_decay: Annotated[float, AVERAGE_DECAY] = option(0.998, "of the averaged weights (default 0.998)")
    checkpoint_s: Annotated[float, NOT_NEGATIVE] = option(120.0, "seconds between checkpoints (default 120)")
    no_bf16: bool = option(False, "train in full precision, without bfloat16")
    seed: Annotated[int, SEED] = option(0, "seed of every random draw (default 0)")

    @property
    def bf16(self) -> bool:
        """Whether to train in bfloat16."""
        return not self.no_bf16


@dataclass(frozen=True, kw_only=True)
class TinySdOptions(RecipeOptions):
    """What the recipe of the tiny Stable Diffusion takes."""

    _argument_group_name = "recipe"

    phases: list[str] = option([*SD_PHASES], ALL_PHASES, choices=SD_PHASES)
    vae_minutes: Annotated[float, NOT_NEGATIVE] = option(27.0, "of the autoencoder's training (default 27)")
    vae_steps: Annotated[int, COUNT_OR_NONE] = option(0, "of the autoencoder's training (default: no limit)")
    vae_batch_size: Annotated[int, COUNT] = option(16, "pictures of one process (default 16)")
    vae_lr: Annotated[float, POSITIVE] = option(2e-3, "first learning rate of the autoencoder (default 2e-3)")
    kl_weight: Annotated[float, NOT_NEGATIVE] = option(1e-3, "of the autoencoder's KL term (default 1e-3)")
    unet_minutes: Annotated[float, NOT_NEGATIVE] = option(72.0, "of U-Net and text encoder (default 72)")
    unet_steps: Annotated[int, COUNT_OR_NONE] = option(0, "of U-Net and text encoder (default: no limit)")
    unet_batch_size: Annotated[int, COUNT] = option(32, "pictures of one process (default 32)")
    unet_lr: Annotated[float, POSITIVE] = option(8e-4, "first learning rate of U-Net and text encoder (default 8e-4)")
    decoder_minutes: Annotated[float, NOT_NEGATIVE] = option(6.0, "of the decoder's second training (default 6)")
    decoder_steps: Annotated[int, COUNT_OR_NONE] = option(0, "of the decoder's second training (default: no limit)")
    decoder_lr: Annotated[float, POSITIVE] = option(1e-3, "first learning rate of the decoder (default 1e-3)")
    num_line_icons: Annotated[int, COUNT_OR_NONE] = option(1500, "of each line icon package (default 1500)")
    checkpoint_s: Annotated[float, NOT_NEGATIVE] = option(300.0, "seconds between checkpoints (default 300)")
    sample_steps: Annotated[int, COUNT] = option(25, "denoising steps of the sample grids (default 25)")


@dataclass(frozen=True, kw_only=True)
class TinyDitOptions(RecipeOptions):
    """What the recipe of the tiny diffusion transformer takes."""

    _argument_group_name = "recipe"

    phases: list[str] = option([*DIT_PHASES], ALL_PHASES, choices=DIT_PHASES)
    base: Path = option(MODELS / "tiny-sd", "gives autoencoder, tokenizer and first text encoder")
    transformer_minutes: Annotated[float, NOT_NEGATIVE] = option(75.0, "of the training (default 75)")
    transformer_steps: Annotated[int, COUNT_OR_NONE] = option(0, "of the training (default: no limit)")
    transformer_batch_size: Annotated[int, COUNT] = option(32, "pictures of one process (default 32)")
    transformer_lr: Annotated[float, POSITIVE] = option(1e-3, "first learning rate (default 1e-3)")
    logit_mean: Annotated[float, FINITE] = option(0.0, "of the noise levels (default 0)")
    logit_std: Annotated[float, POSITIVE] = option(1.2, "of the noise levels (default 1.2)")
    checkpoint_s: Annotated[float, NOT_NEGATIVE] = option(300.0, "seconds between checkpoints (default 300)")
    sample_steps: Annotated[int, COUNT] = option(25, "denoising steps of the sample grids (default 25)")


@dataclass(frozen=True, kw_only=True)
class TaskRecipeOptions(RecipeOptions):
    """What the recipes of models that answer take, which have one training and say in the card when it was."""

    batch_size: Annotated[int, COUNT] = option(64, "pictures of one process (default 64)")
    lr: Annotated[float, POSITIVE] = option(1e-3, "first learning rate (default 1e-3)")
    hardware: str | None = option(None, "for the model card (default: what this machine has)")
    date: str = option(time.strftime("%Y-%m-%d"), "for the model card (default: today)")


@dataclass(frozen=True, kw_only=True)
class TinyVitOptions(TaskRecipeOptions):
    """What the recipe of the tiny classifier takes."""

    _argument_group_name = "recipe"

    phases: list[str] = option([*VIT_PHASES], ALL_PHASES, choices=VIT_PHASES)
    vit_minutes: Annotated[float, NOT_NEGATIVE] = option(44.0, "of the training (default 44)")
    vit_steps: Annotated[int, COUNT_OR_NONE] = option(0, "of the training (default: no limit)")


@dataclass(frozen=True, kw_only=True)
class TinyVlmOptions(TaskRecipeOptions):
    """What the recipe of the tiny vision-language model takes."""

    _argument_group_name = "recipe"

    phases: list[str] = option([*VLM_PHASES], ALL_PHASES, choices=VLM_PHASES)
    vlm_minutes: Annotated[float, NOT_NEGATIVE] = option(22.0, "of the training (default 22)")
    vlm_steps: Annotated[int, COUNT_OR_NONE] = option(0, "of the training (default: no limit)")
    batch_size: Annotated[int, COUNT] = option(32, "pictures of one process (default 32)")
    clip_dir: Path = option(MODELS / "tiny-clip", "gives the tower")
    vocab_size: Annotated[int, COUNT] = option(1200, "tokens of the tokenizer (default 1200)")


@dataclass(frozen=True, kw_only=True)
class TinyClipOptions(TaskRecipeOptions):
    """What the recipe of the tiny CLIP takes."""

    _argument_group_name = "recipe"

    phases: list[str] = option([*CLIP_PHASES], ALL_PHASES, choices=CLIP_PHASES)
    data_dir: Path = option(ROOT / "assets" / "data", "names the held-out concepts")
    tokenizer_dir: Path = option(MODELS / "tiny-sd" / "tokenizer", "copied")
    minutes: Annotated[float, NOT_NEGATIVE] = option(27.0, "of the training (default 27)")
    steps: Annotated[int, COUNT_OR_NONE] = option(0, "of the training (default: no limit)")
    batch_size: Annotated[int, COUNT] = option(64, "concepts; there are two pictures of each (default 64)")
    lr: Annotated[float, POSITIVE] = option(1.5e-3, "of embeddings, projections, norms and biases (default 1.5e-3)")
    matrix_lr: Annotated[float, POSITIVE] = option(3e-3, "of the matrices inside the transformers (default 3e-3)")
    weight_decay: Annotated[float, NOT_NEGATIVE] = option(0.1, "of these matrices (default 0.1)")
    pair_weight: Annotated[float, NOT_NEGATIVE] = option(1.0, "of the image-image loss (default 1)")
    text_weight: Annotated[float, NOT_NEGATIVE] = option(0.25, "of the name-description loss (default 0.25)")
    patch_dropout: Annotated[float, SHARE_BELOW_ONE] = option(
        0.5, "share of patches left out, but for the end (default 0.5)"
    )
    ema_decay: Annotated[float, AVERAGE_DECAY] = option(0.99, "of the averaged weights (default 0.99)")


@dataclass(frozen=True, kw_only=True)
class SampleDataOptions(Options):
    """What the builder of the sample sets takes."""

    _argument_group_name = "sample sets"

    output_dir: Path = option(_REQUIRED, "a directory of its own; needed")
    overwrite_output_dir: bool = option(False, "replace the sets in it")
    cache_dir: Path = option(DEFAULT_CACHE, "archives of the npm packages")
    size: Annotated[int, SIDE] = option(128, "pixels, of the sets to draw (default 128)")
    task_size: Annotated[int, SIDE] = option(64, "pixels, of classes and questions (default 64)")
