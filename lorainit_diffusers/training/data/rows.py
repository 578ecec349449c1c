"""Rows of JSONL, JSON, CSV and Parquet files, each with the file and line that messages name; none is dropped."""

from __future__ import annotations

import csv
import importlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from lorainit_diffusers.training.data.text import read_text, split_lines

# What spreadsheets write between the fields of a line, the usual one first.
_DELIMITERS = (",", ";", "\t", "|")
# How programs write a field that has no value.
_NO_VALUE = frozenset({"nan", "NaN", "NAN", "None", "null", "NULL", "<NA>", "#N/A"})


class Row(NamedTuple):
    """One row of a file.

    Attributes:
        where: File and line, as messages begin.
        values: By column.
    """

    where: str
    values: dict[str, Any]


def read_rows(path: Path, *, columns: Sequence[str] = ()) -> list[Row]:
    """The rows of a file of any kind, by its suffix.

    Args:
        path: `.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv` or `.parquet`.
        columns: Of which a CSV file's header has one at least, by which its delimiter is found.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When it cannot be understood; names the file and the line.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(path)
    if suffix in (".csv", ".tsv"):
        return _csv_rows(path, columns)
    rows: list[Row] = []
    for where, value in json_entries(path):
        if not isinstance(value, Mapping):
            raise ValueError(
                f"{where}: not a JSON object but {_kind(value)}; write an object with a value for each column"
            )
        rows.append(Row(where, {str(key): each for key, each in cast("Mapping[Any, Any]", value).items()}))
    return rows


def json_entries(path: Path, *, label: str | None = None, what: str = "objects") -> list[tuple[str, Any]]:
    """The values of a JSONL file, or of a JSON file that is a list, whatever its suffix is: (file and line, value).

    Args:
        path: The file.
        label: How messages name it.
        what: The values are, for messages.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When it is not JSON; names the file and the line.
    """
    text, label = read_text(path), label or repr(str(path))
    if path.suffix.lower() == ".json" or text.lstrip().startswith("["):
        try:
            entries = json.loads(text, object_pairs_hook=_without_repetition)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{label} is not JSON ({error}); give JSONL with the suffix .jsonl") from error
        if not isinstance(entries, list):
            raise ValueError(f"{label} is no list of {what} but {_kind(entries)}; give a list, or JSONL")
        return [(f"{label}, entry {number}", entry) for number, entry in enumerate(cast("list[Any]", entries), start=1)]
    found: list[tuple[str, Any]] = []
    for number, line in enumerate(split_lines(text), start=1):
        if not line.strip("\ufeff \t"):
            continue
        where = f"{label}, line {number}"
        try:
            found.append((where, json.loads(line.strip("\ufeff \t"), object_pairs_hook=_without_repetition)))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error}); write one object a line") from error
    return found


def is_missing(value: str) -> bool:
    """Whether a CSV field is how programs write that there is no value."""
    return value.strip() in _NO_VALUE


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise ValueError(f"the key {key!r} comes twice with different values")
        found[key] = value
    return found


def _csv_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    text = read_text(path)
    lines_before = 0
    if text.lower().startswith("sep="):  # Excel's way to name the delimiter
        first = split_lines(text)[0]
        text, lines_before = text[len(first) :].lstrip("\r\n"), 1
    header, delimiter = _header(path, text, columns)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    rows: list[Row] = []
    number = lines_before
    try:
        next(reader, None)
        while True:
            number = reader.line_num + 1 + lines_before
            fields = next(reader, None)
            if fields is None:
                return rows
            if not any(field.strip() for field in fields):
                continue
            while len(fields) > len(header) and not fields[-1].strip():
                fields.pop()  # spreadsheets write empty columns to the right, too
            if len(fields) != len(header):
                more = "put a field that has it in it in double quotes" if len(fields) > len(header) else "fill them in"
                raise ValueError(
                    f"{str(path)!r}, line {number}: has {len(fields)} fields, but the header has {len(header)} "
                    f"({', '.join(header)}), divided by {delimiter!r}; {more}"
                )
            rows.append(Row(f"{str(path)!r}, line {number}", dict(zip(header, fields, strict=True))))
    except csv.Error as error:
        raise ValueError(
            f"{str(path)!r}, line {number}: not CSV ({error}); put a field with quotes or line breaks in it in double "
            'quotes, and write a quote in it as ""'
        ) from error


def _header(path: Path, text: str, columns: Sequence[str]) -> tuple[list[str], str]:
    """The columns of a CSV file and its delimiter: the one that gives most of the columns that are looked for."""
    best: tuple[list[str], str] = ([], _DELIMITERS[0])
    best_score = (-1, 0)
    for delimiter in _DELIMITERS:
        try:
            reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
            header = [field.strip().strip("\ufeff") for field in next(reader, [])]
        except csv.Error:
            continue
        while header and not header[-1]:
            header.pop()
        score = (sum(column in header for column in columns), len(header))
        if score[0] > best_score[0] or (score[0] == best_score[0] == 0 and score > best_score):
            best, best_score = (header, delimiter), score
    header = best[0]
    twice = [name for name in dict.fromkeys(header) if header.count(name) > 1]
    if twice:
        raise ValueError(f"{str(path)!r}, line 1: the column {twice[0]!r} comes twice; keep one of them")
    return best


def _parquet_rows(path: Path) -> list[Row]:
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ValueError(
            f'{str(path)!r} needs the package pyarrow ({error}); pip install "lorainit-diffusers[datasets]", or '
            "write the rows to metadata.jsonl"
        ) from error
    try:
        rows: list[dict[str, Any]] = parquet.read_table(str(path)).to_pylist()
    except Exception as error:  # of the many that its readers raise
        raise ValueError(f"{str(path)!r} is no Parquet file ({error}); write the rows to metadata.jsonl") from error
    return [Row(f"{str(path)!r}, row {number}", row) for number, row in enumerate(rows, start=1)]


def _kind(value: Any) -> str:
    names: dict[type[Any], str] = {list: "a list", dict: "an object", str: "a text", bool: "a bool", type(None): "null"}
    return names.get(type(value), "a number")
