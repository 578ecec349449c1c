"""The training loop in two processes, against the plain loop on the batches of both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import train_sd_lora
from reference_loop import Plan, add_lora, assert_same, exported, folder_batches, plain_loop
from script_fixtures import losses, read_json, run_main, weights
from sd_fixtures import ROOT, write_images

from lorainit_diffusers.families.sd import StableDiffusionFamily

SIDE = 16


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    write_images(folder / "data" / "train", count=5, size=(SIDE, SIDE))
    return folder


@pytest.fixture(scope="module")
def options(work: Path, random_sd: Path) -> dict[str, Any]:
    return {
        **{"pretrained_model_name_or_path": str(random_sd), "train_data_dir": str(work / "data" / "train")},
        **{"output_dir": str(work / "two"), "init": "gaussian", "rank": 2, "resolution": SIDE, "seed": 4},
        **{"max_train_steps": 4, "train_batch_size": 2, "gradient_accumulation_steps": 2, "lr_scheduler": "linear"},
        **{"learning_rate": 2e-3, "validation_prompt": "x", "validation_inference_steps": 1},
    }


@pytest.fixture(scope="module")
def two(work: Path, options: dict[str, Any]) -> Path:
    """What two processes wrote."""
    (work / "jobs.json").write_text(json.dumps([["train_sd_lora", options]]), encoding="utf-8")
    path = os.pathsep.join(map(str, (ROOT, ROOT / "train_scripts", ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "two_processes.py"), str(work / "jobs.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return work / "two"


def test_two_processes_are_one_on_the_union_of_their_batches(
    two: Path, work: Path, options: dict[str, Any], random_sd: Path
) -> None:
    assert read_json(two / "config.json")["num_processes"] == 2
    start = weights(run_main(train_sd_lora, {**options, "output_dir": work / "start", "init_only": True}))
    family = StableDiffusionFamily.from_pretrained(random_sd)
    parameters = add_lora(
        family.adapted, {name.removesuffix(".weight"): value for name, value in start.items()}, alpha=2
    )
    plan = Plan(learning_rate=2e-3, steps=4, seed=4, accumulation=2, processes=2, schedule="linear")
    trace = plain_loop(family, parameters, folder_batches(family, work / "data" / "train", 2, seed=4), plan)
    for name, expected in (("loss", trace.losses), ("lr", trace.rates), ("grad_norm", trace.norms)):
        assert losses(two, name) == pytest.approx(expected, rel=2e-6), name
    assert_same(weights(two), exported(trace.weights[4], 1.0))
