"""Folders of captioned images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lorainit_diffusers.training.data.captions import read_captions
from lorainit_diffusers.training.data.files import Listing, below, list_folder
from lorainit_diffusers.training.data.images import ImageRecord
from lorainit_diffusers.training.data.notes import DataNotes, some


def read_image_folder(
    directory: str | os.PathLike[str],
    *,
    flag: str,
    prompt: str | None = None,
    image_column: str = "file_name",
    caption_column: str = "text",
    notes: DataNotes | None = None,
    root: Path | None = None,
    skip: Sequence[Path] = (),
) -> list[ImageRecord]:
    """List the captioned images of a folder.

    Captions come from `prompt` (the same for all), else from `metadata.jsonl`, `.csv`, `.tsv`, `.json` or `.parquet`
    (the Hugging Face `imagefolder` layout, in subfolders, too), else from a `.txt` file beside each image.

    Args:
        directory: The folder; images in subfolders count.
        flag: The option that gave the folder, for error messages.
        prompt: Caption for every image.
        image_column: Metadata column of the file name, relative to the metadata's folder.
        caption_column: Metadata column of the caption.
        notes: Gets what was left out and what looks odd.
        root: A folder further up whose metadata counts, too.
        skip: Folders below that hold other images.

    Raises:
        FileNotFoundError: When the folder, or an image that the metadata names, does not exist.
        ValueError: When there are no images, or captions are missing or cannot be understood.
    """
    folder, notes = Path(directory), DataNotes() if notes is None else notes
    if not folder.is_dir():
        raise FileNotFoundError(f"{flag} {str(directory)!r} is not a directory; give a folder of images")
    listing = list_folder(folder, skip=skip)
    if not listing.images:
        raise ValueError(f"{flag} {str(directory)!r} has no images in it{_instead(listing, folder)}")
    if prompt is not None:
        listing.report(folder, notes)
        warn_of_several_subjects(listing, folder, prompt, notes)
        return [ImageRecord(path, prompt) for path in listing.images]
    captions = read_captions(
        folder,
        listing,
        image_column=image_column,
        caption_column=caption_column,
        notes=notes,
        root=root,
        skip=skip,
    )
    missing = [below(path, folder) for path in listing.images if not captions.texts.get(path, "")]
    if missing:
        where = (
            some([below(path, folder) for path in captions.metadata])
            or f"metadata.jsonl (columns {image_column}, {caption_column})"
        )
        raise ValueError(
            f"{flag} {str(directory)!r}: {len(missing)} of {len(listing.images)} images have no caption: "
            f"{some(missing)}; add them to {where} or put a .txt file beside each, or use --instance_data_dir with "
            "--instance_prompt"
        )
    listing.report(folder, notes, used=captions.used)
    return [ImageRecord(path, captions.texts[path]) for path in listing.images]


def warn_of_several_subjects(listing: Listing, folder: Path, prompt: str, notes: DataNotes) -> None:
    """Note when one prompt is for the images of several folders, which may show several subjects."""
    counts: dict[str, int] = {}
    for path in listing.images:
        name = path.relative_to(folder).parts[0] if path.parent != folder else "."
        counts[name] = counts.get(name, 0) + 1
    if len(counts) > 1:
        parts = [f"{name} {count:,d}" for name, count in counts.items()]
        notes.warn(
            f"{len(listing.images):,d} images of {len(counts)} folders ({some(parts, 8)}) are taken as one: "
            f"{prompt!r}; give one folder if they show several subjects"
        )


def _instead(listing: Listing, folder: Path) -> str:
    """What a folder without images holds instead."""
    if not (listing.others or listing.hidden):
        return "; give a folder of images"
    names = [below(path, folder) for path in (*listing.others, *listing.hidden)]
    packed = [
        path.name for path in listing.others if path.suffix.lower() in (".zip", ".tar", ".gz", ".parquet", ".arrow")
    ]
    remedy = f"unpack {packed[0]}, or give the folder as --dataset_name" if packed else "give a folder of images"
    return f", but {some(names)}; {remedy}"
