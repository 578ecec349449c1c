"""The protocol of VTAB-1k; `--help` says how, and `lorainit_diffusers/comparison/vtab/protocol.py` is what runs."""

from lorainit_diffusers.comparison.vtab.protocol import main, parse_args
from lorainit_diffusers.training.cli import run_script

__all__ = ["main", "parse_args"]

if __name__ == "__main__":
    run_script(main)
