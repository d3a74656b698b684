"""SFT, ORPO, SimPO and RPO as whole runs: what is computed, what is said, and what must not matter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import NewRun, RunFolder
from tests.engine.interruptions import LeaveAt
from tests.tiny import tiny_pairs
from training.contract import ExitCode, Metric
from training.engine import loop, objective, reference

SFT: dict[str, Any] = {"method": "sft"}
ORPO: dict[str, Any] = {"method": "orpo", "beta": 0.2}
SIMPO: dict[str, Any] = {"simpo_gamma": 0.5, "beta": 2.0}
RPO: dict[str, Any] = {"rpo_alpha": 0.5, "dpo_normalize_logratios_by_length": True}
METHODS = [pytest.param(settings, id=name) for name, settings in (
    ("sft", SFT), ("orpo", ORPO), ("simpo", SIMPO), ("rpo", RPO)
)]  # fmt: skip
WITHOUT_REFERENCE = METHODS[:3]
# SFT takes the same lines of the loop as the others, whose losses have tests of their own.
FIRST_FAST = [
    METHODS[0],
    *(pytest.param(*method.values, id=method.id, marks=pytest.mark.slow) for method in METHODS[1:]),
]


def write_examples(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def without_rejected(count: int) -> list[dict[str, Any]]:
    return [{key: row[key] for key in ("id", "prompt", "chosen")} for row in tiny_pairs(count)]


@pytest.fixture
def no_reference_pass(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def must_not_run(*arguments: Any, **keywords: Any) -> Any:
        raise AssertionError("the reference was computed")

    monkeypatch.setattr(reference.ReferenceLogps, "__init__", must_not_run)
    yield


@pytest.mark.parametrize("settings", WITHOUT_REFERENCE)
@pytest.mark.usefixtures("no_reference_pass")
def test_no_reference_is_computed_where_the_loss_needs_none(
    new_run: NewRun, settings: dict[str, Any]
) -> None:
    run = new_run(max_steps=2, **settings)
    assert run.train() == 0
    assert "reference" not in {event.get("phase") for event in run.events}
    (plan,) = [event for event in run.events if event["type"] == "plan"]
    for said in (plan, run.result):
        assert said["reference"] == objective.NO_REFERENCE
        assert said["loss"] == objective.Objective(run.config).sentence
    last = run.points("eval")[2]
    assert last["eval_kl"] is None
    assert run.points("train")[2]["kl"] is None


COMMON = {
    Metric.LOSS, Metric.REWARDS_CHOSEN, Metric.REWARDS_REJECTED, Metric.REWARDS_MARGINS,
    Metric.REWARDS_ACCURACIES, Metric.LOGPS_CHOSEN, Metric.LOGPS_REJECTED, Metric.KL, Metric.TRUNCATED,
}  # fmt: skip
OF_STEPS = {Metric.GRAD_NORM, Metric.LEARNING_RATE, Metric.EPOCH, Metric.NUM_TOKENS}
ODDS = {Metric.LOG_ODDS_CHOSEN, Metric.LOG_ODDS_RATIO}
DEFINED = [
    (SFT, {Metric.LOSS, Metric.LOGPS_CHOSEN, Metric.NLL_LOSS, Metric.TRUNCATED}, COMMON | {Metric.NLL_LOSS}),
    (ORPO, (COMMON | ODDS | {Metric.NLL_LOSS}) - {Metric.KL}, COMMON | ODDS | {Metric.NLL_LOSS}),
    (SIMPO, COMMON - {Metric.KL}, COMMON),
    (RPO, COMMON | {Metric.NLL_LOSS}, COMMON | {Metric.NLL_LOSS}),
]


@pytest.mark.parametrize(("settings", "defined", "keys"), DEFINED)
def test_a_metric_that_a_method_does_not_define_is_null(
    new_run: NewRun, settings: dict[str, Any], defined: set[str], keys: set[str]
) -> None:
    run = new_run(max_steps=1, **settings)
    assert run.train() == 0
    train, held_out = run.points("train")[1], run.points("eval")[1]
    assert set(train) == keys | OF_STEPS
    assert {key for key, value in train.items() if value is not None} == defined | OF_STEPS
    found = {key for key, value in held_out.items() if value is not None}
    assert found == {f"eval_{key}" for key in defined | {Metric.ENTROPY}}
    assert set(held_out) == {f"eval_{key}" for key in keys | {Metric.ENTROPY}}


def without_null(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


@pytest.mark.parametrize("settings", FIRST_FAST)
def test_micro_batches_do_not_change_a_step(
    new_run: NewRun, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also not under a small token budget, nor on the short last step of an epoch (11 pairs: 8, 3)."""
    runs = []
    for batch, accumulation, budget in ((1, 8, 512), (8, 1, 100_000), (4, 2, 150)):
        monkeypatch.setitem(loop.TRAIN_BUDGET, "cpu", budget)
        run = new_run(
            f"{batch}x{accumulation}", pairs=11, per_device_train_batch_size=batch, lora_dropout=0.0,
            gradient_accumulation_steps=accumulation, num_train_epochs=2, **settings,
        )  # fmt: skip
        assert run.train() == 0
        runs.append(run.points("train"))
    one, *others = runs
    assert list(one) == [1, 2, 3, 4]
    for other in others:
        for step, values in one.items():
            assert without_null(other[step]) == pytest.approx(without_null(values), rel=2e-4, abs=2e-5), step


@pytest.mark.parametrize("settings", FIRST_FAST)
def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(
    new_run: NewRun, settings: dict[str, Any]
) -> None:
    settings = settings | {"pairs": 12, "num_train_epochs": 2, "lora_dropout": 0.2}
    undisturbed, run = new_run("undisturbed", **settings), new_run("interrupted", **settings)
    assert undisturbed.train() == 0
    assert run.train(LeaveAt(run, 3)) == ExitCode.INTERRUPTED
    assert run.train() == 0
    assert "Continued from the checkpoint of step 3." in run.texts()
    assert run.result["adapter_sha256"] == undisturbed.result["adapter_sha256"]
    assert run.points("train") == undisturbed.points("train")
    assert run.points("eval") == undisturbed.points("eval")


@pytest.mark.parametrize(
    "changes",
    [{"method": "orpo"}, {"rpo_alpha": 0.1}, {"loss_type": "ipo"}, {"simpo_gamma": 0.1},
     {"dpo_normalize_logratios_by_length": True}],
)  # fmt: skip
def test_a_checkpoint_of_another_objective_is_not_continued(new_run: NewRun, changes: dict[str, Any]) -> None:
    first = new_run("first", max_steps=2)
    assert first.train(LeaveAt(first, 1)) == ExitCode.INTERRUPTED
    second = new_run(
        "second", max_steps=2, resume_from=str(first.path / "checkpoints/step-000001"), **changes
    )
    assert second.train() == 0
    assert "belongs to other settings, data or weights" in second.texts()
    assert min(second.points("train")) == 1


@pytest.fixture
def sft_run(new_run: NewRun, tmp_path: Path) -> RunFolder:
    """Rows without a rejected side, and the evaluation on preference pairs."""
    path = write_examples(tmp_path / "examples.jsonl", without_rejected(8))
    return new_run("sft", train_path=path, num_train_epochs=8, learning_rate=1e-2, **SFT)


def test_sft_learns_from_rows_without_a_rejected_side_and_dpo_goes_on_from_it(
    sft_run: RunFolder, new_run: NewRun
) -> None:
    assert sft_run.train() == 0
    result = sft_run.result
    assert result["metrics"]["eval_loss"] < 0.8 * result["initial_metrics"]["eval_loss"]
    assert result["metrics"]["eval_loss"] == pytest.approx(result["metrics"]["eval_nll_loss"], rel=1e-12)
    assert "supervised fine-tuning" in (sft_run.path / "adapter/README.md").read_text()

    dpo = new_run("dpo", adapter_path=str(sft_run.path / "adapter"), max_steps=1)
    assert dpo.train() == 0
    start = dpo.points("eval")[0]
    assert start["eval_loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
    assert start["eval_kl"] == pytest.approx(0, abs=1e-6)
    assert start["eval_logps/chosen"] == pytest.approx(result["metrics"]["eval_logps/chosen"], rel=1e-5)
    assert start["eval_logps/chosen"] > result["initial_metrics"]["eval_logps/chosen"] + 1


@pytest.mark.slow
def test_sft_never_looks_at_the_rejected_side(sft_run: RunFolder, new_run: NewRun) -> None:
    """A preference file and the same rows without their rejected side train the same model."""
    assert sft_run.train() == 0
    pairs = new_run("pairs", pairs=8, num_train_epochs=8, learning_rate=1e-2, **SFT)
    assert pairs.train() == 0
    assert pairs.result["adapter_sha256"] == sft_run.result["adapter_sha256"]
    assert pairs.result["num_tokens"] == sft_run.result["num_tokens"]


@pytest.mark.parametrize("method", ["dpo", "orpo"])
def test_preference_methods_refuse_rows_without_a_rejected_side(
    new_run: NewRun, tmp_path: Path, method: str
) -> None:
    path = write_examples(tmp_path / "examples.jsonl", without_rejected(3))
    run = new_run(train_path=path, method=method)
    assert run.train() == ExitCode.REFUSED
    assert (
        f"Line 1 of {path} is not a preference pair: it has no rejected; its keys are" in run.result["error"]
    )


@pytest.mark.parametrize(
    "row",
    [
        {"id": "1", "prompt": [{"role": "user", "content": "x"}]},
        {"id": "1", "prompt": [{"role": "user", "content": "x"}], "chosen": "y"},
        {"id": "1", "messages": [{"role": "user", "content": "x"}]},
    ],
)
def test_sft_refuses_rows_that_are_not_canonical(new_run: NewRun, tmp_path: Path, row: Any) -> None:
    run = new_run(train_path=write_examples(tmp_path / "examples.jsonl", [row]), **SFT)
    assert run.train() == ExitCode.REFUSED
    assert "is not an example with a prompt and a chosen answer" in run.result["error"]


def test_sft_speaks_of_examples(new_run: NewRun, tmp_path: Path) -> None:
    rows = [*without_rejected(4), {**without_rejected(1)[0], "chosen": []}]
    run = new_run(train_path=write_examples(tmp_path / "examples.jsonl", rows), max_steps=1, **SFT)
    assert run.train() == 0
    assert "1 training examples were dropped: an answer is empty text." in run.texts()
    units = {event["unit"] for event in run.events if event.get("phase") in ("preparing_data", "evaluating")}
    assert units == {"", "examples"}


@pytest.mark.slow
def test_simpo_and_orpo_prefer_the_chosen_side(new_run: NewRun) -> None:
    for name, settings in (("simpo", SIMPO), ("orpo", ORPO | {"beta": 1.0})):
        run = new_run(name, pairs=8, num_train_epochs=12, learning_rate=5e-3, **settings)
        assert run.train() == 0
        first, last = run.result["initial_metrics"], run.result["metrics"]
        assert last["eval_loss"] < first["eval_loss"]
        assert last["eval_rewards/margins"] > first["eval_rewards/margins"]


def test_a_contradiction_ends_as_a_refusal(new_run: NewRun) -> None:
    run = new_run()
    settings = json.loads((run.path / "config.json").read_text()) | {"method": "sft", "rpo_alpha": 0.5}
    (run.path / "config.json").write_text(json.dumps(settings))
    assert run.train() == ExitCode.REFUSED
    assert "rpo_alpha belong to the method dpo" in run.result["error"]
