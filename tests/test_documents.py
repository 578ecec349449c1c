"""What the documents promise: links and pictures lead somewhere, the README stays short, named files are there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from functools import cache
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


def ragged_rows(text: str) -> list[str]:
    """The rows of tables with more or fewer cells than the head of their table; a bar in code counts, as on GitHub."""
    text = re.sub(r"^(`{3,}|~{3,}).*?^\1`*\s*$", "", text, flags=re.DOTALL | re.MULTILINE)
    ragged: list[str] = []
    for table in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        rows = table.splitlines()
        bars = [len(re.findall(r"(?<!\\)\|", row)) for row in rows]
        ragged += [row for row, count in zip(rows, bars, strict=True) if count != bars[0]]
    return ragged


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_tables_are_rectangular(path: Path) -> None:
    assert ragged_rows(path.read_text(encoding="utf-8")) == []


def test_ragged_rows_are_found():
    table = "| a | b |\n|---|---|\n| 1 | `x \\| y` |\n| 2 | `x | y` |\n| 3 |\n"
    assert ragged_rows(f"{table}\nText\n```\n| a |\n| b | c |\n```\n") == ["| 2 | `x | y` |", "| 3 |"]


MAX_LINES, MAX_WORDS, MAX_WIDTH = 170, 2000, 119


def test_the_readme_is_read_in_one_go():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    assert len(text.split()) <= MAX_WORDS
    assert [line for line in text.splitlines() if len(line) > MAX_WIDTH] == []


def test_the_index_leads_to_every_page():
    index = ROOT / "docs" / "index.md"
    named = {target.partition("#")[0] for target in links(index.read_text(encoding="utf-8"))}
    assert {path.name for path in index.parent.glob("*.md")} - {"index.md"} <= named


def rows_of(heading: str, path: Path) -> list[list[str]]:
    """The cells of the first table under a heading, without its head."""
    part = re.search(
        rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert part, f"{path.name} has no part {heading!r}"
    lines = [line for line in part[1].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def missing_places(text: str) -> list[str]:
    """The files that a text names between back quotes and that are not there, and the symbols that they do not have.

    `NAME` in a file's name stands for what is to be added: only its folder has to be there.
    """
    missing: list[str] = []
    for name, symbol in re.findall(r"`([\w.-]+/[\w./-]*)`(?: \(`(\w+)`\))?", text):
        place = ROOT / name
        if not (place.parent if "NAME" in place.name else place).exists():
            missing.append(name)
        elif symbol and not re.search(
            rf"^(?:    )?(?:def |class )?{symbol}\b\s*[:=(]", place.read_text("utf-8"), re.MULTILINE
        ):
            missing.append(f"{symbol} in {name}")
    return missing


def test_contributing_says_where_to_add_what_and_it_is_there():
    rows = rows_of("Where to add what", ROOT / "CONTRIBUTING.md")
    added = " ".join(row[0] for row in rows)
    for kind in ("method", "family", "format of captions", "metric", "option", "export format"):
        assert kind in added, f"CONTRIBUTING.md does not say where to add a {kind}"
    assert all(len(row) == len(rows[0]) and any("`" in cell for cell in row[1:3]) for row in rows)
    assert missing_places("\n".join(" | ".join(row) for row in rows)) == []


def test_places_that_are_missing_are_found():
    text = (
        "`tests/test_documents.py` (`missing_places`) `tests/NAME.py` `tests/` `no path` "
        "`tests/gone.py` `gone/NAME.py` `tests/test_documents.py` (`GONE`) `tests/test_documents.py` (`ROOT`)"
    )
    here = "tests/test_documents.py"
    assert missing_places(text) == ["tests/gone.py", "gone/NAME.py", f"GONE in {here}", f"ROOT in {here}"]


def missing_tests(text: str) -> list[str]:
    """The tests that a text names between back quotes and that are not there: functions and files."""
    files = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in (ROOT / "tests").rglob("*.py")}
    named = re.findall(r"`((?:tests/[\w/]*)?test_\w+(?:\.py)?)`", text)
    return [
        name
        for name in named
        if name not in files
        and not any(path.endswith(f"/{name}") for path in files)
        and not any(f"def {name}(" in source for source in files.values())
    ]


@pytest.mark.parametrize("name", ["security.md", "reliability.md"])
def test_the_tests_that_pages_name_are_there(name: str) -> None:
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert "`test_" in text
    assert missing_tests(text) == []


def test_named_missing_tests_are_found():
    text = "`test_documents.py` `tests/test_documents.py` `test_links_lead_somewhere` `test_gone` `tests/test_gone.py`"
    assert missing_tests(f"{text} `tests/data/test_documents.py`") == [
        *("test_gone", "tests/test_gone.py", "tests/data/test_documents.py"),
    ]


# A changelog speaks of what was.
PAGES = [path for path in DOCUMENTS if path.name != "CHANGELOG.md"]
OURS = ("lorainit_diffusers", "train_scripts", "tests", "docs", "assets", "benchmarks", ".ci")


def missing_paths(text: str) -> list[str]:
    """The files and folders of this repository that a text names between back quotes and that are not there."""
    named = re.findall(rf"`((?:{'|'.join(map(re.escape, OURS))})/[\w./*-]*)`", text)
    return [name for name in named if "NAME" not in name and not any(ROOT.glob(name.rstrip("/")))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_files_that_pages_name_are_there(path: Path) -> None:
    assert missing_paths(path.read_text(encoding="utf-8")) == []


def test_missing_paths_are_found():
    text = "`tests/test_documents.py` `tests/test_*s.py` `docs/` `lorainit_diffusers/methods/NAME.py` `tests/gone.py`"
    assert missing_paths(f"{text} `gone/gone.py` `docs/gone_*.md` `families/gone.py`") == [
        *("tests/gone.py", "docs/gone_*.md"),
    ]


def commands_of(text: str) -> list[list[str]]:
    """The commands of the Bash blocks of a page that run a script of ours, without what starts it."""
    found: list[list[str]] = []
    for block in re.findall(r"^ *```bash\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE):
        lines = block.replace("\\\n", " ").splitlines()
        values = dict(re.findall(r"^(\w+)=\"([^\"]*)\"$", "\n".join(lines), re.MULTILINE))
        for line in lines:
            for name in re.findall(r"\$(\w+)", line):
                line = line.replace(f"${name}", values.get(name, ""))
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                start = next((n for n, word in enumerate(words) if word.startswith("train_scripts/")), None)
                if start is not None:
                    found.append(words[start:])
    return found


@cache
def flags_of(script: str, family: str | None) -> frozenset[str]:
    """What `--help` of a script lists."""
    chosen = [] if family is None else ["--family", family]
    environment = {**os.environ, "COLUMNS": "200"}
    command = [sys.executable, script, *chosen, "--help"]
    shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return frozenset(re.findall(r"--[\w-]+", shown.stdout))


def unknown_flags(words: list[str]) -> list[str]:
    family = words[words.index("--family") + 1] if "--family" in words else None
    known = flags_of(words[0], family)
    given = [word.partition("=")[0] for word in words[1:] if word.startswith("--")]
    return [flag for flag in given if flag not in known and flag.replace("--no-", "--", 1) not in known]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_commands_that_pages_show_have_options_that_exist(path: Path) -> None:
    for words in commands_of(path.read_text(encoding="utf-8")):
        assert (ROOT / words[0]).is_file(), words[0]
        assert unknown_flags(words) == [], " ".join(words)


def test_commands_and_unknown_options_are_found():
    text = (
        "```bash\npip install -e . && accelerate launch train_scripts/a.py --init x # --not this\n"
        'more="--rank 4 --seed 0"\npython train_scripts/b.py $more \\\n    --prompt "a b"\npython other.py --c\n```\n'
        "```\ntrain_scripts/c.py --d\n```\n"
    )
    assert commands_of(text) == [
        ["train_scripts/a.py", "--init", "x"],
        ["train_scripts/b.py", "--rank", "4", "--seed", "0", "--prompt", "a b"],
    ]
    script = "train_scripts/train_sd_lora.py"
    assert unknown_flags([script, "--rank", "4", "--no-random_flip", "--gone", "--init_option", "a=b"]) == ["--gone"]
    assert commands_of((ROOT / "README.md").read_text(encoding="utf-8"))[0] == [script, "--init", "cntlora"]


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
