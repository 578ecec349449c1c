"""Train a LoRA on a diffusion transformer; `--help` says how, and `lorainit_diffusers/training/dit.py` is what runs."""

from lorainit_diffusers.training.cli import run_script
from lorainit_diffusers.training.dit import main, parse_args

__all__ = ["main", "parse_args"]

if __name__ == "__main__":
    run_script(main)
