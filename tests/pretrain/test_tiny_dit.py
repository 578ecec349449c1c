"""The recipe of the bundled transformer on synthetic pictures: exact attention, resuming, a run from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import emoji_pictures as emoji
import numpy as np
import pytest
import tiny_dit as recipe
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from sd_fixtures import text_config, write_random_vae, write_tokenizer
from torch import nn
from transformers import CLIPTextModel

# whole recipes, which change rarely: run by hand with -m slow
pytestmark = pytest.mark.slow

NAMES = ("red-apple", "dog-face")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """What the recipe takes of the bundled Stable Diffusion."""
    folder = tmp_path / "base"
    write_tokenizer(folder / "tokenizer")
    torch.manual_seed(0)
    CLIPTextModel(text_config(hidden_size=32, num_hidden_layers=2)).save_pretrained(folder / "text_encoder")
    write_random_vae(folder / "vae")
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small transformer, and captions as short as the random base's."""
    changes: dict[str, Any] = {"num_layers": 2, "num_attention_heads": 1, "attention_head_dim": 16}
    changes |= {"in_channels": 4, "out_channels": 4, "caption_projection_dim": 16, "sample_size": 16}
    changes["pos_embed_max_size"] = 16
    for name, value in changes.items():
        monkeypatch.setitem(recipe.TRANSFORMER, name, value)
    monkeypatch.setattr(recipe, "GRID_NAMES", NAMES)
    monkeypatch.setattr("shared.MAX_TOKENS", 12)


def denoiser_of(base: Path) -> recipe.Denoiser:
    return recipe.Denoiser(CLIPTextModel.from_pretrained(base / "text_encoder"))


@pytest.mark.usefixtures("small")
def test_one_token_stands_for_many(base: Path) -> None:
    denoiser = denoiser_of(base)
    for parameter in denoiser.transformer.parameters():  # modulations start at zero, which would hide everything
        nn.init.normal_(parameter, std=0.1)
    noisy, sigmas = torch.randn(2, 4, 16, 16), torch.tensor([0.3, 0.8])
    ids = torch.randint(0, 90, (2, 12))
    with torch.no_grad():
        stock = denoiser(noisy, sigmas, ids, None)  # as many zero tokens as captions have
        attention = recipe.RepeatedTokenAttention()
        for block in denoiser.transformer.transformer_blocks:
            block.attn.set_processor(attention)
        attention.count = recipe.MAX_TOKENS
        torch.testing.assert_close(denoiser(noisy, sigmas, ids, attention), stock, rtol=0, atol=1e-5)
        attention.count = 1
        assert (denoiser(noisy, sigmas, ids, attention) - stock).abs().max() > 1e-4


def test_the_third_text_encoder_is_silent() -> None:
    t5, tokenizer = recipe.build_silent_t5(24)
    ids = tokenizer(
        ["a noto emoji of red apple", ""], padding="max_length", max_length=9, return_tensors="pt"
    ).input_ids
    assert ids.shape == (2, 9)
    assert not t5(ids)[0].any()


@pytest.mark.usefixtures("small")
def test_the_first_text_encoder_starts_from_the_base(base: Path) -> None:
    expected = CLIPTextModel.from_pretrained(base / "text_encoder")
    ids = torch.randint(0, 90, (2, 12))
    output = denoiser_of(base).text_encoder(ids, output_hidden_states=True)
    torch.testing.assert_close(output.last_hidden_state, expected(ids)[0])


@pytest.mark.usefixtures("small")
def test_recipe_from_end_to_end(base: Path, tmp_path: Path) -> None:
    work_dir, output_dir = tmp_path / "run", tmp_path / "models" / "tiny"
    work_dir.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (len(NAMES), 3, 64, 64), np.uint8)
    save_file({"base": torch.from_numpy(pixels)}, work_dir / "images.safetensors")
    records = [{"style": "noto", "name": name} for name in NAMES]
    (work_dir / "captions.json").write_text(json.dumps({"records": records, "corpus": []}), encoding="utf-8")

    argv = ["--work_dir", str(work_dir), "--output_dir", str(output_dir), "--base", str(base), "--sample_steps", "2"]
    argv += ["--transformer_minutes", "0", "--transformer_batch_size", "2", "--no_bf16"]
    recipe.main([*argv, "--transformer_steps", "2"])
    recipe.main([*argv, "--transformer_steps", "4"])  # continues
    _, state = recipe.load_checkpoint(work_dir / "transformer" / "checkpoint.safetensors")
    assert state["step"] == 4
    weights = load_file(output_dir / "transformer" / "diffusion_pytorch_model.safetensors")
    assert weights["proj_out.weight"].dtype == torch.float16
    assert weights["proj_out.weight"].any()

    pipeline = StableDiffusion3Pipeline.from_pretrained(output_dir)
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np", "max_sequence_length": 12}
    image = pipeline(emoji.caption("noto", "red-apple"), **options).images[0]
    assert image.shape == (64, 64, 3)
    assert np.isfinite(image).all()
    card = (output_dir / "README.md").read_text(encoding="utf-8")
    assert "4 steps" in card
    assert "CC-BY-4.0" in card
    assert (output_dir / "samples.png").exists()
