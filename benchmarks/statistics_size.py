"""What the statistics of each family take at its published size: layers, groups of shared inputs, bytes.

    python benchmarks/statistics_size.py                        # the table of docs/transformers.md, on the meta device
    python benchmarks/statistics_size.py --solve qwen-image     # one block of each kind, random weights, 2 GB

The transformers are built without weights, and one prediction of the family itself runs through them, so that the
targets and the groups of layers that one tensor feeds are what a collection pass finds. Bytes are those of second
moments in float32, as on a GPU, and of sketches for rank 16.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from lorainit_diffusers import initialize
from lorainit_diffusers.adapters import target_layers
from lorainit_diffusers.budget import GB, MemoryBudget, sketch_columns
from lorainit_diffusers.collect import _SharedInputs
from lorainit_diffusers.families import family_class
from lorainit_diffusers.families.flow_matching import FlowMatchingFamily
from lorainit_diffusers.hooks import observe_inputs
from lorainit_diffusers.statistics import SecondMoment, SketchedSecondMoment
from lorainit_diffusers.training.cli import run_script
from lorainit_diffusers.training.options.parser import ScriptParser

RANK = 16
BUDGETS_GB = (2, 8, 24)


@dataclass(frozen=True)
class Base:
    """A published base.

    Attributes:
        name: In the table.
        family: Its short name.
        transformer: Configuration of its transformer.
        embeds: Shapes of the conditioning of one sample, after the batch; a mask is an empty one.
        latent_channels: Of a latent as the family has it.
        vae: Configuration of its autoencoder, as far as the prediction reads it.
        one_block: What leaves one block of each kind.
        options: Of the family.
        frames: Latents in time; 0 for a family of images.
        narrow: What makes the transformer narrow, as deep as it is. Where a prediction looks at numbers, which nothing
            on the meta device has, the groups are those of the narrow one.
    """

    name: str
    family: str
    transformer: dict[str, Any]
    embeds: dict[str, tuple[int, ...]]
    latent_channels: int
    vae: dict[str, Any]
    one_block: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    frames: int = 0
    narrow: dict[str, int] = field(default_factory=dict[str, int])


IMAGE_VAE = {"block_out_channels": (128, 256, 512, 512), "latent_channels": 16}
CLIP_VAE = {"temperal_downsample": [False, True, True], "z_dim": 16, "scale_factor_spatial": 8}
NUM_TEXT = 64
FLUX2 = {"attention_head_dim": 128, "in_channels": 128}
FLUX2_VAE = {"block_out_channels": (128, 256, 512, 512), "latent_channels": 32}
ONE_OF_EACH = {"num_layers": 1, "num_single_layers": 1}
BASES = (
    Base(
        "SD 3.5 medium",
        "sd3",
        {
            **{"sample_size": 128, "in_channels": 16, "num_layers": 24, "num_attention_heads": 24},
            **{"attention_head_dim": 64, "joint_attention_dim": 4096, "caption_projection_dim": 1536},
            **{"pooled_projection_dim": 2048, "out_channels": 16, "pos_embed_max_size": 384, "qk_norm": "rms_norm"},
            "dual_attention_layers": tuple(range(13)),
        },
        {"prompt_embeds": (NUM_TEXT, 4096), "pooled_prompt_embeds": (2048,)},
        16,
        IMAGE_VAE,
        {"num_layers": 2},
    ),
    Base(
        "FLUX.1 dev",
        "flux",
        {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": True},
        {"prompt_embeds": (NUM_TEXT, 4096), "pooled_prompt_embeds": (768,)},
        16,
        IMAGE_VAE,
        ONE_OF_EACH,
    ),
    Base(
        "Lumina-Image 2.0",
        "lumina2",
        {},
        {"prompt_embeds": (NUM_TEXT, 1024), "prompt_attention_mask": ()},
        16,
        IMAGE_VAE,
        {"num_layers": 1, "num_refiner_layers": 1},
        narrow={"hidden_size": 96, "num_attention_heads": 1, "num_kv_heads": 1},
    ),
    Base(
        "FLUX.2 dev",
        "flux2",
        {**FLUX2, "num_layers": 8, "num_single_layers": 48, "num_attention_heads": 48, "joint_attention_dim": 15360},
        {"prompt_embeds": (NUM_TEXT, 15360)},
        128,
        FLUX2_VAE,
        ONE_OF_EACH,
    ),
    Base(
        "FLUX.2 klein 9B",
        "flux2",
        {
            **{**FLUX2, "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32},
            **{"joint_attention_dim": 12288, "guidance_embeds": False},
        },
        {"prompt_embeds": (NUM_TEXT, 12288)},
        128,
        FLUX2_VAE,
        ONE_OF_EACH,
        {"klein": True},
    ),
    Base(
        "FLUX.2 klein 4B",
        "flux2",
        {
            **{**FLUX2, "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24},
            **{"joint_attention_dim": 7680, "guidance_embeds": False},
        },
        {"prompt_embeds": (NUM_TEXT, 7680)},
        128,
        FLUX2_VAE,
        ONE_OF_EACH,
        {"klein": True},
    ),
    Base(
        "Qwen-Image",
        "qwen_image",
        {"num_layers": 60, "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 3584},
        {"prompt_embeds": (NUM_TEXT, 3584), "prompt_embeds_mask": ()},
        16,
        CLIP_VAE,
        {"num_layers": 1},
    ),
    Base(
        "Z-Image",
        "z_image",
        {},
        {"prompt_embeds": (NUM_TEXT, 2560), "prompt_attention_mask": ()},
        16,
        IMAGE_VAE,
        {"n_layers": 1, "n_refiner_layers": 1},
        narrow={"dim": 128, "n_heads": 1, "n_kv_heads": 1},
    ),
    Base(
        "Sana 1.6B",
        "sana",
        {},
        {"prompt_embeds": (NUM_TEXT, 2304), "prompt_attention_mask": ()},
        32,
        {"encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024), "latent_channels": 32},
        {"num_layers": 1},
    ),
    Base(
        "Wan 2.1 14B",
        "wan",
        {},
        {"prompt_embeds": (NUM_TEXT, 4096)},
        16,
        CLIP_VAE,
        {"num_layers": 1},
        frames=1,
    ),
    Base(
        "Wan 2.1 1.3B",
        "wan",
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        {"prompt_embeds": (NUM_TEXT, 4096)},
        16,
        CLIP_VAE,
        {"num_layers": 1},
        frames=1,
    ),
)


def slug(base: Base) -> str:
    """The base's name on the command line."""
    return base.name.lower().replace(" ", "-")


class _Vae(nn.Module):
    """What a prediction asks of an autoencoder: its configuration."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config


def build(base: Base, device: str, **blocks: int) -> FlowMatchingFamily:
    """The family around a transformer of the published size: no weights on the meta device, random bfloat16 elsewhere.

    It has neither text encoders nor an autoencoder.
    """
    kind: Any = family_class(base.family)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            transformer = kind.DENOISER_CLASS(**{**base.transformer, **blocks})
    finally:
        torch.set_default_dtype(before)
    for name, parameter in transformer.named_parameters():
        if "pad_token" in name and device != "meta":  # left as the memory has them
            nn.init.normal_(parameter)
    tokenizer = SimpleNamespace(model_max_length=77, encode=lambda text: [0, 1])
    parts: dict[str, Any] = dict.fromkeys(kind.TEXT_ENCODERS)
    parts |= {component.replace("text_encoder", "tokenizer"): tokenizer for component in kind.TEXT_ENCODERS}
    scheduler = FlowMatchEulerDiscreteScheduler()
    transformer.requires_grad_(False).eval()
    return kind(**parts, vae=_Vae(base.vae), transformer=transformer, noise_scheduler=scheduler, **base.options)


def draw_batch(base: Base, device: str, generator: torch.Generator | None, side: int = 32) -> dict[str, Tensor]:
    """One sample of random latents and conditioning; a caption without padding."""

    def draw(*shape: int) -> Tensor:
        if generator is None:
            return torch.empty(1, *shape, device=device)
        return torch.randn(1, *shape, generator=generator).to(device)

    device_of_masks = "cpu" if base.family == "qwen_image" else device  # the family looks at its numbers
    batch = {
        name: draw(*shape) if shape else torch.ones(1, NUM_TEXT, dtype=torch.long, device=device_of_masks)
        for name, shape in base.embeds.items()
    }
    frames = (base.frames,) * bool(base.frames)
    return {**batch, "latents": draw(base.latent_channels, *frames, side, side)}


def groups(base: Base) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """The target layers of a base by name, and the first layer of each one's group of shared inputs.

    Raises:
        ValueError: When a target matches no layer, or the prediction reaches a layer not or more than once.
    """
    family: Any = build(base, "meta")
    targets = family.default_targets("transformer")
    layers = target_layers(family.transformer, targets)
    device = "cpu" if base.narrow else "meta"
    running: Any = build(base, device, **base.narrow) if base.narrow else family
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            raise ValueError(f"target {target!r} of {base.name} matches no layer")
    shared, seen = _SharedInputs(), dict[str, int]()

    def on_input(name: str, tensor: Tensor) -> None:
        shared.leader(name, tensor)
        seen[name] = seen.get(name, 0) + 1

    batch = draw_batch(base, device, torch.Generator().manual_seed(0) if base.narrow else None)
    latents = batch.pop("latents").to(torch.bfloat16)
    embeds = {name: values if "mask" in name else values.to(torch.bfloat16) for name, values in batch.items()}
    with torch.no_grad(), observe_inputs(target_layers(running.transformer, targets), on_input):
        running._predict(latents, torch.full((1,), 500.0, device=device), embeds, {})
    if seen != dict.fromkeys(layers, 1):
        wrong = next(name for name in layers if seen.get(name, 0) != 1)
        raise ValueError(f"layer {wrong!r} of {base.name} runs {seen.get(wrong, 0)} times in one prediction")
    return layers, {name: leaders[0] for name, leaders in shared.trace.items()}


@dataclass(frozen=True)
class Size:
    """What the statistics of a base take: bytes without a limit, and (bytes, narrowest sketched width) by budget."""

    layers: int
    groups: int
    exact: int
    budgets: tuple[tuple[int, int | None], ...]


def size(base: Base) -> Size:
    """Count a base's statistics, allocating none."""
    layers, leaders = groups(base)
    widths = {name: layers[name].in_features for name, leader in leaders.items() if name == leader}
    device = torch.device("cuda")

    def admitted(budget_gb: float) -> MemoryBudget:
        budget = MemoryBudget(budget_gb * GB, num_columns=sketch_columns(RANK))
        budget.start(device, lambda value: value)
        table: dict[str, Any] = {}
        for name, width in widths.items():
            budget.admit(name, SecondMoment(width), table)
        for statistic in table.values():
            assert isinstance(statistic, (SecondMoment, SketchedSecondMoment))
        return budget

    exact = sum(SecondMoment(width).num_bytes(device) for width in widths.values())
    limited = [admitted(budget) for budget in BUDGETS_GB]
    return Size(len(layers), len(widths), exact, tuple((each.used, each.first_sketched_width) for each in limited))


def table() -> str:
    """The Markdown table of docs/transformers.md."""
    budgets = " | ".join(f"under {budget} GB" for budget in BUDGETS_GB)
    head = [f"| base | layers | groups of shared inputs | exact | {budgets} |", "|" + "---|" * (4 + len(BUDGETS_GB))]
    return "\n".join([*head, *map(row, BASES)])


def row(base: Base) -> str:
    """A base's line of the table."""
    found = size(base)
    cells = [f"{used / GB:.2f} GB" + (f", sketched from {width}" if width else "") for used, width in found.budgets]
    exact = f"{found.exact / GB:.2f} GB"
    return f"| {base.name} | {found.layers} | {found.groups} | {exact} | {' | '.join(cells)} |"


def solve(base: Base, init: str, budget_gb: float, device: str) -> dict[str, Any]:
    """Collection and factors of one block of each kind with random weights, within a budget."""
    torch.manual_seed(0)
    family: Any = build(base, device, **base.one_block)
    generator = torch.Generator().manual_seed(0)
    batches = [draw_batch(base, device, generator) for _ in range(2)]
    start = time.perf_counter()
    report = initialize(family, init, batches, rank=RANK, memory_budget_gb=budget_gb, progress=False)
    layers = report.layers.values()
    return {
        "base": base.name,
        "layers": len(report.layers),
        "statistics": len({layer.shared_group for layer in layers}),
        "sketched": sum(layer.sketch_columns is not None for layer in layers),
        "peak_statistics_gb": report.peak_statistics_bytes / GB,
        "seconds": time.perf_counter() - start,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, or one line of JSON for each base that is solved."""
    parser = ScriptParser(__doc__)
    known: dict[str, Base] = {slug(base): base for base in BASES}
    parser.add_argument("--solve", nargs="+", choices=tuple(known), default=(), help="bases to initialise a block of")
    parser.add_argument("--init", default="cntlora")
    parser.add_argument("--memory_budget_gb", type=float, default=2.0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    show: Callable[[Any], None] = print
    for name in args.solve:
        show(json.dumps(solve(known[name], args.init, args.memory_budget_gb, args.device)))
    if not args.solve:
        show(table())


if __name__ == "__main__":
    run_script(main)
