r"""Pretrains the bundled tiny ViT: emoji in three styles -> ViTForImageClassification and its image processor.

It learns to name the concept of a picture, with a head that is thrown away, and the subgroup of emojibase that the
concept belongs to, with the head that is kept. It sees three styles; a LoRA then adapts it to another one.

Two processes on a 2-core CPU need about three quarters of an hour (one process: leave out torchrun). Training ends
after its wall-time or step budget, writes checkpoints, and continues from the last one when the same command is run
again:

    torchrun --nproc_per_node 2 train_scripts/pretrain/tiny_vit.py --work_dir runs/tiny-vit \
        --output_dir assets/models/tiny-vit
"""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipe_options import TinyVitOptions

from lorainit_diffusers.training.cli import run_script
from lorainit_diffusers.training.options.parser import parse_options


def parse_args(argv: Sequence[str] | None = None) -> TinyVitOptions:
    """The options of the command line."""
    return parse_options(TinyVitOptions, argv, __doc__)


if __name__ == "__main__":
    run_script(parse_args)  # a mistake in the options is answered before the imports below, which take seconds

import emoji_pictures as emoji
import torch
import torch.nn.functional as F
from cards import card_fields, num_parameters, write_card
from shared import (
    IMAGE_SIZE,
    Budget,
    Model,
    Phase,
    batch_indices,
    claim_model_dir,
    load_styles,
    load_trained,
    rank_and_count,
    save_half,
    start_process,
    train,
    waves,
)
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from lorainit_diffusers.families.augment import Augmentation
from lorainit_diffusers.training.output_dir import owning

PATCH_SIZE = 8
# The first steps see whole pictures that are changed a little. Then the pictures change so much that shapes count more
# than colours, which tell little about an emoji in another style; and all but one step of four see half of the patches.
EASY_STEPS = 1720
WHOLE_EVERY = 4
EASY = Augmentation(
    crop_scale=(0.5, 1.3),
    crop_ratio=0.8,
    rotation=15,
    flip=0.5,
    brightness=0.3,
    contrast=0.3,
    saturation=0.5,
    grayscale=0.15,
    permute_channels=0.2,
    erase=0.2,
)
HARD = dataclasses.replace(EASY, contrast=0.8, saturation=1.0, grayscale=0.3, permute_channels=0.3, invert=0.1)


class Recipe(nn.Module):
    """The model that is kept and the head that names concepts."""

    def __init__(self, classes: list[str], num_concepts: int) -> None:
        super().__init__()
        sizes: dict[str, Any] = {
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_labels": len(classes),
            "id2label": dict(enumerate(classes)),
            "label2id": {name: index for index, name in enumerate(classes)},
        }
        config = ViTConfig(**sizes)
        self.model: Model = ViTForImageClassification(config)
        self.concept_head = nn.Linear(config.hidden_size, num_concepts)
        side = IMAGE_SIZE // PATCH_SIZE
        with torch.no_grad():  # neighbours start out similar: a transformer takes long to find that out by itself
            self.model.vit.embeddings.position_embeddings[0, 1:] = 0.3 * waves(side, config.hidden_size)

    def forward(self, pixels: Tensor, concepts: Tensor, classes: Tensor, kept: Tensor | None) -> Tensor:
        """Cross entropy of the concepts, and of the classes where there is one (a class of -100 is none).

        Args:
            pixels: `(batch, 3, height, width)` in [0, 1].
            concepts: `(batch,)`.
            classes: `(batch,)`.
            kept: `(batch, num_kept)` indices of the patches that the transformer sees; all if None. Leaving half of
                them out halves the cost of a step and regularises ("Scaling Language-Image Pre-training via Masking",
                arXiv 2212.00794).
        """
        vit = self.model.vit
        hidden = vit.embeddings(pixels * 2 - 1)
        if kept is not None:
            patches = hidden[:, 1:].gather(1, kept.unsqueeze(2).expand(-1, -1, hidden.shape[2]))
            hidden = torch.cat([hidden[:, :1], patches], 1)
        for layer in vit.layers if hasattr(vit, "layers") else vit.encoder.layer:  # transformers 5, transformers 4
            hidden = layer(hidden)
        hidden = vit.layernorm(hidden)[:, 0]
        by_concept = F.cross_entropy(self.concept_head(hidden).float(), concepts, label_smoothing=0.1)
        by_class = F.cross_entropy(self.model.classifier(hidden).float(), classes, label_smoothing=0.1)
        return by_concept + by_class


def class_indices(names: Sequence[str], subgroups: Mapping[str, str], classes: Sequence[str]) -> Tensor:
    """Class of every concept; -100 where it is in none of the classes."""
    return torch.tensor([classes.index(subgroups[n]) if subgroups[n] in classes else -100 for n in names])


def phase_of(options: TinyVitOptions) -> Phase:
    """The training."""
    return Phase("vit", Budget(options.vit_minutes, options.vit_steps), options.lr, options.lr / 50)


def train_vit(
    recipe: Recipe, images: Tensor, concepts: Tensor, classes: Tensor, options: TinyVitOptions, device: torch.device
) -> dict[str, Tensor]:
    """Trains model and head; returns the averaged weights by name."""
    rank, world_size = rank_and_count()

    def loss_fn(step: int, generator: torch.Generator) -> Tensor:
        chosen = batch_indices(step, options.batch_size * world_size, len(images), options.seed)[rank::world_size]
        draws = torch.Generator().manual_seed(generator.initial_seed())  # augmentation draws on the CPU
        augmentation = EASY if step < EASY_STEPS else HARD
        pixels = augmentation(images[chosen].float() / 255, draws)
        kept = None
        if step >= EASY_STEPS and step % WHOLE_EVERY:
            order = torch.rand(len(pixels), (IMAGE_SIZE // PATCH_SIZE) ** 2, generator=draws).argsort(1)
            kept = order[:, : order.shape[1] // 2].to(device)
        return recipe(pixels.to(device), concepts[chosen].to(device), classes[chosen].to(device), kept)

    return train(phase_of(options), recipe, loss_fn, options, device)


@torch.no_grad()
def accuracy(model: Model, images: Tensor, classes: Tensor) -> tuple[float, int]:
    """Share of the pictures whose class the model finds, of those that have one; and how many these are."""
    known = classes >= 0
    chunks = images[known].split(128)
    logits = torch.cat([model(pixel_values=chunk.float() / 127.5 - 1).logits for chunk in chunks])
    return (logits.argmax(1) == classes[known]).float().mean().item(), int(known.sum())


def save_processor(directory: Path) -> None:
    """Writes the image processor."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    ViTImageProcessor(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(directory)


def write_model_card(
    model: Model,
    names: Mapping[str, Sequence[str]],
    figures: Mapping[str, tuple[float, int]],
    options: TinyVitOptions,
) -> None:
    """Writes `README.md` beside the weights."""
    classes = list(model.config.id2label.values())
    write_card(
        options.output_dir,
        "tiny_vit.md.jinja",
        parameters=num_parameters(model),
        width=model.config.hidden_size,
        layers=model.config.num_hidden_layers,
        num_classes=len(classes),
        classes=textwrap.fill(", ".join(classes), 118, break_on_hyphens=False),
        figures=[
            {"style": style, "seen": style in emoji.CLASSIFIER_STYLES, "accuracy": value, "count": count}
            for style, (value, count) in figures.items()
        ],
        easy_steps=EASY_STEPS,
        **card_fields(options, phase_of(options), names),
    )


@owning
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the phases in order; what is finished is skipped."""
    options = parse_args(argv)
    device, _, _ = start_process(options.seed)
    model_dir = claim_model_dir(options, "tiny_vit")
    options.work_dir.mkdir(parents=True, exist_ok=True)
    images, names, subgroups = load_styles(options)
    concepts = sorted(subgroups)
    classes = emoji.class_names({name: emoji.Kind("", group) for name, group in subgroups.items()}, concepts)
    recipe = Recipe(classes, len(concepts)).to(device)
    if device.type == "cpu":
        # The fused attention's backward pass is slow for few tokens on a CPU: plain attention trains 1.5x as fast.
        recipe.model.set_attn_implementation("eager")
    if "vit" in options.phases:
        styles = emoji.CLASSIFIER_STYLES
        indices = torch.tensor([concepts.index(name) for style in styles for name in names[style]])
        targets = torch.cat([class_indices(names[style], subgroups, classes) for style in styles])
        train_vit(recipe, torch.cat([images[style] for style in styles]), indices, targets, options, device)
    if model_dir is not None:
        model_dir.begin(anew=True)
        load_trained(options, "vit", recipe)
        save_half(recipe.model, options.output_dir, save_processor)
        # as saved: the weights went through half precision
        model: Model = ViTForImageClassification.from_pretrained(options.output_dir, trust_remote_code=False)
        figures = {
            style: accuracy(model, images[style], class_indices(own, subgroups, classes))
            for style, own in names.items()
        }
        print(json.dumps(figures, indent=2))
        write_model_card(model, names, figures, options)


if __name__ == "__main__":
    run_script(main)
