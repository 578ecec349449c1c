"""Captions of a folder: every row and every file is used, an error, or said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorainit_diffusers.training.data.folders import read_image_folder
from lorainit_diffusers.training.data.notes import DataNotes


def folder_of(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(directory / name, format="PNG")
    return directory


def rows_of(folder: Path, *rows: dict[str, Any], name: str = "metadata.jsonl") -> None:
    (folder / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def captions(folder: Path, notes: DataNotes | None = None, **options: Any) -> dict[str, str]:
    records = read_image_folder(folder, flag="--train_data_dir", notes=notes, **options)
    return {record.path.relative_to(folder).as_posix(): record.caption for record in records}


@pytest.mark.parametrize(
    "value",
    [0, 5, 0.5, float("nan"), True, False, None, "", " \n", "\ufeff", [], [""], [0], {}, {"en": "red"}, [["a"]]],
)
def test_a_caption_that_is_no_text_names_its_row(tmp_path: Path, value: Any) -> None:
    folder = folder_of(tmp_path, "a.png", "b.png")
    rows_of(folder, {"file_name": "a.png", "text": "red"}, {"file_name": "b.png", "text": value})
    with pytest.raises(ValueError, match=r"metadata\.jsonl', line 2: .*caption.* 'text'"):
        captions(folder)


@pytest.mark.parametrize("value", ["", " ", "nan", "NaN", "None", "null", "<NA>"])
def test_a_csv_field_without_a_value_names_its_row(tmp_path: Path, value: str) -> None:
    folder = folder_of(tmp_path, "a.png", "b.png")
    (folder / "metadata.csv").write_text(f"file_name,text\na.png,red\nb.png,{value}\n")
    with pytest.raises(ValueError, match=r"metadata\.csv', line 3: the caption in 'text' is"):
        captions(folder)


def test_of_several_captions_the_first_is_used_and_that_is_said(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a.png", "b.png")
    rows_of(folder, {"file_name": "a.png", "text": [" red ", "rouge"]}, {"file_name": "b.png", "text": ["blue"]})
    notes = DataNotes()
    assert captions(folder, notes) == {"a.png": "red", "b.png": "blue"}
    (reason,) = notes.left_out
    assert reason == "rows with several captions, of which the first is used"
    assert notes.left_out[reason] == [f"{str(folder / 'metadata.jsonl')!r}, line 1"]


@pytest.mark.parametrize("name", [None, "", " ", 3, ["a.png"]])
def test_a_row_without_a_file_name_is_named(tmp_path: Path, name: Any) -> None:
    folder = folder_of(tmp_path, "a.png")
    rows_of(folder, {"file_name": "a.png", "text": "red"}, {"file_name": name, "text": "blue"})
    with pytest.raises(ValueError, match=r"metadata\.jsonl', line 2: the name of the image in 'file_name' is"):
        captions(folder)
    rows_of(folder, {"file_name": "a.png", "text": "red"}, {"text": "blue"})
    with pytest.raises(ValueError, match=r"metadata\.jsonl', line 2: the name of the image"):
        captions(folder)
    rows_of(folder, {"file_name": "a.png", "text": "red"}, {"file_name": "a.png"})
    with pytest.raises(ValueError, match=r"metadata\.jsonl', line 2: there is no caption in 'text'"):
        captions(folder)


@pytest.mark.parametrize(
    "spelling", ["sub/a b.png", "sub\\a b.png", "./sub/a b.png", "sub/../sub/a b.png", "{folder}/sub/a b.png"]
)
def test_names_in_all_spellings_of_one_path(tmp_path: Path, spelling: str) -> None:
    folder = folder_of(tmp_path, "sub/a b.png")
    rows_of(folder, {"file_name": spelling.format(folder=folder), "text": "red"})
    assert captions(folder) == {"sub/a b.png": "red"}


def test_names_of_another_unicode_form(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "cafe\u0301.png")
    rows_of(folder, {"file_name": "caf\xe9.png", "text": "red"})
    assert list(captions(folder).values()) == ["red"]


def test_a_name_through_another_link_is_the_same_image(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "d", "real/a.png")
    (folder / "link").symlink_to(folder / "real", target_is_directory=True)
    rows_of(folder, {"file_name": "link/a.png", "text": "red"})
    assert captions(folder) == {"real/a.png": "red"}


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("../other.png", ValueError, "line 2: the image '../other.png' lies outside of"),
        ("..\\other.png", ValueError, "lies outside of"),
        ("/etc/hostname", ValueError, "line 2: the image '/etc/hostname' lies outside of"),
        ("A.PNG", FileNotFoundError, r"line 2 names images that do not exist: A\.PNG \(is a\.png meant\?\)"),
        ("a.jpg", FileNotFoundError, r"do not exist: a\.jpg \(is a\.png meant\?\)"),
        ("zzz.tif", FileNotFoundError, r"do not exist: zzz\.tif; add them"),
        ("._a.png", ValueError, r"line 2: the image '\._a\.png' is hidden"),
        (".old/a.png", ValueError, "is hidden"),
        ("notes.md", ValueError, r"line 2: 'notes\.md' is no image that can be opened"),
    ],
)
def test_rows_that_name_no_image_are_named(tmp_path: Path, name: str, error: type[Exception], message: str) -> None:
    folder = folder_of(tmp_path / "d", "a.png", "._a.png", ".old/a.png")
    (folder / "notes.md").write_text("x")
    folder_of(tmp_path, "other.png")
    rows_of(folder, {"file_name": "a.png", "text": "red"}, {"file_name": name, "text": "blue"})
    with pytest.raises(error, match=message):
        captions(folder)


def test_two_captions_of_an_image_are_named_and_equal_ones_are_said(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a.png")
    rows_of(folder, {"file_name": "a.png", "text": "red"}, {"file_name": "./a.png", "text": "red "})
    notes = DataNotes()
    assert captions(folder, notes) == {"a.png": "red"}
    assert list(notes.left_out) == ["rows of metadata that repeat another one"]
    rows_of(folder, {"file_name": "a.png", "text": "red"}, {"file_name": "a.png", "text": "blue"})
    with pytest.raises(ValueError, match=r"line 2: a\.png has the caption 'blue' here and another one in .*line 1"):
        captions(folder)


def test_metadata_of_subfolders_counts(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "one/a.png", "two/deep/b.png", "three/c.png", "d.png")
    rows_of(folder / "one", {"file_name": "a.png", "text": "one"})
    rows_of(folder / "two", {"file_name": "deep/b.png", "text": "two"})
    (folder / "three" / "c.txt").write_text("three")
    (folder / "d.txt").write_text("four")
    assert captions(folder) == {"d.png": "four", "one/a.png": "one", "three/c.png": "three", "two/deep/b.png": "two"}
    rows_of(folder, {"file_name": "one/a.png", "text": "another"})
    with pytest.raises(ValueError, match=r"one/a\.png has the caption 'one' here and another one in"):
        captions(folder)


def test_images_without_a_row_are_an_error_although_they_have_a_text_file(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a.png", "b.png")
    (folder / "a.txt").write_text("not used")
    (folder / "b.txt").write_text("not used")
    rows_of(folder, {"file_name": "a.png", "text": "red"})
    with pytest.raises(ValueError, match=r"1 of 2 images have no caption: b\.png; add them to metadata\.jsonl"):
        captions(folder)
    rows_of(folder, {"file_name": "a.png", "text": "red"}, {"file_name": "b.png", "text": "blue"})
    notes = DataNotes()
    assert captions(folder, notes) == {"a.png": "red", "b.png": "blue"}
    assert notes.left_out == {"text files beside images whose captions metadata has": ["a.txt", "b.txt"]}


def test_text_files_of_any_spelling_and_those_without_an_image(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a.png", "B.PNG", "c.x.png")
    (folder / "a.TXT").write_bytes("\ufeffa rose\r\n".encode("utf-16"))
    (folder / "B.txt").write_bytes(b"\xef\xbb\xbf blue \r\n")
    (folder / "c.x.txt").write_text("green\nleaf")
    (folder / "license.txt").write_text("free")
    notes = DataNotes()
    assert captions(folder, notes) == {"B.PNG": "blue", "a.png": "a rose", "c.x.png": "green\nleaf"}
    assert notes.left_out == {"text files without an image": ["license.txt"]}
    (folder / "a.TXT").write_text("")
    with pytest.raises(ValueError, match=r"1 of 3 images have no caption: a\.png"):
        captions(folder)


@pytest.mark.parametrize(
    ("first", "second"), [("metadata.csv", "metadata.jsonl"), ("Metadata.CSV", "metadata.parquet")]
)
def test_two_metadata_files_in_one_folder_are_refused(tmp_path: Path, first: str, second: str) -> None:
    folder = folder_of(tmp_path, "a.png")
    rows_of(folder, {"file_name": "a.png", "text": "red"}, name=first)
    rows_of(folder, {"file_name": "a.png", "text": "red"}, name=second)
    with pytest.raises(ValueError, match=f"has {first} and {second}, and only one"):
        captions(folder)
    assert captions(folder, prompt="a sks cat") == {"a.png": "a sks cat"}


def test_metadata_in_any_format_and_case(tmp_path: Path) -> None:
    for name, text in (
        ("METADATA.JSONL", '{"file_name": "a.png", "text": "red"}'),
        ("metadata.json", '[{"file_name": "a.png", "text": "red"}]'),
        ("metadata.csv", "text;file_name\nred;a.png\n"),
        ("metadata.tsv", "text\tfile_name\nred\ta.png\n"),
    ):
        folder = folder_of(tmp_path / name, "a.png")
        (folder / name).write_text(text)
        assert captions(folder) == {"a.png": "red"}, name


def test_columns_that_are_not_there_are_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a.png")
    (folder / "metadata.csv").write_text("file_name,caption\na.png,red\n")
    with pytest.raises(ValueError, match=r"no column 'text' \(it has caption, file_name\); set --caption_column"):
        captions(folder)
    assert captions(folder, caption_column="caption") == {"a.png": "red"}
    (folder / "metadata.csv").write_text("")
    with pytest.raises(ValueError, match=r"metadata\.csv' has no column 'file_name' \(it has none\)"):
        captions(folder)


def test_metadata_above_the_splits_is_that_of_each_split(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "train/a.png", "val/b.png", "c.png")
    rows = [{"file_name": name, "text": name[0]} for name in ("train/a.png", "val/b.png", "c.png")]
    rows_of(folder, *rows)
    assert captions(folder / "train", root=folder) == {"a.png": "t"}
    assert captions(folder / "val", root=folder) == {"b.png": "v"}
    assert captions(folder, root=folder, skip=[folder / "val"]) == {"c.png": "c", "train/a.png": "t"}
    rows_of(folder, *rows, {"file_name": "val/z.png", "text": "z"})
    with pytest.raises(FileNotFoundError, match=r"line 4 names images that do not exist: val/z\.png"):
        captions(folder / "train", root=folder)
