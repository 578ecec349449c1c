"""What a run writes as `run.yaml` repeats it, and what a file of options may say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorainit_diffusers.training import classifier, dit, sd, sdxl, vlm
from lorainit_diffusers.training.options.config import CONFIG_NAME, read_config, write_run_config
from lorainit_diffusers.training.options.fields import values_of

SCRIPTS = {"sd": sd, "sdxl": sdxl, "dit": dit, "classifier": classifier, "vlm": vlm}
BASES = {"sdxl": ["--pretrained_model_name_or_path", "stabilityai/sdxl", "--train_data_dir", "images"]}
# of kinds that a file could get wrong: switches on and off, lists, pairs, numbers that are whole or small, texts
CHANGES = ["--seed", "3", "--learning_rate", "1e-7", "--lr_scheduler", "cosine", "--max_grad_norm", "2", "--dry_run"]
MORE = {
    "sd": ["--no-init_mask_padding", "--validation_prompt", "a cat: two", "on", "--init", "eva", "--clip_skip", "1"],
    "dit": ["--family", "sd3", "--no-keep_best", "--init_option", "ridge=0.5", "--init_option", "gauge=whitened"],
    "classifier": ["--no-random_flip", "--crop_scale", "0.5", "1", "--head", "new"],
    "vlm": ["--statistics_tokens", "answer", "prompt"],
}


def written(script: str, argv: list[str], directory: Path) -> tuple[Any, Path]:
    options = SCRIPTS[script].parse_args(argv)
    return options, write_run_config(directory, options, script)


@pytest.mark.parametrize("changes", [[], CHANGES], ids=["defaults", "changes"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_file_of_a_run_gives_its_options_back(script: str, changes: list[str], tmp_path: Path) -> None:
    more = MORE.get(script, []) if changes else []
    options, file = written(script, [*BASES.get(script, []), *changes, *more], tmp_path)
    again = SCRIPTS[script].parse_args(["--config", str(file)])
    assert values_of(again) == values_of(options)
    if changes:
        assert (options.seed, options.learning_rate, options.dry_run) == (3, 1e-7, True)


def test_the_token_is_not_in_the_file(tmp_path: Path) -> None:
    _, file = written("sd", ["--hub_token", "hf_secret", "--push_to_hub"], tmp_path)
    assert file.name == CONFIG_NAME
    assert "secret" not in file.read_text(encoding="utf-8")


def test_the_command_line_overrides_the_file_and_json_will_do(tmp_path: Path) -> None:
    file = tmp_path / "my.json"
    file.write_text(json.dumps({"rank": 4, "init-option": "whiten=variance_ratio", "init": "eva"}), encoding="utf-8")
    options = sd.parse_args(["--rank", "2", "--config", str(file)])
    assert (options.rank, options.init, options.init_option) == (2, "eva", ["whiten=variance_ratio"])
    assert options.lora_alpha == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnak: 4", "unknown option 'rnak'; did you mean rank"),
        ("rank: [1]", "rank \\[1\\]: give a whole number"),
        ("rank: 1.5", "rank 1.5: give a whole number"),
        ("rank: many", "rank 'many': give a whole number"),
        ("cache_latents: 1", "cache_latents 1: give true or false"),
        ("lr_scheduler: linaer", "lr_scheduler 'linaer' is unknown; choose from linear"),
        ("- rank", "must be a mapping of option names to values"),
        ("rank: {", "cannot be read"),
    ],
)
def test_a_mistake_in_the_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        sd.parse_args(["--config", str(file)])
    assert str(file) in str(error.value)


def test_a_file_that_is_missing_or_empty(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no file; give a YAML or JSON file"):
        sd.parse_args(["--config", str(tmp_path / "gone.yaml")])
    (tmp_path / "empty.yaml").touch()
    assert sd.parse_args(["--config", str(tmp_path / "empty.yaml")]) == sd.parse_args([])


def test_the_example_of_the_documents_is_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    example = page.partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "my.yaml").write_text(example, encoding="utf-8")
    assert read_config(tmp_path / "my.yaml").values == yaml.safe_load(example)
    options = sd.parse_args(["--config", str(tmp_path / "my.yaml"), "--rank", "32"])
    assert (options.init, options.variable_rank, options.rank) == ("eva", True, 32)
