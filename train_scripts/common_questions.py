"""Questions about images for the scripts that train vision-language models: reading them, and the task they make up."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from common import evaluating, print_once
from common_banner import data_source, header_sizes
from common_data import (
    DataOrder,
    DatasetImage,
    ImageRecord,
    cast_images,
    load_image,
    load_splits,
)
from common_question_options import add_question_arguments as add_question_arguments
from common_question_options import resolve_question_options
from common_run import lora_targets
from common_tasks import STAGES, stages
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from lorainit_diffusers.evaluation.answers import exact_match, token_f1
from lorainit_diffusers.evaluation.document import Block, Cell, Heading, Picture, Table, Text, to_html
from lorainit_diffusers.evaluation.plots import mark_best, save_figure
from lorainit_diffusers.families.base import ModelFamily
from lorainit_diffusers.families.vlm import COMPONENT, IGNORED, TooLongError, VisionLanguageFamily
from lorainit_diffusers.files import write_text
from lorainit_diffusers.progress import progress_bar
from lorainit_diffusers.training.banner import Line, caption_line, count_line, size_lines
from lorainit_diffusers.training.best import best_line
from lorainit_diffusers.training.data.files import find_file
from lorainit_diffusers.training.data.grouping import content_keys, hold_out
from lorainit_diffusers.training.data.rows import json_entries
from lorainit_diffusers.training.data.splits import validation_split

PLACEHOLDER = "<image>"
_IMAGES_FIRST = re.compile(rf"^(\s*{PLACEHOLDER}\s*)+")
# LLaVA's names of those who speak, and those of chat messages.
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# Of all encoded samples together; what does not fit is encoded again whenever it is needed.
CACHE_BYTES = 4_000_000_000
VALIDATION_FRACTION = 0.1
# Tokens that a generated answer may have when the user does not say: what the data need, within these limits.
NEW_TOKENS = (32, 512)
# Training batches that one evaluation batch, which keeps no activations, is worth.
EVALUATION_RATIO = 4


# -------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class QuestionRecord:
    """A conversation about images that ends with an answer.

    Attributes:
        where: file and line, for messages.
        messages: as `VisionLanguageFamily.encode` takes them; the last is the assistant's.
        images: of the image parts, in their order.
        answers: that count as right; the first is the last message's.
        kind: of question; empty where the data does not say.
    """

    where: str
    messages: list[dict[str, Any]] = field(compare=False)
    images: tuple[ImageRecord, ...]
    answers: tuple[str, ...]
    kind: str = ""

    @property
    def question(self) -> str:
        """The text of the last question."""
        asked = [message for message in self.messages if message["role"] == "user"]
        return text_of(asked[-1]).strip() if asked else ""


def read_question_data(args: argparse.Namespace) -> tuple[list[QuestionRecord], list[QuestionRecord]]:
    """Training and validation questions of the options' files or dataset; every image has been decoded once.

    Raises:
        FileNotFoundError: when a file or an image does not exist.
        ValueError: when a line cannot be understood or an image cannot be read; naming file and line.
    """
    columns = {"image": args.image_column, "question": args.question_column, "answer": args.answer_column}
    validation: list[QuestionRecord] = []
    if args.dataset_name is not None:
        records, validation = _read_dataset(args, columns)
    else:
        read = partial(read_questions, image_dir=args.image_dir, columns=columns, system_prompt=args.system_prompt)
        records = read(args.train_data_file, flag="--train_data_file")
        if args.validation_data_file is not None:
            validation = read(args.validation_data_file, flag="--validation_data_file")
    if not validation or args.validation_fraction is not None:
        records, validation = _hold_out(records, args.validation_fraction or VALIDATION_FRACTION)
        return records[: args.max_train_samples], validation[: args.max_validation_samples]
    records, validation = records[: args.max_train_samples], validation[: args.max_validation_samples]
    _warn_of_shared_images(records, validation)
    return records, validation


def read_questions(
    path: str | Path,
    *,
    flag: str,
    image_dir: str | None = None,
    columns: Mapping[str, str] | None = None,
    system_prompt: str | None = None,
) -> list[QuestionRecord]:
    """The conversations of a JSONL file (or of a JSON file with a list of them).

    A line is one of

    - `{"image": "a.png", "question": "...", "answer": "..."}`; `images` may be several and `answer` a list, and `type`
      may name the kind of question;
    - `{"image": "a.png", "messages": [{"role": "user", "content": ...}, ...]}`, the content a text with `<image>` where
      an image belongs, or parts `{"type": "image"}` and `{"type": "text", "text": ...}`;
    - `{"image": "a.png", "conversations": [{"from": "human", "value": "<image> ..."}, {"from": "gpt", ...}]}`, as
      LLaVA has them.

    Args:
        path: the file.
        flag: the option that gave it, for messages.
        image_dir: folder that images are relative to; that of the file by default.
        columns: other names of `image`, `question` and `answer`.
        system_prompt: comes before a conversation that has none.

    Raises:
        FileNotFoundError: when the file, or an image, does not exist.
        ValueError: when a line cannot be understood.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{flag} {str(path)!r} is not a file; give a JSONL file of questions")
    folder = file.parent if image_dir is None else Path(image_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"--image_dir {image_dir!r} is not a directory; give the folder of the images")

    def find_image(name: Any, where: str) -> ImageRecord:
        if not isinstance(name, str) or not name:
            raise ValueError(f"{where}: the image is {name!r}; give the name of a file")
        found = find_file(folder, name)
        if found is None:
            raise FileNotFoundError(
                f"{where}: there is no image {str(folder / name)!r}; put it there, or set --image_dir"
            )
        return ImageRecord(found, "")

    entries = json_entries(file, label=str(file), what="conversations")
    records = [_record(row, where, find_image, columns or {}, system_prompt) for where, row in entries]
    if not records:
        raise ValueError(f"{flag} {str(path)!r} has no lines in it; give a file with questions")
    return records


def _record(
    row: Any,
    where: str,
    find_image: Callable[[Any, str], ImageRecord],
    columns: Mapping[str, str],
    system_prompt: str | None,
) -> QuestionRecord:
    """What one line means."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: not an object but {type(row).__name__}; write one object a line")
    line = {str(name): value for name, value in cast("Mapping[Any, Any]", row).items()}
    image_column, question_column, answer_column = (columns.get(name, name) for name in ("image", "question", "answer"))
    given = [line[name] for name in (image_column, "images") if line.get(name) is not None]
    names: list[Any] = [name for value in given for name in (value if isinstance(value, (list, tuple)) else [value])]
    answers: list[str] = []
    if "messages" in line or "conversations" in line:
        messages = _messages(line, where, names)
    elif question_column in line and answer_column in line:
        question = " ".join(_answers(line[question_column], f"{where}: the question"))
        text = question.replace(PLACEHOLDER, "").strip()
        if not text:
            raise ValueError(f"{where}: the question is empty; fill it in or remove the line")
        answers = _answers(line[answer_column], f"{where}: the answer")
        content: list[dict[str, Any]] = [*({"type": "image"} for _ in names), {"type": "text", "text": text}]
        among_words = len(names) > 1 and PLACEHOLDER in _IMAGES_FIRST.sub("", question)
        if among_words or question.count(PLACEHOLDER) not in (0, len(names)):  # a wrong number is found below
            content = _split_placeholders(question)
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answers[0] if answers else ""}]})
    else:
        found = ", ".join(line) or "nothing"
        raise ValueError(
            f"{where}: has {found}; give {question_column} and {answer_column}, or messages, or conversations "
            "(other names: --question_column, --answer_column)"
        )
    for number, message in enumerate(messages, start=1):
        if message["role"] == "assistant" and not text_of(message).strip():
            which = "the answer" if answers or "messages" not in line else f"message {number}, an answer,"
            raise ValueError(f"{where}: {which} is empty; fill it in or remove the line")
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError(
            f"{where}: the last message is not the assistant's, so nothing is to be trained on; add an answer"
        )
    places = sum(part["type"] == "image" for message in messages for part in message["content"])
    if places != len(names):
        raise ValueError(
            f"{where}: {len(names)} images, but {places} image placeholders in the messages; write {PLACEHOLDER} or "
            'the part {"type": "image"} where each belongs'
        )
    if system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": [{"type": "text", "text": system_prompt}]}, *messages]
    answers = answers or [text_of(messages[-1]).strip()]
    images = tuple(find_image(name, where) for name in names)
    return QuestionRecord(where, messages, images, tuple(answers), str(line.get("type") or ""))


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message, without its images."""
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text")


def _answers(value: Any, what: str) -> list[str]:
    """One answer, or several that count as right; numbers become text.

    Raises:
        ValueError: for what is neither text nor a number; `what` begins the message.
    """
    values = value if isinstance(value, (list, tuple)) else [value]
    texts: list[str] = []
    for each in cast("Sequence[Any]", values):
        if each is None:
            continue
        if not isinstance(each, (str, int, float)) or (isinstance(each, float) and not math.isfinite(each)):
            raise ValueError(f"{what} is {each!r}; give a text or a number")
        texts.append(str(each).strip())
    return [text for text in texts if text]


def _messages(line: Mapping[str, Any], where: str, names: list[Any]) -> list[dict[str, Any]]:
    """The messages of a chat or of LLaVA's conversations; images that parts name are added to `names`."""
    key = "messages" if "messages" in line else "conversations"
    entries = line[key]
    if not isinstance(entries, (list, tuple)) or not entries:
        raise ValueError(f"{where}: {key} is {entries!r}; give a list of messages")
    inside = not names
    messages: list[dict[str, Any]] = []
    for number, entry in enumerate(cast("Sequence[Any]", entries), start=1):
        role = (entry.get("role") or entry.get("from")) if isinstance(entry, Mapping) else None
        if role not in ROLES:
            raise ValueError(f"{where}: message {number} has the role {role!r}; roles are {', '.join(ROLES)}")
        content = entry.get("content", entry.get("value"))
        parts: list[dict[str, Any]] = []
        for part in [content] if isinstance(content, str) else (content if isinstance(content, list) else [None]):
            if isinstance(part, str):
                parts += _split_placeholders(part)
            elif isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
                parts += _split_placeholders(part["text"])
            elif isinstance(part, Mapping) and part.get("type") == "image":
                source = next((part[name] for name in ("image", "path", "url") if part.get(name) is not None), None)
                if source is not None and inside:
                    names.append(source)
                parts.append({"type": "image"})
            else:
                raise ValueError(
                    f"{where}: message {number} has the content {part!r}; give a text, or parts of the types text "
                    "and image"
                )
        if ROLES[role] == "assistant" and all(part["type"] == "text" for part in parts):
            # one text, as it is trained on and compared with, however a chat template would join its parts
            parts = [{"type": "text", "text": "".join(part["text"] for part in parts)}]
        messages.append({"role": ROLES[role], "content": parts})
    return messages


def _split_placeholders(text: str) -> list[dict[str, Any]]:
    """A text with `<image>` in it as parts; the line breaks around an image are the chat template's business."""
    parts: list[dict[str, Any]] = []
    pieces = text.split(PLACEHOLDER)
    for index, piece in enumerate(pieces):
        stripped = piece.strip("\n") if len(pieces) > 1 else piece
        if stripped:
            parts.append({"type": "text", "text": stripped})
        if index + 1 < len(pieces):
            parts.append({"type": "image"})
    return parts


def _read_dataset(
    args: argparse.Namespace, columns: Mapping[str, str]
) -> tuple[list[QuestionRecord], list[QuestionRecord]]:
    """Training and validation rows of a dataset of the `datasets` library; images stay encoded where they are."""
    flag = f"--dataset_name {args.dataset_name!r}"
    datasets, splits = load_splits(args.dataset_name, args.dataset_config_name, args.cache_dir)

    def read_split(split: str, limit: int | None) -> list[QuestionRecord]:
        rows = splits[split] if limit is None else splits[split].select(range(min(limit, len(splits[split]))))
        image_columns = [name for name in (columns["image"], "images") if name in rows.column_names]
        if not image_columns:
            raise ValueError(
                f"{flag}, split {split}, has no column {columns['image']!r} (it has {', '.join(rows.column_names)}); "
                "set --image_column"
            )
        for name in image_columns:
            kind = datasets.Image(decode=False)
            rows = cast_images(rows, name, kind if _is_single(rows.features[name]) else [kind], flag)
        texts = rows.remove_columns(image_columns)
        images = [rows.select_columns([name]) for name in image_columns]
        records: list[QuestionRecord] = []
        for index, row in enumerate(texts):
            line = {name: value for name, value in row.items() if value is not None}
            found: list[DatasetImage] = []
            for name, column in zip(image_columns, images, strict=True):
                if _is_single(column.features[name]):
                    found.append(DatasetImage(column, name, index))
                else:
                    found += [_ListedImage(column, name, index, place) for place in range(len(column[index][name]))]

            labels = {id(image): f" image {number}" if len(found) > 1 else "" for number, image in enumerate(found, 1)}

            def find_image(image: Any, where: str, labels: Mapping[int, str] = labels) -> ImageRecord:
                return ImageRecord(Path(f"{where}{labels[id(image)]}"), "", image)

            where = f"{args.dataset_name}/{split}[{index}]"
            records.append(_record({**line, columns["image"]: found}, where, find_image, columns, args.system_prompt))
        if not records:
            raise ValueError(f"{flag}, split {split}, has no rows; give a dataset that has some")
        return records

    heldout = validation_split(list(splits), classes=False)
    use_split = heldout is not None and args.validation_fraction is None
    validation = read_split(cast(str, heldout), args.max_validation_samples) if use_split else []
    return read_split("train", args.max_train_samples if validation else None), validation


@dataclass(frozen=True)
class _ListedImage(DatasetImage):
    """One image of a row that has several."""

    place: int = 0

    def __call__(self) -> bytes:
        encoded = self.dataset[self.row][self.column][self.place]
        if encoded is None or encoded["bytes"] is None:
            raise ValueError(f"column {self.column!r}, image {self.place + 1} is empty")
        return encoded["bytes"]


def _is_single(feature: Any) -> bool:
    """Whether a column of a dataset holds one image a row, not a list of them."""
    return not isinstance(feature, (list, tuple)) and type(feature).__name__ not in ("Sequence", "List", "LargeList")


def _hold_out(records: Sequence[QuestionRecord], fraction: float) -> tuple[list[QuestionRecord], list[QuestionRecord]]:
    """A part of the images, with all of their questions, for validation; the same whatever the run's seed is.

    Questions that have images on both sides are on neither, which is said. Of questions without images it is those of
    the same wording that stay together.

    Raises:
        ValueError: when none can be held out, or an image cannot be read.
    """
    samples = _contents(records)
    try:
        found = hold_out(samples, fraction)
    except ValueError as error:
        if len(set(samples[0]).union(*samples)) == 1:
            raise ValueError(
                "no question can be held out: all are about one image; give more images, or --validation_data_file"
            ) from error
        raise ValueError(
            "no question can be held out: they share their images in such a way that each would be trained on, too; "
            "give questions about other images as --validation_data_file"
        ) from error
    if found.neither:
        print_once(
            f"left out {len(found.neither)} of {len(records)} questions (such as {records[found.neither[0]].where}): "
            "they have images that are trained on beside images that are held out; --validation_data_file leaves out "
            "none"
        )
    return [records[index] for index in found.train], [records[index] for index in found.validation]


def _contents(records: Sequence[QuestionRecord]) -> list[frozenset[str]]:
    """What each question is about: its images by their pixels, or its text where it has none.

    Every image is decoded once.

    Raises:
        ValueError: naming an image that cannot be read.
    """
    images = list(dict.fromkeys(image for record in records for image in record.images))
    keys = dict(zip(images, content_keys(images, load_image), strict=True))
    return [
        frozenset(keys[image] for image in record.images)
        or frozenset(["\n".join(text_of(message) for message in record.messages[:-1])])
        for record in records
    ]


def _warn_of_shared_images(records: Sequence[QuestionRecord], validation: Sequence[QuestionRecord]) -> None:
    """Say how many validation questions are about images that are trained on; every image is decoded once."""
    contents = _contents([*records, *validation])
    known = frozenset[str]().union(*contents[: len(records)])
    shared = [r for r, keys in zip(validation, contents[len(records) :], strict=True) if keys & known]
    if shared:
        print_once(
            f"warning: {len(shared)} of {len(validation)} validation questions are about images that are trained on "
            f"(such as {shared[0].where}), so the scores are not those on new images; take them out of one part, or "
            "set --validation_fraction"
        )


# ----------------------------------------------------------------------------------------------------------------- task


class EncodedQuestions:
    """What the processor makes of every question, kept in memory: what belongs to an image is kept once an image.

    Args:
        family: encodes them.
        records: the questions.
        max_length: tokens of a sample with its answer.
        num_bytes: what is beyond is encoded again at every use.
    """

    def __init__(
        self,
        family: VisionLanguageFamily,
        records: Sequence[QuestionRecord],
        max_length: int | None,
        num_bytes: int = CACHE_BYTES,
    ) -> None:
        self.family, self.records, self.max_length = family, records, max_length
        self.bytes_left = num_bytes
        self._kept: dict[tuple[int, bool], dict[str, Tensor]] = {}
        self._lengths: dict[tuple[int, bool], int] = {}
        self._images: dict[tuple[ImageRecord, ...], dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.records)

    def fill(self, description: str) -> None:
        """Encode as many as fit, so that one that cannot be is found before anything expensive starts.

        Of the others the texts are checked, but not the length.

        Raises:
            ValueError: naming the line of the first that cannot be encoded, and how many others are too long.
        """
        too_long: list[TooLongError] = []
        for index in progress_bar(range(len(self)), desc=description, shown=len(self) >= 2000, leave=False):
            try:
                if self.bytes_left > 0:
                    self.sample(index)
                else:
                    record = self.records[index]
                    with _named(record):
                        self.family.check_texts(record.messages, len(record.images))
            except TooLongError as error:
                too_long.append(error)
        if len(too_long) > 1:
            longest = max(error.num_tokens for error in too_long)
            raise ValueError(
                f"{too_long[0]}. {len(too_long)} of {len(self)} conversations are too long; the longest has {longest} "
                "tokens"
            ) from too_long[0]
        if too_long:
            raise too_long[0]

    def sample(self, index: int, *, prompt: bool = False) -> dict[str, Tensor]:
        """One sample with its labels, or its prompt alone, without the answer.

        Raises:
            ValueError: naming the line.
        """
        if (index, prompt) in self._kept:
            return self._kept[index, prompt]
        record = self.records[index]
        images = [load_image(image) for image in record.images]
        with _named(record):
            if prompt:
                features = self.family.encode_prompt(record.messages[:-1], images)
            else:
                features = self.family.encode(record.messages, images, max_length=self.max_length)
        dtype = self.family.weight_dtype
        known = self._images.get(record.images, {})
        added = 0
        for name, values in features.items():
            if name in known and known[name].shape == values.shape:
                features[name] = known[name]
                continue
            features[name] = values.to(dtype) if values.is_floating_point() else values
            added += features[name].nbytes
        self._lengths[index, prompt] = features["input_ids"].shape[1]
        if self.bytes_left > 0:
            self.bytes_left -= added
            self._kept[index, prompt] = features
            pixels = {name: values for name, values in features.items() if name.startswith("pixel")}
            self._images.setdefault(record.images, pixels)
        return features

    def length(self, index: int, *, prompt: bool = False) -> int:
        """Tokens of one sample; one that does not fit into memory is encoded once to know it."""
        if (index, prompt) not in self._lengths:
            self.sample(index, prompt=prompt)
        return self._lengths[index, prompt]


@contextmanager
def _named(record: QuestionRecord) -> Generator[None, None, None]:
    """What is wrong with a record inside the block is said with its file and line."""
    try:
        yield
    except TooLongError as error:
        raise TooLongError(f"{record.where}: {error}", error.num_tokens) from error
    except ValueError as error:
        raise ValueError(f"{record.where}: {error}") from error


def settle_answer_length(
    given: int | None,
    count_tokens: Callable[[str], int],
    records: Sequence[QuestionRecord],
    validation: Sequence[QuestionRecord],
) -> int:
    """Where generated answers are cut; says how many validation answers are longer, as these can never match.

    Args:
        given: `--max_new_tokens`, where the user gave it.
        count_tokens: of an answer with its end.
        records: the training questions.
        validation: the validation questions, of which one of several right answers must fit.
    """
    needed = [min(map(count_tokens, record.answers)) for record in validation]
    longest = max(max(needed), max(count_tokens(record.answers[0]) for record in records))
    limit = given if given is not None else min(max(longest, NEW_TOKENS[0]), NEW_TOKENS[1])
    longer = [number for number in needed if number > limit]
    if longer:
        print_once(
            f"warning: the right answers to {len(longer)} of {len(validation)} validation questions are longer than "
            f"the {limit} tokens that are generated (the longest: {max(longer)}), so they cannot match; raise "
            "--max_new_tokens"
        )
    return limit


class QuestionAnsweringTask:
    """Answering questions about images: a vision-language base with its questions.

    Args:
        args: the options of a script; those of the data that were not given are filled in.
        device: where the base goes.
        dtype: of the base.

    Attributes:
        primary_metric: `exact_match`.
        family: the base.
        base: the same, as what it is.
        targets: layers that get an adapter, by component.
        num_train: training questions.
        num_validation: validation questions.
    """

    primary_metric: str = "exact_match"

    def __init__(self, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
        resolve_question_options(args)
        self.args = args
        records, validation = read_question_data(args)
        base = VisionLanguageFamily.from_pretrained(
            args.pretrained_model_name_or_path,
            revision=args.revision,
            cache_dir=args.cache_dir,
            weight_dtype=dtype,
            device=device,
            adapt=args.adapt,
            statistics_tokens=args.statistics_tokens,
        )
        self.family: ModelFamily = base
        self.base = base
        self.targets = lora_targets(args, base, COMPONENT)
        self.train = EncodedQuestions(base, records, args.max_length)
        self.validation = EncodedQuestions(base, validation, args.max_length)
        self.num_train, self.num_validation = len(records), len(validation)
        args.max_new_tokens = settle_answer_length(args.max_new_tokens, base.num_answer_tokens, records, validation)
        self.eval_batch_size = args.eval_batch_size or EVALUATION_RATIO * args.train_batch_size
        self.train.fill("encoding training questions")
        self.validation.fill("encoding validation questions")
        self._results: list[dict[str, Any]] = []

    def data_lines(self) -> list[Line]:
        """For the banner: questions, images, answers and sizes."""
        parts = {"training": self.train.records, "validation": self.validation.records}
        images = {
            name: list(dict.fromkeys(image for record in records for image in record.images))
            for name, records in parts.items()
        }
        lines = [
            count_line({name: len(records) for name, records in parts.items()}, data_source(self.args), "questions"),
            count_line({name: len(some) for name, some in images.items()}, "in the questions"),
            caption_line([record.answers[0] for record in self.train.records], "answers"),
        ]
        everything = [*images["training"], *images["validation"]]
        return [*lines, *size_lines(header_sizes(everything))] if everything else lines

    def batches(self, seed: int, batch_size: int, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
        """The training batches of these numbers; batch k is a function of (seed, k)."""
        for keys in DataOrder(self.num_train, batch_size, seed, cast(range, numbers)):
            yield self.base.collate([self.train.sample(index) for index, _ in keys])

    def validate(self) -> dict[str, float]:
        """`exact_match` and `validation_loss` from one pass over the validation questions.

        An answer matches when each of its tokens, the end included, is the likeliest one after those before it: greedy
        decoding would give exactly this answer. Of a conversation it is the last one, as it is that is generated.
        """
        loss, num_tokens, num_wrong = 0.0, 0, 0
        with evaluating(self.family.adapted.values()):
            for chosen in self._chunks(prompt=False):
                samples = [self.validation.sample(index) for index in chosen]
                answers = self.base.answer_logits(self.base.collate(samples))
                loss += float(F.cross_entropy(answers.logits, answers.tokens, reduction="sum"))
                num_tokens += answers.tokens.numel()
                wrong = answers.logits.argmax(dim=1) != answers.tokens
                for number, sample in enumerate(samples):
                    num_wrong += int(wrong[answers.samples == number][-_last_answer_tokens(sample) :].any())
        return {"exact_match": 1 - num_wrong / self.num_validation, "validation_loss": loss / num_tokens}

    def evaluate(self) -> dict[str, float]:
        """`exact_match` and `token_f1` of the generated answers, over all validation questions and by type.

        They are close to SQuAD's: see `lorainit_diffusers/evaluation/answers.py` for what does not count.
        """
        predictions = [""] * self.num_validation
        with evaluating(self.family.adapted.values()):
            for chosen in self._chunks(prompt=True):
                prompts = [self.validation.sample(index, prompt=True) for index in chosen]
                for index, text in zip(chosen, self.base.generate(prompts, self.args.max_new_tokens), strict=True):
                    predictions[index] = text
        self._results = [
            {
                "where": record.where,
                "type": record.kind,
                "question": record.question,
                "answers": list(record.answers),
                "prediction": prediction,
                "exact_match": exact_match(prediction, record.answers),
                "token_f1": token_f1(prediction, record.answers),
            }
            for record, prediction in zip(self.validation.records, predictions, strict=True)
        ]
        scores = {name: _mean(self._results, name) for name in ("exact_match", "token_f1")}
        kinds = by_type(self._results).items()
        return scores | {f"exact_match/{kind}": _mean(rows, "exact_match") for kind, rows in kinds}

    def write_results(self, output_dir: Path, name: str) -> None:
        """Write the predictions of the latest evaluation to `predictions_{name}.jsonl`."""
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in self._results]
        write_text(output_dir / f"predictions_{name}.jsonl", "".join(lines))

    def write_report(self, output_dir: Path, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write `report.html`, in one file: scores by stage and type, curves, and questions with their answers."""
        results = {
            stage: read_predictions(path)
            for stage in STAGES
            if (path := output_dir / f"predictions_{stage}.jsonl").is_file()
        }
        chosen = torch.randperm(self.num_validation, generator=torch.Generator().manual_seed(0))
        chosen = sorted(chosen[: self.args.num_samples].tolist())
        images = {index: [load_image(image) for image in self.validation.records[index].images] for index in chosen}
        plot_scores(lines, output_dir / "curves.png")
        title = f"{self.args.init} LoRA on {Path(str(self.args.pretrained_model_name_or_path)).name}"
        write_answer_report(output_dir, title, self._describe(lines), results, images)

    @property
    def records(self) -> dict[str, Sequence[QuestionRecord]]:
        """The questions by what messages call them, for the identity of the data."""
        return {"training data": self.train.records, "validation data": self.validation.records}

    def save_processor(self, directory: Path) -> None:
        """Write image processor and tokenizer beside the weights of a merged model."""
        self.base.save_processor(directory)

    def _chunks(self, *, prompt: bool) -> Iterator[list[int]]:
        """The validation questions in batches of about the same length."""
        order = sorted(range(self.num_validation), key=lambda index: self.validation.length(index, prompt=prompt))
        starts = range(0, len(order), self.eval_batch_size)
        for start in progress_bar(starts, desc="answering" if prompt else "validating", leave=False):
            yield order[start : start + self.eval_batch_size]

    def _describe(self, lines: Sequence[Mapping[str, Any]]) -> list[str]:
        scores = {stage: float(line[self.primary_metric]) for stage, line in stages(lines).items()}
        found = ", ".join(f"{100 * score:.1f} % ({stage})" for stage, score in scores.items())
        args = self.args
        return [
            f"Answers that match exactly: {found}.",
            f"{args.init}, rank {args.rank}, learning rate {args.learning_rate:g}, {args.max_train_steps} steps of "
            f"{args.train_batch_size} questions, seed {args.seed}; {self.num_train} training and {self.num_validation} "
            "validation questions. Case, articles and punctuation around words do not count.",
        ]


def _last_answer_tokens(sample: Mapping[str, Tensor]) -> int:
    """How many tokens the last answer of a conversation has, its end included."""
    trained = (sample["labels"][0, 1:] != IGNORED).nonzero().flatten()
    breaks = (trained.diff() > 1).nonzero().flatten()
    return trained.numel() - (int(breaks[-1]) + 1 if breaks.numel() else 0)


# --------------------------------------------------------------------------------------------------------------- report


def by_type(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The results of each type of question, where there are several types."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in results:
        groups.setdefault(str(row["type"]) or "other", []).append(row)
    return groups if len(groups) > 1 else {}


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """What `QuestionAnsweringTask.write_results` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_answer_report(
    output_dir: Path,
    title: str,
    sentences: Sequence[str],
    results: Mapping[str, Sequence[Mapping[str, Any]]],
    images: Mapping[int, Sequence[Image.Image]],
) -> Path:
    """Write `report.html`; nothing in it is loaded from anywhere.

    Args:
        output_dir: has `curves.png`.
        title: of the page.
        sentences: the first is the result.
        results: stage -> what was found, question by question.
        images: of the questions to show, by their index.
    """
    latest = list(results.values())[-1]
    rows = [[Cell("all"), Cell(str(len(latest))), *(_score_cell(found) for found in results.values())]]
    for kind, found in by_type(latest).items():
        cells = [_score_cell(by_type(stage)[kind]) for stage in results.values()]
        rows.append([Cell(kind), Cell(str(len(found))), *cells])
    blocks: list[Block] = [Text(text, lead=index == 0) for index, text in enumerate(sentences)]
    blocks += [
        Heading("Scores"),
        Table(["questions", "number", *(f"{stage}: exact match (F1)" for stage in results)], rows),
        Heading("Curves"),
        Picture(output_dir / "curves.png", "exact match and loss on the validation questions over the steps"),
        Heading("Samples"),
        _samples_table(results, images),
    ]
    path = output_dir / "report.html"
    write_text(path, to_html(title, blocks))
    return path


def _samples_table(
    results: Mapping[str, Sequence[Mapping[str, Any]]], images: Mapping[int, Sequence[Image.Image]]
) -> Table:
    """One row a question: its images, what is asked and the right answer, and what each stage says."""
    latest = list(results.values())[-1]
    rows: list[list[Cell]] = []
    for index, shown in images.items():
        row = latest[index]
        said = [(str(stage[index]["prediction"]), bool(stage[index]["exact_match"])) for stage in results.values()]
        cells = [Cell("", images=tuple(shown)), Cell(str(row["question"])), Cell(" / ".join(row["answers"]))]
        rows.append([*cells, *(Cell(text, "better" if right else "worse") for text, right in said)])
    return Table(["image", "question", "answer", *results], rows)


def plot_scores(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw exact match and loss on the validation questions over the steps."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, 2)
    validations = [line for line in lines if "validation_loss" in line]
    for axis, name, label in zip(
        axes, ("exact_match", "validation_loss"), ("answers that match exactly", "validation loss"), strict=True
    ):
        axis.plot([line["step"] for line in validations], [line[name] for line in validations], "o-", color="#08519c")
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    best = best_line(lines, "exact_match", larger_is_better=True)
    if best is not None:
        mark_best(axes[0], [(line["step"], line["exact_match"]) for line in validations], int(best["step"]))
        axes[0].legend(frameon=False, fontsize="small")
    axes[0].set_ylim(bottom=0)
    save_figure(figure, path, dpi=120)


def _score_cell(rows: Sequence[Mapping[str, Any]]) -> Cell:
    return Cell(f"{100 * _mean(rows, 'exact_match'):.1f} % ({100 * _mean(rows, 'token_f1'):.1f} %)")


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(float(row[name]) for row in rows) / len(rows)
