"""Programs that import the first version's modules of `train_scripts` find what they name."""

from __future__ import annotations

import argparse
from pathlib import Path

import common_classify
import common_data
import common_questions
import common_run
import pytest
from PIL import Image

from lorainit_diffusers.training.classification import data as class_data
from lorainit_diffusers.training.data import folders, images
from lorainit_diffusers.training.loop import backward_step


def test_names_are_those_of_the_package() -> None:
    assert common_data.read_image_folder is folders.read_image_folder
    assert common_data.load_image is images.load_image
    assert common_classify.read_class_folder is class_data.read_class_folder
    assert common_run.backward_step is backward_step


def test_a_dataset_of_questions_is_read_from_a_namespace(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    image = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    rows = datasets.Dataset.from_dict({"image": [image] * 2, "question": ["q", "r"], "answer": ["a", "b"]})
    (tmp_path / "set").mkdir()
    rows.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "set" / "train-00000-of-00001.parquet"))
    args = argparse.Namespace(
        **{"dataset_name": str(tmp_path / "set"), "dataset_config_name": None, "cache_dir": str(tmp_path / "cache")},
        **{
            "system_prompt": None,
            "validation_fraction": None,
            "max_train_samples": None,
            "max_validation_samples": None,
        },
    )
    columns = {"image": "image", "question": "question", "answer": "answer"}
    records, validation = common_questions._read_dataset(args, columns)
    assert [record.answers for record in records] == [("a",), ("b",)]
    assert validation == []
