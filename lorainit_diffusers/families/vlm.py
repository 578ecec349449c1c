"""Vision-language models: images and a conversation in, text out; Llava, SmolVLM/Idefics3, Qwen-VL, PaliGemma, ...

    family = VisionLanguageFamily.from_pretrained("path/or/hub-name")
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "a red apple"},
    ]
    batch = family.collate([family.encode(messages, [image])])
    family.loss(batch, torch.Generator().manual_seed(0)).backward()

The loss is the cross entropy of the answers' tokens. So that what is collected is what is trained, the rows of the
language model that count in a collection pass are those of the answers, and of the images that the answers look at; by
choice those of the prompts. Padding never counts. The layers of the vision tower and of the projector see no tokens,
and are never masked.

Whatever `AutoModelForImageTextToText` loads is taken as it is, with its own processor: nothing here knows a model by
name, but for PaliGemma, whose processor has no chat template. torchvision is not needed, see `load_processor`.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils.hub import cached_file

from lorainit_diffusers.families.base import StepRecord
from lorainit_diffusers.families.plain_text import PlainText
from lorainit_diffusers.families.pretrained import autocast, dtype_option
from lorainit_diffusers.loading.errors import loading_errors
from lorainit_diffusers.loading.files import check_transformers_folder
from lorainit_diffusers.loading.hub import hub_options
from lorainit_diffusers.loading.weights import check_vocabulary, load_whole

COMPONENT = "model"
# The parts of a model, and the rows of its language model.
PARTS = ("language", "vision", "projector")
ROWS = ("answer", "image", "prompt")
# What transformers calls the parts, outermost first: a projector may lie in the tower (Qwen-VL's merger).
_LANGUAGE_NAMES = frozenset({"language_model", "text_model"})
_VISION_NAMES = frozenset({"vision_tower", "vision_model", "visual", "vision_encoder"})
_PROJECTOR_NAMES = frozenset(
    {"multi_modal_projector", "mm_projector", "connector", "merger", "projector", "language_projection"}
    | {"vision_projection", "embed_vision", "aligner"}
)
# Attention's projections, split and fused, and those of its output, whose names other layers have, too.
_ATTENTION_INPUTS = frozenset(
    {"q_proj", "k_proj", "v_proj", "query", "key", "value"}
    | {"qkv_proj", "qkv", "query_key_value", "c_attn", "Wqkv", "wqkv"}
)
_ATTENTION_OUTPUTS = frozenset({"o_proj", "out_proj", "dense", "c_proj", "proj", "wo", "projection_layer"})
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
# Attention from text to the states of an image: its keys and values see no tokens.
_CROSS_ATTENTION = re.compile(r"cross_?att|encoder_attn", re.IGNORECASE)
_KEYS_AND_VALUES = frozenset({"k_proj", "v_proj", "key", "value"})
# Columns of a batch with one entry a token: (1, tokens, ...) of one sample. All others belong to images.
_TOKEN_TYPES = frozenset({"token_type_ids", "mm_token_type_ids"})
_TOKEN_COLUMNS = _TOKEN_TYPES | {"input_ids", "attention_mask", "labels", "cross_attention_mask"}
# Where a processor returns these, the first dimension of what belongs to images is that of samples, not of images.
_SAMPLE_WISE = frozenset({"pixel_attention_mask", "aspect_ratio_ids"})
IGNORED = -100
_NO_ANSWER = "the batch has no answer tokens: all labels are -100; encode conversations with answers"
REMEDY = "give a folder with safetensors weights and the processor's files, or a hub name"
# Files of a processor beside the tokenizer's, for one that cannot be saved whole.
_PROCESSOR_FILES = (
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("chat_template.json", "chat_template.jinja"),
)


class TooLongError(ValueError):
    """A conversation has more tokens than it may have.

    Attributes:
        num_tokens: that it has.
    """

    def __init__(self, message: str, num_tokens: int) -> None:
        super().__init__(message)
        self.num_tokens = num_tokens


class AnswerLogits(NamedTuple):
    """What the model says where an answer's token comes next.

    Attributes:
        logits: (n, vocabulary), float32.
        tokens: (n,), the answers' tokens.
        samples: (n,), the sample of the batch that each belongs to.
    """

    logits: Tensor
    tokens: Tensor
    samples: Tensor


@dataclass
class VisionLanguageFamily:
    """A vision-language model with its processor and its training loss.

    The model is taken as it is; `from_pretrained` freezes what it loads. A batch holds what the processor gave
    (`input_ids`, `attention_mask`, `pixel_values`, ...), all of which goes into the model, and `labels`, (batch,
    tokens), the token ids of the answers and -100 elsewhere: see `encode` and `collate`.

    Attributes:
        model: what `AutoModelForImageTextToText` loads.
        processor: its processor.
        base_name: folder or hub name that both come from.
        revision: of the hub repository.
        cache_dir: where its files are kept.
        adapt: the parts whose layers get an adapter when the user names none.
        statistics_tokens: the rows of the language model's layers that count in a collection pass.
        step: what the latest `loss` masked.
    """

    model: PreTrainedModel
    processor: Any
    _: KW_ONLY
    base_name: str = ""
    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    adapt: tuple[str, ...] = ("language",)
    statistics_tokens: tuple[str, ...] = ("answer", "image")
    step: StepRecord = field(default_factory=StepRecord)

    def __post_init__(self) -> None:
        _check_choice("adapt", self.adapt, PARTS)
        _check_choice("statistics_tokens", self.statistics_tokens, ROWS)
        config: Any = self.model.config
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                f"{self._name} is an encoder-decoder, whose answers are no part of its input; give a model that "
                "continues its prompt, such as Llava, SmolVLM, Qwen-VL or PaliGemma"
            )
        self._part_of_layer = _parts_of_layers(self.model)
        self._masked_layers = tuple(
            name
            for name, part in self._part_of_layer.items()
            if part == "language"
            and not (_CROSS_ATTENTION.search(name) and name.rpartition(".")[2] in _KEYS_AND_VALUES)
        )
        self._parameters = inspect.signature(type(self.model).forward).parameters
        self._own_positions = any(hasattr(module, "get_rope_index") for module in self.model.modules())
        self._is_paligemma = str(config.model_type).startswith("paligemma")
        self._image_tokens = torch.tensor(sorted(_image_token_ids(config, self.processor)))
        generation: Any = getattr(self.model, "generation_config", None)
        ends: set[Any] = {self.tokenizer.eos_token_id}
        own = getattr(generation, "eos_token_id", None)
        ends.update(own if isinstance(own, (list, tuple)) else [own])
        self._end_tokens: set[int] = ends - {None}
        self._plain_text = PlainText(
            self.tokenizer, self.processor, end_ids=self._end_tokens, image_ids=self._image_tokens.tolist()
        )

    # ---- loading and saving

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        weight_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        adapt: Sequence[str] = ("language",),
        statistics_tokens: Sequence[str] = ("answer", "image"),
    ) -> VisionLanguageFamily:
        """Load a base and its processor from a local folder or a hub name, frozen; only safetensors weights are read.

        Args:
            path: folder as `save_pretrained` writes it, or the name of a hub repository.
            revision: hub revision of the base.
            cache_dir: where downloads are kept; Hugging Face's own place by default.
            weight_dtype: dtype of the model.
            device: where it goes.
            adapt: the parts whose layers get an adapter when the user names none: `language` (the attention of the
                language model), `vision` (that of the vision tower), `projector` (its linear layers).
            statistics_tokens: the rows of the language model's layers that count in a collection pass: `answer` (the
                tokens of the answers and those before them, which predict them), `image` (those that hold an image),
                `prompt` (all others but padding).

        Raises:
            FileNotFoundError: when there is no such base, or it has no safetensors weights.
            ValueError: when it is no vision-language model, its processor needs a package that is missing, or an option
                is unknown.
        """
        name = os.fspath(path)
        _check_choice("adapt", adapt, PARTS)
        _check_choice("statistics_tokens", statistics_tokens, ROWS)
        cls.check_base(name)
        source: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
        offline = hub_options("base model", name, "config.json", **source)
        with loading_errors("base model", name, REMEDY):
            config: Any = AutoConfig.from_pretrained(name, trust_remote_code=False, **source, **offline)
        if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise ValueError(
                f"base model {name!r} is a {config.model_type!r}, which is no vision-language model that "
                f"transformers {transformers.__version__} knows (AutoModelForImageTextToText)"
            )
        processor = load_processor(name, **source)
        model: Any = load_whole(
            *(AutoModelForImageTextToText, name),
            **{"what": "base model", "remedy": REMEDY, **source, **offline, **dtype_option(weight_dtype)},
        )
        check_vocabulary(processor.tokenizer, model, f"base model {name!r}", "tokenizer", "language model")
        return cls(
            model.requires_grad_(False).eval().to(device),
            processor,
            base_name=name,
            **source,
            adapt=tuple(adapt),
            statistics_tokens=tuple(statistics_tokens),
        )

    @classmethod
    def check_base(cls, name: str) -> None:
        """See that a base given as a local folder exists; a hub repository's name is left to the loader.

        Raises:
            FileNotFoundError: when the folder is missing or has no `config.json`.
        """
        check_transformers_folder(name)

    def save_processor(self, directory: str | os.PathLike[str]) -> None:
        """Write the processor, and how the base generates, beside the weights of a merged model."""
        generation: Any = getattr(self.model, "generation_config", None)
        if generation is not None:  # it may know an end that the tokenizer does not
            generation.save_pretrained(directory)
        if not getattr(self.processor, "images_only", False):
            self.processor.save_pretrained(directory)
            return
        self.tokenizer.save_pretrained(directory)
        for file in _PROCESSOR_FILES:
            found = cached_file(
                self.base_name,
                file,
                revision=self.revision,
                cache_dir=self.cache_dir,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
            if found is not None:
                shutil.copyfile(found, Path(directory) / file)

    # ---- the model family

    @property
    def adapted(self) -> Mapping[str, nn.Module]:
        """The whole model, under the name `model`."""
        return {COMPONENT: self.model}

    @property
    def heads(self) -> Mapping[str, nn.Module]:
        """No module is trained in full."""
        return {}

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the base weights."""
        return self.model.dtype

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
        config: Any = self.model.config
        return getattr(config.get_text_config(), "max_position_embeddings", None)

    def default_targets(self, component: str) -> list[str]:
        """Full names of the layers of the adapted parts: layers of the same name in other parts are left alone.

        Of the language model and the vision tower it is the projections of attention, of the projector all linear
        layers. Layers of the tower beyond the one whose features the model takes have no part in the loss, and none
        here.

        Raises:
            ValueError: another component; a part without such layers; layers that are no linear ones (GPT-2's Conv1D).
        """
        if component != COMPONENT:
            raise ValueError(f"a vision-language model has one component, {COMPONENT!r}, not {component!r}")
        targets: list[str] = []
        for part in self.adapt:
            layers = [name for name, own in self._part_of_layer.items() if own == part]
            if part != "projector":
                layers = [name for name in layers if _is_attention(name)]
            if part == "vision":
                num_used = _num_used_vision_layers(self.model.config)
                layers = [name for name in layers if not _beyond(name, num_used) and ".head." not in f".{name}."]
            if not layers:
                conv = next((name for name in _conv1d_layers(self.model) if _is_attention(name)), None)
                if part == "language" and conv is not None:
                    raise ValueError(
                        f"layer {conv!r} is a Conv1D, as in GPT-2; only linear layers are supported: "
                        "give another base model"
                    )
                raise ValueError(
                    f"{self._name} has no {part} layers that are known as such; name some with --lora_layers "
                    "(target_modules)"
                )
            targets += layers
        return targets

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        """Mean cross entropy of the answers' tokens, a scalar in float32; nothing in it is random.

        Raises:
            ValueError: when the batch has no answer.
        """
        answers = self.answer_logits(batch)
        return F.cross_entropy(answers.logits, answers.tokens)

    def loss_weight(self, batch: Mapping[str, Tensor]) -> float:
        """The tokens of the batch's answers, which the loss is the mean over.

        Raises:
            ValueError: when the batch has no answer.
        """
        count = int((batch["labels"][:, 1:] != IGNORED).sum())
        if count == 0:
            raise ValueError(_NO_ANSWER)
        return float(count)

    def stratified_timesteps(self, num_samples: int, generator: torch.Generator) -> AbstractContextManager[None]:
        """There are no timesteps; the block changes nothing."""
        return nullcontext()

    def answer_logits(self, batch: Mapping[str, Tensor]) -> AnswerLogits:
        """Run the model on a batch: what it says at the positions that predict the answers' tokens.

        Raises:
            ValueError: when the batch has no answer.
        """
        inputs = self._to_device(batch)
        labels = inputs.pop("labels")
        mask = inputs["attention_mask"].bool()
        predicts = labels[:, 1:] != IGNORED  # position t says what comes at t + 1
        if not bool(predicts.any()):
            raise ValueError(_NO_ANSWER)
        self.step.token_masks[COMPONENT] = self._counted_rows(inputs["input_ids"], labels, mask)
        self.step.masked_layers[COMPONENT] = self._masked_layers
        if not bool(mask[:, 0].all()) and "position_ids" in self._parameters and not self._own_positions:
            # On the left, padding moves the others; this is what `generate` passes, too.
            positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
            inputs["position_ids"] = positions + 1 if self._is_paligemma else positions
        positions = predicts.any(dim=0).nonzero().flatten()
        if self._is_paligemma:
            # transformers 4 takes the answer for a part of the prompt, which sees all of itself, without labels
            inputs["labels"] = labels
        elif "logits_to_keep" in self._parameters:
            inputs["logits_to_keep"] = positions  # of the vocabulary's size each: most would be thrown away
        with autocast(self.device, self.weight_dtype):
            logits: Tensor = cast(Any, self.model)(**inputs, use_cache=False).logits
        kept = predicts[:, positions]
        if logits.shape[1] != positions.numel():
            logits = logits[:, positions]
        return AnswerLogits(logits[kept].float(), labels[:, 1:][predicts], kept.nonzero()[:, 0])

    def generate(self, prompts: Sequence[Mapping[str, Tensor]], max_new_tokens: int = 32) -> list[str]:
        """Continue prompts by the likeliest token each; the texts without the prompts and without special tokens.

        The model's mode stays what it is: call it in evaluation mode.

        Args:
            prompts: from `encode_prompt`; they are padded on the left.
            max_new_tokens: at most so many a text.
        """
        inputs = self._to_device(self.collate(prompts, padding_side="left"))
        inputs.pop("labels", None)
        # a base's own settings (Qwen-VL's penalty on repetition) would give another text than the likeliest tokens
        greedy: dict[str, Any] = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
        greedy |= {
            "repetition_penalty": 1.0,
            "no_repeat_ngram_size": 0,
            "eos_token_id": sorted(self._end_tokens) or None,
        }
        with torch.no_grad(), autocast(self.device, self.weight_dtype):
            tokens = cast(Any, self.model).generate(
                **inputs, max_new_tokens=max_new_tokens, pad_token_id=self._pad_token, **greedy
            )
        answers = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]

    # ---- conversations

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
            images: one for each image part, in their order.
            max_length: of the whole, in tokens. Nothing is ever cut: an image without all of its tokens is none.

        Returns:
            Tensors of one sample: (1, tokens) of tokens, and whatever the model takes for images.

        Raises:
            TooLongError: when the conversation is too long.
            ValueError: when roles, contents or the number of images are wrong, an answer is empty, or the template does
                not write a conversation as the continuation of its beginning.
        """
        conversation = _typed(messages, len(images))
        turns = [index for index, message in enumerate(conversation) if message["role"] == "assistant"]
        if not turns:
            raise ValueError("the conversation has no answer: give it a message of the role 'assistant'")
        for index in turns:
            if not _text_of(conversation[index]).strip():
                raise ValueError(f"message {index + 1} is an empty answer; fill it in or leave it out")
        conversation, marked = self._plain_text.mark(conversation)
        if not self.has_chat_template:
            features = self._encode_pair(conversation, images)
        else:
            text, spans = self._write_conversation(conversation, turns)
            features = self._process(text, images)
            ids = features["input_ids"][0]
            labels = torch.full_like(ids, IGNORED)
            for index, (start, stop) in zip(turns, spans, strict=True):
                before = images[: sum(_num_images(message) for message in conversation[:index])]
                first, last = (self._token_index(text, place, ids, before) for place in (start, stop))
                span = ids[first:last].tolist()
                ends = [place for place, token in enumerate(span) if token in self._end_tokens]
                last = first + ends[0] + 1 if ends else last
                labels[first:last] = ids[first:last]
            features["labels"] = labels[None]
        if marked is not None:
            features = self._plain_text.unmark(features, marked, _TOKEN_COLUMNS)
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
            messages: as in `encode`; the last is not the assistant's.
            images: one for each image part.

        Raises:
            ValueError: as in `encode`.
        """
        conversation = _typed(messages, len(images))
        if conversation[-1]["role"] == "assistant":
            raise ValueError("the last message is the assistant's: leave out what it should say")
        conversation, marked = self._plain_text.mark(conversation)
        if self.has_chat_template:
            features = self._process(self._write(conversation, add_generation_prompt=True), images)
        else:
            features = self._process(self._plain_prompt(conversation), images)
        return features if marked is None else self._plain_text.unmark(features, marked, _TOKEN_COLUMNS)

    def check_texts(self, messages: Sequence[Mapping[str, Any]], num_images: int) -> None:
        """See what `encode` would find without the images: roles, contents, and texts that cannot be read as such.

        Raises:
            ValueError: as in `encode`.
        """
        self._plain_text.mark(_typed(messages, num_images))

    def num_answer_tokens(self, text: str) -> int:
        """About how many tokens `generate` needs for this answer: its own, the end, and one for how it begins."""
        return self._plain_text.count_tokens(text) + 2

    def collate(self, features: Sequence[Mapping[str, Tensor]], padding_side: str = "right") -> dict[str, Tensor]:
        """One batch of several samples.

        Tokens are padded at one side; what belongs to images is joined, and filled up with zeros where their shapes
        differ, as the processors do it in a batch.

        Args:
            features: from `encode` or `encode_prompt`.
            padding_side: `right` or `left`.

        Raises:
            ValueError: for another side.
        """
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side {padding_side!r} is unknown; give 'right' or 'left'")
        num_tokens = max(sample["input_ids"].shape[1] for sample in features)
        names = list(dict.fromkeys(name for sample in features for name in sample))
        batch: dict[str, Tensor] = {}
        for name in names:
            columns = [sample.get(name) for sample in features]
            if name in _TOKEN_COLUMNS:
                fill = {"input_ids": self._pad_token, "labels": IGNORED}.get(name, 0)
                columns = [
                    _pad_tokens(column, num_tokens, fill, padding_side) for column in columns if column is not None
                ]
            elif _SAMPLE_WISE & set(names):  # a sample without images has none of them, not no row
                like = next(column for column in columns if column is not None)
                empty = like.new_zeros((1, *(0 for _ in like.shape[1:])))
                columns = [empty if column is None else column for column in columns]
            batch[name] = _join([column for column in columns if column is not None])
        return batch

    # ---- pieces

    @property
    def _name(self) -> str:
        return f"{type(self.model).__name__} {self.base_name!r}" if self.base_name else type(self.model).__name__

    @property
    def _pad_token(self) -> int:
        tokenizer = self.tokenizer
        return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)

    def _to_device(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        dtype = self.weight_dtype
        return {
            name: values.to(self.device, dtype) if values.is_floating_point() else values.to(self.device)
            for name, values in batch.items()
        }

    def _counted_rows(self, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """(batch, tokens) boolean: the positions whose rows count in the statistics."""
        answer = labels != IGNORED
        answer[:, :-1] |= labels[:, 1:] != IGNORED
        image = torch.isin(ids, self._image_tokens.to(ids.device))
        rows = {"answer": answer, "image": image, "prompt": ~(answer | image)}
        return mask & torch.stack([rows[name] for name in self.statistics_tokens]).any(dim=0)

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
            ends = self.tokenizer.convert_ids_to_tokens(sorted(self._end_tokens))
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
            int(self._image_tokens[0])
        )
        prompt = str(placeholder) * _num_images(conversation[0])
        question = _text_of(conversation[0])
        return prompt + question if self._is_paligemma else f"{prompt}{question}\n"

    def _encode_pair(
        self, conversation: Sequence[Mapping[str, Any]], images: Sequence[Image.Image]
    ) -> dict[str, Tensor]:
        """One question and one answer for a processor without a chat template."""
        prompt, answer = self._plain_prompt(conversation[:-1]), _text_of(conversation[-1]).strip()
        if self._is_paligemma:
            return self._process(prompt, images, suffix=[answer])
        text = f"{prompt}{answer}{self.tokenizer.eos_token or ''}"
        features = self._process(text, images)
        ids = features["input_ids"][0]
        first = self._token_index(text, len(prompt), ids, images)
        labels = torch.full_like(ids, IGNORED)
        labels[first:] = ids[first:]
        features["labels"] = labels[None]
        return features


# ------------------------------------------------------------------------------------------------------------ processor


class _NoVideos(dict[str, Any]):
    """Stands in a processor for the part that reads videos; empty, as processors write their parts as JSON."""

    model_input_names: tuple[str, ...] = ()
    # SmolVLM's chat template asks for them, whatever it is given.
    num_frames = fps = size = None


def load_processor(name: str, *, revision: str | None = None, cache_dir: str | os.PathLike[str] | None = None) -> Any:
    """The processor of a base, without torchvision where it is not installed.

    transformers' image processors fall back to Pillow by themselves. The parts that read videos (Qwen-VL, SmolVLM2) do
    not: a processor that has one is then built without it, and takes images only.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when it needs a package that is missing.
    """
    source: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
    source |= hub_options("base model", name, "config.json", **source)
    with loading_errors("processor of the base model", name, REMEDY):
        try:
            return AutoProcessor.from_pretrained(name, trust_remote_code=False, **source)
        except (ImportError, TypeError) as error:
            # transformers 4 looks for the class of the video part, and finds None in its place
            missing = importlib.util.find_spec("torchvision") is None
            if not missing or not (isinstance(error, TypeError) or "torchvision" in str(error).lower()):
                raise
            try:
                return _load_images_only(name, source)
            except ImportError as unknown:
                raise ImportError(
                    f"{unknown}; without a name, torchvision, which transformers 5 does not need"
                ) from error


def _load_images_only(name: str, source: Mapping[str, Any]) -> Any:
    """Build the processor of a base without the part that reads videos."""
    names: Any = importlib.import_module("transformers.models.auto.processing_auto").PROCESSOR_MAPPING_NAMES
    model_type = str(AutoConfig.from_pretrained(name, trust_remote_code=False, **source).model_type)
    if model_type not in names:
        raise ImportError(f"torchvision: transformers {transformers.__version__} has no processor for {model_type!r}")
    found = names[model_type]
    processor_class: Any = getattr(transformers, found if isinstance(found, str) else found[0])
    parts: list[str] = (
        processor_class.get_attributes() if hasattr(processor_class, "get_attributes") else processor_class.attributes
    )
    loaders: dict[str, Any] = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}
    if unknown := [part for part in parts if part not in {*loaders, "video_processor"}]:
        raise ImportError(f"torchvision, for the parts of {processor_class.__name__} beside {unknown[0]}")

    def load_parts(cls: Any, *_: Any, **__: Any) -> list[Any]:
        return [
            loaders[part].from_pretrained(name, trust_remote_code=False, **source) if part in loaders else _NoVideos()
            for part in parts
        ]

    def check_part(self: Any, part: str, value: Any) -> Any:
        return (
            type(value)
            if isinstance(value, _NoVideos)
            else processor_class.check_argument_for_proper_class(self, part, value)
        )

    overridden = {
        "_get_arguments_from_pretrained": classmethod(load_parts),
        "check_argument_for_proper_class": check_part,
        "images_only": True,
        "__doc__": processor_class.__doc__,
        "__init__": processor_class.__init__,
    }
    images_only: Any = type(processor_class.__name__, (processor_class,), overridden)
    return images_only.from_pretrained(name, trust_remote_code=False, **source)


# --------------------------------------------------------------------------------------------------------------- layers


def _parts_of_layers(model: nn.Module) -> dict[str, str]:
    """Linear layers of the parts by name; the part of each."""
    modules = dict(model.named_modules())
    names = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    # those of adapters are none of the base's
    names = [name.replace(".base_layer", "") for name in names if ".lora_" not in name]
    parts = {name: part for name in names if (part := _part(name)) is not None}
    if "language" not in parts.values() and hasattr(model, "get_decoder"):
        decoder: Any = cast(Any, model).get_decoder()
        prefix = next((f"{name}." for name, module in modules.items() if module is decoder), None)
        parts |= {name: "language" for name in names if prefix and name.startswith(prefix) and name not in parts}
    return parts


def _part(name: str) -> str | None:
    """The part of a model that a layer of this name is in; None for one beside them, such as the output layer."""
    part: str | None = None
    for segment in name.split(".")[:-1]:
        if segment in _LANGUAGE_NAMES:
            return "language"
        if segment in _PROJECTOR_NAMES:
            return "projector"
        if segment in _VISION_NAMES:
            part = "vision"
    last = name.rpartition(".")[2]  # a projector may be one linear layer itself
    return "projector" if last in _PROJECTOR_NAMES else part


def _is_attention(name: str) -> bool:
    """Whether a layer of this name is one of attention's projections."""
    *parents, last = name.split(".")
    if last in _ATTENTION_OUTPUTS:
        return any(_ATTENTION.search(parent) for parent in parents[-2:])
    return last in _ATTENTION_INPUTS


def _conv1d_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module).__name__ == "Conv1D"]


def _num_used_vision_layers(config: Any) -> int | None:
    """How many layers of the vision tower lie before the features that the model takes; None where it says nothing."""
    chosen = getattr(config, "vision_feature_layer", None)
    total = getattr(getattr(config, "vision_config", None), "num_hidden_layers", None)
    if chosen is None or total is None:
        return None
    layers = chosen if isinstance(chosen, (list, tuple)) else [chosen]
    # hidden state 0 is what goes into the first layer
    return max(int(layer) if layer >= 0 else int(total) + 1 + int(layer) for layer in layers)


def _beyond(name: str, num_layers: int | None) -> bool:
    """Whether the layer belongs to a block beyond the first `num_layers`."""
    match = re.search(r"(?:^|\.)layers?\.(\d+)\.", name)
    return num_layers is not None and match is not None and int(match[1]) >= num_layers


def _image_token_ids(config: Any, processor: Any) -> set[int]:
    """The ids of the tokens that stand for an image."""
    found = [getattr(config, name, None) for name in ("image_token_id", "image_token_index")]
    found.append(getattr(processor, "image_token_id", None))
    return {int(token) for token in found if isinstance(token, int)}


# ------------------------------------------------------------------------------------------------- messages and tensors


def _check_choice(option: str, values: Sequence[str], known: Sequence[str]) -> None:
    unknown = [value for value in values if value not in known]
    if unknown or not values:
        raise ValueError(f"{option} {' '.join(values) or 'is empty'}: give one or more of {', '.join(known)}")


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
