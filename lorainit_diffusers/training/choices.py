"""What options can be, for a command line that is read before torch and diffusers are imported.

What a file of the library assigns is read from its source: a new method or family is named in one place only.
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path

_LIBRARY = Path(__file__).resolve().parents[1]

# diffusers' `SchedulerType`, without the one that takes a rule of its own
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
# names of Pillow's ways to resize
INTERPOLATIONS = ("lanczos", "bilinear", "bicubic", "box", "nearest", "hamming")


@cache
def names_in(file: str, variable: str) -> tuple[str, ...]:
    """The texts of a tuple, or the keys of a dictionary, that a file of the library assigns to this variable.

    Args:
        file: Inside the library, such as `methods/__init__.py`.
        variable: Its name.

    Raises:
        ValueError: When the file assigns nothing of the kind.
    """
    for node in ast.parse((_LIBRARY / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
        elif isinstance(node, ast.AnnAssign):
            target, value = node.target, node.value
        else:
            continue
        if isinstance(target, ast.Name) and target.id == variable and isinstance(value, (ast.Dict, ast.Tuple)):
            items = value.keys if isinstance(value, ast.Dict) else value.elts
            return tuple(item.value for item in items if isinstance(item, ast.Constant) and isinstance(item.value, str))
    raise ValueError(f"{file} assigns no names to {variable}")


def init_names() -> tuple[str, ...]:
    """The values of `--init`: the keys of `METHODS`, with those that a program has added."""
    methods = sys.modules.get("lorainit_diffusers.methods")
    if methods is not None and hasattr(methods, "METHODS"):
        return tuple(methods.METHODS)
    return names_in("methods/__init__.py", "METHODS")


@cache
def init_option_names(init: str) -> tuple[str, ...]:
    """The keys of `--init_option` for an initialisation: the fields of its class, those that it inherits included.

    Raises:
        ValueError: When its source does not tell, as for one that a program has added to `METHODS`.
    """
    tree = ast.parse((_LIBRARY / "methods" / "__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module]
    place = {alias.name: str(node.module).rpartition(".")[2] for node in imports for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == init and isinstance(value, ast.Name):
                    source = (_LIBRARY / "methods" / f"{place[value.id]}.py").read_text(encoding="utf-8")
                    return _fields(ast.parse(source), value.id)
    raise ValueError(f"methods/__init__.py names no class for {init!r}")


def _fields(tree: ast.Module, name: str) -> tuple[str, ...]:
    """The fields of a dataclass of a file, first those of the classes of the same file that it comes from."""
    found = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
    if found is None:
        return ()
    inherited = [field for base in found.bases if isinstance(base, ast.Name) for field in _fields(tree, base.id)]
    own = [
        node.target.id
        for node in found.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and "ClassVar" not in ast.unparse(node.annotation)
    ]
    return tuple(dict.fromkeys([*inherited, *own]))
