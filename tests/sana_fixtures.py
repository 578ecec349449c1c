"""What tests of Sana write to disk: a random base, with Gemma 2 and the letter tokenizer."""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel
from dit_fixtures import write_index, write_letter_tokenizer
from lumina2_fixtures import GEMMA_WIDTH, write_gemma2


def write_random_sana(folder: Path, flow_shift: float = 3.0, prediction_type: str = "flow_prediction") -> None:
    """Write a random Sana pipeline in the diffusers layout: 4 pixels a latent."""
    write_letter_tokenizer(folder / "tokenizer", longest_line=60)
    write_gemma2(folder / "text_encoder")
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=GEMMA_WIDTH,
        sample_size=32,
        patch_size=1,
    )
    transformer.save_pretrained(folder / "transformer")
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_out_channels=(8, 8, 16),
        decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        scaling_factor=0.7,
    )
    vae.save_pretrained(folder / "vae")
    scheduler = DPMSolverMultistepScheduler(
        flow_shift=flow_shift, use_flow_sigmas=True, prediction_type=prediction_type, lower_order_final=True
    )
    scheduler.save_pretrained(folder / "scheduler")
    write_index(
        folder,
        "SanaPipeline",
        text_encoder=("transformers", "Gemma2Model"),
        tokenizer=("transformers", "PreTrainedTokenizerFast"),
        transformer=("diffusers", "SanaTransformer2DModel"),
        vae=("diffusers", "AutoencoderDC"),
        scheduler=("diffusers", "DPMSolverMultistepScheduler"),
    )
