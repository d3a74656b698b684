"""The example dataset that ships with the project keeps what its README promises."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[2] / "datasets_app" / "example" / "short_and_direct.jsonl"
MARKDOWN = re.compile(r"`|\*\*|__|\n|^\s*(?:[-*+•]|\d+[.)]|#{1,6}|>)\s|\[[^\]]+\]\(")


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, Any]]:
    """Every line, parsed; a line that is no JSON fails here."""
    return [json.loads(line) for line in EXAMPLE.read_text(encoding="utf-8").splitlines()]


def answer(pair: dict[str, Any], side: str) -> str:
    """The text of one side."""
    return str(pair[side][0]["content"])


def words(text: str) -> int:
    """Length as the README counts it."""
    return len(text.split())


def test_there_are_about_two_hundred_pairs_with_three_parts(pairs: list[dict[str, Any]]) -> None:
    assert 190 <= len(pairs) <= 220
    assert all(set(pair) == {"prompt", "chosen", "rejected"} for pair in pairs)


def test_turns_alternate_and_every_prompt_ends_with_the_user(pairs: list[dict[str, Any]]) -> None:
    for pair in pairs:
        roles = [message["role"] for message in pair["prompt"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) + ["user"], pair["prompt"]
        assert all(message["content"].strip() for message in pair["prompt"])


def test_each_side_is_one_answer_and_the_sides_differ(pairs: list[dict[str, Any]]) -> None:
    for pair in pairs:
        for side in ("chosen", "rejected"):
            assert [message["role"] for message in pair[side]] == ["assistant"]
            assert 8 <= words(answer(pair, side)) <= 90, answer(pair, side)
        assert answer(pair, "chosen") != answer(pair, "rejected")


def test_no_prompt_and_no_last_question_comes_twice(pairs: list[dict[str, Any]]) -> None:
    assert len({json.dumps(pair["prompt"]) for pair in pairs}) == len(pairs)
    assert len({pair["prompt"][-1]["content"].lower() for pair in pairs}) == len(pairs)


def test_enough_prompts_have_earlier_turns_or_a_system_message(pairs: list[dict[str, Any]]) -> None:
    roles = [[message["role"] for message in pair["prompt"]] for pair in pairs]
    assert sum("assistant" in each for each in roles) >= 40
    assert sum(each[0] == "system" for each in roles) >= 25


def test_both_sides_are_plain_prose_without_markdown(pairs: list[dict[str, Any]]) -> None:
    marked = [answer(p, side) for p in pairs for side in ("chosen", "rejected")]
    assert [text for text in marked if MARKDOWN.search(text)] == []


def test_length_does_not_give_the_preferred_side_away(pairs: list[dict[str, Any]]) -> None:
    ratios = [words(answer(p, "rejected")) / words(answer(p, "chosen")) for p in pairs]
    shorter = sum(ratio <= 0.8 for ratio in ratios)
    longer = sum(ratio > 1.25 for ratio in ratios)
    for share in (shorter, longer, len(pairs) - shorter - longer):
        assert 0.28 <= share / len(pairs) <= 0.40


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_no_three_word_opening_is_frequent(pairs: list[dict[str, Any]], side: str) -> None:
    openings = Counter(" ".join(answer(pair, side).lower().split()[:3]) for pair in pairs)
    opening, count = openings.most_common(1)[0]
    assert count <= 0.04 * len(pairs), opening


def test_the_readme_gives_the_true_counts(pairs: list[dict[str, Any]]) -> None:
    readme = (EXAMPLE.parent / "README.md").read_text(encoding="utf-8")
    earlier = sum(any(m["role"] == "assistant" for m in pair["prompt"]) for pair in pairs)
    system = sum(pair["prompt"][0]["role"] == "system" for pair in pairs)
    assert f"holds {len(pairs)} preference pairs" in readme
    assert f"{earlier} prompts have earlier turns, {system} have a system prompt" in readme
