"""No call that loads a model leaves it to a library whether code of a repository may run."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from sd_fixtures import ROOT

FILES = [
    path
    for folder in ("lorainit_diffusers", "train_scripts", "benchmarks", ".ci")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
# Loaders of our own, which say it themselves, and PEFT's, which loads adapters into a model that is there.
OWN = {
    "ImagePreparation",
    "ClassifierFamily",
    "VisionLanguageFamily",
    "PeftModel",
    "family_class",
    "family_class(kind)",
}


def calls(path: Path) -> list[ast.Call]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_loading_call_says_that_no_code_is_run(path: Path) -> None:
    for call in calls(path):
        if not isinstance(call.func, ast.Attribute) or call.func.attr not in ("from_pretrained", "load_dataset"):
            continue
        receiver = ast.unparse(call.func.value)
        if receiver in OWN or (path.parent.name == "comparison" and receiver == "kind"):
            continue
        said = [keyword.value for keyword in call.keywords if keyword.arg == "trust_remote_code"]
        assert len(said) == 1, f"{path.name}:{call.lineno}: {receiver}.{call.func.attr} does not say trust_remote_code"
        assert isinstance(said[0], ast.Constant)
        assert said[0].value is False


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nobody_says_otherwise(path: Path) -> None:
    for call in calls(path):
        for keyword in call.keywords:
            if keyword.arg in ("trust_remote_code", "use_safetensors"):
                assert isinstance(keyword.value, ast.Constant)
                assert keyword.value.value is (keyword.arg == "use_safetensors")
