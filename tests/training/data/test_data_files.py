"""What counts as an image: suffixes and contents, hidden files, links; and that nothing else goes unsaid."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image, features

from lorainit_diffusers.training.data import files
from lorainit_diffusers.training.data.files import child_folders, is_hidden, list_folder
from lorainit_diffusers.training.data.folders import read_image_folder
from lorainit_diffusers.training.data.images import check_images
from lorainit_diffusers.training.data.notes import DataNotes


def draw(path: Path, kind: str | None = None, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (16, 16), 3).save(path, format=kind)
    return path


def names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in list_folder(folder).images]


HIDDEN = (
    *("._a.png", ".ipynb_checkpoints/a.png", "__MACOSX/a.png", "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg"),
    *(".thumbnails/a.png", ".trash/a.png", "#recycle/a.png", "$RECYCLE.BIN/a.png", "lost+found/a.png"),
    *(".Spotlight-V100/a.png", ".Trashes/a.png", "__pycache__/a.png", "System Volume Information/a.png"),
    *("sub/__macosx/a.png", "sub/.git/a.png", "@Recycle/a.png", "Thumbs.db", "desktop.ini", ".DS_Store"),
)


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_and_system_files_never_count_and_are_said(tmp_path: Path, name: str) -> None:
    draw(tmp_path / "a.png")
    draw(tmp_path / name, "PNG")
    notes = DataNotes()
    records = read_image_folder(tmp_path, flag="--x", prompt="p", notes=notes)
    assert [record.path.name for record in records] == ["a.png"]
    ((label, text),) = notes.lines()
    assert label == "left out"
    assert text.startswith("hidden or system files and folders: 1 (")


def test_a_folder_below_a_hidden_one_is_read(tmp_path: Path) -> None:
    folder = tmp_path / ".cache" / "__MACOSX" / "data"
    draw(folder / "a.png")
    assert names(folder) == ["a.png"]
    assert child_folders(tmp_path / ".cache") == []
    assert [is_hidden(name) for name in ("a.b", "_a", "THUMBS.DB")] == [False, False, True]


def written(tmp_path: Path) -> dict[str, str]:
    """Suffix -> format, of all suffixes that this Pillow decodes and writes from RGB."""
    Image.init()
    found: dict[str, str] = {}
    for suffix, kind in Image.registered_extensions().items():
        if kind in Image.OPEN and kind in Image.SAVE and kind not in files.NOT_DECODED:
            try:
                draw(tmp_path / "probe", kind)
            except (OSError, ValueError, KeyError):
                continue
            found[suffix] = kind
    (tmp_path / "probe").unlink(missing_ok=True)
    return found


def test_every_suffix_that_pillow_decodes_counts_in_any_case(tmp_path: Path) -> None:
    suffixes = written(tmp_path)
    assert {".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".ppm", ".tga", ".ico", ".dds", ".apng", ".dib"} <= set(suffixes)
    assert features.check("jpg_2000") is not True or ".jp2" in suffixes
    assert features.check("avif") is not True or ".avif" in suffixes
    for number, (suffix, kind) in enumerate(suffixes.items()):
        draw(tmp_path / "d" / f"{number}{suffix}", kind)
        draw(tmp_path / "d" / f"{number}-upper{suffix.upper()}", kind)
    records = read_image_folder(tmp_path / "d", flag="--x", prompt="p")
    assert len(records) == 2 * len(suffixes)
    check_images(records)


@pytest.mark.parametrize(
    ("name", "kind"), [("photo", "PNG"), ("a.jpg_large", "JPEG"), ("b.jpg!d", "WEBP"), ("c.x", "GIF")]
)
def test_without_a_known_suffix_the_content_decides(tmp_path: Path, name: str, kind: str) -> None:
    draw(tmp_path / name, kind)
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("name", ["a.png~", "a.png.bak", "a.JPG.tmp", "a.png.crdownload", "b.thm"])
def test_what_programs_leave_behind_does_not_count(tmp_path: Path, name: str) -> None:
    draw(tmp_path / "a.png")
    draw(tmp_path / name, "JPEG")
    notes = DataNotes()
    assert len(read_image_folder(tmp_path, flag="--x", prompt="p", notes=notes)) == 1
    assert notes.left_out == {"files that are no images": [name]}


def test_other_files_are_said_by_name_whatever_they_begin_with(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    for name in ("BMW.txt", "notes.md", "raw.cr2", "raw.dng", "clip.mp4", "page.pdf", "plot.svg", "x.eps", "figure.ps"):
        (tmp_path / name).write_bytes(b"II*\0" + bytes(40) if name.startswith("raw") else b"BMW and other cars" * 3)
    notes = DataNotes()
    assert len(read_image_folder(tmp_path, flag="--x", prompt="p", notes=notes)) == 1
    assert sorted(notes.left_out["files that are no images"]) == sorted(
        ["BMW.txt", "notes.md", "raw.cr2", "raw.dng", "clip.mp4", "page.pdf", "plot.svg", "x.eps", "figure.ps"]
    )
    ((_, text),) = notes.lines()
    assert text.startswith("files that are no images: 9 (")
    assert text.endswith(" and 4 more)")


def test_images_that_need_a_plugin_are_an_error_that_names_it(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    (tmp_path / "b.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    records = read_image_folder(tmp_path, flag="--x", prompt="p")
    assert [record.path.name for record in records] == ["a.png", "b.HEIC"]
    if ".heic" not in Image.registered_extensions():
        with pytest.raises(ValueError, match=r"cannot read the image '.*b\.HEIC'.*install pillow-heif"):
            check_images(records)


def test_linked_folders_and_files_count_once_and_circles_end(tmp_path: Path) -> None:
    draw(tmp_path / "pool" / "cats" / "a.png")
    data = tmp_path / "data"
    draw(data / "b.png")
    draw(data / "sub" / "c.png")
    (data / "cats").symlink_to(tmp_path / "pool" / "cats", target_is_directory=True)
    (data / "file.png").symlink_to(tmp_path / "pool" / "cats" / "a.png")
    assert names(data) == ["b.png", "cats/a.png", "file.png", "sub/c.png"]
    (data / "a-again").symlink_to(data / "sub", target_is_directory=True)
    (data / "sub" / "up").symlink_to(data, target_is_directory=True)
    (data / "out").symlink_to(tmp_path, target_is_directory=True)
    listing = list_folder(data)
    assert [path.relative_to(data).as_posix() for path in listing.images] == [
        "b.png",
        "cats/a.png",
        "file.png",
        "sub/c.png",
    ]
    assert [path.name for path in listing.repeated] == ["a-again", "out", "up"]
    notes = DataNotes()
    listing.report(data, notes)
    assert notes.left_out == {"linked folders that were read already": ["a-again", "out", "sub/up"]}


def test_a_link_to_a_folder_that_is_skipped_is_said(tmp_path: Path) -> None:
    draw(tmp_path / "val" / "a.png")
    (tmp_path / "again").symlink_to(tmp_path / "val", target_is_directory=True)
    listing = list_folder(tmp_path, skip=[tmp_path / "val"])
    assert listing.images == ()
    assert listing.repeated == (tmp_path / "again",)


def test_links_to_nowhere_are_named(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    (tmp_path / "b.txt").symlink_to(tmp_path / "none")
    assert names(tmp_path) == ["a.png"]
    (tmp_path / "b.png").symlink_to(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"b\.png' is a link to nowhere; mend or remove it"):
        list_folder(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_are_no_images(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    assert names(tmp_path) == ["a.png"]


def test_a_folder_without_images_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "train-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"--x '.*' has no images in it, but train-00000\.parquet; .* --dataset_name"):
        read_image_folder(tmp_path, flag="--x", prompt="p")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no images in it; give a folder of images"):
        read_image_folder(tmp_path / "empty", flag="--x", prompt="p")


def test_one_prompt_for_several_folders_is_a_warning(tmp_path: Path) -> None:
    for name, count in (("dog", 3), ("cat", 2)):
        for index in range(count):
            draw(tmp_path / name / f"{index}.png")
    notes = DataNotes()
    read_image_folder(tmp_path, flag="--x", prompt="a sks dog", notes=notes)
    assert notes.lines() == [
        (
            "warning",
            "5 images of 2 folders (cat 2, dog 3) are taken as one: 'a sks dog'; give one folder if they show several "
            "subjects",
        )
    ]
    one = DataNotes()
    read_image_folder(tmp_path / "dog", flag="--x", prompt="a sks dog", notes=one)
    assert one.lines() == []
