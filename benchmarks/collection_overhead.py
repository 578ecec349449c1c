"""What an initialisation costs on top of the forward passes that it makes.

    python benchmarks/collection_overhead.py --model tiny-sd
    python benchmarks/collection_overhead.py --model sd15        # SD-1.5-sized UNet with random weights, about 10 GB

Runs the same batches through the bare model and through `initialize` and prints one row a method. `overhead` is
(statistics + solve seconds) / forward seconds, all from the report of one run; `wall ratio` is the whole call over
the bare passes, timed from outside.
"""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from lorainit_diffusers import initialize
from lorainit_diffusers.families.latent_diffusion import UNET_TARGETS
from lorainit_diffusers.training.cli import run_script
from lorainit_diffusers.training.options.parser import ScriptParser

BUNDLED_BASE = Path(__file__).resolve().parent.parent / "assets" / "models" / "tiny-sd"
# UNet2DConditionModel's defaults are Stable Diffusion 1.x except for these.
SD15_CONFIG = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
METHODS_TO_TIME = ("cntlora", "eva", "corda", "lora_ga")


def main(argv: list[str] | None = None) -> list[dict[str, object]]:
    parser = ScriptParser(__doc__)
    parser.add_argument("--model", choices=("tiny-sd", "sd15"), default="tiny-sd")
    parser.add_argument("--pretrained_model_name_or_path", default=str(BUNDLED_BASE), help="base for --model tiny-sd")
    parser.add_argument("--init", nargs="+", default=list(METHODS_TO_TIME), help="methods to time")
    parser.add_argument("--num_batches", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=None, help="default 8 for tiny-sd, 4 for sd15")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    batch_size = args.batch_size or (8 if args.model == "tiny-sd" else 4)

    def load() -> UNet2DConditionModel:
        if args.model == "tiny-sd":
            return UNet2DConditionModel.from_pretrained(
                args.pretrained_model_name_or_path, subfolder="unet", torch_dtype=torch.float32, trust_remote_code=False
            )
        torch.manual_seed(args.seed)
        return UNet2DConditionModel(**SD15_CONFIG)

    unet = load().requires_grad_(False).eval()
    side, num_tokens = (8, 16) if args.model == "tiny-sd" else (32, 77)
    shape = (args.num_batches, batch_size)
    latents = torch.randn(*shape, unet.config.in_channels, side, side)
    embeddings = torch.randn(*shape, num_tokens, unet.config.cross_attention_dim)
    # The shape of a scheduled pass: timesteps stratified over the whole range.
    timesteps = (torch.rand(shape) + torch.randperm(args.num_batches)[:, None]) / args.num_batches * 1000

    def loss_fn(index: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.mixed_precision == "bf16"):
            output = unet(latents[index], timesteps[index].long(), embeddings[index], return_dict=False)[0]
        return output.float().square().mean()

    with torch.no_grad():
        loss_fn(0)  # warm up
    rows: list[dict[str, object]] = []
    for name in args.init:
        start = time.perf_counter()
        with torch.no_grad():
            for index in range(args.num_batches):
                loss_fn(index)
        bare_s = time.perf_counter() - start
        start = time.perf_counter()
        report = initialize(
            unet, name, range(args.num_batches), loss_fn, rank=args.rank, target_modules=list(UNET_TARGETS), seed=0
        )
        wall_s = time.perf_counter() - start
        rows.append(
            {
                "init": name,
                "layers": len(report.layers),
                "statistics": len({layer.shared_group for layer in report.layers.values()}),
                "bare_s": round(bare_s, 2),
                "forward_s": round(report.forward_s, 2),
                "statistics_s": round(report.statistics_s, 2),
                "solve_s": round(report.solve_s, 2),
                "overhead": round(report.overhead or 0.0, 3),
                "wall_ratio": round(wall_s / bare_s, 3),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
        unet = load().requires_grad_(False).eval()  # without the adapter that was just attached
    header = list(rows[0])
    print(
        f"\n{args.model}, {args.num_batches} x {batch_size}, rank {args.rank}, {args.mixed_precision}, "
        f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}, seed {args.seed}"
    )
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(str(row[key]) for key in header) + " |")
    return rows


if __name__ == "__main__":
    run_script(main)
