"""What a split is, in every spelling, and that no image beside one is dropped or becomes a class."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from lorainit_diffusers.training.classification.data import check_classes, read_class_folder
from lorainit_diffusers.training.data.notes import DataNotes
from lorainit_diffusers.training.data.splits import (
    find_class_splits,
    find_image_splits,
    parse_split,
    split_kinds,
    training_split,
    validation_split,
)

PAIRS = [
    *(("train", "test"), ("Train", "Test"), ("TRAIN", "VAL"), ("training", "testing"), ("Training", "Validation")),
    *(
        ("train_set", "test_set"),
        ("trainset", "testset"),
        ("TrainSet", "ValSet"),
        ("training-data", "dev"),
        ("trn", "tst"),
    ),
    *(("seg_train", "seg_test"), ("images_train", "images_val"), ("train2017", "val2017"), ("01_train", "02_valid")),
    *(
        ("train", "held_out"),
        ("train", "heldout"),
        ("train", "hold-out"),
        ("train images", "eval"),
        ("trainval", "test"),
    ),
    *(
        ("imagenet_train", "imagenet_val"),
        ("cats-train", "cats-test"),
        ("Train_Data", "Test_Data"),
        ("train", "minival"),
    ),
]


def draw(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)


def classes(folder: Path, *names: str, count: int = 2) -> Path:
    for name in names or ("cat", "dog"):
        draw(*(folder / name / f"{index}.png" for index in range(count)))
    return folder


@pytest.mark.parametrize(("train", "other"), PAIRS)
def test_splits_in_every_spelling(tmp_path: Path, train: str, other: str) -> None:
    classes(tmp_path / "c" / train, count=3)
    classes(tmp_path / "c" / other)
    data = check_classes(read_class_folder(str(tmp_path / "c")))
    assert data.class_names == ("cat", "dog")
    assert (len(data.train), len(data.validation)) == (6, 4)
    given = check_classes(read_class_folder(str(tmp_path / "c" / train)))
    assert len(given.train) == 6
    assert len(given.validation) == (0 if other in ("dev", "eval") else 4)

    draw(tmp_path / "i" / train / "a.png", tmp_path / "i" / other / "b.png")
    notes = DataNotes()
    found = find_image_splits(tmp_path / "i", "--x", notes)
    assert found.train == tmp_path / "i" / train
    test = split_kinds([train, other])[other] == "test"
    assert found.heldout == (None if test else tmp_path / "i" / other)
    assert notes.left_out == ({"split folders that are not used": [f"{other}/ with 1 images"]} if test else {})


@pytest.mark.parametrize(
    "name",
    [
        "cat",
        "bullet_train",
        "test_tube",
        "trainer",
        "latest",
        "valley",
        "developer",
        "contest",
        "valid_id",
        "constrain",
    ],
)
def test_other_names_are_no_splits(tmp_path: Path, name: str) -> None:
    assert split_kinds([name, "owl"]) == {}
    folder = classes(tmp_path, name, "owl")
    assert read_class_folder(str(folder)).class_names == tuple(sorted((name, "owl")))


def test_names_are_parsed() -> None:
    assert parse_split("imagenet_train") == ("train", ("imagenet",))
    assert parse_split("test-dev") == ("test", ())
    assert parse_split("train_test_split") is None
    assert training_split(["Train", "test"]) == "Train"
    assert training_split(["train", "training"]) == "train"
    assert training_split(["train1", "train2"]) is None
    assert validation_split(["train", "test", "val", "validation"], classes=True) == "validation"
    assert validation_split(["train", "test", "val"], classes=True) == "val"
    assert validation_split(["train", "heldout", "test"], classes=True) == "test"
    assert validation_split(["train", "heldout", "validation"], classes=False) == "heldout"
    assert validation_split(["train", "test"], classes=False) is None


def test_a_validation_folder_beside_classes_is_no_class(tmp_path: Path) -> None:
    for name in ("val", "Validation", "test", "heldout"):
        folder = classes(tmp_path / name, count=3)
        classes(folder / name)
        data = check_classes(read_class_folder(str(folder)))
        assert data.class_names == ("cat", "dog")
        assert (len(data.train), len(data.validation)) == (6, 4)


def test_things_that_are_called_train_and_test_stay_classes(tmp_path: Path) -> None:
    assert read_class_folder(str(classes(tmp_path / "a", "bus", "car", "train"))).class_names == ("bus", "car", "train")
    assert read_class_folder(str(classes(tmp_path / "b", "bus", "test", "train"))).class_names == (
        "bus",
        "test",
        "train",
    )
    split = classes(tmp_path / "c" / "train", "bus", "train")
    classes(split.parent / "val", "bus", "train")
    data = check_classes(read_class_folder(str(split.parent)))
    assert data.class_names == ("bus", "train")
    assert (len(data.train), len(data.validation)) == (4, 4)


@pytest.mark.parametrize("name", ["val", "validation", "test", "Testing", "test_set", "heldout", "training"])
def test_a_split_of_images_without_classes_beside_classes_is_refused(tmp_path: Path, name: str) -> None:
    folder = classes(tmp_path)
    draw(folder / name / "a.png")
    with pytest.raises(ValueError, match=f"the folder {name!r} beside the class folders is called as a split"):
        read_class_folder(str(folder))


@pytest.mark.parametrize("names", [("train", "test"), ("train", "test1"), ("Training", "Validation"), ("train",)])
def test_splits_without_class_folders_are_no_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        draw(tmp_path / name / "cat.0.png")
    with pytest.raises(ValueError, match=r"has the split folders .* and no class folders in them"):
        read_class_folder(str(tmp_path))


def test_images_without_classes_beside_splits_are_said(tmp_path: Path) -> None:
    classes(tmp_path / "train")
    draw(tmp_path / "test" / "a.png", tmp_path / "seg_pred" / "b.png")
    data = read_class_folder(str(tmp_path))
    assert data.validation == []
    assert data.notes.left_out == {"images without classes": ["seg_pred/ with 1 images", "test/ with 1 images"]}


def test_a_test_part_beside_a_validation_part_is_said(tmp_path: Path) -> None:
    for name in ("train", "val", "test"):
        classes(tmp_path / name)
    data = read_class_folder(str(tmp_path))
    assert {record.path.parts[-3] for record in data.validation} == {"val"}
    assert data.notes.left_out == {"split folders that are not used": ["test/ with 4 images"]}


@pytest.mark.parametrize("nested", ["archive", "archive/deep", "Dataset"])
def test_the_only_folder_of_an_archive_is_seen_through(tmp_path: Path, nested: str) -> None:
    flat = classes(tmp_path / "flat" / nested)
    (flat.parent / "annotations").mkdir()
    assert check_classes(read_class_folder(str(tmp_path / "flat"))).class_names == ("cat", "dog")
    for part in ("train", "val"):
        classes(tmp_path / "parts" / nested / part)
        draw(tmp_path / "images" / nested / part / "a.png")
    data = check_classes(read_class_folder(str(tmp_path / "parts")))
    assert (data.class_names, len(data.validation)) == (("cat", "dog"), 4)
    found = find_image_splits(tmp_path / "images", "--x", DataNotes())
    assert (found.train, found.heldout) == (
        tmp_path / "images" / nested / "train",
        tmp_path / "images" / nested / "val",
    )


def test_parts_within_parts_of_the_same_name_are_seen_through(tmp_path: Path) -> None:
    for part in ("seg_train", "seg_test"):
        classes(tmp_path / part / part)
    draw(tmp_path / "seg_pred" / "seg_pred" / "a.png")
    data = check_classes(read_class_folder(str(tmp_path)))
    assert (data.class_names, len(data.train), len(data.validation)) == (("cat", "dog"), 4, 4)
    assert len(check_classes(read_class_folder(str(tmp_path / "seg_train"))).validation) == 4


def test_images_beside_parts_or_classes_are_an_error(tmp_path: Path) -> None:
    classes(tmp_path / "c")
    draw(tmp_path / "c" / "sheet.png")
    with pytest.raises(ValueError, match=r"images lie beside the class folders \(sheet\.png\)"):
        read_class_folder(str(tmp_path / "c"))
    for part in ("train", "val"):
        classes(tmp_path / "p" / part)
        draw(tmp_path / "i" / part / "a.png")
    draw(tmp_path / "p" / "val" / "sheet.png")
    with pytest.raises(ValueError, match=r"p/val' has images beside its class folders"):
        read_class_folder(str(tmp_path / "p"))
    (tmp_path / "p" / "val" / "sheet.png").rename(tmp_path / "p" / "sheet.png")
    with pytest.raises(ValueError, match=r"beside the split folders train/, val/: sheet\.png"):
        read_class_folder(str(tmp_path / "p"))
    draw(tmp_path / "i" / "sheet.png", tmp_path / "i" / "more" / "a.png")
    with pytest.raises(ValueError, match=r"--x: images lie .* train/, val/: more \(1 images\), sheet\.png; move them"):
        find_image_splits(tmp_path / "i", "--x", DataNotes())


def test_images_beside_a_held_out_folder_are_the_training_images(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", tmp_path / "album" / "b.png", tmp_path / "Val" / "c.png", tmp_path / "test" / "d.png")
    notes = DataNotes()
    found = find_image_splits(tmp_path, "--x", notes)
    assert (found.train, found.heldout, set(found.skip)) == (
        tmp_path,
        tmp_path / "Val",
        {tmp_path / "Val", tmp_path / "test"},
    )
    assert notes.left_out == {"split folders that are not used": ["test/ with 1 images"]}


@pytest.mark.parametrize("names", [("train1", "train2"), ("train", "training"), ("trainA", "trainB", "testA", "testB")])
def test_several_training_folders_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        classes(tmp_path / "c" / name)
        draw(tmp_path / "i" / name / "a.png")
    with pytest.raises(ValueError, match="has several training folders"):
        read_class_folder(str(tmp_path / "c"))
    with pytest.raises(ValueError, match="--x has several training folders"):
        find_image_splits(tmp_path / "i", "--x", DataNotes())


def test_parts_without_training_images_are_refused(tmp_path: Path) -> None:
    classes(tmp_path / "val")
    for find in (find_class_splits, find_image_splits):
        with pytest.raises(ValueError, match="--x has val, and no training"):
            find(tmp_path, "--x", DataNotes())


def test_folders_of_albums_are_one_training_set(tmp_path: Path) -> None:
    draw(tmp_path / "holiday" / "a.png", tmp_path / "work" / "b.png")
    found = find_image_splits(tmp_path, "--x", DataNotes())
    assert (found.train, found.heldout, found.skip) == (tmp_path, None, ())


def test_linked_and_hidden_folders_of_classes(tmp_path: Path) -> None:
    pool = classes(tmp_path / "pool")
    data = tmp_path / "data"
    data.mkdir()
    for name in ("cat", "dog"):
        (data / name).symlink_to(pool / name, target_is_directory=True)
    for name in (".git", "__MACOSX", "@eaDir", ".val"):
        classes(data / name)
    found = read_class_folder(str(data))
    assert (found.class_names, len(found.train)) == (("cat", "dog"), 4)
    assert found.notes.left_out == {"hidden or system files and folders": [".git", ".val", "@eaDir", "__MACOSX"]}


def test_classes_without_validation_images_are_said(tmp_path: Path) -> None:
    classes(tmp_path / "train", "cat", "dog", "owl")
    classes(tmp_path / "val", "cat", "dog")
    data = check_classes(read_class_folder(str(tmp_path)))
    assert data.notes.warnings == ["1 of 3 classes have no validation images (owl)"]
