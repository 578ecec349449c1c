"""The task of a vision-language model: its questions, their batches, and the evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lorainit_diffusers.evaluation.answers import exact_match, token_f1
from lorainit_diffusers.families.base import ModelFamily, evaluating
from lorainit_diffusers.families.vlm import COMPONENT, IGNORED, VisionLanguageFamily
from lorainit_diffusers.files import write_text
from lorainit_diffusers.progress import progress_bar
from lorainit_diffusers.training.banner import Line, caption_line, count_line, size_lines
from lorainit_diffusers.training.data.images import load_image
from lorainit_diffusers.training.data.order import DataOrder
from lorainit_diffusers.training.options.checks import TrainOptions
from lorainit_diffusers.training.questions.conversations import QuestionRecord
from lorainit_diffusers.training.questions.data import read_question_data
from lorainit_diffusers.training.questions.encoded import EncodedQuestions, settle_answer_length
from lorainit_diffusers.training.questions.options import QuestionTaskOptions, resolve_questions
from lorainit_diffusers.training.questions.report import (
    by_type,
    mean_score,
    plot_scores,
    read_predictions,
    write_answer_report,
)
from lorainit_diffusers.training.run_banner import data_source, header_sizes
from lorainit_diffusers.training.stages import STAGES, stages
from lorainit_diffusers.training.start import lora_targets

# Training batches that one evaluation batch, which keeps no activations, is worth.
EVALUATION_RATIO = 4


class QuestionAnsweringTask:
    """Answering questions about images: a vision-language base with its questions.

    Args:
        options: Of the base and the data; what was not given is filled in.
        device: Where the base goes.
        dtype: Of the base.

    Attributes:
        primary_metric: `exact_match`.
        family: The base.
        base: The same, as what it is.
        targets: Layers that get an adapter, by component.
        num_train: Training questions.
        num_validation: Validation questions.
    """

    primary_metric: str = "exact_match"

    def __init__(self, options: QuestionTaskOptions, device: torch.device, dtype: torch.dtype) -> None:
        options = resolve_questions(options)
        self.options = options
        records, validation = read_question_data(options)
        base = VisionLanguageFamily.from_pretrained(
            options.pretrained_model_name_or_path,
            revision=options.revision,
            cache_dir=options.cache_dir,
            weight_dtype=dtype,
            device=device,
            adapt=options.adapt,
            statistics_tokens=options.statistics_tokens,
        )
        self.family: ModelFamily = base
        self.base = base
        self.targets = lora_targets(options, base, COMPONENT)
        self.train = EncodedQuestions(base, records, options.max_length)
        self.validation = EncodedQuestions(base, validation, options.max_length)
        self.num_train, self.num_validation = len(records), len(validation)
        self.max_new_tokens = settle_answer_length(options.max_new_tokens, base.num_answer_tokens, records, validation)
        self.eval_batch_size = options.eval_batch_size or EVALUATION_RATIO * options.train_batch_size
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
            count_line({name: len(records) for name, records in parts.items()}, data_source(self.options), "questions"),
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
        with evaluating(self.family):
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
        with evaluating(self.family):
            for chosen in self._chunks(prompt=True):
                prompts = [self.validation.sample(index, prompt=True) for index in chosen]
                for index, text in zip(chosen, self.base.generate(prompts, self.max_new_tokens), strict=True):
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
        scores = {name: mean_score(self._results, name) for name in ("exact_match", "token_f1")}
        kinds = by_type(self._results).items()
        return scores | {f"exact_match/{kind}": mean_score(rows, "exact_match") for kind, rows in kinds}

    def write_results(self, output_dir: Path, name: str) -> None:
        """Write the predictions of the latest evaluation to `predictions_{name}.jsonl`."""
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in self._results]
        write_text(output_dir / f"predictions_{name}.jsonl", "".join(lines))

    def write_report(self, output_dir: Path, lines: Sequence[Mapping[str, Any]], options: TrainOptions) -> None:
        """Write `report.html`, in one file: scores by stage and type, curves, and questions with their answers."""
        results = {
            stage: read_predictions(path)
            for stage in STAGES
            if (path := output_dir / f"predictions_{stage}.jsonl").is_file()
        }
        chosen = torch.randperm(self.num_validation, generator=torch.Generator().manual_seed(0))
        chosen = sorted(chosen[: self.options.num_samples].tolist())
        images = {index: [load_image(image) for image in self.validation.records[index].images] for index in chosen}
        plot_scores(lines, output_dir / "curves.png")
        title = f"{options.init} LoRA on {Path(str(self.options.pretrained_model_name_or_path)).name}"
        write_answer_report(output_dir, title, self._describe(lines, options), results, images)

    @property
    def settled(self) -> dict[str, Any]:
        """The options that the questions decide."""
        return {"max_new_tokens": self.max_new_tokens}

    @property
    def usage(self) -> list[str]:
        """Python that loads the base as `model`, for the model card."""
        base = self.options.pretrained_model_name_or_path
        return [
            "from peft import PeftModel",
            "from transformers import AutoModelForImageTextToText, AutoProcessor",
            "",
            f"model = AutoModelForImageTextToText.from_pretrained({base!r})",
            f"processor = AutoProcessor.from_pretrained({base!r})",
        ]

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

    def _describe(self, lines: Sequence[Mapping[str, Any]], options: TrainOptions) -> list[str]:
        scores = {stage: float(line[self.primary_metric]) for stage, line in stages(lines).items()}
        found = ", ".join(f"{100 * score:.1f} % ({stage})" for stage, score in scores.items())
        return [
            f"Answers that match exactly: {found}.",
            f"{options.init}, rank {options.rank}, learning rate {options.learning_rate:g}, {options.max_train_steps} "
            f"steps of {options.train_batch_size} questions, seed {options.seed}; {self.num_train} training and "
            f"{self.num_validation} validation questions. Case, articles and punctuation around words do not count.",
        ]


def _last_answer_tokens(sample: Mapping[str, Tensor]) -> int:
    """How many tokens the last answer of a conversation has, its end included."""
    trained = (sample["labels"][0, 1:] != IGNORED).nonzero().flatten()
    breaks = (trained.diff() > 1).nonzero().flatten()
    return trained.numel() - (int(breaks[-1]) + 1 if breaks.numel() else 0)
