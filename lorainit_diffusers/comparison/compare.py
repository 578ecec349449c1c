"""Compare initialisations: the same data, seeds and budget for each, over learning rates and seeds.

    python train_scripts/compare_inits.py --output_dir outputs/compare

trains {inits} x {learning rates} x {seeds} on the bundled base and style set, scores them over the steps and writes
`report.html`, with the tables and pictures that it shows beside it. `--family sd3` takes the bundled diffusion
transformer, `--family classifier` and `--family vlm` the bundled image classifier and vision-language model with their
data, and `--pretrained_model_name_or_path` a base of yours; `--family vlm --help` has the options of that family. An
init may carry options, its method's or those of the run:

    --inits gaussian cntlora cntlora:gauge=balanced cntlora:variable_rank=true eva:init_num_batches=8

Start it again after an interruption: finished runs are kept, and the results are those of an uninterrupted one. The
grid may grow between calls. Under `accelerate launch` with several processes the grid is split among them.

Where nothing is said, tiny bases such as the bundled ones train for 100 steps of 8 images (classifiers for 60 of 32,
vision-language models for 60 of 16), others as long as their training script does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lorainit_diffusers.comparison.extras import require_pandas
from lorainit_diffusers.comparison.options import ComparisonOptions, parse_comparison
from lorainit_diffusers.training.cli import run_script


def parse_args(argv: Sequence[str] | None = None) -> ComparisonOptions:
    """The options, checked as far as that needs no model.

    Raises:
        ValueError: Naming the option, its value and the remedy.
    """
    options = parse_comparison(argv, __doc__)
    require_pandas()
    return options


def main(argv: Sequence[str] | None = None) -> Path:
    """Run what is missing of the grid, then write the results and the report; returns the directory."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parse_args(argv)  # a mistake in the options is answered before the imports below, which take seconds
    from lorainit_diffusers.comparison.run import compare

    return compare(options, argv)


if __name__ == "__main__":
    run_script(main)
