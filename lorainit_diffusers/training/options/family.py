"""Which family a base is of, by the pipeline that its `model_index.json` names."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

AUTO = "auto"
# The family of the bundled transformer, which is trained when no base is given.
BUNDLED_FAMILY = "sd3"
_FAMILIES = Path(__file__).resolve().parents[2] / "families"
_SCRIPTS = {"sd": "train_sd_lora.py", "sdxl": "train_sdxl_lora.py"}


@cache
def families_by_pipeline() -> Mapping[str, str]:
    """Pipeline class -> short name of the family that takes its bases, read from the families' sources.

    What `lorainit_diffusers.families.pipelines.family_of` finds, without an import of torch or diffusers.
    """
    found: dict[str, str] = {}
    for name, (file, kind) in _table().items():
        tree = ast.parse((_FAMILIES / f"{file}.py").read_text(encoding="utf-8"))
        family = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind)
        for node in family.body:
            if not isinstance(node, ast.AnnAssign) or ast.unparse(node.target) != "PIPELINES":
                continue
            if isinstance(node.value, ast.Tuple):
                found |= dict.fromkeys(map(ast.unparse, node.value.elts), name)
    return found


def _table() -> dict[str, tuple[str, str]]:
    for node in ast.parse((_FAMILIES / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TEXT_TO_IMAGE_FAMILIES":
            return ast.literal_eval(node.value)
    raise ValueError("families/__init__.py has no TEXT_TO_IMAGE_FAMILIES")


def settled_family(family: str, base: str | None, revision: str | None = None) -> str:
    """The family's short name: as given, or for `auto` as the base's pipeline says.

    Args:
        family: What `--family` says.
        base: What `--pretrained_model_name_or_path` says; `None` is the bundled one.
        revision: Of a hub repository.

    Raises:
        ValueError: When `auto` finds a base that another script or none trains, or a single file, which says nothing.
    """
    if family != AUTO:
        return family
    if base is None:
        return BUNDLED_FAMILY
    if base.endswith((".safetensors", ".ckpt")):
        raise ValueError(f"--family is missing: {base!r} is a single file, which does not say what it is")
    index = _index(base, revision)
    if index is None:  # that there is none is said when the base is looked at
        return BUNDLED_FAMILY
    pipeline = str(index.get("_class_name"))
    found = families_by_pipeline().get(pipeline)
    if found is None:
        known = ", ".join(families_by_pipeline())
        raise ValueError(
            f"--pretrained_model_name_or_path {base!r} is a {pipeline}, which no family takes; known: {known}"
        )
    if found in _SCRIPTS:
        raise ValueError(
            f"--pretrained_model_name_or_path {base!r} is a {pipeline}, not a diffusion transformer; "
            f"{_SCRIPTS[found]} trains it"
        )
    return found


def _index(base: str, revision: str | None) -> dict[str, Any] | None:
    """The base's `model_index.json`; None where it cannot be had."""
    file = Path(base) / "model_index.json"
    if not Path(base).exists():
        from lorainit_diffusers.loading.hub import hub_options

        try:
            import huggingface_hub

            known = hub_options("base model", base, file.name, revision=revision)
            file = Path(huggingface_hub.hf_hub_download(base, file.name, revision=revision, **known))
        except Exception:  # whatever it is, loading meets it again and says it in one sentence
            return None
    try:
        index: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return cast("dict[str, Any]", index) if isinstance(index, dict) else None
