"""Families at their published sizes: every target found, none twice, what statistics take, one block initialised."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from types import ModuleType

import pytest
from sd_fixtures import ROOT

from lorainit_diffusers.families import family_class


def _load() -> ModuleType:
    path = ROOT / "benchmarks" / "statistics_size.py"
    spec = importlib.util.spec_from_file_location("statistics_size", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


statistics_size = _load()
BASES = {base.name: base for base in statistics_size.BASES}
# Layers by the published number of blocks, and how many tensors feed them.
EXPECTED = {
    "SD 3.5 medium": (24 * 8 - 1, 24 * 4 - 1),  # the last block drops its text
    "FLUX.1 dev": (19 * 12 + 38 * 3, 19 * 8 + 38),
    "Lumina-Image 2.0": ((26 + 2 + 2) * 4, (26 + 2 + 2) * 2),
    "FLUX.2 dev": (8 * 4 + 48 * 2, 8 * 2 + 48 * 2),
    "FLUX.2 klein 9B": (8 * 4 + 24 * 2, 8 * 2 + 24 * 2),
    "FLUX.2 klein 4B": (5 * 4 + 20 * 2, 5 * 2 + 20 * 2),
    "Qwen-Image": (60 * 4, 60 * 2),
    "Z-Image": ((30 + 2 + 2) * 4, (30 + 2 + 2) * 2),
    "Sana 1.6B": (20 * 6, 20 * 2 + 1),  # one text for all
    "Wan 2.1 14B": (40 * 8, 40 * 4 + 1),
    "Wan 2.1 1.3B": (30 * 8, 30 * 4 + 1),
}


@pytest.mark.parametrize("name", BASES)
def test_targets_groups_and_bytes_are_those_of_the_table(name: str) -> None:
    """The command itself refuses a target without a layer, and a layer that one prediction reaches not or twice."""
    base = BASES[name]
    line = statistics_size.row(base)
    assert line in (ROOT / "docs" / "transformers.md").read_text(encoding="utf-8")
    assert tuple(int(cell) for cell in line.split(" | ")[1:3]) == EXPECTED[name]


def test_every_flow_matching_family_has_its_sizes() -> None:
    assert EXPECTED.keys() == BASES.keys()
    from lorainit_diffusers.families import TEXT_TO_IMAGE_FAMILIES
    from lorainit_diffusers.families.flow_matching import FlowMatchingFamily

    flow = {name for name in TEXT_TO_IMAGE_FAMILIES if issubclass(family_class(name), FlowMatchingFamily)}
    assert {base.family for base in BASES.values()} == flow


def test_a_target_without_a_layer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    base = BASES["Wan 2.1 1.3B"]
    monkeypatch.setattr(family_class("wan"), "TARGETS", ("to_q", "to_nowhere"))
    with pytest.raises(ValueError, match=r"target 'to_nowhere' of Wan 2\.1 1\.3B matches no layer"):
        statistics_size.groups(base)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", [name for name in BASES if name != "FLUX.2 dev"])  # 5 GB of weights for two blocks
def test_one_block_of_each_kind_is_initialised_within_two_gigabytes(name: str) -> None:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "statistics_size.py"),
        "--solve",
        statistics_size.slug(BASES[name]),
    ]
    row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    assert row["layers"] >= 4
    assert 0 < row["peak_statistics_gb"] <= 2.0
