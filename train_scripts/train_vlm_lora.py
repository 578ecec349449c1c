"""Train a LoRA on a vision-language model with a choice of initialisation: questions about images, and their answers.

    accelerate launch train_scripts/train_vlm_lora.py --init cntlora

trains on the bundled base and a bundled set of questions about pictures in a style that it has never seen. With your
own:

    accelerate launch train_scripts/train_vlm_lora.py --init cntlora --mixed_precision bf16 \
        --pretrained_model_name_or_path HuggingFaceTB/SmolVLM-256M-Instruct --train_data_file my_questions.jsonl \
        --train_batch_size 4 --gradient_accumulation_steps 4 --learning_rate 2e-4

where a line of my_questions.jsonl is `{"image": "a.png", "question": "What is this?", "answer": "a red apple"}`, or a
conversation of `messages`. The options are in `common_options.py` and `common_questions.py`, the training loop in
`common_tasks.py`; what one training step is says `lorainit_diffusers/families/vlm.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from common_question_options import add_question_arguments, resolve_question_options
from common_task_options import make_task_parser, resolve_task_options

from lorainit_diffusers.training.bundled import BUNDLED_BASES
from lorainit_diffusers.training.cli_parser import run_script
from lorainit_diffusers.training.defaults import parse_with_defaults


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    return make_task_parser(
        __doc__,
        BUNDLED_BASES["vlm"],
        add_question_arguments,
        "vlm",
    )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, checked as far as that needs no model.

    Raises:
        ValueError: naming the option, its value and the remedy.
    """
    args = parse_with_defaults(make_parser(), argv, "vlm")
    if args.head_lr is not None:
        raise ValueError(f"--head_lr {args.head_lr} has no effect: nothing is trained in full here; leave it out")
    resolve_task_options(args, "vlm-lora")
    resolve_question_options(args)
    from lorainit_diffusers.families.vlm import VisionLanguageFamily  # now that nothing light is wrong

    VisionLanguageFamily.check_base(args.pretrained_model_name_or_path)
    return args


if __name__ == "__main__":
    run_script(parse_args)  # a mistake in the options is answered before the imports below, which take seconds

from common_questions import QuestionAnsweringTask
from common_tasks import train_task


def main(argv: Sequence[str] | None = None) -> Path:
    """Train one LoRA and return the directory that it was written to."""
    args = parse_args(argv)
    base = args.pretrained_model_name_or_path
    usage = [
        "from peft import PeftModel",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        f"model = AutoModelForImageTextToText.from_pretrained({base!r})",
        f"processor = AutoProcessor.from_pretrained({base!r})",
    ]
    task = partial(QuestionAnsweringTask, args)
    return train_task(args, task, name="train_vlm_lora", tags=["image-text-to-text"], usage=usage)


if __name__ == "__main__":
    run_script(main)
