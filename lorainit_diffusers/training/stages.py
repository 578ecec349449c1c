"""The stages of a run on a task: what is evaluated thoroughly, and what it is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorainit_diffusers.families.base import ModelFamily

# The stages of a run that are evaluated thoroughly: what the base does is not always what step 0 does.
STAGES = ("base", "step-0", "end")


def stages(lines: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The metrics of the thorough evaluations by stage, of a log's lines."""
    found = {str(line["stage"]): line for line in lines if "stage" in line}
    return {stage: found[stage] for stage in STAGES if stage in found}


def stage_label(family: ModelFamily | None, stage: str) -> str:
    """A stage as it is shown: a head that is new and random scores what chance does, whatever the base can."""
    untrained = stage in ("base", "step-0") and getattr(family, "has_new_head", False)
    return f"{stage} (new random head)" if untrained else stage
