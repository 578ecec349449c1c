"""The blocks of a report as HTML and as Markdown, with texts that want to be more than texts."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from lorainit_diffusers.evaluation.document import (
    Block,
    Bullets,
    Cell,
    Code,
    Heading,
    Picture,
    Table,
    Text,
    escape_cell,
    escape_markdown,
    to_html,
    to_markdown,
)

HOSTILE = [
    '<script>alert("x")</script>',
    "<img src=https://example.com/x.png onerror=alert(1)>",
    "\"><b>bold</b> & 'quoted'",
    "&lt;b&gt;",
    "a | b | c",
    "two\nlines",
    "[a link](https://example.com) ![p](https://example.com/p.png)",
    "`code` *strong* _soft_ ~~gone~~ $x$ \\",
    "``` fence",
    "javascript:alert(1)",
    "bad \udcff bytes \x00\x1b[31m",
]


class Reader(HTMLParser):
    """What a browser makes of a page: elements with their attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a picture (1).png"
    Image.new("RGB", (64, 32), (200, 30, 30)).save(path)
    return path


def all_blocks(text: str, picture: Path) -> list[Block]:
    images = (Image.new("RGB", (8, 8)),)
    return [
        *(Text(text, lead=True), Text(text), Heading(text), Bullets([text]), Code(text), Picture(picture, text)),
        Table([text, "second"], [[Cell(text), Cell(text, verdict=text, detail=text, images=images)]]),
    ]


@pytest.mark.parametrize("text", HOSTILE)
def test_html_shows_hostile_texts_as_texts_and_loads_nothing(text, picture):
    page = to_html(text, all_blocks(text, picture))
    page.encode("utf-8")
    reader = Reader(page)
    assert {tag for tag, _ in reader.elements} - {"wbr"} == {
        *("html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "p", "ul", "li", "pre", "code"),
        *("div", "img", "table", "thead", "tbody", "tr", "th", "td", "br", "small"),
    }
    sources = [attributes.get("src") for tag, attributes in reader.elements if tag == "img"]
    assert all(source and source.startswith("data:image/") for source in sources)
    for _, attributes in reader.elements:
        assert not {"href", "onerror", "onclick", "srcset", "action"} & set(attributes)
        assert attributes.get("class") in (None, "lead", "box", "box picture", "better", "worse", "long")
    assert not re.search(r"url\(|@import", page)
    shown = text.encode("utf-8", "replace").decode("utf-8")
    shown = re.sub(r"[\x00-\x08\x0b-\x1f]", "\ufffd", shown)
    # title, heading, both paragraphs, heading of a section, list, code, heading and cells of the table
    assert reader.text.count(shown.splitlines()[0]) >= 9


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_keeps_tables_and_fences_whole(text, picture):
    page = to_markdown(text, all_blocks(text, picture))
    page.encode("utf-8")
    lines = page.splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [3, 3, 3]
    fences = [index for index, line in enumerate(lines) if line.startswith("```")]
    opening = next(line for line in lines if line.startswith("```"))
    fence = opening.removesuffix("bash")
    assert lines.count(fence) == 1
    inside = page.split(opening + "\n", 1)[1].split("\n" + fence + "\n", 1)[0]
    outside = page.replace(inside, "")
    assert "<script" not in outside.replace("\\<", "")
    assert "](https" not in outside.replace("\\]", "")
    assert "](a%20picture%20%281%29.png)" in page
    assert fences


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a|b", r"a\|b"),
        ("# no heading", r"\# no heading"),
        ("- no list", r"\- no list"),
        ("12. no list", r"12\. no list"),
        ("0.001", "0.001"),
        ("-0.5 tied", "-0.5 tied"),
        ("#1", "#1"),
        ("a  \n b", "a b"),
        ("&amp;", "&amp;amp;"),
        ("gradient_step", r"gradient\_step"),
    ],
)
def test_markdown_escapes(text, escaped):
    assert escape_markdown(text) == escaped


def test_cells_of_other_tables_keep_their_markdown():
    assert escape_cell("`a|b`\nnext") == r"`a\|b` next"


def test_code_is_fenced_by_more_than_it_holds():
    page = to_markdown("t", [Code("```\ninside\n````", "python")])
    assert page == "# t\n\n`````python\n```\ninside\n````\n`````\n"


def test_a_phone_gets_everything_inside_its_width(picture):
    long = "a value that is much longer than a screen of a telephone is wide, so it breaks"
    page = to_html("t", [Picture(picture, "p"), Table(["what", "value"], [[Cell("x"), Cell(long)]])])
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert '<td class="long">' in page
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    assert re.search(r"img \{[^}]*max-width: 100%", style)
    assert "max-width: none" not in style
    assert not re.search(r"[^-]width: \d{3,}px", style)
    assert re.search(r"\.box \{[^}]*overflow-x: auto", style)
    assert re.search(r"pre \{[^}]*white-space: pre-wrap", style)
