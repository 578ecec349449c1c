"""The classifier's script in process: a tiny random ViT and pictures of three colours."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import train_classifier_lora as script
from classifier_fixtures import CLASSES, SIDE, picture, write_backbone, write_class_folder, write_classifier
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from script_fixtures import argv_of, losses, read_json, run_main
from transformers import AutoImageProcessor, AutoModelForImageClassification

from lorainit_diffusers import METHODS, load_lora
from lorainit_diffusers.families.classifier import ClassifierFamily
from lorainit_diffusers.training.classification.data import read_classes
from lorainit_diffusers.training.classification.task import ClassificationTask

FAST: dict[str, Any] = {
    "init": "cntlora",
    "rank": 2,
    "max_train_steps": 3,
    "train_batch_size": 6,
    "init_num_batches": 2,
    "validation_steps": 2,
    "learning_rate": 5e-3,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("base") / "vit")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_class_folder(tmp_path_factory.mktemp("data") / "colours")


def run(base: Path, data: Path | None, output: Path, **options: Any) -> Path:
    given = {"pretrained_model_name_or_path": base, "train_data_dir": data, "output_dir": output}
    return run_main(script, {**FAST, **given, **options})


def arguments(base: Path, data: Path | None, **options: Any) -> Any:
    given = {"pretrained_model_name_or_path": base, "train_data_dir": data}
    return script.parse_args(argv_of({**FAST, **given, **options}))


def task_of(base: Path, data: Path | None, **options: Any) -> ClassificationTask:
    return ClassificationTask(arguments(base, data, **options), torch.device("cpu"), torch.float32)


def stages(output: Path) -> dict[str, dict[str, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["stage"]: line for line in lines if "stage" in line}


# -------------------------------------------------------------------------------------------------------- a whole run


def test_a_run_learns_and_leaves_its_files(base, data, tmp_path, capsys) -> None:
    output = run(base, data, tmp_path / "run", max_train_steps=30, export_merged=True, random_flip=True)
    found = stages(output)
    assert list(found) == ["base", "step-0", "end"]
    assert found["end"]["accuracy"] > found["base"]["accuracy"] + 0.2
    assert found["step-0"]["accuracy"] == found["base"]["accuracy"]
    assert {"accuracy", "macro_accuracy", "validation_loss"} <= set(found["end"])
    assert losses(output, "loss")[-1] < losses(output, "loss")[0]
    printed = capsys.readouterr().out
    assert f"accuracy: base {found['base']['accuracy']:.3f}, step-0" in printed

    predictions = [json.loads(line) for line in (output / "predictions_end.jsonl").read_text("utf-8").splitlines()]
    assert len(predictions) == 12
    right = sum(line["class"] == line["answer"] for line in predictions)
    assert right / 12 == pytest.approx(found["end"]["accuracy"])
    assert Path(predictions[0]["image"]).is_file()
    with (output / "per_class.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list(CLASSES)
    assert {"images", "accuracy_base", "accuracy_step-0", "accuracy_end"} <= set(rows[0])
    mean = sum(float(row["accuracy_end"]) for row in rows) / 3
    assert mean == pytest.approx(found["end"]["macro_accuracy"], abs=1e-4)
    report = (output / "report.html").read_text(encoding="utf-8")
    assert 'src="http' not in report
    assert report.count("data:image/png;base64") >= 3
    for name in ("confusion_base.png", "confusion_end.png", "accuracy.png", "loss.png"):
        assert Image.open(output / name).size[0] > 200
    config = read_json(output / "config.json")
    assert (config["num_train_samples"], config["num_validation_samples"]) == (18, 12)

    # the adapter on the original base, the merged model alone
    model = PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(base), str(output)).eval()
    merged = AutoModelForImageClassification.from_pretrained(output / "merged").eval()
    processor = AutoImageProcessor.from_pretrained(output / "merged")
    assert merged.config.id2label == dict(enumerate(CLASSES))
    answers: list[str] = []
    for line in predictions:
        image = Image.open(line["image"])
        square = image.crop((2, 0, 22, 20))  # this processor squeezes, the script crops
        inputs = processor(square, return_tensors="pt")
        with torch.no_grad():
            expected = merged(**inputs).logits
            torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
        answers.append(merged.config.id2label[int(expected.argmax())])
    assert sum(a == line["answer"] for a, line in zip(answers, predictions, strict=True)) >= 11
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "library_name: peft" in card
    assert f"AutoModelForImageClassification.from_pretrained({str(base)!r})" in card


@pytest.mark.parametrize("name", METHODS)
def test_every_init_trains_and_is_loaded_again(base, data, tmp_path, name) -> None:
    output = run(base, data, tmp_path / name, init=name, variable_rank=name in ("cntlora", "eva"), learning_rate=1e-3)
    model = AutoModelForImageClassification.from_pretrained(base)
    model = PeftModel.from_pretrained(model, str(output)).eval()
    task = task_of(base, data)
    inputs = task.preparation.normalize(task.validation_images.float() / 255)
    with torch.no_grad():
        probabilities = model(pixel_values=inputs).logits.softmax(1).max(1).values
    lines = [json.loads(line) for line in (output / "predictions_end.jsonl").read_text("utf-8").splitlines()]
    torch.testing.assert_close(probabilities, torch.tensor([line["probability"] for line in lines]), atol=1e-4, rtol=0)


def test_a_resumed_run_equals_an_uninterrupted_one(base, data, tmp_path) -> None:
    options = {"max_train_steps": 4, "checkpointing_steps": 2, "random_flip": True, "lora_dropout": 0.1}
    whole = run(base, data, tmp_path / "whole", **options)
    halved = run(base, data, tmp_path / "halved", **options)
    shutil.rmtree(halved / "checkpoint-4")
    (halved / "adapter_model.safetensors").unlink()
    resumed = run(base, data, halved, **options, resume_from_checkpoint="latest")
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (whole, resumed))
    assert first.keys() == second.keys()
    assert torch.equal(first["base_model.model.classifier.weight"], second["base_model.model.classifier.weight"])
    for key in first:
        if key.endswith("lora_A.weight"):
            other = key.replace("lora_A", "lora_B")
            torch.testing.assert_close(first[other] @ first[key], second[other] @ second[key], rtol=1e-4, atol=1e-6)
    assert losses(whole) == losses(resumed)
    assert stages(whole) == stages(resumed)
    assert (resumed / "report.html").read_text("utf-8").count("<tr>") == (whole / "report.html").read_text(
        "utf-8"
    ).count("<tr>")


def test_a_new_head_on_a_bare_backbone(data, tmp_path) -> None:
    backbone = write_backbone(tmp_path / "dinov2")
    output = run(backbone, data, tmp_path / "run", max_train_steps=20, head_lr=2e-2, mixup_alpha=0.1)
    found = stages(output)
    assert found["end"]["validation_loss"] < found["base"]["validation_loss"]
    classes = list(CLASSES)
    model = AutoModelForImageClassification.from_pretrained(
        backbone, id2label=dict(enumerate(classes)), ignore_mismatched_sizes=True
    )
    model = PeftModel.from_pretrained(model, str(output)).eval()
    task = task_of(backbone, data)
    with torch.no_grad():
        logits = model(pixel_values=task.preparation.normalize(task.validation_images.float() / 255)).logits
    accuracy = (logits.argmax(1) == task.validation_labels).float().mean()
    assert float(accuracy) == pytest.approx(found["end"]["accuracy"])
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "id2label=dict(enumerate(classes)), ignore_mismatched_sizes=True" in card
    assert "| trained in full | model.classifier |" in card


def test_init_only_and_dry_run(base, data, tmp_path, capsys) -> None:
    output = run(base, data, tmp_path / "init", init_only=True)
    assert (output / "adapter_model.safetensors").is_file()
    assert not (output / "report.html").exists()
    assert "PeftModel.from_pretrained(model" in (output / "README.md").read_text(encoding="utf-8")
    run(base, data, tmp_path / "dry", dry_run=True)
    printed = capsys.readouterr().out
    assert "model.classifier" in printed
    assert not (tmp_path / "dry").exists()


def test_a_new_head_is_named_as_such_and_its_labels_travel_with_the_adapter(base, data, tmp_path, capsys) -> None:
    output = run(base, data, tmp_path / "run", head="new", max_train_steps=2)
    names = json.loads((output / "label_names.json").read_text(encoding="utf-8"))
    assert names["id2label"] == {str(number): name for number, name in enumerate(CLASSES)}
    assert names["label2id"] == {name: number for number, name in enumerate(CLASSES)}
    other = AutoModelForImageClassification.from_pretrained(base)
    other.config.id2label = {0: "apple", 1: "pear", 2: "plum"}
    load_lora(other, output)
    assert other.config.id2label == dict(enumerate(CLASSES))
    assert other.config.label2id == {name: number for number, name in enumerate(CLASSES)}
    printed = capsys.readouterr().out
    assert "accuracy: base (new random head) 0." in printed
    assert "| base (new random head) |" in (output / "README.md").read_text(encoding="utf-8")
    assert "base (new random head)" in (output / "report.html").read_text(encoding="utf-8")


def test_the_bundled_base_and_data_are_the_default() -> None:
    args = script.parse_args([])
    assert Path(args.pretrained_model_name_or_path).name == "tiny-vit"
    assert Path(args.train_data_dir).name == "high-contrast-classes"
    read = read_classes(args)
    assert len(read.class_names) == 26
    assert {record.caption for record in read.validation} <= set(read.class_names)


# --------------------------------------------------------------------------------------------------------------- data


def names_of(args: Any) -> tuple[list[str], list[str]]:
    read = read_classes(args)
    return [record.path.name for record in read.train], [record.path.name for record in read.validation]


def test_batches_are_functions_of_seed_and_number(base, data) -> None:
    task = task_of(base, data)
    batches = list(task.batches(3, 4, range(6)))
    assert batches[0]["pixel_values"].dtype == torch.uint8
    assert batches[0]["pixel_values"].shape == (4, 3, SIDE, SIDE)
    later = list(task.batches(3, 4, range(4, 6)))
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(batches[4:], later, strict=True))
    assert not torch.equal(batches[0]["labels"], next(task.batches(4, 4, range(1)))["labels"])
    labels = torch.cat([batch["labels"] for batch in task.batches(0, 6, range(3))])
    assert labels.bincount().tolist() == [6, 6, 6]  # an epoch


def test_evaluation_is_the_same_in_every_call_and_leaves_the_mode(base, data) -> None:
    task = task_of(base, data, crop_scale=[0.5, 1.0], random_erasing=0.5)
    task.classifier.model.train()
    with pytest.raises(ValueError, match="call evaluate first"):
        task.write_results(Path(), "end")
    first = task.validate()
    assert task.validate() == first
    assert task.evaluate()["accuracy"] == pytest.approx(first["accuracy"])
    assert task.classifier.model.training
    anew = task.anew(arguments(base, data, label_smoothing=0.2))
    assert anew.classifier.model is not task.classifier.model
    assert anew.train_images is task.train_images
    assert anew.validate() == first


def test_a_class_that_looks_like_a_formula_is_a_text_in_the_table(base, data, tmp_path) -> None:
    folder = shutil.copytree(data, tmp_path / "data")
    first = sorted(path for path in folder.rglob("*") if path.is_dir() and path.name == CLASSES[0])
    for path in first:
        path.rename(path.with_name("=1+1"))
    output = run(base, folder, tmp_path / "run", max_train_steps=1)
    with (output / "per_class.csv").open(encoding="utf-8", newline="") as file:
        names = [row["class"] for row in csv.DictReader(file)]
    assert "'=1+1" in names
    assert "=1+1" not in names


def test_answers_outside_the_classes_count_as_wrong(base, data, tmp_path) -> None:
    few = write_class_folder(tmp_path / "few", ("blue", "red"))
    task = task_of(base, few)
    assert task.family.heads["model.classifier"].out_features == 3  # kept
    with torch.no_grad():
        task.classifier.model.classifier.bias += torch.tensor([0.0, 1000.0, 0.0])
    assert task.evaluate()["accuracy"] == 0
    task.write_results(tmp_path, "end")
    lines = [json.loads(line) for line in (tmp_path / "predictions_end.jsonl").read_text("utf-8").splitlines()]
    assert {line["answer"] for line in lines} == {"green"}
    task.write_report(tmp_path, [{"step": 0, "stage": "end", **task.evaluate()}], script.parse_args([]))
    assert (tmp_path / "report.html").is_file()


def test_few_shots_are_seeded_and_nested(base, data) -> None:
    (few, validation), (again, _), (more, _), (other, _) = (
        names_of(arguments(base, data, shots=shots, data_seed=seed)) for shots, seed in ((2, 0), (2, 0), (4, 0), (2, 1))
    )
    assert few == again
    assert set(few) < set(more)
    assert few != other
    assert [name.partition("-")[0] for name in few] == ["blue", "blue", "green", "green", "red", "red"]
    assert len(validation) == 12
    with pytest.raises(ValueError, match="--shots 7: class 'blue' has 6 training images"):
        read_classes(arguments(base, data, shots=7))


def test_images_without_a_split_are_split_by_class(base, tmp_path) -> None:
    folder = write_class_folder(tmp_path / "flat", train=10, validation=0)
    train, validation = names_of(arguments(base, folder))
    assert len(train) == 24
    assert [name.partition("-")[0] for name in validation] == ["blue"] * 2 + ["green"] * 2 + ["red"] * 2
    assert not set(train) & set(validation)
    assert names_of(arguments(base, folder)) == (train, validation)
    assert names_of(arguments(base, folder, data_seed=1)) != (train, validation)
    train, validation = names_of(arguments(base, folder, validation_fraction=0.5))
    assert len(train) == len(validation) == 15
    single = write_class_folder(tmp_path / "single", train=1, validation=0)
    with pytest.raises(ValueError, match="no class has two images"):
        read_classes(arguments(base, single))


def test_copies_of_a_picture_stay_on_one_side(base, tmp_path) -> None:
    folder = write_class_folder(tmp_path / "flat", train=6, validation=0)
    for path in sorted(folder.glob("*/*.png")):  # every picture three times: a copy, and another format
        shutil.copy(path, path.with_name(f"copy of {path.name}"))
        Image.open(path).save(path.with_suffix(".bmp"))
    args = arguments(base, folder, validation_fraction=0.34)
    found = read_classes(args)
    assert (len(found.train), len(found.validation)) == (36, 18)
    train, validation = (
        {(record.caption, record.path.stem.removeprefix("copy of ")) for record in part}
        for part in (found.train, found.validation)
    )
    assert not train & validation
    assert len(validation) == 6
    few = read_classes(arguments(base, folder, validation_fraction=0.34, shots=4)).train
    assert len({record.path.stem.removeprefix("copy of ") for record in few}) == len(few) == 12
    with pytest.raises(ValueError, match="--shots 5: class 'blue' has 4 different training images; lower it"):
        read_classes(arguments(base, folder, validation_fraction=0.34, shots=5))


def test_a_validation_part_with_pictures_that_are_trained_on(base, tmp_path, capsys) -> None:
    folder = write_class_folder(tmp_path / "data")
    task_of(base, folder)
    assert "warning" not in capsys.readouterr().out
    shutil.copy(folder / "train" / "red" / "red-00.png", folder / "validation" / "red" / "other name.png")
    task_of(base, folder)
    expected = "warning: 1 of 13 validation images are trained on, too (such as 'other name.png')"
    assert expected in capsys.readouterr().out


def test_a_fraction_is_split_off_although_there_is_a_validation_part(base, data) -> None:
    train, validation = names_of(arguments(base, data, validation_fraction=0.5))
    assert len(train) == len(validation) == 9


@pytest.mark.parametrize("split", ["val", "test", "heldout", "valid"])
def test_validation_parts_of_other_names_are_found(base, tmp_path, split) -> None:
    folder = write_class_folder(tmp_path / "data", split=split)
    assert len(read_classes(arguments(base, folder)).validation) == 12
    assert len(read_classes(arguments(base, folder / "train")).validation) == 12


def test_a_class_may_be_called_train(base, tmp_path) -> None:
    folder = write_class_folder(tmp_path / "data", ("bus", "test", "train"), validation=0)
    assert read_classes(arguments(base, folder)).class_names == ("bus", "test", "train")


def test_samples_are_drawn_at_random(base, data) -> None:
    args = arguments(base, data, max_train_samples=12, max_validation_samples=5)
    train, validation = names_of(args)
    assert len(train) == 12
    assert len(validation) == 5
    assert names_of(args) == (train, validation)
    with pytest.raises(ValueError, match="has no training images; raise --max_train_samples"):
        read_classes(arguments(base, data, max_train_samples=2))


def test_images_of_other_modes_become_rgb(base, tmp_path) -> None:
    folder = write_class_folder(tmp_path / "data")
    for mode, name in (("L", "blue"), ("RGBA", "green"), ("P", "red")):
        picture(name, 5).convert(mode).save(folder / "train" / name / "other.png")
    assert task_of(base, folder).train_images.shape == (21, 3, SIDE, SIDE)


def test_datasets_of_the_hub(base, tmp_path) -> None:
    datasets = pytest.importorskip("datasets")
    names = ["red", "unused", "blue", "green"]
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.ClassLabel(names=names)})

    def rows(labels: list[str], start: int) -> Any:
        columns = {
            "picture": [picture(label, start + index) for index, label in enumerate(labels)],
            "label": [names.index(label) for label in labels],
        }
        return datasets.Dataset.from_dict(columns, features=features)

    folder = tmp_path / "dataset"
    for split, labels in (("train", ["red", "blue", "green"] * 2), ("test", ["green", "red"])):
        (folder / "data").mkdir(parents=True, exist_ok=True)
        rows(labels, len(split)).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    given = {"dataset_name": str(folder), "image_column": "picture", "cache_dir": str(tmp_path / "cache")}
    task = task_of(base, None, **given)
    assert task.data.class_names == ("red", "blue", "green")
    assert (task.num_train, task.num_validation) == (6, 2)
    assert task.data.train[1].path.as_posix().endswith("dataset/train[1]")
    with pytest.raises(ValueError, match=r"has no column 'image' .*; set --image_column"):
        task_of(base, None, **{**given, "image_column": None})
    with pytest.raises(ValueError, match=r"has no column 'kind' .*; set --label_column"):
        task_of(base, None, **given, label_column="kind")
    with pytest.raises(ValueError, match="holds no images but"):
        task_of(base, None, **{**given, "image_column": "label"})
    with pytest.raises(ValueError, match="cannot be loaded"):
        task_of(base, None, dataset_name=str(tmp_path / "nothing"))


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 1.0}, r"--validation_fraction 1\.0: must lie between"),
        ({"label_smoothing": 1.0}, r"--label_smoothing 1\.0: must be at least 0 and below 1"),
        ({"mixup_alpha": -1.0}, r"--mixup_alpha -1\.0: must not be negative"),
        ({"shots": 0}, "--shots 0: must be at least 1"),
        ({"shots": 2, "max_train_samples": 5}, "--shots and --max_train_samples exclude each other"),
        ({"dataset_name": "x"}, "--train_data_dir and --dataset_name exclude each other"),
        ({"label_column": "x"}, "--label_column needs --dataset_name"),
        ({"crop_scale": [0.9, 0.5]}, "crop_scale must be two increasing .*see --crop_scale"),
        ({"color_jitter": 2.0}, r"--color_jitter 2.0: must lie in \[0, 1\]"),
        ({"max_rank": 4}, "--rank_budget and --max_rank need --variable_rank"),
    ],
)
def test_options_that_cannot_work_are_named(base, data, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(base, data, **options)


def test_layers_that_cannot_have_an_adapter_are_named(base, data) -> None:
    with pytest.raises(ValueError, match="--lora_layers names 'classifier', the head"):
        task_of(base, data, lora_layers="classifier")
    with pytest.raises(ValueError, match="is a Conv2d; only linear layers"):
        task_of(base, data, lora_layers="projection")
    with pytest.raises(ValueError, match="match no layer"):
        task_of(base, data, lora_layers="to_q")


def test_data_that_cannot_be_used_is_named_before_the_base_is_loaded(base, data, tmp_path, monkeypatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(ClassifierFamily, "from_pretrained", forbidden)
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        task_of(base, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no class folders in it"):
        task_of(base, tmp_path / "empty")
    one = write_class_folder(tmp_path / "one", ("red",))
    with pytest.raises(ValueError, match="has only the class 'red'; a classifier needs at least two"):
        task_of(base, one)
    hollow = write_class_folder(tmp_path / "hollow")
    (hollow / "train" / "yellow").mkdir()
    with pytest.raises(ValueError, match="class 'yellow' has no images in"):
        task_of(base, hollow)
    stranger = write_class_folder(tmp_path / "stranger")
    shutil.copytree(stranger / "validation" / "red", stranger / "validation" / "pink")
    with pytest.raises(ValueError, match="class 'pink' of the validation images has no training images"):
        task_of(base, stranger)
    broken = write_class_folder(tmp_path / "broken")
    (broken / "train" / "red" / "red-00.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot read the image .*red-00\.png"):
        task_of(base, broken)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        arguments(tmp_path / "no-base", data)
