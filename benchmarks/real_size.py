"""A model of real size with random weights through a whole run: collect, initialise, one step, save, reload.

    python benchmarks/real_size.py --model sd15                        # float32
    python benchmarks/real_size.py --model sdxl --mixed_precision bf16

Nothing is downloaded: the layout is that of the published checkpoints, the weights are random (the VAE is small: it is
not measured). Prints one row: seconds of each stage, peak memory, and four differences between outputs of the UNet, as
shares of the norm of the untouched base's:

    start_error      after initialisation, against the untouched base (rounding, for methods that keep its function)
    change_by_step   after the step, against before it
    base_error       with the adapters taken off, against the untouched base: zero, or base weights were written
    reload_error     with the file as the stock pipeline loads it on that base, against the trained model
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lorainit_diffusers import initialize, save_diffusers_lora, save_kohya_lora, trainable_parameters
from lorainit_diffusers.families.latent_diffusion import LatentDiffusionFamily
from lorainit_diffusers.families.sd import StableDiffusionFamily
from lorainit_diffusers.families.sdxl import StableDiffusionXLFamily

TOKENIZER = Path(__file__).resolve().parent.parent / "assets" / "models" / "tiny-sd" / "tokenizer"
SD15_UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_BIG_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make modules in this dtype from the start: SDXL in float32 and then cast would take twice its memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build(model: str, dtype: torch.dtype, train_text_encoder: bool, device: str) -> LatentDiffusionFamily:
    """The family, frozen, with random weights."""
    tokenizer = CLIPTokenizer.from_pretrained(str(TOKENIZER), model_max_length=77)
    tokens = {
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(0)
    with default_dtype(dtype):
        unet = UNet2DConditionModel(**(SD15_UNET if model == "sd15" else SDXL_UNET))
        text_encoder = CLIPTextModel(CLIPTextConfig(**CLIP_L, **tokens))
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
    )
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    parts: list[nn.Module] = [unet, text_encoder, vae]
    if model == "sd15":
        family: LatentDiffusionFamily = StableDiffusionFamily(
            tokenizer, text_encoder, vae, unet, scheduler, train_text_encoder=train_text_encoder
        )
    else:
        with default_dtype(dtype):
            text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_BIG_G, **tokens))
        parts.append(text_encoder_2)
        family = StableDiffusionXLFamily(
            *(tokenizer, text_encoder, vae, unet, scheduler, tokenizer, text_encoder_2),
            train_text_encoder=train_text_encoder,
        )
    for part in parts:
        part.requires_grad_(False).eval().to(device)
    return family


def remove_adapters(module: nn.Module) -> None:
    """Give the module its own layers back: the original base, without a second copy of it in memory."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, LoraLayer):
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(module, "peft_config"):
        del module.peft_config
    module._hf_peft_config_loaded = False


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--init", default="cntlora")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--num_batches", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--train_text_encoder", action="store_true")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    seconds: dict[str, float] = {}
    on_cuda = torch.device(args.device).type == "cuda"

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if on_cuda:
            torch.cuda.synchronize()
        seconds[stage] = time.perf_counter() - start

    with timed("build"):
        dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
        family = build(args.model, dtype, args.train_text_encoder, args.device)
    side = args.resolution // 8
    generator = torch.Generator().manual_seed(0)

    def batches(count: int) -> Iterator[dict[str, Tensor]]:
        for index in range(count):
            captions = [f"a noto emoji of red apple {index} {row}" for row in range(args.batch_size)]
            latents = torch.randn(args.batch_size, 4, side, side, generator=generator)
            yield {"latents": latents, **family.caption_inputs(captions)}

    (probe,) = batches(1)
    outputs: list[Tensor] = []
    handle = family.unet.register_forward_hook(lambda module, inputs, output: outputs.append(output[0].float()))

    @torch.no_grad()
    def predict() -> Tensor:
        for module in family.adapted.values():
            module.eval()
        family.loss(probe, torch.Generator().manual_seed(1))
        return outputs[-1]

    # Before anything of ours touches the model: what the file is loaded on in the end must still be this.
    original = predict()
    with timed("initialize"):
        report = initialize(family, args.init, batches(args.num_batches), rank=args.rank, num_batches=args.num_batches)
    print(report.summary())
    adapted_layers = [m for module in family.adapted.values() for m in module.modules() if isinstance(m, LoraLayer)]
    ranks = [layer.lora_A["default"].weight.shape[0] for layer in adapted_layers]
    parameters = [p for module in family.adapted.values() for p in trainable_parameters(module)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    start = predict()
    with timed("step"):
        for module in family.adapted.values():
            module.train()
        family.loss(next(batches(1)), torch.Generator().manual_seed(2)).backward()
        optimizer.step()
    del optimizer
    trained = predict()
    with tempfile.TemporaryDirectory() as folder:
        with timed("save"):
            path = save_diffusers_lora(family.adapted, folder)
            save_kohya_lora(family.adapted, Path(folder) / "kohya.safetensors")
        size_mb = path.stat().st_size / 1e6
        for module in family.adapted.values():
            remove_adapters(module)
        del parameters, adapted_layers
        gc.collect()
        restored = predict()
        with timed("reload"):
            family.pipeline().load_lora_weights(folder, weight_name=path.name)
    reloaded = predict()
    handle.remove()

    def difference(output: Tensor, reference: Tensor) -> float:
        return float((output - reference).norm() / original.norm())

    row = {
        "layers": len(ranks),
        **{"lowest_rank": min(ranks), "highest_rank": max(ranks)},
        "statistics": len({layer.shared_group for layer in report.layers.values()}),
        **{"build_s": seconds["build"], "forward_s": report.forward_s, "statistics_s": report.statistics_s},
        **{"solve_s": report.solve_s, "attach_s": report.attach_s, "overhead": report.overhead or 0.0},
        **{f"{stage}_s": seconds[stage] for stage in ("step", "save", "reload")},
        "file_mb": size_mb,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        **({"peak_cuda_gb": torch.cuda.max_memory_allocated() / 1e9} if on_cuda else {}),
        "start_error": difference(start, original),
        "change_by_step": difference(trained, start),
        "base_error": difference(restored, original),
        "reload_error": difference(reloaded, trained),
    }
    row = {name: value if isinstance(value, int) else float(f"{value:.3g}") for name, value in row.items()}
    print(json.dumps({"model": args.model, "init": args.init, **row}))
    return row


if __name__ == "__main__":
    main()
