"""What the command lines of the recipes of the bundled models share; read before torch is imported."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

# archives of the npm packages that the pictures come from
DEFAULT_CACHE = Path.home() / ".cache" / "lorainit-diffusers"


def add_recipe_arguments(parser: argparse.ArgumentParser, phase: str, *, minutes: float, batch_size: int) -> None:
    """The options of a recipe with one phase of training; a budget of 0 minutes or steps means no such limit."""
    add = parser.add_argument
    add("--work_dir", type=Path, required=True, help="pictures, checkpoint and figures")
    add("--output_dir", type=Path, required=True, help="where the model is written")
    add("--cache_dir", type=Path, default=DEFAULT_CACHE, help="archives of the npm packages")
    phases = ("data", phase, "export")
    add("--phases", nargs="+", choices=phases, default=list(phases))
    add(f"--{phase}_minutes", type=float, default=minutes)
    add(f"--{phase}_steps", type=int, default=0)
    add("--batch_size", type=int, default=batch_size, help="pictures of one process")
    add("--lr", type=float, default=1e-3)
    add("--ema_decay", type=float, default=0.998)
    add("--checkpoint_s", type=float, default=120.0, help="seconds between checkpoints")
    add("--no_bf16", dest="bf16", action="store_false", help="train in full precision")
    add("--hardware", help="for the model card (default: what this machine has)")
    add("--date", default=time.strftime("%Y-%m-%d"), help="for the model card")
    add("--seed", type=int, default=0)
