"""What a training changed, in the words of every page and of the model card."""

from __future__ import annotations

import pytest

from training.improvement import MetricChange, changes, kept_sentence, measured_after, stopped_sentence

BEFORE = {"eval_loss": 0.6931, "eval_rewards/accuracies": 0.0, "eval_rewards/margins": 0.0, "eval_kl": 0.0}


def by_key(after: dict[str, float | None]) -> dict[str, MetricChange]:
    return {row.key: row for row in changes({"initial_metrics": BEFORE, "metrics": after})}


@pytest.mark.parametrize(("after", "verdict"), [(0.9, "better"), (0.3, "worse"), (0.5, "")])
def test_accuracy_has_no_before_and_is_judged_against_a_coin_toss(after: float, verdict: str) -> None:
    """The model is its own reference then: 0 % → 30 % would read as progress and be worse than guessing."""
    row = by_key({"eval_rewards/accuracies": after})["eval_rewards/accuracies"]
    assert (row.before_text, row.after_text, row.verdict) == ("–", f"{after:.1%}", verdict)


def test_other_metrics_are_compared_with_their_start() -> None:
    rows = by_key({"eval_loss": 0.5, "eval_rewards/margins": -0.2, "eval_kl": 0.1})
    assert (rows["eval_loss"].before_text, rows["eval_loss"].verdict) == ("0.6931", "better")
    assert rows["eval_rewards/margins"].verdict == "worse"
    assert rows["eval_kl"].verdict == "", "neither way is better"


def test_what_is_not_a_number_is_a_dash() -> None:
    row = by_key({"eval_loss": None})["eval_loss"]
    assert (row.after_text, row.verdict) == ("–", "")
    assert changes({}) == []


RESULT = {"step": 120, "total_steps": 200, "metric_for_best_model": "eval_loss", "best_metric": 0.53}


def test_the_model_that_is_kept_is_said() -> None:
    best = {**RESULT, "best_step": 40, "model_step": 40}
    assert kept_sentence(best) == "The best evaluation was at step 40 (eval_loss 0.53): that model is kept."
    assert measured_after(best) == "after step 40, whose model is kept"
    last = {**RESULT, "best_step": 120, "model_step": 120}
    assert kept_sentence(last).startswith("The last evaluation, at step 120, was the best (eval_loss 0.53)")
    assert measured_after(last) == "after the last"
    asked = {**RESULT, "best_step": 40, "model_step": 120}
    assert (
        kept_sentence(asked)
        == "The best evaluation was at step 40 (eval_loss 0.53); the model of step 120 is kept."
    )
    assert measured_after(asked) == "after the last"


def test_of_a_result_from_before_nothing_is_said() -> None:
    assert kept_sentence({"step": 120}) == stopped_sentence({"step": 120}) == ""
    assert measured_after({"step": 120}) == "after the last"


@pytest.mark.parametrize(
    ("reason", "words"), [("early_stopping", "no longer improved"), ("kl_budget", "kl_budget")]
)
def test_a_run_that_ended_itself_says_why(reason: str, words: str) -> None:
    sentence = stopped_sentence({**RESULT, "stopped_by": reason})
    assert "at step 120 of 200" in sentence
    assert words in sentence


def test_a_stop_that_a_person_asked_for_needs_no_reason() -> None:
    assert stopped_sentence({**RESULT, "stopped_by": "request"}) == ""
