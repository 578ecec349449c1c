from __future__ import annotations

import itertools

import pytest

from lorainit_diffusers.evaluation.answers import exact_match, normalize_answer, token_f1


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The  Red\nApple.", "red apple"),
        ("an apple, a pear", "apple pear"),
        ("o'clock", "o'clock"),
        ("theatre", "theatre"),
        ("A", "a"),
        ("?", "?"),
        ("  ", ""),
        ("Äpfel!", "äpfel"),
        ("(a red apple)", "red apple"),
        ('"red", he said...', "red he said"),
        ("red , green ; blue", "red green blue"),
        ("Yes, it is (mostly) red.", "yes it is mostly red"),
        ("...red", "red"),
        ("¿Qué?", "qué"),
    ],
)
def test_normalised_text(text: str, normalized: str) -> None:
    assert normalize_answer(text) == normalized


# Within a row all are the same answer; between the rows of a block none is.
SAME = [
    [["1.5", "1.5.", " 1.5 "], ["15", "15,"], ["1,5"], ["1:5"], ["1/5"], ["1-5"], ["1 5"]],
    [["5", "5.", "５", "٥", "(5)", '"5"', "'5'", "the 5"], ["-5", "−5", "–5", "-5."], ["+5"], [".5"], [",5"], ["$5"]],
    [["5%", "5%."], ["5"], ["5°"], ["5'"], ['5"', "5″"], ["5!"], ["5²"], ["52"], ["#5"], ["<5"], ["~5"], ["5k"]],
    [["5'10\""], ["510"], ["5 10"], ["5'10"]],
    [["10:30", "10:30."], ["1030"], ["10.30"], ["10 30"]],
    [["3/4", "3⁄4"], ["34"], ["¾"], ["3 4"]],
    [["1,000", "1000", "1000.", "1,000,", '"1,000"'], ["1.000"], ["1 000"], ["1,00"]],
    [["12,345,678.9", "12345678.9"], ["12,345,6789"], ["123456789"]],
    [["0,123"], ["0123"], ["0.123"]],
    [["c", "C", "C."], ["C++", "c++.", "(C++)"], ["C#", "c#"], ["C+"], ["C-"], ["C*"]],
    [["a.b"], ["ab"], ["a b"], ["a-b"], ["a_b"], ["a/b"], ["a&b"], ["a@b"]],
    [["f(x)"], ["fx"], ["f x"], ["f[x]"]],
    [[".net"], ["net", "NET"]],
    [["u.s", "U.S."], ["us"], ["u s"]],
    [["it's", "it’s", "It's."], ["its"]],
    [["no", "No."], ["not"], ["none"], ["no no"]],
    [["vitamin A", "vitamin a."], ["vitamin", "a vitamin", "the vitamin"], ["vitamin B"]],
    [["A, B", "a b", "A B"], ["B", "b."], ["A"], ["AB"]],
    [["A 3", "a 3"], ["3"]],
    [["the"], ["a"], ["an"], ["!"], ["?"], ["..."], [""], ["-"]],
    [[":)"], [":("]],
    [["café", "cafe\u0301", "CAFÉ"], ["cafe"]],
    [["да", "Да."], ["нет"]],
    [["红色", "红色。", "「红色」"], ["绿色"], ["红"]],
    [["ΟΔΟΣ", "οδος", "οδοσ"], ["οδο"]],
    [["straße", "STRASSE", "strasse"], ["strase"]],
    [["red apple", "A red apple", "the red apple!", "red  apple", "Red\u00a0Apple"], ["redapple"], ["red-apple"]],
    [["x\u200by", "xy"], ["x y"]],
]


@pytest.mark.parametrize("block", SAME)
def test_what_is_the_same_answer_and_what_is_not(block: list[list[str]]) -> None:
    for row in block:
        for one, other in itertools.product(row, row):
            assert exact_match(one, [other]) == 1.0, (one, other)
            assert token_f1(one, [other]) == 1.0, (one, other)
    for first, second in itertools.permutations(block, 2):
        for one, other in itertools.product(first, second):
            assert exact_match(one, [other]) == 0.0, (one, other)
            # the words may be the same in another order, or as often as parts of one
            assert token_f1(one, [other]) < 1.0, (one, other)


@pytest.mark.parametrize(
    ("prediction", "answers", "matches", "f1"),
    [
        ("A red apple!", ["red apple"], 1.0, 1.0),
        ("apple", ["red apple"], 0.0, 2 / 3),
        ("apple apple", ["apple"], 0.0, 2 / 3),  # the second one has no counterpart
        ("apple red", ["red apple"], 0.0, 1.0),  # the order does not count
        ("green pear", ["red apple"], 0.0, 0.0),
        ("pear", ["red apple", "green pear", "Pear."], 1.0, 1.0),
        ("red apple", ["red apple", "green pear"], 1.0, 1.0),
        ("", ["red apple"], 0.0, 0.0),
        ("the", ["a"], 0.0, 0.0),
        ("", [""], 1.0, 1.0),
        ("1.5 m", ["15 m"], 0.0, 0.5),
        ("-5", ["5"], 0.0, 0.0),
        ("红色的苹果", ["红苹果"], 0.0, 0.75),
    ],
)
def test_scores(prediction: str, answers: list[str], matches: float, f1: float) -> None:
    assert exact_match(prediction, answers) == matches
    assert token_f1(prediction, answers) == pytest.approx(f1)


@pytest.mark.parametrize("score", [exact_match, token_f1])
def test_no_answers(score: object) -> None:
    with pytest.raises(ValueError, match="no answer to compare the prediction with"):
        score("red apple", [])  # type: ignore[operator]
