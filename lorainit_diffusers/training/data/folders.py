"""Folders of captioned images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lorainit_diffusers.training.data.captions import FolderCaptions, read_captions
from lorainit_diffusers.training.data.files import MASK_ENDING, Listing, below, list_folder
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
    mask_column: str | None = None,
    conditioning_image_column: str | None = None,
) -> list[ImageRecord]:
    """List the captioned images of a folder.

    Captions come from `prompt` (the same for all), else from `metadata.jsonl`, `.csv`, `.tsv`, `.json` or `.parquet`
    (the Hugging Face `imagefolder` layout, in subfolders, too), else from a `.txt` file beside each image. The mask of
    `cat.jpg` is `cat-masklabel.png`, or what the metadata's `mask_column` names.

    Args:
        directory: The folder; images in subfolders count.
        flag: The option that gave the folder, for error messages.
        prompt: Caption for every image.
        image_column: Metadata column of the file name, relative to the metadata's folder.
        caption_column: Metadata column of the caption.
        notes: Gets what was left out and what looks odd.
        root: A folder further up whose metadata counts, too.
        skip: Folders below that hold other images.
        mask_column: Metadata column of the masks' file names.
        conditioning_image_column: Metadata column of the conditioning images' file names.

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
    masks = _masks_by_name(listing, folder)
    if prompt is not None:
        listing.report(folder, notes, used=[path for path in masks.values() if path])
        warn_of_several_subjects(listing, folder, prompt, notes)
        return [ImageRecord(path, prompt, mask=_part(masks.get(path))) for path in listing.images]
    columns = {"--mask_column": mask_column, "--conditioning_image_column": conditioning_image_column}
    captions = read_captions(
        folder,
        listing,
        image_column=image_column,
        caption_column=caption_column,
        notes=notes,
        root=root,
        skip=skip,
        beside={option: column for option, column in columns.items() if column is not None},
    )
    images = _own_images(listing, captions)
    missing = [below(path, folder) for path in images if not captions.texts.get(path, "")]
    if missing:
        where = (
            some([below(path, folder) for path in captions.metadata])
            or f"metadata.jsonl (columns {image_column}, {caption_column})"
        )
        raise ValueError(
            f"{flag} {str(directory)!r}: {len(missing)} of {len(images)} images have no caption: "
            f"{some(missing)}; add them to {where} or put a .txt file beside each, or use --instance_data_dir with "
            "--instance_prompt"
        )
    masks = captions.beside.get("--mask_column", masks)
    conditioning = captions.beside.get("--conditioning_image_column", {})
    listing.report(folder, notes, used={*captions.used, *(path for path in masks.values() if path)})
    return [
        ImageRecord(path, captions.texts[path], mask=_part(masks.get(path)), conditioning=_part(conditioning.get(path)))
        for path in images
    ]


def _part(path: Path | None) -> ImageRecord | None:
    """A mask or a conditioning image, which has no caption."""
    return None if path is None else ImageRecord(path, "")


def _own_images(listing: Listing, captions: FolderCaptions) -> list[Path]:
    """The images that are trained on: not those that metadata names as another one's mask or conditioning image."""
    named = {os.path.normpath(path) for files in captions.beside.values() for path in files.values() if path}
    return [path for path in listing.images if path in captions.texts or os.path.normpath(path) not in named]


def _masks_by_name(listing: Listing, folder: Path) -> dict[Path, Path | None]:
    """Image -> the mask beside it, where there is one.

    Raises:
        ValueError: When an image has two.
    """
    masks: dict[str, Path] = {}
    for path in listing.masks:
        name = path.with_name(path.stem[: -len(MASK_ENDING)]).as_posix()
        other = masks.setdefault(name, path)
        if other != path:
            raise ValueError(
                f"{below(other, folder)} and {below(path, folder)} are masks of one image; keep one of them"
            )
    found: dict[Path, Path | None] = {}
    for image in listing.images:
        mask = masks.get(image.with_suffix("").as_posix())
        if mask is not None:
            found[image] = mask
    return found


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
