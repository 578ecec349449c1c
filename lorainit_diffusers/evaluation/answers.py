"""Answers to questions, compared with those that count as right: exact match and token F1.

The rule is that of SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250) as far as it makes no two different answers equal.
What does not count:

- case, and how a character is coded (composed or not, full-width, digits of other scripts, curly quotes, long dashes);
- the articles `a`, `an` and `the` before a word, but for `a` before a single letter or a number;
- punctuation around words: `. , ; : ! ?`, quotes and brackets;
- commas between thousands: `1,000` is `1000`.

What counts, where SQuAD's script deletes all punctuation: whatever is inside a word or a number (`1.5`, `10:30`, `3/4`,
`it's`, `U.S`), signs and symbols (`-5`, `+5`, `$5`, `5%`, `C++`, `C#`), a point before the first character (`.5`,
`.net`), and what may belong to the number before it (`5'`, `5"`, `5!`). An answer that consists of nothing that counts,
such as `the` or `?`, stays what it is.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

_ARTICLES = frozenset({"a", "an", "the"})
# 1,000 and 12,345,678.9, but no 0,123 and no 1,5
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)")
_QUOTES = "\"'`"
_BRACKETS = {"(": ")", "[": "]", "{": "}"}
_BEFORE_WORDS = _QUOTES + "".join(_BRACKETS) + ",;:"
_AFTER_WORDS = _QUOTES + "".join(_BRACKETS.values()) + ".,;:!?"
# Other ways to write the same characters; nothing for those that say something else (5\u00b2 is not 52).
_CHARACTERS = {
    **{code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)},  # full-width forms
    **dict.fromkeys(map(ord, "\u2018\u2019\u201a\u201b\u2032\u02bc\u300c\u300d\u2039\u203a"), "'"),
    **dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb\u300e\u300f\u300a\u300b"), '"'),
    **dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"), "-"),
    **dict.fromkeys(map(ord, "\u3002\uff61"), "."),
    **{0x3001: ",", 0xFF64: ",", 0x2026: "...", 0x00BF: " ", 0x00A1: " ", 0x2044: "/"},
    **dict.fromkeys((0x200B, 0x200E, 0x200F, 0x2060, 0xFEFF, 0x00AD)),  # what is not seen
}
# Written without spaces: each character is a word of its own for F1.
_NO_SPACES = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")


def normalize_answer(text: str) -> str:
    """What of an answer counts: its words, with one space between them; see the top of this file."""
    plain = unicodedata.normalize("NFC", text).translate(_CHARACTERS)
    plain = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in plain).casefold()
    pieces = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), plain).split()
    measures = "".join(quote for quote in _QUOTES if plain.count(quote) % 2)
    words = [_trim(piece, measures) for piece in pieces]
    kept = [word for index, word in enumerate(words) if word and not _is_article(pieces, words, index)]
    return " ".join(kept or pieces)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 where the prediction is one of the answers once both are normalised, else 0.

    Raises:
        ValueError: When there are no answers.
    """
    return max(float(normalize_answer(prediction) == answer) for answer in _normalized(answers))


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the prediction's words, against the answer that it is highest for.

    The words are those of `normalize_answer`, and count as often as they come; of Chinese and Japanese every character
    is one. 0 where no word is shared.

    Raises:
        ValueError: When there are no answers.
    """
    predicted = _words(normalize_answer(prediction))
    return max(_f1(predicted, _words(answer)) for answer in _normalized(answers))


def _trim(word: str, measures: str) -> str:
    """A word without the punctuation around it; the quotes of `measures` stay behind a number (feet, inches)."""
    while word:
        if word.startswith(".."):
            word = word.lstrip(".")
            continue
        first, last, rest = word[0], word[-1], word[1:]
        if first in _BRACKETS and word.count(first) == word.count(_BRACKETS[first]) and last != _BRACKETS[first]:
            pass  # f(x) and (a)b are words of their own
        elif first in _BEFORE_WORDS and not (first == "," and rest[:1].isdigit()):
            word = rest
            continue
        belongs = word[-2:-1].isdigit() and (last == "!" or last in measures)
        opening = next((left for left, right in _BRACKETS.items() if right == last), None)
        if opening is not None and word.count(opening) >= word.count(last):
            belongs = True
        if last not in _AFTER_WORDS or belongs:
            return word
        word = word[:-1]
    return word


def _is_article(pieces: Sequence[str], words: Sequence[str], index: int) -> bool:
    """Whether a word is an article: nothing comes between it and a word that it can belong to."""
    if words[index] not in _ARTICLES or not pieces[index].endswith(words[index]):
        return False
    following = next((word for word in words[index + 1 :] if word), "")
    if words[index] == "a":  # a letter, too: A B, and 3 in "A 3"
        return len(following) > 1 and not following[0].isdigit()
    return bool(following)


def _words(normalized: str) -> list[str]:
    return _NO_SPACES.sub(r" \1 ", normalized).split()


def _f1(predicted: Sequence[str], wanted: Sequence[str]) -> float:
    shared = sum((Counter(predicted) & Counter(wanted)).values())
    if shared == 0:
        return float(list(predicted) == list(wanted))  # both empty
    return 2 * shared / (len(predicted) + len(wanted))


def _normalized(answers: Sequence[str]) -> list[str]:
    if not answers:
        raise ValueError("there is no answer to compare the prediction with; give one at least")
    return [normalize_answer(answer) for answer in answers]
