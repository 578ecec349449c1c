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

import inspect
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from lorainit_diffusers.families.base import StepRecord
from lorainit_diffusers.families.conversations import IGNORED, Conversations, TooLongError
from lorainit_diffusers.families.pretrained import autocast, dtype_option
from lorainit_diffusers.families.vlm_layers import (
    conv1d_attention,
    default_layers,
    layers_of_tokens,
    parts_of_layers,
)
from lorainit_diffusers.families.vlm_processor import REMEDY, load_processor, save_processor
from lorainit_diffusers.loading.errors import loading_errors
from lorainit_diffusers.loading.files import check_transformers_folder
from lorainit_diffusers.loading.hub import hub_options
from lorainit_diffusers.loading.weights import check_vocabulary, load_whole

__all__ = [
    "COMPONENT",
    "IGNORED",
    "PARTS",
    "ROWS",
    "AnswerLogits",
    "TooLongError",
    "VisionLanguageFamily",
    "load_processor",
]

COMPONENT = "model"
# The parts of a model, and the rows of its language model.
PARTS = ("language", "vision", "projector")
ROWS = ("answer", "image", "prompt")
_NO_ANSWER = "the batch has no answer tokens: all labels are -100; encode conversations with answers"


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
        model: What `AutoModelForImageTextToText` loads.
        processor: Its processor.
        base_name: Folder or hub name that both come from.
        revision: Of the hub repository.
        cache_dir: Where its files are kept.
        adapt: The parts whose layers get an adapter when the user names none.
        statistics_tokens: The rows of the language model's layers that count in a collection pass.
        step: What the latest `loss` masked.
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
        self.conversations = Conversations(self.model, self.processor, self.base_name)
        self._part_of_layer = parts_of_layers(self.model)
        self._masked_layers = layers_of_tokens(self._part_of_layer)
        self._parameters = inspect.signature(type(self.model).forward).parameters
        self._own_positions = any(hasattr(module, "get_rope_index") for module in self.model.modules())

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
            path: Folder as `save_pretrained` writes it, or the name of a hub repository.
            revision: Hub revision of the base.
            cache_dir: Where downloads are kept; Hugging Face's own place by default.
            weight_dtype: Dtype of the model.
            device: Where it goes.
            adapt: The parts whose layers get an adapter when the user names none: `language` (the attention of the
                language model), `vision` (that of the vision tower), `projector` (its linear layers).
            statistics_tokens: The rows of the language model's layers that count in a collection pass: `answer` (the
                tokens of the answers and those before them, which predict them), `image` (those that hold an image),
                `prompt` (all others but padding).

        Raises:
            FileNotFoundError: When there is no such base, or it has no safetensors weights.
            ValueError: When it is no vision-language model, its processor needs a package that is missing, or an option
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
            FileNotFoundError: When the folder is missing or has no `config.json`.
        """
        check_transformers_folder(name)

    def save_processor(self, directory: str | os.PathLike[str]) -> None:
        """Write the processor, and how the base generates, beside the weights of a merged model."""
        generation: Any = getattr(self.model, "generation_config", None)
        if generation is not None:  # it may know an end that the tokenizer does not
            generation.save_pretrained(directory)
        source = {"revision": self.revision, "cache_dir": self.cache_dir}
        save_processor(self.processor, directory, self.base_name, source)

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
        return self.conversations.has_chat_template

    @property
    def max_tokens(self) -> int | None:
        """Positions that the language model has; None where it does not say."""
        return self.conversations.max_tokens

    def default_targets(self, component: str) -> list[str]:
        """Full names of the layers of the adapted parts: layers of the same name in other parts are left alone.

        Of the language model and the vision tower it is the projections of attention, of the projector all linear
        layers. Layers of the tower beyond the one whose features the model takes have no part in the loss, and none
        here.

        Raises:
            ValueError: Another component; a part without such layers; layers that are no linear ones (GPT-2's Conv1D).
        """
        if component != COMPONENT:
            raise ValueError(f"a vision-language model has one component, {COMPONENT!r}, not {component!r}")
        targets: list[str] = []
        for part in self.adapt:
            layers = default_layers(self.model, self._part_of_layer, part)
            if not layers:
                conv = conv1d_attention(self.model)
                if part == "language" and conv is not None:
                    raise ValueError(
                        f"layer {conv!r} is a Conv1D, as in GPT-2; only linear layers are supported: "
                        "give another base model"
                    )
                raise ValueError(
                    f"{self._name} has no {part} layers that are known as such; name some in target_modules"
                )
            targets += layers
        return targets

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        """Mean cross entropy of the answers' tokens, a scalar in float32; nothing in it is random.

        Raises:
            ValueError: When the batch has no answer.
        """
        answers = self.answer_logits(batch)
        return F.cross_entropy(answers.logits, answers.tokens)

    def loss_weight(self, batch: Mapping[str, Tensor]) -> float:
        """The tokens of the batch's answers, which the loss is the mean over.

        Raises:
            ValueError: When the batch has no answer.
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
            ValueError: When the batch has no answer.
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
            inputs["position_ids"] = positions + 1 if self.conversations.is_paligemma else positions
        positions = predicts.any(dim=0).nonzero().flatten()
        if self.conversations.is_paligemma:
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
            prompts: From `encode_prompt`; they are padded on the left.
            max_new_tokens: At most so many a text.
        """
        inputs = self._to_device(self.collate(prompts, padding_side="left"))
        inputs.pop("labels", None)
        # a base's own settings (Qwen-VL's penalty on repetition) would give another text than the likeliest tokens
        greedy: dict[str, Any] = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
        greedy |= {
            "repetition_penalty": 1.0,
            "no_repeat_ngram_size": 0,
            "eos_token_id": sorted(self.conversations.end_tokens) or None,
        }
        with torch.no_grad(), autocast(self.device, self.weight_dtype):
            tokens = cast(Any, self.model).generate(
                **inputs, max_new_tokens=max_new_tokens, pad_token_id=self.conversations.pad_token, **greedy
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
        """One conversation as a sample with `labels`: see `Conversations.encode`."""
        return self.conversations.encode(messages, images, max_length=max_length)

    def encode_prompt(
        self, messages: Sequence[Mapping[str, Any]], images: Sequence[Image.Image] = ()
    ) -> dict[str, Tensor]:
        """A conversation whose next message is the assistant's, for `generate`: see `Conversations.encode_prompt`."""
        return self.conversations.encode_prompt(messages, images)

    def check_texts(self, messages: Sequence[Mapping[str, Any]], num_images: int) -> None:
        """See what `encode` would find without the images: see `Conversations.check_texts`."""
        self.conversations.check_texts(messages, num_images)

    def num_answer_tokens(self, text: str) -> int:
        """About how many tokens `generate` needs for this answer."""
        return self.conversations.num_answer_tokens(text)

    def collate(self, features: Sequence[Mapping[str, Tensor]], padding_side: str = "right") -> dict[str, Tensor]:
        """One batch of several samples: see `Conversations.collate`."""
        return self.conversations.collate(features, padding_side)

    # ---- pieces

    @property
    def _name(self) -> str:
        return f"{type(self.model).__name__} {self.base_name!r}" if self.base_name else type(self.model).__name__

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
        image = torch.isin(ids, self.conversations.image_tokens.to(ids.device))
        rows = {"answer": answer, "image": image, "prompt": ~(answer | image)}
        return mask & torch.stack([rows[name] for name in self.statistics_tokens]).any(dim=0)


def _check_choice(option: str, values: Sequence[str], known: Sequence[str]) -> None:
    unknown = [value for value in values if value not in known]
    if unknown or not values:
        raise ValueError(f"{option} {' '.join(values) or 'is empty'}: give one or more of {', '.join(known)}")
