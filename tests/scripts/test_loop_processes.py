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
import train_vlm_lora
from reference_loop import (
    Plan,
    Trace,
    adapter_file,
    add_lora,
    answer_batches,
    assert_same,
    exported,
    folder_batches,
    num_answer_tokens,
    plain_loop,
    without_endings,
    write_answers,
)
from script_fixtures import losses, read_json, run_main, weights
from sd_fixtures import ROOT, write_images
from vlm_fixtures import write_base

from lorainit_diffusers.families.sd import StableDiffusionFamily
from lorainit_diffusers.families.vlm import VisionLanguageFamily

SIDE = 16


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    write_images(folder / "data" / "train", count=5, size=(SIDE, SIDE))
    return folder


@pytest.fixture(scope="module")
def options(work: Path, random_sd: Path) -> dict[str, dict[str, Any]]:
    """By script."""
    shared = {
        **{"init": "gaussian", "rank": 2, "seed": 4, "max_train_steps": 4, "gradient_accumulation_steps": 2},
        **{"learning_rate": 2e-3, "lr_scheduler": "linear"},
    }
    return {
        "train_sd_lora": {
            **{"pretrained_model_name_or_path": str(random_sd), "train_data_dir": str(work / "data" / "train")},
            **{"output_dir": str(work / "sd"), "resolution": SIDE, "train_batch_size": 2, "validation_prompt": "x"},
            **{"validation_inference_steps": 1, **shared},
        },
        "train_vlm_lora": {
            **{"pretrained_model_name_or_path": str(write_base(work / "base", "llava")), "max_new_tokens": 2},
            **{"train_data_file": str(write_answers(work / "answers")), "output_dir": str(work / "vlm")},
            **{"train_batch_size": 1, **shared},
        },
    }


@pytest.fixture(scope="module", autouse=True)
def two(work: Path, options: dict[str, dict[str, Any]]) -> None:
    """Run both scripts in two processes."""
    (work / "jobs.json").write_text(json.dumps(list(options.items())), encoding="utf-8")
    path = os.pathsep.join(map(str, (ROOT, ROOT / "train_scripts", ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "two_processes.py"), str(work / "jobs.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def assert_log(directory: Path, trace: Trace) -> None:
    assert read_json(directory / "config.json")["num_processes"] == 2
    for name, expected in (("loss", trace.losses), ("lr", trace.rates), ("grad_norm", trace.norms)):
        assert losses(directory, name) == pytest.approx(expected, rel=2e-6), name


def test_text_to_image(work: Path, options: dict[str, dict[str, Any]], random_sd: Path) -> None:
    """Two processes are one on the union of their batches, each with noise of its own."""
    alone = {**options["train_sd_lora"], "output_dir": work / "start", "init_only": True}
    start = weights(run_main(train_sd_lora, alone))
    family = StableDiffusionFamily.from_pretrained(random_sd)
    parameters = add_lora(family.adapted, without_endings(start), alpha=2)
    plan = Plan(learning_rate=2e-3, steps=4, seed=4, accumulation=2, processes=2, schedule="linear")
    trace = plain_loop(family, parameters, folder_batches(family, work / "data" / "train", 2, seed=4), plan)
    assert_log(work / "sd", trace)
    assert_same(weights(work / "sd"), exported(trace.weights[4], 1.0))


def test_answers_of_all_processes_weigh_by_their_tokens(work: Path, options: dict[str, dict[str, Any]]) -> None:
    alone = {**options["train_vlm_lora"], "output_dir": work / "start-vlm", "init_only": True}
    start = adapter_file(run_main(train_vlm_lora, alone))
    family = VisionLanguageFamily.from_pretrained(work / "base")
    parameters = add_lora(family.adapted, without_endings(start), alpha=2)
    plan = Plan(learning_rate=2e-3, steps=4, seed=4, accumulation=2, processes=2, schedule="linear")
    trace = plain_loop(family, parameters, answer_batches(family, 1, 4), plan, size_of=num_answer_tokens)
    assert_log(work / "vlm", trace)
    assert_same(adapter_file(work / "vlm"), exported(trace.weights[4], 1.0))
