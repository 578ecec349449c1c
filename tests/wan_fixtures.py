"""What tests of Wan write to disk: a random base, with UMT5 and the letter tokenizer."""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from dit_fixtures import T5_WIDTH, write_index, write_letter_tokenizer
from transformers import UMT5Config, UMT5EncoderModel


def write_random_wan(folder: Path, expand_timesteps: bool = False) -> None:
    """Write a random Wan pipeline in the diffusers layout: 4 pixels a latent in space, 4 frames a latent in time."""
    write_letter_tokenizer(folder / "tokenizer")
    config = UMT5Config(vocab_size=100, d_model=T5_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=T5_WIDTH,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=64,
    )
    transformer.save_pretrained(folder / "transformer")
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.5, 1.5, 0.8, 1.2],
        scale_factor_spatial=4,
    )
    vae.save_pretrained(folder / "vae")
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.save_pretrained(folder / "scheduler")
    write_index(
        folder,
        "WanPipeline",
        text_encoder=("transformers", "UMT5EncoderModel"),
        tokenizer=("transformers", "PreTrainedTokenizerFast"),
        transformer=("diffusers", "WanTransformer3DModel"),
        transformer_2=(None, None),
        vae=("diffusers", "AutoencoderKLWan"),
        scheduler=("diffusers", "UniPCMultistepScheduler"),
        expand_timesteps=expand_timesteps,
    )
