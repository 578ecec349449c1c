"""Trainings on pairs of images: the model sees one of them beside the noise of the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import train_dit_lora
from flow_fixtures import write_base
from PIL import Image, ImageOps
from script_fixtures import FAST, losses, run_main


def test_pairs_of_images(tmp_path: Path, image_dir: Path) -> None:
    base = write_base(tmp_path / "kontext", "flux-kontext")
    for part in ("train", "heldout"):
        metadata = image_dir / part / "metadata.jsonl"
        rows = [json.loads(line) for line in metadata.read_text(encoding="utf-8").splitlines()]
        (image_dir / part / "before").mkdir()
        for row in rows:
            name = row["file_name"]
            ImageOps.invert(Image.open(image_dir / part / name)).save(image_dir / part / "before" / name)
            row["before"] = f"before/{name}"
        metadata.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    def run(name: str, **options: Any) -> Path:
        given = {"pretrained_model_name_or_path": base, "train_data_dir": image_dir, "output_dir": tmp_path / name}
        settings = {
            "init": "gaussian",
            "conditioning_image_column": "before",
            "resolution": 32,
            "center_crop": True,
            "checkpointing_steps": 1,
        }
        return run_main(train_dit_lora, {**FAST, **given, **settings, **options})

    first, cached = run("out"), run("cached", cache_latents=True)
    # encoded once or in every step, held-out images always once: the same means, other draws of the targets
    assert losses(cached, "validation_loss")[0] == pytest.approx(losses(first, "validation_loss")[0], rel=1e-5)
    for path in (image_dir / "heldout" / "before").iterdir():
        Image.new("RGB", (48, 32), (255, 0, 0)).save(path)
    other = run("other")
    assert losses(other) == losses(first)
    assert losses(other, "validation_loss")[0] != pytest.approx(losses(first, "validation_loss")[0], rel=1e-5)
    # a run goes on with the images that it began with
    with pytest.raises(
        ValueError, match=r"the held-out data is not what .*the conditioning image of '00.png' has chang"
    ):
        run("out", resume_from_checkpoint="latest")
