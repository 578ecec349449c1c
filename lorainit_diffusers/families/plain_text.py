"""Texts of the user are text: what is spelled like a special token of a tokenizer is read letter by letter.

A chat template writes a conversation as one text, so a tokenizer cannot tell the `</s>` that ends an answer from one
that an answer is about. So a mark is put inside such a spelling before the template writes it, and the mark's own
tokens are taken out of the result: `<`, mark, `/s>` becomes the tokens of `<` and `/s>`, which decode to the same text.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AddedToken

# Characters of Unicode's private use: a conversation gets the first that is not in it.
_MARKS = range(0xE000, 0xF8FF)


@dataclass(frozen=True)
class Marked:
    """What was put into a conversation.

    Attributes:
        character: The mark.
        count: How often it was put in.
    """

    character: str
    count: int


class PlainText:
    """Keeps special tokens out of the user's texts.

    Args:
        tokenizer: Of the base.
        processor: Whose tokens for images count, too.
        end_ids: Tokens that end a generation, which an answer must not have.
        image_ids: Tokens that stand for an image, which no text must have.
    """

    def __init__(
        self, tokenizer: Any, processor: Any, *, end_ids: Collection[int] = (), image_ids: Collection[int] = ()
    ) -> None:
        self.tokenizer = tokenizer
        added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
        special = {int(index) for index, token in added.items() if token.special}
        spellings = {str(token) for index, token in added.items() if token.special or index in {*end_ids, *image_ids}}
        spellings |= set(tokenizer.all_special_tokens)
        # what a processor puts images in the place of
        named = [value for name, value in vars(processor).items() if name.endswith("_token")]
        spellings |= {str(value) for value in named if isinstance(value, (str, AddedToken)) and str(value)}
        self._forbidden = (special | set(image_ids)) - {tokenizer.unk_token_id}
        self._end_ids = set(end_ids)
        longest_first = sorted(spellings, key=lambda spelling: (-len(spelling), spelling))
        self._spellings = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def mark(self, conversation: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], Marked | None]:
        """The conversation with a mark in every special token that a text spells, and what the mark is.

        Args:
            conversation: Messages whose contents are lists of parts.

        Raises:
            ValueError: For a text that has such a token all the same; names the message and the token.
        """
        everything = "".join(part["text"] for message in conversation for part in _texts(message))
        character = next(chr(code) for code in _MARKS if chr(code) not in everything)
        marked: list[dict[str, Any]] = []
        count = 0
        for number, message in enumerate(conversation, start=1):
            parts = self._joined(message["content"])
            for index, part in enumerate(parts):
                if part["type"] != "text":
                    continue
                text = self._with_marks(part["text"], character)
                count += text.count(character)
                parts[index] = {**part, "text": text}
                self._check(text, number, self._end_ids if message["role"] == "assistant" else set())
            marked.append({**message, "content": parts})
        return marked, Marked(character, count) if count else None

    def unmark(self, features: Mapping[str, Tensor], marked: Marked, columns: Collection[str]) -> dict[str, Tensor]:
        """Without the tokens of the mark.

        Args:
            features: Of one sample.
            marked: What `mark` put in.
            columns: Those of `features` with an entry a token: (1, tokens, ...).

        Raises:
            ValueError: When the tokens of the mark cannot be told from those around it.
        """
        ids = features["input_ids"][0].tolist()
        for mark in self._mark_tokens(marked.character):
            places = _occurrences(ids, mark)
            if len(places) == marked.count:
                kept = torch.ones(len(ids), dtype=torch.bool)
                for place in places:
                    kept[place : place + len(mark)] = False
                return {name: values[:, kept] if name in columns else values for name, values in features.items()}
        raise ValueError(
            "the text spells a special token of the base's tokenizer, which cannot be read as text here; take it out, "
            "or write it in another way"
        )

    def count_tokens(self, text: str) -> int:
        """Tokens of a text without a start or an end."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _joined(self, content: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The parts; two texts side by side are one where they spell a special token together."""
        parts: list[dict[str, Any]] = []
        for part in content:
            if part["type"] == "text" and parts and parts[-1]["type"] == "text":
                both = parts[-1]["text"] + part["text"]
                found = [match.span() for match in self._spellings.finditer(both)]
                if any(start < len(parts[-1]["text"]) < stop for start, stop in found):
                    parts[-1] = {**parts[-1], "text": both}
                    continue
            parts.append(dict(part))
        return parts

    def _with_marks(self, text: str, character: str) -> str:
        """A mark behind the first character of each spelling, until none is left that can be broken."""
        while True:
            broken = self._spellings.sub(lambda match: match[0][0] + character + match[0][1:], text)
            if broken == text or all(len(match[0]) == 1 for match in self._spellings.finditer(broken)):
                return broken
            text = broken

    def _check(self, text: str, number: int, ends: set[int]) -> None:
        found = (self._forbidden | ends).intersection(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if found:
            token = self.tokenizer.convert_ids_to_tokens(min(found))
            raise ValueError(
                f"message {number} has the token {token!r} in its text, which ends a generation or stands for an image "
                "here; take it out, or write it in another way"
            )

    def _mark_tokens(self, character: str) -> Iterator[list[int]]:
        """What a mark may be in tokens: by itself, or behind other characters."""

        def tokens(text: str) -> list[int]:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

        yield tokens(character)
        for before in ("x", "<"):
            start = tokens(before)
            both = tokens(before + character)
            if both[: len(start)] == start and len(both) > len(start):
                yield both[len(start) :]


def _texts(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [part for part in message["content"] if part["type"] == "text"]


def _occurrences(ids: Sequence[int], part: Sequence[int]) -> list[int]:
    """Where a list of tokens begins in another, without overlaps."""
    places: list[int] = []
    start = 0
    while part and start + len(part) <= len(ids):
        if list(ids[start : start + len(part)]) == list(part):
            places.append(start)
            start += len(part)
        else:
            start += 1
    return places
