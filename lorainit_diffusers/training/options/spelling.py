"""What a misspelt name was meant for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Similarity (difflib's ratio) of two names that one is taken for a misspelling of the other.
_CUTOFF = 0.6


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that this one was meant for, as far as its spelling tells."""
    names = list(known)
    folded = {candidate.lower().replace("-", "_"): candidate for candidate in reversed(names)}
    found = difflib.get_close_matches(name.lower().replace("-", "_"), folded, n=1, cutoff=_CUTOFF)
    return folded[found[0]] if found else None


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """A sentence on a name that does not exist: what there is, and what was meant."""
    names = list(known)
    meant = closest(name, names)
    question = f"; did you mean {meant}?" if meant is not None else ""
    return f"unknown {what} {name!r}; known: {', '.join(names)}{question}"
