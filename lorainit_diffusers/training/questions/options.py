"""The options of a vision-language model's training: its questions, and what of them is trained on and evaluated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, TypeVar

from lorainit_diffusers.ranges import COUNT
from lorainit_diffusers.training.bundled import BUNDLED_BASES, BUNDLED_QUESTIONS, bundled
from lorainit_diffusers.training.choices import names_in
from lorainit_diffusers.training.options.checks import require_package
from lorainit_diffusers.training.options.fields import MayChange, Options, Place, given, option
from lorainit_diffusers.training.options.initialisation import LoraOptions
from lorainit_diffusers.training.options.model import BaseOptions
from lorainit_diffusers.training.options.optimisation import OptimizerOptions
from lorainit_diffusers.training.options.task import TaskOptions, check_task
from lorainit_diffusers.training.ranges import FRACTION, LEARNING_RATE


@dataclass(frozen=True, kw_only=True)
class QuestionOptions(Options):
    """All that the task reads beside the base: the questions, and what of them is trained on and evaluated."""

    _argument_group_name = "questions"

    train_data_file: Annotated[str | None, Place("training data")] = option(
        None, "JSONL of image, question and answer, or of chat messages (default: a bundled set)"
    )
    validation_data_file: Annotated[str | None, Place("validation data")] = option(
        None, "the same to validate on (default: validation.jsonl beside train.jsonl, or a part of the training set)"
    )
    validation_fraction: Annotated[float | None, replace(FRACTION, remedy="such as 0.2")] = option(
        None, "of the images, held out with all of their questions (default 0.1)"
    )
    image_dir: Annotated[str | None, Place("training data")] = option(
        None, "where the images of the files are (default: the file's folder)"
    )
    allow_images_outside: Annotated[bool, MayChange("images are compared by their content")] = option(
        False, "the files may name images outside of that folder, such as absolute paths"
    )
    dataset_name: Annotated[str | None, Place("training data")] = option(
        None, "hub name or folder of a dataset with such columns, instead of the files"
    )
    dataset_config_name: str | None = option(None, "configuration of that dataset")
    image_column: str = option("image", "column of the images (default: image, or images)")
    question_column: str = option("question", "column of the questions (default: question)")
    answer_column: str = option("answer", "column of the answers (default: answer); of a list, the first is trained on")
    system_prompt: str | None = option(None, "comes before every conversation that has none")
    max_image_pixels: Annotated[int, COUNT, MayChange("a larger image is refused, not changed")] = option(
        2**28, "an image of more pixels, decoded or resized, is an error (default 2^28: 268 megapixels)"
    )
    max_train_samples: Annotated[int | None, COUNT] = option(None, "use the first training questions only")
    max_validation_samples: Annotated[int | None, COUNT] = option(None, "use the first validation questions only")
    max_length: Annotated[int | None, COUNT] = option(
        None, "tokens of a sample; a longer one is an error: nothing is cut"
    )
    adapt: list[str] = option(
        ["language"], "parts that get a LoRA (default: language)", choices=names_in("families/vlm.py", "PARTS")
    )
    statistics_tokens: list[str] = option(
        ["answer", "image"],
        "rows of the language model that the initialisation sees (default: answer image)",
        choices=names_in("families/vlm.py", "ROWS"),
    )
    max_new_tokens: Annotated[int | None, COUNT] = option(
        None, "where a generated answer is cut (default: what the longest answer of the data needs, from 32 to 512)"
    )
    eval_batch_size: Annotated[int | None, COUNT, MayChange("every answer is its own")] = option(
        None, "questions answered at once (default: 4 x train_batch_size)"
    )
    num_samples: Annotated[int, COUNT, MayChange("what the report shows")] = option(
        12, "questions with their answers in the report (default 12)"
    )


@dataclass(frozen=True, kw_only=True)
class NoHeadOptions(Options):
    """An option of the other task, so that whoever gives it hears why it has no effect."""

    _argument_group_name = "head"

    head_lr: Annotated[float | None, LEARNING_RATE, MayChange("nothing is trained in full here")] = option(
        None, "of classifiers only: nothing is trained in full here"
    )


@dataclass(frozen=True, kw_only=True)
class QuestionDataOptions(BaseOptions, QuestionOptions):
    """A vision-language model with its questions."""


@dataclass(frozen=True, kw_only=True)
class QuestionTaskOptions(QuestionDataOptions, LoraOptions, OptimizerOptions):
    """All that a task of questions reads, in a training and in a comparison."""


@dataclass(frozen=True, kw_only=True)
class QuestionTrainingOptions(QuestionTaskOptions, TaskOptions, NoHeadOptions):
    """Options of `train_vlm_lora.py`."""

    FAMILIES = ("vlm",)


SomeOptions = TypeVar("SomeOptions", bound=QuestionDataOptions)


def resolve_question_training(options: QuestionTrainingOptions) -> QuestionTrainingOptions:
    """Fill in what depends on other options, and find what cannot work before anything is loaded.

    Raises:
        ValueError: Naming the option, its value and the remedy.
    """
    if given(options.pretrained_model_name_or_path) is None:
        base = bundled(BUNDLED_BASES["vlm"], "--pretrained_model_name_or_path")
        options = replace(options, pretrained_model_name_or_path=base)
    if options.head_lr is not None:
        raise ValueError(f"--head_lr {options.head_lr} has no effect: nothing is trained in full here; leave it out")
    check_task(options)
    return resolve_questions(options)


def resolve_questions(options: SomeOptions) -> SomeOptions:
    """Fill in the options whose default depends on others, and check them; a second call changes nothing.

    Raises:
        ValueError: Naming the option, its value and the remedy.
    """
    train_data_file, validation_data_file = options.train_data_file, options.validation_data_file
    if options.dataset_name is not None:
        for name in ("train_data_file", "validation_data_file", "image_dir"):
            if getattr(options, name) is not None:
                raise ValueError(f"--dataset_name and --{name} exclude each other: give one of them")
        require_package("datasets", "--dataset_name")
    elif options.dataset_config_name is not None:
        raise ValueError("--dataset_config_name needs --dataset_name")
    elif train_data_file is None:
        train_data_file = bundled(BUNDLED_QUESTIONS / "train.jsonl", "--train_data_file")
    if options.validation_fraction is not None:
        if validation_data_file is not None:
            raise ValueError("--validation_fraction and --validation_data_file exclude each other: give one of them")
    elif train_data_file is not None and validation_data_file is None:
        beside = Path(train_data_file).with_name("validation.jsonl")
        if Path(train_data_file).name == "train.jsonl" and beside.is_file():
            validation_data_file = str(beside)
    return replace(options, train_data_file=train_data_file, validation_data_file=validation_data_file)
