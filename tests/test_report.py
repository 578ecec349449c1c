"""What is said of an initialisation: ranks, the score that decided, shares, step 0."""

from __future__ import annotations

import json
import re

import pytest
import torch
from sd_fixtures import ROOT

from lorainit_diffusers.methods import METHODS
from lorainit_diffusers.report import (
    STEP_ZERO,
    InitReport,
    LayerReport,
    RankAllocation,
    RankedComponent,
    ranks_in_words,
)


def make_report(ranks: list[int], captured: float | None = 0.5, **changed) -> InitReport:
    layers = {
        f"unet.{index}.to_q": LayerReport(
            rank, float(rank), None, captured and captured / (index + 1), 10, f"unet.{index}"
        )
        for index, rank in enumerate(ranks)
    }
    options = {"method": "eva", "step_zero": "equal", "num_passes": 2, **changed}
    return InitReport(options={}, layers=layers, forward_s=2.0, statistics_s=0.5, solve_s=0.5, attach_s=0.1, **options)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([8, 8], "8"),
        ([3, 13], "3 to 13 (mean 8)"),
        ([1, 2, 2], "1 to 2 (mean 1.7)"),
        ([0, 1], "0 to 1 (mean 0.5)"),
        ([], "none"),
    ],
)
def test_ranks_in_words(ranks, words):
    assert ranks_in_words(ranks) == words


def test_the_summary_says_what_the_words_mean():
    lines = make_report([4, 4]).summary().splitlines()
    assert lines == [
        "init eva: 2 layers, 2 x rank 4; step 0 is the base model, because B is zero",
        "captured (share of a layer's total score that its kept components hold): 0.38 on average, 0.25 at the least "
        "(unet.1.to_q)",
        "collection: 2 passes, 2.0 s in the model and 0.50 s in the statistics; 0.50 s to solve (together 0.50 of the "
        "model's time on top)",
    ]
    for step_zero, words in STEP_ZERO.items():
        assert words in make_report([4], step_zero=step_zero).summary()


def test_the_summary_says_which_score_was_the_last_to_get_a_rank():
    kept, refused = RankedComponent("unet.0.to_q", 13, 0.01234), RankedComponent("unet.1.to_q", 4, 0.0121)
    report = make_report([13, 3], allocation=RankAllocation(16, False, 1, 16, kept, refused))
    text = report.summary()
    assert "2 layers, ranks 3 to 13 (mean 8); " in text
    assert (
        "ranks by score: the last rank went to unet.0.to_q, component 13, score 0.0123; the first to get none was "
        "unet.1.to_q, component 4, score 0.0121"
    ) in text
    written = json.loads(json.dumps(report.to_json()))["allocation"]
    assert written == {
        **{"budget": 16, "per_parameter": False, "min_rank": 1, "max_rank": 16},
        "last_kept": {"layer": "unet.0.to_q", "component": 13, "score": 0.01234},
        "first_refused": {"layer": "unet.1.to_q", "component": 4, "score": 0.0121},
    }


def test_a_budget_of_parameters_and_budgets_that_decide_nothing_are_said():
    kept = RankedComponent("a", 2, 1e-5)
    assert RankAllocation(100, True, 1, 4, kept, None).sentence() == (
        "the last rank went to a, component 2, score per parameter 1e-05"
    )
    assert RankAllocation(4, False, 1, 4, None, None).sentence() == "nothing competed for a rank"
    assert make_report([4]).to_json()["allocation"] is None


def test_the_page_on_reports_knows_every_key_and_every_method():
    page = (ROOT / "docs" / "init_report.md").read_text(encoding="utf-8")
    report = make_report([4])
    layer, *_ = report.to_json()["layers"].values()
    for key in (*layer, *(key for key in report.to_json() if key not in ("method", "options", "layers"))):
        assert f"`{key}`" in page, f"docs/init_report.md does not explain {key}"
    for step_zero in STEP_ZERO:
        row = re.search(rf"^\| `{step_zero}` \| ([^|]*) \|", page, re.MULTILINE)
        named = set(re.findall(r"`(\w+)`", row[1]))
        assert named == {name for name, method in METHODS.items() if method().step_zero == step_zero}
    without = re.search(r"that rank nothing \(([^)]*)\)", page)
    unranked = set()
    for name, method in METHODS.items():
        if method().observes == "nothing":
            generator = torch.Generator().manual_seed(0)
            if method().solve(torch.eye(8), None, 2, scaling=1.0, generator=generator).scores is None:
                unranked.add(name)
    assert set(re.findall(r"`(\w+)`", without[1])) == unranked
