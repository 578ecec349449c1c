"""The house: files and functions that can be read in one sitting, and layers that know only those below them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from sd_fixtures import ROOT
from test_imports import library_imports

LIBRARY = ROOT / "lorainit_diffusers"
MOST_LINES_OF_A_FILE = 500
MOST_LINES_OF_A_FUNCTION = 80  # docstring and signature included
MOST_PARAMETERS = 10
# What may be larger, and why.
MORE_PARAMETERS = {
    ("initialize.py", "initialize"): "the public call: its keywords are what a user sets",
}
# From the bottom up: a layer imports from itself and from those before it. The core is all that no other layer names.
LAYERS = (
    ("core",),
    ("families", "evaluation", "export"),
    ("in_loop", "attach", "init_file", "integrations", "run"),  # loops of other programs
    ("training",),
    ("comparison",),
    ("cli",),
)
# Contracts of a higher layer that lower ones may know.
CONTRACTS = {"families.base"}

FILES = sorted(LIBRARY.rglob("*.py"))
EVERY_FILE = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(LIBRARY).as_posix())
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(path: Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, Function):
            yield node


def num_parameters(function: Function) -> int:
    """Those that a caller can give; `self` and `cls` are none."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    own = [argument for argument in named if argument.arg not in ("self", "cls")]
    return len(own) + (arguments.vararg is not None) + (arguments.kwarg is not None)


def too_large(path: Path) -> list[str]:
    """What is larger than it may be in a file, in words."""
    name, found = path.relative_to(LIBRARY).as_posix(), []
    lines = len(path.read_text(encoding="utf-8").splitlines())
    if lines > MOST_LINES_OF_A_FILE:
        found.append(f"{name} has {lines} lines: split it")
    for function in functions(path):
        lines, count = (function.end_lineno or function.lineno) - function.lineno + 1, num_parameters(function)
        if lines > MOST_LINES_OF_A_FUNCTION:
            found.append(f"{name}: {function.name} has {lines} lines: take a part out of it")
        if count > MOST_PARAMETERS and (name, function.name) not in MORE_PARAMETERS:
            found.append(f"{name}: {function.name} has {count} parameters: group them in a dataclass")
    return found


def layer_of(module: str) -> int:
    """The number of the layer of a module, which is named without the package."""
    unit = module.partition(".")[0]
    return next((number for number, units in enumerate(LAYERS) if unit in units), 0)


@EVERY_FILE
def test_files_and_functions_can_be_read_in_one_sitting(path: Path) -> None:
    assert not too_large(path)


def test_what_may_be_larger_exists() -> None:
    for name, function in MORE_PARAMETERS:
        assert function in {found.name for found in functions(LIBRARY / name)}, f"{name} has no {function} any more"


@EVERY_FILE
def test_a_layer_imports_from_those_below_it_only(path: Path) -> None:
    own = ".".join(path.relative_to(LIBRARY).with_suffix("").parts)
    if own == "__init__":  # hands out the public names of all
        return
    for module in library_imports(path) - CONTRACTS:
        assert layer_of(module) <= layer_of(own), (
            f"{own} is of the layer {LAYERS[layer_of(own)]} and must not import {module}"
        )


def test_the_layers_are_those_of_the_package() -> None:
    units = {path.relative_to(LIBRARY).parts[0].removesuffix(".py") for path in FILES}
    assert {unit for layer in LAYERS[1:] for unit in layer} <= units
    assert layer_of("comparison.grid") > layer_of("training.run") > layer_of("export.load") > layer_of("collect") == 0


def test_what_is_too_large_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "LIBRARY", tmp_path)
    body = "    pass\n"
    (tmp_path / "long.py").write_text("x = 1\n" * 501)
    (tmp_path / "right.py").write_text("def f(self, a, b, c, d, e, g, h, i, *, j, k=0):\n" + body * 79)
    (tmp_path / "wrong.py").write_text("def f(a, b, c, d, e, g, h, i, j, *k, m):\n" + body * 80)
    assert too_large(tmp_path / "long.py") == ["long.py has 501 lines: split it"]
    assert not too_large(tmp_path / "right.py")
    assert [text.partition(":")[2].split()[1:3] for text in too_large(tmp_path / "wrong.py")] == [
        ["has", "81"],
        ["has", "11"],
    ]
