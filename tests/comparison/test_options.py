"""The command line of a comparison: what is filled in, files of options, and what is answered before torch is there."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from sd_fixtures import ROOT, write_images

from lorainit_diffusers.comparison.compare import parse_args
from lorainit_diffusers.comparison.options import ImageComparisonOptions, TaskComparisonOptions
from lorainit_diffusers.training.options.config import write_run_config


def test_a_base_of_a_real_size_takes_its_familys_rates(tmp_path: Path) -> None:
    data = ["--train_data_dir", str(write_images(tmp_path / "data"))]
    options = parse_args(["--family", "sdxl", "--pretrained_model_name_or_path", "owner/name", *data])
    assert (options.learning_rates, options.train_batch_size, options.max_train_steps) == ([1e-4, 2e-4], 1, 1000)
    options = parse_args([])
    assert (options.learning_rates, options.train_batch_size, options.max_train_steps) == ([1e-3, 2e-3], 8, 100)


@pytest.mark.parametrize(("family", "kind"), [("sd", ImageComparisonOptions), ("vlm", TaskComparisonOptions)])
def test_the_file_of_a_comparison_repeats_it(tmp_path: Path, family: str, kind: type) -> None:
    given = [
        "--inits",
        "cntlora:gauge=balanced",
        "gaussian",
        "--learning_rates",
        "1e-2",
        "--seeds",
        "4",
        "--max_train_steps",
        "40",
    ]
    options = parse_args(["--family", family, *given, "--output_dir", str(tmp_path)])
    assert isinstance(options, kind)
    path = write_run_config(tmp_path, options, "compare_inits")
    again = parse_args(["--config", str(path)])
    assert again == dataclasses.replace(options, output_dir="outputs/compare-inits")
    changed = parse_args(["--config", str(path), "--seeds", "1", "2"])
    assert changed == dataclasses.replace(again, seeds=[1, 2])


def test_a_file_of_an_unknown_family_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("family: sd9\n", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"--config .*mine\.yaml: family 'sd9' is unknown; choose from sd, sdxl, .*vlm"
    ):
        parse_args(["--config", str(path)])


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse_args([]).rank = 3


@pytest.mark.parametrize("family", ["sd", "classifier", "vlm"])
def test_help_needs_no_torch(family: str) -> None:
    code = (
        "import sys\n"
        "from lorainit_diffusers.comparison.compare import parse_args\n"
        f"try:\n    parse_args(['--family', {family!r}, '--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'diffusers', 'peft', 'pandas', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
