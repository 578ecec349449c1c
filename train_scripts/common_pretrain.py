"""What the recipes of the tiny models share: training with checkpoints, text, latents, samples, model cards."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import emoji
import torch
import torch.distributed as dist
from common import load_checkpoint, save_checkpoint
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from lorainit_diffusers.files import filling
from lorainit_diffusers.training.output_dir import RunDirectory, Wish, claim_directory

Model = Any  # models, schedulers and pipelines: their libraries annotate them too narrowly to check calls
IMAGE_SIZE = 64
MAX_TOKENS = 16
GRID_NAMES = (
    "red-apple",
    "grinning-face",
    "smiling-face-with-heart-eyes",
    "dog-face",
    "penguin",
    "automobile",
    "sunflower",
    "pizza",
    "guitar",
    "house",
)


def start_process(seed: int) -> tuple[torch.device, int, int]:
    """Joins the processes that torchrun started, if it did; returns (device, rank, number of processes)."""
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        torch.set_num_threads(1)
    torch.manual_seed(seed)
    return device, rank, world_size


def tokenize(tokenizer: Model, texts: list[str]) -> Tensor:
    """Token ids `(len(texts), MAX_TOKENS)`."""
    batch = tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    return batch["input_ids"]


def batch_indices(step: int, batch_size: int, num_images: int, seed: int) -> Tensor:
    """Indices of the batch of a step: each epoch is a permutation that depends on nothing but seed and epoch."""
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    indices = torch.empty_like(positions)
    for epoch in positions.div(num_images, rounding_mode="floor").unique().tolist():
        order = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        inside = positions.div(num_images, rounding_mode="floor") == epoch
        indices[inside] = order[positions[inside] % num_images]
    return indices


def caption_tokens(
    tokenizer: Model, records: Sequence[Mapping[str, str]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids of all captions, of all captions without a style, and of the empty one."""
    full = tokenize(tokenizer, [emoji.caption(record["style"], record["name"]) for record in records])
    plain = tokenize(tokenizer, [emoji.caption(None, record["name"]) for record in records])
    return full.to(device), plain.to(device), tokenize(tokenizer, [""]).to(device)


def draw_batch(
    latents: tuple[Tensor, Tensor],
    tokens: tuple[Tensor, Tensor, Tensor],
    step: int,
    batch_size: int,
    seed: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """This process's batch of a step: (clean latents, noise, token ids, levels of noise).

    Captions are 80 % full, 10 % without the style, 10 % empty. The levels, in [0, 1), are one of each stratum: the loss
    of a small batch then varies less.

    Args:
        latents: Posterior means and standard deviations of all images, normalised.
        tokens: As `caption_tokens` gives them.
        step: Number of the step.
        batch_size: Images of one process.
        seed: Of the order of the images.
        generator: Of the latents' device.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    (mean, std), (full, plain, empty) = latents, tokens
    device = mean.device
    indices = batch_indices(step, batch_size * world_size, len(mean), seed)[rank::world_size].to(device)
    clean = mean[indices] + std[indices] * torch.randn(mean[indices].shape, generator=generator, device=device)
    noise = torch.randn(clean.shape, generator=generator, device=device)
    choice = torch.rand(len(indices), 1, generator=generator, device=device)
    ids = torch.where(choice < 0.1, empty, torch.where(choice < 0.2, plain[indices], full[indices]))
    offsets = torch.rand(len(indices), generator=generator, device=device)
    return clean, noise, ids, (torch.arange(len(indices), device=device) + offsets) / len(indices)


def train(
    phase: str,
    module: nn.Module,
    loss_fn: Callable[[int, torch.Generator], Tensor],
    args: argparse.Namespace,
    device: torch.device,
    lr: float,
    final_lr: float,
    on_checkpoint: Callable[[dict[str, Tensor], int], None] | None = None,
) -> dict[str, Tensor]:
    """Trains the parameters that require a gradient until the phase's budget is used up; resumes by itself.

    Noise and batches are functions of (seed, step, rank), so a resumed run repeats what an uninterrupted one does.

    Returns:
        The averaged (EMA) parameters by name.

    Raises:
        ValueError: The phase has neither a step nor a time budget.
        FloatingPointError: The loss is not finite.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    max_steps, max_s = getattr(args, f"{phase}_steps"), 60 * getattr(args, f"{phase}_minutes")
    if not (max_steps or max_s):
        raise ValueError(f"--{phase}_minutes and --{phase}_steps are both 0, it would never end; set one")
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    parameters = list(named.values())
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema = {name: p.detach().clone() for name, p in named.items()}
    path = args.work_dir / phase / "checkpoint.safetensors"
    step, elapsed_s, running = 0, 0.0, float("nan")
    if path.exists():
        tensors, state = load_checkpoint(path)
        step, elapsed_s, running = int(state["step"]), state["elapsed_s"], state["loss"]
        for name, p in named.items():
            p.data.copy_(tensors[f"model.{name}"])
            ema[name].copy_(tensors[f"ema.{name}"])
            moments = {key: tensors[f"{key}.{name}"].to(device) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": torch.tensor(float(step), device=device), **moments}

    def checkpoint() -> None:
        if rank == 0:
            tensors = {f"model.{name}": p for name, p in named.items()} | {f"ema.{k}": v for k, v in ema.items()}
            for key in ("exp_avg", "exp_avg_sq"):
                tensors |= {f"{key}.{name}": optimizer.state[p][key] for name, p in named.items()}
            state = {"step": step, "elapsed_s": elapsed_s, "loss": running, "num_processes": world_size}
            save_checkpoint(path, tensors, state)
            if on_checkpoint is not None:
                on_checkpoint(ema, step)

    bar = tqdm(desc=phase, initial=step, total=max_steps or None, disable=rank != 0, mininterval=10)
    last, last_checkpoint = time.monotonic(), time.monotonic()
    while True:
        elapsed_s, last = elapsed_s + time.monotonic() - last, time.monotonic()
        progress = max(step / max_steps if max_steps else 0.0, elapsed_s / max_s if max_s else 0.0)
        due = last - last_checkpoint > args.checkpoint_s
        if world_size > 1:  # the ranks' clocks differ: rank 0 decides
            decision = torch.tensor([progress, float(due)], device=device)
            dist.broadcast(decision, 0)
            progress, due = decision[0].item(), bool(decision[1] > 0)
        if step and (due or progress >= 1):
            checkpoint()
            last_checkpoint = time.monotonic()
        if progress >= 1:
            break
        warmup = min(1.0, (step + 1) / 200)
        decay = 0.5 + 0.5 * math.cos(math.pi * max(0.0, (progress - 0.4) / 0.6))
        for group in optimizer.param_groups:
            group["lr"] = warmup * (final_lr + (lr - final_lr) * decay)
        generator = torch.Generator(device).manual_seed((args.seed * 1_000_003 + step) * 64 + rank)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            loss = loss_fn(step, generator)
        loss.backward()
        if world_size > 1:
            average_gradients(parameters, world_size)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        ema_decay = min(args.ema_decay, step / (step + 10))
        with torch.no_grad():
            for average, p in zip(ema.values(), parameters, strict=True):
                average.lerp_(p, 1 - ema_decay)
        if rank == 0 and step % 10 == 0:
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(f"{phase}: loss is {value} at step {step}; lower the learning rate")
            running = value if math.isnan(running) else 0.95 * running + 0.05 * value
            bar.set_postfix(loss=f"{running:.4f}")
            if step % 50 == 0:
                line = {"step": step, "elapsed_s": round(elapsed_s, 1), "loss": running}
                with (args.work_dir / f"{phase}.jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps(line) + "\n")
        bar.update()
    return ema


def average_gradients(parameters: list[nn.Parameter], world_size: int) -> None:
    """Replaces each rank's gradients by their mean, in one message."""
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([grad.flatten() for grad in grads]).div_(world_size)
    dist.all_reduce(flat)
    for p, chunk in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = chunk.view_as(p)


def load_ema(module: nn.Module, ema: dict[str, Tensor]) -> None:
    """Copies averaged parameters into a module."""
    for name, p in module.named_parameters():
        if name in ema:
            p.data.copy_(ema[name])


def waves(side: int, width: int) -> Tensor:
    """Sines and cosines of row and column of a `side` x `side` grid, `(side**2, width)`: positions to start from."""
    frequencies = 100 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side).view(-1, 1) * frequencies
    half = torch.cat([angles.sin(), angles.cos()], 1)
    rows = half.unsqueeze(1).expand(side, side, -1)
    return torch.cat([rows, rows.transpose(0, 1)], 2).reshape(side**2, width)


# ------------------------------------------------------------------------- the classifier and the vision-language model


def load_styles(args: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, list[str]], dict[str, str]]:
    """The pictures of `emoji.render_styles`, rendered if need be: images and names by style, subgroups by name."""
    path = args.work_dir / "styles.safetensors"
    if "data" in args.phases and not path.exists() and (not dist.is_initialized() or dist.get_rank() == 0):
        emoji.render_styles(path, args.cache_dir, IMAGE_SIZE)
    if dist.is_initialized():
        dist.barrier()
    data = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return load_file(path), data["names"], data["subgroups"]


def load_trained(args: argparse.Namespace, phase: str, module: nn.Module) -> None:
    """Copies the averaged parameters of a phase's checkpoint into a module.

    Raises:
        FileNotFoundError: The phase has not run.
    """
    checkpoint = args.work_dir / phase / "checkpoint.safetensors"
    if not checkpoint.exists():
        raise FileNotFoundError(f"{checkpoint} is missing; run the phase `{phase}` first")
    tensors, _ = load_checkpoint(checkpoint)
    load_ema(module, {name.removeprefix("ema."): value for name, value in tensors.items() if name.startswith("ema.")})


def claim_model_dir(args: argparse.Namespace, script: str) -> RunDirectory | None:
    """The directory that a recipe's model goes to, in the process that exports it; nobody's files are replaced.

    The caller is decorated with `output_dir.owning`, and calls `begin` before it writes.

    Raises:
        ValueError: When the directory holds files that no run of this recipe wrote.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    if "export" not in args.phases or rank != 0:
        return None
    return claim_directory(Wish(args.output_dir, script, goes_on=True))


def save_half(model: Model, directory: Path, save_rest: Callable[[Path], None]) -> None:
    """Writes a model of transformers over `directory`, in half precision, with what `save_rest` writes beside it."""
    with filling(directory) as scratch:
        _save_half(model, scratch)
        save_rest(scratch)


def _save_half(model: Model, scratch: Path) -> None:
    model.half().save_pretrained(scratch)
    config_path = scratch / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    for part in (config, *(config[name] for name in ("text_config", "vision_config") if name in config)):
        part["dtype"] = "float32"  # transformers 5 loads in the type that the config names
        part.pop("_name_or_path", None)  # a path of one machine
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _hardware() -> str:
    """What this machine has."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} {platform.machine()} cores"


def card_fields(args: argparse.Namespace, phase: str, names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """What the model cards say of data, training and licences, by the names of their fields.

    Args:
        args: Of the recipe.
        phase: Its training.
        names: Concepts by style, of training and figures.
    """
    state = load_checkpoint(args.work_dir / phase / "checkpoint.safetensors")[1]
    minutes, step, processes = state["elapsed_s"] / 60, int(state["step"]), int(state["num_processes"])
    num_images = sum(len(names[style]) for style in emoji.CLASSIFIER_STYLES)
    together = args.batch_size * processes
    sources = ""
    for key in (*names, "emojibase"):
        package = emoji.PACKAGES[key]
        use = "training" if key in emoji.CLASSIFIER_STYLES else "names and groups" if key == "emojibase" else "figures"
        sources += f"| {package.source} | {package.name} {package.version} | {package.licence} | {use} |\n"
    return {
        "num_images": f"{num_images:,}",
        "num_concepts": len(set().union(*(names[style] for style in emoji.CLASSIFIER_STYLES))),
        "styles": ", ".join(emoji.CLASSIFIER_STYLES),
        "result": f"{step:,} steps of {together} pictures ({step * together / num_images:.0f} exposures of each) in "
        f"{minutes:.0f} minutes, loss {state['loss']:.3f}",
        "hardware": args.hardware or _hardware(),
        "date": args.date,
        "seed": args.seed,
        "launcher": "python" if processes == 1 else f"torchrun --nproc_per_node {processes}",
        "flags": f"--{phase}_minutes {minutes:.0f}"
        if getattr(args, f"{phase}_minutes")
        else f"--{phase}_minutes 0 --{phase}_steps {step}",
        "sources": sources,
    }


# ---------------------------------------------------------------------------------------------- the diffusion bases


@torch.no_grad()
def encode(vae: Model, pixels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Posterior means and standard deviations of uint8 images."""
    parts = [vae.encode(chunk.to(device).float() / 127.5 - 1).latent_dist for chunk in pixels.split(128)]
    return torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts])


def rename_weights(path: Path, pattern: str, replacement: str) -> None:
    """Give the tensors of a file the names that they have in published checkpoints, which transformers 4 needs.

    transformers 5 writes some without a prefix that it understands with and without; 4 would leave out what they hold,
    and fill the model with random numbers instead.
    """
    state = {re.sub(pattern, replacement, name): tensor for name, tensor in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})


def save_pipeline(pipeline: Model, directory: Path, tokenizer_dir: Path) -> None:
    """Writes the pipeline in half precision, with the tokenizer files of old and new transformers, over `directory`."""
    with filling(directory) as scratch:
        _save_pipeline(pipeline, scratch, tokenizer_dir)


def _save_pipeline(pipeline: Model, scratch: Path, tokenizer_dir: Path) -> None:
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.half()
    pipeline.save_pretrained(scratch)
    for config_path in scratch.glob("*/config.json"):
        config = json.loads(config_path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)  # where a component was read from is a path of one machine
        if config_path.parent.name.startswith("text_encoder"):
            # transformers 5 loads in the type that the config names, diffusers in float32 unless told otherwise:
            # without this, a plain `from_pretrained` would mix the two.
            config["dtype"] = "float32"
            if config["architectures"] == ["CLIPTextModel"]:
                rename_weights(config_path.parent / "model.safetensors", r"^(?!text_model\.)", "text_model.")
        config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for component in ("tokenizer", "tokenizer_2"):
        for name in ("vocab.json", "merges.txt"):
            if (scratch / component).is_dir():
                shutil.copyfile(tokenizer_dir / name, scratch / component / name)
    for path in scratch.glob("*/tokenizer_config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("extra_special_tokens", None)  # a list, which transformers 4 does not know
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    index = scratch / "model_index.json"
    text = index.read_text(encoding="utf-8")
    # transformers 4 has another class for T5's tokenizer without a SentencePiece file
    index.write_text(text.replace('"T5Tokenizer"', '"T5TokenizerFast"'), encoding="utf-8")


@torch.no_grad()
def sample_grid(pipeline: Model, path: Path, names: Sequence[str], num_steps: int, **options: Any) -> None:
    """Writes a grid of samples: one row per style, one column per concept; the pipeline is called with `options`."""
    options = {"num_inference_steps": num_steps, "guidance_scale": 4.0, **options}
    pipeline.set_progress_bar_config(disable=True)
    grid = Image.new("RGB", (IMAGE_SIZE * len(names), IMAGE_SIZE * len(emoji.BASE_STYLES)), "white")
    for row, style in enumerate(emoji.BASE_STYLES):
        generators = [torch.Generator().manual_seed(0) for _ in names]
        prompts = [emoji.caption(style, name) for name in names]
        images = pipeline(prompts, generator=generators, **options).images
        for column, image in enumerate(images):
            grid.paste(image, (IMAGE_SIZE * column, IMAGE_SIZE * row))
    grid.save(path)
