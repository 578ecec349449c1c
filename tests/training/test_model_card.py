"""The model card: what a hub reads of it, and what a person does."""

from __future__ import annotations

import dataclasses

import pytest
from huggingface_hub import ModelCard

from lorainit_diffusers.training.model_card import CardFacts, render_model_card, write_model_card


@pytest.fixture
def facts() -> CardFacts:
    return CardFacts(
        title="eva LoRA",
        base_model="assets/models/tiny-sd",
        init="eva",
        step_zero="equal",
        tags=("stable-diffusion", "lora"),
        rows={"rank, alpha": "8, 8", "data": "`a|b`\nnext"},
        usage="from diffusers import X\n\nX.from_pretrained('base')",
        notes=("One note.", "Another note."),
    )


def test_the_whole_card(facts):
    facts = dataclasses.replace(facts, picture="![base](samples.png)", outcome="Validation loss: 0.8 -> 0.5.")
    assert render_model_card(facts) == (
        "---\nbase_model: assets/models/tiny-sd\nlibrary_name: diffusers\ntags:\n- stable-diffusion\n- lora\n---\n\n"
        "# eva LoRA\n\nLoRA for `assets/models/tiny-sd`, initialised with **eva** (step 0: equal).\n\n"
        "![base](samples.png)\n\n| | |\n|---|---|\n| rank, alpha | 8, 8 |\n| data | `a\\|b` next |\n\n"
        "Validation loss: 0.8 -> 0.5.\n\n"
        "```python\nfrom diffusers import X\n\nX.from_pretrained('base')\n```\n\nOne note. Another note.\n"
    )


def test_scores_are_a_table_of_their_own(facts):
    scores = {"base": ("0.1000", "2.0000"), "end": ("0.5000", "")}
    card = render_model_card(dataclasses.replace(facts, score_columns=("accuracy", "loss"), scores=scores))
    assert (
        "\n\n| | accuracy | loss |\n|---|---|---|\n| base | 0.1000 | 2.0000 |\n| end | 0.5000 |  |\n"
        "\n| | |\n|---|---|\n"
    ) in card


@pytest.mark.parametrize(
    "text", ["C:\\my models\\x", "a: b # c", "- list", "'quoted' \"twice\"", "yes", "two\nlines", "ünï"]
)
def test_the_header_keeps_what_yaml_would_take_for_something_else(facts, text, tmp_path):
    write_model_card(tmp_path / "README.md", dataclasses.replace(facts, base_model=text, prompt=text, library="peft"))
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert data == {
        **{"base_model": text, "library_name": "peft", "instance_prompt": text},
        "tags": ["stable-diffusion", "lora"],
    }


def test_code_stays_inside_its_fence(facts):
    card = render_model_card(dataclasses.replace(facts, usage="x = '```'"))
    assert "````python\nx = '```'\n````\n" in card
