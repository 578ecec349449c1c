from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from comparison_fixtures import Cell, write_comparison

from lorainit_diffusers.comparison import Comparison
from lorainit_diffusers.comparison.estimates import bootstrap, chance_of_verdict, first_reach, running_median, sd
from lorainit_diffusers.comparison.results import higher_is_better

Curves = dict[Cell, dict[int, float | str]]


def brute_force(numerators: list[float], denominators: list[float]) -> list[float]:
    """Every ratio of sums that a resample can give, with its number of ways, ascending."""
    n = len(numerators)
    rows = np.stack(np.meshgrid(*[np.arange(n)] * n), axis=-1).reshape(-1, n)
    return sorted(np.array(numerators)[rows].sum(1) / np.array(denominators)[rows].sum(1))


def hand_made() -> Curves:
    """Two seeds; gaussian is at its final score from step 50 on, cntlora from step 25 on."""
    curves: Curves = {}
    for seed, shift in ((0, 0.0), (1, 0.01)):
        curves["gaussian", 0.001, seed] = {0: 1.0, 50: 0.6 + shift, 100: 0.6 + shift}
        curves["gaussian", 0.002, seed] = {0: 1.0, 50: 0.7, 100: 0.7}
        curves["cntlora", 0.001, seed] = {0: 1.0, 50: 0.65, 100: 0.65}
        curves["cntlora", 0.002, seed] = {0: 1.0, 50: 0.2 + shift, 100: 0.5}
    return curves


def test_best_learning_rate_final_score_and_differences(tmp_path: Path) -> None:
    comparison = Comparison.load(write_comparison(tmp_path, hand_made()))
    assert comparison.best_learning_rates() == {"gaussian": 0.001, "cntlora": 0.002}
    gaussian, cntlora = comparison.summary()
    assert (gaussian.final, gaussian.final_sd) == pytest.approx((0.605, 0.01 / math.sqrt(2)))
    assert (cntlora.final, cntlora.final_sd, cntlora.best_over_steps) == pytest.approx((0.5, 0.0, 0.205))
    difference = cntlora.differences["gaussian"]
    assert (difference.value, difference.low, difference.high) == pytest.approx((-0.105, -0.11, -0.10))
    assert (difference.verdict, difference.num_seeds) == ("better", 2)
    assert "gaussian" not in gaussian.differences
    assert comparison.difference("gaussian", "cntlora").verdict == "worse"


def test_of_equally_good_learning_rates_the_lowest_is_the_best(tmp_path: Path) -> None:
    curves: Curves = {("gaussian", rate, 0): {0: 1.0, 100: 0.5} for rate in (0.004, 0.001, 0.002)}
    assert Comparison.load(write_comparison(tmp_path, curves)).best_learning_rates() == {"gaussian": 0.001}


def test_steps_and_seconds_to_the_target_by_hand(tmp_path: Path) -> None:
    directory = write_comparison(tmp_path, hand_made(), init_s={"cntlora": 1.0})
    speed = Comparison.load(directory).speed("cntlora", "gaussian")
    assert speed is not None
    # from 1.0 to 0.2 in 50 steps, the target 0.6: after half of them; seed 1 from 1.0 to 0.21, the target 0.61
    assert speed.steps == pytest.approx((25.0 + 50 * 0.39 / 0.79) / 2)
    assert speed.share_of_budget.value == pytest.approx(speed.steps / 100)
    # the easier target of seed 0 is 0.6 + 0.02 * 0.4 = 0.608, where gaussian is after 49 steps
    ours = [50 * 0.392 / 0.8, 50 * 0.98 * 0.39 / 0.79]
    theirs = [49.0, 49.0]
    assert speed.ratio is not None
    assert speed.ratio.value == pytest.approx(sum(ours) / sum(theirs))
    assert speed.ratio.verdict == "better"
    # 0.1 s a step, and one second of initialisation
    assert speed.seconds is not None
    assert speed.seconds == pytest.approx(1.0 + 0.1 * speed.steps)
    assert speed.seconds_share is not None
    assert speed.seconds_share.value == pytest.approx(speed.seconds / 10.0)
    assert speed.seconds_ratio is not None
    assert speed.seconds_ratio.value == pytest.approx((2.0 + 0.1 * sum(ours)) / (0.1 * sum(theirs)))


def test_a_baseline_is_at_its_own_target_at_the_end_or_before(tmp_path: Path) -> None:
    comparison = Comparison.load(write_comparison(tmp_path, hand_made()))
    own = comparison.speed("gaussian", "gaussian")
    assert own is not None
    assert own.ratio is not None
    assert (own.steps, own.share_of_budget.value, own.ratio.value) == pytest.approx((50.0, 0.5, 1.0))
    # and the other way round: gaussian never gets to what cntlora has
    never = comparison.speed("gaussian", "cntlora")
    assert never is not None
    assert (never.num_reached, never.num_seeds, never.steps) == (0, 2, math.inf)
    assert never.ratio is not None
    assert never.ratio.verdict == "worse"


def test_seconds_are_left_out_without_timings(tmp_path: Path) -> None:
    speed = Comparison.load(write_comparison(tmp_path, hand_made(), timings=False)).speed("cntlora", "gaussian")
    assert speed is not None
    assert (speed.seconds, speed.seconds_share, speed.seconds_ratio) == (None, None, None)
    assert speed.steps < 30


def test_robustness_is_the_mean_over_learning_rates_at_a_step(tmp_path: Path) -> None:
    comparison = Comparison.load(write_comparison(tmp_path, hand_made()))
    assert (comparison.early_step, comparison.last_step) == (50, 100)
    gaussian, cntlora = comparison.summary()
    assert gaussian.late is not None
    assert cntlora.late is not None
    assert cntlora.early is not None
    assert gaussian.late.mean.value == pytest.approx((0.65 + 0.655) / 2)
    assert cntlora.late.mean.value == pytest.approx(0.575)
    assert (cntlora.late.worst, gaussian.late.worst) == pytest.approx((0.65, 0.7))
    assert cntlora.early.mean.value == pytest.approx((0.425 + 0.43) / 2)
    difference = cntlora.late.differences["gaussian"]
    assert (difference.value, difference.low, difference.high) == pytest.approx((-0.0775, -0.08, -0.075))
    assert difference.verdict == "better"


def test_only_learning_rates_that_all_share_count_for_robustness(tmp_path: Path) -> None:
    curves = hand_made()
    curves["gaussian", 0.5, 0] = curves["gaussian", 0.5, 1] = {0: 1.0, 50: 9.0, 100: 9.0}
    comparison = Comparison.load(write_comparison(tmp_path, curves))
    assert comparison.shared_learning_rates == [0.001, 0.002]
    robustness = comparison.robustness("gaussian", 100)
    assert robustness is not None
    assert robustness.mean.value == pytest.approx(0.6525)


@pytest.mark.parametrize("bad", ["", "inf", "nan"])
def test_a_diverged_run_is_the_worst_and_is_not_dropped(tmp_path: Path, bad: str) -> None:
    curves = hand_made()
    curves["cntlora", 0.002, 1] = {0: 1.0, 50: 0.1, 100: bad}  # its best learning rate otherwise
    curves["cntlora", 0.004, 0] = {0: 1.0, 50: bad}  # stopped where it diverged
    curves["cntlora", 0.004, 1] = {0: 1.0, 50: 0.9, 100: 0.8}
    comparison = Comparison.load(write_comparison(tmp_path, curves))
    assert comparison.best_learning_rates()["cntlora"] == 0.001
    assert comparison.missing == []
    robustness = comparison.robustness("cntlora", 100)
    assert robustness is not None
    # the worst finite score of the comparison, 1.0 at step 0, in its place
    assert robustness.mean.value == pytest.approx(np.mean([0.65, 0.65, 0.5, 1.0]))
    assert (robustness.worst, robustness.num_diverged, robustness.num_runs) == (math.inf, 1, 4)


def test_one_diverged_seed_of_three_is_worse_although_some_resamples_lack_it(tmp_path: Path) -> None:
    curves: Curves = {("gaussian", 0.001, seed): {0: 1.0, 50: 0.5, 100: 0.5} for seed in range(3)}
    curves |= {("eva", 0.001, seed): {0: 1.0, 50: 0.4, 100: "inf" if seed == 2 else 0.4} for seed in range(3)}
    difference = Comparison.load(write_comparison(tmp_path, curves)).difference("eva", "gaussian")
    assert difference.low == pytest.approx(-0.1)
    assert (difference.value, difference.verdict) == (math.inf, "worse")


def test_an_init_that_always_diverges_is_worse_than_a_baseline(tmp_path: Path) -> None:
    curves = hand_made()
    for rate in (0.001, 0.002):
        curves["cntlora", rate, 1] = {0: 1.0, 50: 0.1, 100: "inf"}
    comparison = Comparison.load(write_comparison(tmp_path, curves))
    cntlora = comparison.summary()[1]
    assert (cntlora.final, cntlora.learning_rate) == (math.inf, 0.001)
    assert math.isnan(cntlora.final_sd)
    assert cntlora.differences["gaussian"].verdict == "worse"
    assert comparison.difference("gaussian", "cntlora").verdict == "better"
    assert cntlora.best_over_steps == pytest.approx((0.65 + 0.1) / 2)
    # only seed 0 of the diverged baseline gives a target
    speed = comparison.speed("gaussian", "cntlora")
    assert speed is not None
    assert speed.num_seeds == 1


def test_higher_is_better_turns_everything_round(tmp_path: Path) -> None:
    curves: Curves = {}
    for seed in (0, 1, 2):
        curves["gaussian", 0.001, seed] = {0: 0.1, 50: 0.4, 100: 0.5}
        curves["gaussian", 0.002, seed] = {0: 0.1, 50: 0.4, 100: ""}
        curves["eva", 0.001, seed] = {0: 0.1, 50: 0.5, 100: 0.6 + 0.01 * seed}
        curves["eva", 0.002, seed] = {0: 0.1, 50: 0.2, 100: 0.3}
    comparison = Comparison.load(write_comparison(tmp_path, curves, primary="paired_similarity@tiny-clip"))
    gaussian, eva = comparison.summary()
    assert comparison.best_learning_rates() == {"gaussian": 0.001, "eva": 0.001}
    assert eva.differences["gaussian"].verdict == "better"
    assert eva.differences["gaussian"].value == pytest.approx(0.11)
    assert (eva.speeds["gaussian"].steps, eva.best_over_steps) == pytest.approx((50.0, 0.61))
    assert gaussian.late is not None
    assert (gaussian.late.worst, gaussian.late.mean.value) == (-math.inf, pytest.approx(0.3))


def test_an_unfinished_grid_says_what_is_missing(tmp_path: Path) -> None:
    curves = hand_made()
    del curves["gaussian", 0.001, 1]
    curves["cntlora", 0.002, 1] = {0: 1.0, 50: 0.2}
    comparison = Comparison.load(
        write_comparison(
            tmp_path, curves, learning_rates={init: [0.001, 0.002] for init in ("gaussian", "cntlora", "eva")}
        )
    )
    assert comparison.inits == ["gaussian", "cntlora"]
    assert comparison.missing == [
        *[("gaussian", 0.001, 1), ("cntlora", 0.002, 1)],
        *[("eva", 0.001, 0), ("eva", 0.001, 1), ("eva", 0.002, 0), ("eva", 0.002, 1)],
    ]
    # one seed of the better learning rate is no match for two of the other
    assert comparison.best_learning_rates() == {"gaussian": 0.002, "cntlora": 0.001}
    gaussian, _ = comparison.summary()
    assert gaussian.late is not None
    assert gaussian.late.mean.num_seeds == 1


def test_a_step_of_image_metrics_alone_is_no_divergence(tmp_path: Path) -> None:
    curves = hand_made()
    cell: Cell = ("cntlora", 0.002, 0)
    curves[cell] = {0: 1.0, 25: "", 50: 0.2, 100: 0.5}
    metrics: dict[Cell, dict[int, dict[str, float]]] = {
        cell: {25: {"kid@tiny-clip": 0.25}, 100: {"kid@tiny-clip": 0.1}}
    }
    comparison = Comparison.load(write_comparison(tmp_path, curves, metrics=metrics))
    run = comparison.best_runs("cntlora")[0]
    assert run.curves["validation_loss"] == {0: 1.0, 50: 0.2, 100: 0.5}
    assert run.curves["kid@tiny-clip"] == {25: 0.25, 100: 0.1}
    assert comparison.columns == ("kid@tiny-clip",)


def test_speed_and_difference_of_another_metric(tmp_path: Path) -> None:
    scores = {"gaussian": {0: 0.0, 100: 0.5}, "cntlora": {0: 0.0, 50: 0.5, 100: 0.8}}
    metrics = {
        (init, rate, seed): {step: {"paired_similarity@dino": score} for step, score in scores[init].items()}
        for init, rate, seed in (*(("gaussian", 0.001, s) for s in (0, 1)), *(("cntlora", 0.002, s) for s in (0, 1)))
    }
    comparison = Comparison.load(write_comparison(tmp_path, hand_made(), metrics=metrics))
    speed = comparison.speed("cntlora", "gaussian", "paired_similarity@dino")
    assert speed is not None
    assert speed.ratio is not None
    assert (speed.steps, speed.ratio.value) == pytest.approx((50.0, 0.5))
    difference = comparison.difference("cntlora", "gaussian", "paired_similarity@dino")
    assert (difference.value, difference.verdict) == (pytest.approx(0.3), "better")
    with pytest.raises(ValueError, match="share no seed with a score of 'paired_similarity@dino' at step 50"):
        comparison.difference("cntlora", "gaussian", "paired_similarity@dino", step=50)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bootstrap_agrees_with_all_resamples(seed: int) -> None:
    generator = np.random.default_rng(seed)
    a, b = generator.normal(1.0, 0.5, 4).tolist(), generator.uniform(1.0, 2.0, 4).tolist()
    for denominators in (b, [1.0] * 4):
        exact = brute_force(a, denominators)
        estimate = bootstrap(a, denominators)
        assert estimate.value == pytest.approx(sum(a) / sum(denominators))
        # of 256 resamples the 7th from either end is the 2.5 % one; 10,000 draws may miss it by some ranks
        assert exact[3] <= estimate.low <= exact[11]
        assert exact[-12] <= estimate.high <= exact[-4]
        assert bootstrap(a, denominators) == estimate


def test_of_three_seeds_the_interval_is_their_range() -> None:
    assert bootstrap([3.0, 1.0, 2.0]).low == 1.0
    assert bootstrap([3.0, 1.0, 2.0]).high == 3.0


def test_verdicts() -> None:
    def verdict(values: list[float], higher: bool = False) -> str:
        return bootstrap(values, null=0.0, higher=higher).verdict

    assert [verdict([-1.0, -2.0]), verdict([1.0, 2.0]), verdict([-1.0, 1.0])] == ["better", "worse", "tied"]
    assert [verdict([-1.0, -2.0], True), verdict([1.0, 2.0], True)] == ["worse", "better"]
    # one seed of three never gets there: the interval ends at infinity
    assert verdict([-1.0, -1.0, math.inf]) == "tied"
    assert verdict([1.0, 1.0, math.inf]) == "worse"
    assert verdict([math.inf, -math.inf]) == "tied"
    assert [verdict([-1.0]), verdict([math.inf]), verdict([0.0, 0.0])] == ["one seed", "one seed", "tied"]
    assert bootstrap([1.0, 2.0]).verdict == ""
    with pytest.raises(ValueError, match="0 numerators and 0 denominators"):
        bootstrap([])
    with pytest.raises(ValueError, match="1 numerators and 2 denominators"):
        bootstrap([1.0], [1.0, 2.0])


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_chance_of_a_verdict_is_what_a_simulation_gives(num_seeds: int) -> None:
    draws = np.random.default_rng(7).normal(size=(1500, num_seeds))
    rows = np.random.default_rng(0).integers(num_seeds, size=(2000, num_seeds))
    means = np.stack([(rows == seed).mean(1) for seed in range(num_seeds)])
    low, high = np.percentile(draws @ means, [2.5, 97.5], axis=1)
    assert np.mean((low > 0) | (high < 0)) == pytest.approx(chance_of_verdict(num_seeds), abs=0.04)
    assert (chance_of_verdict(1), chance_of_verdict(50)) == (None, None)


def test_first_reach() -> None:
    assert first_reach([0, 10, 20], [1.0, 0.5, 0.0], 0.75) == 5.0
    assert first_reach([0, 10, 20], [1.0, 0.5, 0.8], 0.5) == 10.0
    assert first_reach([0, 10, 20], [0.2, 0.5, 0.1], 0.3) == 0.0
    assert first_reach([0, 10], [1.0, 0.9], 0.5) == math.inf
    assert first_reach([0, 10, 20], [1.0, math.inf, 0.1], 0.5) == 20.0
    assert first_reach([0.5, 2.5], [1.0, 0.0], 0.5) == 1.5


def test_running_median() -> None:
    assert running_median([0.0, 1.0, 0.2, 0.3, 0.1]) == [0.0, 0.2, 0.3, 0.2, 0.1]
    monotone = [0.1, 0.2, 0.2, 0.7, 0.9]
    assert running_median(monotone) == monotone
    assert running_median([0.3, math.inf, math.inf]) == [0.3, math.inf, math.inf]
    assert [running_median(values) for values in ([], [1.0], [2.0, 1.0])] == [[], [1.0], [2.0, 1.0]]


def test_one_lucky_evaluation_of_an_accuracy_is_no_crossing(tmp_path: Path) -> None:
    curves: Curves = {}
    for seed in (0, 1):
        curves["gaussian", 0.001, seed] = {0: 0.0, 10: 0.2, 20: 0.4, 30: 0.5, 40: 0.5}
        curves["eva", 0.001, seed] = {0: 0.0, 10: 0.5, 20: 0.2, 30: 0.4, 40: 0.6}  # at step 10 by luck
    comparison = Comparison.load(write_comparison(tmp_path / "accuracy", curves, primary="accuracy"))
    speed = comparison.speed("eva", "gaussian")
    assert speed is not None
    assert speed.ratio is not None
    # eva's medians are 0, 0.2, 0.4, 0.4, 0.6: half way between steps 30 and 40; 98 % of the way, 0.49, a bit before
    assert speed.steps == pytest.approx(35.0)
    assert speed.ratio.value == pytest.approx((30 + 10 * 0.09 / 0.2) / (20 + 10 * 0.09 / 0.1))
    assert comparison.summary()[1].best_over_steps == 0.6
    own = comparison.speed("gaussian", "gaussian")
    assert own is not None
    assert (own.steps, own.num_reached) == (30.0, 2)
    # a similarity is no count, and stands as it is
    comparison = Comparison.load(write_comparison(tmp_path / "similarity", curves, primary="image_similarity@x"))
    speed = comparison.speed("eva", "gaussian")
    assert speed is not None
    assert speed.steps == 10.0


def test_seeds_on_which_a_baseline_stays_at_its_base_leave_the_interval_whole(tmp_path: Path) -> None:
    curves: Curves = {
        ("gaussian", 0.001, 0): {0: 0.5, 10: 0.5, 20: 0.5},
        ("gaussian", 0.001, 1): {0: 0.5, 10: 0.6, 20: 0.7},
        ("eva", 0.001, 0): {0: 0.5, 10: 0.6, 20: 0.6},
        ("eva", 0.001, 1): {0: 0.5, 10: 0.7, 20: 0.7},
    }
    comparison = Comparison.load(write_comparison(tmp_path, curves, primary="exact_match"))
    speed = comparison.speed("eva", "gaussian")
    assert speed is not None
    assert speed.ratio is not None
    assert (speed.ratio.low, speed.ratio.high) == pytest.approx((0.5, 1.0))
    assert speed.ratio.verdict == "tied"


def test_means_of_the_same_accuracies_are_tied(tmp_path: Path) -> None:
    curves: Curves = {}
    for seed in (0, 1):
        for rate, value in ((0.001, 0.1), (0.002, 0.2), (0.004, 0.3)):
            curves["gaussian", rate, seed] = {0: 0.0, 10: value}
            curves["eva", rate, seed] = {0: 0.0, 10: round(0.4 - value, 1)}
    gaussian, eva = Comparison.load(write_comparison(tmp_path, curves, primary="accuracy")).summary()
    assert gaussian.late is not None
    assert eva.late is not None
    assert gaussian.late.mean.value != eva.late.mean.value  # by rounding
    assert eva.late.differences["gaussian"].verdict == "tied"


def test_a_baseline_that_does_not_improve_gives_no_ratio(tmp_path: Path) -> None:
    curves: Curves = {("gaussian", 0.001, s): {0: 0.5, 100: 0.6} for s in (0, 1)}
    curves |= {("eva", 0.001, s): {0: 0.5, 100: 0.4} for s in (0, 1)}
    speed = Comparison.load(write_comparison(tmp_path, curves)).speed("eva", "gaussian")
    assert speed is not None
    assert (speed.steps, speed.ratio) == (0.0, None)


def test_small_helpers() -> None:
    assert higher_is_better("kid@tiny-clip") is False
    assert higher_is_better("text_alignment@x") is True
    with pytest.raises(ValueError, match="add 'speed' to METRICS"):
        higher_is_better("speed@x")
    assert sd([1.0, 3.0]) == pytest.approx(math.sqrt(2))
    assert math.isnan(sd([1.0]))


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing; run train_scripts/compare_inits\.py first"):
        Comparison.load(tmp_path)
    write_comparison(tmp_path, hand_made())
    (tmp_path / "results.csv").write_text("run,init\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has no rows"):
        Comparison.load(tmp_path)
    (tmp_path / "results.csv").write_text("run,init\na,b\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has no column 'learning_rate'"):
        Comparison.load(tmp_path)


def test_the_fastest_learning_rate_is_not_the_one_with_the_best_end(tmp_path):
    curves = {
        ("gaussian", 1e-3, 0): {0: 1.0, 10: 0.5, 20: 0.0},  # best end; 98 % of its way is 0.02, reached at 19.6
        ("gaussian", 2e-3, 0): {0: 1.0, 10: 0.02, 20: 0.01},  # reaches 0.02 at 10
        ("eva", 1e-3, 0): {0: 1.0, 10: 0.4, 20: 0.0},
        ("eva", 2e-3, 0): {0: 1.0, 5: 0.02, 20: 0.01},
        ("never", 1e-3, 0): {0: 1.0, 10: 0.9, 20: 0.8},
    }
    comparison = Comparison.load(write_comparison(tmp_path, curves))
    assert comparison.best_learning_rates()["eva"] == 1e-3
    fastest = comparison.fastest("eva", "gaussian")
    assert fastest is not None
    assert fastest.learning_rate == 2e-3
    assert fastest.steps == pytest.approx(5.0)
    assert fastest.ratio is not None
    assert fastest.ratio.value == pytest.approx(0.5)  # of gaussian's 10 at 2e-3, not of its 19.6 at 1e-3
    never = comparison.fastest("never", "gaussian")
    assert never is not None
    assert never.steps == float("inf")
