"""The options of comparisons on tasks with answers that are right or wrong."""

from __future__ import annotations

from dataclasses import dataclass

from lorainit_diffusers.comparison.options import HeadRatioOptions, TaskComparisonOptions
from lorainit_diffusers.training.classification.options import ClassTaskOptions
from lorainit_diffusers.training.questions.options import QuestionTaskOptions


@dataclass(frozen=True, kw_only=True)
class ClassifierComparisonOptions(TaskComparisonOptions, HeadRatioOptions, ClassTaskOptions):
    """A comparison on a classifier, whose head is trained in full beside the adapters."""


@dataclass(frozen=True, kw_only=True)
class QuestionComparisonOptions(TaskComparisonOptions, QuestionTaskOptions):
    """A comparison on a vision-language model."""
