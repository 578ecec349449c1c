"""What tests of diffusion transformers write to disk: random Stable Diffusion 3 and Flux bases, and their T5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, SD3Transformer2DModel
from sd_fixtures import text_config, write_random_vae, write_tokenizer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerFast, T5Config, T5EncoderModel

T5_WIDTH = 16
SD3_TEXT_WIDTH = 48  # more than the two CLIP encoders together, as in the published bases


def write_index(folder: Path, pipeline: str, **parts: tuple[str, str] | tuple[None, None] | bool) -> None:
    """Write `model_index.json`; a flag is the pipeline's own."""
    values = {name: part if isinstance(part, bool) else list(part) for name, part in parts.items()}
    index = {"_class_name": pipeline, **values}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def write_letter_tokenizer(folder: Path, longest_line: int | None = None) -> None:
    """Write a fast tokenizer of single bytes with T5's special tokens: padding 0, end 1.

    Args:
        folder: where to.
        longest_line: lines from this length on are one unknown token, so that an instruction takes no time.
    """
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{letter: 3 + index for index, letter in enumerate(letters)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    pattern = "" if longest_line is None else Regex(rf"[^\n]{{{longest_line},}}|[\s\S]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )
    fast.save_pretrained(folder)


def write_t5(folder: Path, tokenizer_folder: Path, width: int = T5_WIDTH) -> None:
    """Write a random T5 encoder and its tokenizer."""
    config = T5Config(vocab_size=100, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder)
    write_letter_tokenizer(tokenizer_folder)


def write_random_sd3(folder: Path, t5: bool = True, shift: float = 3.0) -> None:
    """Write a random Stable Diffusion 3 pipeline in the diffusers layout; the last block drops its text tokens."""
    for suffix, width, layers in (("", 16, 3), ("_2", 24, 3)):
        write_tokenizer(folder / f"tokenizer{suffix}")
        config = text_config(hidden_size=width, num_hidden_layers=layers, projection_dim=width)
        CLIPTextModelWithProjection(config).save_pretrained(folder / f"text_encoder{suffix}")
    if t5:
        write_t5(folder / "text_encoder_3", folder / "tokenizer_3", width=SD3_TEXT_WIDTH)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=SD3_TEXT_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=16 + 24,
        pos_embed_max_size=12,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    transformer.save_pretrained(folder / "transformer")
    write_random_vae(folder / "vae", scaling_factor=1.5, shift_factor=0.1)
    FlowMatchEulerDiscreteScheduler(shift=shift).save_pretrained(folder / "scheduler")
    third: dict[str, Any] = {"text_encoder_3": (None, None), "tokenizer_3": (None, None)}
    if t5:
        third = {
            "text_encoder_3": ("transformers", "T5EncoderModel"),
            "tokenizer_3": ("transformers", "PreTrainedTokenizerFast"),
        }
    write_index(
        folder,
        "StableDiffusion3Pipeline",
        text_encoder=("transformers", "CLIPTextModelWithProjection"),
        text_encoder_2=("transformers", "CLIPTextModelWithProjection"),
        tokenizer=("transformers", "CLIPTokenizer"),
        tokenizer_2=("transformers", "CLIPTokenizer"),
        transformer=("diffusers", "SD3Transformer2DModel"),
        vae=("diffusers", "AutoencoderKL"),
        scheduler=("diffusers", "FlowMatchEulerDiscreteScheduler"),
        **third,
    )


def write_random_flux(folder: Path, guidance_embeds: bool = True, kontext: bool = False) -> None:
    """Write a random Flux pipeline in the diffusers layout, with double-stream and single-stream blocks."""
    write_tokenizer(folder / "tokenizer")
    CLIPTextModel(text_config(hidden_size=16, num_hidden_layers=2)).save_pretrained(folder / "text_encoder")
    write_t5(folder / "text_encoder_2", folder / "tokenizer_2")
    transformer = FluxTransformer2DModel(
        in_channels=4 * 4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    with torch.no_grad():  # the modulated final layer starts too small to see a difference
        transformer.proj_out.weight.mul_(10)
    transformer.save_pretrained(folder / "transformer")
    write_random_vae(folder / "vae", scaling_factor=0.7, shift_factor=0.1)
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256
    )
    scheduler.save_pretrained(folder / "scheduler")
    write_index(
        folder,
        "FluxKontextPipeline" if kontext else "FluxPipeline",
        text_encoder=("transformers", "CLIPTextModel"),
        text_encoder_2=("transformers", "T5EncoderModel"),
        tokenizer=("transformers", "CLIPTokenizer"),
        tokenizer_2=("transformers", "PreTrainedTokenizerFast"),
        transformer=("diffusers", "FluxTransformer2DModel"),
        vae=("diffusers", "AutoencoderKL"),
        scheduler=("diffusers", "FlowMatchEulerDiscreteScheduler"),
    )
