"""What of a folder counts: images by suffix and content, hidden and system files never, linked folders once.

One function lists a folder for everything that reads data, so that a file is an image for all of them or for none.
"""

from __future__ import annotations

import functools
import importlib
import os
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lorainit_diffusers.training.data.notes import DataNotes

# Files and folders that systems, file servers and programs leave between a user's own; any case. Names that begin
# with a dot count as hidden whatever they are.
SYSTEM_NAMES = frozenset(
    {
        *("__macosx", "icon\r", "network trash folder", "temporary items", "desktop db", "desktop df"),
        *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "$recycle.bin", "recycler"),
        *("system volume information", "lost+found", "_gsdata_"),
        *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "@sharebin", "@__thumb", "#recycle", "#snapshot"),
        *("__pycache__", "__thumbs__"),
    }
)
# Formats that Pillow only recognises, or reads with the help of another program.
NOT_DECODED = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
# Images that need a plug-in of Pillow: they count, so that a missing plug-in is an error and no missing image.
PLUGIN_SUFFIXES = {
    **dict.fromkeys((".heic", ".heics", ".heif", ".heifs", ".hif"), "pillow-heif"),
    ".avif": "pillow-avif-plugin",
    ".jxl": "pillow-jxl-plugin",
    ".webp": "a Pillow with WebP",
}
# What editors and downloads leave behind: copies of images, whatever is in them.
LEFTOVER_SUFFIXES = frozenset({".bak", ".orig", ".old", ".tmp", ".temp", ".part", ".partial", ".crdownload", ".thm"})
_SIGNATURE_BYTES = 32
# What the name of a mask ends with, before its suffix: `cat-masklabel.png` is that of `cat.jpg`.
MASK_ENDING = "-masklabel"


@dataclass(frozen=True)
class Listing:
    """The files below a folder, each kind sorted by path.

    Attributes:
        images: What counts.
        others: Files that are no images.
        hidden: Hidden and system files and folders; nothing below such a folder is listed.
        repeated: Linked folders that were read already, or that lead back to where the reading came from.
        masks: Images that say which places of the image beside them count, by the end of their name.
    """

    images: tuple[Path, ...]
    others: tuple[Path, ...]
    hidden: tuple[Path, ...]
    repeated: tuple[Path, ...]
    masks: tuple[Path, ...] = ()

    def report(self, folder: Path, notes: DataNotes, *, used: Collection[Path] = ()) -> None:
        """Note what does not count; files in `used`, such as captions, are used otherwise."""
        notes.leave_out("hidden or system files and folders", (below(path, folder) for path in self.hidden))
        notes.leave_out("linked folders that were read already", (below(path, folder) for path in self.repeated))
        masks = (below(path, folder) for path in self.masks if path not in used)
        notes.leave_out("masks that no image uses", masks)
        unused = [path for path in self.others if path not in used]
        notes.leave_out("files that are no images", (below(path, folder) for path in unused))


def list_folder(folder: Path, *, skip: Collection[Path] = ()) -> Listing:
    """Everything below a folder.

    Linked folders are followed after the real ones, and each folder is read once, so a link that leads in a circle is
    harmless. That the folder itself lies below a hidden one does not matter.

    Args:
        folder: Where to look.
        skip: Folders below it that belong to something else.

    Raises:
        FileNotFoundError: For an image that is a link to nowhere.
        ValueError: For a folder that cannot be read.
    """
    images: list[Path] = []
    others: list[Path] = []
    hidden: list[Path] = []
    repeated: list[Path] = []
    masks: list[Path] = []
    skipped = {os.path.realpath(path) for path in skip}
    above = {_identity(parent) for parent in Path(os.path.realpath(folder)).parents}
    seen: set[tuple[int, int]] = set()
    waiting, linked = [folder], list[Path]()
    while waiting or linked:
        directory = waiting.pop() if waiting else linked.pop(0)
        identity = _identity(directory)
        if identity in seen or identity in above:
            repeated.append(directory)
            continue
        seen.add(identity)
        for entry in _entries(directory):
            path = Path(entry.path)
            if is_hidden(entry.name):
                hidden.append(path)
            elif entry.is_dir():
                if os.path.realpath(path) not in skipped:
                    (linked if entry.is_symlink() else waiting).append(path)
                elif path not in skip:
                    repeated.append(path)
            elif entry.is_file():
                (others if not is_image(path) else masks if is_mask(path) else images).append(path)
            elif entry.is_symlink() and path.suffix.lower() in image_suffixes():
                raise FileNotFoundError(f"the image {str(path)!r} is a link to nowhere; mend or remove it")
            else:
                others.append(path)
        linked.sort()
    return Listing(*(tuple(sorted(paths)) for paths in (images, others, hidden, repeated, masks)))


def child_folders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden and system ones; none if it is not there."""
    if not folder.is_dir():
        return []
    return sorted(Path(entry.path) for entry in _entries(folder) if entry.is_dir() and not is_hidden(entry.name))


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or something that a system or a program has put there."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def is_image(path: Path) -> bool:
    """Whether a file is an image: by its suffix in any case, or by its first bytes where the suffix says nothing.

    What looks like an image counts although it may be broken: an error that names it is better than a missing image.
    """
    suffix = path.suffix.lower()
    if suffix in image_suffixes():
        return True
    if suffix in LEFTOVER_SUFFIXES or suffix.endswith("~") or suffix in Image.registered_extensions():
        return False
    try:
        with path.open("rb") as file:
            return has_image_signature(file.read(_SIGNATURE_BYTES))
    except OSError as error:
        raise ValueError(
            f"cannot read the file {str(path)!r} ({error.strerror}); make it readable, or remove it"
        ) from error


def is_mask(path: Path) -> bool:
    """Whether an image is the mask of the one beside it, by its name."""
    return path.stem.lower().endswith(MASK_ENDING)


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The suffixes, in lower case, of all formats that Pillow decodes, and of those that its plug-ins do."""
    for plugin in ("pillow_heif", "pillow_avif", "pillow_jxl"):
        try:
            module = importlib.import_module(plugin)
        except (ImportError, OSError):  # not installed, or without the library that it wraps
            continue
        register = getattr(module, "register_heif_opener", None)
        if register is not None:
            register()
    Image.init()
    known = Image.registered_extensions().items()
    found = {suffix.lower() for suffix, kind in known if kind in Image.OPEN and kind not in NOT_DECODED}
    return frozenset(found | set(PLUGIN_SUFFIXES))


def has_image_signature(start: bytes) -> bool:
    """Whether a file that starts so is a PNG, JPEG, GIF, WebP, BMP, AVIF, HEIF, JPEG 2000 or JPEG XL image.

    TIFF is not among them: most cameras' raw files begin as it does.
    """
    if start.startswith(
        (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"\0\0\0\x0cjP  \r\n", b"\xff\x4f\xff\x51")
    ):
        return True
    if start.startswith(b"\0\0\0\x0cJXL \r\n") or (start[:4] == b"RIFF" and start[8:12] == b"WEBP"):
        return True
    if start[4:8] == b"ftyp" and start[8:12] in (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"mif1"):
        return True
    # "BM" alone may begin a text
    return (
        start[:2] == b"BM"
        and start[6:10] == bytes(4)
        and start[14:18] in (b"\x0c\0\0\0", b"\x28\0\0\0", b"\x6c\0\0\0", b"\x7c\0\0\0")
    )


def find_file(folder: Path, name: str) -> Path | None:
    """The file that a name in a list means: as it is, with Windows' separators, or in another form of Unicode."""
    spellings = [name, name.strip(), name.strip().replace("\\", "/")]
    spellings += [unicodedata.normalize(form, spellings[-1]) for form in ("NFC", "NFD")]
    for spelling in dict.fromkeys(spellings):
        try:
            if spelling and (folder / spelling).is_file():
                return folder / spelling
        except (OSError, ValueError):  # too long for a name, or with a NUL in it
            continue
    return None


def below(path: Path, folder: Path) -> str:
    """A path as it is written from a folder, with slashes; from the folder beside it where it lies elsewhere."""
    try:
        return path.relative_to(folder).as_posix()
    except ValueError:
        return Path(os.path.relpath(path, folder)).as_posix()


def _entries(directory: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            yield from sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(
            f"cannot read the folder {str(directory)!r} ({error.strerror}); make it readable, or move it elsewhere"
        ) from error


def _identity(directory: Path) -> tuple[int, int]:
    status = directory.stat()
    return status.st_dev, status.st_ino
