"""The recipe of the tiny CLIP on synthetic pictures: what is held out, batches, loss, resuming, from end to end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import clip_augmentation
import clip_data
import clip_model
import emoji_pictures as emoji
import numpy as np
import pytest
import sample_data
import shared
import tiny_clip as recipe
import torch
import torch.nn.functional as F
from PIL import Image
from recipe_options import TinyClipOptions
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer

ROOT = Path(__file__).resolve().parents[2]
DATA_DIR = ROOT / "assets" / "data"
TOKENIZER_DIR = ROOT / "assets" / "models" / "tiny-sd" / "tokenizer"
FOOD = emoji.Kind("food-drink", "food-fruit")
ANIMAL = emoji.Kind("animals-nature", "animal-mammal")
NAMES = ("red-apple", "dog-face", "guitar", "house", "green-apple", "bear")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return CLIPTokenizer.from_pretrained(TOKENIZER_DIR)


def tiny_model(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    common = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**common, **special, "vocab_size": len(tokenizer), "max_position_embeddings": shared.MAX_TOKENS}
    vision = {**common, "image_size": shared.IMAGE_SIZE, "patch_size": 16}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()


@pytest.fixture
def data() -> dict[str, Any]:
    """Six concepts in two styles and two line icons, one in two weights."""
    records = [
        {"style": style, "icon": name, "name": name, "group": "food" if "apple" in name else "other", "subgroup": "s"}
        for style in ("noto", "twemoji")
        for name in NAMES
    ]
    for icon in ("anchor", "anchor-bold", "key"):
        name = icon.partition("-")[0]
        records.append({"style": "phosphor", "icon": icon, "name": name, "group": "lines", "subgroup": "lines"})
    descriptions = {name: [f"an emoji of thing {i}" for i in range(clip_data.NUM_DESCRIPTIONS)] for name in NAMES}
    tested = [
        {"style": style, "icon": name, "name": name}
        for style in ("noto", "blobs", "high-contrast")
        for name in ("duck", "crab")
    ]
    return {"train": records, "heldout": tested, "descriptions": descriptions}


def random_images(count: int, seed: int = 0) -> Tensor:
    size = shared.IMAGE_SIZE
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, size, size), np.uint8))


# ----------------------------------------------------------------------------------------------------- held out


def test_held_out_concepts_are_those_of_the_bundled_sets(tmp_path: Path) -> None:
    held_out = clip_data.held_out_concepts(DATA_DIR)
    stems = {path.stem for style in emoji.HELD_OUT_STYLES for path in (DATA_DIR / style / "heldout").glob("*.png")}
    assert held_out == stems
    assert len(held_out) == 74
    with pytest.raises(FileNotFoundError, match=r"run train_scripts/pretrain/sample_data\.py"):
        clip_data.held_out_concepts(tmp_path)


def test_no_style_or_line_icon_of_a_held_out_concept_is_selected() -> None:
    held_out = clip_data.held_out_concepts(DATA_DIR)
    cats = [*emoji.CAT_FACES, "black-cat"]
    known = dict.fromkeys([*held_out, *cats, "red-apple", "bear"], ANIMAL)
    known |= {"flag-france": emoji.Kind("flags", "country-flag"), "woman-singer": emoji.Kind("people-body", "person")}
    icons = {key: sorted(known) for key in (*emoji.BASE_STYLES, *emoji.HELD_OUT_STYLES)}
    icons |= {"lucide": ["plane", "crown", "anchor"], "tabler": ["crown-off", "user-plus", "fish"]}
    icons |= {"phosphor": ["anchor-bold", "crown-duotone", "x", "cat"]}
    entries = [
        {"label": "airplane", "tags": ["plane", "jet"]},
        {"label": "crown", "tags": ["king"]},
        {"label": "shark", "tags": ["big fish"]},
        {"label": "grinning cat", "tags": ["face"]},
        {"label": "anchor", "tags": ["ship"]},
    ]
    banned = clip_data.related_words(entries, held_out)
    assert {"plane", "crown", "fish", "cat"} <= banned
    assert not {"anchor", "ship"} & banned

    records = clip_data.select(icons, known, held_out, banned)
    clip_data.check_disjoint(records, held_out)
    assert {(r["style"], r["icon"]) for r in records} == {
        *((style, name) for style in emoji.BASE_STYLES for name in ("red-apple", "bear")),
        *(("lucide", "anchor"), ("phosphor", "anchor-bold")),
    }
    assert {r["name"] for r in records if r["style"] == "phosphor"} == {"anchor"}


@pytest.mark.parametrize(("style", "name"), [("noto", "duck"), ("blobs", "bear"), ("noto", "weary-cat")])
def test_a_held_out_training_picture_is_refused(style: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}'.* is held out"):
        clip_data.check_disjoint([{"style": style, "icon": name, "name": name}], {"duck"})


def test_style_word_of_drawings_is_that_of_the_sample_data() -> None:
    assert sample_data.CAPTIONS["high-contrast"].format("bear") == emoji.caption(clip_data.DRAWING, "bear")


def test_missing_resvg_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ImportError, match='pip install "resvg-py'):
        clip_data.render_data(tmp_path, tmp_path, DATA_DIR, seed=0)


def test_description_leaves_the_name_out() -> None:
    entry = {"label": "crab", "tags": ["cancer", "zodiac"]}
    text = clip_data.describe(entry, "animal-marine", np.random.default_rng(0))
    assert text.startswith("an emoji of ")
    assert "crab" not in text
    assert {"animal", "marine"} < set(text.split())


# --------------------------------------------------------------------------------------- batches and augmentation


def test_a_batch_has_two_pictures_of_each_of_distinct_concepts(data: dict[str, Any], tokenizer: Any) -> None:
    batches = clip_data.Batches(data, tokenizer)
    for step in range(5):
        first, second = batches.draw(step, 4, seed=0)
        names = [[data["train"][i]["name"] for i in indices.tolist()] for indices in (first, second)]
        assert names[0] == names[1]
        assert len(set(names[0])) == 4
        assert all(a != b for a, b, name in zip(first, second, names[0], strict=True) if name != "key")
        assert torch.equal(first, batches.draw(step, 4, seed=0)[0])
    assert not torch.equal(batches.draw(0, 4, seed=0)[0], batches.draw(0, 4, seed=1)[0])


def test_captions_follow_what_augmentation_did(data: dict[str, Any], tokenizer: Any) -> None:
    batches = clip_data.Batches(data, tokenizer)
    indices = torch.zeros(200, dtype=torch.long)  # red apple, noto

    def captions(index: int, drawn: bool, odd: bool) -> set[str]:
        flags = [torch.full((200,), flag) for flag in (drawn, odd)]
        ids = batches.captions(indices + index, *flags, torch.Generator().manual_seed(0))
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        return {text.strip() for text in texts if "thing" not in text}

    assert captions(0, False, False) == {"a noto emoji of red apple", "an emoji of red apple"}
    assert captions(0, True, False) == {"a black line emoji of red apple", "an emoji of red apple"}
    assert captions(0, True, True) == {"an emoji of red apple"}
    line = len(data["train"]) - 1
    assert captions(line, False, False) == {"a black line emoji of key", "an emoji of key"}


def test_drawing_has_black_outlines_on_white() -> None:
    square = torch.ones(1, 3, 16, 16)
    square[:, :, 4:12, 4:12] = torch.tensor([1.0, 0.8, 0.0]).view(3, 1, 1)
    ones = torch.ones(1, 1, 1, 1)
    drawing = clip_augmentation.as_drawing(square, strength=4 * ones, dark=-0.1 * ones, wide=ones > 0)
    assert drawing.shape == square.shape
    assert drawing[0, 0, 8, 8] == 1  # inside
    assert drawing[0, 0, 0, 0] == 1  # outside
    assert drawing[0, 0, 8, 4] == 0  # edge
    filled = clip_augmentation.as_drawing(square, strength=4 * ones, dark=0.8 * ones, wide=ones > 0)
    assert filled[0, 0, 8, 8] == 0


def test_augmentation_keeps_shape_and_range_and_repeats() -> None:
    images = random_images(32).float() / 255
    first, second = (clip_augmentation.augment(images, torch.Generator().manual_seed(1)) for _ in range(2))
    assert first[0].shape == images.shape
    assert 0 <= first[0].min() <= first[0].max() <= 1
    assert first[1].any()
    assert not first[1].all()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    white = clip_augmentation.augment(torch.ones(32, 3, 16, 16), torch.Generator().manual_seed(1))[0]
    assert (white.mean((1, 2, 3)) > 0.9).sum() >= 24  # what comes in from outside is white; some are inverted


# ------------------------------------------------------------------------------------------------ model and loss


@torch.no_grad()
def test_embeddings_are_those_of_the_stock_model(tokenizer: Any) -> None:
    model = tiny_model(tokenizer)
    images = torch.rand(3, 3, shared.IMAGE_SIZE, shared.IMAGE_SIZE)
    ids = shared.tokenize(tokenizer, ["an emoji of bear", "a noto emoji of guitar", ""])
    outputs = model(input_ids=ids, pixel_values=images * 2 - 1, return_loss=True)
    embeds = clip_model.embed_images(model, images)
    torch.testing.assert_close(embeds, outputs.image_embeds)
    torch.testing.assert_close(clip_model.embed_texts(model, ids), outputs.text_embeds)
    shuffled = torch.stack([torch.randperm(16) for _ in images])
    torch.testing.assert_close(clip_model.embed_images(model, images, shuffled), embeds)
    assert not torch.allclose(clip_model.embed_images(model, images, shuffled[:, :8]), embeds)
    loss = clip_model.contrastive_loss(outputs.text_embeds, outputs.image_embeds, model.logit_scale.exp())
    torch.testing.assert_close(loss, outputs.loss)


def test_recall() -> None:
    similarity = torch.tensor([[3.0, 2, 1, 0, 0, 0], [9, 8, 7, 6, 5, 4], [0, 1, 0, 0, 0, 0]])
    found = clip_model.recall(similarity, torch.tensor([0, 5, 0]))
    assert found == pytest.approx({"R@1": 1 / 3, "R@5": 2 / 3})


@torch.no_grad()
def test_evaluation_counts_every_style(data: dict[str, Any], tokenizer: Any) -> None:
    images = random_images(6)
    images[2:4] = images[:2]  # blobs are the pictures of noto: found by embeddings and by pixels
    results = clip_model.evaluate(tiny_model(tokenizer), tokenizer, images, data["heldout"])
    assert set(results) == set(emoji.HELD_OUT_STYLES)
    assert results["blobs"]["image"]["R@1"] == results["blobs"]["pixels"]["R@1"] == 1
    assert results["high-contrast"]["text"]["R@5"] == 1  # of two candidates


# ------------------------------------------------------------------------------------------------------ training


def train_arguments(work_dir: Path, *flags: str) -> TinyClipOptions:
    argv = ["--work_dir", str(work_dir), "--output_dir", str(work_dir / "out"), "--minutes", "0", "--no_bf16"]
    return recipe.parse_args([*argv, "--batch_size", "3", *flags])


def test_a_killed_run_resumes_as_if_it_had_not_been_killed(
    data: dict[str, Any], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, images = clip_data.Batches(data, tokenizer), random_images(len(data["train"]))
    batch_loss = recipe.batch_loss

    def run(name: str, stop_at: int = -1) -> Any:
        def loss(model: Any, images: Tensor, batches: Any, step: int, dropped: float, options: Any) -> Tensor:
            if step == stop_at:
                raise KeyboardInterrupt
            return batch_loss(model, images, batches, step, dropped, options)

        monkeypatch.setattr(recipe, "batch_loss", loss)
        (tmp_path / name).mkdir(exist_ok=True)
        model = tiny_model(tokenizer)
        recipe.train(model, images, batches, train_arguments(tmp_path / name, "--steps", "8", "--checkpoint_s", "0"))
        return model

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("killed", stop_at=5)
    resumed = run("killed")
    for name, p in whole.named_parameters():
        torch.testing.assert_close(resumed.get_parameter(name), p, rtol=0, atol=0)
    assert shared.load_checkpoint(tmp_path / "killed" / "checkpoint.safetensors")[1]["step"] == 8


def test_training_separates_concepts(data: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    images = random_images(len(data["train"]))
    model, args = tiny_model(tokenizer), train_arguments(tmp_path, "--steps", "40", "--lr", "5e-3")
    batches = clip_data.Batches(data, tokenizer)
    with torch.no_grad():
        before = recipe.batch_loss(model, images, batches, 0, 0.0, args).item()
    recipe.train(model, images, batches, args)
    with torch.no_grad():
        assert recipe.batch_loss(model, images, batches, 0, 0.0, args).item() < before


def test_training_without_a_budget_is_refused(data: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    model, batches = tiny_model(tokenizer), clip_data.Batches(data, tokenizer)
    with pytest.raises(ValueError, match="--minutes and --steps are both 0"):
        recipe.train(model, random_images(1), batches, train_arguments(tmp_path))


def test_a_loss_that_is_not_finite_stops_the_run(
    data: dict[str, Any], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "batch_loss", lambda model, *_: model.logit_scale * float("nan"))
    model, batches = tiny_model(tokenizer), clip_data.Batches(data, tokenizer)
    with pytest.raises(FloatingPointError, match="loss is nan at step 10"):
        recipe.train(model, random_images(1), batches, train_arguments(tmp_path, "--steps", "20"))


def test_recipe_from_end_to_end(data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "build_model", tiny_model)
    output_dir = tmp_path / "models" / "clip"
    save_file(
        {"train": random_images(len(data["train"])), "heldout": random_images(len(data["heldout"]), seed=1)},
        tmp_path / "images.safetensors",
    )
    (tmp_path / "records.json").write_text(json.dumps(data), encoding="utf-8")
    argv = ["--work_dir", str(tmp_path), "--output_dir", str(output_dir), "--minutes", "0", "--steps", "3"]
    argv += ["--batch_size", "3", "--date", "2026-11-24", "--hardware", "a test"]
    with pytest.raises(FileNotFoundError, match="run the phase `train` first"):
        recipe.main([*argv, "--phases", "export"])
    recipe.main(argv)
    weights = load_file(output_dir / "model.safetensors")
    recipe.main(argv)  # training is finished: nothing changes
    for name, tensor in load_file(output_dir / "model.safetensors").items():
        assert torch.equal(tensor, weights[name])
        assert tensor.dtype == torch.float16

    model = CLIPModel.from_pretrained(output_dir)
    processor = CLIPProcessor.from_pretrained(output_dir)
    assert model.dtype == torch.float32
    inputs = processor(text=["an emoji of bear"], images=[Image.new("RGB", (128, 128))], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, shared.IMAGE_SIZE, shared.IMAGE_SIZE)
    assert inputs["pixel_values"].min() == -1
    with torch.no_grad():
        outputs = model(**inputs)
    torch.testing.assert_close(outputs.image_embeds, F.normalize(outputs.image_embeds, dim=-1))
    card = (output_dir / "README.md").read_text(encoding="utf-8")
    for text in ("not comparable with published CLIP", "CC-BY-4.0", "2026-11-24", "a test", "--minutes 0 --steps 3"):
        assert text in card
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert f"| blobs | captions | {figures['blobs']['text']['R@1']:.3f} |" in card
