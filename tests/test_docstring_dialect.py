"""One dialect of docstrings: Google's sections, Markdown inside, and entries that are sentences."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from sd_fixtures import ROOT

FILES = [path for folder in ("lorainit_diffusers", "train_scripts") for path in sorted((ROOT / folder).rglob("*.py"))]
SECTIONS = ("Args:", "Attributes:", "Raises:")
ENTRY = re.compile(r"\*{0,2}[\w.]+(?:, \*{0,2}\w+)*(?: \([^)]*\))?: (.+)", re.DOTALL)
# Names that are written small, also where a sentence begins.
SMALL = (
    *("accelerate", "diffusers", "gloo", "jinja2", "kohya", "lorainit", "npm"),
    *("pandas", "torch", "torchrun", "transformers"),
)


def docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text is not None:
                yield text


def entries(docstring: str) -> Iterator[str]:
    """What the sections say of each name: the text behind `name: `, with its further lines."""
    for part in re.split(r"\n(?=\S)", docstring):
        head, _, body = part.partition("\n")
        if head in SECTIONS:
            for entry in re.split(r"\n(?= {4}\S)", body):
                if match := ENTRY.fullmatch(entry.strip()):
                    yield match[1]


def faults(source: str) -> list[str]:
    found: list[str] = []
    for text in docstrings(ast.parse(source)):
        found += re.findall(r"(?<!`)``(?!`)[^`]+``|:\w+:`[^`]+`", text)
        for entry in entries(text):
            word = entry.split()[0]
            is_small = re.fullmatch(r"[a-z]+[,;]?", word) and word.strip(",;") not in SMALL
            if is_small or entry.rstrip()[-1] not in ".:!?":
                found.append(entry)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_docstrings_are_markdown_and_their_entries_are_sentences(path: Path) -> None:
    assert faults(path.read_text(encoding="utf-8")) == []


def test_faults_are_found() -> None:
    source = '''
def f(a, b, c):
    """Does ``x`` as :func:`g` and `h` do.

    Args:
        a: which one.
        b: Of the second,
            no end
        c: diffusers' name. `code` or `a: b`.

    Returns:
        whatever: it is
    """
'''
    assert faults(source) == ["``x``", ":func:`g`", "which one.", "Of the second,\n        no end"]
