"""Compare initialisations the way VTAB-1k is used for adapters, for those who have such data.

    python train_scripts/vtab_protocol.py --vtab_dir vtab-1k --output_dir outputs/vtab \
        --pretrained_model_name_or_path facebook/dinov2-small --inits gaussian eva cntlora

For each task, initialisation and rank: train on the 800 training images at every learning rate, choose the one that is
best on the 200 validation images, train on both with several seeds, and test (Zhai et al. 2019, arXiv:1910.04867; the
ranks are those that adapters are compared at). A directory is a task, with a folder per class in `train`, `val` and
`test`, or with lists `train800.txt`, `val200.txt` and `test.txt` of lines "path label".

Finished runs are kept: the same command continues, with more `--tasks`, `--inits`, `--ranks` or `--seeds`, too, and
several processes may share the work by `--tasks`. It writes `results.csv` and `summary.md`. All options that
`train_classifier_lora.py` has beside those on data and outputs may be added; its `--help` says what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorainit_diffusers.comparison.extras import require_pandas
from lorainit_diffusers.comparison.vtab.options import VtabOptions, parse_vtab
from lorainit_diffusers.training.cli import run_script


def parse_args(argv: Sequence[str] | None = None) -> VtabOptions:
    """The options of the protocol, and those of the training script that it passes on.

    Raises:
        ValueError: Naming the option, its value and the remedy.
    """
    options = parse_vtab(argv, __doc__)
    require_pandas()
    return options


def main(argv: Sequence[str] | None = None) -> Path:
    """Run what is missing and return the directory of the results."""
    options = parse_args(argv)  # a mistake in the options is answered before the imports below, which take seconds
    from lorainit_diffusers.comparison.vtab.runs import run_protocol

    return run_protocol(options)


if __name__ == "__main__":
    run_script(main)
