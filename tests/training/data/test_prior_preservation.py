"""Class images for prior preservation: counting, drawing, resuming, caching; and batches of both kinds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lorainit_diffusers.training.data.images import ImageRecord, load_image
from lorainit_diffusers.training.data.prior_preservation import (
    generate_class_images,
    missing_class_images,
    pair_batches,
)
from lorainit_diffusers.training.seeds import derive_seed

SETTINGS = {"base_model": "some/base", "num_inference_steps": 25, "guidance_scale": 5.0, "resolution": 8}


class Drawer:
    """Stands for the base model: an image is a function of prompt and seed."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.seeds: list[int] = []
        self.batch_sizes: list[int] = []
        self.stop_after = stop_after

    @staticmethod
    def image(prompt: str, seed: int) -> Image.Image:
        generator = np.random.default_rng([seed, len(prompt)])
        return Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        if self.stop_after is not None and len(self.seeds) >= self.stop_after:
            raise KeyboardInterrupt
        self.seeds += seeds
        self.batch_sizes.append(len(seeds))
        return [self.image(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]


def generate(folder: Path, draw: Drawer, count: int = 5, **options: Any) -> list[ImageRecord]:
    given: dict[str, Any] = {"prompt": "a cat", "batch_size": 2, "settings": SETTINGS, "progress": False, **options}
    return generate_class_images(folder, count=count, draw=draw, **given)


def pixels(folder: Path) -> dict[str, list[Any]]:
    return {path.name: np.array(load_image(path)).tolist() for path in sorted(folder.glob("*.png"))}


def write_own(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", (9, 9), (index, 0, 0)).save(folder / f"photo {index}.jpg")


def test_images_are_drawn_once_from_their_own_seeds(tmp_path: Path) -> None:
    draw = Drawer()
    records = generate(tmp_path / "new" / "cats", draw)
    assert draw.batch_sizes == [2, 2, 1]
    assert [record.caption for record in records] == ["a cat"] * 5
    for index, record in enumerate(records):
        expected = Drawer.image("a cat", derive_seed("class", index))
        assert np.array_equal(np.array(load_image(record)), np.array(expected))
    saved = json.loads((tmp_path / "new" / "cats" / "class_images.json").read_text(encoding="utf-8"))
    assert saved == {"prompt": "a cat", **SETTINGS}
    again = Drawer()
    assert generate(tmp_path / "new" / "cats", again) == records
    assert generate(tmp_path / "new" / "cats", again, count=3) == records[:3]
    assert again.seeds == []
    assert len(generate(tmp_path / "new" / "cats", again, count=7)) == 7
    assert again.seeds == [derive_seed("class", 5), derive_seed("class", 6)]


def test_a_killed_generation_goes_on_to_the_same_images(tmp_path: Path) -> None:
    generate(tmp_path / "whole", Drawer())
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "killed", Drawer(stop_after=2))
    assert len(pixels(tmp_path / "killed")) == 2
    (tmp_path / "killed" / "class-00002.tmp").write_bytes(b"half an image")
    assert missing_class_images(tmp_path / "killed", prompt="a cat", count=5, settings=SETTINGS) == [2, 3, 4]
    draw = Drawer()
    generate(tmp_path / "killed", draw)
    assert len(draw.seeds) == 3
    assert pixels(tmp_path / "killed") == pixels(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob("*.tmp"))


def test_own_images_count_and_are_taken_as_they_are(tmp_path: Path) -> None:
    write_own(tmp_path / "cats", 3)
    draw = Drawer()
    records = generate(tmp_path / "cats", draw, count=2)
    assert [record.path.name for record in records] == ["photo 0.jpg", "photo 1.jpg"]
    assert not (tmp_path / "cats" / "class_images.json").exists()
    assert len(generate(tmp_path / "cats", draw)) == 5
    assert draw.seeds == [derive_seed("class", 0), derive_seed("class", 1)]
    (tmp_path / "cats" / "photo 1.jpg").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"cannot read the image '.*photo 1.jpg'"):
        generate(tmp_path / "cats", draw)


def test_processes_draw_their_shares_of_one_set(tmp_path: Path) -> None:
    generate(tmp_path / "one", Drawer(), count=7)
    write_own(tmp_path / "two", 1)
    draws = [Drawer(), Drawer()]
    # the second comes late, when the first one's images are there already
    lists = [generate(tmp_path / "two", draws[p], count=8, process=p, num_processes=2) for p in (0, 1)]
    assert lists[0] == lists[1]
    assert [len(draw.seeds) for draw in draws] == [4, 3]
    assert pixels(tmp_path / "two") == pixels(tmp_path / "one")
    assert all(record.path.is_file() for record in lists[0])


def test_another_prompt_or_setting_is_refused(tmp_path: Path) -> None:
    generate(tmp_path / "cats", Drawer())
    draw = Drawer()
    remedy = r"; give another --class_data_dir, or delete its class_images.json and class-\*.png"
    with pytest.raises(ValueError, match=rf"--class_data_dir '.*cats' .* prompt 'a cat', not 'a dog'{remedy}"):
        generate(tmp_path / "cats", draw, prompt="a dog")
    with pytest.raises(ValueError, match=rf"num_inference_steps 25, not 30{remedy}"):
        generate(tmp_path / "cats", draw, count=9, settings={**SETTINGS, "num_inference_steps": 30})
    with pytest.raises(ValueError, match=r"revision None, not 'main'"):
        generate(tmp_path / "cats", draw, settings={**SETTINGS, "revision": "main"})
    assert draw.seeds == []
    for text in ("{", "3"):
        (tmp_path / "cats" / "class_images.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"class_images.json' is not a JSON object"):
            generate(tmp_path / "cats", draw)
    with pytest.raises(ValueError, match=r"--class_data_dir '.*class-00000.png' is not a directory"):
        generate(tmp_path / "cats" / "class-00000.png", draw)


def test_pairs_hold_instances_first() -> None:
    instances = [{"pixel_values": torch.full((2, 3), float(k)), "input_ids": torch.tensor([k, k])} for k in (1, 2)]
    classes = [{"pixel_values": torch.full((3, 3), -float(k)), "input_ids": torch.tensor([-k] * 3)} for k in (1, 2)]
    pairs = list(pair_batches(instances, iter(classes)))
    assert [pair["input_ids"].tolist() for pair in pairs] == [[1, 1, -1, -1, -1], [2, 2, -2, -2, -2]]
    assert pairs[1]["pixel_values"][:, 0].tolist() == [2, 2, -2, -2, -2]
    assert pairs[0]["is_class"].tolist() == [False, False, True, True, True]
    assert pairs[0]["is_class"].dtype == torch.bool
    with pytest.raises(ValueError, match="shorter"):
        list(pair_batches(instances, classes[:1]))


@pytest.mark.parametrize("name", ["class-00001.png", "class-00150.png", "photo.png", "more/class-00000.png"])
def test_images_of_the_user_count_once_whatever_they_are_called(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "classes"
    (folder / name).parent.mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(folder / name)
    mine = (folder / name).read_bytes()
    for _ in range(2):  # and the next run finds the same images
        records = generate(folder, Drawer())
        assert len(records) == 5
        assert folder / name in {record.path for record in records}
        assert len(list(folder.rglob("*.png"))) == 5
        assert (folder / name).read_bytes() == mine


def test_a_folder_that_is_to_stay_as_it_is(tmp_path: Path) -> None:
    folder, scratch = tmp_path / "classes", tmp_path / "scratch"
    scratch.mkdir()
    records = generate_class_images(
        folder,
        prompt="a cat",
        count=3,
        draw=Drawer(),
        batch_size=2,
        settings=SETTINGS,
        scratch=scratch,
    )
    assert [record.path.parent for record in records] == [scratch] * 3
    assert not folder.exists()
