"""Every script says what it trains on before it begins, once, and what it left out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import train_classifier_lora
import train_sd_lora
import train_vlm_lora
import vlm_fixtures
from classifier_fixtures import write_class_folder, write_classifier
from PIL import Image
from script_fixtures import FAST, run_main
from sd_fixtures import write_images


def banner_of(capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """Label -> texts."""
    found: dict[str, list[str]] = {}
    label = ""
    for line in capsys.readouterr().out.splitlines():
        label = line[:13].strip() or label
        found.setdefault(label, []).append(line[15:])
    return found


def test_a_text_to_image_run_says_what_it_has_and_what_it_left_out(
    random_sd: Path, image_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"file_name": f"{i:02d}.png", "text": "a" * (30 if i == 1 else 3)} for i in range(4)]
    (image_dir / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Image.new("RGB", (16, 80)).save(image_dir / "train" / "03.png")
    (image_dir / "train" / "._00.png").write_bytes(b"\0")
    (image_dir / ".DS_Store").write_bytes(b"\0")
    (image_dir / "LICENSE.txt").write_text("free")
    write_images(image_dir / "test", count=1)
    shutil.copy(image_dir / "train" / "00.png", image_dir / "heldout" / "00.png")
    options = {**FAST, "init": "gaussian", "init_only": True, "learning_rate": 2e-4, "gradient_accumulation_steps": 3}
    options |= {"validation_prompt": "b" * 20}
    options |= {"pretrained_model_name_or_path": random_sd, "train_data_dir": image_dir, "output_dir": tmp_path / "out"}
    run_main(train_sd_lora, options)
    said = banner_of(capsys)
    assert said["images"] == [f"4 training, 2 held out; --train_data_dir {image_dir}"]
    assert said["captions"] == ["4, 2 different, such as 'aaa'"]
    assert said["image sizes"] == ["16 x 80 to 48 x 32 (width x height)"]
    assert said["resolution"] == ["32 x 32; 1 of 4 images are smaller and get enlarged"]
    assert said["training"] == ["2 steps of 6 (2 a batch x 3 accumulated): 3 epochs"]
    assert said["learning rate"] == ["0.0002 (constant)"]
    assert said["adapter"] == ["rank 2, alpha 2"]
    assert said["base"] == [str(random_sd)]
    assert said["init"][0] == "gaussian"
    assert said["output"] == [str(tmp_path / "out")]
    (warning,) = said["warning"]
    assert warning.startswith("1 held-out images are also trained on")
    assert said["left out"] == [
        # 30 letters with start and end are 32 tokens, and the prompt's 20 are 22
        "tokens beyond the 12 that text_encoder takes: 30 of 2 captions, which are cut (first 01.png, 32 "
        "tokens; longest 32)",
        "split folders that are not used: 1 (test/ with 1 images)",
        "hidden or system files and folders: 2 (.DS_Store, ._00.png)",
        "files that are no images: 1 (LICENSE.txt)",
    ]


def test_class_images_that_are_the_subjects_are_said_and_nested_folders_refused(
    random_sd: Path, image_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(image_dir / "train", tmp_path / "class")
    options: dict[str, Any] = {
        **{**FAST, "init": "gaussian", "init_only": True, "pretrained_model_name_or_path": random_sd},
        **{"instance_data_dir": image_dir / "train", "instance_prompt": "a", "with_prior_preservation": True},
        **{"class_data_dir": tmp_path / "class", "class_prompt": "b", "num_class_images": 4},
        **{"output_dir": tmp_path / "out"},
    }
    run_main(train_sd_lora, options)
    said = banner_of(capsys)
    assert said["images"][0].startswith("4 training, 2 held out, 4 of the class; ")
    assert any(text.startswith("4 images of the class are also images of the subject") for text in said["warning"])
    for inside in (image_dir / "train" / "class", image_dir):
        with pytest.raises(ValueError, match=r"--class_data_dir .* and --instance_data_dir .* lie within each other"):
            run_main(train_sd_lora, {**options, "class_data_dir": inside, "output_dir": tmp_path / "other"})


def test_a_classifier_says_its_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_classifier(tmp_path / "base")
    data = write_class_folder(tmp_path / "data")
    (data / "train" / "red" / "notes.md").write_text("x")
    shutil.copytree(data / "train", data / "test")
    options = {"init": "gaussian", "init_only": True, "rank": 2, "max_train_steps": 3, "train_batch_size": 6}
    paths = {"pretrained_model_name_or_path": base, "train_data_dir": data, "output_dir": tmp_path / "out"}
    run_main(train_classifier_lora, {**options, **paths})
    said = banner_of(capsys)
    assert said["images"] == [f"18 training, 12 validation; --train_data_dir {data}"]
    assert said["classes"] == ["3 in training: blue 6, green 6, red 6", "3 in validation: blue 4, green 4, red 4"]
    assert said["image sizes"] == ["24 x 20 (width x height)"]
    assert said["training"] == ["3 steps of 6: 1 epochs"]
    assert said["left out"] == [
        "split folders that are not used: 1 (test/ with 18 images)",
        "files that are no images: 2 (test/red/notes.md, train/red/notes.md)",
    ]


def test_a_vision_language_run_says_its_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = vlm_fixtures.write_base(tmp_path / "base", "llava")
    questions = vlm_fixtures.write_questions(tmp_path / "data")
    options = {"init": "gaussian", "init_only": True, "rank": 2, "max_train_steps": 4, "train_batch_size": 3}
    paths = {"pretrained_model_name_or_path": base, "train_data_file": questions / "train.jsonl"}
    run_main(train_vlm_lora, {**options, **paths, "output_dir": tmp_path / "out"})
    said = banner_of(capsys)
    assert said["questions"] == [f"12 training, 6 validation; --train_data_file {questions / 'train.jsonl'}"]
    assert said["training"] == ["4 steps of 3: 1 epochs"]
    assert said["images"] == ["6 training, 3 validation; in the questions"]
    assert said["answers"][0].startswith("12, ")
