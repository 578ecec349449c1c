"""Questions as the base takes them, encoded once as far as memory allows, and how long an answer may be."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

from torch import Tensor

from lorainit_diffusers.families.vlm import TooLongError, VisionLanguageFamily
from lorainit_diffusers.progress import progress_bar
from lorainit_diffusers.training.data.images import ImageRecord, load_image
from lorainit_diffusers.training.data.notes import print_once
from lorainit_diffusers.training.questions.conversations import QuestionRecord

# Of all encoded samples together; what does not fit is encoded again whenever it is needed.
CACHE_BYTES = 4_000_000_000
# Tokens that a generated answer may have when the user does not say: what the data need, within these limits.
NEW_TOKENS = (32, 512)


class EncodedQuestions:
    """What the processor makes of every question, kept in memory: what belongs to an image is kept once an image.

    Args:
        family: Encodes them.
        records: The questions.
        max_length: Tokens of a sample with its answer.
        num_bytes: What is beyond is encoded again at every use.
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
            ValueError: Naming the line of the first that cannot be encoded, and how many others are too long.
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
            ValueError: Naming the line.
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
        count_tokens: Of an answer with its end.
        records: The training questions.
        validation: The validation questions, of which one of several right answers must fit.
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
