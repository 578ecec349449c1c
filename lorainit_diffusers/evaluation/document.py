"""A report as a list of blocks, and the two ways to write it: one HTML file with everything in it, and Markdown.

Texts come from captions, file names and labels of anyone: all of them are escaped, in both.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

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
        header: of the columns.
        rows: each with as many cells.
        folded: what a reader clicks on to see a long table (HTML only); empty for one that is open.
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


def _readable(text: str) -> str:
    """The text without what no file and no page can hold: bytes of a file name that are no text, control characters."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", "\ufffd", text)


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The blocks as GitHub Markdown; pictures are links to the files beside it."""
    escape = escape_markdown
    parts = [f"# {escape(title)}"]
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"## {escape(text)}")
            case Text(text, lead):
                parts.append(f"**{escape(text)}**" if lead else escape(text))
            case Bullets(items):
                parts.append("\n".join(f"- {escape(item)}" for item in items))
            case Code(text, language):
                fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
                parts.append(f"{fence}{language}\n{_readable(text)}\n{fence}")
            case Picture(path, alt):
                parts.append(f"![{escape(alt)}]({quote(path.name)})")
            case Table(header, rows, _):
                lines = [
                    header,
                    ["---"] * len(header),
                    *([f"{c.text} {c.detail}".strip() for c in row] for row in rows),
                ]
                texts = [[cell if cell == "---" else escape(cell) for cell in line] for line in lines]
                parts.append("\n".join(f"| {' | '.join(line)} |" for line in texts))
    return "\n\n".join(parts) + "\n"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """The blocks as one HTML file with its style and pictures in it: nothing is loaded from anywhere."""
    parts: list[str] = []
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"<h2>{_html(text)}</h2>")
            case Text(text, lead):
                parts.append(f'<p class="lead">{_html(text)}</p>' if lead else f"<p>{_html(text)}</p>")
            case Bullets(items):
                parts.append("<ul>" + "".join(f"<li>{_html(item)}</li>" for item in items) + "</ul>")
            case Code(text, _):
                parts.append(f"<pre><code>{_html(text)}</code></pre>")
            case Picture(path, alt):
                source = _data_uri(path)
                parts.append(f'<div class="box picture"><img src="{source}" alt="{_html(alt)}"></div>')
            case Table():
                parts.append(_html_table(block))
    body = "\n".join(parts)
    name = _html(title)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{name}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{name}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _html(text: str) -> str:
    return html.escape(_readable(text))


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_html(text)}</th>' for text in table.header)
    lines: list[str] = []
    for first, *rest in table.rows:
        # long labels may break after their separators
        name = re.sub(r"([:,=_.])", r"\1<wbr>", _html(first.text))
        wide = ' class="long"' if len(first.text) > _LONG else ""
        cells = [f'<th scope="row"{wide}>{_thumbnails(first)}{name}</th>']
        for cell in rest:
            verdict = [cell.verdict] if cell.verdict in ("better", "worse") else []
            classes = verdict + ["long"] * (max(map(len, cell.text.split("\n"))) > _LONG)
            kind = f' class="{" ".join(classes)}"' if classes else ""
            detail = f"<br><small>{_html(cell.detail)}</small>" if cell.detail else ""
            text = _html(cell.text).replace("\n", "<br>")
            cells.append(f"<td{kind}>{_thumbnails(cell)}{text}{detail}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    whole = (
        '<div class="box" tabindex="0"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{chr(10).join(lines)}\n</tbody>\n</table></div>"
    )
    return f"<details><summary>{_html(table.folded)}</summary>{whole}</details>" if table.folded else whole


def _thumbnails(cell: Cell) -> str:
    """The images of a cell, small; whole factors enlarge without smoothing."""
    parts: list[str] = []
    for image in cell.images:
        larger = max(image.size)
        factor = _THUMBNAIL // larger if larger <= _THUMBNAIL // 2 else min(1.0, _THUMBNAIL / larger)
        size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        resampling = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
        buffer = io.BytesIO()
        image.convert("RGB").resize(size, resampling).save(buffer, "png")
        source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
        parts.append(f'<img src="{source}" alt="" style="margin: 0 0 4px">')
    return "".join(parts)


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


_STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --soft: #5d636b; --page: #ffffff; --panel: #f5f6f8; --line: #dcdfe4;
  --good: #0b6b34; --good-back: #e3f4e9; --bad: #a3261d; --bad-back: #fbe7e5; --accent: #1f5fae; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e6ea; --soft: #a3a9b3; --page: #15171a; --panel: #1f2226; --line: #363b42;
    --good: #7fd6a0; --good-back: #173524; --bad: #f3a199; --bad-back: #42211f; --accent: #7fb2ee; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Liberation Sans", sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 1320px; margin: 0 auto; padding: 32px 20px 80px; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 16px; }
h2 { font-size: 1.25rem; margin: 44px 0 12px; padding-bottom: 6px; border-bottom: 1px solid var(--line); }
h1, h2 { overflow-wrap: anywhere; }
p, ul { max-width: 78ch; margin: 10px 0; overflow-wrap: anywhere; }
ul { padding-left: 1.2em; }
li { margin: 4px 0; }
.lead { font-size: 1.15rem; font-weight: 600; border-left: 4px solid var(--accent); padding-left: 14px; }
.box { overflow-x: auto; margin: 14px 0; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 0.86rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px; text-align: left; border-bottom: 1px solid var(--line); }
td { white-space: nowrap; }
th.long { min-width: 13em; }
details { margin: 14px 0; }
summary { cursor: pointer; color: var(--accent); }
td.long { white-space: normal; min-width: 15em; overflow-wrap: anywhere; }
thead th { background: var(--panel); color: var(--soft); font-weight: 600; vertical-align: bottom; min-width: 5em; }
tbody tr:last-child > * { border-bottom: 0; }
tbody th { font-weight: 600; position: sticky; left: 0; background: var(--page); max-width: 16em; }
small { font-size: 0.88em; opacity: 0.85; }
.better { color: var(--good); background: var(--good-back); }
.worse { color: var(--bad); background: var(--bad-back); }
.picture { background: #ffffff; padding: 8px; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px;
  font-size: 0.86rem; white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 700px) {
  body { font-size: 15px; }
  main { padding: 20px 14px 60px; }
  h1 { font-size: 1.4rem; }
  .lead { font-size: 1.05rem; }
  th, td { padding: 6px 9px; }
  tbody th { max-width: 9.5em; }
  .picture { padding: 4px; }
  tbody th { overflow-wrap: break-word; }
  th.long { min-width: 9.5em; }
  pre { padding: 10px; }
}
"""
