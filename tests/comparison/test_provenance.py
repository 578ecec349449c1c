"""What a comparison says before it begins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from script_fixtures import argv_of

from lorainit_diffusers.comparison.compare import parse_args
from lorainit_diffusers.comparison.options import ImageComparisonOptions
from lorainit_diffusers.comparison.provenance import comparison_banner
from lorainit_diffusers.comparison.tasks import TextToImageTask


def test_a_comparison_says_its_grid_and_the_captions_that_are_cut(
    random_sd: Path, image_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"file_name": f"{i:02d}.png", "text": "a" * (30 if i == 1 else 3)} for i in range(4)]
    (image_dir / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {"inits": ["gaussian", "orthonormal"], "learning_rates": [1e-3], "seeds": [0], "max_train_steps": 1}
    given |= {"pretrained_model_name_or_path": random_sd, "train_data_dir": image_dir, "train_batch_size": 2}
    options = parse_args(argv_of(given))
    assert isinstance(options, ImageComparisonOptions)
    for captions in (False, True):
        text = comparison_banner(options, None, captions=captions)
        assert "runs: 2 initialisations x 1 learning rates x 1 seeds" in text
        assert f"images         4 training, 2 held out; --train_data_dir {image_dir}" in text
        assert ("tokens beyond the 12 that text_encoder takes: 20 of 1 captions" in text) == captions
    TextToImageTask(options, torch.device("cpu"))
    assert "tokens beyond the 12 that text_encoder takes: 20 of 1 captions" in capsys.readouterr().out
