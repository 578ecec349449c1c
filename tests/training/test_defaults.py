"""What a run does when nothing is said suits its base: the bundled ones as ever, real ones as their users expect."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import train_classifier_lora
import train_dit_lora
import train_sd_lora
import train_sdxl_lora
import train_vlm_lora
from sd_fixtures import write_images

from lorainit_diffusers.families import TEXT_TO_IMAGE_FAMILIES
from lorainit_diffusers.training.bundled import BUNDLED_BASES
from lorainit_diffusers.training.classification.options import ClassifierTrainingOptions
from lorainit_diffusers.training.defaults import (
    REAL,
    TINY,
    TINY_BYTES,
    RunDefaults,
    default_lines,
    defaults_of,
    is_tiny,
    usual_value,
)
from lorainit_diffusers.training.options.parser import parse_options
from lorainit_diffusers.training.questions.options import QuestionTrainingOptions

FAMILIES = [*TEXT_TO_IMAGE_FAMILIES, "classifier", "vlm"]
NAMES = [field.name for field in dataclasses.fields(RunDefaults)]


def chosen(args: Any) -> RunDefaults:
    return RunDefaults(**{name: getattr(args, name) for name in NAMES})


def test_every_family_has_defaults() -> None:
    assert set(REAL) == set(TINY) == set(FAMILIES)


def test_bundled_bases_keep_the_values_that_they_were_measured_with() -> None:
    assert defaults_of("sd", BUNDLED_BASES["sd"]) == RunDefaults(1e-3, 8, 1, 200, 50, 500)
    assert defaults_of("sd3", None) == RunDefaults(1e-3, 8, 1, 200, 50, 500)
    assert defaults_of("classifier", BUNDLED_BASES["classifier"]) == RunDefaults(1e-3, 32, 1, 60, 10, 500)
    assert defaults_of("vlm", BUNDLED_BASES["vlm"]) == RunDefaults(1e-3, 16, 1, 100, 25, 500)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_name_of_the_hub_is_a_real_base(family: str) -> None:
    found = defaults_of(family, "owner/name")
    assert found.learning_rate < 1e-3
    assert found.max_train_steps > TINY[family].max_train_steps


def test_a_folder_is_judged_by_its_weights(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    assert not is_tiny(str(tmp_path))  # no weights, or not in this format: nothing says that it is tiny
    with (tmp_path / "unet" / "model.safetensors").open("wb") as file:
        file.truncate(TINY_BYTES)
    assert is_tiny(str(tmp_path))
    (tmp_path / "more.safetensors").write_bytes(b"x")
    assert not is_tiny(str(tmp_path))


@pytest.mark.parametrize("family", TEXT_TO_IMAGE_FAMILIES)
def test_the_scripts_take_them_and_what_is_given_stays(family: str, tmp_path: Path) -> None:
    script = {"sd": train_sd_lora, "sdxl": train_sdxl_lora}.get(family, train_dit_lora)
    data = ["--train_data_dir", str(write_images(tmp_path / "data"))]
    options = [*data, "--pretrained_model_name_or_path", "owner/name", "--output_dir", str(tmp_path / "out")]
    options += ["--family", family] if script is train_dit_lora else []
    assert chosen(script.parse_args(options)) == REAL[family]
    given = script.parse_args([*options, "--learning_rate", "0.001", "--max_train_steps", "7"])
    assert chosen(given) == dataclasses.replace(REAL[family], learning_rate=1e-3, max_train_steps=7)
    assert given.text_encoder_lr == 1e-3


@pytest.mark.parametrize(("script", "family"), [(train_classifier_lora, "classifier"), (train_vlm_lora, "vlm")])
def test_so_do_the_scripts_of_tasks(script: Any, family: str) -> None:
    options = {"classifier": ClassifierTrainingOptions, "vlm": QuestionTrainingOptions}[family]
    real = parse_options(options, ["--pretrained_model_name_or_path", "owner/name"], None)
    assert chosen(real) == REAL[family]
    assert chosen(script.parse_args([])) == TINY[family]
    # an option at its default is no option that a resumed run has changed
    assert usual_value(real, "learning_rate") == REAL[family].learning_rate
    assert usual_value(real, "rank") == 8
    assert usual_value(real, "nothing") is None


def test_the_banner_names_them() -> None:
    options = dataclasses.asdict(REAL["vlm"])
    text = (
        "learning rate 0.0002, batches of 4, 4 of them a step, 500 steps, a validation every 50, a checkpoint every 250"
    )
    assert default_lines("vlm", "owner/name", options) == [("defaults", f"for vlm: {text}")]
    options = {
        **dataclasses.asdict(TINY["sd"]),
        "learning_rate": 1e-4,
        "max_train_steps": 3,
    }
    text = "batches of 8, a validation every 50, a checkpoint every 500"
    assert default_lines("sd", None, options) == [("defaults", f"for the tiny bases of sd: {text}")]
    assert default_lines("sd", None, {"learning_rate": 1e-4}) == []


@pytest.mark.parametrize("script", [train_sd_lora, train_dit_lora, train_vlm_lora])
def test_the_help_states_them(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "for tiny bases, such as the bundled ones" in text
    assert "default 0.0001; 0.001 for tiny bases" in text or "default 0.0002; 0.001 for tiny bases" in text
