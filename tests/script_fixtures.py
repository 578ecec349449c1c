"""How the tests of the training scripts run them in process and read what they wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor

FAST = {
    "init": "cntlora",
    "rank": 2,
    "max_train_steps": 2,
    "train_batch_size": 2,
    "init_num_batches": 2,
    "validation_inference_steps": 1,
    "validation_prompt": "a cat",
    "seed": 0,
}


def argv_of(options: Mapping[str, Any]) -> list[str]:
    """A command line: None and False are left out, True is a switch, a list has several values."""
    argv: list[str] = []
    for flag, value in options.items():
        if flag == "init_option" and isinstance(value, list):
            argv += [text for option in value for text in ("--init_option", option)]
        elif value is True:
            argv.append(f"--{flag}")
        elif value is not None and value is not False:
            argv += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return argv


def run_main(script: Any, options: Mapping[str, Any]) -> Path:
    """Run a script's main as if it had a process of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return script.main(argv_of(options))


def weights(directory: Path) -> dict[str, Tensor]:
    """The LoRA in diffusers' format."""
    return load_file(directory / "pytorch_lora_weights.safetensors")


def changes(directory: Path) -> dict[str, Tensor]:
    """What the LoRA adds to each weight; its factors are singular vectors, which rounding may turn."""
    factors = weights(directory)
    layers = [name.removesuffix(".lora_A.weight") for name in factors if name.endswith(".lora_A.weight")]
    return {layer: factors[f"{layer}.lora_B.weight"] @ factors[f"{layer}.lora_A.weight"] for layer in layers}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def losses(directory: Path, key: str = "loss") -> list[float]:
    """One column of `metrics.jsonl`."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line[key] for line in lines if key in line]
