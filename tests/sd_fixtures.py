"""What script and family tests write to disk: random Stable Diffusion (XL) bases and captioned images.

A plain module, not a conftest: several of those exist, and importing from one by name takes whichever came first.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

ROOT = Path(__file__).resolve().parent.parent


TOKENS = [chr(code) for code in range(33, 127)]
VOCABULARY = [*TOKENS, *(token + "</w>" for token in TOKENS), "<|startoftext|>", "<|endoftext|>"]


def write_random_sd(folder: Path, prediction_type: str = "epsilon") -> None:
    """Write a random Stable Diffusion pipeline in the diffusers layout."""
    write_tokenizer(folder / "tokenizer")
    CLIPTextModel(text_config(hidden_size=16, num_hidden_layers=2)).save_pretrained(folder / "text_encoder")
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    unet.save_pretrained(folder / "unet")
    write_random_vae(folder / "vae")
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    scheduler.save_pretrained(folder / "scheduler")
    parts = {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    index = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False, **parts}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def write_random_sdxl(folder: Path, prediction_type: str = "epsilon", force_zeros: bool = True) -> None:
    """Write a random Stable Diffusion XL pipeline in the diffusers layout.

    As in the published base, the second tokenizer pads with another token than the first, and the scheduler is Euler's.
    """
    write_tokenizer(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer_2", pad_token="!")
    CLIPTextModel(text_config(hidden_size=16, num_hidden_layers=3)).save_pretrained(folder / "text_encoder")
    second_config = text_config(hidden_size=24, num_hidden_layers=4, projection_dim=12)
    CLIPTextModelWithProjection(second_config).save_pretrained(folder / "text_encoder_2")
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        layers_per_block=1,
        cross_attention_dim=16 + 24,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=12 + 6 * 8,
        norm_num_groups=8,
    )
    unet.save_pretrained(folder / "unet")
    write_random_vae(folder / "vae")
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
        prediction_type=prediction_type,
    )
    scheduler.save_pretrained(folder / "scheduler")
    parts = {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    }
    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": force_zeros, **parts}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def write_random_vae(folder: Path, latent_channels: int = 4, **config: float) -> None:
    """Write a random autoencoder: 4 pixels a latent; `config` has its scaling and shift."""
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=32,
        **config,
    )
    vae.save_pretrained(folder)


def write_tokenizer(folder: Path, pad_token: str = "<|endoftext|>") -> None:
    """Write a CLIP tokenizer of single characters, 12 tokens long."""
    folder.mkdir(parents=True)
    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 12, "pad_token": pad_token}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    CLIPTokenizer.from_pretrained(str(folder))


def text_config(hidden_size: int, num_hidden_layers: int, projection_dim: int = 512) -> CLIPTextConfig:
    """Configuration of a CLIP text encoder for it."""
    return CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=projection_dim,
        bos_token_id=len(VOCABULARY) - 2,
        eos_token_id=len(VOCABULARY) - 1,
        pad_token_id=len(VOCABULARY) - 1,
    )


def write_images(folder: Path, count: int = 4, size: tuple[int, int] = (48, 32), seed: int = 0) -> Path:
    """Write `count` captioned PNGs in the imagefolder layout; they are not square, so that crops matter."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lines: list[str] = []
    for index in range(count):
        pixels = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(folder / f"{index:02d}.png")
        lines.append(json.dumps({"file_name": f"{index:02d}.png", "text": f"picture {index}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
