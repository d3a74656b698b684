"""What a training changed, in the words of every page and of the model card."""

from __future__ import annotations

import pytest

from training.improvement import MetricChange, changes

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
