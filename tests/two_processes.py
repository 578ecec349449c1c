"""Run training scripts in two processes: `python two_processes.py jobs.json`, with `[[script, options], ...]` in it.

The processes are forked once everything is imported, which a launcher would do twice, and talk over gloo.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from script_fixtures import run_main

SCRIPTS = ("train_sd_lora", "train_classifier_lora", "train_vlm_lora")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def work(process: int, ports: list[int], jobs: list[tuple[str, dict[str, Any]]]) -> None:
    faulthandler.dump_traceback_later(200, exit=True)  # a hang says where, and ends
    torch.set_num_threads(1)
    os.environ |= {
        **{"RANK": str(process), "LOCAL_RANK": str(process), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        **{"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"},
    }
    for port, (script, options) in zip(ports, jobs, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        run_main(importlib.import_module(script), options)


if __name__ == "__main__":
    for name in SCRIPTS:
        importlib.import_module(name)
    todo = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    free = [free_port() for _ in todo]
    workers = [context.Process(target=work, args=(process, free, todo)) for process in range(2)]
    for worker in workers:
        worker.start()
    # Asked once a round: waiting for nobody, when both have just ended, would never end.
    while alive := [worker.sentinel for worker in workers if worker.is_alive()]:
        multiprocessing.connection.wait(alive)
        if any(worker.exitcode for worker in workers):  # the other one would wait for it for ever
            for worker in workers:
                worker.kill()
    sys.exit(max(abs(worker.exitcode or 0) for worker in workers))
