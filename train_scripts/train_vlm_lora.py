"""Train a LoRA on a vision-language model; `--help` says how, and `lorainit_diffusers/training/vlm.py` is what runs."""

from lorainit_diffusers.training.cli import run_script
from lorainit_diffusers.training.vlm import main, parse_args

__all__ = ["main", "parse_args"]

if __name__ == "__main__":
    run_script(main)
