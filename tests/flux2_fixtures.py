"""What tests of Flux 2 write to disk: random dev and klein bases."""

from __future__ import annotations

from pathlib import Path

import torch
from chat_fixtures import TEXT_WIDTH, write_chat_tokenizer, write_mistral3, write_qwen3
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from dit_fixtures import write_index


def write_random_flux2(folder: Path, klein: bool = False, is_distilled: bool = False) -> None:
    """Write a random Flux 2 pipeline in the diffusers layout, dev or klein: 2 pixels a latent, 4 a token."""
    write_chat_tokenizer(folder / "tokenizer")
    if klein:
        write_qwen3(folder / "text_encoder", num_layers=28)
    else:
        write_mistral3(folder / "text_encoder", num_layers=31)
    transformer = Flux2Transformer2DModel(
        in_channels=4 * 4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * TEXT_WIDTH,
        guidance_embeds=not klein,
        axes_dims_rope=(4, 4, 4, 4),
    )
    with torch.no_grad():  # the modulated final layer and the text start too small to see a difference
        transformer.proj_out.weight.mul_(10)
        transformer.context_embedder.weight.mul_(10)
    transformer.save_pretrained(folder / "transformer")
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    vae.bn.register_buffer("running_mean", torch.randn(16))
    vae.bn.register_buffer("running_var", torch.rand(16) + 0.5)
    vae.save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
    ).save_pretrained(folder / "scheduler")
    write_index(
        folder,
        "Flux2KleinPipeline" if klein else "Flux2Pipeline",
        text_encoder=("transformers", "Qwen3ForCausalLM" if klein else "Mistral3ForConditionalGeneration"),
        tokenizer=("transformers", "PreTrainedTokenizerFast"),
        transformer=("diffusers", "Flux2Transformer2DModel"),
        vae=("diffusers", "AutoencoderKLFlux2"),
        scheduler=("diffusers", "FlowMatchEulerDiscreteScheduler"),
        **({"is_distilled": is_distilled} if klein else {}),
    )
