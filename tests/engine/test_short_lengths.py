"""A max_length that cuts much is warned of, one that leaves nothing is refused, both with the length that would do."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.engine.conftest import NewRun, RunFolder
from tests.tiny import tiny_pairs
from training.contract import ExitCode
from training.engine.data import tokenize_pairs

ENOUGH = re.compile(r"(\d+) would keep 95 % of them whole")


def lengths(tokenizer: Any, count: int = 16) -> list[int]:
    pairs, _ = tokenize_pairs(tiny_pairs(count), tokenizer, max_length=100_000)
    return sorted(len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in pairs)


def named_length(text: str) -> int:
    found = ENOUGH.search(text)
    assert found, text
    return int(found[1])


def refusal(run: RunFolder) -> str:
    assert run.train() == ExitCode.REFUSED
    return f"{run.result['error']} {run.result['next_step']}"


@pytest.mark.parametrize("mode", ["keep_end", "keep_start"])
def test_a_length_that_leaves_next_to_nothing_of_most_pairs_is_refused(
    new_run: NewRun, tokenizer: Any, mode: str
) -> None:
    # keep_end leaves two tokens of the prompt, keep_start of most answers three or none
    prompts = sorted(
        len(pair.prompt) for pair in tokenize_pairs(tiny_pairs(16), tokenizer, max_length=9999)[0]
    )
    length = {"keep_end": 16, "keep_start": prompts[2] + 3}[mode]
    said = refusal(new_run(max_length=length, truncation_mode=mode))
    assert f"max_length {length} is too short for these pairs" in said
    whole = lengths(tokenizer)
    assert named_length(said) == whole[15]  # 95 % of 16 are 15.2, so all
    at_that_length = new_run("again", max_length=named_length(said), max_steps=1, truncation_mode=mode)
    assert at_that_length.train() == 0
    assert at_that_length.result["data"]["train"]["truncated"] == 0


def test_the_length_that_is_named_keeps_no_more_than_it_says(new_run: NewRun, tokenizer: Any) -> None:
    said = refusal(new_run(max_length=8, pairs=40))
    whole = lengths(tokenizer, 40)
    assert named_length(said) == whole[37] < whole[39]
    assert sum(length <= named_length(said) for length in whole) >= 38


def test_half_of_the_length_for_a_side_is_counted_twice(new_run: NewRun, tokenizer: Any) -> None:
    said = refusal(new_run(max_length=32, max_length_per="pair"))
    assert named_length(said) == 2 * lengths(tokenizer)[15]


def test_sft_is_refused_alike(new_run: NewRun) -> None:
    assert "is too short for these examples" in refusal(new_run(max_length=8, method="sft"))


def test_a_quarter_of_cut_pairs_is_warned_of_and_less_is_not(new_run: NewRun, tokenizer: Any) -> None:
    whole = lengths(tokenizer)
    for name, length, warned in (("much", whole[11] - 1, True), ("little", whole[12], False)):
        run = new_run(name, max_length=length, max_steps=1, eval_pairs=0)
        assert run.train() == 0
        found = [event for event in run.events if event["type"] == "log" and ENOUGH.search(event["text"])]
        assert [event["level"] for event in found] == ["warning"] * warned
        too_long = run.result["data"]["train"]["truncated"]
        assert (too_long > 4) == warned
        if warned:
            assert f"{too_long} of 16 training pairs do not fit max_length {length}" in found[0]["text"]
            assert named_length(found[0]["text"]) == whole[15]


def test_bounds_of_the_parts_are_the_person_s_own_word(new_run: NewRun) -> None:
    run = new_run(max_completion_length=2, max_prompt_length=2, max_steps=1)
    assert run.train() == 0
    assert run.result["data"]["train"]["truncated"] == 16
    assert not ENOUGH.search(run.texts())


def test_a_length_too_short_for_training_does_not_stop_an_evaluation_of_a_finished_run(
    new_run: NewRun,
) -> None:
    from training.engine import evaluate

    run = new_run(max_steps=1)
    assert run.train() == 0
    run.write(max_length=16)
    assert evaluate(run.path)["data"]["truncated"] == 4
