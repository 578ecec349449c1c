"""The architecture, enforced: imports go one way, and the delicate things happen in one file each."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from sd_fixtures import ROOT

LIBRARY = ROOT / "lorainit_diffusers"
SCRIPTS = ROOT / "train_scripts"

# unit -> the units of the library that it may import; `base` files are the contracts that others may know
MAY_IMPORT: dict[str, set[str]] = {
    "linalg": set(),
    "eigenbasis": {"linalg"},
    "ridged": {"linalg"},
    "statistics": {"linalg", "eigenbasis", "ridged"},
    "budget": {"statistics"},
    "quantized": set(),
    "hooks": {"quantized"},
    "ranks": {"methods.base", "report"},
    "report": {"files"},
    "progress": set(),
    "files": set(),
    "finite": set(),
    "loading": set(),
    "evaluation": {"families.base", "files", "loading"},
    "families": {"ranges", "loading"},
    "ranges": set(),
    "methods": {"statistics", "linalg", "eigenbasis", "ranges", "ridged"},
    "training_step": {"families.base"},
    "early_stop": {"adapters", "methods", "statistics"},
    "collect": {"statistics", "budget", "early_stop", "hooks", "methods.base", "linalg", "progress", "training_step"},
    "target": {"adapters", "families.base", "ranges"},
    "rank_plan": {"methods", "ranges", "ranks", "report", "target"},
    "solving": {"adapters", "collect", "methods", "quantized", "rank_plan", "statistics"},
    "offset": {"methods.base"},
    "trained": set(),
    "lora_config": set(),
    "adapters": {"lora_config", "methods.base", "offset", "quantized", "trained"},
    "export": {"adapters", "files", "finite", "linalg", "lora_config", "methods.base", "ranges", "trained"},
    "initialize": {
        *(
            "adapters",
            "budget",
            "collect",
            "early_stop",
            "families.base",
            "methods",
            "rank_plan",
            "ranges",
            "report",
            "solving",
        ),
        *("statistics", "target", "training_step"),
    },
    "init_file": {"adapters", "files", "finite", "report"},
    "in_loop": {"adapters", "export"},
    "attach": {
        *("adapters", "export", "files", "hooks", "in_loop", "init_file", "initialize", "methods", "rank_plan"),
        *("ranges", "report"),
    },
    "integrations": {"adapters", "export", "files", "finite", "init_file", "methods.base"},
    "run": {"attach", "in_loop", "init_file", "initialize", "methods"},
    "__init__": {"adapters", "attach", "export", "initialize", "methods", "report"},
}
# What runs the library may import all of it; a training knows no comparison.
MAY_IMPORT["training"] = MAY_IMPORT.keys() - {"__init__"}
MAY_IMPORT["comparison"] = MAY_IMPORT.keys() - {"__init__"}
MAY_IMPORT["cli"] = MAY_IMPORT.keys() - {"__init__"}


def library_imports(path: Path) -> set[str]:
    """Modules of the library that a file imports, without the package's own name; type-checking imports too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            if node.module == "lorainit_diffusers":
                found |= {alias.name for alias in node.names}
            elif node.module.startswith("lorainit_diffusers."):
                found.add(node.module.removeprefix("lorainit_diffusers."))
        elif isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if a.name.startswith("lorainit_diffusers")}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
    return found


def imported_packages(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
    return found


def unit_of(path: Path) -> str:
    parts = path.relative_to(LIBRARY).with_suffix("").parts
    return parts[0]


LIBRARY_FILES = sorted(LIBRARY.rglob("*.py"))
ALL_FILES = [*LIBRARY_FILES, *sorted(SCRIPTS.rglob("*.py"))]


@pytest.mark.parametrize("path", LIBRARY_FILES, ids=lambda path: path.relative_to(LIBRARY).as_posix())
def test_imports_go_one_way(path: Path) -> None:
    unit = unit_of(path)
    assert unit in MAY_IMPORT, f"{unit} is new: say in MAY_IMPORT what it may import"
    for module in library_imports(path):
        inside = module == unit or module.startswith(f"{unit}.")
        allowed = any(module == other or module.startswith(f"{other}.") for other in MAY_IMPORT[unit])
        assert inside or allowed, f"{path.relative_to(ROOT)} must not import lorainit_diffusers.{module}"


def test_only_the_package_of_adapters_imports_peft() -> None:
    users = [path for path in ALL_FILES if "peft" in imported_packages(path)]
    assert {path.parent for path in users} == {LIBRARY / "adapters"}


def test_only_hooks_registers_hooks() -> None:
    others = re.compile(r"make_hook\(|register_(save|load)_state_pre_hook\(")  # accelerate's are on no module
    users = [path.name for path in ALL_FILES if "_hook(" in others.sub("", path.read_text(encoding="utf-8"))]
    assert users == ["hooks.py"]


def test_nothing_reads_pickles() -> None:
    for path in ALL_FILES:
        assert not imported_packages(path) & {"pickle", "dill", "joblib", "cloudpickle"}, path.name
        calls = [
            ast.unparse(node.func)
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(node, ast.Call)
        ]
        assert not {"torch.load", "torch.save"} & set(calls), path.name


def test_scripts_do_not_import_one_another() -> None:
    scripts = {path.stem for path in SCRIPTS.glob("*.py")}
    shared = {name for name in scripts if name.startswith("common")}
    for path in SCRIPTS.glob("*.py"):
        assert imported_packages(path) & scripts <= shared - {path.stem}, path.name


def test_nothing_needs_torchvision() -> None:
    assert not [path.name for path in ALL_FILES if "torchvision" in imported_packages(path)]
