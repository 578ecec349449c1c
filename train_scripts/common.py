"""What the recipes of the bundled models share: checkpoints of one file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from lorainit_diffusers.files import save_tensors
from lorainit_diffusers.hooks import evaluating
from lorainit_diffusers.training.bundled import ROOT
from lorainit_diffusers.training.cli import run_script
from lorainit_diffusers.training.log import versions
from lorainit_diffusers.training.seeds import derive_seed, seeded_generator

# what the recipes take from here
__all__ = [
    "ROOT",
    "derive_seed",
    "evaluating",
    "load_checkpoint",
    "run_script",
    "save_checkpoint",
    "seeded_generator",
    "versions",
]


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, float]) -> None:
    """Write tensors and counters in one file, so that a kill leaves the old checkpoint or the new one."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_tensors(tensors, path, {"state": json.dumps(state)})


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Read what `save_checkpoint` wrote."""
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["state"])  # noqa: SIM118
