"""The bundled bases: whole, and under names that old and new versions of transformers read."""

from __future__ import annotations

import json
import runpy

import pytest
from safetensors import safe_open
from sd_fixtures import ROOT

MODELS = ROOT / "assets" / "models"
MATRIX = runpy.run_path(str(ROOT / "benchmarks" / "version_matrix.py"))

pytestmark = pytest.mark.skipif(not MATRIX["EXPECTED"].is_file(), reason="a checkout without the bundled bases")


@pytest.mark.parametrize("name", MATRIX["MEASURES"])
def test_a_bundled_base_says_what_it_said_when_it_was_stored(name: str) -> None:
    expected = json.loads(MATRIX["EXPECTED"].read_text(encoding="utf-8"))
    ((good, cell),) = MATRIX["compare"]({name: MATRIX["MEASURES"][name]()}, {name: expected[name]}).values()
    assert good, cell


def test_the_comparison_sees_a_small_change() -> None:
    expected = {"base": {"embeds": [1.0, -2.0], "loss": [0.5], "adapted loss": [0.5]}}
    compare = MATRIX["compare"]
    assert compare(expected, expected)["base"][0]
    for changed in (
        {"embeds": [1.0, -2.02], "loss": [0.5], "adapted loss": [0.5]},
        {"embeds": [1.0], "loss": [0.5], "adapted loss": [0.5]},
        {"embeds": [1.0, float("nan")], "loss": [0.5], "adapted loss": [0.5]},
        {"embeds": [1.0, -2.0], "loss": [0.51], "adapted loss": [0.51]},
        {"embeds": [1.0, -2.0], "loss": [0.5], "adapted loss": [0.52]},
        "ValueError: no such base",
    ):
        assert not compare({"base": changed}, expected)["base"][0]
    assert not compare({}, expected)["base"][0]


@pytest.mark.parametrize(
    ("file", "prefixes"),
    [
        ("tiny-sd/text_encoder/model.safetensors", ("text_model.",)),
        ("tiny-dit/text_encoder/model.safetensors", ("text_model.", "text_projection.")),
        ("tiny-vlm/model.safetensors", ("language_model.", "multi_modal_projector.", "vision_tower.vision_model.")),
    ],
)
def test_weights_have_the_names_that_transformers_4_needs(file: str, prefixes: tuple[str, ...]) -> None:
    with safe_open(MODELS / file, "pt") as weights:
        keys = list(weights.keys())
    assert keys
    assert [key for key in keys if not key.startswith(prefixes)] == []


def test_processors_and_tokenizers_name_classes_that_transformers_4_has() -> None:
    processor = json.loads((MODELS / "tiny-vlm" / "processor_config.json").read_text(encoding="utf-8"))
    assert "image_processor" not in processor
    template = json.loads((MODELS / "tiny-vlm" / "chat_template.json").read_text(encoding="utf-8"))["chat_template"]
    assert template == (MODELS / "tiny-vlm" / "chat_template.jinja").read_text(encoding="utf-8")
    index = json.loads((MODELS / "tiny-dit" / "model_index.json").read_text(encoding="utf-8"))
    assert index["tokenizer_3"] == ["transformers", "T5TokenizerFast"]
    for path in MODELS.rglob("tokenizer_config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        assert config["tokenizer_class"] != "TokenizersBackend", path
        assert not isinstance(config.get("extra_special_tokens"), list), path
