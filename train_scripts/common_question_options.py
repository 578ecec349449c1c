"""The options of a vision-language model's training: its questions, and what of them is trained on and evaluated."""

from __future__ import annotations

import argparse
from pathlib import Path

from common_options import require_package

from lorainit_diffusers.training.bundled import BUNDLED_QUESTIONS
from lorainit_diffusers.training.choices import names_in
from lorainit_diffusers.training.ranges import check_options


def add_question_arguments(parser: argparse.ArgumentParser) -> None:
    """All that the task reads beside the base: the questions, and what of them is trained on and evaluated."""
    add = parser.add_argument_group("questions").add_argument
    add("--train_data_file", help="JSONL of image, question and answer, or of chat messages (default: a bundled set)")
    add("--validation_data_file", help="default: validation.jsonl beside train.jsonl, or a part of the training set")
    add("--validation_fraction", type=float, help="of the images, held out with all of their questions (default 0.1)")
    add("--image_dir", help="where the images of the files are (default: the file's folder)")
    add("--dataset_name", help="hub name or folder of a dataset with such columns, instead of the files")
    add("--dataset_config_name", help="configuration of that dataset")
    add("--image_column", default="image", help="default: image (or images)")
    add("--question_column", default="question", help="default: question")
    add("--answer_column", default="answer", help="default: answer; of a list, the first is trained on")
    add("--system_prompt", help="comes before every conversation that has none")
    add("--max_train_samples", type=int, help="use the first training questions only")
    add("--max_validation_samples", type=int, help="use the first validation questions only")
    add(
        "--max_length",
        type=int,
        help="tokens of a sample; a longer one is an error: nothing is cut",
    )
    add(
        "--adapt",
        nargs="+",
        choices=names_in("families/vlm.py", "PARTS"),
        default=["language"],
        help="parts that get a LoRA (default: language)",
    )
    add(
        "--statistics_tokens",
        nargs="+",
        choices=names_in("families/vlm.py", "ROWS"),
        default=["answer", "image"],
        help="rows of the language model that the initialisation sees (default: answer image)",
    )
    add(
        "--max_new_tokens",
        type=int,
        help="where a generated answer is cut (default: what the longest answer of the data needs, from 32 to 512)",
    )
    add("--eval_batch_size", type=int, help="questions answered at once (default: 4 x train_batch_size)")
    add("--num_samples", type=int, default=12, help="questions with their answers in the report (default 12)")


def resolve_question_options(args: argparse.Namespace) -> None:
    """Fill in the options whose default depends on others, and check them; a second call changes nothing.

    Raises:
        ValueError: naming the option, its value and the remedy.
    """
    check_options(vars(args))
    if args.dataset_name is not None:
        for name in ("train_data_file", "validation_data_file", "image_dir"):
            if getattr(args, name) is not None:
                raise ValueError(f"--dataset_name and --{name} exclude each other: give one of them")
        require_package("datasets", "--dataset_name")
    elif args.dataset_config_name is not None:
        raise ValueError("--dataset_config_name needs --dataset_name")
    elif args.train_data_file is None:
        args.train_data_file = str(BUNDLED_QUESTIONS / "train.jsonl")
    if args.validation_fraction is not None:
        if args.validation_data_file is not None:
            raise ValueError("--validation_fraction and --validation_data_file exclude each other: give one of them")
    elif args.train_data_file is not None and args.validation_data_file is None:
        beside = Path(args.train_data_file).with_name("validation.jsonl")
        if Path(args.train_data_file).name == "train.jsonl" and beside.is_file():
            args.validation_data_file = str(beside)
