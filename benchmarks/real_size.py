"""A model of real size with random weights through a whole run: collect, initialise, one step, save, reload.

    python benchmarks/real_size.py --model sd15                        # float32
    python benchmarks/real_size.py --model sdxl --mixed_precision bf16
    python benchmarks/real_size.py --model flux --memory_budget_gb 0.5      # a few blocks, initialisation only
    python benchmarks/real_size.py --model flux-layers --memory_budget_gb 8 # statistics of all 57 blocks, no weights
    python benchmarks/real_size.py --model flux-sketch                      # sketch against exact, width 3072

Nothing is downloaded: the layout is that of the published checkpoints, the weights are random (the VAE is small: it is
not measured). Prints one row: seconds of each stage, peak memory, and four differences between outputs of the UNet, as
shares of the norm of the untouched base's:

    start_error      after initialisation, against the untouched base (rounding, for methods that keep its function)
    change_by_step   after the step, against before it
    base_error       with the adapters taken off, against the untouched base: zero, or base weights were written
    reload_error     with the file as the stock pipeline loads it on that base, against the trained model

The Flux checks are about memory: bytes of statistics, counted tensor by tensor, against the budget.
"""

from __future__ import annotations

import gc
import itertools
import json
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from diffusers import AutoencoderKL, DDPMScheduler, FluxTransformer2DModel, UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lorainit_diffusers import initialize, save_diffusers_lora, save_kohya_lora, trainable_parameters
from lorainit_diffusers.adapters import target_layers
from lorainit_diffusers.budget import GB, MemoryBudget, sketch_columns
from lorainit_diffusers.families.latent_diffusion import LatentDiffusionFamily
from lorainit_diffusers.families.sd import StableDiffusionFamily
from lorainit_diffusers.families.sdxl import StableDiffusionXLFamily
from lorainit_diffusers.ranges import COUNT, COUNT_OR_NONE, POSITIVE
from lorainit_diffusers.statistics import SecondMoment, SketchedSecondMoment
from lorainit_diffusers.training.cli import run_script
from lorainit_diffusers.training.options.fields import Options, option
from lorainit_diffusers.training.options.parser import parse_options

FLUX_MODELS = ("flux", "flux-layers", "flux-sketch")


@dataclass(frozen=True, kw_only=True)
class RealSizeOptions(Options):
    """What is measured."""

    _argument_group_name = "measurement"

    model: str = option("sd15", "base, or part of Flux (default sd15)", choices=("sd15", "sdxl", *FLUX_MODELS))
    init: str = option("cntlora", "initialisation (default cntlora)")
    rank: Annotated[int, COUNT] = option(16, "of every layer (default 16)")
    num_batches: Annotated[int, COUNT] = option(4, "batches of the collection (default 4)")
    batch_size: Annotated[int, COUNT] = option(2, "samples of a batch (default 2)")
    resolution: Annotated[int, COUNT] = option(256, "side of the images in pixels (default 256)")
    train_text_encoder: bool = option(False, "adapters on the text encoders, too")
    mixed_precision: str = option("no", "precision of the base (default no)", choices=("no", "bf16"))
    device: str = option("cpu", "where it runs (default cpu)")
    memory_budget_gb: Annotated[float | None, POSITIVE] = option(None, "of the statistics (default: auto)")
    statistics_device: str | None = option(None, "where the statistics are (default: where the layers are)")
    num_double: Annotated[int, COUNT_OR_NONE] = option(1, "flux: blocks with two streams (the real one has 19)")
    num_single: Annotated[int, COUNT_OR_NONE] = option(1, "flux: blocks with one stream (the real one has 38)")


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


FLUX = {"in_channels": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True}
FLUX |= {"attention_head_dim": 128, "num_attention_heads": 24}  # inner width 3072, feed-forward 12288
FLUX_BLOCKS = {"num_layers": 19, "num_single_layers": 38}
FLUX_TARGETS = (
    r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)|ff(_context)?\.net\.(0\.proj|2))"
    r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)"
)
# Layers of one block that one tensor feeds, by the last parts of their names; the first of each group leads.
FLUX_SHARED = {
    **{"to_k": "to_q", "to_v": "to_q", "proj_mlp": "attn.to_q"},
    **{"add_k_proj": "add_q_proj", "add_v_proj": "add_q_proj"},
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
    tokenizer = CLIPTokenizer.from_pretrained(str(TOKENIZER), model_max_length=77, trust_remote_code=False)
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


def print_row(options: RealSizeOptions, row: dict[str, float]) -> dict[str, float]:
    row = {name: value if isinstance(value, int) else float(f"{value:.3g}") for name, value in row.items()}
    print(json.dumps({"model": options.model, "init": options.init, **row}))
    return row


def remove_adapters(module: nn.Module) -> None:
    """Give the module its own layers back: the original base, without a second copy of it in memory."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, LoraLayer):
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(module, "peft_config"):
        del module.peft_config
    module._hf_peft_config_loaded = False


def flux(options: RealSizeOptions) -> dict[str, float]:
    """Collection and initialisation of a Flux transformer with few blocks, in bfloat16."""
    torch.manual_seed(0)
    with default_dtype(torch.bfloat16):
        model = FluxTransformer2DModel(**FLUX, num_layers=options.num_double, num_single_layers=options.num_single)
    model.requires_grad_(False).eval().to(options.device)
    side, num_text = options.resolution // 16, 64
    grid = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), dim=-1).reshape(-1, 2)
    positions = torch.cat([torch.zeros(side * side, 1), grid], dim=1)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(options.batch_size, *shape, generator=generator).to(options.device, torch.bfloat16)

    def predict(batch: dict[str, Tensor]) -> Tensor:
        return model(
            hidden_states=batch["noisy"],
            encoder_hidden_states=batch["prompt_embeds"],
            pooled_projections=batch["pooled"],
            timestep=batch["sigma"],
            guidance=torch.full_like(batch["sigma"], 3.5),
            img_ids=positions.to(options.device),
            txt_ids=torch.zeros(num_text, 3, device=options.device),
        ).sample

    def batches(count: int) -> Iterator[dict[str, Tensor]]:
        for _ in range(count):
            latents, noise, sigma = draw(side * side, 64), draw(side * side, 64), draw().sigmoid()
            noisy = torch.lerp(latents, noise, sigma[:, None, None])
            conditions = {"prompt_embeds": draw(num_text, 4096), "pooled": draw(768)}
            yield {"noisy": noisy, "sigma": sigma, "velocity": noise - latents, **conditions}

    (probe,) = batches(1)
    with torch.no_grad():
        original = predict(probe).float()
    before_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    start = time.perf_counter()
    report = initialize(
        model,
        options.init,
        batches(options.num_batches),
        lambda batch: (predict(batch) - batch["velocity"]).float().square().mean(),
        rank=options.rank,
        target_modules=FLUX_TARGETS,
        memory_budget_gb=options.memory_budget_gb,
        statistics_device=options.statistics_device,
    )
    initialize_s = time.perf_counter() - start
    print(report.summary())
    with torch.no_grad():
        moved = predict(probe).float() - original
    sketched = {name: layer.sketch_columns for name, layer in report.layers.items()}
    return {
        "layers": len(report.layers),
        "statistics": len({layer.shared_group for layer in report.layers.values()}),
        "sketched_layers": sum(columns is not None for columns in sketched.values()),
        "statistics_gb": report.statistics_bytes / GB,
        "peak_statistics_gb": report.peak_statistics_bytes / GB,
        "budget_gb": (report.memory_budget_bytes or 0) / GB,
        **{"forward_s": report.forward_s, "statistics_s": report.statistics_s, "solve_s": report.solve_s},
        **{"attach_s": report.attach_s, "initialize_s": initialize_s},
        **{"before_gb": before_gb, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6},
        "start_error": float(moved.norm() / original.norm()),
    }


def flux_layers(options: RealSizeOptions) -> dict[str, float]:
    """The statistics of every layer of the whole Flux under a budget: the real widths and groups, few random rows."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(**FLUX, **FLUX_BLOCKS)
    layers = target_layers(model, FLUX_TARGETS)
    widths: dict[str, int] = {}
    for name, layer in layers.items():
        block, _, last = name.rpartition(".")
        if FLUX_SHARED.get(last) is not None and f"{block}.{FLUX_SHARED[last]}" in layers:
            continue
        widths[name] = layer.in_features
    exact_bytes = sum(4 * width**2 for width in widths.values())
    budget = MemoryBudget(
        options.memory_budget_gb * GB, num_columns=sketch_columns(options.rank), device=options.device
    )
    budget.start(torch.device(options.device), lambda value: value)
    table: dict[str, SecondMoment | SketchedSecondMoment] = {}
    generator = torch.Generator().manual_seed(0)
    largest, start = 0, time.perf_counter()

    def held_bytes() -> int:
        """Counted tensor by tensor, by storage: independent of what the statistics say of themselves."""
        owners = [*(vars(s) for s in table.values()), *(vars(s).get("_omegas", {}) for s in table.values())]
        tensors = [value for owner in owners for value in owner.values() if isinstance(value, Tensor)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    for index, (name, width) in itertools.product(range(options.num_batches), widths.items()):
        if index == 0:
            budget.admit(name, SecondMoment(width), table)
        table[name].update(torch.randn(8, width, generator=generator).to(options.device))
        largest = max(largest, held_bytes())
    return {
        "layers": len(layers),
        "statistics": len(widths),
        "sketched": sum(isinstance(statistic, SketchedSecondMoment) for statistic in table.values()),
        "first_sketched_width": budget.first_sketched_width or 0,
        **{"exact_gb": exact_bytes / GB, "budget_gb": options.memory_budget_gb},
        **{"statistics_gb": held_bytes() / GB, "peak_statistics_gb": largest / GB, "counted_peak_gb": budget.peak / GB},
        "seconds": time.perf_counter() - start,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def flux_sketch(options: RealSizeOptions) -> dict[str, float]:
    """How much of the exact leading subspace of a layer of width 3072 a sketch finds, for three decays of the spectrum.

    Overlap: mean squared cosine between the two subspaces of `rank` dimensions, 1 if they are equal.
    """
    width, row = 3072, {}
    for decay in (1.0, 1.5, 2.0):
        generator = torch.Generator().manual_seed(0)
        deviations = torch.arange(1, width + 1) ** (-decay / 2)
        exact, sketch = SecondMoment(width), SketchedSecondMoment(width, sketch_columns(options.rank))
        for _ in range(4):
            rows = (torch.randn(2048, width, generator=generator) * deviations).to(options.device)
            exact.update(rows)
            sketch.update(rows)
        leading, found = (s.eigh(centered=True).vectors[:, : options.rank].double() for s in (exact, sketch))
        row[f"overlap_{decay}"] = float((leading.mT @ found).square().sum() / options.rank)
        row[f"variance_share_{decay}"] = float(
            (found.mT @ exact.covariance().double() @ found).trace()
            / exact.eigh(centered=True).values[: options.rank].sum()
        )
    return {"rank": options.rank, "columns": sketch_columns(options.rank), **row}


FLUX_CHECKS = dict(zip(FLUX_MODELS, (flux, flux_layers, flux_sketch), strict=True))


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    options = parse_options(RealSizeOptions, argv, __doc__)
    if options.model in FLUX_CHECKS:
        return print_row(options, FLUX_CHECKS[options.model](options))
    seconds: dict[str, float] = {}
    on_cuda = torch.device(options.device).type == "cuda"

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if on_cuda:
            torch.cuda.synchronize()
        seconds[stage] = time.perf_counter() - start

    with timed("build"):
        dtype = torch.bfloat16 if options.mixed_precision == "bf16" else torch.float32
        family = build(options.model, dtype, options.train_text_encoder, options.device)
    side = options.resolution // 8
    generator = torch.Generator().manual_seed(0)

    def batches(count: int) -> Iterator[dict[str, Tensor]]:
        for index in range(count):
            captions = [f"a noto emoji of red apple {index} {row}" for row in range(options.batch_size)]
            latents = torch.randn(options.batch_size, 4, side, side, generator=generator)
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
        report = initialize(
            family,
            options.init,
            batches(options.num_batches),
            rank=options.rank,
            num_batches=options.num_batches,
            memory_budget_gb=options.memory_budget_gb,
            statistics_device=options.statistics_device,
        )
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
    return print_row(options, row)


if __name__ == "__main__":
    run_script(main)
