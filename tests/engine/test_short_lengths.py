"""A max_length that cuts much is warned of, one that leaves nothing is refused, both with the length that would do."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import NewRun, RunFolder
from tests.engine.pairs import message
from tests.engine.policies import tiny_config
from tests.tiny import tiny_pairs
from training.contract import ExitCode
from training.engine.cutting import CutRule
from training.engine.data import tokenize_pairs
from training.engine.errors import RefusedError
from training.engine.events import LoggedEvents
from training.engine.training_run import prepare_split

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


Row = tuple[str, str, str]


def source(rows: list[Row]) -> list[dict[str, Any]]:
    return [
        {"id": str(i), "prompt": [message(p, "user")], "chosen": [message(c)], "rejected": [message(r)]}
        for i, (p, c, r) in enumerate(rows)
    ]


@dataclasses.dataclass
class Judgement:
    """What is said of training rows under some bounds."""

    tokenizer: Any
    folder: Path

    def __call__(self, rows: list[Row], **settings: Any) -> tuple[str, str, dict[str, Any]]:
        """The warning of a length that would do ("" for none), the refusal ("" for none), the counts."""
        path = self.folder / "rows.jsonl"
        path.write_text("\n".join(json.dumps(pair) for pair in source(rows)))
        config = tiny_config(self.folder, train_path=str(path), **settings)
        events, said = LoggedEvents(), []
        events.log = lambda text, level="info": said.append(text)  # type: ignore[method-assign]
        try:
            counts = prepare_split(config, self.tokenizer, events, path, "training")[1]
        except RefusedError as error:
            return "", f"{error} {error.next_step}", {}
        return next((text for text in said if ENOUGH.search(text)), ""), "", dict(counts)


@pytest.fixture
def judge(tokenizer: Any, tmp_path: Path) -> Judgement:
    return Judgement(tokenizer, tmp_path)


ALIKE: Row = ("p" * 20, "same start" + "x" * 50, "same start" + "y" * 50)
SHORT: Row = ("p" * 20, "yes", "no!")


def test_what_the_bound_of_the_answers_made_the_same_is_not_laid_on_max_length(judge: Judgement) -> None:
    long = ("p" * 20 + "q" * 200, "zzz", "yyy")
    rows = [ALIKE] * 60 + [SHORT] * 30 + [long] * 10
    warning, refusal, counts = judge(rows, max_completion_length=10, max_length=120)
    assert (warning, refusal) == ("", "")
    assert (counts["became_identical"], counts["kept"]) == (60, 40)
    # and where such a pair is over max_length, too
    both = ("p" * 200, *ALIKE[1:])
    warning, refusal, counts = judge([both] * 60 + [SHORT] * 40, max_completion_length=10, max_length=120)
    assert (warning, refusal) == ("", "")
    assert counts["became_identical"] == 60


def test_what_the_bound_of_the_prompts_cut_is_not_laid_on_max_length(judge: Judgement) -> None:
    rows = [("p" * 200, f"a{i} yes", f"no{i}") for i in range(94)] + [("p" * 200, "z" * 300, "y" * 300)] * 6
    warning, refusal, counts = judge(rows, max_prompt_length=64, max_length=200)
    assert (warning, refusal) == ("", "")
    assert counts["truncated"] == 100


def test_what_drop_leaves_out_for_a_part_is_not_laid_on_max_length(judge: Judgement) -> None:
    settings = {"max_prompt_length": 64, "max_length": 120, "truncation_mode": "drop"}
    warning, refusal, counts = judge([("p" * 200, "yes", "no!")] * 60 + [SHORT] * 40, **settings)
    assert (warning, refusal) == ("", "")
    assert counts["over_long"] == 60
    warning, *_ = judge([("p" * 20, "y" * 200, "n" * 200)] * 60 + [SHORT] * 40, **settings)
    assert "60 of 100 training pairs do not fit max_length 120" in warning


def test_answers_that_max_length_itself_made_the_same_are_refused_in_words_that_are_true(
    judge: Judgement,
) -> None:
    _, refusal, _ = judge(
        [("p" * 20, *("same beginning " * 10 + end for end in "AB"))] * 6 + [SHORT] * 4, max_length=64
    )
    assert (
        "6 of the 10 that it leaves keep fewer than 4 tokens of the prompt or of an answer, or the same"
        in refusal
    )


def test_when_only_the_parts_bounds_leave_nothing_they_are_named(judge: Judgement) -> None:
    _, refusal, _ = judge([ALIKE] * 4, max_completion_length=10, max_length=120)
    assert "No training pair is left of 4." in refusal
    assert "raise max_prompt_length or max_completion_length" in refusal
    assert "max_context_length" not in refusal


@pytest.mark.parametrize("mode", ["keep_start", "drop"])
def test_pairs_without_room_are_dropped_and_say_nothing_against_the_others(
    judge: Judgement, mode: str
) -> None:
    rows = [("p" * 600, "a" * 40, "b" * 40)] * 60 + [SHORT] * 40
    warning, refusal, counts = judge(rows, max_length=512, truncation_mode=mode)
    assert refusal == ""
    assert counts["kept"] == 40
    assert "60 of 100 training pairs do not fit max_length 512" in warning


def test_more_than_half_of_what_is_left_must_be_stumps(judge: Judgement) -> None:
    stump = ("p" * 40, "a" * 400, "b" * 400)  # three tokens of the prompt are left
    warning, refusal, _ = judge([stump] * 5 + [SHORT] * 5, max_length=31)
    assert warning and not refusal
    _, refusal, _ = judge([stump] * 6 + [SHORT] * 5, max_length=31)
    assert "max_length 31 is too short" in refusal


@pytest.mark.parametrize(("tokens", "stumps"), [(3, 1), (4, 0)])
def test_fewer_than_four_tokens_of_a_prompt_or_an_answer_are_a_stump(
    tokenizer: Any, tokens: int, stumps: int
) -> None:
    long = source([("p" * 40, "a" * 400, "b" * 400)])
    (whole,), _ = tokenize_pairs(long, tokenizer, max_length=9999)
    for length, mode in ((8 * tokens, "keep_end"), (len(whole.prompt) + tokens, "keep_start")):
        rule = CutRule(mode=mode)  # type: ignore[arg-type]
        (cut,), report = tokenize_pairs(long, tokenizer, max_length=length, rule=rule)
        assert tokens == (len(cut.prompt) if mode == "keep_end" else len(cut.chosen))
        assert report.stumps == stumps
