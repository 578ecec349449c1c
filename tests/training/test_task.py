"""What the scripts of classifiers and vision-language models share: options reach the run, files, trackers, uploads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import train_classifier_lora as script
from classifier_fixtures import write_class_folder, write_classifier
from safetensors.torch import load_file
from script_fixtures import read_json, run_main
from torch import Tensor

from lorainit_diffusers.training import hub
from lorainit_diffusers.training.stages import stages
from lorainit_diffusers.training.task import summary

FAST: dict[str, Any] = {
    **{"init": "cntlora", "rank": 2, "max_train_steps": 2, "train_batch_size": 4, "init_num_batches": 2},
    **{"validation_steps": 2, "learning_rate": 5e-3},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("base") / "vit")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_class_folder(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture(scope="module")
def default_run(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(base, data, tmp_path_factory.mktemp("default") / "out")


def run(base: Path, data: Path, output: Path, **options: Any) -> Path:
    given = {"pretrained_model_name_or_path": base, "train_data_dir": data, "output_dir": output}
    return run_main(script, {**FAST, **given, **options})


def weights(output: Path) -> dict[str, Tensor]:
    return load_file(output / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "options",
    [
        {"use_ema": True},
        {"use_dora": True, "init": "eva"},
        {"gradient_accumulation_steps": 2},
        {"head_lr": 0.1},
        {"optimizer": "sgd"},
        {"lr_scheduler": "linear"},
        {"max_grad_norm": 1e-3, "optimizer": "sgd"},
        {"lora_alpha": 16},
        {"init_seed": 5},
        {"init_batch_size": 2},
        {"mixed_precision": "bf16"},
        {"num_train_epochs": 1},
        {"scale_lr": True},
        {"label_smoothing": 0.3},
        {"mixup_alpha": 1.0},
        {"crop_scale": [1.0, 1.0]},
        {"crop_ratio": 0.5},
        {"rotation": 45},
        {"grayscale": 1.0},
        {"color_jitter": 0.9},
        {"random_erasing": 1.0},
    ],
    ids=str,
)
def test_flag_changes_the_result(base: Path, data: Path, tmp_path: Path, default_run: Path, options: Any) -> None:
    changed, default = weights(run(base, data, tmp_path / "out", **options)), weights(default_run)
    assert any(key not in default or not torch.equal(value, default[key]) for key, value in changed.items())


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"init_statistics_device": "cpu"},
        {"checkpointing_steps": 1, "checkpoints_total_limit": 1},
        {"report_to": "tensorboard"},
    ],
    ids=str,
)
def test_flag_that_changes_only_the_way_there(
    base: Path, data: Path, tmp_path: Path, default_run: Path, options: Any
) -> None:
    output = run(base, data, tmp_path / "out", **options)
    changed, default = weights(output), weights(default_run)
    key = "base_model.model.classifier.weight"
    torch.testing.assert_close(changed[key], default[key], rtol=1e-5, atol=1e-6)
    if "checkpoints_total_limit" in options:
        assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"]
    if "report_to" in options:
        assert any((output / "logs").rglob("events*"))


def test_export_rank_compresses_and_says_what_it_discards(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = run(base, data, tmp_path / "out", export_rank=1)
    assert {value.shape[0] for key, value in weights(output).items() if "lora_A" in key} == {1}
    assert "--export_rank 1 discards" in capsys.readouterr().out
    assert read_json(output / "config.json")["discarded_energy"]


def test_push_to_hub(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    made = type("Made", (), {"repo_id": "me/out"})
    monkeypatch.setattr(hub.huggingface_hub, "create_repo", lambda name, **options: made)
    monkeypatch.setattr(hub.huggingface_hub, "upload_folder", lambda **options: calls.append(options))
    output = run(base, data, tmp_path / "out", push_to_hub=True, hub_model_id="me/out")
    assert [call["repo_id"] for call in calls] == ["me/out"]
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "PeftModel.from_pretrained(model, 'me/out')" in card
    assert "library_name: peft" in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "--rank 0: must be at least 1"),
        ({"validation_steps": 0}, "--validation_steps 0: must be at least 1"),
        ({"max_rank": 3}, "--rank_budget and --max_rank need --variable_rank"),
        ({"init": "cntlora", "use_dora": True}, "starts from B A != 0, which DoRA's magnitudes do not allow"),
        ({"init_option": ["constraint=alignment", "pretraining=measured"]}, "needs class images, which this script"),
        ({"init_memory_budget_gb": -1.0}, "--init_memory_budget_gb -1.0: must be positive"),
        ({"init": "unknown"}, "unknown init 'unknown'"),
        ({"pad_rank": 2}, "--pad_rank 2 is smaller than the largest rank in the file, 4"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:30],
)
def test_errors_name_the_option(base: Path, data: Path, tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(base, data, tmp_path / "out", **options)


def test_another_head_learning_rate_is_refused_on_resuming(base: Path, data: Path, tmp_path: Path) -> None:
    output = run(base, data, tmp_path / "out", checkpointing_steps=1)
    with pytest.raises(ValueError, match=r"--head_lr is 0\.5, but the checkpoint was written with 0\.005"):
        run(base, data, output, head_lr=0.5, resume_from_checkpoint="checkpoint-1")


def test_stages_and_their_summary() -> None:
    lines = [
        {"step": 0, "stage": "base", "accuracy": 0.25},
        {"step": 0, "stage": "step-0", "accuracy": 0.25},
        {"step": 0, "accuracy": 0.3},
        {"step": 2, "stage": "end", "accuracy": 0.5},
    ]
    assert list(stages(lines)) == ["base", "step-0", "end"]
    task: Any = type("Task", (), {"primary_metric": "accuracy"})
    assert summary(task, lines) == "accuracy: base 0.250, step-0 0.250, end 0.500"
