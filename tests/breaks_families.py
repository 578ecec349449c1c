"""Breaks of the families: losses and inputs."""

from __future__ import annotations

from breaks import Break

BREAKS: tuple[Break, ...] = ()
