"""Text files in any encoding, rows in any format: the right text, or an error that names file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorainit_diffusers.training.data.rows import json_entries, read_rows
from lorainit_diffusers.training.data.text import read_text

TEXT = "a café\r\nzwei Bäume"


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "BOM utf-16-be", "BOM utf-32-be"]
)
def test_unicode_is_read_in_every_form(tmp_path: Path, encoding: str) -> None:
    data = ("\ufeff" + TEXT).encode(encoding[4:]) if encoding.startswith("BOM ") else TEXT.encode(encoding)
    (tmp_path / "a.txt").write_bytes(data)
    assert read_text(tmp_path / "a.txt") == TEXT


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "cp1251", "shift-jis", "gb18030", "euc-kr", "iso2022_jp"])
def test_other_code_pages_are_named_with_their_line(tmp_path: Path, encoding: str) -> None:
    text = {"latin-1": "é", "cp1252": "“é”", "cp1251": "кот", "euc-kr": "고양이"}.get(encoding, "猫と犬")
    (tmp_path / "a.txt").write_bytes(f"one\n{text} two".encode(encoding))
    with pytest.raises(ValueError, match=r"a\.txt', line 2: .*save (the file|it) as UTF-8"):
        read_text(tmp_path / "a.txt")


def test_half_a_character_and_binary_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("é".encode()[:1])
    with pytest.raises(ValueError, match=r"a\.txt', line 1: byte 0xc3 is not UTF-8"):
        read_text(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfea")
    with pytest.raises(ValueError, match=r"b\.txt', byte 2 is not UTF-16"):
        read_text(tmp_path / "b.txt")
    (tmp_path / "c.txt").write_bytes(b"a\n\0\0b")
    with pytest.raises(ValueError, match=r"c\.txt', line 2: has the control character"):
        read_text(tmp_path / "c.txt")


ROWS: list[dict[str, Any]] = [
    {"file_name": "a.png", "text": "red, flat"},
    {"file_name": "b.png", "text": 'a "café"\nsign'},
]


def as_csv(delimiter: str, end: str = "\n") -> str:
    quoted = ['a.png{}"red, flat"', 'b.png{}"a ""café""\nsign"']
    return end.join([f"file_name{delimiter}text", *(line.format(delimiter) for line in quoted)]) + end


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.jsonl", "\n".join(map(json.dumps, ROWS))),
        ("m.jsonl", "\r\n\r\n".join(map(json.dumps, ROWS))),
        ("m.jsonl", "\r".join(map(json.dumps, ROWS))),
        ("m.jsonl", "\n".join("\ufeff" + json.dumps(row) for row in ROWS)),
        ("m.jsonl", json.dumps(ROWS)),
        ("m.jsonl", json.dumps(ROWS, indent=1)),
        ("m.json", json.dumps(ROWS, indent=1)),
        ("m.csv", as_csv(",")),
        ("m.csv", as_csv(";")),
        ("m.csv", as_csv("\t")),
        ("m.tsv", as_csv("\t")),
        ("m.csv", as_csv("|")),
        ("m.csv", as_csv(",", "\r\n")),
        ("m.csv", "sep=;\n" + as_csv(";")),
        ("m.csv", as_csv(", ")),
        ("m.csv", as_csv(",").replace("text\n", "text,,\n").replace('flat"\n', 'flat",,\n')),
        ("m.csv", as_csv(",") + "\n\n,\n"),
    ],
)
def test_rows_are_the_same_in_every_format(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert [row.values for row in read_rows(tmp_path / name, columns=("file_name", "text"))] == ROWS


def test_parquet_rows(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(ROWS), tmp_path / "metadata.parquet")
    rows = read_rows(tmp_path / "metadata.parquet")
    assert [row.values for row in rows] == ROWS
    assert rows[1].where.endswith("metadata.parquet', row 2")
    (tmp_path / "metadata.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"metadata\.parquet' is no Parquet file"):
        read_rows(tmp_path / "metadata.parquet")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a.png,red, flat\n",
            r"m\.csv', line 2: has 3 fields, but the header has 2 \(file_name, text\).*double quotes",
        ),
        ("a.png,red\nb.png\n", r"m\.csv', line 3: has 1 fields, but the header has 2"),
        ('a.png,"red\nflat"\nb.png,red, flat\n', r"m\.csv', line 4: has 3 fields"),
        ('a.png,"red\nb.png,blue\n', r"m\.csv', line 2: not CSV \(.*end of data"),
        ('a.png,"red" flat\n', r"m\.csv', line 2: not CSV"),
        ("a.png," + "x" * 200_000 + "\n", r"m\.csv', line 2: not CSV \(field larger"),
    ],
)
def test_broken_csv_names_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.csv").write_text("file_name,text\n" + text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / "m.csv", columns=("file_name", "text"))


def test_a_column_that_comes_twice_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("file_name,text,text\na,b,c\n")
    with pytest.raises(ValueError, match=r"m\.csv', line 1: the column 'text' comes twice"):
        read_rows(tmp_path / "m.csv", columns=("file_name", "text"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n{"a": \n', r"m\.jsonl', line 2: not JSON"),
        ('{"a": 1}\n["a", "b"]\n', r"m\.jsonl', line 2: not a JSON object but a list"),
        ('{"a": 1}\n7\n', r"m\.jsonl', line 2: not a JSON object but a number"),
        ('[["a", "b"]]', r"m\.jsonl', entry 1: not a JSON object but a list"),
        ('[{"a": 1},', r"m\.jsonl' is not JSON"),
        ('{"a": 1, "a": 2}', r"m\.jsonl', line 1: .*the key 'a' comes twice"),
    ],
)
def test_broken_json_names_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / "m.jsonl")


def test_a_json_file_that_is_no_list_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text('{"a.png": {"text": "red"}}')
    with pytest.raises(ValueError, match=r"m\.json' is no list of objects but an object"):
        json_entries(tmp_path / "m.json")
