"""What the library says in parameters, a script says in flags."""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path

import pytest

from lorainit_diffusers.training.cli import run_script
from lorainit_diffusers.training.messages import in_flags, remember_flags
from lorainit_diffusers.training.options.parser import ScriptParser

LIBRARY = Path(__file__).resolve().parents[2] / "lorainit_diffusers"
FLAGS = {
    **dict.fromkeys(("rank", "max_rank", "rank_budget", "variable_rank", "lora_layers", "init_memory_budget_gb"), ()),
    **dict.fromkeys(("use_dora", "head", "resolution", "init_mask_padding", "no-init_mask_padding", "keep_best"), ()),
    **dict.fromkeys(("pretrained_model_name_or_path", "max_sequence_length", "no_keep_best", "train_data_dir"), ()),
    "family": ("sd3", "flux"),
}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        # a name with an underscore, with and without a value
        ("max_rank is 0; it must be at least 1", "--max_rank is 0; it must be at least 1"),
        ("max_rank needs variable_rank=True", "--max_rank needs --variable_rank"),
        ("rank_budget, max_rank need variable_rank=True.", "--rank_budget, --max_rank need --variable_rank."),
        ("lower max_sequence_length=64, or not", "lower --max_sequence_length 64, or not"),
        # one without stands in backticks, and is a word otherwise
        ("`rank` 64 is larger; its rank is 8", "--rank 64 is larger; its rank is 8"),
        ("make a new head (`head='new'`)", "make a new head (--head new)"),
        ("`resolution` 100 is odd", "--resolution 100 is odd"),
        # flags of another name
        ("leave it out of target_modules", "leave it out of --lora_layers"),
        ("raise memory_budget_gb, or less", "raise --init_memory_budget_gb, or less"),
        # what is switched off
        ("pass mask_padding=False", "pass --no-init_mask_padding"),
        ("pass keep_best=False", "pass --no_keep_best"),
        ("pass use_dora=False", "pass no --use_dora"),
        # what the script has no flag for stays as it is
        ("pass share_inputs=False, `adapter`", "pass share_inputs=False, `adapter`"),
        # what only looks like one
        ("'max_rank' and --max_rank and /x/max_rank/y.png", "'max_rank' and --max_rank and /x/max_rank/y.png"),
        ("call max_rank() or a.max_rank or max_rank.json", "call max_rank() or a.max_rank or max_rank.json"),
        ("layer 'max_rank.to_q', {'max_rank': 3}", "layer 'max_rank.to_q', {'max_rank': 3}"),
        # families: an option here, or another script
        ("use `family_class('flux')` for it", "use --family flux for it"),
        ("use `family_class('sdxl')` for it", "use train_sdxl_lora.py for it"),
        ("use `family_class('dit')` for it", "use train_dit_lora.py --family dit for it"),
        # what is loaded by a name
        ("base model 'x' is a y", "base model 'x' (--pretrained_model_name_or_path) is a y"),
        ("the VAE 'x' is missing", "the VAE 'x' is missing"),
    ],
)
def test_parameters_become_flags(message: str, expected: str) -> None:
    assert in_flags(message, FLAGS) == expected
    assert in_flags(expected, FLAGS) == expected
    assert in_flags(message, {}) == message


def test_a_script_says_in_flags_what_the_library_says_in_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        parser = ScriptParser()
        parser.add_argument("--lora_layers")
        parser.add_argument("--rank", type=int, help="")
        parser.parse_args([])
        raise ValueError("lower `rank`, or leave the layer out of target_modules")

    with pytest.raises(SystemExit) as left:
        run_script(main)
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: lower --rank, or leave the layer out of --lora_layers\n"


def test_the_flags_are_those_of_the_line_that_was_read_last() -> None:
    for name in ("first", "second"):
        parser = argparse.ArgumentParser()
        parser.add_argument(f"--{name}_option", choices=("a", "b"))
        remember_flags(parser)
    assert in_flags("first_option and second_option") == "first_option and --second_option"


def texts_of(file: Path) -> list[str]:
    """The texts of a file that are no docstrings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docstrings)
    return [node.value for node in constants if isinstance(node.value, str)]


@pytest.mark.parametrize(
    "folder",
    ["", "adapters", "methods", "families", "loading", "evaluation", "export"],
    ids=lambda folder: folder or "core",
)
def test_the_library_names_no_script_and_no_flag(folder: str) -> None:
    outside = {"cli.py", "run.py"} if not folder else set()  # command lines themselves
    files = [file for file in sorted((LIBRARY / folder).glob("*.py")) if file.name not in outside]
    assert files
    named = re.compile(r"(?<![\w-])--(?!text|soft|page|panel|line|good|bad|accent)[a-z]\w*|train_\w+\.py|compare_inits")
    found = {(file.name, match[0]) for file in files for text in texts_of(file) for match in named.finditer(text)}
    assert not found
