"""A launch that asked for more processes than have joined is told so."""

from __future__ import annotations

import pytest

from lorainit_diffusers.training.run import _asked_for_several

LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True"}
MEET = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "asked"),
    [
        ({}, False),
        (LAUNCHED, False),
        (MEET, False),
        ({**LAUNCHED, **MEET}, True),
        ({**LAUNCHED, **MEET, "WORLD_SIZE": "1", "RANK": "0"}, False),
    ],
)
def test_what_was_asked_for(environment: dict[str, str], asked: bool) -> None:
    assert _asked_for_several(environment) == asked
