"""`report.html`, `ranks.png` and the card of real runs of the text-to-image scripts."""

from __future__ import annotations

import html
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import train_sd_lora
from script_fixtures import FAST, read_json, run_main

from lorainit_diffusers.training import loop, samples
from lorainit_diffusers.training.data import text_to_image

Run = Callable[..., Path]


@pytest.fixture
def run(random_sd: Path, image_dir: Path, tmp_path: Path) -> Run:
    def call(name: str = "out", **options: Any) -> Path:
        options = {
            "pretrained_model_name_or_path": random_sd,
            "train_data_dir": image_dir,
            "output_dir": tmp_path / name,
            **FAST,
            **options,
        }
        return run_main(train_sd_lora, options)

    return call


def text_of(directory: Path) -> str:
    page = (directory / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=\"(?!data:)", page), "the report loads something"
    page = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL).replace("<wbr>", "")
    return html.unescape(re.sub(r"<[^>]+>", "\n", page))


def test_a_run_by_score_says_which_score_decided_in_report_card_and_picture(run, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_scripts/train_sd_lora.py", "--init", "eva", "--hub_token", "hf_secret"])
    options = {"init": "eva", "variable_rank": True, "use_ema": True, "learning_rate": 1e-2}
    out = run(**options, max_train_steps=4, validation_steps=2, checkpointing_steps=2)
    written = read_json(out / "init_report.json")
    ranks = [layer["rank"] for layer in written["layers"].values()]
    assert min(ranks) < max(ranks)
    mean = f"{sum(ranks) / len(ranks):.1f}".removesuffix(".0")
    words = f"{min(ranks)} to {max(ranks)} (mean {mean})"
    text, card = text_of(out), (out / "README.md").read_text(encoding="utf-8")
    assert f"| rank, alpha | {words}, alpha 1 x each layer's rank |" in card
    assert f"A LoRA of ranks {words} in {len(ranks)} layers, started by eva, trained for 4 steps on " in text
    kept = written["allocation"]["last_kept"]
    assert f"The last rank went to {kept['layer']}, component {kept['component']}, score {kept['score']:.3g}" in text
    assert (out / "ranks.png").stat().st_size > 1000
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/') == 3, "the curve, the samples and the ranks"
    for part in ("moving average", "training steps", "validation", "samples", "in all", "GB of the machine"):
        assert part in text
    assert "--hub_token ... --resume_from_checkpoint latest" in text
    assert "hf_secret" not in page
    assert 'weight_name="pytorch_lora_weights.safetensors"' in text
    losses = [f"{line:.4f}" for line in validation_losses(out).values()]
    assert all(loss in text for loss in losses)
    assert len(losses) == 3


def validation_losses(directory: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}


def test_a_resumed_run_reports_the_whole_run(run):
    options = {"validation_steps": 2, "checkpointing_steps": 2, "max_train_steps": 4}
    out = run(**options)
    shutil.rmtree(out / "checkpoint-4")
    (out / "report.html").unlink()
    run(**options, resume_from_checkpoint="latest")
    text = text_of(out)
    assert "trained for 4 steps" in text
    assert "The run was resumed at step 2" in text
    assert all(f"{loss:.4f}" in text for loss in validation_losses(out).values())


def test_without_held_out_images_nothing_is_called_best(run, image_dir, tmp_path):
    alone = shutil.copytree(image_dir / "train", tmp_path / "alone")
    out = run(train_data_dir=alone)
    assert "There are no held-out images" in text_of(out)


def test_init_only_leaves_the_ranks_and_no_report_of_a_training(run):
    out = run(init="eva", variable_rank=True, init_only=True)
    assert (out / "ranks.png").is_file()
    assert not (out / "report.html").exists()
    assert read_json(out / "init_report.json")["allocation"]["budget"] > 0


def test_equal_ranks_leave_no_picture(run):
    out = run("equal", init="gaussian")
    assert not (out / "ranks.png").exists()
    assert "Every layer has rank 2." in text_of(out)


def test_validation_and_samples_have_bars_of_their_own(run, monkeypatch):
    shown: list[tuple[str, bool]] = []
    bar = loop.progress_bar

    def record(*iterable: Any, **options: Any) -> Any:
        shown.append((options["desc"], options.get("leave", True)))
        return bar(*iterable, **options)

    for module in (loop, samples, text_to_image):
        monkeypatch.setattr(module, "progress_bar", record)
    run("bars", validation_steps=2)
    assert shown.count(("validating", False)) == 2
    assert shown.count(("sampling", False)) == 3
    assert shown.count(("training", True)) == 1
