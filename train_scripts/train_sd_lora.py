"""Train a LoRA on Stable Diffusion 1.x/2.x; `--help` says how, and `lorainit_diffusers/training/sd.py` is what runs."""

from lorainit_diffusers.training.cli import run_script
from lorainit_diffusers.training.sd import main, parse_args

__all__ = ["main", "parse_args"]

if __name__ == "__main__":
    run_script(main)
