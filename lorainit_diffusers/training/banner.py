"""What a run begins with: a short text that says what is trained on what, for how long, and what was left out.

Each function gives lines of (label, text); `format_banner` makes them a text. A report can show the same lines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Line = tuple[str, str]
# Classes that are named one by one.
_MAX_CLASSES = 8
_EXAMPLE_LENGTH = 80


class TokenCounts(Protocol):
    """As `families.text_to_image.TokenCounts`: tokens of each caption, and how many a text encoder gets."""

    @property
    def counts(self) -> list[int]:
        """Tokens of each caption."""
        ...

    @property
    def limit(self) -> int:
        """How many tokens the text encoder gets."""
        ...


@dataclass(frozen=True)
class Schedule:
    """How long a run trains.

    Attributes:
        steps: Of the optimiser.
        batch_size: Samples of one batch.
        accumulation: Batches of one process for one step.
        processes: That train together.
        samples: Of one epoch.
        first_step: That a resumed run goes on from.
    """

    steps: int
    batch_size: int
    accumulation: int
    processes: int
    samples: int
    first_step: int = 0


@dataclass(frozen=True)
class RunFacts:
    """What a run is, beside its data and its length.

    Attributes:
        base: Folder or name.
        init: Name of the initialisation.
        init_options: Its hyper-parameters.
        learning_rate: As a text, with those of other parts.
        adapter: Rank and what else there is to say.
        output: Directory.
        init_batches: Batches that it is computed from; None where it looks at no data.
        notes: Further lines.
    """

    base: str
    init: str
    init_options: Mapping[str, Any]
    learning_rate: str
    adapter: str
    output: str
    init_batches: str | None = None
    notes: Sequence[Line] = field(default_factory=tuple[Line, ...])


def format_banner(lines: Sequence[Line]) -> str:
    """The lines with their labels in a column of their own; a label that comes again is not written again."""
    width = max((len(label) for label, _ in lines), default=0)
    texts: list[str] = []
    previous = ""
    for label, text in lines:
        shown = "" if label == previous and label != "warning" else label
        texts.append(f"{shown:{width}s}  {' '.join(text.split())}".rstrip())
        previous = label
    return "\n".join(texts)


def count_line(counts: Mapping[str, int], source: str, what: str = "images") -> Line:
    """How many samples each part of the data has."""
    parts = [f"{count:,d} {name}" for name, count in counts.items() if count or name == "training"]
    return what, f"{', '.join(parts)}; {source}"


def class_lines(labels: Mapping[str, Sequence[str]], class_names: Sequence[str]) -> list[Line]:
    """How many images each class has in each part of the data."""
    lines: list[Line] = []
    for part, names in labels.items():
        counts = Counter(dict.fromkeys(class_names, 0))
        counts.update(names)
        if len(counts) <= _MAX_CLASSES:
            text = ", ".join(f"{name} {counts[name]:,d}" for name in class_names)
        else:
            few, many = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
            text = f"{counts[few]:,d} ({few}) to {counts[many]:,d} ({many}) images each"
            text = f"{counts[few]:,d} images each" if counts[few] == counts[many] else text
        lines.append(("classes", f"{len(counts):,d} in {part}: {text}"))
    return lines


def caption_line(captions: Sequence[str], what: str = "captions") -> Line:
    """How many captions there are, how many differ, and one of them."""
    different = len(set(captions))
    kinds = {1: "all the same", len(captions): "all different"}.get(different, f"{different:,d} different")
    return what, f"{len(captions):,d}, {kinds}, such as {shorten(captions[0])!r}"


def size_lines(sizes: Sequence[tuple[int, int]], targets: Sequence[tuple[int, int]] | None = None) -> list[Line]:
    """The smallest and the largest image, and how many are enlarged.

    Args:
        sizes: (height, width) of the images, one at least.
        targets: (height, width) that each is brought to; None where that is not known.
    """
    smallest, largest = (pick(sizes, key=lambda size: (size[0] * size[1], size)) for pick in (min, max))
    text = _by(smallest) if smallest == largest else f"{_by(smallest)} to {_by(largest)}"
    lines = [("image sizes", f"{text} (width x height)")]
    if targets is not None:
        enlarged = sum(
            height < target[0] or width < target[1] for (height, width), target in zip(sizes, targets, strict=True)
        )
        brought = _by(targets[0]) if len(set(targets)) == 1 else f"{len(set(targets))} sizes by their aspect"
        lines.append(("resolution", f"{brought}; {enlarged:,d} of {len(sizes):,d} images are smaller and get enlarged"))
    return lines


def cut_lines(names: Sequence[str], lengths: Mapping[str, TokenCounts]) -> list[Line]:
    """For each text encoder the captions that it cannot take whole.

    Args:
        names: Of the captions, such as the files of their images.
        lengths: Text encoder -> tokens of the captions, and its limit.
    """
    lines: list[Line] = []
    for encoder, (counts, limit) in ((name, (found.counts, found.limit)) for name, found in lengths.items()):
        cut = [index for index, count in enumerate(counts) if count > limit]
        if cut:
            lost = sum(counts[index] - limit for index in cut)
            lines.append(
                (
                    "left out",
                    f"tokens beyond the {limit} that {encoder} takes: {lost:,d} of {len(cut):,d} captions, which are "
                    f"cut (first {names[cut[0]]}, {counts[cut[0]]} tokens; longest {max(counts)})",
                )
            )
    return lines


def schedule_line(schedule: Schedule) -> Line:
    """Steps, what one step sees, and epochs."""
    factors = [("accumulated", schedule.accumulation), ("processes", schedule.processes)]
    parts = [f"{schedule.batch_size} a batch", *(f"{number} {name}" for name, number in factors if number > 1)]
    per_step = schedule.batch_size * schedule.accumulation * schedule.processes
    product = f" ({' x '.join(parts)})" if len(parts) > 1 else ""
    epochs = schedule.steps * per_step / max(1, schedule.samples)
    resumed = f", from step {schedule.first_step} on" if schedule.first_step else ""
    return "training", f"{schedule.steps:,d} steps of {per_step:,d}{product}: {epochs:.3g} epochs{resumed}"


def run_lines(facts: RunFacts) -> list[Line]:
    """What is trained from what, and where it is written."""
    options = ", ".join(f"{name} {_short(value)}" for name, value in facts.init_options.items())
    seen = f", from {facts.init_batches}" if facts.init_batches is not None else ""
    return [
        ("learning rate", facts.learning_rate),
        ("adapter", facts.adapter),
        ("base", facts.base),
        ("init", f"{facts.init}{f' ({options})' if options else ''}{seen}"),
        *facts.notes,
        ("output", facts.output),
    ]


def shorten(text: str) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= _EXAMPLE_LENGTH else f"{line[: _EXAMPLE_LENGTH - 3]}..."


def _by(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]}"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
