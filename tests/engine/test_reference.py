"""The cache of reference log-probabilities: equal to the online value, shared, and safe against damage."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.engine.conftest import NewRun, RunFolder
from tests.engine.policies import tiny_config, tiny_data, tiny_policy
from training.engine import reference
from training.engine.data import TokenizedPair
from training.engine.logps import token_logps
from training.engine.policy import Policy
from training.engine.reference import ReferenceLogps, reference_key, score_reference

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> Policy:
    return tiny_policy(tiny_config(tiny_model))


@pytest.fixture(scope="module")
def pairs(tiny_model: Path) -> list[TokenizedPair]:
    return tiny_data(tiny_model, 9)


def score(policy: Policy, pairs: list[TokenizedPair], folder: Path) -> tuple[ReferenceLogps, list[int]]:
    """The records, and how many pairs were there already."""
    seen: list[int] = []
    records = score_reference(policy, pairs, folder, progress=lambda done, total: seen.append(done))
    return records, seen


def shards(policy: Policy, folder: Path) -> list[Path]:
    return sorted((folder / reference_key(policy)).glob("*.safetensors"))


def test_the_cache_equals_the_online_value(
    policy: Policy, pairs: list[TokenizedPair], tmp_path: Path
) -> None:
    score(policy, pairs, tmp_path)
    records, seen = score(policy, pairs, tmp_path)
    assert seen == [9]  # nothing was computed the second time
    with policy.reference():
        states = policy.scorer(pairs)
        online = token_logps(states.hidden, states.labels, policy.head)
    torch.testing.assert_close(records.token_logps(pairs, CPU), online, rtol=1e-5, atol=2e-5)
    with policy.inference():
        states = policy.scorer(pairs)
        assert not torch.allclose(token_logps(states.hidden, states.labels, policy.head), online, atol=1e-2)


def test_only_missing_pairs_are_computed(policy: Policy, pairs: list[TokenizedPair], tmp_path: Path) -> None:
    score(policy, pairs[:4], tmp_path)
    _, seen = score(policy, pairs, tmp_path)
    assert seen[0] == 4
    assert seen[-1] == 9


@pytest.mark.parametrize("damage", ["half", "bit", "empty"])
def test_a_damaged_shard_is_removed_and_computed_again(
    policy: Policy, pairs: list[TokenizedPair], tmp_path: Path, damage: str
) -> None:
    records, _ = score(policy, pairs, tmp_path)
    good = records.token_logps(pairs, CPU)
    (path,) = shards(policy, tmp_path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes({"half": content[: len(content) // 2], "bit": bytes(content), "empty": b""}[damage])
    again, seen = score(policy, pairs, tmp_path)
    assert seen[0] == 0
    torch.testing.assert_close(again.token_logps(pairs, CPU), good, rtol=0, atol=0)
    assert shards(policy, tmp_path) == [path]


def test_a_half_written_temporary_file_is_ignored(
    policy: Policy, pairs: list[TokenizedPair], tmp_path: Path
) -> None:
    score(policy, pairs, tmp_path)
    (shards(policy, tmp_path)[0].parent / ".abc.tmp").write_bytes(b"half")
    assert score(policy, pairs, tmp_path)[1] == [9]


def test_two_runs_that_computed_the_same_pairs_do_not_disturb_each_other(
    policy: Policy, pairs: list[TokenizedPair], tmp_path: Path
) -> None:
    folder = tmp_path / reference_key(policy)
    one, two = ReferenceLogps(folder), ReferenceLogps(folder)
    values, _ = score(policy, pairs, tmp_path / "elsewhere")
    for records in (one, two):
        for pair in pairs[: 6 if records is one else 9]:
            records.add(pair, values.token_logps([pair], CPU).numpy())
        records.flush()
    again, seen = score(policy, pairs, tmp_path)
    assert seen == [9]
    torch.testing.assert_close(again.token_logps(pairs, CPU), values.token_logps(pairs, CPU), rtol=0, atol=0)


def test_what_was_computed_before_leaving_is_kept(
    policy: Policy, pairs: list[TokenizedPair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(reference.TOKEN_BUDGET, "cpu", 1)
    calls = iter(range(99))

    def leave_at_the_fourth() -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_reference(policy, pairs, tmp_path, progress=lambda done, total: None, check=leave_at_the_fourth)
    assert score(policy, pairs, tmp_path)[1][0] == 3


def test_other_weights_have_another_key(policy: Policy, tmp_path: Path) -> None:
    from tests.tiny import build_tiny_model

    other = tiny_policy(tiny_config(build_tiny_model(tmp_path / "model", seed=1)))
    assert reference_key(other) != reference_key(policy)


def test_another_beta_costs_no_reference_pass(new_run: NewRun) -> None:
    assert new_run("first").train() == 0
    second = new_run("second", beta=0.5, seed=7)
    assert second.train() == 0
    assert reference_progress(second) == [(0, 20), (20, 20)]


def test_a_run_shorter_than_one_pass_scores_only_the_pairs_it_meets(new_run: NewRun) -> None:
    short = new_run("short", num_train_epochs=0.5)  # 2 of 4 steps with 4 pairs each, and 4 pairs held out
    assert short.train() == 0
    assert reference_progress(short)[-1] == (12, 12)
    assert sorted(short.points("train")) == [1, 2]


def reference_progress(run: RunFolder) -> list[tuple[int, int]]:
    phases = [event for event in run.events if event["type"] == "phase" and event["phase"] == "reference"]
    return [(event["done"], event["total"]) for event in phases]


def test_what_a_run_reads_is_fresh_again_and_what_it_does_not_need_is_not(
    policy: Policy, pairs: list[TokenizedPair], tmp_path: Path
) -> None:
    """The studio removes shards that no run has read for a month."""
    score(policy, pairs[:4], tmp_path)
    (needed,) = shards(policy, tmp_path)
    score(policy, pairs[4:], tmp_path)
    (other,) = set(shards(policy, tmp_path)) - {needed}
    for path in (needed, other):
        os.utime(path, (1.0, 1.0))
    score(policy, pairs[:4], tmp_path)
    assert needed.stat().st_mtime > 1.0
    assert other.stat().st_mtime == 1.0
