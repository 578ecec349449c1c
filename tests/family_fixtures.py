"""A small seeded base of every family, and batches of its kind; a new text-to-image family enters with its writer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flow_fixtures
import torch
import vlm_fixtures
from classifier_fixtures import CLASSES, SIDE, random_classifier
from pixart_fixtures import write_random_dit, write_random_pixart
from sd_fixtures import write_random_sd, write_random_sdxl

from lorainit_diffusers.families import family_class
from lorainit_diffusers.families.classifier import ClassifierFamily, ImagePreparation
from lorainit_diffusers.families.vlm import VisionLanguageFamily

WRITERS: dict[str, Callable[[Path], Any]] = {
    "sd": write_random_sd,
    "sdxl": write_random_sdxl,
    "pixart": write_random_pixart,
    "dit": write_random_dit,
    # of a family with several kinds of bases, the last
    **{kind.partition("-")[0]: writer for kind, writer in flow_fixtures.WRITERS.items()},
}
TOKENS = {kind.partition("-")[0]: count for kind, count in flow_fixtures.TOKENS.items()}


def load_family(kind: str, folder: Path, **options: Any) -> Any:
    """The family of a seeded base, which is written to the folder where there is none."""
    torch.manual_seed(0)
    if kind == "classifier":
        model = random_classifier().requires_grad_(False).eval()
        return ClassifierFamily(model, ImagePreparation(SIDE, SIDE), CLASSES, **options)
    if kind == "vlm":
        base = folder if folder.exists() else vlm_fixtures.write_base(folder, "llava")
        return VisionLanguageFamily.from_pretrained(base, **options)
    if not folder.exists():
        WRITERS[kind](folder)
    extra = {"max_sequence_length": TOKENS[kind]} if kind in TOKENS else {}
    return family_class(kind).from_pretrained(folder, **extra, **options)


def batches_of(kind: str, family: Any) -> list[dict[str, Any]]:
    """Two batches, the same ones every time."""
    generator = torch.Generator().manual_seed(3)
    if kind == "classifier":
        images = torch.rand(6, 3, SIDE, SIDE, generator=generator)
        return [{"labels": torch.tensor([0, 1, 2]), "pixel_values": some} for some in images.split(3)]
    if kind == "vlm":
        return [
            family.collate([family.encode(vlm_fixtures.ask("what?", answer), [vlm_fixtures.make_image(seed)])])
            for seed, answer in enumerate(("cat", "a dog"))
        ]
    captions = ["2", "1"] if kind == "dit" else ["a cat", "one long house"]
    pixels = torch.rand(4, 3, 32, 32, generator=generator) * 2 - 1
    return [{**family.caption_inputs(captions), "pixel_values": some} for some in pixels.split(2)]
