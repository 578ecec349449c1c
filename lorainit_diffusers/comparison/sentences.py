"""The result of a comparison in sentences, made from its numbers alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorainit_diffusers.comparison.analysis import TOLERANCE, Comparison
from lorainit_diffusers.comparison.cells import number, ratio_cell
from lorainit_diffusers.comparison.estimates import NUM_RESAMPLES, chance_of_verdict
from lorainit_diffusers.comparison.figures import column_label
from lorainit_diffusers.comparison.findings import InitSummary
from lorainit_diffusers.evaluation.metrics import METRICS

_MAX_NAMES = 8

WAY = f"{100 * (1 - TOLERANCE):.0f} %"


def headline(comparison: Comparison, rows: Sequence[InitSummary]) -> list[str]:
    """The result in sentences, from the numbers alone: final scores, reservations, speed, untuned learning rates."""
    if not comparison.baselines:
        return ["No baseline has finished a run, so nothing can be compared yet.", *_reservations(comparison, rows)]
    sentences = [" ".join(_final_sentence(baseline, rows) for baseline in comparison.baselines)]
    sentences += _reservations(comparison, rows)
    sentences.append(" ".join(filter(None, (_speed_sentence(baseline, rows) for baseline in comparison.baselines))))
    sentences.append(_untuned_sentence(comparison, rows))
    return list(filter(None, sentences))


def _final_sentence(baseline: str, rows: Sequence[InitSummary]) -> str:
    differences = {row.init: row.differences[baseline] for row in rows if baseline in row.differences}
    verdicts = {init: difference.verdict for init, difference in differences.items()}
    better = [init for init, verdict in verdicts.items() if verdict == "better"]
    worse = [init for init, verdict in verdicts.items() if verdict == "worse"]
    if not verdicts:
        return f"There is nothing to compare {baseline} with."
    if set(verdicts.values()) == {"one seed"}:
        return f"One seed gives no interval, so nothing is said of final scores against {baseline}."
    num_tied = len(verdicts) - len(better) - len(worse)
    parts = [_count(len(worse), "ends worse", "end worse"), _count(num_tied, "is tied", "are tied")]
    seeds = sorted({difference.num_seeds for difference in differences.values()})
    over = f" ({' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} seeds)"
    rest = over + "".join(f"{mark} {part}" for mark, part in zip(";,", filter(None, parts), strict=False))
    if better:
        verb = "ends" if len(better) == 1 else "end"
        return f"{listed(better)} {verb} better than {baseline}, each at its best learning rate{rest}."
    return f"No initialisation is better than {baseline} at its best learning rate{rest}."


def _speed_sentence(baseline: str, rows: Sequence[InitSummary]) -> str:
    ratios = {
        row.init: ratio
        for row in rows
        if row.init != baseline and baseline in row.speeds and (ratio := row.speeds[baseline].ratio) is not None
        if ratio.num_seeds > 1
    }
    if not ratios:
        return ""
    faster = {init: ratio for init, ratio in ratios.items() if ratio.verdict == "better"}
    way = f"{WAY} of the improvement that {baseline} ends with"
    if not faster:
        return f"None is faster to {way}."
    best = min(faster, key=lambda init: faster[init].value)
    ratio = ratio_cell(faster[best], compared=False)
    others = f", the least of {len(faster)} that need fewer" if len(faster) > 1 else ""
    return f"To {way}, {best} needs {ratio.text} {ratio.detail} of {baseline}'s own steps{others}."


def _untuned_sentence(comparison: Comparison, rows: Sequence[InitSummary]) -> str:
    """Of the mean over learning rates, early and late."""
    parts: list[str] = []
    for step in filter(None, (comparison.early_step, comparison.last_step)):
        for baseline in comparison.baselines:
            found = [row.late if step == comparison.last_step else row.early for row in rows]
            verdicts = [r.differences[baseline].verdict for r in found if r and baseline in r.differences]
            if set(verdicts) - {"one seed"}:
                num_better = verdicts.count("better")
                parts.append(f"{num_better} of {len(verdicts)} are better than {baseline} at step {step}")
    if len(comparison.shared_learning_rates) < 2 or not parts:
        return ""
    rates = len(comparison.shared_learning_rates)
    return f"In the mean over the {rates} learning rates, which is what an untuned one gives, {listed(parts)}."


def _reservations(comparison: Comparison, rows: Sequence[InitSummary]) -> list[str]:
    sentences: list[str] = []
    num_seeds = min(row.num_seeds for row in rows)
    chance = chance_of_verdict(num_seeds)
    if chance is not None:
        sentences.append(
            f"The intervals are over {num_seeds} seeds: between two equal initialisations, chance alone gives a "
            f"verdict other than tied in about {100 * chance:.0f} % of comparisons, and there are {len(rows) - 1} with "
            "each baseline."
        )
    elif num_seeds == 1:
        sentences.append("There is one seed, at least for some: differences of that size may be chance.")
    num_finished = sum(comparison.finished(run) for run in comparison.runs)
    if comparison.missing:
        unfinished = sorted({init for init, _, _ in comparison.missing})
        sentences.append(
            f"The grid is incomplete: {len(comparison.missing)} of {num_finished + len(comparison.missing)} runs are "
            f"missing (of {listed(unfinished)}). What is said here is of the others."
        )
    if comparison.last_step < comparison.config["max_train_steps"]:
        sentences.append(f"Runs end at step {comparison.last_step} of {comparison.config['max_train_steps']}.")
    edge = [row.init for row in rows if row.learning_rate in _ends(comparison, row.init)]
    if edge:
        which = "each initialisation" if len(edge) == len(rows) else listed(edge)
        sentences.append(
            f"The best learning rate of {which} lies at the edge of those tried: a better one may lie outside."
        )
    diverged = [run.name for run in comparison.runs if any(map(math.isinf, run.curves[comparison.primary].values()))]
    if diverged:
        sentences.append(f"{len(diverged)} of {num_finished} runs diverged, and count as worst: {_some(diverged)}.")
    return sentences


def _ends(comparison: Comparison, init: str) -> list[float]:
    """The lowest and the highest learning rate that an initialisation was run with."""
    rates = list(comparison.grid(init))
    return [rates[0], rates[-1]]


def how_to_read(comparison: Comparison, rows: Sequence[InitSummary]) -> list[str]:
    """What the numbers of the report rest on, a sentence or two each."""
    counts = sorted({row.num_parameters for row in rows})
    equal = f"{counts[0]:,} each" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    num_train, num_validation, examples = data_counts(comparison)
    heads = sorted({run.num_head_parameters for run in comparison.runs} - {0})
    head = f", and those of the head, which trains in full: {heads[0]:,}" if heads else ""
    crossings = "linear between evaluated steps, seed by seed"
    counted: list[str] = []
    if METRICS[comparison.primary.partition("@")[0]].counted:
        crossings = "linear between the medians of three evaluations in a row, seed by seed"
        counted.append(
            f"The {column_label(comparison.primary)} counts {num_validation} held-out {examples}, the same in every "
            f"run: one of them is {number(1 / num_validation)}. The intervals are over seeds, and say nothing of other "
            f"{examples}."
        )
    return [
        f"Every run trains on the same {num_train} {examples} and is scored on {num_validation} "
        f"held-out ones. Trained parameters: {equal}{head}.",
        *counted,
        "The best learning rate is the best mean over seeds of the primary metric at the last step. It is chosen on "
        "the scores that are shown, for every initialisation alike, so all of them are slightly too good.",
        f"Intervals are paired percentile bootstraps over seeds ({NUM_RESAMPLES:,} resamples of the differences seed "
        "by seed). Better or worse says that the interval excludes no difference, tied that it does not. Of few "
        "seeds the intervals are too narrow, and a list of many comparisons will hold some verdicts by chance.",
        f"Steps to a final score are those to the first crossing, {crossings}. A run "
        "that never gets there makes the mean infinite (never), and the interval of a ratio ends at never.",
        "A run that diverged has an infinitely bad score; in a mean over learning rates it counts as the worst score "
        "that any run had at any step.",
        "Seconds are of one machine and of runs that may have shared it; compare them only with one another.",
    ]


def data_counts(comparison: Comparison) -> tuple[int, int, str]:
    """Numbers of training and held-out examples, and what they are."""
    config = comparison.config
    if comparison.generates_images:
        return config["num_images"], config["num_heldout_images"], "images"
    return config["num_train"], config["num_validation"], config["examples"]


def _count(number: int, one: str, many: str) -> str:
    return "" if number == 0 else f"{number} {one if number == 1 else many}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_MAX_NAMES]) + (f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else "")


def listed(names: Sequence[str]) -> str:
    """Names as a sentence has them, with commas and an "and"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else ""
