"""The per-pair record: every value against a plain computation, its steps, and a run that is continued."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from tests.engine.conftest import NewRun, RunFolder
from tests.engine.interruptions import LeaveAt
from tests.engine.policies import tiny_config, tiny_data, tiny_policy
from tests.tiny import build_tiny_model
from training.contract import ExitCode
from training.engine.logps import sum_by_owner, token_logps
from training.engine.order import Order
from training.pair_columns import PAIR_COLUMNS

Rows = list[dict[str, Any]]
SETTINGS: dict[str, Any] = {"pairs": 24, "num_train_epochs": 2, "eval_steps": 3, "save_steps": 2}


def rows_of(run: RunFolder) -> dict[int, Rows]:
    """Rows by the step in the file's name."""
    return {
        int(path.stem[5:]): parquet.read_table(path).to_pylist()
        for path in sorted((run.path / "pairs").iterdir())
    }


def keys_of(rows: Rows, split: str) -> list[tuple[int, str]]:
    return [(row["step"], row["id"]) for row in rows if row["split"] == split]


def test_before_training_every_pair_has_the_reference_on_both_sides(
    new_run: NewRun, tiny_model: Path
) -> None:
    run = new_run(max_steps=1, pairs=4, eval_pairs=2, lora_dropout=0.1)
    assert run.train() == 0
    rows = rows_of(run)[0]
    assert list(rows[0]) == list(PAIR_COLUMNS)
    policy = tiny_policy(tiny_config(tiny_model), packed=False, bent=False)
    pairs = tiny_data(tiny_model, 4)
    states = policy.scorer(pairs)
    expected = sum_by_owner(token_logps(states.hidden, states.labels, policy.head), states.owner, 8).tolist()
    by_key = {(row["split"], row["id"]): row for row in rows}
    assert len(rows) == len(by_key) == 6, "four training and two validation pairs"
    for index, pair in enumerate(pairs):
        row = by_key["train", pair.id]
        for side, value in (("chosen", expected[2 * index]), ("rejected", expected[2 * index + 1])):
            for model in ("policy", "reference"):
                assert row[f"{model}_{side}_logps"] == pytest.approx(value, abs=1e-3)
                length = row[f"{side}_tokens"]
                assert row[f"{model}_{side}_mean_logps"] == pytest.approx(value / length, abs=1e-4)
        assert (row["step"], row["dropout"], row["truncated"]) == (0, False, False)
        assert row["chosen_tokens"] == len(pair.chosen)
    for row in rows:
        assert row["margin"] == pytest.approx(0, abs=1e-4)
        assert row["loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_each_file_holds_the_evaluation_and_the_training_pairs_met_since_the_last(new_run: NewRun) -> None:
    run = new_run(**SETTINGS, lora_dropout=0.1)
    assert run.train() == 0
    files = rows_of(run)
    assert sorted(files) == [0, 2, 3, 4, 6, 8, 9, 10, 12]
    order = Order(num_pairs=24, batch_size=2, accumulation=2, num_epochs=2, max_steps=0, seed=42)
    met = {
        (step, f"pair-{index:04d}") for step in range(12) for m in order.micro_batches(step) for index in m
    }
    train = [key for step, rows in files.items() if step for key in keys_of(rows, "train")]
    assert sorted(train) == sorted(met)
    assert all(file >= step + 1 for file, rows in files.items() if file for step, _ in keys_of(rows, "train"))
    assert all(
        row["dropout"] == (row["split"] == "train") for rows in files.values() for row in rows if row["step"]
    )
    for step in (0, 3, 6, 9, 12):
        held_out = [row for row in files[step] if row["split"] == "eval"]
        assert {row["step"] for row in held_out} == {step}
        said = run.points("eval")[step]
        for column, key in (("margin", "eval_rewards/margins"), ("loss", "eval_loss")):
            assert sum(row[column] for row in held_out) / len(held_out) == pytest.approx(said[key], abs=1e-9)
    for step, point in run.points("train").items():
        mine = [
            row
            for rows in files.values()
            for row in rows
            if row["split"] == "train" and row["step"] == step - 1
        ]
        mine = [row for row in mine if step > 1 or row["dropout"]]
        assert sum(row["margin"] for row in mine) / len(mine) == pytest.approx(
            point["rewards/margins"], abs=1e-9
        )
        assert sum(row["loss"] for row in mine) / len(mine) == pytest.approx(point["loss"], abs=1e-9)


@pytest.mark.parametrize(("step", "elsewhere"), [pytest.param(6, False, marks=pytest.mark.slow), (7, True)])
def test_a_continued_run_has_the_same_rows_as_an_undisturbed_one(
    new_run: NewRun, step: int, elsewhere: bool
) -> None:
    undisturbed = new_run("undisturbed", **SETTINGS)
    assert undisturbed.train() == 0
    run = new_run("interrupted", **SETTINGS)
    assert run.train(LeaveAt(run, 7)) == ExitCode.INTERRUPTED
    if step == 6:  # as after a kill: the evaluation of step 6 is on disk, and is done again
        shutil.rmtree(run.path / "checkpoints/step-000007")
        assert "eval" in {row["split"] for row in rows_of(run)[6]}
    (run.path / "pairs/step-000099.parquet").write_bytes(b"later than the checkpoint")
    if elsewhere:
        run = new_run("again", resume_from=str(run.path / f"checkpoints/step-{step:06d}"), **SETTINGS)
    assert run.train() == 0
    assert 99 not in rows_of(run)

    def everything(of: RunFolder) -> list[str]:
        return sorted(str(row) for rows in rows_of(of).values() for row in rows)

    assert everything(run) == everything(undisturbed)


def test_a_run_that_starts_again_from_nothing_keeps_no_old_rows(new_run: NewRun) -> None:
    run = new_run(**SETTINGS)
    (run.path / "pairs").mkdir()
    (run.path / "pairs/step-000099.parquet").write_bytes(b"old")
    assert run.train() == 0
    assert 99 not in rows_of(run)


@pytest.mark.parametrize(
    ("settings", "nothing"),
    [
        ({"method": "sft"}, {"margin", "reference_chosen_logps", "policy_rejected_logps"}),
        ({"method": "orpo"}, {"reference_chosen_logps", "reference_rejected_mean_logps"}),
    ],
)
def test_what_a_method_does_not_have_is_null(
    new_run: NewRun, settings: dict[str, Any], nothing: set[str]
) -> None:
    run = new_run(max_steps=1, **settings)
    assert run.train() == 0
    rows = rows_of(run)[1]
    assert {row["split"] for row in rows} == {"train", "eval"}
    for row in rows:
        assert all(row[name] is None for name in nothing)
        assert all(row[name] is not None for name in ("policy_chosen_logps", "loss"))


def test_under_another_reference_the_start_of_the_policy_is_not_guessed(
    new_run: NewRun, tmp_path: Path
) -> None:
    other = build_tiny_model(tmp_path / "other", seed=5)
    run = new_run(max_steps=1, reference_model_path=str(other))
    assert run.train() == 0
    rows = [row for row in rows_of(run)[0] if row["split"] == "train"]
    assert all(row["reference_chosen_logps"] is not None for row in rows)
    assert all(row[name] is None for row in rows for name in ("policy_chosen_logps", "margin", "loss"))


def test_it_can_be_left_off(new_run: NewRun) -> None:
    run = new_run(max_steps=1, record_pairs=False)
    assert run.train() == 0
    assert not (run.path / "pairs").exists()


def test_a_pair_knows_that_it_was_cut(new_run: NewRun) -> None:
    run = new_run(max_steps=4, max_length=120)
    assert run.train() == 0
    rows = [row for row in rows_of(run)[0] if row["split"] == "train"]
    assert {row["truncated"] for row in rows} == {True, False}
