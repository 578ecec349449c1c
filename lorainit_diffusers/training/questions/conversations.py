"""What one line of a file of questions means: a question with its answer, chat messages, or LLaVA's conversations."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from lorainit_diffusers.training.data.files import find_file
from lorainit_diffusers.training.data.images import ImageRecord
from lorainit_diffusers.training.data.rows import json_entries
from lorainit_diffusers.training.places import is_inside

PLACEHOLDER = "<image>"
_IMAGES_FIRST = re.compile(rf"^(\s*{PLACEHOLDER}\s*)+")
# LLaVA's names of those who speak, and those of chat messages.
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class QuestionRecord:
    """A conversation about images that ends with an answer.

    Attributes:
        where: File and line, for messages.
        messages: As `VisionLanguageFamily.encode` takes them; the last is the assistant's.
        images: Of the image parts, in their order.
        answers: That count as right; the first is the last message's.
        kind: Of question; empty where the data does not say.
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


def read_questions(
    path: str | Path,
    *,
    flag: str,
    image_dir: str | None = None,
    columns: Mapping[str, str] | None = None,
    system_prompt: str | None = None,
    allow_outside: bool = False,
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
        path: The file.
        flag: The option that gave it, for messages.
        image_dir: Folder that images are relative to; that of the file by default.
        columns: Other names of `image`, `question` and `answer`.
        system_prompt: Comes before a conversation that has none.
        allow_outside: A line may name an image that is not below the folder. A file from elsewhere could else take any
            picture of this machine into a training, and into what is published of it.

    Raises:
        FileNotFoundError: When the file, or an image, does not exist.
        ValueError: When a line cannot be understood, or names an image outside of the folder.
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
        if not allow_outside and not _lies_below(found, folder):
            raise ValueError(
                f"{where}: the image {name!r} lies outside of {str(folder)!r}; give the folder of all images as "
                "--image_dir, or --allow_images_outside if you trust the file"
            )
        return ImageRecord(found, "")

    entries = json_entries(file, label=str(file), what="conversations")
    records = [read_record(row, where, find_image, columns or {}, system_prompt) for where, row in entries]
    if not records:
        raise ValueError(f"{flag} {str(path)!r} has no lines in it; give a file with questions")
    return records


def _lies_below(path: Path, folder: Path) -> bool:
    """Whether a file is in a folder, as it is named (a folder of images may be a link to another disk) or in truth."""
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)) or is_inside(path, folder)


def read_record(
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
        ValueError: For what is neither text nor a number; `what` begins the message.
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
