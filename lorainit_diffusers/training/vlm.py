"""Train a LoRA on a vision-language model with a choice of initialisation: questions about images, and their answers.

    accelerate launch train_scripts/train_vlm_lora.py --init cntlora

trains on the bundled base and a bundled set of questions about pictures in a style that it has never seen. With your
own:

    accelerate launch train_scripts/train_vlm_lora.py --init cntlora --mixed_precision bf16 \
        --pretrained_model_name_or_path HuggingFaceTB/SmolVLM-256M-Instruct --train_data_file my_questions.jsonl \
        --train_batch_size 4 --gradient_accumulation_steps 4 --learning_rate 2e-4

where a line of my_questions.jsonl is `{"image": "a.png", "question": "What is this?", "answer": "a red apple"}`, or a
conversation of `messages`. The options are in `training/questions/options.py`, the run from top to bottom in
`training/train.py`; what one training step is says `lorainit_diffusers/families/vlm.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lorainit_diffusers.training.cli import run_script
from lorainit_diffusers.training.options.parser import parse_options
from lorainit_diffusers.training.questions.options import QuestionTrainingOptions, resolve_question_training


def parse_args(argv: Sequence[str] | None = None) -> QuestionTrainingOptions:
    """The options, checked as far as that needs no model.

    Raises:
        ValueError: Naming the option, its value and the remedy.
    """
    options = resolve_question_training(parse_options(QuestionTrainingOptions, argv, __doc__))
    from lorainit_diffusers.families.vlm import VisionLanguageFamily  # now that nothing light is wrong

    VisionLanguageFamily.check_base(options.pretrained_model_name_or_path)
    return options


def main(argv: Sequence[str] | None = None) -> Path:
    """Train one LoRA and return the directory that it was written to."""
    options = parse_args(argv)  # a mistake in the options is answered before the imports below, which take seconds
    from lorainit_diffusers.training.questions.task import QuestionAnsweringTask
    from lorainit_diffusers.training.task import train_task

    task = partial(QuestionAnsweringTask, options)
    return train_task(options, task, name="train_vlm_lora", tags=["image-text-to-text"])


if __name__ == "__main__":
    run_script(main)
