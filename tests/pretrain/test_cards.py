"""The model cards: the templates say what the cards of the bundled models say, and numbers are written as there."""

from __future__ import annotations

import re
from typing import Any

import cards
import pytest
from jinja2 import UndefinedError
from sd_fixtures import ROOT

TEMPLATES = sorted((ROOT / "train_scripts" / "pretrain" / "templates").glob("*.md.jinja"))


def fixed_parts(template: str) -> list[str]:
    """The text between what a template fills in, line by line."""
    lines = re.sub(r"\{%.*?%\}", "", template).splitlines()
    return [part.strip() for line in lines for part in re.split(r"\{\{.*?\}\}", line) if part.strip()]


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_the_bundled_card_is_what_the_template_says(path: Any) -> None:
    name = path.name.removesuffix(".md.jinja").replace("_", "-")
    card = (ROOT / "assets" / "models" / name / "README.md").read_text(encoding="utf-8")
    parts = fixed_parts(path.read_text(encoding="utf-8"))
    assert len(parts) > 30
    written = " ".join(card.split())  # a filled-in line may have been wrapped
    assert [part for part in parts if " ".join(part.split()) not in written] == []
    assert [line.strip() for line in card.splitlines() if line.startswith("#")] == [
        line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")
    ]


def test_every_recipe_of_a_model_has_a_card() -> None:
    recipes = {path.stem for path in (ROOT / "train_scripts" / "pretrain").glob("tiny_*.py")}
    assert {path.name.removesuffix(".md.jinja") for path in TEMPLATES} == recipes


def values_of_dit() -> dict[str, Any]:
    parts = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae")
    counts = {"sample_steps": 25, "num_layers": 5, "width": 256, "num_images": 2912, "num_concepts": 728}
    return {
        **counts,
        "size": 41_600_000,
        "parameters": dict.fromkeys(parts, 1_050_000),
        "styles": ["noto", "fluent"],
        "names": ["red apple", "pizza"],
        "logit_mean": 0.0,
        "logit_std": 1.2,
        "num_steps": 12345,
        "minutes": 74.6,
        "loss": 0.51249,
        "exposures": 270.5,
        "hardware": "2 <cores> & more",
        "flags": "--transformer_minutes 75",
        "zero_tokens": {16: 0.6, 77: 0.2},
        "sources": [cards.picture_source("noto")],
    }


def test_a_card_is_filled_in() -> None:
    card = cards.render_card("tiny_dit.md.jinja", **values_of_dit())
    assert "A complete Stable Diffusion 3 of 42 MB" in card
    assert "| third text encoder, whose output is zero: it holds the place of T5 | T5EncoderModel | 1.05 M |" in card
    assert "mean\n  0 and standard deviation 1.2; schedule shift 1" in card
    assert "12345 steps in 75 minutes, loss 0.512, 270 exposures per picture." in card
    assert "- **Hardware**: 2 <cores> & more." in card
    assert "Training saw 16, 77 of them" in card
    assert "|---|---|---|\n| Noto Emoji, Google Inc, " in card
    assert "Apache-2.0 |\n\nTwemoji" in card
    assert "{{" not in card
    assert card.endswith("of this repository.\n")


def test_a_card_with_a_gap_is_refused() -> None:
    values = values_of_dit()
    del values["loss"]
    with pytest.raises(UndefinedError, match="loss"):
        cards.render_card("tiny_dit.md.jinja", **values)
