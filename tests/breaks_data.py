"""Breaks of the data: images, their order, buckets, classes and questions."""

from __future__ import annotations

from breaks import Break

BREAKS: tuple[Break, ...] = ()
