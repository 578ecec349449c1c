"""Train a LoRA on an image classifier; what runs is `lorainit_diffusers/training/classifier.py`."""

from lorainit_diffusers.training.classifier import main, parse_args
from lorainit_diffusers.training.cli import run_script

__all__ = ["main", "parse_args"]

if __name__ == "__main__":
    run_script(main)
