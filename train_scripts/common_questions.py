"""Names of the first version, for programs that import them; what they name is in `lorainit_diffusers.training`."""

from collections.abc import Mapping

from lorainit_diffusers.training.questions.conversations import QuestionRecord, read_questions
from lorainit_diffusers.training.questions.data import hold_out_questions, read_question_dataset
from lorainit_diffusers.training.questions.options import QuestionDataOptions
from lorainit_diffusers.training.questions.task import QuestionAnsweringTask

__all__ = ["QuestionAnsweringTask", "QuestionRecord", "read_questions"]

_hold_out = hold_out_questions


def _read_dataset(  # pyright: ignore[reportUnusedFunction]
    args: QuestionDataOptions, columns: Mapping[str, str]
) -> tuple[list[QuestionRecord], list[QuestionRecord]]:
    """As `read_question_dataset`, of the dataset that the options name."""
    return read_question_dataset(args, str(args.dataset_name), columns)
