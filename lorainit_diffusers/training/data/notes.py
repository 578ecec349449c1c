"""What reading the data found beside the data: what was left out and why, and what looks like a mistake."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class DataNotes:
    """Filled while data are read; the banner prints it.

    Attributes:
        left_out: Reason -> names of what was left out for it, each once.
        warnings: Whole sentences on what is used although it looks odd.
        sizes: Part of the data -> (height, width) of its images, in their order.
    """

    left_out: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    warnings: list[str] = field(default_factory=list[str])
    sizes: dict[str, list[tuple[int, int]]] = field(default_factory=dict[str, list[tuple[int, int]]])

    def leave_out(self, reason: str, names: Iterable[str | Path]) -> None:
        """Note what is not used and why, such as "files that are no images"."""
        known = [*self.left_out.get(reason, []), *(printable(str(name)) for name in names)]
        if known:
            self.left_out[reason] = list(dict.fromkeys(known))

    def warn(self, text: str) -> None:
        """Note something odd; the same sentence counts once."""
        if text not in self.warnings:
            self.warnings.append(text)

    def lines(self) -> list[tuple[str, str]]:
        """For the banner: a line for each reason and each warning."""
        found = [("left out", f"{reason}: {len(names):,d} ({some(names)})") for reason, names in self.left_out.items()]
        return found + [("warning", text) for text in self.warnings]


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit:,d} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def printable(name: str) -> str:
    """A file name that any terminal prints: bytes that are no text become question marks."""
    return name.encode("utf-8", "replace").decode("utf-8")


def print_once(text: str) -> None:
    """Print in the main process alone."""
    from torch import distributed  # reading data does without torch

    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank() != 0):
        print(text)
