"""The policy: what is sketched under a budget, in what order, and what it counts."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from core_fixtures import relative_error
from torch import Tensor

from lorainit_diffusers import budget as budget_module
from lorainit_diffusers.budget import MemoryBudget, free_bytes, sketch_columns
from lorainit_diffusers.statistics import GradientMean, SecondMoment, SketchedSecondMoment, Statistic

CPU = torch.device("cpu")
COLUMNS = 8
WIDTHS = {"a": 24, "b": 48, "c": 24, "d": 96, "e": 48, "narrow": 6}


def exact_bytes(width: int) -> int:
    return 12 * width**2 + 8 * width  # float64 scatter, float32 buffer, float64 mean


def sketch_bytes(width: int) -> int:
    return 8 * (width * (COLUMNS + 1) + 1)


def projection_bytes(width: int) -> int:
    return 12 * width * COLUMNS


def rows_of(name: str, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)) + batch)
    return torch.randn(30, WIDTHS[name], generator=generator) + 0.3


def started(num_bytes: float | None, **kwargs: Any) -> MemoryBudget:
    budget = MemoryBudget(num_bytes, num_columns=COLUMNS, **kwargs)
    budget.start(CPU, lambda value: value)
    return budget


def run(num_bytes: float, order: Any = WIDTHS, batches: int = 3) -> tuple[MemoryBudget, dict[str, Any]]:
    """What a pass does: a statistic is admitted when its layer first runs, and updated in every batch."""
    budget, table = started(num_bytes), {}
    for batch, name in itertools.product(range(batches), order):
        if batch == 0:
            budget.admit(name, SecondMoment(WIDTHS[name]), table)
        table[name].update(rows_of(name, batch))
        assert budget.used <= num_bytes
    return budget, table


ALL_EXACT = sum(exact_bytes(width) for width in WIDTHS.values())
WIDEST_SKETCHED = ALL_EXACT - exact_bytes(96) + sketch_bytes(96) + projection_bytes(96)


@pytest.mark.parametrize(
    ("num_bytes", "sketched"),
    [
        (ALL_EXACT, set()),
        (ALL_EXACT - 1, {"d"}),
        (WIDEST_SKETCHED, {"d"}),
        (WIDEST_SKETCHED - 1, {"b", "d", "e"}),
    ],
)
def test_the_widest_layers_are_sketched_and_no_more_than_needed(num_bytes, sketched):
    budget, table = run(num_bytes)
    assert {name for name, s in table.items() if isinstance(s, SketchedSecondMoment)} == sketched
    assert all(s.num_columns == COLUMNS for s in table.values() if isinstance(s, SketchedSecondMoment))
    assert budget.used <= budget.peak <= num_bytes
    expected = sum(sketch_bytes(w) if name in sketched else exact_bytes(w) for name, w in WIDTHS.items())
    assert budget.used == expected + sum(projection_bytes(w) for w in {WIDTHS[name] for name in sketched})


def test_the_order_in_which_layers_run_decides_nothing():
    """Every split of the demotions between "already begun" and "still to come" ends the same."""
    for num_bytes in (ALL_EXACT - 1, WIDEST_SKETCHED - 1, 40_000):
        sketched = {
            tuple(sorted(name for name, s in run(num_bytes, order, 1)[1].items() if hasattr(s, "num_columns")))
            for order in list(itertools.permutations(WIDTHS))[::17]
        }
        assert len(sketched) == 1


def test_what_is_demoted_late_equals_a_sketch_from_the_start():
    _, table = run(WIDEST_SKETCHED - 1)
    for name, statistic in table.items():
        if not isinstance(statistic, SketchedSecondMoment):
            continue
        fresh = SketchedSecondMoment(WIDTHS[name], COLUMNS)
        for batch in range(3):
            fresh.update(rows_of(name, batch))
        assert statistic.num_rows == fresh.num_rows == 90
        for key in ("sketch", "mean", "trace"):
            assert relative_error(statistic.state_dict()[key], fresh.state_dict()[key]) < 2e-6
    assert sum(isinstance(s, SketchedSecondMoment) for s in table.values()) > 1


def test_shared_statistics_count_once_and_stay_shared_in_every_table():
    budget, table = started(exact_bytes(96) + exact_bytes(24)), {}
    first, second = SecondMoment(96), SecondMoment(24)
    budget.admit("a", first, table)
    first.update(torch.randn(9, 96))
    followers = {"a": first, "b": first}
    budget.watch(followers)
    budget.admit("c", second, table)
    assert table["a"] is first  # counted once, both fit
    budget.admit("d", SecondMoment(24), table)
    assert isinstance(table["a"], SketchedSecondMoment)
    assert followers["a"] is followers["b"] is table["a"]
    assert table["c"] is second
    budget.release()
    assert followers["a"].num_rows == 9


def taken_bytes(statistic: Statistic) -> int:
    tensors = [value for value in vars(statistic).values() if isinstance(value, Tensor)]
    tensors += getattr(statistic, "_few", None) or []
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def test_the_bytes_that_a_statistic_claims_are_those_that_it_takes():
    for width, device in itertools.product((24, 800), (None, CPU)):  # float64 and float32 accumulators
        for statistic in (SecondMoment(width), SketchedSecondMoment(width, COLUMNS), GradientMean((7, width))):
            if device is not None:
                statistic.move(device)
            claimed = statistic.num_bytes(CPU)
            for num_rows in (7, 7) if isinstance(statistic, GradientMean) else (7, width):
                statistic.update(torch.randn(num_rows, width))
            assert claimed == taken_bytes(statistic)


def test_few_rows_take_at_most_what_their_scatter_would():
    for width in (24, 800):
        statistic = SecondMoment(width)
        for _ in range(width // 2):  # one row is kept as one row, however many batches bring it
            statistic.update(torch.randn(1, width))
            assert taken_bytes(statistic) <= statistic.num_bytes(CPU) / 2 + 8 * width


def test_counting_costs_the_same_for_every_layer(monkeypatch):
    counted: list[int] = []
    num_bytes = SecondMoment.num_bytes
    monkeypatch.setattr(SecondMoment, "num_bytes", lambda self, device: counted.append(1) or num_bytes(self, device))
    for limit in (1e12, 400 * 24 * (COLUMNS + 2) * 8 + 1e5):  # all exact; all sketched in the end
        counted.clear()
        budget, table = MemoryBudget(limit, num_columns=COLUMNS), {}
        budget.start(CPU, lambda value: value)
        for index in range(400):
            budget.admit(f"layer{index}", SecondMoment(24), table)
        assert len(counted) <= 2 * 400
        assert all(isinstance(part, SecondMoment) for part in table.values()) == (limit == 1e12)
        sketches = [part for part in table.values() if isinstance(part, SketchedSecondMoment)]
        projection = sketches[0].projection_bytes if sketches else 0
        assert budget.used == sum(part.num_bytes(CPU) for part in table.values()) + projection


def test_the_projection_is_one_for_all_sketches_of_a_size():
    first, second = SketchedSecondMoment(48, COLUMNS), SketchedSecondMoment(48, COLUMNS)
    like = torch.empty(0, dtype=torch.float64)
    assert first.projection_like(like) is second.projection_like(like)
    assert first.projection_like(like) is not SketchedSecondMoment(48, COLUMNS, seed=1).projection_like(like)


def test_what_does_not_fit_in_any_form_is_refused_with_the_remedies():
    message = r"statistics need more than the 1e-05 GB .*layer 'd' \(input width 96, .* MB\).*raise memory_budget_gb.*"
    with pytest.raises(ValueError, match=message + r"statistics_device='cpu'.*target_modules"):
        run(10_000, ["d"])
    with pytest.raises(ValueError, match="layer 'narrow'"):
        run(exact_bytes(6) - 1, ["narrow"])  # narrower than a sketch is


def test_mean_gradients_count_and_are_refused_together():
    gradients: dict[str, Any] = {"first": GradientMean((10, 96)), "second": GradientMean((50, 96))}
    with pytest.raises(
        ValueError, match=r"mean gradients of 2 layers need 2.3e-05 GB.*largest: layer 'second', 0.0192"
    ):
        started(23_039).admit_gradients(gradients)
    budget, table = started(exact_bytes(96) + 23_039), {}
    budget.admit_gradients(gradients)
    assert budget.used == 23_040
    budget.admit("first", SecondMoment(96), table)
    assert isinstance(table["first"], SketchedSecondMoment)


@pytest.mark.parametrize("num_bytes", [0, -1e9])
def test_a_budget_is_positive(num_bytes):
    with pytest.raises(ValueError, match=r"memory_budget_gb is -?[01]; it must be positive"):
        MemoryBudget(num_bytes, num_columns=COLUMNS)


def test_the_default_is_half_of_what_is_free_where_the_statistics_are(monkeypatch):
    monkeypatch.setattr(budget_module, "free_bytes", lambda device: {"cpu": 1000, "meta": 400}[device.type])
    assert started(None).num_bytes == 500
    elsewhere = started(None, device="meta")
    assert elsewhere.num_bytes == 200
    assert elsewhere.device == torch.device("meta")


def test_the_budget_is_the_smallest_of_all_processes_and_is_settled_once():
    budget = MemoryBudget(1000, num_columns=COLUMNS)
    budget.start(CPU, lambda value: min(value, 700))
    budget.start(CPU, lambda value: min(value, 300))
    assert budget.num_bytes == 700


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    alone = free_bytes(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 0 < free_bytes(CPU) < 0.5 * alone


def test_accumulators_move_to_the_statistics_device():
    budget, table = started(1e9, device="cpu"), {}
    budget.admit("a", SecondMoment(24), table)
    table["a"].update(rows_of("a", 0))
    assert table["a"].num_bytes(torch.device("meta")) == 8 * 24 * 25  # no buffer, and the CPU's float64


def test_columns_are_a_multiple_of_the_rank():
    assert sketch_columns(16) == 192
