"""Random pipelines, small and seeded, on which diffusers' own LoRA scripts run in seconds on a CPU.

Those of Stable Diffusion (XL, 3), Flux and Lumina 2 are the test suite's, with CLIP's own length of 77 tokens, to which
scripts pad. The others stand here. Tokens are letters or bytes: nothing is downloaded.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

CLIP_LENGTH = 77
QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WIDTH = 16


def write_base(kind: str, folder: Path) -> Path:
    """Write the base of a kind, the same one every time; kept where it is there already."""
    if not (folder / "model_index.json").is_file():
        torch.manual_seed(0)
        folder.mkdir(parents=True, exist_ok=True)
        WRITERS[kind](folder)
    return folder


def _from_tests(module: str, function: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        import importlib

        getattr(importlib.import_module(module), function)(folder)
        for encoder in sorted(folder.glob("text_encoder*")):
            _lengthen(encoder, folder / encoder.name.replace("text_encoder", "tokenizer"))

    return write


def _lengthen(encoder: Path, tokenizer: Path) -> None:
    """Give a CLIP text encoder and its tokenizer CLIP's own length."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(encoder, trust_remote_code=False)
    if type(config).__name__ == "T5Config":
        _write_t5_tokenizer(tokenizer)
    if not type(config).__name__.startswith("CLIP"):
        return
    config.max_position_embeddings = CLIP_LENGTH
    getattr(transformers, config.architectures[0])(config).save_pretrained(encoder)
    path = tokenizer / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": CLIP_LENGTH}))


def _write_t5_tokenizer(folder: Path) -> None:
    """A tokenizer of letters that T5's own class can read."""
    from transformers import T5Tokenizer

    letters = [chr(code) for code in range(33, 127)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    tokenizer: Any = T5Tokenizer
    tokenizer(vocab=[*special, *((letter, -3.0) for letter in letters)], extra_ids=0).save_pretrained(folder)


def _write_qwen_tokenizer(folder: Path) -> int:
    """A tokenizer of bytes with Qwen's special tokens; its number of tokens."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, *QWEN_TOKENS])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], extra_special_tokens=list(QWEN_TOKENS[1:]))
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return len(vocabulary)


def _qwen3(num_tokens: int, num_layers: int) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=num_tokens,
        max_position_embeddings=1024,
    )


def _save(folder: Path, pipeline: str, **parts: Any) -> None:
    """Save the parts, and the index that names their classes."""
    index: dict[str, Any] = {"_class_name": pipeline}
    for name, part in parts.items():
        if isinstance(part, tuple):  # already written
            index[name] = list(part)
            continue
        part.save_pretrained(folder / name)
        index[name] = [type(part).__module__.partition(".")[0], type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))


def _small_vae(latent_channels: int) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.5,
        shift_factor=0.1,
    )


def write_flux2_klein(folder: Path) -> None:
    """Flux 2 klein: a Qwen 3 whose middle layers are read."""
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
    from transformers import Qwen3ForCausalLM

    tokens = _write_qwen_tokenizer(folder / "tokenizer")
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(4, 4, 4, 4),
    )
    _save(
        folder,
        "Flux2KleinPipeline",
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=Qwen3ForCausalLM(_qwen3(tokens, num_layers=31)),
        tokenizer=("transformers", "Qwen2Tokenizer"),
    )


def write_qwen_image(folder: Path) -> None:
    """Qwen-Image, with the language part of a Qwen 2.5 VL."""
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokens = _write_qwen_tokenizer(folder / "tokenizer")
    text = {
        **{"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"num_key_value_heads": 2, "vocab_size": tokens, "rope_theta": 1e6},
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
    }
    vision = {"depth": 1, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_heads": 2, "out_hidden_size": WIDTH}
    ids = {"vision_start_token_id": tokens - 3, "vision_end_token_id": tokens - 2, "image_token_id": tokens - 1}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, vocab_size=tokens, **ids)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    _save(
        folder,
        "QwenImagePipeline",
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=("transformers", "Qwen2Tokenizer"),
    )


def write_z_image(folder: Path) -> None:
    """Z-Image, with a Qwen 3 without a head."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
    from transformers import Qwen3Model

    tokens = _write_qwen_tokenizer(folder / "tokenizer")
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        qk_norm=True,
        cap_feat_dim=WIDTH,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 32, 32],
    )
    with torch.no_grad():  # made with torch.empty
        transformer.x_pad_token.fill_(0.1)
        transformer.cap_pad_token.fill_(0.1)
    _save(
        folder,
        "ZImagePipeline",
        transformer=transformer,
        vae=_small_vae(16),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=Qwen3Model(_qwen3(tokens, num_layers=2)),
        tokenizer=("transformers", "Qwen2Tokenizer"),
    )


def write_sana(folder: Path) -> None:
    """Sana: linear attention, a deep-compression VAE, Gemma 2."""
    from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel
    from dit_fixtures import write_letter_tokenizer
    from transformers import Gemma2Config, Gemma2Model

    write_letter_tokenizer(folder / "tokenizer")
    config = Gemma2Config(
        vocab_size=100,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=32,
    )
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.5,
    )
    _save(
        folder,
        "SanaPipeline",
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=Gemma2Model(config),
        tokenizer=("transformers", "PreTrainedTokenizerFast"),
    )


def write_hidream(folder: Path) -> None:
    """HiDream: experts, two CLIPs, T5 and a Llama."""
    from diffusers import FlowMatchEulerDiscreteScheduler, HiDreamImageTransformer2DModel
    from dit_fixtures import write_letter_tokenizer, write_t5
    from sd_fixtures import text_config, write_tokenizer
    from transformers import CLIPTextModelWithProjection, LlamaConfig, LlamaForCausalLM

    for suffix in ("", "_2"):
        write_tokenizer(folder / f"tokenizer{suffix}")
        config = text_config(hidden_size=WIDTH, num_hidden_layers=2, projection_dim=WIDTH)
        CLIPTextModelWithProjection(config).save_pretrained(folder / f"text_encoder{suffix}")
        _lengthen(folder / f"text_encoder{suffix}", folder / f"tokenizer{suffix}")
    write_t5(folder / "text_encoder_3", folder / "tokenizer_3", width=WIDTH)
    _write_t5_tokenizer(folder / "tokenizer_3")
    write_letter_tokenizer(folder / "tokenizer_4")
    llama = LlamaConfig(
        vocab_size=100,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[WIDTH, WIDTH],
        text_emb_dim=2 * WIDTH,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
    )
    LlamaForCausalLM(llama).save_pretrained(folder / "text_encoder_4")
    clip = ("transformers", "CLIPTextModelWithProjection")
    _save(
        folder,
        "HiDreamImagePipeline",
        transformer=transformer,
        vae=_small_vae(4),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=clip,
        text_encoder_2=clip,
        text_encoder_3=("transformers", "T5EncoderModel"),
        text_encoder_4=("transformers", "LlamaForCausalLM"),
        tokenizer=("transformers", "CLIPTokenizer"),
        tokenizer_2=("transformers", "CLIPTokenizer"),
        tokenizer_3=("transformers", "PreTrainedTokenizerFast"),
        tokenizer_4=("transformers", "PreTrainedTokenizerFast"),
    )


WRITERS: dict[str, Callable[[Path], None]] = {
    "sd": _from_tests("sd_fixtures", "write_random_sd"),
    "sdxl": _from_tests("sd_fixtures", "write_random_sdxl"),
    "sd3": _from_tests("dit_fixtures", "write_random_sd3"),
    "flux": _from_tests("dit_fixtures", "write_random_flux"),
    "flux2-klein": write_flux2_klein,
    "qwen-image": write_qwen_image,
    "z-image": write_z_image,
    "sana": write_sana,
    "lumina2": _from_tests("lumina2_fixtures", "write_random_lumina2"),
    "hidream": write_hidream,
}
