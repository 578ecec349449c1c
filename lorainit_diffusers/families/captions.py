"""Captions of a text-to-image base: token ids, their embeddings, and what stands for no caption."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from lorainit_diffusers.families.base import StepRecord
from lorainit_diffusers.families.loading import BaseParts


class TokenCounts(NamedTuple):
    """How long captions are for a text encoder.

    Attributes:
        counts: Tokens of each caption.
        limit: How many tokens the encoder gets; what is beyond is cut.
    """

    counts: list[int]
    limit: int


@dataclass
class CaptionEncoding(BaseParts):
    """How captions become conditioning: the second of the four steps of `TextToImageFamily`.

    A family says how its encoders run (`_encode`), and where it differs how texts are prepared (`_tokenized_texts`),
    cut (`_max_tokens`) and left out (`_no_caption_inputs`, `_encode_no_caption`, `_drop_captions`).
    """

    _: KW_ONLY
    step: StepRecord = field(default_factory=StepRecord)

    # Encoders whose attention mask is a column of the batch, too.
    MASKED_ENCODERS: ClassVar[frozenset[str]] = frozenset()
    # Columns of a batch that stand for the captions once they are encoded.
    EMBEDS: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._no_caption: dict[str, Tensor] | None = None
        # what `sample` needs once the text encoders are let go; None before
        self._kept_prompts: dict[str, dict[str, Tensor]] | None = None

    @property
    def caption_columns(self) -> list[str]:
        """Columns of a batch that hold the captions before they are encoded."""
        columns: list[str] = []
        for component in self.tokenizers:
            suffix = component.removeprefix("text_encoder")
            columns.append(f"input_ids{suffix}")
            if component in self.MASKED_ENCODERS:
                columns.append(f"attention_mask{suffix}")
        return columns

    def caption_inputs(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The columns of a batch that hold the captions: token ids (captions, tokens) for each text encoder.

        They are padded and cut as the pipeline does.
        """
        return self._tokenize(self._tokenized_texts(captions))

    def caption_lengths(self, captions: Sequence[str]) -> dict[str, TokenCounts]:
        """Tokens of each caption for each text encoder, before `caption_inputs` cuts them.

        The encoder's own tokens (start, end) count, as they do for the limit.
        """
        found: dict[str, TokenCounts] = {}
        for component, tokenizer in self.tokenizers.items():
            tokens = tokenizer(
                self._tokenized_texts(captions),
                padding=False,
                truncation=False,
                verbose=False,
                **self._tokenizer_options(),
            )
            counts = [len(ids) for ids in tokens["input_ids"]]
            found[component] = TokenCounts(counts, self._max_tokens(component))
        return found

    @torch.no_grad()
    def embed_captions(self, captions: Sequence[str], batch_size: int = 16) -> dict[str, Tensor]:
        """Encode captions once: columns that stand in a batch instead of `caption_inputs`.

        Args:
            captions: The captions.
            batch_size: How many are encoded at once.

        Returns:
            `EMBEDS` of all captions, on the CPU in the weight dtype.

        Raises:
            ValueError: When the text encoders are trained: the embeddings would be those of the untrained ones.
        """
        if self.train_text_encoder:
            raise ValueError(
                "captions cannot be encoded once while the text encoder is trained: leave out train_text_encoder or "
                "pre_compute_text_embeddings"
            )
        chunks: list[dict[str, Tensor]] = []
        with self._on_device(*self.text_encoders.values()), self._autocast():
            for start in range(0, len(captions), batch_size):
                columns = self._to_device(self.caption_inputs(captions[start : start + batch_size]))
                chunks.append(self._cast(self._encode(columns, None)))
        return {name: torch.cat([chunk[name].cpu() for chunk in chunks]) for name in self.EMBEDS}

    def release_text_encoders(self, prompts: Iterable[str]) -> None:
        """Let go of the text encoders: they leave memory, and captions can only come encoded from now on.

        Args:
            prompts: Those that `sample` will be asked for; they are encoded now and kept.

        Raises:
            ValueError: When the text encoders are trained.
        """
        unique = list(dict.fromkeys(prompts))
        embeds = self.embed_captions(unique) if unique else {}
        self._look_up_no_caption()
        self._kept_prompts = {
            prompt: {name: values[row : row + 1] for name, values in embeds.items()}
            for row, prompt in enumerate(unique)
        }
        for component in self.TEXT_ENCODERS:
            setattr(self, component, None)

    @abstractmethod
    def _encode(self, columns: Mapping[str, Tensor], unskipped: Tensor | None) -> dict[str, Tensor]:
        """Run the text encoders on the columns of `caption_inputs`, on their device: `EMBEDS` of the captions.

        Args:
            columns: Token ids and attention masks.
            unskipped: (batch,) boolean, the samples that train without their caption; None is none.
        """

    def _max_tokens(self, component: str) -> int:
        """How many tokens a caption is padded and cut to for this text encoder."""
        return int(self.tokenizers[component].model_max_length)

    def _tokenized_texts(self, captions: Sequence[str]) -> list[str]:
        """The texts that the tokenizers get for captions, as the pipeline prepares them."""
        return list(captions)

    def _tokenizer_options(self) -> dict[str, Any]:
        """What else the tokenizers are called with."""
        return {}

    def _tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        columns: dict[str, Tensor] = {}
        for component, tokenizer in self.tokenizers.items():
            tokens = tokenizer(
                list(texts),
                padding="max_length",
                truncation=True,
                max_length=self._max_tokens(component),
                return_tensors="pt",
                **self._tokenizer_options(),
            )
            suffix = component.removeprefix("text_encoder")
            columns[f"input_ids{suffix}"] = tokens["input_ids"]
            if component in self.MASKED_ENCODERS:
                columns[f"attention_mask{suffix}"] = tokens["attention_mask"]
        return columns

    def _no_caption_inputs(self, count: int) -> dict[str, Tensor]:
        """`caption_inputs` of what the pipeline takes for no caption."""
        return self.caption_inputs([""] * count)

    def _encode_no_caption(self, count: int) -> dict[str, Tensor]:
        """What the pipeline takes for no caption: the empty one, without `clip_skip`."""
        columns = self._to_device(self._no_caption_inputs(count))
        return self._encode(columns, torch.ones(count, dtype=torch.bool, device=self.device))

    def _drop_captions(self, columns: Mapping[str, Tensor], dropped: Tensor) -> dict[str, Tensor]:
        """The columns of `caption_inputs` with the empty caption in the samples of `dropped`."""
        empty = self._to_device(self._no_caption_inputs(1))
        return {name: torch.where(dropped[:, None], empty[name], values) for name, values in columns.items()}

    def _encode_batch(self, batch: Mapping[str, Tensor], dropped: Tensor | None) -> dict[str, Tensor]:
        """The conditioning from token ids; records which tokens are padding."""
        columns = self._to_device({column: batch[column] for column in self.caption_columns})
        if dropped is not None:
            columns = self._drop_captions(columns, dropped)
        for component in self.trainable_text_encoders:
            input_ids = columns[f"input_ids{component.removeprefix('text_encoder')}"]
            end_token_id = cast(int, self.tokenizers[component].eos_token_id)
            self.step.token_masks[component] = token_mask(input_ids, end_token_id)
        trained = torch.is_grad_enabled() and self.train_text_encoder
        with self._on_device(*self.text_encoders.values()), self._autocast(), torch.set_grad_enabled(trained):
            return self._cast(self._encode(columns, dropped))

    def _look_up(self, batch: Mapping[str, Tensor], dropped: Tensor | None) -> dict[str, Tensor]:
        """The conditioning from `embed_captions`."""
        embeds = self._cast({name: batch[name].to(self.device) for name in self.EMBEDS})
        return embeds if dropped is None else replace(embeds, dropped, self._look_up_no_caption())

    def _look_up_no_caption(self) -> dict[str, Tensor]:
        if self._no_caption is None:
            with torch.no_grad(), self._on_device(*self.text_encoders.values()), self._autocast():
                self._no_caption = self._cast(self._encode_no_caption(1))
        return self._no_caption

    def _embed_prompts(self, prompts: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`EMBEDS` of prompts and of no caption, on the device."""
        if self._kept_prompts is not None:
            unknown = [prompt for prompt in prompts if prompt not in self._kept_prompts]
            if unknown:
                raise ValueError(f"prompt {unknown[0]!r} was not encoded before the text encoders were let go")
            kept = [self._kept_prompts[prompt] for prompt in prompts]
            embeds = {name: torch.cat([entry[name] for entry in kept]).to(self.device) for name in self.EMBEDS}
            no_caption = {
                name: values.expand(len(prompts), *values.shape[1:])
                for name, values in self._look_up_no_caption().items()
            }
            return embeds, no_caption
        # outside autocast, as the pipelines do it
        with self._on_device(*self.text_encoders.values()):
            encoded = self._encode(self._to_device(self.caption_inputs(prompts)), None)
            no_caption = self._encode_no_caption(len(prompts))
        return self._cast(encoded), self._cast(no_caption)


def hidden_state(output: Any, usual: int, clip_skip: int | None, unskipped: Tensor | None) -> Tensor:
    """The hidden state of a text encoder that conditions the denoiser: (batch, tokens, width).

    Args:
        output: Of the encoder, with `hidden_states`.
        usual: Index of the one that is taken without `clip_skip`.
        clip_skip: How many layers further to the front; None is the usual one.
        unskipped: (batch,) boolean, the samples that it is not applied to; None applies it to all.
    """
    hidden: Tensor = output.hidden_states[usual]
    if clip_skip is None:
        return hidden
    skipped: Tensor = output.hidden_states[usual - clip_skip]
    return skipped if unskipped is None else torch.where(unskipped[:, None, None], hidden, skipped)


def token_mask(input_ids: Tensor, end_token_id: int) -> Tensor:
    """Which tokens are not padding: boolean (batch, tokens), True up to and including the first end token.

    CLIP pads with its end token, so the padding cannot be told from the ids alone.
    """
    is_end = torch.eq(input_ids, end_token_id)
    return is_end.cumsum(dim=1) - is_end.long() == 0


def replace(embeds: Mapping[str, Tensor], dropped: Tensor, other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`other`, (1, ...), in the samples of the (batch,) mask `dropped`, and `embeds` in the others."""
    return {
        name: torch.where(dropped.view(-1, *(1,) * (values.ndim - 1)), other[name], values)
        for name, values in embeds.items()
    }
