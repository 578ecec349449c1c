"""Answers to questions, compared with those that count as right: exact match and token F1, as SQuAD scores them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation and English articles, one space between words (Rajpurkar et al. 2016).

    As in SQuAD's evaluation script (arXiv:1606.05250), but that a text which consists of nothing else, such as `a` or
    `?`, stays what it is in lower case: it may be an answer, too.
    """
    lowered = text.lower()
    words = _ARTICLES.sub(" ", lowered.translate(_PUNCTUATION)).split()
    return " ".join(words) if words else " ".join(lowered.split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 where the prediction is one of the answers once both are normalised, else 0.

    Raises:
        ValueError: when there are no answers.
    """
    return max(float(normalize_answer(prediction) == answer) for answer in _normalized(answers))


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the prediction's words, against the answer that it is highest for.

    Words count as often as they come. 0 where no word is shared.

    Raises:
        ValueError: when there are no answers.
    """
    return max(_f1(normalize_answer(prediction).split(), answer.split()) for answer in _normalized(answers))


def _f1(predicted: Sequence[str], wanted: Sequence[str]) -> float:
    shared = sum((Counter(predicted) & Counter(wanted)).values())
    if shared == 0:
        return float(list(predicted) == list(wanted))  # both empty
    return 2 * shared / (len(predicted) + len(wanted))


def _normalized(answers: Sequence[str]) -> list[str]:
    if not answers:
        raise ValueError("there is no answer to compare the prediction with; give one at least")
    return [normalize_answer(answer) for answer in answers]
