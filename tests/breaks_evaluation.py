"""Breaks of what is measured: validation, metrics, answers, the analysis of a comparison."""

from __future__ import annotations

from breaks import Break

BREAKS: tuple[Break, ...] = ()
