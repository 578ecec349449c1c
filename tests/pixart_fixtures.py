"""What tests of PixArt and DiT write to disk: random bases in the diffusers layout."""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import DDIMScheduler, DiTTransformer2DModel, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from dit_fixtures import T5_WIDTH, write_index, write_t5
from sd_fixtures import write_random_vae

ID2LABEL = {"0": "tench, Tinca tinca", "1": "crane", "2": "tabby, tabby cat", "3": "crane", "10": "Cardigan, corgi"}


def random_pixart_transformer(**config: int | bool) -> PixArtTransformer2DModel:
    """Two blocks with self- and cross-attention, 4x4 image tokens by default, and a variance beside the noise."""
    return PixArtTransformer2DModel(
        **{  # type: ignore[arg-type]
            "sample_size": 8,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": T5_WIDTH,
            "in_channels": 4,
            "out_channels": 8,
            **config,
        }
    )


def random_dit_transformer(**config: int) -> DiTTransformer2DModel:
    """Two blocks, 4x4 image tokens, and a variance beside the noise."""
    return DiTTransformer2DModel(
        **{  # type: ignore[arg-type]
            "sample_size": 8,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 8,
            **config,
        }
    )


def write_random_pixart(folder: Path, pipeline: str = "PixArtAlphaPipeline", **config: int | bool) -> None:
    """Write a random PixArt pipeline; as in the published bases, its scheduler is DPM-Solver's."""
    write_t5(folder / "text_encoder", folder / "tokenizer")
    random_pixart_transformer(**config).save_pretrained(folder / "transformer")
    write_random_vae(folder / "vae", scaling_factor=0.7)
    DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02).save_pretrained(folder / "scheduler")
    write_index(
        folder,
        pipeline,
        text_encoder=("transformers", "T5EncoderModel"),
        tokenizer=("transformers", "PreTrainedTokenizerFast"),
        transformer=("diffusers", "PixArtTransformer2DModel"),
        vae=("diffusers", "AutoencoderKL"),
        scheduler=("diffusers", "DPMSolverMultistepScheduler"),
    )


def write_random_dit(folder: Path, **config: int) -> None:
    """Write a random DiT pipeline with names for some of its 1000 classes."""
    random_dit_transformer(**config).save_pretrained(folder / "transformer")
    write_random_vae(folder / "vae", scaling_factor=0.7)
    DDIMScheduler(beta_start=0.0001, beta_end=0.02, clip_sample=False).save_pretrained(folder / "scheduler")
    write_index(
        folder,
        "DiTPipeline",
        transformer=("diffusers", "DiTTransformer2DModel"),
        vae=("diffusers", "AutoencoderKL"),
        scheduler=("diffusers", "DDIMScheduler"),
    )
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text("utf-8")), "id2label": ID2LABEL}), encoding="utf-8")
