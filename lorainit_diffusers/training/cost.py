"""What a run cost, and the command that it was started with."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

# Options whose values are nobody else's business.
_SECRETS = ("--hub_token",)


class Stopwatch:
    """Seconds by part of a run.

    Args:
        parts: That are shown even where they take no time.
    """

    def __init__(self, *parts: str) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(parts, 0.0)

    @contextmanager
    def part(self, name: str) -> Generator[None, None, None]:
        """Add the seconds that the block takes to those of this part."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def peak_memory(device: str) -> str:
    """The most memory that this process has taken, in words: of the GPU, and of the machine."""
    machine = f"{_peak_bytes() / 1e9:.2f} GB of the machine"
    if not device.startswith("cuda"):
        return machine
    return f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB of {torch.cuda.get_device_name(device)}, {machine}"


def _peak_bytes() -> int:
    """The largest resident size of this process; the present one on systems that do not keep the largest."""
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().rss
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def command_line(script: str, argv: Sequence[str] | None = None) -> str:
    """How this process was started, to be copied; empty where it runs something else than `script`.

    The script itself, its module of the package (`-m lorainit_diffusers.training.sd`) and `lorainit` run the same.

    Args:
        script: Name of the script without its ending, such as `train_sd_lora`.
        argv: `sys.argv`, unless it is said otherwise.
    """
    words = list(sys.argv if argv is None else argv)
    module = script.removeprefix("train_").removesuffix("_lora")
    started = Path(words[0]).stem if words else ""
    if started not in (script, module, "lorainit"):
        return ""
    if started == module:
        words[0:1] = ["-m", f"lorainit_diffusers.training.{module}"]
    for place, word in enumerate(words):
        flag, equals, _ = word.partition("=")
        if flag in _SECRETS:
            if equals:
                words[place] = f"{flag}=..."
            elif place + 1 < len(words):
                words[place + 1] = "..."
    return shlex.join(["lorainit", *words[1:]] if started == "lorainit" else ["accelerate", "launch", *words])
