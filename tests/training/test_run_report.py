"""The report of a text-to-image run, from plain values."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorainit_diffusers.report import InitReport, LayerReport, RankAllocation, RankedComponent
from lorainit_diffusers.training import cost
from lorainit_diffusers.training.run_report import RunFacts, best_step, headline, write_ranks, write_run_report

LAYERS = [f"unet.down_blocks.{b}.attentions.0.transformer_blocks.0.attn1.to_{p}" for b in range(2) for p in "qkv"]


def init_report(ranks: Sequence[int], allocation: RankAllocation | None = None, **changed: Any) -> dict[str, Any]:
    """As it is after it has been written and read."""
    layers = {
        name: LayerReport(rank, float(rank), [0.5, 0.25, 0.125, 0.0625], 0.75, 100, name)
        for name, rank in zip(LAYERS, ranks, strict=True)
    }
    report = InitReport("eva", {}, "equal", layers, 4, 1.5, 0.25, 0.125, 0.1, allocation=allocation)
    return json.loads(json.dumps({**report.to_json(), **changed}))


def validations(losses: Mapping[int, float]) -> list[dict[str, Any]]:
    steps = [{"step": step, "loss": 1.0 / step, "step_s": 0.5} for step in range(1, max(losses, default=20) + 1)]
    return [*steps, *({"step": step, "validation_loss": loss} for step, loss in losses.items())]


@pytest.fixture
def facts() -> RunFacts:
    return RunFacts(
        init="eva",
        base="tiny-sd",
        data="40 images of high-contrast",
        lines=validations({0: 0.8, 50: 0.5, 100: 0.6}),
        init_report=init_report([2] * 6),
        settings={"training": "100 steps", "data": "my|data"},
        seconds={"training steps": 50.0, "samples": 3.25},
        memory="1.10 GB of the machine",
        usage="pipeline.load_lora_weights('out')",
        files={"pytorch_lora_weights.safetensors": "the LoRA"},
        command="accelerate launch train_scripts/train_sd_lora.py --init eva",
    )


def page_of(directory: Path, facts: RunFacts) -> str:
    """The text of the report."""
    page = write_run_report(directory, facts).read_text(encoding="utf-8")
    page = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL).replace("<wbr>", "")
    return html.unescape(re.sub(r"<[^>]+>", "\n", page))


def test_the_headline_says_what_was_trained_and_where_the_loss_went(facts):
    assert headline(facts) == (
        "A LoRA of rank 2 in 6 layers, started by eva, trained for 100 steps on 40 images of high-contrast. Loss on "
        "held-out images: 0.8000 before training, then 0.5000 at its best (step 50), then 0.6000 at the end (step 100)."
    )
    ending = dataclasses.replace(facts, lines=validations({0: 0.8, 50: 0.7, 100: 0.6}))
    assert headline(ending).endswith("0.8000 before training, then 0.6000 at the end (step 100), its lowest.")
    moved = dataclasses.replace(ending, init_report=init_report([2] * 6, step_zero="moved"))
    assert "0.8000 after the initial change, then" in headline(moved)
    ranked = dataclasses.replace(facts, init_report=init_report([1, 1, 2, 2, 3, 4]))
    assert headline(ranked).startswith("A LoRA of ranks 1 to 4 (mean 2.2) in 6 layers")
    without = dataclasses.replace(facts, lines=validations({}))
    assert headline(without).endswith("trained for 20 steps on 40 images of high-contrast.")


def test_the_best_step_is_the_lowest_finite_one_and_the_first_of_equals():
    assert best_step(validations({0: 0.8, 50: 0.5, 100: 0.5})) == 50
    assert best_step(validations({0: 0.8, 50: float("nan"), 100: 0.9})) == 0
    assert best_step(validations({})) is None


def test_a_loss_that_rose_again_is_said_with_the_folder_of_the_best_step(facts, tmp_path):
    assert "rose again after step 50." in page_of(tmp_path, facts)
    kept = dataclasses.replace(facts, best_dir="best")
    assert "The LoRA of step 50 is in best/." in page_of(tmp_path, kept)
    nothing = dataclasses.replace(facts, lines=validations({0: 0.5, 50: 0.6}))
    assert "No step is better than step 0" in page_of(tmp_path, nothing)
    good = dataclasses.replace(facts, lines=validations({0: 0.6, 50: 0.5}))
    assert "rose again" not in page_of(tmp_path, good)


def test_it_is_written_without_validation_data_and_without_pictures(facts, tmp_path):
    text = page_of(tmp_path, dataclasses.replace(facts, lines=validations({}), command="", files={}))
    assert "There are no held-out images" in text
    assert "--validation_fraction" in text
    assert "validation loss" not in text
    assert "Loss over the steps" not in text
    assert "<img" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_everything_that_was_asked_for_is_in_it(facts, tmp_path):
    for name in ("loss.png", "samples.png"):
        Image.new("RGB", (40, 20)).save(tmp_path / name)
    shown = dataclasses.replace(facts, checkpoints=["checkpoint-50", "checkpoint-100"], resumed_at=60, averaged=True)
    text = page_of(tmp_path, shown)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == 2
    assert "http" not in page.replace("http-equiv", "")
    for words in (
        *("my|data", "100 steps", "50.0 s", "3.2 s", "1.10 GB of the machine", "pipeline.load_lora_weights('out')"),
        *("pytorch_lora_weights.safetensors: the LoRA", "train_sd_lora.py --init eva --resume_from_checkpoint latest"),
        *("To go on from checkpoint-100", "resumed at step 60", "moving average", "Every layer has rank 2."),
        *("Step 0 is the base model, because B is zero.", "config.json"),
    ):
        assert words in text, words
    row = re.search(r"0\.5000\s+best", text)
    assert row, "the best step is marked in the table"


def test_ranks_by_score_say_which_score_decided(facts, tmp_path):
    kept, refused = RankedComponent(LAYERS[5], 4, 0.0625), RankedComponent(LAYERS[0], 2, 0.0612)
    allocation = RankAllocation(13, False, 1, 4, kept, refused)
    report = init_report([1, 1, 2, 2, 3, 4], allocation)
    assert write_ranks(tmp_path, report) == tmp_path / "ranks.png"
    text = page_of(tmp_path, dataclasses.replace(facts, init_report=report))
    assert "Ranks 1 to 4 (mean 2.2), given by score: 13 together, at least 1 and at most 4 in a layer." in text
    assert (
        f"The last rank went to {LAYERS[5]}, component 4, score 0.0625; the first to get none was {LAYERS[0]}" in text
    )
    assert 'src="data:image/png;base64,' in (tmp_path / "report.html").read_text(encoding="utf-8")
    cells = [cell for cell in text.splitlines() if cell.strip()]
    row = cells.index(LAYERS[5])
    assert cells[row : row + 5] == [LAYERS[5], "4", "0.0625", "–", "0.75"]  # no component is left
    assert cells[cells.index(LAYERS[2]) :][1:4] == ["2", "0.25", "0.125"]


def test_equal_ranks_leave_no_picture_and_an_old_report_is_read(facts, tmp_path):
    report = init_report([2] * 6)
    assert write_ranks(tmp_path, report) is None
    del report["allocation"]  # of a checkpoint from before
    assert write_ranks(tmp_path, report) is None
    assert "Every layer has rank 2." in page_of(tmp_path, dataclasses.replace(facts, init_report=report))
    assert not (tmp_path / "ranks.png").exists()


def test_many_layers_are_shortened_to_those_with_the_most_and_the_least(facts, tmp_path):
    one = init_report([2] * 6)
    layer = one["layers"][LAYERS[0]]
    layers = {f"unet.blocks.{index}.to_q": {**layer, "rank": 1 + index % 4} for index in range(200)}
    text = page_of(tmp_path, dataclasses.replace(facts, init_report={**one, "layers": layers}))
    assert "highest and the lowest ranks of 200" in text
    assert len(re.findall(r"unet\.blocks\.\d+\.to_q", text)) == 80


def test_hostile_names_are_text(facts, tmp_path):
    bad = '<script>alert("x")</script>'
    hostile = dataclasses.replace(
        facts,
        **dict.fromkeys(("init", "base", "data", "memory", "usage", "command"), bad),
        settings={bad: bad},
        files={bad: bad},
        seconds={bad: 1.0},
        checkpoints=[bad],
    )
    write_run_report(tmp_path, hostile)
    assert "<script" not in (tmp_path / "report.html").read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------- cost


def test_the_command_is_copied_without_its_token():
    argv = ["train_scripts/train_sd_lora.py", "--instance_prompt", "a photo of sks dog", "--hub_token", "hf_secret"]
    expected = "accelerate launch train_scripts/train_sd_lora.py --instance_prompt 'a photo of sks dog' --hub_token ..."
    assert cost.command_line("train_sd_lora", argv) == expected
    assert cost.command_line("train_sd_lora", [argv[0], "--hub_token=hf_secret"]).endswith("--hub_token=...")
    assert cost.command_line("train_sdxl_lora", argv) == ""
    assert cost.command_line("train_sd_lora", []) == ""
    assert cost.command_line("train_sd_lora", ["/usr/bin/lorainit", "train", "sd"]) == "lorainit train sd"
    module = "accelerate launch -m lorainit_diffusers.training.sd --rank 4"
    assert cost.command_line("train_sd_lora", ["/site/lorainit_diffusers/training/sd.py", "--rank", "4"]) == module


def test_seconds_add_up_and_count_when_the_block_fails(monkeypatch):
    clock = iter([1.0, 3.0, 10.0, 14.0])
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(clock))
    watch = cost.Stopwatch("samples", "validation")
    with watch.part("samples"):
        pass
    with pytest.raises(RuntimeError), watch.part("samples"):
        raise RuntimeError
    assert watch.seconds == {"samples": 6.0, "validation": 0.0}


def test_memory_is_that_of_this_process():
    amount = float(re.fullmatch(r"([\d.]+) GB of the machine", cost.peak_memory("cpu"))[1])
    assert 0.05 < amount < 100
