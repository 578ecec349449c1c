from __future__ import annotations

import pytest

from lorainit_diffusers.evaluation.answers import exact_match, normalize_answer, token_f1


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The  Red\nApple.", "red apple"),
        ("an apple, a pear", "apple pear"),
        ("o'clock", "oclock"),
        ("theatre", "theatre"),
        ("A", "a"),
        ("?", "?"),
        ("  ", ""),
        ("Äpfel!", "äpfel"),
    ],
)
def test_normalised_text(text: str, normalized: str) -> None:
    assert normalize_answer(text) == normalized


@pytest.mark.parametrize(
    ("prediction", "answers", "matches", "f1"),
    [
        ("A red apple!", ["red apple"], 1.0, 1.0),
        ("apple", ["red apple"], 0.0, 2 / 3),
        ("apple apple", ["apple"], 0.0, 2 / 3),  # the second one has no counterpart
        ("apple red", ["red apple"], 0.0, 1.0),  # the order does not count
        ("green pear", ["red apple"], 0.0, 0.0),
        ("pear", ["red apple", "green pear", "Pear."], 1.0, 1.0),
        ("", ["red apple"], 0.0, 0.0),
        ("the", ["a"], 0.0, 0.0),
        ("", [""], 1.0, 1.0),
    ],
)
def test_scores(prediction: str, answers: list[str], matches: float, f1: float) -> None:
    assert exact_match(prediction, answers) == matches
    assert token_f1(prediction, answers) == pytest.approx(f1)


@pytest.mark.parametrize("score", [exact_match, token_f1])
def test_no_answers(score: object) -> None:
    with pytest.raises(ValueError, match="no answer to compare the prediction with"):
        score("red apple", [])  # type: ignore[operator]
