"""Models of the published sizes with random weights through a whole run; minutes and up to 12 GB, so run by hand."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from sd_fixtures import ROOT


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("model", "precision", "num_layers", "error"),
    [("sd15", "no", 128, 1e-5), ("sdxl", "bf16", 560, 2e-2)],  # bfloat16 itself has 8 bits
)
def test_real_size_trains_and_reloads(model: str, precision: str, num_layers: int, error: float) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "real_size.py"), "--model", model]
    options = ["--mixed_precision", precision, "--num_batches", "2", "--batch_size", "1"]
    done = subprocess.run([*command, *options], check=True, capture_output=True, text=True)
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["layers"] == num_layers
    assert row["lowest_rank"] == row["highest_rank"] == 16
    assert row["base_error"] == 0.0
    assert row["start_error"] < error
    assert row["change_by_step"] > 10 * row["reload_error"]
    assert row["reload_error"] < error
