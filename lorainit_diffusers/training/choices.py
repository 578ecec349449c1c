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
        file: inside the library, such as `methods/__init__.py`.
        variable: its name.

    Raises:
        ValueError: when the file assigns nothing of the kind.
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
