"""A results directory as `compare_inits.py` leaves it, from curves written out by hand."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

Cell = tuple[str, float, int]  # init, learning rate, seed


def run_name(cell: Cell) -> str:
    init, rate, seed = cell
    return f"{init.replace(':', '-')}-lr{rate:g}-seed{seed}"


def write_comparison(
    directory: Path,
    curves: Mapping[Cell, Mapping[int, float | str]],
    *,
    metrics: Mapping[Cell, Mapping[int, Mapping[str, float]]] | None = None,
    primary: str = "validation_loss",
    init_s: Mapping[str, float] | None = None,
    timings: bool = True,
    **config: Any,
) -> Path:
    """Write the three files: `curves` has the primary metric by step, a text is written as it is."""
    directory.mkdir(parents=True, exist_ok=True)
    metrics = metrics or {}
    columns = list(dict.fromkeys(c for steps in metrics.values() for row in steps.values() for c in row))
    keys = ["run", "init", "learning_rate", "seed", "rank", "num_parameters", "step"]
    with (directory / "results.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*keys, primary, *columns])
        for cell, curve in curves.items():
            for step, value in curve.items():
                scored = metrics.get(cell, {}).get(step, {})
                writer.writerow([run_name(cell), *cell, 8, 1000, step, value, *(scored.get(c, "") for c in columns)])
    if timings:
        with (directory / "timings.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["run", "step", "init_s", "train_s"])
            for cell, curve in curves.items():
                for step in curve:
                    writer.writerow([run_name(cell), step, (init_s or {}).get(cell[0], 0.0), 0.1 * step])
    rates: dict[str, list[float]] = {}
    for init, rate, _ in curves:
        rates[init] = sorted({*rates.get(init, []), rate})
    content = {
        "arguments": {"rank": 8},
        "command": "accelerate launch train_scripts/compare_inits.py",
        "base_model": "assets/models/tiny-sd",
        "dataset": "assets/data/high-contrast",
        "num_images": 40,
        "num_heldout_images": 20,
        "versions": {"torch": "2.6.0"},
        "hardware": "2 cores",
        "date": "2026-11-24",
        "primary_metric": primary,
        "encoder": "tiny-clip",
        "baselines": ["gaussian", "orthonormal"],
        "seeds": sorted({seed for _, _, seed in curves}),
        "learning_rates": rates,
        "max_train_steps": max(step for curve in curves.values() for step in curve),
    }
    (directory / "config.json").write_text(json.dumps(content | config), encoding="utf-8")
    return directory


def write_samples(directory: Path, cell: Cell, steps: Sequence[int], prompts: Sequence[str], side: int = 16) -> None:
    """Strips of plain images whose colour is the step and the column."""
    folder = directory / "runs" / run_name(cell) / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        strip = Image.new("RGB", (side * len(prompts), side))
        for column in range(len(prompts)):
            strip.paste((200, 10 * column, step % 256), (column * side, 0, (column + 1) * side, side))
        strip.save(folder / f"step-{step:06d}.png")
    (directory / "prompts.json").write_text(json.dumps({"prompts": list(prompts)}), encoding="utf-8")
    Image.new("RGB", (side * len(prompts), side), (0, 255, 0)).save(directory / "base.png")


def write_init_report(directory: Path, cell: Cell, ranks: Mapping[str, int], captured: float | None = None) -> None:
    """What `InitReport.to_json` gives, as far as the report reads it."""
    folder = directory / "runs" / run_name(cell)
    folder.mkdir(parents=True, exist_ok=True)
    layers = {name: {"rank": rank, "scores": None, "captured": captured} for name, rank in ranks.items()}
    (folder / "init_report.json").write_text(json.dumps({"layers": layers}), encoding="utf-8")
