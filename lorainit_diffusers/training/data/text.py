"""Text files as people have them: UTF-8 or UTF-16, with or without a byte order mark; anything else is refused."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Control characters that no text has; a NUL is left when a code page of two bytes was not recognised.
_CONTROL = re.compile("[\0-\x08\x0e-\x1f]")


def read_text(path: Path) -> str:
    """The text of a file, without a byte order mark; line breaks as they are.

    An older code page (Latin-1, Windows-1252, Shift-JIS ...) cannot be told from another one, so a file that is neither
    UTF-8 nor UTF-16 is an error and not a guess.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When it cannot be read or decoded; names the file, and the line where that is known.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{str(path)!r} does not exist") from error
    except OSError as error:
        raise ValueError(f"cannot read {str(path)!r} ({error.strerror or error}); make it readable") from error
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None) or _two_bytes(data) or "utf-8"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        where = f"line {line}: byte 0x{data[error.start]:02x}" if encoding == "utf-8" else f"byte {error.start}"
        raise ValueError(f"{str(path)!r}, {where} is not {encoding.upper()}; save the file as UTF-8") from error
    text = text.removeprefix("\ufeff")
    strange = _CONTROL.search(text)
    if strange is not None:
        line = text[: strange.start()].count("\n") + 1
        raise ValueError(
            f"{str(path)!r}, line {line}: has the control character {strange[0]!r}, so it is no text in UTF-8; save it "
            "as UTF-8"
        )
    return text


def split_lines(text: str) -> list[str]:
    r"""The lines of a text by `\n`, `\r\n` or `\r` only: a caption may have other line breaks in it."""
    return re.split("\r\n|\n|\r", text)


def _two_bytes(data: bytes) -> str | None:
    """UTF-16 without a mark, by the zeros that Latin letters have in one of their two bytes."""
    sample = data[:4096]
    if b"\0" not in sample or len(data) % 2:
        return None
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    if not even and odd:
        return "utf-16-le"
    return "utf-16-be" if even and not odd else None
