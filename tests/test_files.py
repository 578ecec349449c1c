from __future__ import annotations

import json
import os
import stat
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorainit_diffusers.files import (
    csv_cell,
    csv_text,
    filling,
    replacing,
    save_tensors,
    watching,
    write_json,
    write_text,
)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Generator[int, None, None]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_every_file_has_the_mode_of_the_umask(tmp_path: Path, umask: int) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "plain.safetensors")
    save_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors", {"format": "pt"})
    write_text(tmp_path / "a.txt", "a")
    write_json(tmp_path / "a.json", {"a": tmp_path})
    with replacing(tmp_path / "a.bin") as scratch:
        scratch.write_bytes(b"a")
    with filling(tmp_path / "folder") as scratch:
        (scratch / "inner").mkdir()
        save_file({"a": torch.ones(2)}, scratch / "inner" / "b.safetensors")
    for name in ("a.safetensors", "a.txt", "a.json", "a.bin", "folder/inner/b.safetensors"):
        assert mode(tmp_path / name) == 0o666 & ~umask, name
    (tmp_path / "a.txt").chmod(0o600)
    write_text(tmp_path / "a.txt", "b")
    assert mode(tmp_path / "a.txt") == 0o666 & ~umask


def test_an_exception_leaves_the_older_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "older")

    def write_half(place: Any, name: str) -> None:
        with place as scratch:
            (scratch / name).write_text("half")
            raise KeyboardInterrupt

    for place, name in ((replacing(path), ""), (filling(tmp_path), "a.txt")):
        with pytest.raises(KeyboardInterrupt):
            write_half(place, name)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "older")]


def test_filling_leaves_what_else_is_there(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "a.txt").write_text("older")
    with filling(tmp_path) as scratch:
        (scratch / "a.txt").write_text("newer")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"mine.txt": "mine", "a.txt": "newer"}


def test_watchers_hear_of_every_path_before_it_is_there(tmp_path: Path) -> None:
    heard: list[tuple[str, bool]] = []

    def note(path: Path) -> None:
        heard.append((path.relative_to(tmp_path).as_posix(), path.exists()))

    with watching(note):
        write_text(tmp_path / "a.txt", "a")
        save_tensors({"a": torch.ones(1)}, tmp_path / "new" / "b.safetensors")
        with filling(tmp_path / "c") as scratch:
            (scratch / "d.txt").write_text("d")
    write_text(tmp_path / "e.txt", "e")
    assert heard == [("a.txt", False), ("new/b.safetensors", False), ("c/d.txt", False)]
    assert load_file(tmp_path / "new" / "b.safetensors")["a"].item() == 1


@pytest.mark.parametrize(
    "text", ["=1+1", "+cmd|' /C calc'!A0", "-cmd", "-2+3", "-", "@sum", "\t=1", "\r=1", "\t1", "'=1", "+-1", "-1 "]
)
def test_a_cell_of_a_csv_file_is_no_formula(text: str) -> None:
    assert csv_cell(text) == f"'{text}"
    assert csv_text(csv_cell(text)) == text


@pytest.mark.parametrize(
    "text", ["", "red apple", "a=b", "1-2", "'tis", " -1", "0.5", "-1", "+3", "-1.5e-3", "-.5", "-inf", "cntlora:a=b"]
)
def test_other_cells_stay_as_they_are(text: str) -> None:
    assert csv_cell(text) == text
    assert csv_text(text) == text


def test_a_file_of_tensors_is_the_same_bytes_every_time(tmp_path: Path) -> None:
    metadata = {"format": "pt", "ours": json.dumps({"ü": "a\n\u0007", "quoted": '"'}), "more": "1", "last": "z"}
    written: set[bytes] = set()
    for _ in range(8):
        save_tensors({"b": torch.arange(3.0), "a": torch.ones(2, 2)}, tmp_path / "a.safetensors", metadata)
        written.add((tmp_path / "a.safetensors").read_bytes())
    assert len(written) == 1
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == metadata
        assert file.get_tensor("b").tolist() == [0.0, 1.0, 2.0]
        assert file.get_tensor("a").tolist() == [[1.0, 1.0], [1.0, 1.0]]
