"""Every relative link and picture of every Markdown file leads somewhere, anchors included."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import pytest
from sd_fixtures import ROOT


def tracked_documents() -> list[Path]:
    """The Markdown files of the repository; of a source archive, which git knows nothing of, all that are there."""
    listed = subprocess.run(["git", "ls-files", "-z", "*.md"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]
    return [path for path in ROOT.rglob("*.md") if not any(part.startswith(".") for part in path.parts)]


def without_code(text: str) -> str:
    text = re.sub(r"^(`{3,}|~{3,}).*?^\1`*\s*$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", text, flags=re.DOTALL)


def links(text: str) -> list[str]:
    """The targets of links and pictures: inline, by reference, and those of HTML."""
    text = without_code(text)
    inline = re.findall(r"\]\(\s*(<[^>]*>|[^\s()]*(?:\([^\s()]*\)[^\s()]*)*)(?:\s+\"[^\"]*\")?\s*\)", text)
    references = re.findall(r"^\s{0,3}\[[^\]^]+\]:\s*(\S+)", text, re.MULTILINE)
    tags = re.findall(r"<(?:img|a|source)\b[^>]*?\b(?:src|href)=[\"']([^\"']+)[\"']", text)
    return [target.strip("<>") for target in (*inline, *references, *tags)]


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a file, and the names that it gives itself."""
    text = re.sub(r"^(`{3,}|~{3,}).*?^\1`*\s*$", "", text, flags=re.DOTALL | re.MULTILINE)
    seen: Counter[str] = Counter()
    found = set(re.findall(r"<a\s+(?:name|id)=[\"']([^\"']+)[\"']", text))
    for heading in re.findall(r"^#{1,6}\s+(.*?)\s*#*$", text, re.MULTILINE):
        plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.add(slug if not seen[slug] else f"{slug}-{seen[slug]}")
        seen[slug] += 1
    return found


def broken_links(path: Path) -> list[str]:
    broken: list[str] = []
    text = path.read_text(encoding="utf-8")
    for target in links(text):
        if re.match(r"[a-z][a-z0-9+.-]*:|//", target, re.IGNORECASE):
            continue  # another place
        name, _, anchor = target.partition("#")
        place = path if not name else (path.parent / unquote(name)).resolve()
        if (
            not place.exists()
            or (name.startswith("/"))
            or (anchor and place.suffix == ".md" and unquote(anchor) not in anchors(place.read_text(encoding="utf-8")))
        ):
            broken.append(target)
    return broken


DOCUMENTS = tracked_documents()


def test_the_documents_are_found():
    names = {path.relative_to(ROOT).as_posix() for path in DOCUMENTS}
    assert {"README.md", "docs/training.md", "assets/results/default/summary.md"} <= names


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    assert not broken_links(path), f"{path.relative_to(ROOT)} links to what is not there"


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "a picture.png").touch()
    (tmp_path / "other.md").write_text("# A heading: `code`, [twice](x)\n\n## Twice\n\n## Twice\n", encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text(
        "# Here\n[a](other.md) [b](other.md#a-heading-code-twice) [c](other.md#twice-1) [d](#here)\n"
        "![e](a%20picture.png)\n"
        '![f](gone.png) [g](other.md#gone) [h](#gone) <img src="gone2.png"> [i]\n\n[i]: gone3.md\n'
        "`[code](nothing.md)` [out](https://example.com/x.png)\n\n```\n[fenced](nothing.md)\n```\n"
        '[j](gone4.md "title") [![k](gone5.png)](other.md)\n',
        encoding="utf-8",
    )
    assert sorted(broken_links(page)) == [
        *("#gone", "gone.png", "gone2.png", "gone3.md", "gone4.md", "gone5.png", "other.md#gone"),
    ]
