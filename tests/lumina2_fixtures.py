"""What tests of Lumina 2 write to disk: a random base, with Gemma 2 and the letter tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Lumina2Transformer2DModel
from dit_fixtures import write_index, write_letter_tokenizer
from transformers import Gemma2Config, Gemma2Model

GEMMA_WIDTH = 16


def write_gemma2(folder: Path) -> None:
    """Write a random Gemma 2."""
    config = Gemma2Config(
        vocab_size=100,
        hidden_size=GEMMA_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    Gemma2Model(config).save_pretrained(folder)


def write_random_lumina2(folder: Path, shift: float = 6.0) -> None:
    """Write a random Lumina 2 pipeline in the diffusers layout: 32x32 images, 8 pixels a latent, grouped-query heads.

    The pipeline's own number of pixels a latent is fixed, so this VAE halves the image once more than the others'.
    """
    write_letter_tokenizer(folder / "tokenizer")
    write_gemma2(folder / "text_encoder")
    transformer = Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=48,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(300, 32, 32),
        cap_feat_dim=GEMMA_WIDTH,
    )
    with torch.no_grad():  # gates that start at zero would leave attention without effect
        for parameter in transformer.parameters():
            if parameter.ndim == 2 and not parameter.any():
                parameter.normal_(std=0.3)
    transformer.save_pretrained(folder / "transformer")
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.4,
        shift_factor=0.1,
    )
    vae.save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=shift).save_pretrained(folder / "scheduler")
    write_index(
        folder,
        "Lumina2Pipeline",
        text_encoder=("transformers", "Gemma2Model"),
        tokenizer=("transformers", "PreTrainedTokenizerFast"),
        transformer=("diffusers", "Lumina2Transformer2DModel"),
        vae=("diffusers", "AutoencoderKL"),
        scheduler=("diffusers", "FlowMatchEulerDiscreteScheduler"),
    )
