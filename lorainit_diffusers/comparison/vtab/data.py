"""The tasks of the protocol: folders or lists of training, validation and test images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorainit_diffusers.comparison.vtab.options import VtabOptions
from lorainit_diffusers.training.classification.data import (
    ClassData,
    check_classes,
    class_folders,
    natural_order,
    read_class_images,
)
from lorainit_diffusers.training.data.files import find_file
from lorainit_diffusers.training.data.images import ImageRecord
from lorainit_diffusers.training.data.notes import some
from lorainit_diffusers.training.data.splits import split_kinds
from lorainit_diffusers.training.data.text import read_text, split_lines

# The parts of a task: the kind of split that a folder is called as, and the names of a list.
PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "train": ("train", ("train800.txt", "train.txt")),
    "val": ("validation", ("val200.txt", "val.txt")),
    "test": ("test", ("test.txt",)),
}


@dataclass(frozen=True)
class TaskParts:
    """The images of a task, whose captions are the names of their classes."""

    train: list[ImageRecord]
    val: list[ImageRecord]
    test: list[ImageRecord]
    source: str

    def data(self, stage: str) -> ClassData:
        """What a run trains and is judged on."""
        train = self.train if stage == "select" else [*self.train, *self.val]
        names = {record.caption for record in train}
        heldout = self.val if stage == "select" else self.test
        return check_classes(ClassData(train, heldout, tuple(sorted(names, key=natural_order)), self.source))


def find_tasks(options: VtabOptions) -> dict[str, Path]:
    """The folders of the tasks by name.

    Raises:
        FileNotFoundError: When a folder is missing.
    """
    root = Path(options.vtab_dir)
    if not root.is_dir():
        raise FileNotFoundError(
            f"--vtab_dir {options.vtab_dir!r} is not a directory; give one with a folder for each task"
        )
    known = {path.name: path for path in class_folders(root)}
    for name in options.tasks or []:
        if name not in known:
            raise FileNotFoundError(
                f"--tasks {name}: there is no such folder in {options.vtab_dir!r} (it has {some(list(known), 8)})"
            )
    if not known:
        raise FileNotFoundError(f"--vtab_dir {options.vtab_dir!r} has no folders; give one with a folder for each task")
    return {name: known[name] for name in options.tasks or known}


def read_task(folder: Path) -> TaskParts:
    """The training, validation and test images of a task.

    Raises:
        FileNotFoundError: When a part, or an image that a list names, is missing.
        ValueError: When a list has a line that is not "path label", or a part has no images.
    """
    parts: dict[str, list[ImageRecord]] = {}
    by_name = {path.name: path for path in class_folders(folder)}
    kinds = split_kinds(by_name)
    for part, (kind, lists) in PARTS.items():
        folders = [by_name[name] for name in kinds if kinds[name] == kind]
        if len(folders) > 1:
            names = ", ".join(path.name for path in folders)
            raise ValueError(f"task {str(folder)!r} has several {part} parts ({names}); keep one of them")
        found = next(iter([*folders, *(folder / name for name in lists if (folder / name).exists())]), None)
        if found is None:
            names = ", ".join([part, *(["validation"] if part == "val" else []), *lists])
            raise FileNotFoundError(f"task {str(folder)!r} has no {part} part; add one of {names}")
        parts[part] = read_class_images(found, f"task {str(folder)!r}") if found.is_dir() else _read_list(found)
        if not parts[part]:
            raise ValueError(f"the {part} part of the task, {str(found)!r}, has no images; add some")
    return TaskParts(parts["train"], parts["val"], parts["test"], f"task {str(folder)!r}")


def _read_list(file: Path) -> list[ImageRecord]:
    records: dict[Path, ImageRecord] = {}
    for number, line in enumerate(split_lines(read_text(file)), start=1):
        if not line.strip():
            continue
        place = f"{str(file)!r}, line {number}"
        parts = line.strip().rsplit(maxsplit=1)
        if len(parts) != 2:
            raise ValueError(f"{place}: {line.strip()!r} is not a path and a label, such as images/00001.jpg 3")
        image = find_file(file.parent, parts[0])
        if image is None:
            raise FileNotFoundError(
                f"{place}: there is no image {str(file.parent / parts[0])!r}; paths are relative to the list"
            )
        if records.setdefault(image, ImageRecord(image, parts[1])).caption != parts[1]:
            raise ValueError(
                f"{place}: {parts[0]} has the label {parts[1]} here and {records[image].caption} in a line before; "
                "keep one of them"
            )
    return list(records.values())
