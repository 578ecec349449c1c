"""The network module for sd-scripts, called as its trainer calls it, on models whose layers have the same names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from torch import Tensor

from lorainit_diffusers import initialize
from lorainit_diffusers.init_file import init_of, load_init_file, save_init_file
from lorainit_diffusers.integrations import sd_scripts

TARGETS = {"unet": ["to_q", "to_k", "to_v", "to_out.0"], "text_encoder": ["q_proj", "v_proj"]}


def batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 4, 8, 8)
    return [
        (torch.randn(shape, generator=generator), torch.randint(0, 1000, (2,), generator=generator),
         torch.randint(0, 90, (2, 12), generator=generator))
        for _ in range(3)
    ]  # fmt: skip


def predict(pipeline: Any, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    latents, timesteps, ids = batch
    return pipeline.unet(latents, timesteps, pipeline.text_encoder(ids)[0]).sample


def loss(pipeline: Any, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return (predict(pipeline, batch) - batch[0]).square().mean()


def load(base: Path) -> Any:
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    for module in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        module.requires_grad_(False)
    return pipeline


def write_init(base: Path, path: Path, method: str, components: tuple[str, ...] = ("unet", "text_encoder")) -> Path:
    pipeline = load(base)
    modules = {name: getattr(pipeline, name) for name in components}
    for name, module in modules.items():
        module.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS[name]))
    report = initialize(modules, method, batches(), lambda batch: loss(pipeline, batch), progress=False)
    return save_init_file(init_of(modules, report), path)


def network_of(file: Path, pipeline: Any, train_text_encoder: bool = True) -> Any:
    network = sd_scripts.create_network(
        1.0, None, None, pipeline.vae, pipeline.text_encoder, pipeline.unet, init=str(file)
    )
    network.apply_to(pipeline.text_encoder, pipeline.unet, train_text_encoder, True)
    network.prepare_grad_etc(pipeline.text_encoder, pipeline.unet)
    return network


@pytest.mark.parametrize("method", ["cntlora", "eva", "lora_ga"])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_a_training(method: str, dtype: torch.dtype | None, random_sd: Path, tmp_path: Path) -> None:
    file = write_init(random_sd, tmp_path / "init.safetensors", method)
    pipeline, stock = load(random_sd), load(random_sd)
    base = predict(stock, batches()[0])
    network = network_of(file, pipeline)
    torch.testing.assert_close(predict(pipeline, batches()[0]), base, atol=1e-5, rtol=0)
    frozen = {key: value.clone() for key, value in network.named_buffers()}
    assert any(value.numel() for value in frozen.values()) == (method != "eva")
    network.on_epoch_start(pipeline.text_encoder, pipeline.unet)
    groups = network.prepare_optimizer_params(1e-3, 1e-2, 1e-2)
    assert [group["lr"] for group in groups] == [1e-3, 1e-2]
    optimizer = torch.optim.AdamW(groups)
    for _ in range(3):
        optimizer.zero_grad()
        loss(pipeline, batches()[1]).backward()
        optimizer.step()
    for key, value in network.named_buffers():
        torch.testing.assert_close(value, frozen[key], atol=0, rtol=0)
    network.save_weights(str(tmp_path / "lora.safetensors"), dtype, {"ss_network_dim": "2"})
    trained = predict(pipeline, batches()[0])
    assert (trained - base).abs().max() > 1e-2
    # diffusers 0.42 cannot read the text encoder of kohya's files with transformers 5: a network of ours, read back
    saved = load(random_sd)
    from safetensors.torch import load_file

    _merge(load_file(tmp_path / "lora.safetensors"), saved)
    atol = 2e-3 if dtype == torch.float16 else 1e-4
    torch.testing.assert_close(predict(saved, batches()[0]), trained, atol=atol, rtol=0)


def _merge(tensors: dict[str, Tensor], pipeline: Any) -> None:
    """Add a file of kohya's names to a base, as its readers do."""
    for prefix, module in (("lora_unet", pipeline.unet), ("lora_te_text_model", pipeline.text_encoder)):
        for name, layer in module.named_modules():
            key = f"{prefix}_{name.removeprefix('text_model.').replace('.', '_')}"
            if f"{key}.alpha" in tensors:
                up, down = tensors.pop(f"{key}.lora_up.weight").float(), tensors.pop(f"{key}.lora_down.weight").float()
                layer.weight.data += float(tensors.pop(f"{key}.alpha")) / len(down) * (up @ down)
    assert not tensors


def test_stock_diffusers_reads_the_unet(random_sd: Path, tmp_path: Path) -> None:
    file = write_init(random_sd, tmp_path / "init.safetensors", "cntlora", ("unet",))
    pipeline = load(random_sd)
    network = network_of(file, pipeline, train_text_encoder=False)
    for parameter in network.get_trainable_params():
        parameter.data += 0.05
    network.save_weights(str(tmp_path / "lora.safetensors"), torch.float32, None)
    stock = load(random_sd)
    stock.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    torch.testing.assert_close(predict(stock, batches()[0]), predict(pipeline, batches()[0]), atol=1e-4, rtol=0)


def test_a_state_restores_the_offset_of_the_run_that_wrote_it(random_sd: Path, tmp_path: Path) -> None:
    file = write_init(random_sd, tmp_path / "init.safetensors", "cntlora")
    other = write_init(random_sd, tmp_path / "other.safetensors", "pissa")
    first, second = load(random_sd), load(random_sd)
    network, resumed = network_of(file, first), network_of(other, second)
    network.loras["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"].lora_up.data += 0.1
    resumed.load_state_dict(network.state_dict())
    torch.testing.assert_close(predict(second, batches()[0]), predict(first, batches()[0]), atol=0, rtol=0)


def test_what_cannot_be_is_refused(random_sd: Path, tmp_path: Path) -> None:
    file = write_init(random_sd, tmp_path / "init.safetensors", "cntlora")
    pipeline = load(random_sd)
    models = (pipeline.vae, pipeline.text_encoder, pipeline.unet)
    for options, message in (
        ({}, "give its path as --network_args init=FILE"),
        ({"init": str(file), "neuron_dropout": 0.1}, "has no dropout"),
    ):
        with pytest.raises(ValueError, match=message):
            sd_scripts.create_network(1.0, None, None, *models, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="made for rank 2, not 8"):
        sd_scripts.create_network(1.0, 8, 8, *models, init=str(file))
    network = sd_scripts.create_network(1.0, 2, 4, *models, init=str(file))
    with pytest.raises(ValueError, match="holds text_encoder, which this run does not train"):
        network.apply_to(pipeline.text_encoder, pipeline.unet, False, True)
    with pytest.raises(ValueError, match="must stay in float32"):
        network.to(torch.bfloat16)
    with pytest.raises(ValueError, match="continue from a saved state"):
        network.load_weights("lora.safetensors")
    torch.manual_seed(0)
    pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.data.normal_()
    with pytest.raises(ValueError, match=r"another base: the weight of 'mid_block.*to_q' differs"):
        sd_scripts.create_network(1.0, None, None, *models, init=str(file))
    assert load_init_file(file).components == ["unet", "text_encoder"]
