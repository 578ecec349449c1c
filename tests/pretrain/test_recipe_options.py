"""The options of the recipes: every number has its range, and a mistake is answered before anything heavy is read."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sample_data
import tiny_clip
import tiny_dit
import tiny_sd
import tiny_vit
import tiny_vlm
from recipe_options import RecipeOptions, TaskRecipeOptions
from sd_fixtures import ROOT

from lorainit_diffusers.training.options.fields import option_facts

RECIPES: list[Any] = [tiny_clip, tiny_dit, tiny_sd, tiny_vit, tiny_vlm]
NEEDED = ["--work_dir", "work", "--output_dir", "out"]
EVERY_SCRIPT = pytest.mark.parametrize("recipe", [*RECIPES, sample_data], ids=lambda recipe: recipe.__name__)
EVERY_RECIPE = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)


def needed_by(recipe: ModuleType) -> list[str]:
    return NEEDED[2:] if recipe is sample_data else NEEDED


@EVERY_SCRIPT
def test_every_number_has_a_range_that_is_checked(recipe: Any) -> None:
    kind = type(recipe.parse_args(needed_by(recipe)))
    hints = typing.get_type_hints(kind)
    numeric = [name for name in option_facts(kind) if hints[name] in (int, float)]
    assert numeric
    for name in numeric:
        allowed = option_facts(kind)[name].range
        assert allowed is not None, f"state a range of {name} in its Annotated"
        assert allowed.integer == (hints[name] is int)
        low, high = allowed.ends
        for value in [low - 1, high + 1] if allowed.integer else [low - abs(low) - 1, float("nan"), float("inf")]:
            with pytest.raises(ValueError, match=f"^--{name} .*: must "):
                recipe.parse_args([*needed_by(recipe), f"--{name}={value}"])


@EVERY_RECIPE
def test_all_phases_are_run_unless_some_are_named(recipe: Any) -> None:
    phases = recipe.parse_args(NEEDED).phases
    assert (phases[0], phases[-1]) == ("data", "export")
    assert recipe.parse_args([*NEEDED, "--phases", *phases[1:]]).phases == phases[1:]
    with pytest.raises(SystemExit):
        recipe.parse_args([*NEEDED, "--phases", "all"])


def test_a_recipe_has_its_own_defaults_of_what_all_have() -> None:
    found = {recipe.__name__: recipe.parse_args(NEEDED) for recipe in RECIPES}
    assert {name: options.ema_decay for name, options in found.items() if options.ema_decay != 0.998} == {
        "tiny_clip": 0.99
    }
    assert {name for name, options in found.items() if options.checkpoint_s == 300} == {"tiny_sd", "tiny_dit"}
    assert all(options.bf16 and options.seed == 0 for options in found.values())
    assert not tiny_sd.parse_args([*NEEDED, "--no_bf16"]).bf16
    with pytest.raises(dataclasses.FrozenInstanceError):
        found["tiny_sd"].seed = 1


def test_what_the_recipes_share_is_no_recipe_of_its_own() -> None:
    for kind in (RecipeOptions, TaskRecipeOptions):
        assert "_argument_group_name" not in vars(kind)  # it would be listed twice


def test_what_is_missing_is_named_and_a_file_may_give_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tiny_vit.parse_args([])
    assert capsys.readouterr().err == "error: --work_dir, --output_dir are missing.\n"
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"work_dir": "a", "output_dir": "b", "vit_steps": 7, "no_bf16": True}), encoding="utf-8")
    options = tiny_vit.parse_args(["--config", str(file), "--output_dir", "c"])
    assert (options.work_dir, options.output_dir, options.vit_steps) == (Path("a"), Path("c"), 7)
    assert not options.bf16


@EVERY_SCRIPT
def test_a_misspelt_option_is_answered_without_torch(recipe: Any) -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = [sys.argv[1], '--output_dri', 'x']\n"
        f"sys.path[:0] = [{str(ROOT / 'train_scripts' / 'pretrain')!r}, {str(ROOT)!r}]\n"
        "try:\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as error:\n"
        "    print(error.code, sorted({'torch', 'diffusers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, recipe.__file__], capture_output=True, text=True, check=True)
    assert done.stdout == "2 []\n"
    assert done.stderr == "error: unknown option --output_dri; did you mean --output_dir?\n"
