"""Entropy and divergence over the vocabulary against naive loops in float64, and how evaluation uses them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.engine.conftest import NewRun
from training.contract import KL_PAIRS
from training.engine import evaluation, logps
from training.engine.data import TokenizedPair
from training.engine.distribution import token_statistics
from training.engine.logps import Head, token_logps

ROWS, WIDTH, VOCABULARY = 37, 16, 211


def states(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Head]:
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(ROWS, WIDTH, generator=draw, dtype=torch.float64)
    other = hidden + 0.3 * torch.randn(ROWS, WIDTH, generator=draw, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=draw)
    return hidden.to(dtype), other.to(dtype), labels, Head(weight.to(dtype), None)


@pytest.mark.parametrize("chunk", [5, 256])
def test_entropy_and_divergence_equal_naive_loops(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logps, "CHUNK_ROWS", chunk)
    hidden, other, labels, head = states()
    p = torch.log_softmax(hidden @ head.weight.T, -1).tolist()
    q = torch.log_softmax(other @ head.weight.T, -1).tolist()
    found = token_statistics(hidden, labels, head, other)
    entropies = [-sum(math.exp(a) * a for a in row) for row in p]
    divergences = [
        sum(math.exp(a) * (a - b) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)
    ]
    assert found.entropies.tolist() == pytest.approx(entropies, rel=1e-9)
    assert found.divergences is not None
    assert found.divergences.tolist() == pytest.approx(divergences, rel=1e-9)


def test_equal_states_have_no_divergence_and_without_a_reference_there_is_none() -> None:
    hidden, _, labels, head = states(torch.float32)
    same = token_statistics(hidden, labels, head, hidden).divergences
    assert same is not None and same.abs().max().item() == 0.0
    assert token_statistics(hidden, labels, head).divergences is None


def test_log_probabilities_are_to_the_bit_those_of_training() -> None:
    """Else the margin before the first step would not be exactly 0."""
    hidden, other, labels, head = states(torch.float32)
    expected = token_logps(hidden, labels, head)
    assert torch.equal(token_statistics(hidden, labels, head).logps, expected)
    assert torch.equal(token_statistics(hidden, labels, head, other).logps, expected)


def test_evaluation_reports_the_entropy_and_the_share_of_cut_pairs(new_run: NewRun) -> None:
    run = new_run(max_steps=4, max_length=120)
    assert run.train() == 0
    assert 0 < run.points("eval")[0]["eval_entropy"] < math.log(259)
    assert "1 of 4 validation pairs were longer than 120 tokens" in run.texts()
    assert run.points("eval")[4]["eval_truncated"] == 1 / 4
    (plan,) = [event for event in run.events if event["type"] == "plan"]
    cut = sum(point["truncated"] * 4 for point in run.points("train").values())
    assert 0 < cut == plan["num_truncated"] - 1


def test_the_pairs_of_the_exact_divergence_do_not_depend_on_the_order_of_the_file(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "KL_PAIRS", 3)
    assert KL_PAIRS > 3
    values = []
    for turned in (False, True):
        run = new_run(f"turned-{turned}", max_steps=1, eval_pairs=8, warmup_ratio=0.0)
        path = run.path / "eval.jsonl"
        lines = Path(run.config.eval_path).read_text().splitlines()
        path.write_text("\n".join(reversed(lines) if turned else lines) + "\n")
        assert run.write(eval_path=str(path)).train() == 0
        values.append(run.points("eval")[1]["eval_kl"])
    assert values[0] > 0
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_the_digest_knows_nothing_of_the_cut() -> None:
    ids = torch.arange(3).numpy().astype("int32")
    assert (
        TokenizedPair("a", ids, ids, ids, truncated=True).digest()
        == TokenizedPair("b", ids, ids, ids).digest()
    )
