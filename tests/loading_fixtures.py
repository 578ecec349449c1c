"""Small bases of every family, and ways to damage a copy of one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from classifier_fixtures import CLASSES, write_classifier
from dit_fixtures import write_random_flux, write_random_sd3
from lumina2_fixtures import write_random_lumina2
from pixart_fixtures import write_random_dit, write_random_pixart
from safetensors.torch import load_file, save_file
from sd_fixtures import write_random_sd, write_random_sdxl
from torch import Tensor
from vlm_fixtures import write_base as write_vlm

from lorainit_diffusers.families import family_class
from lorainit_diffusers.families.classifier import ClassifierFamily
from lorainit_diffusers.families.vlm import VisionLanguageFamily

WRITERS: dict[str, Callable[[Path], Any]] = {
    "sd": write_random_sd,
    "sdxl": write_random_sdxl,
    "sd3": write_random_sd3,
    "flux": write_random_flux,
    "pixart": write_random_pixart,
    "dit": write_random_dit,
    "lumina2": write_random_lumina2,
    "classifier": write_classifier,
    "vlm": lambda folder: write_vlm(folder, "llava"),
}
PIPELINES = [kind for kind in WRITERS if kind not in ("classifier", "vlm")]


def write_small_base(kind: str, folder: Path) -> Path:
    """A seeded base of a family."""
    torch.manual_seed(0)
    WRITERS[kind](folder)
    return folder


def load_small_base(kind: str, folder: Path | str, **options: Any) -> Any:
    """The family's own loader."""
    if kind == "classifier":
        return ClassifierFamily.from_pretrained(folder, class_names=CLASSES, **options)
    if kind == "vlm":
        return VisionLanguageFamily.from_pretrained(folder, **options)
    return family_class(kind).from_pretrained(folder, **options)


def components_with_weights(kind: str) -> dict[str, str]:
    """Component -> file of its weights in the folder of a base."""
    if kind in ("classifier", "vlm"):
        return {"": "model.safetensors"}
    family = family_class(kind)
    files = {name: f"{name}/model.safetensors" for name in family.TEXT_ENCODERS}
    return files | {name: f"{name}/diffusion_pytorch_model.safetensors" for name in (family.DENOISER, "vae")}


COMPONENTS = [(kind, component) for kind in WRITERS for component in components_with_weights(kind)]


def damaged_copy(base: Path, folder: Path, file: str, damage: Callable[[dict[str, Tensor]], Any]) -> tuple[Path, Any]:
    """A copy of a base with other weights in one file, and what the damage returned."""
    shutil.copytree(base, folder)
    state = load_file(folder / file)
    result = damage(state)
    save_file(state, folder / file, metadata={"format": "pt"})
    return folder, result


def a_key(state: dict[str, Tensor]) -> str:
    """A matrix in the middle of a model, which nothing is tied to and which is no head."""
    keys = [key for key in sorted(state) if state[key].ndim == 2 and "embed" not in key and "head" not in key]
    keys = [key for key in keys if "classifier" not in key and "shared" not in key]
    return keys[len(keys) // 2]


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file."""
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")
