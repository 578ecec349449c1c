"""What makes two runs the same: options, steps, data and base, each kind of difference named."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from safetensors.torch import save_file

from lorainit_diffusers.training import resume
from lorainit_diffusers.training.options.fields import DefaultOf, Options, default_of, option, option_facts
from lorainit_diffusers.training.options.text_to_image import StableDiffusionOptions
from lorainit_diffusers.training.resume import (
    base_differences,
    base_identity,
    check_steps,
    data_differences,
    data_identity,
    describe_differences,
    option_differences,
)


@dataclass
class Record:
    path: Path
    caption: str
    image: Any = None


@dataclass
class Question:
    images: tuple[Record, ...]
    messages: list[dict[str, Any]]
    answers: tuple[str, ...]
    kind: str = ""


# -------------------------------------------------------------------------------------------------------------- options


@dataclass(frozen=True, kw_only=True)
class SomeOptions(Options):
    dropout: float = 0.5
    flag: bool = False
    rank: int = 8
    lora_alpha: Annotated[float, DefaultOf("rank", float)] = option(None, "alpha")
    later: int = 3


FACTS = option_facts(StableDiffusionOptions)


def test_every_difference_is_found_with_both_values() -> None:
    now = {"rank": 8, "crop": (0.5, 1.0), "seed": 0, "path": Path("a"), "max_train_steps": 9, "report_to": "wandb"}
    before = {"rank": 4, "crop": [0.25, 1.0], "seed": 0, "path": "a", "max_train_steps": 5, "report_to": None}
    found = option_differences(now, before, FACTS)
    assert found == {"rank": (8, 4), "crop": ([0.5, 1.0], [0.25, 1.0])}
    assert describe_differences(found, "the checkpoint was written with") == [
        "--rank is 8, but the checkpoint was written with 4",
        "--crop is [0.5, 1.0], but the checkpoint was written with [0.25, 1.0]",
    ]
    assert option_differences(now, json.loads(json.dumps(now, default=str)), FACTS) == {}


@pytest.mark.parametrize(
    ("now", "before", "found"),
    [
        ({"dropout": 0.5}, {}, {}),
        ({"dropout": 0.25}, {}, {"dropout": (0.25, 0.5)}),
        ({"later": 3}, {}, {}),
        ({"later": 0}, {}, {"later": (0, 3)}),
        ({"flag": True}, {}, {"flag": (True, False)}),
        ({"flag": False}, {}, {}),
        ({"rank": 4, "lora_alpha": 4.0}, {"rank": 4}, {}),  # its default is the rank
        ({"rank": 4, "lora_alpha": 8.0}, {"rank": 4}, {"lora_alpha": (8.0, 4)}),
        ({}, {"dropped": None, "off": False, "none": [], "zero": 0}, {}),  # options of another version, not in use
        ({}, {"dropped": "something"}, {"dropped": (None, "something")}),
    ],
)
def test_options_that_one_version_does_not_know_count_with_their_default(
    now: dict[str, Any], before: dict[str, Any], found: dict[str, Any]
) -> None:
    assert (
        option_differences(now, before, option_facts(SomeOptions), defaults=partial(default_of, SomeOptions)) == found
    )


def test_places_are_free_where_it_is_known_what_is_there() -> None:
    now, before = {"train_data_dir": "b", "revision": "x"}, {"train_data_dir": "a", "revision": "y"}
    assert option_differences(now, before, FACTS).keys() == {"train_data_dir", "revision"}
    assert option_differences(now, before, FACTS, known=["training data"]).keys() == {"revision"}
    assert option_differences(now, before, FACTS, known=["training data", "base"]) == {}


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup"])
def test_an_endless_schedule_may_have_other_ends(schedule: str) -> None:
    for steps in (4, 5, 8, 100):
        check_steps(4, steps, 8, schedule)
    with pytest.raises(
        ValueError, match="--max_train_steps is 3, but the checkpoint has done 4 steps; give at least 4"
    ):
        check_steps(4, 3, 8, schedule)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_a_schedule_that_knows_its_end_has_that_end(schedule: str) -> None:
    check_steps(4, 8, 8, schedule)
    for steps in (4, 7, 9):
        with pytest.raises(ValueError, match=f"written with 8, and every step of --lr_scheduler {schedule} depends"):
            check_steps(4, steps, 8, schedule)


# ----------------------------------------------------------------------------------------------------------------- data


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    names = ("a.png", "b.png", "more/a.png")
    for name in names:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(name.encode())
    return [Record(tmp_path / "data" / name, f"caption of {name}") for name in names]


def test_data_are_the_same_wherever_they_lie(records: list[Record], tmp_path: Path, monkeypatch: Any) -> None:
    first = data_identity(records)
    shutil.copytree(tmp_path / "data", tmp_path / "elsewhere" / "deep")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    monkeypatch.chdir(tmp_path)
    for root in (tmp_path / "elsewhere" / "deep", tmp_path / "link", Path("link"), Path("elsewhere/../data")):
        moved = [replace(r, path=root / r.path.relative_to(tmp_path / "data")) for r in records]
        assert data_identity(moved) == first
    assert json.loads(json.dumps(first)) == first
    assert data_differences(first, json.loads(json.dumps(first))) == []


def test_every_change_of_data_is_named(records: list[Record], tmp_path: Path) -> None:
    before = data_identity(records)

    def differences(*changed: Record) -> list[str]:
        return data_differences(data_identity(changed), before)

    first, second, third = records
    assert differences(replace(first, caption="other"), second, third) == ["the text of 'a.png' has changed"]
    assert differences(first, second) == ["'more/a.png' is missing"]
    assert differences(*records, replace(first, path=first.path)) == ["'a.png (2)' is new"]
    assert differences(second, first, third) == ["they are in another order"]
    second.path.write_bytes(b"swapped")
    assert differences(*records) == ["the image 'b.png' has changed"]
    for record in records:
        record.path.write_bytes(b"all")
        record.caption = "all"
    found = differences(*records)
    assert len(found) == 4
    assert found[-1] == "3 more differences"


def test_swapped_images_of_one_size_are_noticed(records: list[Record]) -> None:
    before = data_identity(records)
    first, second = records[0].path.read_bytes(), records[1].path.read_bytes()
    records[0].path.write_bytes(second)
    records[1].path.write_bytes(first)
    assert data_differences(data_identity(records), before) == [
        *("the image 'a.png' has changed", "the image 'b.png' has changed"),
    ]


def test_rows_of_a_dataset_and_questions(records: list[Record]) -> None:
    rows = [Record(Path(f"owner/name/train[{k}]"), "c", lambda k=k: bytes([k])) for k in range(3)]
    before = data_identity(rows)
    assert [sample[0] for sample in before["samples"]] == ["train[0]", "train[1]", "train[2]"]
    rows[1] = replace(rows[1], image=lambda: b"other")
    assert data_differences(data_identity(rows), before) == ["the image 'train[1]' has changed"]

    question = {"role": "user", "content": "What is this?"}
    questions = [
        Question((records[0],), [question], ("red",)),
        Question((records[0],), [question], ("blue",)),
        Question((records[0], records[1]), [question], ("both",)),
        Question((), [question], ("nothing",)),
    ]
    before = data_identity(questions)
    questions[1] = replace(questions[1], answers=("green",))
    questions[3] = replace(questions[3], messages=[{**question, "content": "And this?"}])
    assert data_differences(data_identity(questions), before) == [
        *("the text of 'a.png (2)' has changed", "the text of 'a question without an image' has changed"),
    ]


def test_many_samples_have_one_digest(records: list[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "MAX_NAMED_SAMPLES", 2)
    before = data_identity(records)
    assert before.keys() == {"num_samples", "digest"}
    records[0].caption = "other"
    assert data_differences(data_identity(records), before) == ["3 samples now, 3 then, not all of them the same"]
    assert data_identity([])["num_samples"] == 0


# ----------------------------------------------------------------------------------------------------------------- base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text("{}", encoding="utf-8")
    save_file({"w": torch.zeros(4)}, folder / "unet" / "weights.safetensors")
    return folder


def test_a_base_is_what_its_files_hold(base: Path, tmp_path: Path) -> None:
    before = base_identity(str(base))
    shutil.copytree(base, tmp_path / "moved")
    for name in ("README.md", ".cache/x.json", "samples.png"):
        (tmp_path / "moved" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "moved" / name).write_text("of no weight", encoding="utf-8")
    assert base_identity(str(tmp_path / "moved")) == before
    save_file({"w": torch.ones(4)}, base / "unet" / "weights.safetensors")
    assert base_differences(base_identity(str(base)), before) == ["'unet/weights.safetensors' differs"]
    (base / "unet" / "config.json").unlink()
    (base / "new.json").write_text("{}", encoding="utf-8")
    found = base_differences(base_identity(str(base)), before)
    assert found == ["'unet/weights.safetensors' differs", "'new.json' is new", "'unet/config.json' is missing"]
    assert json.loads(json.dumps(before)) == before


def test_of_large_weights_header_and_places_are_read(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "_WHOLE_FILE_BYTES", 2**16)
    path = base / "unet" / "weights.safetensors"
    digests = set[str]()
    for weights in ({"w": torch.zeros(2**18)}, {"v": torch.zeros(2**18)}, {"w": torch.ones(2**18)}):
        save_file(weights, path)
        digests.add(base_identity(str(base))["files"]["unet/weights.safetensors"])
    assert len(digests) == 3
    changed = torch.zeros(2**18)
    changed[-1] = 1.0  # the last place is read, too
    save_file({"w": changed}, path)
    assert base_identity(str(base))["files"]["unet/weights.safetensors"] not in digests


def test_a_single_file_and_a_repository(base: Path, tmp_path: Path) -> None:
    file = base / "unet" / "weights.safetensors"
    copied = shutil.copy(file, tmp_path / "renamed.safetensors")
    assert base_identity(str(file)) == base_identity(str(copied))
    cached = tmp_path / "cache" / "models--owner--name"
    (cached / "snapshots" / "abc123").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc123", encoding="utf-8")
    (cached / "snapshots" / "abc123" / "config.json").write_text("{}", encoding="utf-8")
    found = base_identity("owner/name", cache_dir=tmp_path / "cache")
    assert found == {"repository": "owner/name", "commit": "abc123"}
    unknown = base_identity("owner/name", revision="v2", cache_dir=tmp_path / "empty")
    assert unknown == {"repository": "owner/name", "commit": "v2"}
    assert base_differences(unknown, found) == ["owner/name at v2 now, owner/name at abc123 then"]
    assert base_differences(base_identity(str(base)), found) == ["a folder now, owner/name at abc123 then"]
