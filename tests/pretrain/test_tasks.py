"""The recipes of the bundled classifier and vision-language model, and their questions, on synthetic pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import emoji_pictures as emoji
import numpy as np
import pytest
import tiny_vit as vit
import tiny_vlm as vlm
import torch
from safetensors.torch import load_file, save_file
from sd_fixtures import ROOT
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoProcessor,
)

# whole recipes, which change rarely: run by hand with -m slow
pytestmark = pytest.mark.slow

NAMES = {f"{colour}-{thing}": thing for thing in ("apple", "house") for colour in "abcdefghijkl"}


@pytest.fixture
def styles(tmp_path: Path) -> Path:
    """What `emoji.render_styles` writes: the pictures say what the concept is."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (len(NAMES), 3, 64, 64), generator=generator, dtype=torch.uint8)
    work_dir = tmp_path / "work"
    work_dir.mkdir()
    keys = (*emoji.CLASSIFIER_STYLES, *emoji.HELD_OUT_STYLES)
    save_file({style: images.clone() for style in keys}, work_dir / "styles.safetensors")
    document = {"names": {style: list(NAMES) for style in keys}, "subgroups": NAMES}
    (work_dir / "styles.json").write_text(json.dumps(document), encoding="utf-8")
    return work_dir


def arguments(work_dir: Path, output_dir: Path, phase: str, steps: int) -> list[str]:
    budget = [f"--{phase}_minutes", "0", f"--{phase}_steps", str(steps), "--no_bf16", "--batch_size", "4"]
    return ["--work_dir", str(work_dir), "--output_dir", str(output_dir), *budget]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("recipe", [vit, vlm], ids=["vit", "vlm"])
def test_the_same_seed_gives_the_same_weights(recipe: Any, styles: Path, tmp_path: Path) -> None:
    phase = recipe.__name__.removeprefix("tiny_")
    once, twice = tmp_path / "once", tmp_path / "twice"
    recipe.main(arguments(styles, once, phase, 2))
    (styles / phase / "checkpoint.safetensors").unlink()
    recipe.main(arguments(styles, twice, phase, 2))
    first = weights(once)
    assert all(torch.equal(value, first[name]) for name, value in weights(twice).items())
    card = (twice / "README.md").read_text(encoding="utf-8")
    assert f"--{phase}_minutes 0 --{phase}_steps 2" in card
    assert str(tmp_path) not in card
    assert str(tmp_path) not in (twice / "config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("recipe", [vit, vlm], ids=["vit", "vlm"])
def test_a_recipe_replaces_no_files_of_others(recipe: Any, styles: Path, tmp_path: Path) -> None:
    phase = recipe.__name__.removeprefix("tiny_")
    output = tmp_path / "mine"
    output.mkdir()
    (output / "config.json").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match=r"--output_dir '.*mine' holds files that no run of this project wrote"):
        recipe.main(arguments(styles, output, phase, 2))
    assert [path.name for path in output.iterdir()] == ["config.json"]
    assert not (styles / phase).exists()
    (tmp_path / "new.tmp").mkdir()
    (tmp_path / "new.tmp" / "kept.txt").write_text("mine", encoding="utf-8")
    recipe.main(arguments(styles, tmp_path / "new", phase, 2))
    assert (tmp_path / "new.tmp" / "kept.txt").is_file()
    assert len({path.stat().st_mode for path in (tmp_path / "new").iterdir() if path.is_file()}) == 1


def test_a_killed_recipe_goes_on_where_it_was(styles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    vit.main(arguments(styles, whole, "vit", 3))
    (styles / "vit" / "checkpoint.safetensors").unlink()
    forward, calls = vit.Recipe.forward, []

    def dying(self: Any, *args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(vit.Recipe, "forward", dying)
        with pytest.raises(KeyboardInterrupt):
            vit.main([*arguments(styles, killed, "vit", 3), "--checkpoint_s", "0"])
    vit.main(arguments(styles, killed, "vit", 3))
    first = weights(whole)
    assert all(torch.equal(value, first[name]) for name, value in weights(killed).items())


def test_the_classifier_loads_with_stock_classes(styles: Path, tmp_path: Path) -> None:
    vit.main(arguments(styles, tmp_path / "out", "vit", 1))
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "apple", 1: "house"}
    assert model.dtype == torch.float32
    assert weights(tmp_path / "out")["classifier.weight"].dtype == torch.float16
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out", use_fast=False)
    image = np.full((64, 64, 3), 255, dtype=np.uint8)
    assert processor(image, return_tensors="pt")["pixel_values"].max() == 1.0


def test_the_recipe_without_patches_left_out_is_the_stock_model() -> None:
    torch.manual_seed(0)
    recipe = vit.Recipe(["apple", "house"], 3).eval()
    pixels = torch.rand(2, 3, 64, 64)
    concepts, classes = torch.tensor([0, 2]), torch.tensor([1, -100])
    with torch.no_grad():
        logits = recipe.model(pixel_values=pixels * 2 - 1).logits
        hidden = recipe.model.vit(pixel_values=pixels * 2 - 1).last_hidden_state[:, 0]
        cross_entropy = torch.nn.functional.cross_entropy
        expected = cross_entropy(logits, classes, label_smoothing=0.1)
        expected += cross_entropy(recipe.concept_head(hidden), concepts, label_smoothing=0.1)
        torch.testing.assert_close(recipe(pixels, concepts, classes, None), expected)
        everything = torch.arange(64).expand(2, -1)
        torch.testing.assert_close(recipe(pixels, concepts, classes, everything), expected)


def test_the_vision_language_model_reads_what_it_was_trained_on(styles: Path, tmp_path: Path) -> None:
    vlm.main(arguments(styles, tmp_path / "out", "vlm", 1))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    turns = [emoji.Question("name", "What is this?", "a apple"), emoji.Question("yes/no", "Is this b house?", "no")]
    content = [{"type": "image"}, {"type": "text", "text": turns[0].question}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": turns[0].answer},
        {"role": "user", "content": turns[1].question},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, images=np.zeros((64, 64, 3), dtype=np.uint8), return_tensors="pt")
    ids, targets = vlm.Conversations(processor.tokenizer, 64).tokens(turns)
    prompt = inputs["input_ids"][0].tolist()
    assert ids[: len(prompt)] == prompt
    assert processor.tokenizer.decode([t for t in targets if t >= 0]) == " a apple</s> no</s>"
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > len(prompt)


def test_the_tower_is_that_of_the_clip(styles: Path) -> None:
    tokenizer = vlm.make_tokenizer(sorted(NAMES), NAMES, 400)
    clip_dir = ROOT / "assets" / "models" / "tiny-clip"
    model = vlm.build_model(tokenizer, clip_dir)
    saved = load_file(clip_dir / "model.safetensors")["vision_model.encoder.layers.0.self_attn.q_proj.weight"]
    tower = dict(model.model.vision_tower.named_parameters())
    own = next(p for name, p in tower.items() if name.endswith("layers.0.self_attn.q_proj.weight"))
    assert torch.equal(own, saved.float())
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        name for name, _ in model.named_parameters() if "post_layernorm" in name
    }


@pytest.mark.parametrize("recipe", [vit, vlm], ids=["vit", "vlm"])
def test_export_needs_a_training(recipe: Any, styles: Path, tmp_path: Path) -> None:
    phase = recipe.__name__.removeprefix("tiny_")
    with pytest.raises(FileNotFoundError, match=f"run the phase `{phase}` first"):
        recipe.main([*arguments(styles, tmp_path / "out", phase, 1), "--phases", "export"])


def test_questions_are_about_the_picture_and_what_is_like_it() -> None:
    rng = np.random.default_rng(0)
    answers = set()
    for _ in range(40):
        name, kind, yes_no = emoji.ask("a-apple", NAMES, rng)
        assert (name.answer, kind.answer) == ("a apple", "apple")
        asked = yes_no.question.removeprefix("Is this ").removesuffix("?").replace(" ", "-")
        assert NAMES[asked] == "apple"
        assert yes_no.answer == ("yes" if asked == "a-apple" else "no")
        answers.add(yes_no.answer)
    assert answers == {"yes", "no"}
    alone = {"a-apple": "apple", "a-house": "house"}
    assert emoji.confusable("a-apple", alone, rng) == "a-house"


def test_classes_are_the_large_subgroups() -> None:
    kinds = {name: emoji.Kind("", group) for name, group in {**NAMES, "x": "rare"}.items()}
    assert emoji.class_names(kinds, kinds) == ["apple", "house"]
    assert emoji.class_names(kinds, kinds, min_concepts=1) == ["apple", "house", "rare"]


@pytest.mark.parametrize("name", ["high-contrast-classes", "high-contrast-questions"])
def test_the_bundled_sets_have_no_concept_on_both_sides(name: str) -> None:
    directory = ROOT / "assets" / "data" / name
    if name.endswith("classes"):
        halves = [{path.stem for path in (directory / split).rglob("*.png")} for split in ("train", "validation")]
    else:
        files = [(directory / f"{split}.jsonl").read_text(encoding="utf-8") for split in ("train", "validation")]
        lines = [[json.loads(line) for line in text.splitlines()] for text in files]
        halves = [{line["image"] for line in own} for own in lines]
        assert all((directory / line["image"]).is_file() for own in lines for line in own)
        assert all({line["type"] for line in own} == {"name", "kind", "yes/no"} for own in lines)
    assert all(halves)
    assert not halves[0] & halves[1]
    assert "Microsoft" in (directory / "LICENSE.txt").read_text(encoding="utf-8")
