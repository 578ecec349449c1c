"""The captions of a folder: from metadata files, as the Hugging Face `imagefolder` has them, or from text files.

Every row and every file is accounted for: one that belongs to no image is an error or is said, never dropped.
"""

from __future__ import annotations

import difflib
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, cast

from lorainit_diffusers.training.data.files import Listing, below, find_file, is_hidden, is_mask
from lorainit_diffusers.training.data.notes import DataNotes
from lorainit_diffusers.training.data.rows import Row, is_missing, read_rows
from lorainit_diffusers.training.data.text import read_text

METADATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


@dataclass
class FolderCaptions:
    """What a folder says of its images.

    Attributes:
        texts: Image -> caption.
        used: Files that captions come from.
        metadata: Those of them that are metadata.
        beside: Option of a column of other images -> image -> the file that its row names there; `None` for an empty
            place.
    """

    texts: dict[Path, str] = field(default_factory=dict[Path, str])
    used: set[Path] = field(default_factory=set[Path])
    metadata: list[Path] = field(default_factory=list[Path])
    beside: dict[str, dict[Path, Path | None]] = field(default_factory=dict[str, dict[Path, "Path | None"]])


def read_captions(
    folder: Path,
    listing: Listing,
    *,
    image_column: str,
    caption_column: str,
    notes: DataNotes,
    root: Path | None = None,
    skip: Sequence[Path] = (),
    beside: Mapping[str, str] | None = None,
) -> FolderCaptions:
    """The captions of the images below a folder.

    A metadata file is for the images below its own folder; where there is one, the text files beside these images are
    not used. Names in it are relative to its folder.

    Args:
        folder: Whose images are captioned.
        listing: What `list_folder` found in it.
        image_column: Column of the file's name.
        caption_column: Column of the caption.
        notes: What is not used, and what looks odd.
        root: A folder further up whose metadata counts, too: that of all splits.
        skip: Folders below that hold another split.
        beside: Option -> its column of further images, such as masks.

    Raises:
        FileNotFoundError: When a row names an image that does not exist.
        ValueError: When a file or a row cannot be understood, or two captions of an image differ.
    """
    columns = dict(beside or {})
    found = FolderCaptions(beside={option: {} for option in columns})
    files = [path for path in listing.others if is_metadata(path)]
    above: list[Path] = []
    if root is not None and folder != root and folder.is_relative_to(root):
        parents = [parent for parent in folder.parents if parent.is_relative_to(root)]
        above = [path for parent in parents for path in _metadata_of(parent)]
    for directory in {path.parent for path in (*files, *above)}:
        same = [path for path in (*files, *above) if path.parent == directory]
        if len(same) > 1:
            names = " and ".join(path.name for path in sorted(same))
            raise ValueError(
                f"{str(directory)!r} has {names}, and only one of them can have the captions; remove the others"
            )
    images = _Names(listing.images)
    origin: dict[Path, str] = {}
    for path in sorted((*files, *above)):
        found.metadata.append(path)
        found.used.add(path)
        for row in _rows(path, {"--image_column": image_column, "--caption_column": caption_column, **columns}):
            image = _image_of(row, path.parent, images, image_column, folder, skip)
            if image is None:
                continue  # of another split
            text = caption_text(row.values.get(caption_column), row.where, caption_column, notes, path.suffix)
            if image in found.texts:
                if found.texts[image] != text:
                    raise ValueError(
                        f"{row.where}: {below(image, folder)} has the caption {text!r} here and another one in "
                        f"{origin[image]}; keep one of them"
                    )
                notes.leave_out("rows of metadata that repeat another one", [row.where])
            for option, column in columns.items():
                _add_file(found.beside[option], image, _named_file(row, path.parent, column), row.where, origin)
            found.texts[image], origin[image] = text, row.where
    for option, column in columns.items():
        if not found.metadata:
            raise ValueError(f"{option} {column!r}: {str(folder)!r} has no metadata.jsonl or .csv; write one with it")
    _add_text_files(folder, listing, found, notes)
    return found


def caption_text(value: Any, where: str, column: str, notes: DataNotes, suffix: str = "") -> str:
    """The caption that a value means: a text, or the first of a list of texts.

    Args:
        value: What the row has.
        where: The row, for messages.
        column: For messages.
        notes: Says when there were lists.
        suffix: Of the file; of CSV, "NaN" and the like are no captions.

    Raises:
        ValueError: For anything else, and for an empty text.
    """
    if isinstance(value, (list, tuple)):
        several = cast("Sequence[Any]", value)
        if len(several) > 1 and all(isinstance(each, str) for each in several):
            notes.leave_out("rows with several captions, of which the first is used", [where])
        value = several[0] if several else None
        if value is not None and not isinstance(value, str):
            raise ValueError(
                f"{where}: the caption in {column!r} is a list of {type(value).__name__}, not of texts; write one text"
            )
    if isinstance(value, str):
        if not clean_caption(value):
            raise ValueError(
                f"{where}: the caption in {column!r} is empty; fill it in, or remove the row and the image"
            )
        if suffix.lower() in (".csv", ".tsv") and is_missing(value):
            raise ValueError(
                f"{where}: the caption in {column!r} is {value.strip()!r}, which stands for no value; fill it in, or "
                "remove the row and the image"
            )
        return clean_caption(value)
    if value is None:
        raise ValueError(f"{where}: there is no caption in {column!r}; fill it in, or remove the row and the image")
    raise ValueError(
        f"{where}: the caption in {column!r} is {value!r}, which is no text; write a text in double quotes, or name "
        "another column with --caption_column"
    )


def clean_caption(text: str) -> str:
    """A caption without white space and byte order marks around it."""
    return text.strip().strip("\ufeff").strip()


class _Names:
    """Finds an image by the name that a row has, in any of the spellings that mean the same file."""

    def __init__(self, images: Sequence[Path]) -> None:
        self.by_path = {os.path.normpath(path): path for path in images}
        self.by_form = {unicodedata.normalize("NFC", name): path for name, path in self.by_path.items()}
        self._by_target: dict[str, Path] | None = None

    def find(self, path: Path) -> Path | None:
        name = os.path.normpath(path)
        found = self.by_path.get(name) or self.by_form.get(unicodedata.normalize("NFC", name))
        if found is not None or not path.is_file():
            return found
        if self._by_target is None:  # a name through another link to a folder that was read
            self._by_target = {os.path.realpath(image): image for image in self.by_path.values()}
        return self._by_target.get(os.path.realpath(path))

    def near(self, path: Path) -> str | None:
        """The name of an image that may have been meant."""
        same = [known for known in self.by_path if known.lower() == os.path.normpath(path).lower()]
        stems = {Path(known).name: known for known in self.by_path}
        close = same or difflib.get_close_matches(path.name, stems, n=1)
        return Path(close[0]).name if close else None


def is_metadata(path: Path) -> bool:
    """Whether a file has the captions of a folder, by its name."""
    return path.stem.lower() == "metadata" and path.suffix.lower() in METADATA_SUFFIXES


def _metadata_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_file() and is_metadata(path))


def _rows(path: Path, wanted: Mapping[str, str]) -> list[Row]:
    """The rows of a metadata file, whose columns, by option, are there."""
    rows = read_rows(path, columns=tuple(wanted.values()))
    columns = sorted({column for row in rows for column in row.values})
    for option, column in wanted.items():
        if column not in columns:
            raise ValueError(
                f"{str(path)!r} has no column {column!r} (it has {', '.join(columns) or 'none'}); set {option}"
            )
    return rows


def _image_of(
    row: Row, directory: Path, images: _Names, column: str, folder: Path, skip: Sequence[Path]
) -> Path | None:
    """The image that a row names; None where it belongs to another split.

    Raises:
        FileNotFoundError: When it does not exist.
        ValueError: When the name is none, leads out of the metadata's folder, or to something that does not count.
    """
    name = row.values.get(column)
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{row.where}: the name of the image in {column!r} is {name!r}; give the name of a file")
    spellings = [name.strip()]
    if "\\" in name:
        spellings.append(PurePosixPath(*PureWindowsPath(name.strip()).parts).as_posix())
    for spelling in spellings:
        image = images.find(directory / spelling)
        if image is not None:
            return image
    path = Path(os.path.normpath(directory / spellings[-1]))
    if not path.is_relative_to(os.path.normpath(directory)):
        raise ValueError(
            f"{row.where}: the image {name!r} lies outside of {str(directory)!r}; give a name relative to that folder, "
            "and the folder of all images as the data"
        )
    if not path.is_file():
        near = images.near(path)
        meant = f" (is {near} meant?)" if near else ""
        raise FileNotFoundError(
            f"{row.where} names images that do not exist: {name}{meant}; add them, or remove the rows"
        )
    if any(is_hidden(part) for part in path.relative_to(os.path.normpath(directory)).parts):
        raise ValueError(
            f"{row.where}: the image {name!r} is hidden, and hidden files never count; rename it, or remove the row"
        )
    if not path.is_relative_to(os.path.normpath(folder)) or any(path.is_relative_to(other) for other in skip):
        return None
    if is_mask(path):
        raise ValueError(
            f"{row.where}: {name!r} has the name of a mask, which is never trained on; rename it, or remove the row"
        )
    raise ValueError(f"{row.where}: {name!r} is no image that can be opened; save it as PNG or JPEG, or remove the row")


def _named_file(row: Row, directory: Path, column: str) -> Path | None:
    """The file that a row names in a column of further images; None where the place is empty.

    Raises:
        FileNotFoundError: When it does not exist.
        ValueError: When the name is none, or leads out of the metadata's folder.
    """
    name = row.values.get(column)
    if name is None or (isinstance(name, str) and (not name.strip() or is_missing(name))):
        return None
    if not isinstance(name, str):
        raise ValueError(f"{row.where}: the image in {column!r} is {name!r}; give the name of a file")
    path = Path(os.path.normpath(directory / name.strip().replace("\\", "/")))
    if not path.is_relative_to(os.path.normpath(directory)):
        raise ValueError(
            f"{row.where}: {name!r} in {column!r} lies outside of {str(directory)!r}; give a name relative to that "
            "folder, and put the file into it"
        )
    found = find_file(directory, name)
    if found is None:
        raise FileNotFoundError(
            f"{row.where}: {name!r} in {column!r} does not exist; add the file, or leave the place empty"
        )
    return Path(os.path.normpath(found))


def _add_file(
    files: dict[Path, Path | None], image: Path, file: Path | None, where: str, origin: Mapping[Path, str]
) -> None:
    if files.setdefault(image, file) != file:
        raise ValueError(
            f"{where}: {image.name} has {file.name if file else 'none'} beside it here and another file in "
            f"{origin[image]}; keep one of them, or copy the image under another name"
        )


def _add_text_files(folder: Path, listing: Listing, found: FolderCaptions, notes: DataNotes) -> None:
    """Take the captions of images that no metadata is for from the text files beside them."""
    texts = {path.with_suffix("").as_posix() + ".txt": path for path in listing.others if path.suffix.lower() == ".txt"}
    scopes = [path.parent for path in found.metadata]
    unused = set(texts.values())
    for image in listing.images:
        text = texts.get(image.with_suffix(".txt").as_posix())
        if text is None or image in found.texts or any(image.is_relative_to(scope) for scope in scopes):
            continue
        found.texts[image] = clean_caption(read_text(text))
        found.used.add(text)
        unused.discard(text)
    names = {image.with_suffix("").as_posix() for image in listing.images}
    beside = {path for path in unused if path.with_suffix("").as_posix() in names}
    found.used |= unused
    notes.leave_out("text files beside images whose captions metadata has", (below(p, folder) for p in sorted(beside)))
    notes.leave_out("text files without an image", (below(path, folder) for path in sorted(unused - beside)))
