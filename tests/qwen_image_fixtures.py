"""What tests of Qwen-Image write to disk: a random base, with Qwen 2.5 VL and the letter tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from dit_fixtures import write_index, write_letter_tokenizer
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

QWEN_WIDTH = 16


def write_qwen25_vl(folder: Path) -> None:
    """Write a random Qwen 2.5 VL, of which the part that sees is as small as can be."""
    text = {
        **{"vocab_size": 100, "hidden_size": QWEN_WIDTH, "intermediate_size": 32, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": None},
        **{"eos_token_id": 1, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
    }
    vision = {
        **{"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": QWEN_WIDTH},
        **{"patch_size": 4, "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [0]},
    }
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=98, video_token_id=97, vision_start_token_id=96
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)


def write_random_qwen_image(folder: Path) -> None:
    """Write a random Qwen-Image pipeline in the diffusers layout: 2 pixels a latent, 4 a token."""
    write_letter_tokenizer(folder / "tokenizer")
    write_qwen25_vl(folder / "text_encoder")
    transformer = QwenImageTransformer2DModel(
        in_channels=4 * 4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=QWEN_WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    with torch.no_grad():  # the modulated final layer starts too small to see a difference
        transformer.proj_out.weight.mul_(10)
    transformer.save_pretrained(folder / "transformer")
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.5, 1.5, 0.8, 1.2],
    )
    vae.save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    ).save_pretrained(folder / "scheduler")
    write_index(
        folder,
        "QwenImagePipeline",
        text_encoder=("transformers", "Qwen2_5_VLForConditionalGeneration"),
        tokenizer=("transformers", "PreTrainedTokenizerFast"),
        transformer=("diffusers", "QwenImageTransformer2DModel"),
        vae=("diffusers", "AutoencoderKLQwenImage"),
        scheduler=("diffusers", "FlowMatchEulerDiscreteScheduler"),
    )
