"""The best step of a run by what was measured on its validation data."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorainit_diffusers.files import TEMPORARY_SUFFIX, announce, write_json
from lorainit_diffusers.training.checkpoints import swap_in

BEST_NAME = "best"
DESCRIPTION_NAME = "best.json"


def best_line(lines: Sequence[Mapping[str, Any]], metric: str, *, larger_is_better: bool) -> Mapping[str, Any] | None:
    """The line of a log with the best validation value; the earliest of several, and `None` where there is none.

    Step 0 takes part: where it is the best, training has improved nothing, which a reader wants to know. The thorough
    evaluations of a stage (`"stage"`) do not: one of them is of the base, without a LoRA.

    Args:
        lines: Those of `metrics.jsonl`, in order.
        metric: Key of the value, such as `validation_loss`; values that are not finite count as missing.
        larger_is_better: Direction of the metric.
    """
    best: Mapping[str, Any] | None = None
    for line in lines:
        if "stage" in line or metric not in line or not math.isfinite(line[metric]):
            continue
        if best is None or is_better(line[metric], best[metric], larger_is_better=larger_is_better):
            best = line
    return best


def is_better(value: float, than: float, *, larger_is_better: bool) -> bool:
    """Whether a finite value beats another; an equal one does not, nor does one that is not finite."""
    if not math.isfinite(value):
        return False
    return value > than if larger_is_better else value < than


@dataclass(frozen=True)
class BestFolder:
    """The folder `best/` of a run: the LoRA of the best validation so far, and `best.json`, which says what it is.

    It is replaced as a whole, so there is no moment with half of one. Every checkpoint has a copy of it, from which a
    resumed run starts, so that what it keeps is what the uninterrupted run keeps, whatever happened in between.

    Attributes:
        output_dir: Of the run.
        metric: What decides, a key of the lines of `metrics.jsonl`.
        larger_is_better: Its direction.
        write: Writes the LoRA, with the weights as they are now, into a folder.
    """

    output_dir: Path
    metric: str
    larger_is_better: bool
    write: Callable[[Path], None]

    @property
    def directory(self) -> Path:
        """Where it is."""
        return self.output_dir / BEST_NAME

    def best(self, lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """The best line of a log."""
        return best_line(lines, self.metric, larger_is_better=self.larger_is_better)

    def update(self, lines: Sequence[Mapping[str, Any]]) -> bool:
        """Keep the weights as they are now if the last line is the best; whether it was."""
        best = self.best(lines)
        if best is None or best is not lines[-1]:
            return False

        def fill(folder: Path) -> None:
            self.write(folder)
            description = {"step": best["step"], "metric": self.metric, "value": best[self.metric]}
            write_json(folder / DESCRIPTION_NAME, {**description, "larger_is_better": self.larger_is_better})

        self._replace(fill)
        return True

    def copy_into(self, checkpoint: Path) -> None:
        """Put a copy into a checkpoint's folder; nothing where there is no best yet."""
        if self.directory.is_dir():
            shutil.copytree(self.directory, checkpoint / BEST_NAME)

    def restore(self, checkpoint: Path) -> None:
        """Go back to what was the best when this checkpoint was written."""
        if (checkpoint / BEST_NAME).is_dir():
            self._replace(lambda folder: shutil.copytree(checkpoint / BEST_NAME, folder, dirs_exist_ok=True))
        else:
            shutil.rmtree(self.directory, ignore_errors=True)

    def summary(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        """What `config.json` says: step and value of the best, and the value of the last validation."""
        best = self.best(lines)
        if best is None:
            return None
        last = next(line for line in reversed(lines) if self.metric in line and "stage" not in line)
        return {
            **{"step": best["step"], "metric": self.metric, "value": best[self.metric], "directory": BEST_NAME},
            **{"last_step": last["step"], "last_value": last[self.metric]},
        }

    def sentence(self, lines: Sequence[Mapping[str, Any]]) -> str | None:
        """The same for a reader: `best: step 50, validation loss 0.553 (best/); the last step has 0.561`."""
        found = self.summary(lines)
        if found is None:
            return None
        named = f"{self.metric.replace('_', ' ')} {found['value']:.3f} ({BEST_NAME}/)"
        if found["step"] == found["last_step"]:
            return f"best: step {found['step']}, the last, {named}"
        untrained = ", before training" if found["step"] == 0 else ""
        return f"best: step {found['step']}{untrained}, {named}; the last step has {found['last_value']:.3f}"

    def _replace(self, fill: Callable[[Path], object]) -> None:
        scratch = self.output_dir / f".{BEST_NAME}{TEMPORARY_SUFFIX}"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        fill(scratch)
        for path in scratch.rglob("*"):
            announce(self.directory / path.relative_to(scratch))
        swap_in(scratch, self.directory)
