"""Questions, tasks of VTAB, class images and datasets by name are read as folders are: one reader decides."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorainit_diffusers.comparison.vtab.data import read_task
from lorainit_diffusers.training.classification.data import read_class_dataset
from lorainit_diffusers.training.classification.options import ClassTaskOptions
from lorainit_diffusers.training.data.prior_preservation import missing_class_images
from lorainit_diffusers.training.questions.conversations import read_questions

LINE = {"image": "images/a.png", "question": "What?", "answer": "a café"}


def draw(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path, format="PNG")
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("form", ["lines", "array"])
def test_questions_in_every_encoding_and_form(tmp_path: Path, encoding: str, form: str) -> None:
    draw(tmp_path / "images" / "a.png")
    lines = [json.dumps(LINE, ensure_ascii=False), json.dumps({**LINE, "image": "images\\a.png"}, ensure_ascii=False)]
    text = "\r\n".join(lines) if form == "lines" else f"[{','.join(lines)}]"
    (tmp_path / "q.jsonl").write_bytes(text.encode(encoding))
    records = read_questions(tmp_path / "q.jsonl", flag="--train_data_file")
    assert [record.answers for record in records] == [("a café",)] * 2
    assert {record.images[0].path for record in records} == {tmp_path / "images" / "a.png"}


@pytest.mark.parametrize("value", [float("nan"), {"answer": "cat"}, [{"answer": "cat"}], [["cat"]], "", None, []])
def test_answers_that_are_no_text_name_the_line(tmp_path: Path, value: Any) -> None:
    draw(tmp_path / "images" / "a.png")
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps({**LINE, "answer": answer}) for answer in ("cat", value)))
    with pytest.raises(ValueError, match=r"q\.jsonl, line 2: "):
        read_questions(tmp_path / "q.jsonl", flag="--train_data_file")


def test_questions_in_another_code_page_are_named(tmp_path: Path) -> None:
    draw(tmp_path / "images" / "a.png")
    (tmp_path / "q.jsonl").write_bytes(json.dumps(LINE, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(ValueError, match=r"q\.jsonl', line 1: byte 0xe9 is not UTF-8"):
        read_questions(tmp_path / "q.jsonl", flag="--train_data_file")


def test_lists_of_vtab_in_other_encodings_and_with_two_labels(tmp_path: Path) -> None:
    for name in ("é.png", "b.png"):
        draw(tmp_path / "images" / name)
    lines = "images\\é.png 1\r\nimages/b.png 2\r\nimages/b.png 2\r\n"
    for part in ("train800.txt", "val200.txt", "test.txt"):
        (tmp_path / part).write_bytes(lines.encode("utf-16"))
    parts = read_task(tmp_path)
    for records in (parts.train, parts.val, parts.test):
        assert [(record.path.name, record.caption) for record in records] == [("é.png", "1"), ("b.png", "2")]
    (tmp_path / "test.txt").write_text("images/b.png 2\nimages/b.png 1\n")
    with pytest.raises(
        ValueError, match=r"test\.txt', line 2: images/b\.png has the label 1 here and 2 in a line before"
    ):
        read_task(tmp_path)
    (tmp_path / "test.txt").write_bytes("images/é.png 1\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"test\.txt', line 1: byte 0xe9 is not UTF-8"):
        read_task(tmp_path)


def test_parts_of_vtab_in_other_spellings(tmp_path: Path) -> None:
    for part in ("Training", "Validation", "test_set"):
        for name in ("cat", "dog"):
            draw(tmp_path / part / name / "a.png")
            draw(tmp_path / part / name / ".ipynb_checkpoints" / "a-checkpoint.png")
    parts = read_task(tmp_path)
    assert [len(some) for some in (parts.train, parts.val, parts.test)] == [2, 2, 2]
    draw(tmp_path / "val" / "cat" / "a.png")
    with pytest.raises(ValueError, match=r"has several val parts \(Validation, val\); keep one of them"):
        read_task(tmp_path)


def test_hidden_files_are_no_class_images(tmp_path: Path) -> None:
    draw(tmp_path / "own.png")
    draw(tmp_path / ".cache" / "own.png")
    (tmp_path / "._own.png").write_bytes(b"no image")
    assert missing_class_images(tmp_path, prompt="a dog", count=3, settings={}) == [0, 1]


@pytest.mark.parametrize(("label", "shown"), [(None, "None"), ("", "''"), (" ", "' '")])
def test_labels_of_datasets_that_are_no_classes_name_the_row(tmp_path: Path, label: Any, shown: str) -> None:
    datasets = pytest.importorskip("datasets")
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    images = [{"bytes": file.getvalue(), "path": None}] * 3
    rows = datasets.Dataset.from_dict({"image": images, "label": ["cat", "dog", label]})
    (tmp_path / "set").mkdir()
    rows.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "set" / "train-00000-of-00001.parquet"))
    given = {"dataset_name": str(tmp_path / "set"), "cache_dir": str(tmp_path / "cache"), "dataset_config_name": None}
    options = ClassTaskOptions(pretrained_model_name_or_path="base", **given)
    with pytest.raises(ValueError, match=rf"train\[2\] has the label {shown} in the column 'label', which is no class"):
        read_class_dataset(options, given["dataset_name"])
