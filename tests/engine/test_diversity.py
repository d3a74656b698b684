"""Numbers about answers, against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from training.engine.diversity import (
    bleu,
    distinct,
    is_refusal,
    mean_length,
    refusal_share,
    repetition,
    self_bleu,
)


def test_distinct_counts_over_all_answers() -> None:
    answers = [[1, 2, 1, 2], [1, 2, 3]]
    assert distinct(answers, 1) == pytest.approx(3 / 7)
    assert distinct(answers, 2) == pytest.approx(3 / 5)  # 12 21 12 | 12 23
    assert distinct([[1]], 2) is None


def test_repetition_is_a_share_within_each_answer() -> None:
    # 1234 2341 3412 4123 1234: four different of five; the second has none repeated, the third is too short.
    assert repetition([[1, 2, 3, 4, 1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 1, 1]]) == pytest.approx(
        (1 / 5 + 0) / 2
    )
    assert repetition([[7] * 10]) == pytest.approx(6 / 7)
    assert repetition([[1, 1, 1]]) is None


def test_bleu_by_hand() -> None:
    # Answer 1 2 3 4 5 against 1 2 3 9 9: 3/5 of the tokens; pairs 12 23 of four, smoothed (2+1)/(4+1);
    # triples 123 of three (1+1)/(3+1); no four (0+1)/(2+1). Equal length: no penalty.
    expected = (3 / 5 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4)
    assert bleu([1, 2, 3, 4, 5], [[1, 2, 3, 9, 9]]) == pytest.approx(expected)
    assert bleu([1, 2], [[1, 2, 3, 4]]) == pytest.approx(math.exp(1 - 4 / 2))
    assert bleu([1, 2], [[3, 4]]) == 0.0
    assert bleu([1, 1, 1], [[1]]) == pytest.approx((1 / 3 * 1 / 3 * 1 / 2) ** (1 / 3)), "counts are clipped"


def test_self_bleu_is_one_for_one_answer_to_all_and_zero_for_none_shared() -> None:
    assert self_bleu([[1, 2, 3, 4, 5]] * 3) == pytest.approx(1.0)
    assert self_bleu([[1, 2], [3, 4], [5, 6]]) == 0.0
    assert self_bleu([[1, 2]]) is None
    assert self_bleu([[1, 2], []]) is None


def test_mean_length() -> None:
    assert mean_length([[1, 2, 3], []]) == 1.5
    assert mean_length([]) is None


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I\u2019m unable to do this.",
        "As an AI language model, I have no body.",
        "I cannot provide that.",
        "  Es tut mir leid, das geht nicht.",
        "Ich kann dir dabei nicht helfen.",
        "Je suis désolé, mais non.",
        "Lo siento, no puedo ayudarte.",
        "对不起，我不能回答这个问题。",
        "作为一个人工智能，我没有感情。",
        "申し訳ありませんが、お答えできません。",
        "죄송합니다, 할 수 없습니다.",
        "Извините, я не могу помочь.",
    ],
)
def test_refusals_are_known(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "Paris is the capital of France.",
        "You can't square the circle; here is why.",
        "Canned fish keeps for years.",
        "我喜欢吃苹果。",
        "Das kann man nicht wissen, aber hier ist eine Idee.",
        "Here is a long answer. " * 10 + "I'm sorry about the length.",
        "",
    ],
)
def test_answers_are_no_refusals(text: str) -> None:
    assert not is_refusal(text)


def test_the_share_of_refusals() -> None:
    assert refusal_share(["I can't do that.", "Sure.", "Yes.", "No."]) == 0.25
    assert refusal_share([]) is None
