"""Breaks of what is measured: validation, metrics, answers, the analysis of a comparison."""

from __future__ import annotations

from breaks import Break

BREAKS: tuple[Break, ...] = (
    Break(
        "validation batches share their noise",
        "lorainit_diffusers/evaluation/validation.py",
        "torch.Generator().manual_seed(_SEED + 1 + index)",
        "torch.Generator().manual_seed(_SEED + 1)",
        ("tests/evaluation/test_validation.py::test_every_image_of_every_batch_has_noise_of_its_own",),
    ),
    Break(
        "validation weighs every batch alike",
        "lorainit_diffusers/evaluation/validation.py",
        "total, seen = total + float(loss) * size, seen + size",
        "total, seen = total + float(loss), seen + 1",
        ("tests/evaluation/test_validation.py::test_images_count_alike_in_batches_of_any_size",),
    ),
    Break(
        "KID keeps the diagonals",
        "lorainit_diffusers/evaluation/metrics.py",
        "within_x = (_kernel_sum(x, x) - _kernel(x.square().sum(1), x.shape[1])) / (num_x * (num_x - 1))",
        "within_x = _kernel_sum(x, x) / num_x**2",
        ("tests/evaluation/test_metrics.py::test_kid_of_the_full_set_is_the_unbiased_mmd",),
    ),
    Break(
        "diversity averages a sample with itself",
        "lorainit_diffusers/evaluation/metrics.py",
        "/ (len(rows) * (len(rows) - 1)))",
        "/ len(rows) ** 2)",
        ("tests/evaluation/test_metrics.py::test_diversity_averages_pairs_within_prompts_then_prompts",),
    ),
    Break(
        "drift is a similarity",
        "lorainit_diffusers/evaluation/metrics.py",
        'return 1.0 - float(_cosines(adapted, base, "adapted", "base").mean())',
        'return float(_cosines(adapted, base, "adapted", "base").mean())',
        ("tests/evaluation/test_metrics.py::test_paired_metrics_are_the_mean_cosine",),
    ),
    Break(
        "confusion matrix is transposed",
        "lorainit_diffusers/evaluation/classification.py",
        "labels.long() * (num_classes + 1) + columns.long()",
        "columns.long() * (num_classes + 1) + labels.long()",
        ("tests/evaluation/test_classification.py::test_counts_and_shares",),
    ),
    Break(
        "macro accuracy over all examples",
        "lorainit_diffusers/evaluation/classification.py",
        "    return sum(shares) / len(shares)\n",
        "    return accuracy(confusion)\n",
        ("tests/evaluation/test_classification.py::test_counts_and_shares",),
    ),
    Break(
        "token F1 is a precision",
        "lorainit_diffusers/evaluation/answers.py",
        "return 2 * shared / (len(predicted) + len(wanted))",
        "return shared / len(predicted)",
        ("tests/evaluation/test_answers.py::test_scores",),
    ),
    Break(
        "the last of several answers counts alone",
        "lorainit_diffusers/evaluation/answers.py",
        "return max(float(normalize_answer(prediction) == answer) for answer in _normalized(answers))",
        "return [float(normalize_answer(prediction) == answer) for answer in _normalized(answers)][-1]",
        ("tests/evaluation/test_answers.py::test_scores",),
    ),
    Break(
        "best learning rate is the highest of equal ones",
        "lorainit_diffusers/comparison/analysis.py",
        "(np.mean(costs[rate]), costs[rate].count(math.inf), rate)",
        "(np.mean(costs[rate]), costs[rate].count(math.inf), -rate)",
        ("tests/comparison/test_analysis.py::test_of_equally_good_learning_rates_the_lowest_is_the_best",),
    ),
    Break(
        "a run that diverged is left out",
        "lorainit_diffusers/comparison/analysis.py",
        "            return curve[max(curve)]\n        return curve.get(step)",
        "            return None\n        return curve.get(step)",
        ("tests/comparison/test_analysis.py::test_a_diverged_run_is_the_worst_and_is_not_dropped",),
    ),
    Break(
        "validation timesteps are not stratified",
        "lorainit_diffusers/evaluation/validation.py",
        "with evaluating(family), family.stratified_timesteps(num_samples, torch.Generator().manual_seed(_SEED)):",
        "with evaluating(family):",
        ("tests/scripts/test_loop_independence.py::test_validation_timesteps_are_stratified_and_always_the_same",),
    ),
    Break(
        "validation draws other noise every time",
        "lorainit_diffusers/evaluation/validation.py",
        "torch.Generator().manual_seed(_SEED + 1 + index)",
        "torch.Generator().manual_seed(int(torch.randint(2**31, ())))",
        ("tests/scripts/test_loop_independence.py::test_validation_timesteps_are_stratified_and_always_the_same",),
    ),
    Break(
        "-5 is the answer 5",
        "lorainit_diffusers/evaluation/answers.py",
        '"".join(_BRACKETS) + ",;:"',
        '"".join(_BRACKETS) + ",;:-"',
        ("tests/evaluation/test_answers.py::test_what_is_the_same_answer_and_what_is_not",),
    ),
)
