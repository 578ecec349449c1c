"""What tests of Z-Image write to disk: a random base, with Qwen 3 and the letter tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from chat_fixtures import TEXT_WIDTH, write_chat_tokenizer, write_qwen3
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from dit_fixtures import write_index
from sd_fixtures import write_random_vae


def write_random_z_image(folder: Path, causal: bool = False, **schedule: Any) -> None:
    """Write a random Z-Image pipeline in the diffusers layout: 4 pixels a latent, 8 a token.

    Args:
        folder: where to.
        causal: whether the text encoder has a head for words.
        schedule: of the scheduler; a fixed shift by default, as the published bases have it.
    """
    write_chat_tokenizer(folder / "tokenizer")
    write_qwen3(folder / "text_encoder", num_layers=3, causal=causal)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[4, 4, 4],
        axes_lens=[600, 64, 64],
    )
    with torch.no_grad():  # these are left as the memory has them
        transformer.x_pad_token.normal_()
        transformer.cap_pad_token.normal_()
    transformer.save_pretrained(folder / "transformer")
    write_random_vae(folder / "vae", scaling_factor=0.4, shift_factor=0.1)
    FlowMatchEulerDiscreteScheduler(**(schedule or {"shift": 3.0})).save_pretrained(folder / "scheduler")
    write_index(
        folder,
        "ZImagePipeline",
        text_encoder=("transformers", "Qwen3ForCausalLM" if causal else "Qwen3Model"),
        tokenizer=("transformers", "PreTrainedTokenizerFast"),
        transformer=("diffusers", "ZImageTransformer2DModel"),
        vae=("diffusers", "AutoencoderKL"),
        scheduler=("diffusers", "FlowMatchEulerDiscreteScheduler"),
    )
