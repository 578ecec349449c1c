"""How long captions are for each text encoder: what `caption_inputs` keeps, and what it cuts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flow_fixtures
import pytest
from lumina2_fixtures import write_random_lumina2
from pixart_fixtures import write_random_dit, write_random_pixart

from lorainit_diffusers.families.lumina2 import PROMPT_PREFIX, Lumina2Family
from lorainit_diffusers.families.pixart import DiTFamily, PixArtFamily
from lorainit_diffusers.families.sd import StableDiffusionFamily
from lorainit_diffusers.families.sdxl import StableDiffusionXLFamily

SHORT, LONG = "cat", "a dog by one long house " * 6


def lengths(family: Any) -> dict[str, tuple[list[int], int]]:
    return {name: (found.counts, found.limit) for name, found in family.caption_lengths([SHORT, LONG]).items()}


def assert_as_the_inputs(family: Any) -> None:
    """A caption that fits has so many tokens that differ from the padding; of one that does not, none is padding."""
    for component, (counts, limit) in lengths(family).items():
        ids = family.caption_inputs([SHORT, LONG])[f"input_ids{component.removeprefix('text_encoder')}"]
        tokenizer = family.tokenizers[component]
        whole = [tokenizer(text)["input_ids"] for text in family._tokenized_texts([SHORT, LONG])]
        assert ids.shape == (2, limit)
        assert counts == [len(each) for each in whole]
        assert counts[0] <= limit < counts[1]
        assert ids[0].tolist()[: counts[0]] == whole[0]
        assert set(ids[0].tolist()[counts[0] :]) <= {tokenizer.pad_token_id}


@pytest.mark.parametrize(
    ("kind", "base"), [(StableDiffusionFamily, "random_sd"), (StableDiffusionXLFamily, "random_sdxl")]
)
def test_clip(kind: Any, base: str, request: pytest.FixtureRequest) -> None:
    family = kind.from_pretrained(request.getfixturevalue(base))
    assert_as_the_inputs(family)
    assert {limit for _, limit in lengths(family).values()} == {12}


@pytest.mark.parametrize(("kind", "encoders"), [("sd3", 3), ("flux", 2)])
def test_clip_and_t5_each_have_their_limit(tmp_path: Path, kind: str, encoders: int) -> None:
    base = flow_fixtures.write_base(tmp_path / kind, kind)
    found = lengths(flow_fixtures.load(base, kind, max_sequence_length=20))
    assert len(found) == encoders
    assert sorted({limit for _, limit in found.values()}) == [12, 20]
    assert_as_the_inputs(flow_fixtures.load(base, kind, max_sequence_length=20))


def test_t5_after_cleaning(tmp_path: Path) -> None:
    write_random_pixart(tmp_path)
    family = PixArtFamily.from_pretrained(tmp_path, max_sequence_length=20)
    assert_as_the_inputs(family)
    assert (
        family.caption_lengths(["  CAT "])["text_encoder"].counts
        == family.caption_lengths(["cat"])["text_encoder"].counts
    )


def test_the_system_prompt_counts(tmp_path: Path) -> None:
    write_random_lumina2(tmp_path)
    family = Lumina2Family.from_pretrained(tmp_path)
    prefix = len(family.tokenizer(PROMPT_PREFIX)["input_ids"])
    assert family.caption_lengths([SHORT])["text_encoder"].counts[0] > prefix


def test_classes_have_no_tokens(tmp_path: Path) -> None:
    write_random_dit(tmp_path)
    assert DiTFamily.from_pretrained(tmp_path).caption_lengths(["1"]) == {}
