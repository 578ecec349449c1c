from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flow_fixtures import load, write_base

from lorainit_diffusers.families.flow_matching import FlowMatchingFamily
from lorainit_diffusers.training.data.embeddings_cache import EmbeddingsCache

CAPTIONS = ["a cat", "a dog", "a cat on a mat"]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> FlowMatchingFamily:
    return load(write_base(tmp_path_factory.mktemp("base") / "z_image", "z_image"), "z_image")


def test_each_caption_is_encoded_once(
    family: FlowMatchingFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    encode = family.embed_captions

    def record(captions: list[str]) -> dict[str, torch.Tensor]:
        encoded.extend(captions)
        return encode(captions)

    monkeypatch.setattr(family, "embed_captions", record)
    cache = EmbeddingsCache(tmp_path / "cache", family, {"files": {}})
    first = cache(CAPTIONS[:2])
    assert encoded == CAPTIONS[:2]
    again = EmbeddingsCache(tmp_path / "cache", family, {"files": {}})(CAPTIONS)
    assert encoded == CAPTIONS
    expected = encode(CAPTIONS)
    for name, values in expected.items():
        torch.testing.assert_close(again[name], values)
        assert torch.equal(again[name][:2], first[name])
    assert len(list((tmp_path / "cache").iterdir())) == 3
    # another base, and another length
    EmbeddingsCache(tmp_path / "cache", family, {"files": {"": "other"}})(["a cat"])
    monkeypatch.setattr(family, "max_sequence_length", 40)
    EmbeddingsCache(tmp_path / "cache", family, {"files": {}})(["a cat"])
    assert encoded == [*CAPTIONS, "a cat", "a cat"]


def test_a_broken_file_is_named(family: FlowMatchingFamily, tmp_path: Path) -> None:
    cache = EmbeddingsCache(tmp_path, family, {})
    cache(["a cat"])
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"cannot read the embeddings '.*safetensors': .*; delete the file"):
        cache(["a cat"])
