"""Forgetting something makes no wrong file in silence: what is written is right on the original base, or refused."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from loops import reset_accelerate
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from lorainit_diffusers import attach

NAME = "pytorch_lora_weights.safetensors"


@pytest.fixture(autouse=True)
def _forget_accelerators() -> Generator[None]:
    reset_accelerate()
    yield
    reset_accelerate()


def output(unet: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([20, 700])
    with torch.no_grad():
        return unet.eval()(*inputs, torch.randn(2, 12, 16, generator=generator)).sample


def trained(base: Path, method: str, alpha: float = 2, wrap: bool = False) -> tuple[Any, Any, Any]:
    """A UNet after the pass and three steps, its pipeline, and the attachment."""
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline.unet.requires_grad_(False)
    config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["to_q", "to_k", "to_v"])  # type: ignore[arg-type]
    if wrap:
        unet: Any = get_peft_model(pipeline.unet, config)
    else:
        unet = pipeline.unet
        unet.add_adapter(config)
    accelerator = Accelerator(cpu=True)
    optimizer: Any = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=0.02)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    attached = attach(accelerator, method, init_batches=2, progress=False)
    for _ in range(5):
        with accelerator.accumulate(unet):
            noise = torch.randn(2, 4, 8, 8)
            prediction = unet(noise, torch.tensor([10, 500]), torch.randn(2, 12, 16)).sample
            accelerator.backward((prediction - noise).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    assert attached.over
    return unet, pipeline, attached


def check_file(base: Path, folder: Path, live: Tensor, atol: float = 1e-4) -> None:
    """The file, in a stock pipeline on the original base, is the trained model, which is not the base."""
    stock = StableDiffusionPipeline.from_pretrained(base)
    assert (output(stock.unet) - live).abs().max() > 1e-2
    stock.load_lora_weights(folder, weight_name=NAME)
    torch.testing.assert_close(output(stock.unet), live, atol=atol, rtol=0)


def layers(unet: Any) -> dict[str, Tensor]:
    return convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))


@pytest.mark.parametrize("method", ["cntlora", "eva"])
@pytest.mark.parametrize("alpha", [2, 6])
def test_save_lora_weights_without_metadata(method: str, alpha: float, random_sd: Path, tmp_path: Path) -> None:
    """Where alpha is not the rank, a reader would take it for it."""
    unet, pipeline, attached = trained(random_sd, method, alpha)
    pipeline.save_lora_weights(tmp_path, unet_lora_layers=layers(unet))
    check_file(random_sd, tmp_path, output(unet))
    attached.close()


@pytest.mark.parametrize("method", ["cntlora", "lora_ga", "eva"])
def test_tensors_rounded_before_saving(
    method: str, random_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unet, pipeline, attached = trained(random_sd, method)
    rounded = {key: value.to(torch.bfloat16) for key, value in layers(unet).items()}
    pipeline.save_lora_weights(tmp_path, unet_lora_layers=rounded)
    # what rounds a start with B = 0 rounds what was trained only, as it does in any LoRA
    check_file(random_sd, tmp_path, output(unet), atol=0.05 if method == "eva" else 1e-4)
    assert ("rounds its LoRA to bfloat16" in capsys.readouterr().out) == (method != "eva")
    attached.close()


CASTS: dict[str, Callable[[Any], Any]] = {
    "bfloat16": lambda unet: unet.to(torch.bfloat16),
    "half": lambda unet: unet.half(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_a_model_cast_before_saving(cast: str, random_sd: Path, tmp_path: Path) -> None:
    """As `train_dreambooth_lora_sd3.py` casts it: the factors stay in float32."""
    unet, pipeline, attached = trained(random_sd, "cntlora")
    live = output(unet)
    CASTS[cast](unet)
    pipeline.save_lora_weights(tmp_path, unet_lora_layers=layers(unet))
    check_file(random_sd, tmp_path, live)
    attached.close()


def test_parameters_cast_by_hand_before_saving_are_refused(random_sd: Path, tmp_path: Path) -> None:
    unet, pipeline, attached = trained(random_sd, "cntlora")
    for parameter in unet.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    with pytest.raises(ValueError, match="was rounded to bfloat16, in which what was trained"):
        pipeline.save_lora_weights(tmp_path, unet_lora_layers=layers(unet))
    assert not (tmp_path / NAME).exists()
    attached.close()


@pytest.mark.parametrize("method", ["cntlora", "eva"])
def test_peft_save_pretrained(method: str, random_sd: Path, tmp_path: Path) -> None:
    unet, _, attached = trained(random_sd, method, alpha=6, wrap=True)
    unet.save_pretrained(tmp_path)
    base = StableDiffusionPipeline.from_pretrained(random_sd).unet
    untrained = output(base)
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    assert (untrained - output(unet)).abs().max() > 1e-2
    torch.testing.assert_close(output(loaded), output(unet), atol=1e-5, rtol=0)
    attached.close()


@pytest.mark.parametrize("method", ["cntlora", "eva"])
def test_diffusers_own_ways_of_saving_a_module(method: str, random_sd: Path, tmp_path: Path) -> None:
    """`save_lora_adapter` is right; `save_attn_procs`, which knows no LoRA any more, says so."""
    unet, _, attached = trained(random_sd, method, alpha=6)
    unet.save_lora_adapter(tmp_path)
    stock = StableDiffusionPipeline.from_pretrained(random_sd).unet
    stock.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    torch.testing.assert_close(output(stock), output(unet), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="only supports saving Custom Diffusion"):
        unet.save_attn_procs(tmp_path)
    attached.close()


def test_files_of_others_are_left_alone(random_sd: Path, tmp_path: Path) -> None:
    """A LoRA of a component that is none of ours, and anything before the pass."""
    _, pipeline, attached = trained(random_sd, "cntlora")
    other = {"encoder.q_proj.lora_A.weight": torch.ones(2, 4, dtype=torch.bfloat16)}
    pipeline.save_lora_weights(tmp_path, text_encoder_lora_layers=other)
    saved = load_file(tmp_path / NAME)
    assert [value.dtype for value in saved.values()] == [torch.bfloat16]
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    attached.close()
