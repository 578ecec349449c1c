"""Run `train_sd_lora.py` with a failure in one process: `torchrun failing_process.py WHERE RANK [options]`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from lorainit_diffusers.families.sd import StableDiffusionFamily
from lorainit_diffusers.training import sd
from lorainit_diffusers.training.cli import run_script
from lorainit_diffusers.training.optimization import Optimization

WHERE, RANK, *OPTIONS = sys.argv[1:]
CALLS = {"collection": 1, "training": 5, "killed": 5}  # of the loss, that succeed


def fail_after(calls: int, function: Any) -> Any:
    left = calls

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            return function(*args, **kwargs)
        Path(os.environ["FAILED_AT"]).write_text(str(time.time()), encoding="utf-8")
        if WHERE == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError(f"failed in {WHERE}, on purpose")

    return wrapped


if os.environ["RANK"] == RANK:
    if WHERE == "saving":
        Optimization.save = fail_after(0, Optimization.save)
    elif WHERE in CALLS:
        StableDiffusionFamily.loss = fail_after(CALLS[WHERE], StableDiffusionFamily.loss)
run_script(lambda: sd.main(OPTIONS))
