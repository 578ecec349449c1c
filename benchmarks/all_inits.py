"""One run of train_sd_lora.py for every initialisation, on the same data, seed and budget, and a table of the losses.

    python benchmarks/all_inits.py --output_dir outputs/all-inits
    python benchmarks/all_inits.py --output_dir outputs/blobs -- --train_data_dir assets/data/blobs --learning_rate 5e-4

What follows ``--`` goes to the training script. One learning rate and one seed rank nothing: this shows that every
method runs and what it costs, not which is best. Runs that are already there are not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from lorainit_diffusers import METHODS

SCRIPT = Path(__file__).resolve().parent.parent / "train_scripts" / "train_sd_lora.py"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--init", nargs="+", default=list(METHODS))
    parser.add_argument("script_arguments", nargs="*", help="after --: for train_sd_lora.py")
    args = parser.parse_args(argv)
    rows: list[tuple[str, dict[int, float], dict[str, object]]] = []
    for name in args.init:
        run = args.output_dir / name
        if not (run / "pytorch_lora_weights.safetensors").exists():
            command = [sys.executable, str(SCRIPT), "--init", name, "--output_dir", str(run), *args.script_arguments]
            subprocess.run(command, check=True)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
        rows.append((name, losses, json.loads((run / "init_report.json").read_text())))
    steps = sorted(rows[0][1])
    print("\n| init | " + " | ".join(f"step {step}" for step in steps) + " | init seconds |")
    print("|---|" + "---|" * (len(steps) + 1))
    for name, losses, report in rows:
        seconds = sum(float(str(report[key])) for key in ("forward_s", "statistics_s", "solve_s"))
        print(f"| {name} | " + " | ".join(f"{losses[step]:.4f}" for step in steps) + f" | {seconds:.1f} |")


if __name__ == "__main__":
    main()
