"""The tables of a comparison: what is written is read, and what is read is what was written by others."""

from __future__ import annotations

import csv
import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
from comparison_fixtures import write_comparison

from lorainit_diffusers.comparison import Comparison
from lorainit_diffusers.comparison.results import read_table, write_table


def test_a_table_is_what_the_csv_module_writes(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"run": "a, b", "n": 3, "x": 0.1 + 0.2, "y": -math.inf},
        {"run": 'c "d"', "n": 4, "x": 1e-17, "z": math.nan, "beside": 1},
        {"run": "two\nlines", "n": 5, "x": 1.0, "y": True, "z": None},
    ]
    names = ["run", "n", "x", "y", "z"]
    write_table(tmp_path / "ours.csv", rows, names)
    with (tmp_path / "theirs.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows([{**row, "z": row.get("z", "")} for row in rows[:2]])
        writer.writerow({**rows[2], "z": "nan"})
    assert (tmp_path / "ours.csv").read_bytes() == (tmp_path / "theirs.csv").read_bytes()


def test_every_number_is_read_to_its_last_digit(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1 / 3, 0.8092330396175385, 5e-324, 1.7976931348623157e308]
    write_table(tmp_path / "t.csv", [{"x": value} for value in values], ["x"])
    assert [float(text) for text in read_table(tmp_path / "t.csv")["x"]] == values


def test_texts_that_begin_like_formulas_are_texts_in_the_file_and_come_back(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", [{"task": "=cmd()", "number": -0.5, "digits": "-1"}], ["task", "number", "digits"])
    assert (tmp_path / "t.csv").read_text(encoding="utf-8") == "task,number,digits\n'=cmd(),-0.5,-1\n"
    directory = write_comparison(tmp_path / "c", {("'=gaussian", 0.001, 0): {0: 1.0, 10: 0.5}})
    assert [run.init for run in Comparison.load(directory).runs] == ["=gaussian"]


@pytest.mark.parametrize("content", ["", "run,init\n"])
def test_a_table_without_rows_is_said_to_have_none(tmp_path: Path, content: str) -> None:
    directory = write_comparison(tmp_path, {("gaussian", 0.001, 0): {0: 1.0}})
    (directory / "results.csv").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"results\.csv has no rows: no run has finished yet"):
        Comparison.load(directory)


def test_without_pandas_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_comparison(tmp_path, {("gaussian", 0.001, 0): {0: 1.0}})
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "pandas" else found(name))
    with pytest.raises(ValueError, match=r'needs the package pandas .*pip install "lorainit-diffusers\[eval\]"'):
        Comparison.load(directory)
