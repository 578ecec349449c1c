"""Comparisons of initialisations: the grid of runs, their training and scores, the analysis and its report.

The public names are imported when they are first asked for: the command line of a comparison does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorainit_diffusers.comparison.analysis import Comparison
    from lorainit_diffusers.comparison.report import result_sentences, write_report

__all__ = ["Comparison", "result_sentences", "write_report"]

# The file of each public name.
_FILES = {"Comparison": "analysis", "result_sentences": "report", "write_report": "report"}


def __getattr__(name: str) -> Any:
    if name in _FILES:
        return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
