"""Conversations about images as tokens: the chat template, which tokens are answers, and batches of several."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from lorainit_diffusers.families.plain_text import PlainText
from lorainit_diffusers.families.vlm_processor import image_token_ids

# Columns of a batch with one entry a token: (1, tokens, ...) of one sample. All others belong to images.
_TOKEN_TYPES = frozenset({"token_type_ids", "mm_token_type_ids"})
_TOKEN_COLUMNS = _TOKEN_TYPES | {"input_ids", "attention_mask", "labels", "cross_attention_mask"}
# Where a processor returns these, the first dimension of what belongs to images is that of samples, not of images.
_SAMPLE_WISE = frozenset({"pixel_attention_mask", "aspect_ratio_ids"})
IGNORED = -100


class TooLongError(ValueError):
    """A conversation has more tokens than it may have.

    Attributes:
        num_tokens: That it has.
    """

    def __init__(self, message: str, num_tokens: int) -> None:
        super().__init__(message)
        self.num_tokens = num_tokens


class Conversations:
    """Conversations as a model's inputs: what its processor and its chat template make of them.

    A batch holds what the processor gave (`input_ids`, `attention_mask`, `pixel_values`, ...), all of which goes into
    the model, and `labels`, (batch, tokens), the token ids of the answers and -100 elsewhere.

    Args:
        model: The conversations are for.
        processor: Its processor.
        base_name: Folder or hub name that both come from, for messages.

    Attributes:
        processor: As given.
        image_tokens: (n,) ids of the tokens that stand for an image.
        end_tokens: Ids of the tokens that end a generation.
        is_paligemma: Whether the model is a PaliGemma, whose processor takes prefix and suffix.
        plain_text: Keeps special tokens out of the texts.
    """

    def __init__(self, model: PreTrainedModel, processor: Any, base_name: str = "") -> None:
        config: Any = model.config
        self.processor = processor
        self._config = config
        self.image_tokens = torch.tensor(sorted(image_token_ids(config, processor)))
        self.is_paligemma = str(config.model_type).startswith("paligemma")
        self._name = f"{type(model).__name__} {base_name!r}" if base_name else type(model).__name__
        self._parameters = inspect.signature(type(model).forward).parameters
        generation: Any = getattr(model, "generation_config", None)
        ends: set[Any] = {self.tokenizer.eos_token_id}
        own = getattr(generation, "eos_token_id", None)
        ends.update(own if isinstance(own, (list, tuple)) else [own])
        self.end_tokens: set[int] = ends - {None}
        self.plain_text = PlainText(
            self.tokenizer, self.processor, end_ids=self.end_tokens, image_ids=self.image_tokens.tolist()
        )

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @property
    def has_chat_template(self) -> bool:
        """Whether the processor says how a conversation is written."""
        return getattr(self.processor, "chat_template", None) is not None

    @property
    def max_tokens(self) -> int | None:
        """Positions that the language model has; None where it does not say."""
        return getattr(self._config.get_text_config(), "max_position_embeddings", None)

    @property
    def pad_token(self) -> int:
        """Id of the token that fills up a batch."""
        tokenizer = self.tokenizer
        return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        images: Sequence[Image.Image] = (),
        *,
        max_length: int | None = None,
    ) -> dict[str, Tensor]:
        """What the processor makes of one conversation, with `labels`: every answer of the assistant is trained on.

        The conversation is written by the processor's chat template. An answer is what comes after the template's
        generation prompt, to the first token that ends a generation. The last one gets an end token where the template
        writes none, or the model would not learn to stop.

        Every text is plain text: an end or an image token that it spells is read letter by letter, and trained on.

        A processor without a template takes one question and one answer: PaliGemma's as its prefix and suffix, others
        as the image tokens, the question, a new line, the answer and the end token.

        Args:
            messages: `{"role": "system" | "user" | "assistant", "content": ...}`, the content a text or parts
                `{"type": "text", "text": ...}` and `{"type": "image"}`.
            images: One for each image part, in their order.
            max_length: Of the whole, in tokens. Nothing is ever cut: an image without all of its tokens is none.

        Returns:
            Tensors of one sample: (1, tokens) of tokens, and whatever the model takes for images.

        Raises:
            TooLongError: When the conversation is too long.
            ValueError: When roles, contents or the number of images are wrong, an answer is empty, or the template does
                not write a conversation as the continuation of its beginning.
        """
        conversation = _typed(messages, len(images))
        turns = [index for index, message in enumerate(conversation) if message["role"] == "assistant"]
        if not turns:
            raise ValueError("the conversation has no answer: give it a message of the role 'assistant'")
        for index in turns:
            if not _text_of(conversation[index]).strip():
                raise ValueError(f"message {index + 1} is an empty answer; fill it in or leave it out")
        conversation, marked = self.plain_text.mark(conversation)
        if self.has_chat_template:
            features = self._encode_turns(conversation, turns, images)
        else:
            features = self._encode_pair(conversation, images)
        if marked is not None:
            features = self.plain_text.unmark(features, marked, _TOKEN_COLUMNS)
        length = features["input_ids"].shape[1]
        limit = min((number for number in (max_length, self.max_tokens) if number is not None), default=length)
        if length > limit:
            raise TooLongError(
                f"the conversation has {length} tokens, more than {limit}, and is never cut: raise max_length as far "
                "as the model has positions, shorten the text, or let the processor make fewer tokens of an image",
                length,
            )
        if not bool((features["labels"][:, 1:] != IGNORED).any()):
            raise ValueError(
                "no token of the answer is left beside the prompt's; look at the processor's chat template"
            )
        return features

    def encode_prompt(
        self, messages: Sequence[Mapping[str, Any]], images: Sequence[Image.Image] = ()
    ) -> dict[str, Tensor]:
        """What the processor makes of a conversation whose next message is the assistant's, for `generate`.

        Args:
            messages: As in `encode`; the last is not the assistant's.
            images: One for each image part.

        Raises:
            ValueError: As in `encode`.
        """
        conversation = _typed(messages, len(images))
        if conversation[-1]["role"] == "assistant":
            raise ValueError("the last message is the assistant's: leave out what it should say")
        conversation, marked = self.plain_text.mark(conversation)
        if self.has_chat_template:
            features = self._process(self._write(conversation, add_generation_prompt=True), images)
        else:
            features = self._process(self._plain_prompt(conversation), images)
        return features if marked is None else self.plain_text.unmark(features, marked, _TOKEN_COLUMNS)

    def check_texts(self, messages: Sequence[Mapping[str, Any]], num_images: int) -> None:
        """See what `encode` would find without the images: roles, contents, and texts that cannot be read as such.

        Raises:
            ValueError: As in `encode`.
        """
        self.plain_text.mark(_typed(messages, num_images))

    def num_answer_tokens(self, text: str) -> int:
        """About how many tokens `generate` needs for this answer: its own, the end, and one for how it begins."""
        return self.plain_text.count_tokens(text) + 2

    def collate(self, features: Sequence[Mapping[str, Tensor]], padding_side: str = "right") -> dict[str, Tensor]:
        """One batch of several samples.

        Tokens are padded at one side; what belongs to images is joined, and filled up with zeros where their shapes
        differ, as the processors do it in a batch.

        Args:
            features: From `encode` or `encode_prompt`.
            padding_side: `right` or `left`.

        Raises:
            ValueError: For another side.
        """
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side {padding_side!r} is unknown; give 'right' or 'left'")
        num_tokens = max(sample["input_ids"].shape[1] for sample in features)
        names = list(dict.fromkeys(name for sample in features for name in sample))
        batch: dict[str, Tensor] = {}
        for name in names:
            columns = [sample.get(name) for sample in features]
            if name in _TOKEN_COLUMNS:
                fill = {"input_ids": self.pad_token, "labels": IGNORED}.get(name, 0)
                columns = [
                    _pad_tokens(column, num_tokens, fill, padding_side) for column in columns if column is not None
                ]
            elif _SAMPLE_WISE & set(names):  # a sample without images has none of them, not no row
                like = next(column for column in columns if column is not None)
                empty = like.new_zeros((1, *(0 for _ in like.shape[1:])))
                columns = [empty if column is None else column for column in columns]
            batch[name] = _join([column for column in columns if column is not None])
        return batch

    def _encode_turns(
        self, conversation: Sequence[Mapping[str, Any]], turns: Sequence[int], images: Sequence[Image.Image]
    ) -> dict[str, Tensor]:
        """A conversation by the chat template; the messages at `turns` are the answers."""
        text, spans = self._write_conversation(conversation, turns)
        features = self._process(text, images)
        ids = features["input_ids"][0]
        labels = torch.full_like(ids, IGNORED)
        for index, (start, stop) in zip(turns, spans, strict=True):
            before = images[: sum(_num_images(message) for message in conversation[:index])]
            first, last = (self._token_index(text, place, ids, before) for place in (start, stop))
            span = ids[first:last].tolist()
            ends = [place for place, token in enumerate(span) if token in self.end_tokens]
            last = first + ends[0] + 1 if ends else last
            labels[first:last] = ids[first:last]
        features["labels"] = labels[None]
        return features

    def _write(self, conversation: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
        """The text that the chat template makes of messages."""
        written = self.processor.apply_chat_template(
            list(conversation), tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return written if isinstance(written, str) else written[0]

    def _write_conversation(
        self, conversation: Sequence[Mapping[str, Any]], turns: Sequence[int]
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and where each answer starts and stops in it, in characters."""
        text = self._write(conversation)
        spans: list[tuple[int, int]] = []
        for index in turns:
            start = self._write(conversation[:index], add_generation_prompt=True)
            stop = self._write(conversation[: index + 1])
            if not (text.startswith(start) and text.startswith(stop) and len(start) < len(stop)):
                raise ValueError(
                    f"the processor's chat template does not write message {index + 1} as the continuation of those "
                    "before it, so the answer cannot be told from the prompt; give a template that does"
                )
            spans.append((len(start), len(stop)))
        if turns[-1] == len(conversation) - 1:
            start = spans[-1][0]
            ends = self.tokenizer.convert_ids_to_tokens(sorted(self.end_tokens))
            if self.tokenizer.eos_token is not None and not any(end in text[start:] for end in ends):
                text = text.rstrip() + self.tokenizer.eos_token
                spans[-1] = (start, len(text))
        return text, spans

    def _process(self, text: str, images: Sequence[Image.Image], **extra: Any) -> dict[str, Tensor]:
        """What the processor makes of one text with its images; no labels."""
        arguments: dict[str, Any] = {"text": [text], "return_tensors": "pt", **extra}
        if images:
            arguments["images"] = list(images)
        if self._starts_with_bos(text):
            arguments["add_special_tokens"] = False
        features: dict[str, Tensor] = {}
        for name, values in self.processor(**arguments).items():
            if name in _TOKEN_TYPES and name not in self._parameters:
                continue  # the tokenizer's, which knows nothing of the model
            if not isinstance(values, Tensor):
                raise ValueError(
                    f"the processor of {self._name} gives {name!r} as a {type(values).__name__}, which cannot be put "
                    "into a batch; use a newer transformers, or another base model"
                )
            features[name] = values
        if not extra:
            features.pop("labels", None)  # PaliGemma's, all -100
        return features

    def _starts_with_bos(self, text: str) -> bool:
        """Whether the template has written the token that the tokenizer would put before."""
        bos = self.tokenizer.bos_token
        return bos is not None and text.startswith(bos)

    def _token_index(self, text: str, stop: int, ids: Tensor, before: Sequence[Image.Image]) -> int:
        """Index in `ids`, the tokens of the whole text, of the first token that is not whole in `text[:stop]`.

        The processor puts an image's many tokens in the place of one. So it is counted from the end where no image
        follows; where one does, what lies before is processed with the images that it has, `before`.
        """
        if stop == len(text):
            return ids.numel()
        options = {"add_special_tokens": not self._starts_with_bos(text)}
        whole, part = (list(self.tokenizer(t, **options)["input_ids"]) for t in (text, text[:stop]))
        rest = whole[_num_shared(whole, part) :]
        if rest and ids[-len(rest) :].tolist() == rest:
            return ids.numel() - len(rest)
        return _num_shared(ids.tolist(), self._process(text[:stop], before)["input_ids"][0].tolist())

    def _plain_prompt(self, conversation: Sequence[Mapping[str, Any]]) -> str:
        """The prompt of one question for a processor without a chat template."""
        if len(conversation) != 1 or conversation[0]["role"] != "user":
            raise ValueError(
                f"the processor of {self._name} has no chat template, so it takes one question and one answer, not a "
                f"conversation of {len(conversation)} messages before the answer; give it a chat template"
            )
        placeholder = getattr(self.processor, "image_token", None) or self.tokenizer.convert_ids_to_tokens(
            int(self.image_tokens[0])
        )
        prompt = str(placeholder) * _num_images(conversation[0])
        question = _text_of(conversation[0])
        return prompt + question if self.is_paligemma else f"{prompt}{question}\n"

    def _encode_pair(
        self, conversation: Sequence[Mapping[str, Any]], images: Sequence[Image.Image]
    ) -> dict[str, Tensor]:
        """One question and one answer for a processor without a chat template."""
        prompt, answer = self._plain_prompt(conversation[:-1]), _text_of(conversation[-1]).strip()
        if self.is_paligemma:
            return self._process(prompt, images, suffix=[answer])
        text = f"{prompt}{answer}{self.tokenizer.eos_token or ''}"
        features = self._process(text, images)
        ids = features["input_ids"][0]
        first = self._token_index(text, len(prompt), ids, images)
        labels = torch.full_like(ids, IGNORED)
        labels[first:] = ids[first:]
        features["labels"] = labels[None]
        return features


def _typed(messages: Sequence[Mapping[str, Any]], num_images: int) -> list[dict[str, Any]]:
    """The messages with contents as lists of parts, checked."""
    conversation: list[dict[str, Any]] = []
    for number, message in enumerate(messages, start=1):
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"message {number} has the role {role!r}; roles are system, user and assistant")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, (list, tuple)):
            raise ValueError(f"message {number} has the content {content!r}; give a text or a list of parts")
        clean: list[dict[str, str]] = []
        for part in cast("Sequence[Any]", parts):
            if isinstance(part, Mapping) and part.get("type") == "image":
                clean.append({"type": "image"})
            elif isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
                clean.append({"type": "text", "text": part["text"]})
            else:
                raise ValueError(
                    f"message {number} has the part {part!r}; parts are {{'type': 'text', 'text': ...}} and "
                    "{'type': 'image'}"
                )
        conversation.append({"role": role, "content": clean})
        if role == "assistant" and _num_images(conversation[-1]):
            raise ValueError(f"message {number}, an answer, has an image; put images into the questions")
    if not conversation:
        raise ValueError("the conversation has no messages")
    placeholders = sum(_num_images(message) for message in conversation)
    if placeholders != num_images:
        raise ValueError(f"the conversation has {placeholders} image parts for {num_images} images; give one for each")
    return conversation


def _num_images(message: Mapping[str, Any]) -> int:
    return sum(part["type"] == "image" for part in message["content"])


def _text_of(message: Mapping[str, Any]) -> str:
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def _num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two lists have in common at the start."""
    differs = (index for index, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differs, min(len(first), len(second)))


def _pad_tokens(column: Tensor, num_tokens: int, fill: int, side: str) -> Tensor:
    """(1, tokens, ...) -> (1, num_tokens, ...)."""
    missing = num_tokens - column.shape[1]
    padding = column.new_full((column.shape[0], missing, *column.shape[2:]), fill)
    return torch.cat([column, padding] if side == "right" else [padding, column], dim=1)


def _join(columns: Sequence[Tensor]) -> Tensor:
    """One after the other along the first dimension; the others are filled up with zeros to the largest."""
    sizes = [max(lengths) for lengths in zip(*(column.shape[1:] for column in columns), strict=True)]
    filled: list[Tensor] = []
    for column in columns:
        spare = [
            amount
            for size, length in zip(reversed(sizes), reversed(column.shape[1:]), strict=True)
            for amount in (0, size - length)
        ]
        filled.append(F.pad(column, spare) if any(spare) else column)
    return torch.cat(filled)
