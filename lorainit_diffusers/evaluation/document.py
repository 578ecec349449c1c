"""A report as a list of blocks, and the two ways to write it: one HTML file with everything in it, and Markdown.

Texts come from captions, file names and labels of anyone: all of them are escaped, in both, by the environments of the
templates (`templates/`), so that a template cannot forget it.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

_MAX_INLINE_BYTES = 600_000
_MAX_INLINE_WIDTH = 1800
# Side of an image in a cell, in pixels.
_THUMBNAIL = 160
# A cell of more characters is broken into lines.
_LONG = 26


class Heading(NamedTuple):
    """Title of a section."""

    text: str


class Text(NamedTuple):
    """A paragraph; the first one of a report is its result and stands out."""

    text: str
    lead: bool = False


class Bullets(NamedTuple):
    """A list of sentences."""

    items: list[str]


class Code(NamedTuple):
    """Lines to copy."""

    text: str
    language: str = "bash"


class Picture(NamedTuple):
    """A figure that lies beside the report."""

    path: Path
    alt: str


class Cell(NamedTuple):
    """A cell of a table; the verdict colours it, the detail stands below in small type, images above (HTML only)."""

    text: str
    verdict: str = ""
    detail: str = ""
    images: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class Table:
    """Rows under a heading; the first column names the row.

    Attributes:
        header: Of the columns.
        rows: Each with as many cells.
        folded: What a reader clicks on to see a long table (HTML only); empty for one that is open.
    """

    header: list[str]
    rows: list[list[Cell]]
    folded: str = ""


Block = Heading | Text | Bullets | Code | Picture | Table


def escape_markdown(text: str) -> str:
    """A text that Markdown shows as it is, in one line: in a paragraph, a heading, a list or a cell of a table."""
    text = " ".join(_readable(text).split()).replace("&", "&amp;")
    text = re.sub(r"([\\`*_<>|\[\]~$])", r"\\\1", text)
    # what makes a heading, a list or a line does so at the start, with a space behind it
    return re.sub(r"^(\d*)([#+.)-]+)(?=\s|$)", r"\1\\\2", text)


def escape_cell(markdown: str) -> str:
    """Markdown that may stand in a cell of a table, code included: no line ends, and no bar that ends the cell."""
    return " ".join(_readable(markdown).split()).replace("|", r"\|")


def code_fence(code: str) -> str:
    """What code stands between in Markdown: more backticks than any run of them in the code."""
    return "`" * max(3, 1 + max((len(run) for run in re.findall("`+", code)), default=0))


def _readable(text: str) -> str:
    """The text without what no file and no page can hold: bytes of a file name that are no text, control characters."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", "\ufffd", text)


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The blocks as GitHub Markdown; pictures are links to the files beside it."""
    return _markdown_templates().get_template("document.md.jinja").render(title=title, blocks=blocks)


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """The blocks as one HTML file with its style and pictures in it: nothing is loaded from anywhere."""
    return _html_templates().get_template("document.html.jinja").render(title=title, blocks=blocks)


class _Markdown(str):
    """A text that is Markdown already; every other text that a template shows is escaped."""


@cache
def _html_templates() -> Environment:
    """Templates whose texts are escaped for HTML, all of them."""
    filters = {
        "breakable": _breakable,
        "with_line_ends": _with_line_ends,
        "row_classes": _row_classes,
        "cell_classes": _cell_classes,
        "thumbnails": _thumbnails,
        "data_uri": _data_uri,
    }
    return _templates(filters, autoescape=True, finalize=_readable_value)


@cache
def _markdown_templates() -> Environment:
    """Templates whose texts are escaped for Markdown, all of them: Jinja's own escaping knows HTML alone."""
    filters = {"fence": _fence, "verbatim": _verbatim, "address": _address, "both_texts": _both_texts}
    return _templates(filters, autoescape=False, finalize=_markdown_value)


def _templates(filters: Mapping[str, Callable[[Any], Any]], *, autoescape: bool, finalize: Any) -> Environment:
    environment = templates_of("lorainit_diffusers.evaluation", autoescape=autoescape, finalize=finalize)
    environment.filters.update({"kind": _kind, **filters})
    return environment


def templates_of(package: str, *, autoescape: bool, finalize: Callable[[Any], Any] | None = None) -> Environment:
    """The templates of a package, in which a name that nobody gives is an error and tags leave no empty lines.

    Args:
        package: With a folder `templates`.
        autoescape: Whether values are escaped for HTML.
        finalize: What is done to every value that is shown.
    """
    return Environment(
        loader=PackageLoader(package),
        autoescape=autoescape,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _kind(block: Block) -> str:
    return type(block).__name__


def _readable_value(value: object) -> object:
    return _readable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _markdown_value(value: object) -> object:
    return value if isinstance(value, _Markdown) else escape_markdown(str(value))


def _fence(code: str) -> _Markdown:
    return _Markdown(code_fence(code))


def _verbatim(code: str) -> _Markdown:
    return _Markdown(_readable(code))


def _address(path: Path) -> _Markdown:
    """Of a picture beside the report."""
    return _Markdown(quote(path.name))


def _both_texts(cell: Cell) -> str:
    return f"{cell.text} {cell.detail}".strip()


def _breakable(text: str) -> Markup:
    """A label that may break after its separators."""
    return Markup(re.sub(r"([:,=_.])", r"\1<wbr>", str(escape(_readable(text)))))


def _with_line_ends(text: str) -> Markup:
    return Markup("<br>").join(_readable(text).split("\n"))


def _row_classes(cell: Cell) -> str:
    return "long" if len(cell.text) > _LONG else ""


def _cell_classes(cell: Cell) -> str:
    verdict = [cell.verdict] if cell.verdict in ("better", "worse") else []
    return " ".join(verdict + ["long"] * (max(map(len, cell.text.split("\n"))) > _LONG))


def _thumbnails(cell: Cell) -> list[str]:
    """The images of a cell as addresses, small; whole factors enlarge without smoothing."""
    sources: list[str] = []
    for image in cell.images:
        larger = max(image.size)
        factor = _THUMBNAIL // larger if larger <= _THUMBNAIL // 2 else min(1.0, _THUMBNAIL / larger)
        size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        resampling = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
        buffer = io.BytesIO()
        image.convert("RGB").resize(size, resampling).save(buffer, "png")
        sources.append(f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}")
    return sources


def _data_uri(path: Path) -> str:
    """A picture as text; large ones, which are photographs, reduced and as JPEG."""
    content, kind = path.read_bytes(), "png"
    if len(content) > _MAX_INLINE_BYTES:
        with Image.open(path) as image:
            picture = image.convert("RGB")
        picture.thumbnail((_MAX_INLINE_WIDTH, picture.height), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, "jpeg", quality=90)
        content, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
