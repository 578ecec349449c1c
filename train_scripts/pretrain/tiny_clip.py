"""Pretrains the bundled tiny CLIP, which scores generated emoji: emoji and line icons -> CLIPModel and its processor.

Its scores are computed on held-out concepts in held-out styles, so it is shown neither: no picture of these concepts in
any style, no picture in these styles, and no cat. Black-line drawings are imitated from the other pictures.

One otherwise idle CPU core needs about half an hour. Training ends after its wall-time or step budget, writes
checkpoints, and continues from the last one when the same command is run again:

    python train_scripts/pretrain/tiny_clip.py --work_dir runs/tiny-clip --output_dir assets/models/tiny-clip
"""

from __future__ import annotations

import json
import math
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from recipe_options import TinyClipOptions

from lorainit_diffusers.training.cli import run_script
from lorainit_diffusers.training.options.parser import parse_options


def parse_args(argv: Sequence[str] | None = None) -> TinyClipOptions:
    """The options of the command line."""
    return parse_options(TinyClipOptions, argv, __doc__)


if __name__ == "__main__":
    run_script(parse_args)  # a mistake in the options is answered before the imports below, which take seconds

import emoji_pictures as emoji
import torch
from cards import num_parameters, picture_source, write_card
from clip_augmentation import augment
from clip_data import NUM_DESCRIPTIONS, Batches, check_disjoint, held_out_concepts, render_data
from clip_model import build_model, contrastive_loss, embed_images, embed_texts, evaluate
from safetensors.torch import load_file
from shared import (
    IMAGE_SIZE,
    MAX_TOKENS,
    Budget,
    Model,
    Progress,
    claim_model_dir,
    load_checkpoint,
    running_loss,
    save_checkpoint,
    save_half,
    update_averages,
)
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from lorainit_diffusers.training.output_dir import owning

# What a query is compared with in the figures, by their names.
CANDIDATES = {"text": "captions", "image": "pictures in another style", "pixels": "the same, raw pixels instead"}


# ------------------------------------------------------------------------------------------------------ training


def batch_loss(
    model: Model, images: Tensor, batches: Batches, step: int, dropped: float, options: TinyClipOptions
) -> Tensor:
    """Mean of image-caption losses, plus image-image (one concept, two pictures), plus name-description (text only)."""
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
    device = model.logit_scale.device
    first, second = batches.draw(step, options.batch_size, options.seed)
    indices = torch.cat([first, second])
    pixels, drawn, odd = augment(images[indices].float() / 255, generator)
    ids = batches.captions(indices, drawn, odd, generator)
    num_texts = options.batch_size // 2
    chosen = torch.randint(len(batches.text_names), (num_texts,), generator=generator)
    variant = torch.randint(NUM_DESCRIPTIONS, (num_texts,), generator=generator)
    ids = torch.cat([ids, batches.text_names[chosen], batches.text_descriptions[chosen, variant]])
    kept = None
    if dropped:
        num_patches = (IMAGE_SIZE // model.config.vision_config.patch_size) ** 2
        order = torch.rand(len(pixels), num_patches, generator=generator).argsort(1)
        kept = order[:, : num_patches - int(dropped * num_patches)].to(device)

    with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
        image_embeds = embed_images(model, pixels.to(device), kept)
        text_embeds = embed_texts(model, ids.to(device))
    images_1, images_2 = image_embeds.chunk(2)
    texts_1, texts_2, names, descriptions = text_embeds.split([len(first), len(second), len(chosen), len(chosen)])
    scale = model.logit_scale.exp()
    captioned = (contrastive_loss(images_1, texts_1, scale) + contrastive_loss(images_2, texts_2, scale)) / 2
    paired = contrastive_loss(images_1, images_2, scale)
    described = contrastive_loss(names, descriptions, scale)
    return captioned + options.pair_weight * paired + options.text_weight * described


def build_optimizers(named: Mapping[str, nn.Parameter], options: TinyClipOptions) -> list[Optimizer]:
    """Muon for the matrices inside the transformers, AdamW for everything else.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) needs fewer steps, and steps are what one CPU
    core has few of.

    Raises:
        ImportError: torch is too old.
    """
    if not hasattr(torch.optim, "Muon"):
        raise ImportError(f"torch {torch.__version__} has no optimizer Muon; pip install 'torch>=2.9' for this recipe")
    inner = {name for name, p in named.items() if p.ndim == 2 and ".layers." in name}
    matrices = [p for name, p in named.items() if name in inner]
    others = [p for name, p in named.items() if name not in inner]
    return [
        torch.optim.Muon(
            matrices,
            lr=options.matrix_lr,
            weight_decay=options.weight_decay,
            momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=options.lr, weight_decay=0.02, betas=(0.9, 0.98), fused=True),
    ]


class Weights:
    """The parameters of a CLIP, their averages and their optimisers, as a checkpoint holds them."""

    def __init__(self, model: Model, options: TinyClipOptions) -> None:
        self.named: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.optimizers = build_optimizers(self.named, options)
        self.groups: list[dict[str, Any]] = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self.full_rates: list[float] = [group["lr"] for group in self.groups]
        self.ema = {name: p.detach().clone() for name, p in self.named.items()}

    def restore(self, path: Path) -> Progress:
        """Take everything from a checkpoint, where there is one; where the training is."""
        if not path.exists():
            return Progress()
        tensors, state = load_checkpoint(path)
        for name, p in self.named.items():
            p.data.copy_(tensors[f"model.{name}"])
            self.ema[name].copy_(tensors[f"ema.{name}"])
        names = {p: name for name, p in self.named.items()}
        for optimizer in self.optimizers:
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                prefix = f"optimizer.{names[p]}."
                moments = {k.removeprefix(prefix): v.to(p.device) for k, v in tensors.items() if k.startswith(prefix)}
                optimizer.state[p] = moments
        return Progress(int(state["step"]), state["elapsed_s"], state["loss"])

    def save(self, path: Path, progress: Progress) -> None:
        """Write a checkpoint."""
        tensors: dict[str, Tensor] = {f"model.{name}": p for name, p in self.named.items()}
        tensors |= {f"ema.{name}": p for name, p in self.ema.items()}
        for name, p in self.named.items():
            moments = next(optimizer.state[p] for optimizer in self.optimizers if p in optimizer.state)
            tensors |= {f"optimizer.{name}.{key}": value for key, value in moments.items()}
        save_checkpoint(path, tensors, progress._asdict())

    def step(self, factor: float) -> None:
        """One step along the gradients, which are then gone; the learning rates are `factor` of the full ones."""
        for group, rate in zip(self.groups, self.full_rates, strict=True):
            group["lr"] = factor * rate
        nn.utils.clip_grad_norm_(self.named.values(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def train(model: Model, images: Tensor, batches: Batches, options: TinyClipOptions) -> None:
    """Trains until the budget is used up, and leaves the averaged (EMA) parameters in the model; resumes by itself.

    Batches and augmentation are functions of (seed, step), so a resumed run repeats what an uninterrupted one does
    (exactly so with a step budget; with a time budget the learning rate follows the clock).

    Raises:
        ValueError: There is neither a step nor a time budget.
        FloatingPointError: The loss is not finite.
    """
    if not (options.steps or options.minutes):
        raise ValueError("--minutes and --steps are both 0, training would never end; set one")
    budget, weights = Budget(options.minutes, options.steps), Weights(model, options)
    path = options.work_dir / "checkpoint.safetensors"
    step, elapsed_s, running = weights.restore(path)
    bar = tqdm(desc="train", initial=step, total=options.steps or None, mininterval=10)
    last = last_checkpoint = time.monotonic()
    while True:
        elapsed_s, last = elapsed_s + time.monotonic() - last, time.monotonic()
        progress = budget.progress(step, elapsed_s)
        if step and (progress >= 1 or last - last_checkpoint > options.checkpoint_s):
            weights.save(path, Progress(step, elapsed_s, running))
            last_checkpoint = time.monotonic()
        if progress >= 1:
            break
        # Whole images at the end: that is what the model is used on.
        dropped = options.patch_dropout if progress < 0.85 else 0.0
        loss = batch_loss(model, images, batches, step, dropped, options)
        cast(Any, loss).backward()
        weights.step(min(1.0, (step + 1) / 50) * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * progress))))
        model.logit_scale.data.clamp_(max=math.log(100))
        step += 1
        update_averages(weights.ema, weights.named, step, options.ema_decay)
        if step % 10 == 0:
            running = running_loss(running, loss.item(), "train", step)
            bar.set_postfix(loss=f"{running:.3f}")
        bar.update()
    bar.close()
    for name, p in weights.named.items():
        p.data.copy_(weights.ema[name])


# -------------------------------------------------------------------------------------------------------- export


def save_model(model: Model, directory: Path, tokenizer_dir: Path) -> None:
    """Writes model, image processor and tokenizer over `directory`, in half precision."""

    def save_rest(path: Path) -> None:
        side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIZE}, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ).save_pretrained(path)
        for file in sorted(tokenizer_dir.iterdir()):
            shutil.copyfile(file, path / file.name)

    save_half(model, directory, save_rest)


def hardware() -> str:
    """What this machine has."""
    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{threads} of {platform.machine()} CPU"


def write_model_card(
    model: Model, data: Mapping[str, Any], results: Mapping[str, Any], options: TinyClipOptions
) -> None:
    """Writes `README.md` beside the weights."""
    state = load_checkpoint(options.work_dir / "checkpoint.safetensors")[1]
    minutes, step = state["elapsed_s"] / 60, int(state["step"])
    records = data["train"]
    emoji_names = {record["name"] for record in records if record["style"] in emoji.BASE_STYLES}
    uses = dict.fromkeys(emoji.BASE_STYLES, "training, figures") | dict.fromkeys(emoji.LINE_ICONS, "training")
    uses |= {**dict.fromkeys(emoji.HELD_OUT_STYLES, "figures"), "emojibase": "names, tags and groups"}
    vision, text = model.config.vision_config, model.config.text_config
    write_card(
        options.output_dir,
        "tiny_clip.md.jinja",
        dim=model.config.projection_dim,
        parameters={"vision": num_parameters(model.vision_model), "text": num_parameters(model.text_model)},
        vision_width=vision.hidden_size,
        vision_layers=vision.num_hidden_layers,
        text_width=text.hidden_size,
        text_layers=text.num_hidden_layers,
        max_tokens=MAX_TOKENS,
        vocab_size=text.vocab_size,
        num_concepts=len({record["name"] for record in data["heldout"]}),
        styles=emoji.BASE_STYLES,
        figures=[
            {"style": style, "candidates": label, "recall": scores[kind]}
            for style, scores in results.items()
            for kind, label in CANDIDATES.items()
        ],
        num_images=len(records),
        num_emoji=len(emoji_names),
        num_lines=len({record["name"] for record in records} - emoji_names),
        pair_weight=options.pair_weight,
        text_weight=options.text_weight,
        num_steps=step,
        batch_size=options.batch_size,
        minutes=minutes,
        loss=state["loss"],
        hardware=options.hardware or hardware(),
        date=options.date,
        seed=options.seed,
        flags=f"--minutes {minutes:.0f}" if options.minutes else f"--minutes 0 --steps {step}",
        sources=[picture_source(key, use=use) for key, use in uses.items()],
    )


# ---------------------------------------------------------------------------------------------------------- main


@owning
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the phases in order; what is finished is skipped."""
    options = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(options.seed)
    model_dir = claim_model_dir(options, "tiny_clip")
    options.work_dir.mkdir(parents=True, exist_ok=True)
    if "data" in options.phases and not (options.work_dir / "images.safetensors").exists():
        render_data(options.work_dir, options.cache_dir, options.data_dir, options.seed)
    images = load_file(options.work_dir / "images.safetensors")
    data = json.loads((options.work_dir / "records.json").read_text(encoding="utf-8"))
    check_disjoint(data["train"], held_out_concepts(options.data_dir))
    tokenizer = CLIPTokenizer.from_pretrained(options.tokenizer_dir, trust_remote_code=False)
    model = build_model(tokenizer).to(device)
    if device.type == "cpu":
        # The fused attention's backward pass is slow for few tokens on a CPU: plain attention trains 1.3x as fast.
        model.set_attn_implementation("eager")
    if "train" in options.phases:
        train(model, images["train"], Batches(data, tokenizer), options)
    if model_dir is not None:
        model_dir.begin(anew=True)
        checkpoint = options.work_dir / "checkpoint.safetensors"
        if not checkpoint.exists():
            raise FileNotFoundError(f"{checkpoint} is missing; run the phase `train` first")
        tensors, _ = load_checkpoint(checkpoint)
        model.load_state_dict({name: tensors[f"ema.{name}"] for name, _ in model.named_parameters()}, strict=False)
        save_model(model, options.output_dir, options.tokenizer_dir)
        # as saved: the weights went through half precision
        saved: Model = CLIPModel.from_pretrained(options.output_dir, trust_remote_code=False)
        results = evaluate(saved, tokenizer, images["heldout"], data["heldout"])
        (options.work_dir / "figures.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(results, indent=2))
        write_model_card(saved, data, results, options)


if __name__ == "__main__":
    run_script(main)
