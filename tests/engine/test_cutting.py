"""The rule for over-long pairs: every mode, every bound, and that nothing is lost without being counted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.conftest import NewRun
from tests.engine.pairs import message, pair
from tests.engine.policies import tiny_config
from tests.tiny import tiny_pairs
from training.contract import ConfigError, ExitCode, RunConfig
from training.engine.cutting import PROMPT_SHARE, CutRule
from training.engine.data import TokenizedPair, cut_pair, tokenize_pairs

MODES = ("keep_end", "keep_start", "drop")


def cut(whole: TokenizedPair, max_length: int, bos: int | None = None, **rule: Any) -> TokenizedPair:
    result = cut_pair(whole, max_length=max_length, rule=CutRule(**rule), bos=bos)
    assert result is not None
    return result


def sizes(found: TokenizedPair) -> tuple[int, int, int]:
    return len(found.prompt), len(found.chosen), len(found.rejected)


def test_a_short_pair_is_not_touched() -> None:
    short = pair(10, 5, 6)
    assert cut_pair(short, max_length=16) is short


def test_the_prompt_loses_its_left_side_first() -> None:
    found = cut(pair(30, 5, 6), 16)
    assert found.prompt.tolist() == list(range(20, 30))
    assert sizes(found) == (10, 5, 6)


def test_a_leading_bos_token_stays() -> None:
    assert cut(pair(30, 5, 6), 16, bos=0).prompt.tolist() == [0, *range(21, 30)]


def test_completions_lose_their_ends_when_the_prompt_is_at_its_floor() -> None:
    found = cut(pair(30, 5, 60), 16)
    assert found.prompt.tolist() == [28, 29]
    assert sizes(found) == (2, 5, 14)


def test_keep_start_cuts_the_ends_of_the_answers_and_never_the_prompt() -> None:
    assert sizes(cut(pair(10, 5, 60), 16, mode="keep_start")) == (10, 5, 6)
    assert sizes(cut(pair(16, 5, 60), 16, mode="keep_start")) == (16, 0, 0)  # which drops the pair


def test_drop_leaves_out_what_is_too_long_whole_or_in_a_part() -> None:
    assert cut_pair(pair(10, 5, 7), max_length=16, rule=CutRule(mode="drop")) is None
    for bounds in (CutRule(9, 0, "drop"), CutRule(0, 5, "drop")):
        assert cut_pair(pair(10, 5, 6), max_length=16, rule=bounds) is None
    fitting = pair(10, 5, 6)
    assert cut_pair(fitting, max_length=16, rule=CutRule(10, 6, "drop")) is fitting


def test_a_part_is_bounded_although_the_pair_would_fit() -> None:
    found = cut(pair(10, 5, 8), 100, max_prompt_length=4, max_completion_length=6)
    assert found.prompt.tolist() == [6, 7, 8, 9]
    assert sizes(found) == (4, 5, 6)


lengths = st.integers(1, 60)
bounds = st.sampled_from([0, 1, 7, 40])


@given(
    whole=st.builds(pair, lengths, lengths, lengths), max_length=st.integers(2, 80),
    bos=st.sampled_from([None, 0]), mode=st.sampled_from(MODES), prompts=bounds, completions=bounds,
)  # fmt: skip
def test_cutting_keeps_the_rule(
    whole: TokenizedPair, max_length: int, bos: int | None, mode: Any, prompts: int, completions: int
) -> None:
    rule = CutRule(prompts, completions, mode)
    found = cut_pair(whole, max_length=max_length, rule=rule, bos=bos)
    longest = max(len(whole.chosen), len(whole.rejected))
    fits = len(whole.prompt) + longest <= max_length
    fits &= not prompts or len(whole.prompt) <= prompts
    fits &= not completions or longest <= completions
    assert (found is whole) == fits
    assert (found is None) == (mode == "drop" and not fits)
    if found is None:
        return
    # within its bounds
    assert len(found.prompt) <= (prompts or 99)
    assert max(len(found.chosen), len(found.rejected)) <= (completions or 99)
    if len(found.chosen):
        assert len(found.prompt) + max(len(found.chosen), len(found.rejected)) <= max_length
    # the prompt's end, which predicts the answers, and the answers' starts stay
    assert found.prompt[-1] == whole.prompt[-1]
    assert found.chosen.tolist() == whole.chosen.tolist()[: len(found.chosen)]
    assert found.rejected.tolist() == whole.rejected.tolist()[: len(found.rejected)]
    inner = found.prompt[1:] if bos == 0 and len(found.prompt) > 1 else found.prompt
    assert inner.tolist() == whole.prompt.tolist()[len(whole.prompt) - len(inner) :]
    # both answers keep as much: neither is cut while the other, as long as it, stays
    assert min(len(whole.chosen), len(found.rejected)) <= len(found.chosen) or len(found.chosen) == len(
        whole.chosen
    )
    if mode == "keep_end":
        bounded = min(len(whole.prompt), prompts or 99)
        assert len(found.prompt) >= min(bounded, max(1, max_length // PROMPT_SHARE))
        assert len(found.chosen)  # an answer never goes


texts = st.text(alphabet="abc ", min_size=0, max_size=40)


@given(
    rows=st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=8),
    max_length=st.integers(2, 90), mode=st.sampled_from(MODES), prompts=bounds, completions=bounds,
)  # fmt: skip
def test_every_pair_is_kept_or_dropped_for_one_reason_and_no_two_answers_are_the_same(
    tokenizer: Any,
    rows: list[tuple[str, str, str]],
    max_length: int,
    mode: Any,
    prompts: int,
    completions: int,
) -> None:
    source = [
        {
            "id": str(i),
            "prompt": [message(p, "user")],
            "chosen": [message(c)],
            "rejected": [message(r)],
        }
        for i, (p, c, r) in enumerate(rows)
    ]
    rule = CutRule(prompts, completions, mode)
    kept, report = tokenize_pairs(source, tokenizer, max_length=max_length, rule=rule)
    counts = report.counts()
    reasons = (
        "identical", "became_identical", "empty_answer", "empty", "became_empty", "over_long", "refused_by_template",
    )  # fmt: skip
    assert counts["read"] == len(rows)
    assert counts["kept"] == len(kept) == len(rows) - counts["dropped"]
    assert counts["dropped"] == sum(counts[reason] for reason in reasons)  # type: ignore[literal-required]
    assert counts["empty_answer"] == sum(not (c.strip() and r.strip()) for _, c, r in rows)
    assert counts["identical"] == sum(c == r and bool(c.strip()) for _, c, r in rows)
    whole = {item.id: item for item in tokenize_pairs(source, tokenizer, max_length=10_000)[0]}
    assert counts["truncated"] == sum(item.num_tokens < whole[item.id].num_tokens for item in kept)
    for item in kept:
        assert len(item.prompt) and len(item.chosen) and len(item.rejected)
        assert item.chosen.tolist() != item.rejected.tolist()
    sentences = "\n".join(report.sentences("training", max_length))
    assert bool(sentences) == bool(counts["truncated"] or counts["dropped"])


def test_each_reason_has_its_sentence(tokenizer: Any) -> None:
    long = "same beginning " * 10
    user = [message("hello", "user")]
    source = [
        {"id": "a", "prompt": user, "chosen": [message(long + "A")], "rejected": [message(long + "B")]},
        {"id": "b", "prompt": user, "chosen": [message("good")], "rejected": [message("bad")]},
        {"id": "c", "prompt": user, "chosen": [message("same")], "rejected": [message("same")]},
        {"id": "d", "prompt": user, "chosen": [message("A" + long)], "rejected": [message("B" + long)]},
    ]
    kept, report = tokenize_pairs(source, tokenizer, max_length=64)
    assert [item.id for item in kept] == ["b", "d"]
    assert (report.identical, report.became_identical, report.truncated) == (1, 1, 1)
    said = "\n".join(report.sentences("training", 64))
    assert "1 of 4 training pairs were longer than 64 tokens and were cut: the start of the prompt" in said
    assert "1 training pairs were dropped: their answers are the same." in said
    assert "1 training pairs were dropped: cut to their length, their answers are the same." in said


def test_examples_without_a_rejected_side_are_counted_too(tokenizer: Any) -> None:
    source = [{**row, "rejected": []} for row in tiny_pairs(4)]
    kept, report = tokenize_pairs(
        source, tokenizer, max_length=1024, rule=CutRule(max_completion_length=3), sides=("chosen",)
    )
    assert [len(item.chosen) for item in kept] == [3] * 4
    assert (report.truncated, report.completions_cut, report.prompts_cut) == (4, 4, 0)


def test_half_of_the_length_for_each_side_is_one_of_the_choices(new_run: NewRun) -> None:
    halves = new_run("halves", max_steps=1, max_length=128, max_length_per="pair")
    whole = new_run("whole", max_steps=1, max_length=64)
    assert halves.train() == whole.train() == 0
    assert halves.config.side_length == 64
    assert halves.result["data_sha256"] == whole.result["data_sha256"]
    assert halves.result["data"]["train"]["truncated"] > 0


def test_the_plan_and_the_result_tell_each_split_and_reason_apart(new_run: NewRun) -> None:
    run = new_run(max_steps=1, max_length=64, eval_pairs=3)
    assert run.train() == 0
    (plan,) = [event for event in run.events if event["type"] == "plan"]
    assert plan["data"] == run.result["data"]
    assert set(plan["data"]) == {"train", "eval"}
    train, held_out = plan["data"]["train"], plan["data"]["eval"]
    assert (train["read"], held_out["read"]) == (16, 3)
    assert plan["num_truncated"] == train["truncated"] + held_out["truncated"] > 0
    assert plan["num_dropped"] == train["dropped"] + held_out["dropped"]


def test_another_rule_is_another_trajectory(new_run: NewRun) -> None:
    """Else a resumed run would go on with pairs that its first steps never saw."""
    from training.engine.trajectory import NOT_IDENTITY

    fields = {"max_length", "max_length_per", "max_prompt_length", "max_completion_length", "truncation_mode"}
    assert fields <= {field.name for field in dataclasses.fields(RunConfig)} - NOT_IDENTITY


def test_when_every_pair_is_over_long_the_sentence_says_so(new_run: NewRun) -> None:
    run = new_run(max_length=8, truncation_mode="drop")
    assert run.train() == ExitCode.REFUSED
    assert (
        "No training pair is left of 16. 16 training pairs were dropped: they are longer than 8"
        in (run.result["error"])
    )
    assert "max_context_length" in run.result["next_step"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"truncation_mode": "middle"}, "truncation_mode must be keep_end, keep_start or drop"),
        ({"max_length_per": "batch"}, "max_length_per must be side or pair"),
        ({"max_prompt_length": -1}, "max_prompt_length must be 0"),
        ({"max_completion_length": 2.5}, "max_completion_length must be 0"),
        ({"max_length": 1, "max_length_per": "pair"}, "max_length 1"),
        ({"max_prompt_length": 600, "max_length": 600}, "max_prompt_length 600"),
    ],
)
def test_a_rule_that_means_nothing_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny_config(Path("/model"), **settings)
