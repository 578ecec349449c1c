"""Reading datasets of the `datasets` library, as the hub has them: here from local folders, offline."""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sd_fixtures import write_images
from torch.utils.data import DataLoader

from lorainit_diffusers.training.data.captioned_images import CaptionedImages
from lorainit_diffusers.training.data.images import load_image
from lorainit_diffusers.training.data.text_to_image import read_data
from lorainit_diffusers.training.options.text_to_image import StableDiffusionOptions

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


@pytest.fixture
def hub() -> Any:
    return pytest.importorskip("datasets")


def arguments(tmp_path: Path, name: str | Path, **options: Any) -> StableDiffusionOptions:
    given: dict[str, Any] = {"dataset_name": str(name), "cache_dir": str(tmp_path / "cache"), **options}
    return StableDiffusionOptions(**given)


def encoded(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(hub: Any, folder: Path, *, image: str = "image", split: str = "train", **columns: list[Any]) -> Path:
    """A folder with one Parquet file a split, images inside."""
    folder.mkdir(parents=True, exist_ok=True)
    images = columns.pop("images", [{"bytes": encoded(colour), "path": None} for colour in COLOURS])
    rows = hub.Dataset.from_dict({image: images, **columns}).cast_column(image, hub.Image())
    rows.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return folder


def test_images_stay_encoded_in_the_dataset_until_they_are_read(hub: Any, tmp_path: Path) -> None:
    folder = write_parquet(hub, tmp_path / "set", text=["red ", "green", "blue"], number=[1, 2, 3])
    records, heldout = read_data(arguments(tmp_path, folder))
    assert heldout == []
    assert [record.caption for record in records] == ["red", "green", "blue"]
    assert [record.path for record in records] == [folder / f"train[{row}]" for row in range(3)]
    assert [load_image(record).getpixel((0, 0)) for record in records] == COLOURS
    images = CaptionedImages(records, {"input_ids": torch.arange(3)}, 4, True, False)
    # a spawned worker gets a copy of the records, where a forked one would share them
    loader = DataLoader(images, batch_sampler=[[(2, 0), (0, 0)]], num_workers=1, multiprocessing_context="spawn")
    batch = next(iter(loader))
    assert batch["pixel_values"][:, :, 0, 0].tolist() == [[-1, -1, 1], [1, -1, -1]]
    assert batch["original_sizes"].tolist() == [[6, 8]] * 2


def test_columns_prompt_samples_and_repeats(hub: Any, tmp_path: Path) -> None:
    words = [["a rose", "a flower"], ["grass"], ["sky"]]
    folder = write_parquet(hub, tmp_path / "set", image="picture", words=words)
    columns = {"image_column": "picture", "caption_column": "words"}
    records, _ = read_data(arguments(tmp_path, folder, **columns))
    assert [record.caption for record in records] == ["a rose", "grass", "sky"]
    few, _ = read_data(arguments(tmp_path, folder, max_train_samples=2, repeats=3, **columns))
    assert few == records[:2] * 3
    subject, _ = read_data(arguments(tmp_path, folder, image_column="picture", instance_prompt="a sks colour"))
    assert [record.caption for record in subject] == ["a sks colour"] * 3


@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_are_explicit_splits_only(hub: Any, tmp_path: Path, split: str) -> None:
    folder = write_parquet(hub, tmp_path / "set", text=["red", "green", "blue"])
    write_parquet(hub, folder, split=split, text=["a", "b", "c"])
    records, heldout = read_data(arguments(tmp_path, folder, max_train_samples=1))
    assert [record.caption for record in records] == ["red"]
    assert [record.caption for record in heldout] == (["a", "b", "c"] if split == "validation" else [])


def test_a_split_named_heldout_comes_first(hub: Any, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for split in ("train", "validation", "heldout"):
        write_parquet(hub, folder, split=split, text=[f"{split} {row}" for row in range(3)])
    files = "".join(f"  - {{split: {s}, path: {s}-*.parquet}}\n" for s in ("train", "validation", "heldout"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: small\n  data_files:\n{files}---\n")
    records, heldout = read_data(arguments(tmp_path, folder, dataset_config_name="small"))
    assert [record.caption for record in records] == ["train 0", "train 1", "train 2"]
    assert [record.caption for record in heldout] == ["heldout 0", "heldout 1", "heldout 2"]


@pytest.mark.parametrize("zipped", [False, True])
def test_folders_of_image_files_and_archives(hub: Any, tmp_path: Path, zipped: bool) -> None:
    source = write_images(tmp_path / "set" / "train")
    expected = [np.array(load_image(path)) for path in sorted(source.glob("*.png"))]
    if zipped:
        with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
            for path in sorted(source.iterdir()):
                archive.write(path, path.name)
                path.unlink()
        source.rmdir()
        (tmp_path / "train.zip").rename(tmp_path / "set" / "train.zip")
    records, _ = read_data(arguments(tmp_path, tmp_path / "set"))
    assert all(np.array_equal(load_image(r), e) for r, e in zip(records, expected, strict=True))


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r'needs the package datasets .*pip install "lorainit-diffusers\[datasets\]"'):
        read_data(arguments(tmp_path, "owner/name"))


def test_an_unknown_dataset_is_named(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.config, "HF_HUB_OFFLINE", True)
    for name in ("owner/name", str(tmp_path / "nowhere")):
        with pytest.raises(ValueError, match=rf"--dataset_name '{name}' cannot be loaded \(.*\); check the name"):
            read_data(arguments(tmp_path, name))
    folder = write_parquet(hub, tmp_path / "set", text=["red", "green", "blue"])
    with pytest.raises(ValueError, match=r"cannot be loaded .*'large' not found.*--dataset_config_name"):
        read_data(arguments(tmp_path, folder, dataset_config_name="large"))


def test_a_dataset_without_a_training_split_lists_its_splits(hub: Any, tmp_path: Path) -> None:
    folder = write_parquet(hub, tmp_path / "set", split="test", text=["red", "green", "blue"])
    with pytest.raises(ValueError, match=r"has no split train \(it has test\)"):
        read_data(arguments(tmp_path, folder))


def test_missing_columns_list_those_that_exist(hub: Any, tmp_path: Path) -> None:
    folder = write_parquet(hub, tmp_path / "set", image="picture", words=["a", "b", "c"], number=[1, 2, 3])
    with pytest.raises(ValueError, match=r"no column 'image' \(it has picture, words, number\); set --image_column"):
        read_data(arguments(tmp_path, folder))
    with pytest.raises(ValueError, match=r"no column 'text' \(it has picture, words, number\); set --caption_column"):
        read_data(arguments(tmp_path, folder, image_column="picture"))
    with pytest.raises(ValueError, match=r"the column 'number' holds no images but .*int.*; set --image_column"):
        read_data(arguments(tmp_path, folder, image_column="number", caption_column="words"))
    with pytest.raises(ValueError, match=r"3 of 3 rows have no text in the column 'number': train\[0\], train\[1\]"):
        read_data(arguments(tmp_path, folder, image_column="picture", caption_column="number"))


def test_rows_without_caption_or_readable_image_are_named(hub: Any, tmp_path: Path) -> None:
    captions = write_parquet(hub, tmp_path / "captions", text=["red", None, " "])
    with pytest.raises(ValueError, match=r"2 of 3 rows have no text in the column 'text': train\[1\], train\[2\]; set"):
        read_data(arguments(tmp_path, captions))
    assert len(read_data(arguments(tmp_path, captions, instance_prompt="a sks colour"))[0]) == 3
    whole = {"bytes": encoded(COLOURS[0]), "path": None}
    for name, broken, reason in (("none", None, "is empty"), ("half", whole["bytes"][:50], "truncated|identify")):
        image = None if broken is None else {"bytes": broken, "path": None}
        folder = write_parquet(hub, tmp_path / name, images=[whole, image], text=["a", "b"])
        with pytest.raises(ValueError, match=rf"cannot read the image '.*{name}/train\[1\]' \(.*({reason})"):
            read_data(arguments(tmp_path, folder))
        assert len(read_data(arguments(tmp_path, folder, max_train_samples=1))[0]) == 1
